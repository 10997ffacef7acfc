"""A step of several pipeline stages for many workloads at once.

Each pass of a chunk takes what its blocks take, so that times and memory of all passes are arrays over workloads; the
clock of the pipeline sums them up, and knows of each stage when it is done and how long it waits for transfers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from spsim.engine.pieces import Pass
from spsim.lazy import lazy
from spsim.program.instructions import LAYER
from spsim.step.columns.closing import Ends, ends_of
from spsim.step.columns.fill import Floats, Places
from spsim.step.columns.replay import Points, Times
from spsim.step.columns.step import EXACT, RanPasses
from spsim.step.columns.walk import Memory
from spsim.step.ending import Times as ClosingTimes
from spsim.step.itinerary import Run
from spsim.step.pipeline.clock import Clock
from spsim.step.pipeline.in_flight import Fullest
from spsim.step.pipeline.orders import KINDS, Numbers, Passes
from spsim.step.stages import Stages

PASSES: tuple[Pass, Pass] = ("forward", "backward")
"""Of a chunk; a sort of passes is twice the place of its chunk among the different ones, and 1 more for backward."""


class Fullness(NamedTuple):
    """Where memory is fullest, for each workload."""

    bytes: Floats
    stage: Places
    chunk: Places
    sort: Places
    level: Floats
    """Over what is there all the time on the stage; 0 or less where nothing more is."""


@dataclass(frozen=True, eq=False)
class StagedColumns:
    """What a step came to; times in picoseconds."""

    ran: RanPasses
    """With a column for each different workload,"""
    columns: Places
    """and which of those each workload is."""
    stages: Stages
    clocks: Sequence[Clock]
    """Of each workload."""
    message_ps: Sequence[Numbers]
    """Of each workload, by lane of its clock."""
    micro_batches: npt.NDArray[np.int64]
    closings: Sequence[ClosingTimes]
    """Of each kind of stages."""
    statics: Floats
    """Bytes that are there all the time on each kind of stages."""

    # Times

    def _of_sorts(self, of: Mapping[tuple[str, Pass], Floats], *, layers: bool = False) -> Floats:
        """The sum over the blocks of each sort of passes, or over its layers only; of the different workloads."""
        some = next(iter(of.values()))
        return np.array([
            sum((n * of[block, phase] for block, n in _counts(runs, layers=layers).items()), np.zeros_like(some))
            for runs in self.stages.chunk_kinds
            for phase in PASSES
        ])  # fmt: skip

    @lazy
    def pass_ps(self) -> Floats:
        """Of each sort of passes."""
        return self._of_sorts(self.ran.lengths)[:, self.columns]

    @lazy
    def _exposed(self) -> Floats:
        kernels = {key: own.sum(axis=0) for key, own in self.ran.kernels.items()}
        return self.pass_ps - self._of_sorts(kernels)[:, self.columns]

    @lazy
    def _clocked(self) -> tuple[Times, Times]:
        """When each stage has run its passes, and how long it waits for transfers between them."""
        chunks = self.stages.kinds_of_chunks
        finished, transfer = np.empty((2, len(chunks), len(self.columns)), np.int64)
        pass_ps = self.pass_ps.astype(np.int64)
        for column, clock in enumerate(self.clocks):
            ranks, own, backward = clock.pass_classes.columns
            of_classes = pass_ps[2 * chunks[ranks, own] + backward, column]
            finished[:, column], transfer[:, column] = clock.totals(of_classes, self.message_ps[column])
        return finished, transfer

    @lazy
    def _ends(self) -> Ends:
        return ends_of(self.closings, self.stages.kind_of, self._clocked[0])

    def _of_stages(self, of: Floats) -> Floats:
        """The sum over all passes of each stage."""
        both = of[::2] + of[1::2]
        found: Floats = self.micro_batches * both[self.stages.kinds_of_chunks].sum(axis=1)
        return found

    @property
    def end(self) -> Times:
        """When the last stage has ended."""
        return self._ends.end

    @property
    def weight_sync(self) -> Times:
        """On the stage with most of it."""
        return self._ends.weight_sync

    @property
    def optimizer(self) -> Times:
        """On the stage that comes to it last."""
        return self._ends.optimizer

    @property
    def phases(self) -> dict[str, Floats]:
        """Of one layer and micro-batch."""
        return {phase: own[self.columns] for (block, phase), own in self.ran.lengths.items() if block == LAYER}

    @lazy
    def exposed(self) -> Floats:
        """Transfers that no kernel hides, on the stage with most of them."""
        found: Floats = (self._clocked[1] + self._of_stages(self._exposed)).max(axis=0)
        return found

    @lazy
    def bubble_ps(self) -> Floats:
        """The sum over stages of times without a pass until all have run theirs, transfers apart."""
        finished, transfer = self._clocked
        found: Floats = (finished.max(axis=0) - self._of_stages(self.pass_ps) - transfer).sum(axis=0)
        return found

    @lazy
    def compute(self) -> Mapping[str, Floats]:
        """Kernels in the layers of the first stage, by class."""
        both = self._of_sorts(self.ran.kernels, layers=True)
        own = (both[::2] + both[1::2])[self.stages.kinds_of_chunks[0]].sum(axis=0)
        return dict(zip(self.ran.block.classes, own[:, self.columns] * self.micro_batches, strict=True))

    # Memory

    @lazy
    def memories(self) -> list[Memory]:
        """Of each sort of passes, for the different workloads."""
        return [self.ran.memory_of_pass(runs, phase) for runs in self.stages.chunk_kinds for phase in PASSES]

    @lazy
    def levels(self) -> tuple[Floats, Floats]:
        """Of each sort of passes, how much memory it takes over what is there before it, and leaves."""
        highest = np.array([own.highest for own in self.memories])[:, self.columns]
        return np.maximum(highest, 0.0), np.array([own.total for own in self.memories])[:, self.columns]

    @lazy
    def freed(self) -> Points:
        """For which workloads backward passes free what forward passes leave, which is something."""
        left = self.levels[1]
        found: Points = ((left[::2] == -left[1::2]) & (left[::2] > 0)).all(axis=0)
        return found

    @lazy
    def fullest(self) -> Fullness:
        """The moment at which memory is fullest: of stages that are equally full of the first."""
        found = [self._fullest(clock.fullest(self.stages.kind_of), k) for k, clock in enumerate(self.clocks)]
        return Fullness(*(np.array(own) for own in zip(*found, strict=True)))

    def _fullest(self, among: Fullest, column: int) -> tuple[float, int, int, int, float]:
        """Of one workload, among passes of which one is the fullest."""
        highest, left = self.levels[0][:, column], self.levels[1][::2, column]
        chunks = self.stages.kinds_of_chunks
        sorts = 2 * chunks[among.ranks, among.chunks] + (among.kinds == KINDS.index("B"))
        levels = (among.held * left[chunks[among.ranks]]).sum(axis=1) + highest[sorts]
        always = self.statics[self._kind_of[among.ranks]]
        taken = always + np.maximum(levels, 0.0)
        best = np.flatnonzero(taken == taken.max())
        best = best[among.ranks[best] == among.ranks[best].min()]
        at = best[0]
        stage, chunk, sort = int(among.ranks[at]), int(among.chunks[at]), int(sorts[at])
        if len(best) > 1 and levels[at] > 0:
            own, of_passes, before = self._passes_of(column, stage)
            first = int((before + self.levels[0][of_passes, column]).argmax())
            chunk, sort = int(own.chunks[first]), int(of_passes[first])
        return taken[at], stage, chunk, sort, levels[at]

    def _passes_of(self, column: int, stage: int) -> tuple[Passes, Places, Floats]:
        """The passes of a stage, their sorts, and what is there before each."""
        own = self.clocks[column].passes_of(stage)
        sorts = 2 * self.stages.kinds_of_chunks[stage, own.chunks] + (own.kinds == KINDS.index("B"))
        left = self.levels[1][sorts, column]
        return own, sorts, left.cumsum() - left

    @lazy
    def _kind_of(self) -> Places:
        return np.array(self.stages.kind_of)

    def first_above(self, column: int, stage: int, room: float) -> tuple[int, int, float] | None:
        """The first pass of a stage that takes more than some bytes over what is there all the time: its chunk, its
        sort, and the room that is left before it.
        """
        own, sorts, before = self._passes_of(column, stage)
        over = np.flatnonzero(before + self.levels[0][sorts, column] > room)
        return (int(own.chunks[over[0]]), int(sorts[over[0]]), float(room - before[over[0]])) if len(over) else None

    @lazy
    def exact(self) -> Points:
        """For which workloads all numbers hold."""
        return self.ran.holds[self.columns] & self.freed & (self.fullest.bytes < EXACT) & (self.end < EXACT)


def _counts(runs: Sequence[Run], *, layers: bool) -> Counter[str]:
    """How often each block is in a chunk, or each that is a layer."""
    found: Counter[str] = Counter()
    for run in runs:
        if run.numbered or not layers:
            found[run.block] += run.count
    return found
