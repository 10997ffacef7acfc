"""What the stages of a pipeline run, whatever the workload and the hardware: found once for all of their steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import numpy as np

from spsim.engine.pieces import Pass
from spsim.inputs.schedules import Schedule
from spsim.lazy import Cache, lazy
from spsim.program.assembly import HEAD
from spsim.step.halves import Halves
from spsim.step.itinerary import Blocks, Chunk, Item, Run, chunk_pass
from spsim.step.pipeline.clock import Clock
from spsim.step.pipeline.in_flight import fullest
from spsim.step.pipeline.orders import KINDS, Action, Numbers, global_stage, gradients
from spsim.step.pipeline.tape import Score
from spsim.step.rows import Rows

Work = Literal["forward", "backward", "input gradients", "weight gradients", "nothing"]
"""What a pass of a chunk runs."""
PHASES: Mapping[Work, Pass] = {
    "forward": "forward", "backward": "backward", "input gradients": "backward", "weight gradients": "backward",
}  # fmt: skip
Sort = tuple[Chunk, Work]
"""Of passes that are alike."""
KEPT_ORDERS = 16
"""Of the passes of some stages."""


class PlacedChunk(NamedTuple):
    """A chunk of a stage, and the number of its first layer in the model."""

    runs: Chunk
    first: int


def work_of(schedule: Schedule, stages: int, rank: int, action: Action) -> Work:
    """What an action of a rank runs."""
    if action.kind == "F":
        return "forward"
    match gradients(action.kind, global_stage(schedule, stages, rank, action.chunk)):
        case ():
            return "nothing"
        case (one,):
            return "input gradients" if one == "input" else "weight gradients"
    return "backward"


@dataclass(frozen=True, eq=False)
class Passes:
    """What the chunks of a stage can run."""

    blocks: Blocks
    halves: Halves[Blocks]
    freeing: Mapping[str, Blocks] = field(default_factory=dict)
    """Where outputs are kept once they are sent, backward passes that free that of their chunk, by block."""

    def items(self, chunk: Chunk, work: Work, *, first: int = 0, micro_batch: int = 0) -> Sequence[Item]:
        """One pass of a chunk whose layers are numbered from `first`. What it sends goes with the pass, or is kept to
        the end of its backward pass, or of the half for weights: of all but the last chunk, of which nothing is sent.
        """
        if work == "nothing":
            return ()
        found = {"input gradients": self.halves.inputs, "weight gradients": self.halves.weights}
        blocks, phase = found.get(work, self.blocks), PHASES[work]
        kept = bool(self.freeing) and all(run.block != HEAD for run in chunk)
        if kept and work in self.freeing:
            blocks, chunk = {**blocks, FREEING: self.freeing[work][chunk[0].block]}, _freeing(chunk)
        loops = chunk_pass(blocks, chunk, phase, first=first, micro_batch=micro_batch)
        return (*loops[:-1], replace(loops[-1], drops=())) if kept and work == "forward" else loops


FREEING = "freeing"
"""The block whose backward pass frees the output of its chunk."""


def _freeing(chunk: Chunk) -> Chunk:
    """A chunk of which the first block, the last to run backward, is that one."""
    first, *rest = chunk
    apart = [replace(first, count=first.count - 1)] if first.count > 1 else []
    return [replace(first, block=FREEING, count=1), *apart, *rest]


class Stages(Sequence[Sequence[PlacedChunk]]):
    """The chunks of each stage."""

    def __init__(self, chunks: Sequence[Sequence[PlacedChunk]]) -> None:
        self._chunks = tuple(map(tuple, chunks))
        self._sorted: Cache[SortedPasses] = Cache(KEPT_ORDERS, lambda _: 1)

    def __getitem__(self, stage: Any) -> Any:
        return self._chunks[stage]

    def __len__(self) -> int:
        return len(self._chunks)

    @lazy
    def runs(self) -> tuple[Chunk, ...]:
        """The blocks of all chunks of each stage."""
        return tuple(tuple(run for chunk in chunks for run in chunk.runs) for chunks in self._chunks)

    @lazy
    def kinds(self) -> tuple[Chunk, ...]:
        """The different ones of these,"""
        return tuple(dict.fromkeys(self.runs))

    @lazy
    def kind_of(self) -> tuple[int, ...]:
        """and which of them each stage runs."""
        places = {runs: place for place, runs in enumerate(self.kinds)}
        return tuple(places[runs] for runs in self.runs)

    @lazy
    def chunk_kinds(self) -> tuple[tuple[Run, ...], ...]:
        """The different blocks of chunks,"""
        return tuple(dict.fromkeys(tuple(chunk.runs) for chunks in self._chunks for chunk in chunks))

    @lazy
    def kinds_of_chunks(self) -> Numbers:
        """and which of them each chunk of each stage runs."""
        places = {runs: place for place, runs in enumerate(self.chunk_kinds)}
        return np.array([[places[tuple(chunk.runs)] for chunk in chunks] for chunks in self._chunks])

    def sorted(self, passes: Passes, clock: Clock) -> SortedPasses:
        """The passes of a step by what is alike."""
        return self._sorted.get((passes, clock.pass_classes), lambda: SortedPasses(passes, self, clock))


class FullestPasses(NamedTuple):
    """Passes of which one is that at which memory is fullest, if backward passes free what forward passes leave."""

    stages: Numbers
    """One of each kind,"""
    firsts: Numbers
    """and the first of its passes."""
    sorts: Numbers
    held: Numbers
    """By chunk, micro-batches before each."""
    forward: Numbers
    """Sort of the forward pass of each chunk, by stage,"""
    backward: Numbers
    """and of the backward pass."""
    leaving: Numbers
    """Sorts of the forward passes of the stage of each."""

    def highest(self, highest: Numbers, left: Numbers) -> Numbers | None:
        """Bytes at the fullest of each kind, where sorts of passes take and leave so many; None where not all is
        freed.
        """
        if (left[self.forward] < 0).any() or (left[self.forward] != -left[self.backward]).any():
            return None
        levels = (self.held * left[self.leaving]).sum(axis=1) + highest[self.sorts]
        found: Numbers = np.maximum.reduceat(levels, self.firsts)
        return found


class SortedPasses:
    """The different passes of the chunks of all stages."""

    def __init__(self, passes: Passes, stages: Stages, clock: Clock) -> None:
        every: list[Sort] = [
            (stages[rank][chunk].runs, work_of(clock.schedule, clock.stages, rank, Action(kind, chunk, 0)))
            for rank, chunk, kind, _ in clock.classes
        ]
        places: dict[Sort, int] = {}
        of_classes = [places.setdefault(sort, len(places)) for sort in every]
        self.sorts: tuple[Sort, ...] = tuple(places)
        self.of_classes: Numbers = np.array(of_classes)
        """Place among the sorts of each class of passes of the clock."""
        self.of_passes: Numbers = np.full((clock.stages, clock.chunks * len(KINDS)), -1)
        """The same by stage, and by chunk and place in `KINDS`; -1 where there is none."""
        for (rank, chunk, kind, _), place in zip(clock.classes, of_classes, strict=True):
            self.of_passes[rank, chunk * len(KINDS) + KINDS.index(kind)] = place
        self._fullest: FullestPasses | None = None
        self._in_order: tuple[Numbers, Numbers] | None = None
        self.rows = Rows([passes.items(*sort) for sort in self.sorts])

    def place(self, rank: int, action: Action) -> int:
        """Of a pass of a stage among the sorts."""
        return self.of_stage(rank)[action.chunk * len(KINDS) + KINDS.index(action.kind)]

    def of_stage(self, rank: int) -> list[int]:
        """The row of a stage in `of_passes`."""
        return self._rows[rank]

    def in_order(self, score: Score) -> tuple[Numbers, Numbers]:
        """Sort of each pass of a step with these classes, those of a stage in order, and the first of each stage."""
        if self._in_order is None:
            kinds, chunks, _ = score.columns
            sorts = self.of_passes[score.ranks, len(KINDS) * chunks + kinds]
            self._in_order = sorts, np.searchsorted(score.ranks, np.arange(len(self.of_passes)))
        return self._in_order

    def fullest(self, score: Score, kinds: Sequence[int]) -> FullestPasses:
        """Of stages of such kinds, all of which are there."""
        if self._fullest is None:
            found = fullest(score, np.array(kinds))
            sorts = self.of_passes[found.ranks, len(KINDS) * found.chunks + found.kinds]
            forward, backward = (self.of_passes[:, KINDS.index(kind) :: len(KINDS)] for kind in ("F", "B"))
            firsts = np.searchsorted(np.array(kinds)[found.ranks], np.unique(kinds))
            self._fullest = FullestPasses(
                found.ranks[firsts], firsts, sorts, found.held, forward, backward, forward[found.ranks]
            )
        return self._fullest

    @lazy
    def _rows(self) -> list[list[int]]:
        rows: list[list[int]] = self.of_passes.tolist()
        return rows
