"""How often each segment of a step counts towards each of its figures, where these are sums over segments."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from spsim.engine.lives import ENDED, STARTED, Integers
from spsim.engine.pieces import Move, Node, Pass, Repeat, Stretch
from spsim.engine.recording import Recording
from spsim.engine.trace import Trace
from spsim.step.itinerary import Item, Visit, segments_of
from spsim.step.segments import Segment

PASSES: tuple[Pass, ...] = ("forward", "backward")


class Sums:
    """Of a row of visits of one rank, whatever the numbers."""

    def __init__(self, items: Sequence[Item], segments: Sequence[Segment]) -> None:
        """Of the `segments` it is known when each task runs, of the others how long they take."""
        trace = _in_tasks(items)
        self.windows = {phase: _between(items, *trace.window_of(phase, 0, 0)) for phase in PASSES}
        """By pass, what runs from the first task of the first layer and micro-batch to the last."""
        name_of = {segment.outline: segment.name for segment in segments_of(items)}
        counts = [(name_of[made.outline], phase, count) for made, (phase, count) in trace.recordings.items()]
        self.passes = [(name, count) for name, phase, count in counts if phase in PASSES]
        self.layers = [(name_of[made.outline], count) for made, count in trace.layers.items()]
        self.syncs = [name for name, phase, _ in counts if phase == "weight_sync"]
        optimizer = (leaf.stretch for leaf in trace.leaves if leaf.stretch.phase == "optimizer")
        self.optimizer = [name_of[stretch.recording.outline] for stretch in optimizer]
        self.classes = {segment.name: segment.outline.classes[0] for segment in segments}
        self._kernels = _diagonal([segment.outline.classes[1] for segment in segments])

    def of_classes(self, moments: Integers) -> dict[str, list[int]]:
        """Picoseconds of the kernels of each segment by its classes."""
        found = iter((self._kernels @ (moments[:, ENDED] - moments[:, STARTED])).tolist())
        return {name: [next(found) for _ in own] for name, own in self.classes.items()}


def _diagonal(blocks: Sequence[Integers]) -> Integers:
    """Arrays along the diagonal of one."""
    rows, columns = (np.cumsum([0, *own]) for own in zip(*map(np.shape, blocks), strict=True))
    found = np.zeros((rows[-1], columns[-1]), dtype=np.int64)
    for block, row, column in zip(blocks, rows, columns, strict=False):
        found[row : row + block.shape[0], column : column + block.shape[1]] = block
    return found


def _in_tasks(items: Sequence[Item]) -> Trace:
    """The step as if its tasks ran one after another, each in the same time."""
    return Trace(_nodes(items, 0, {}), {0: (0,)}, lambda piece: ())


def _nodes(items: Sequence[Item], first: int, made: dict[str, Recording]) -> list[Node]:
    found: list[Node] = []
    for item in items:
        if isinstance(item, Visit):
            segment, length = item.segment, len(item.segment.tasks)
            if segment.name not in made:
                made[segment.name] = Recording(segment.outline, {0: np.array([[0, 0, length]])}, ())
            found.append(Stretch(made[segment.name], segment.phase, item.layer, item.micro_batch, first, first))
            first += length
        else:
            body, length = tuple(_nodes(item.body, first, made)), _tasks(item.body)
            move = Move(length, length, item.layers, item.micro_batches)
            found.append(Repeat(body, int(item.runs), move))
            first += int(item.runs) * length
    return found


def _tasks(items: Sequence[Item]) -> int:
    return sum([_tasks_of(item) for item in items])


def _tasks_of(item: Item) -> int:
    return len(item.segment.tasks) if isinstance(item, Visit) else int(item.runs) * _tasks(item.body)


def _between(items: Sequence[Item], begin: int, end: int) -> dict[str, int]:
    """How often each segment runs from one task to another."""
    found: dict[str, int] = {}
    _add(found, items, begin, end, 1)
    return found


def _add(found: dict[str, int], items: Sequence[Item], begin: int, end: int, times: int) -> None:
    """So many times what runs from one task of some items to another."""
    first = 0
    for item in items:
        tasks = _tasks_of(item)
        own = max(begin - first, 0), min(end - first, tasks)
        if own[0] < own[1]:
            if isinstance(item, Visit):
                found[item.segment.name] = found.get(item.segment.name, 0) + times
            else:
                _add_runs(found, item.body, tasks // int(item.runs), own, times)
        first += tasks


def _add_runs(found: dict[str, int], body: Sequence[Item], tasks: int, own: tuple[int, int], times: int) -> None:
    """The same of a loop whose runs have so many tasks each."""
    (first, begin), (last, end) = (divmod(task, tasks) for task in own)
    if first == last:
        _add(found, body, begin, end, times)
        return
    _add(found, body, begin, tasks, times)
    if last > first + 1:
        _add(found, body, 0, tasks, times * (last - first - 1))
    _add(found, body, 0, end, times)
