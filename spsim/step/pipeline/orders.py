"""In which order each rank of a pipeline runs its passes.

The orders are those that megatron-core 0.16.1 and torch.distributed.pipelining 2.13.0 run; where both have a schedule,
they run it in one order. p stages (ranks), v chunks a rank, m micro-batches, groups of g.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, cast, get_args

import numpy as np
import numpy.typing as npt

from spsim.inputs.schedules import V_SHAPED, Schedule, torch_group

Kind = Literal["F", "B", "I", "W"]
"""Forward, whole backward, and its halves: the gradient of the input, the gradients of the weights."""


class Action(NamedTuple):
    """One pass of a micro-batch through one chunk of a rank."""

    kind: Kind
    chunk: int
    """Of the rank's own, from 0."""
    micro_batch: int


Row = tuple[Action, ...]
"""What one rank runs, in order."""
Numbers = npt.NDArray[np.int64]
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True)
class Passes:
    """The passes of one rank in order, as arrays: the quick way to say them where there are many."""

    kinds: Numbers
    """Places in `KINDS`."""
    chunks: Numbers
    micro_batches: Numbers

    @classmethod
    def of(cls, row: Row) -> Passes:
        kinds = np.array([KINDS.index(action.kind) for action in row])
        return cls(kinds, *np.array([action[1:] for action in row]).T)

    def row(self) -> Row:
        columns = (self.kinds.tolist(), self.chunks.tolist(), self.micro_batches.tolist())
        return tuple([Action(KINDS[kind], *numbers) for kind, *numbers in zip(*columns, strict=True)])


def orders(schedule: Schedule, stages: int, chunks: int, micro_batches: int, group: int | None) -> tuple[Row, ...]:
    """A row for each rank.

    `group` is how many micro-batches a chunk runs before the next takes over, the stages by default (torch's own number
    where only torch has the schedule); schedules without groups do not read it.
    """
    if schedule == "interleaved_zero_bubble":
        group = group or torch_group(stages, micro_batches)
    rows = {
        "1f1b": _one_f_one_b,
        "gpipe": _gpipe,
        "looped_bfs": _looped_bfs,
        "interleaved_zero_bubble": _interleaved_zero_bubble,
        "zbv": _zbv,
        "dualpipev": _dualpipev,
    }
    return tuple(tuple(rows[schedule](stages, rank, chunks, micro_batches, group or stages)) for rank in range(stages))


def global_stage(schedule: Schedule, stages: int, rank: int, chunk: int) -> int:
    """Which of the p v stages of the model a chunk is."""
    if schedule in V_SHAPED:
        return rank if chunk == 0 else 2 * stages - 1 - rank
    return chunk * stages + rank


def place_of(schedule: Schedule, stages: int, stage: int) -> tuple[int, int]:
    """(rank, chunk) of a stage of the model."""
    chunk, rank = divmod(stage, stages)
    return (stages - 1 - rank if chunk and schedule in V_SHAPED else rank), chunk


def gradients(kind: Kind, stage: int) -> tuple[Literal["input", "weight"], ...]:
    """What a backward pass works out on a stage of the model.

    torch does nothing for I on the first stage, whose input needs no gradient, and W runs the whole pass there.
    """
    if kind == "F" or (kind == "I" and stage == 0):
        return ()
    if kind == "I":
        return ("input",)
    return ("weight",) if kind == "W" and stage else ("input", "weight")


def pairs(schedule: Schedule, stages: int, rank: int, row: Sequence[Action]) -> Iterator[tuple[Action, ...]]:
    """The row in units whose sends leave together: single actions, but forward with backward in DualPipeV.

    torch runs the halves of such a pair one after the other. On the last rank the first two are kept apart.
    """
    apart = rank == stages - 1
    place = 0
    while place < len(row):
        pair = schedule == "dualpipev" and [action.kind for action in row[place : place + 2]] == ["F", "B"]
        together = 2 if pair and not apart else 1
        apart = apart and not pair
        yield tuple(row[place : place + together])
        place += together


