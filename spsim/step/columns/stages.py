"""Steps of several pipeline stages, for many plans of as many stages and chunks at once, each for many workloads.

Each pass of a chunk takes what its blocks take, so that times and memory of all passes are arrays; the clock of the
pipeline sums them up, and knows of each stage when it is done and how long it waits for transfers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from spsim.lazy import lazy
from spsim.step.columns.chunks import PASSES, ChunkPasses
from spsim.step.columns.clocked import Asked, totals
from spsim.step.columns.closing import Closings, Ends, ends_of, joined, order_of
from spsim.step.columns.fill import Floats, Places
from spsim.step.columns.replay import Points, Times
from spsim.step.columns.step import EXACT, first_layer
from spsim.step.pipeline.clock import Clock
from spsim.step.pipeline.in_flight import Fullest
from spsim.step.pipeline.many import Totals
from spsim.step.pipeline.orders import KINDS, Numbers
from spsim.step.stages import Stages


class PlanColumns(NamedTuple):
    """One plan for some workloads."""

    passes: ChunkPasses
    """Of its chunks, for all different workloads of its blocks,"""
    columns: Places
    """and which of those each workload is."""
    micro_batches: npt.NDArray[np.int64]
    message_ps: Times
    """Between two stages, within a node and between two, for all different workloads."""
    nodes: tuple[int, ...]
    """Of each lane of the clock: 0 where its messages stay within a node, 1 where they do not."""
    closings: Closings
    statics: Sequence[int]
    """Bytes that are there all the time on each kind of stages."""


class Fullness(NamedTuple):
    """Where memory is fullest, for each step."""

    bytes: Floats
    stage: Places
    chunk: Places
    place: Places
    """Of the pass: forward or backward."""
    level: Floats
    """Over what is there all the time on the stage; 0 or less where nothing more is."""


@dataclass(frozen=True, eq=False)
class StagedColumns:
    """What steps came to, plan after plan; times in picoseconds."""

    stages: Stages
    plans: Sequence[PlanColumns]
    clock_of: Callable[[int], Clock]
    """Of a number of micro-batches."""

    @lazy
    def lengths(self) -> list[int]:
        """Steps of each plan."""
        return [len(plan.columns) for plan in self.plans]

    @lazy
    def plan_of(self) -> Places:
        """Which plan each step is of."""
        return np.repeat(np.arange(len(self.plans)), self.lengths)

    @lazy
    def workloads(self) -> Places:
        """Which workload of its plan's blocks each step has."""
        return np.concatenate([plan.columns for plan in self.plans])

    @lazy
    def micro_batches(self) -> npt.NDArray[np.int64]:
        """Of each step."""
        return np.concatenate([plan.micro_batches for plan in self.plans])

    @lazy
    def _rows(self) -> list[Places]:
        """Where the different chunks stand among those of the blocks of each plan."""
        return [
            np.array([plan.passes.rows[chunk] for chunk in self.stages.chunk_kinds], dtype=np.intp)
            for plan in self.plans
        ]

    def _of_chunks(self, of: Callable[[ChunkPasses], Floats]) -> Floats:
        """By pass, chunk and step, from what blocks have by pass, chunk and workload."""
        every = zip(self.plans, self._rows, strict=True)
        return np.concatenate([of(plan.passes)[..., rows[:, None], plan.columns] for plan, rows in every], axis=-1)

    # Times

    @lazy
    def pass_ps(self) -> Floats:
        """By pass, chunk and step."""
        return self._of_chunks(lambda own: own.lengths)

    @lazy
    def _exposed(self) -> Floats:
        return self.pass_ps - self._of_chunks(lambda own: own.kernels)

    @lazy
    def _clocked(self) -> Totals:
        """When each stage has run its passes, and how long it waits for transfers between them."""
        patterns: dict[tuple[int, ...], int] = {}
        which = [patterns.setdefault(plan.nodes, len(patterns)) for plan in self.plans]
        messages = [plan.message_ps[:, plan.columns] for plan in self.plans]
        asked = Asked(
            np.minimum(self.pass_ps, EXACT), self.stages.kinds_of_chunks, np.concatenate(messages, axis=1),
            np.array([*patterns]).T, np.repeat(which, self.lengths), self.micro_batches,
        )  # fmt: skip
        return totals(asked, self.clock_of)

    @lazy
    def _ends(self) -> Ends:
        found = Ends(*np.empty((3, len(self.plan_of)), np.int64))
        alike: dict[Hashable, list[int]] = defaultdict(list)
        for number, plan in enumerate(self.plans):
            alike[order_of(plan.closings)].append(number)
        for numbers in alike.values():
            columns = np.flatnonzero(np.isin(self.plan_of, numbers))
            closings = joined([self.plans[n].closings for n in numbers], [self.lengths[n] for n in numbers])
            own = ends_of(closings, self.stages.kind_of, self._clocked.finished[:, columns])
            for into, times in zip(found, own, strict=True):
                into[columns] = times
        return found

    @lazy
    def _chunks_of_stages(self) -> Floats:
        """How many chunks of each sort each stage has."""
        kinds = np.arange(len(self.stages.chunk_kinds))
        found: Floats = (self.stages.kinds_of_chunks[..., None] == kinds).sum(axis=1).astype(np.float64)
        return found

    def _of_stages(self, of: Floats) -> Floats:
        """The sum over all passes of each stage."""
        found: Floats = self.micro_batches * (self._chunks_of_stages @ of.sum(axis=0))
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

    @lazy
    def phases(self) -> dict[str, Floats]:
        """Of the first layer and of one micro-batch."""
        layer = first_layer(chunk.runs for chunks in self.stages for chunk in chunks)
        return {
            phase: np.concatenate([plan.passes.ran.lengths[layer, phase][plan.columns] for plan in self.plans])
            for phase in PASSES
        }

    @lazy
    def exposed(self) -> Floats:
        """Transfers that no kernel hides, on the stage with most of them."""
        found: Floats = (self._clocked.transfer + self._of_stages(self._exposed)).max(axis=0)
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
        names = dict.fromkeys(name for plan in self.plans for name in plan.passes.of_layers)
        counts = self._chunks_of_stages[0]
        return {name: self.micro_batches * (counts @ self._of_chunks(lambda own, n=name: own.class_of_layers(n)))  # type: ignore[misc]
                for name in names}  # fmt: skip

    # Memory

    @lazy
    def highest(self) -> Floats:
        """Bytes of each pass over what is there before it."""
        return self._of_chunks(lambda own: own.highest)

    @lazy
    def left(self) -> Floats:
        """What each pass leaves."""
        return self._of_chunks(lambda own: own.left)

    @lazy
    def freed(self) -> Points:
        """In which steps backward passes free what forward passes leave, which is something."""
        forward, backward = self.left
        found: Points = ((forward == -backward) & (forward > 0)).all(axis=0)
        return found

    @lazy
    def statics(self) -> Floats:
        """Bytes that are there all the time: by kind of stages and step."""
        return np.repeat(np.array([plan.statics for plan in self.plans], dtype=np.float64).T, self.lengths, axis=1)

    @lazy
    def clocks(self) -> tuple[list[Clock], Places]:
        """Those of all numbers of micro-batches, and which each step has."""
        every, which = np.unique(self.micro_batches, return_inverse=True)
        return [self.clock_of(number) for number in every.tolist()], which.reshape(-1)

    @lazy
    def by_structure(self) -> list[tuple[Clock, Places]]:
        """Steps whose passes come in one order."""
        clocks, which = self.clocks
        found: dict[int, tuple[Clock, list[int]]] = {}
        for place, clock in enumerate(clocks):
            found.setdefault(id(clock.structure), (clock, []))[1].append(place)
        return [(clock, np.flatnonzero(np.isin(which, places))) for clock, places in found.values()]

    @lazy
    def fullest(self) -> Fullness:
        """The moment at which memory is fullest: of stages that are equally full of the first."""
        count = len(self.plan_of)
        stage, chunk, place = np.empty((3, count), np.intp)
        found = Fullness(np.empty(count), stage, chunk, place, np.empty(count))
        for clock, columns in self.by_structure:
            own = self._fullest(clock, clock.fullest(self.stages.kind_of), columns)
            for into, values in zip(found, own, strict=True):
                into[columns] = values
        return found

    def _fullest(self, clock: Clock, among: Fullest, columns: Places) -> Fullness:
        """Of some steps, among passes of which one is the fullest."""
        places = (among.kinds == KINDS.index("B")).astype(np.intp)
        left, highest = self.left[0][:, columns], self.highest[..., columns]
        levels = self._held(among) @ left + highest[places, self.stages.kinds_of_chunks[among.ranks, among.chunks]]
        taken = self.statics[np.array(self.stages.kind_of)[among.ranks]][:, columns] + np.maximum(levels, 0.0)
        most = taken.max(axis=0)
        best = taken == most
        first = np.where(best, among.ranks[:, None], len(self.stages)).argmin(axis=0)
        own = best & (among.ranks[:, None] == among.ranks[first])
        level = levels[first, np.arange(len(columns))]
        found = Fullness(most, among.ranks[first], among.chunks[first], places[first], level)
        tied = np.flatnonzero((own.sum(axis=0) > 1) & (level > 0))
        for stage in np.unique(found.stage[tied]).tolist():
            at = tied[found.stage[tied] == stage]
            passes = _Passes(self, clock, stage, columns[at])
            one = (passes.before + passes.highest).argmax(axis=0)
            found.chunk[at], found.place[at] = passes.chunks[one], passes.places[one]
        return found

    def _held(self, among: Fullest) -> Floats:
        """Micro-batches of each sort of chunks whose activations are there before passes."""
        found = np.zeros((len(among.ranks), len(self.stages.chunk_kinds)))
        rows = np.broadcast_to(np.arange(len(found))[:, None], among.held.shape)
        np.add.at(found, (rows, self.stages.kinds_of_chunks[among.ranks]), among.held)
        return found

    def first_above(self, columns: Places, room: Floats) -> tuple[Places, Places, Floats]:
        """The first passes of the fullest stages of some steps that take more than some room over what is there all the
        time: their chunks and places, and the room that is left before them.
        """
        found = np.zeros((2, len(columns)), np.intp)
        left = np.zeros(len(columns))
        stages = self.fullest.stage[columns]
        for clock, own in self.by_structure:
            here = np.isin(columns, own)
            for stage in np.unique(stages[here]).tolist():
                at = np.flatnonzero(here & (stages == stage))
                passes = _Passes(self, clock, stage, columns[at])
                first = (passes.before + passes.highest > room[at]).argmax(axis=0)
                found[:, at] = passes.chunks[first], passes.places[first]
                left[at] = room[at] - passes.before[first, np.arange(len(at))]
        return found[0], found[1], left

    @lazy
    def exact(self) -> Points:
        """In which steps all numbers hold."""
        holds = np.concatenate([plan.passes.ran.holds[plan.columns] for plan in self.plans])
        short: Any = (self._of_stages(self.pass_ps) < EXACT).all(axis=0)
        found: Points = holds & short & self.freed & (self.fullest.bytes < EXACT) & (self.end < EXACT)
        return found


class _Passes:
    """The passes of a stage in order, in some steps."""

    def __init__(self, steps: StagedColumns, clock: Clock, stage: int, columns: Places) -> None:
        own = clock.passes_of(stage)
        self.chunks: Numbers = own.chunks
        self.places: Numbers = (own.kinds == KINDS.index("B")).astype(np.intp)
        sorts = self.places, steps.stages.kinds_of_chunks[stage, own.chunks]
        left = steps.left[..., columns][sorts]
        self.before: Floats = left.cumsum(axis=0) - left
        """Bytes that are there before each."""
        self.highest: Floats = steps.highest[..., columns][sorts]
