"""How often each segment of a step counts towards each of its figures, where these are sums over segments."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from spsim.engine.pieces import Move, Node, Pass, Repeat, Stretch
from spsim.engine.recording import ENDED, STARTED, Integers, Recording
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


def _between(items: Sequence[Item], begin: int, end: int) -> Counter[str]:
    """How often each segment runs from one task to another."""
    found = _before(items, end)
    found.subtract(_before(items, begin))
    return +found


def _before(items: Sequence[Item], task: int) -> Counter[str]:
    """How often each segment has run before a task."""
    found: Counter[str] = Counter()
    for item in items:
        tasks = _tasks_of(item)
        if task <= 0:
            break
        if isinstance(item, Visit):
            found[item.segment.name] += 1
        else:
            runs, rest = divmod(min(task, tasks), _tasks(item.body))
            for name, count in _before(item.body, _tasks(item.body)).items():
                found[name] += runs * count
            found.update(_before(item.body, rest))
        task -= tasks
    return found