def forwards(chunks: int, micro_batches: int, group: int) -> Numbers:
    """Chunks and micro-batches of the forward passes, by groups; backward passes have chunk v − 1 − c in its place."""
    numbers = np.arange(micro_batches)
    order = np.lexsort(
        (np.tile(numbers, chunks), np.arange(chunks).repeat(micro_batches), np.tile(numbers // group, chunks))
    )
    return np.array(np.divmod(order, micro_batches))


def warm_up(stages: int, rank: int, chunks: int, micro_batches: int, group: int) -> int:
    """Forward passes before those that a backward pass follows, as Megatron counts them in 1F1B: p − r − 1, or
    (v − 1) g + 2 (p − r − 1) with several chunks.
    """
    behind = stages - 1 - rank
    return min(behind if chunks == 1 else (chunks - 1) * group + 2 * behind, micro_batches * chunks)


def one_f_one_b(order: Numbers, before: int) -> Passes:
    """Passes of 1F1B, interleaved or not: the forward ones in `order`, some of them `before` pairs of F and B."""
    number = order.shape[1]
    places = np.arange(number)
    at = np.concatenate([np.maximum(places, 2 * places - before), np.minimum(2 * places + before + 1, places + number)])
    columns = np.empty((3, 2 * number), np.int64)
    columns[0, at] = np.repeat([0, 1], number)
    columns[1, at] = np.concatenate([order[0], order[0, -1] - order[0]])
    columns[2, at] = np.tile(order[1], 2)
    return Passes(*columns)


def _one_f_one_b(stages: int, rank: int, chunks: int, micro_batches: int, group: int) -> Row:
    before = warm_up(stages, rank, chunks, micro_batches, group)
    return one_f_one_b(forwards(chunks, micro_batches, group), before).row()


def _interleaved_zero_bubble(stages: int, rank: int, chunks: int, micro_batches: int, group: int) -> Iterator[Action]:
    """As 1F1B with half the distance between ranks, which the weight gradients fill: r passes behind on rank r."""
    order = [*map(tuple, forwards(chunks, micro_batches, group).T.tolist())]
    first = min((chunks - 1) * group + stages - 1 - rank, len(order))
    yield from (Action("F", chunk, micro_batch) for chunk, micro_batch in order[:first])
    for place, (chunk, micro_batch) in enumerate(order):
        if first + place < len(order):
            yield Action("F", *order[first + place])
        yield Action("I", chunks - 1 - chunk, micro_batch)
        if place >= rank:
            yield _weight(order, place - rank)
    yield from (_weight(order, place) for place in range(max(0, len(order) - rank), len(order)))


def _weight(order: Sequence[tuple[int, int]], place: int) -> Action:
    chunk, micro_batch = order[place]
    return Action("W", order[-1][0] - chunk, micro_batch)


def _gpipe(_stages: int, _rank: int, _chunks: int, micro_batches: int, _group: int) -> Iterator[Action]:
    yield from (Action("F", 0, micro_batch) for micro_batch in range(micro_batches))
    yield from (Action("B", 0, micro_batch) for micro_batch in range(micro_batches))


def _looped_bfs(_stages: int, _rank: int, chunks: int, micro_batches: int, _group: int) -> Iterator[Action]:
    """GPipe chunk by chunk, and back the way that it came."""
    order = [*map(tuple, forwards(chunks, micro_batches, micro_batches).T.tolist())]
    yield from (Action("F", chunk, micro_batch) for chunk, micro_batch in order)
    yield from (Action("B", chunk, micro_batch) for chunk, micro_batch in reversed(order))


class _Passes:
    """Passes in the order asked for; each kind takes the micro-batches of a chunk one after the other."""

    def __init__(self) -> None:
        self.row: list[Action] = []
        self.waiting: deque[tuple[int, int]] = deque()
        """Whose weight gradients are still to come, in the order of their I."""
        self._next: Counter[tuple[str, int]] = Counter()

    def run(self, *passes: str) -> None:
        """Such as F0 or W1; B and I are one backward pass and count together."""
        for name in passes:
            kind, chunk = cast("Kind", name[0]), int(name[1])
            counter = "B" if kind == "I" else kind, chunk
            action = Action(kind, chunk, self._next[counter])
            self._next[counter] += 1
            self.row.append(action)
            if kind == "I":
                self.waiting.append(action[1:])

    def weight(self) -> None:
        """The oldest weight gradient that waits, if one does."""
        if self.waiting:
            self.row.append(Action("W", *self.waiting.popleft()))

    def number(self, kind: str, chunk: int) -> int:
        """Passes so far."""
        return self._next[kind, chunk]


def _zbv(stages: int, rank: int, _chunks: int, micro_batches: int, _group: int) -> Iterator[Action]:
    """The order for as many micro-batches as fill the pipeline, without those that there are not."""
    full = max(2 * stages - 1, micro_batches)
    behind = stages - rank
    passes = _Passes()
    run = passes.run
    run(*["F0"] * (2 * behind - 1), *["F1", "F0"] * rank, *["F1", "I1", "W1"] * behind)
    while passes.number("F", 1) < full:
        if passes.number("F", 0) < full:
            run("F0")
        run("I0", "W0", "F1", "I1", "W1")
    run(*["I0", "I1"] * rank, *["I0", "W0"] * behind)
    for chunk in (1, 0):
        run(*[f"W{chunk}"] * (full - passes.number("W", chunk)))
    return (action for action in passes.row if action.micro_batch < micro_batches)


def _dualpipev(stages: int, rank: int, _chunks: int, micro_batches: int, _group: int) -> Iterator[Action]:
    """DeepSeek's eight steps, as torch writes them down."""
    behind = stages - rank - 1
    passes = _Passes()
    run = passes.run
    run(*["F0"] * (2 * behind), *["F0", "F1"] * (rank + 1))
    for _ in range(behind):
        run("I1")
        passes.weight()
        run("F1")
    run(*["F0", "B1", "F1", "B0"] * (micro_batches - 2 * stages + rank + 1), *["B1", "F1", "B0"] * behind)
    run(*[f"{'B' if place <= rank else 'I'}{1 - place % 2}" for place in range(2 * (rank + 1))])
    for _ in range(behind):
        passes.weight()
        run("I0")
    for _ in range(rank + 1):
        passes.weight()
    return iter(passes.row)
