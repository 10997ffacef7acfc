"""A step for many workloads at once: its times and its memory as arrays."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from spsim.engine.pieces import Pass
from spsim.lazy import lazy
from spsim.program.instructions import LAYER
from spsim.step.columns.fill import Fill, Floats, Places, parts_of
from spsim.step.columns.order import order_of
from spsim.step.columns.passes import PassColumns
from spsim.step.columns.replay import Contention, Points, Times, replay
from spsim.step.columns.walk import Branch, Leaf, Memory, Node, nodes_of
from spsim.step.itinerary import Blocks, Chunk, Run, Runs, accumulation, chunk_pass
from spsim.step.segments import Segment

Key = tuple[str, Pass]
"""A pass of a block."""
EXACT = 2.0**53
"""Whole numbers below it have a float of their own."""


class BlockColumns:
    """The passes of blocks of which one rank stands for all, prepared for many workloads at once."""

    def __init__(
        self, blocks: Blocks, slots: Mapping[str, Places], positions: Mapping[str, Places], coefficients: Floats
    ) -> None:
        """`slots` of the durations of the tasks of each segment, and `positions` of the bytes of its buffers among
        numbers with `coefficients`.
        """
        self.coefficients = coefficients
        self.monomials: Floats = coefficients.sum(axis=0)
        """Coefficients of the sum of all numbers."""
        orders = {(name, phase): order_of(own) for name, passes in blocks.items() for phase, own in passes.items()}
        pieces = [piece for order in orders.values() for piece in order.pieces]
        self.labels = [
            [label for piece in order.pieces for label in piece.segment.labels]
            for order in orders.values()
            for _ in order.pieces
        ]
        """Of each leaf, what the tasks of its pass are."""
        self.classes = sorted({name for piece in pieces for name in piece.segment.outline.classes[0]})
        self.passes = {key: PassColumns(order, positions, coefficients, self.classes) for key, order in orders.items()}
        self.slots = np.concatenate([slots[piece.segment.name] for piece in pieces])
        self._blocks = blocks
        self._positions = positions
        self._leaves: dict[str, list[Leaf]] = defaultdict(list)
        for number, piece in enumerate(pieces):
            self._leaves[piece.segment.name].append(Leaf(number, piece.runs))
        self._walks: dict[tuple[tuple[Run, ...], Pass | None], tuple[Sequence[Node], Floats]] = {}

    def ran(self, times: Times, basis: Floats, slowdown: float) -> RanPasses:
        """The passes of all blocks with picoseconds by slot and the monomials of the sizes, in a column for each
        workload.
        """
        rate = Contention(slowdown)
        durations = times[self.slots]
        holds = self.monomials @ basis < EXACT
        holds &= durations.min(axis=0) > 0
        holds &= durations.sum(axis=0) < 2**62 // rate.whole
        lengths: dict[Key, Floats] = {}
        kernels: dict[Key, Floats] = {}
        fills: list[Fill] = []
        first = 0
        for key, own in self.passes.items():
            run = replay(own.order, durations[first : first + len(own.order.tasks)], rate)
            first += len(own.order.tasks)
            holds &= own.holds(run)
            lengths[key] = own.length(run)
            kernels[key] = own.compute(run)
            fills += own.fills.of(run, basis)
        return RanPasses(self, holds, lengths, kernels, fills, basis)

    def run(
        self,
        chunk: Chunk,
        micro_batches: Runs,
        times: Times,
        sync_ps: int,
        optimizer_ps: int,
        basis: Floats,
        slowdown: float,
    ) -> StepColumns:
        """A step of a chunk's blocks and equal micro-batches, with picoseconds by slot and of the synchronisation
        and the optimizer after the last one, and the monomials of the sizes of all workloads.
        """
        return StepColumns(self.ran(times, basis, slowdown), tuple(chunk), micro_batches, sync_ps, optimizer_ps)

    def micro_batch(self, chunk: tuple[Run, ...], phase: Pass | None = None) -> tuple[Sequence[Node], Floats]:
        """One micro-batch through some blocks, or one pass of it, and the coefficients of the sums of bytes that its
        nodes name.
        """
        key = chunk, phase
        if key not in self._walks:
            sums: list[Floats] = []

            def noted(segment: Segment, buffers: Sequence[int]) -> int:
                sums.append(self.coefficients[self._positions[segment.name][[*buffers]]].sum(axis=0))
                return len(sums) - 1

            items = chunk_pass(self._blocks, chunk, phase) if phase else accumulation(self._blocks, chunk, 1).body
            nodes = nodes_of(items, self._leaves, noted)
            self._walks[key] = nodes, np.array(sums).reshape(-1, self.coefficients.shape[1])
        return self._walks[key]


@dataclass(frozen=True, eq=False)
class RanPasses:
    """The passes of blocks as they ran; times in picoseconds."""

    block: BlockColumns
    holds: Points
    """For which workloads the segments ran as they are recorded."""
    lengths: Mapping[Key, Floats]
    """Of each pass of one block and micro-batch."""
    kernels: Mapping[Key, Floats]
    """Of the same, a row for each class."""
    fills: Sequence[Fill]
    basis: Floats

    def memory(self, chunk: tuple[Run, ...], micro_batches: Runs) -> Memory:
        """Of some blocks in so many micro-batches."""
        nodes, sums = self.block.micro_batch(chunk)
        return Memory([Branch(nodes, micro_batches)], self.fills, sums @ self.basis)

    def at(self, columns: Places) -> RanPasses:
        """Of some workloads, each perhaps several times."""
        if np.array_equal(columns, np.arange(len(self.holds))):
            return self
        lengths = {key: own[columns] for key, own in self.lengths.items()}
        kernels = {key: own[:, columns] for key, own in self.kernels.items()}
        fills = parts_of(self.fills, columns)
        return RanPasses(self.block, self.holds[columns], lengths, kernels, fills, self.basis[:, columns])


def one_if_alike(numbers: npt.NDArray[np.int64]) -> Runs:
    """The micro-batches of all workloads, as most grids have them."""
    return int(numbers[0]) if (numbers == numbers[0]).all() else numbers


def first_layer(chunks: Iterable[Sequence[Run]]) -> str:
    """The block of the first layer of some chunks; such as all layers are, where these have none."""
    return next((run.block for chunk in chunks for run in chunk if run.numbered), LAYER)


@dataclass(frozen=True)
class StepColumns:
    """What a step came to; times in picoseconds."""

    ran: RanPasses
    chunk: tuple[Run, ...]
    micro_batches: Runs
    weight_sync: Any
    """Synchronisation of weight gradients after the last micro-batch, and the gather of weights: a number, or one for
    each workload.
    """
    optimizer: Any

    @lazy
    def memory(self) -> Memory:
        """Over what is there all the time."""
        return self.ran.memory(self.chunk, self.micro_batches)

    def _of_micro_batch(self, lengths: Mapping[Key, Floats], *, layers: bool = False) -> Floats:
        """The sum over the passes of all blocks of one micro-batch, or of its layers only."""
        counts: Counter[str] = Counter()
        for run in self.chunk:
            if run.numbered or not layers:
                counts[run.block] += run.count
        first, *more = [counts[block] * length for (block, _), length in lengths.items() if counts[block]]
        return sum(more, first)

    @property
    def phases(self) -> Mapping[Pass, Floats]:
        """Of each pass of the first layer and of one micro-batch."""
        layer = first_layer([self.chunk])
        return {phase: length for (block, phase), length in self.ran.lengths.items() if block == layer}

    @lazy
    def _passes(self) -> Floats:
        return self._of_micro_batch(self.ran.lengths) * self.micro_batches

    @lazy
    def end(self) -> Floats:
        """All blocks and micro-batches, and what follows them."""
        end: Floats = self._passes + self.weight_sync + self.optimizer
        return end

    @lazy
    def compute(self) -> Mapping[str, Floats]:
        """Kernels of layers by class."""
        kernels = self._of_micro_batch(self.ran.kernels, layers=True) * self.micro_batches
        return dict(zip(self.ran.block.classes, kernels, strict=True))

    @lazy
    def exposed(self) -> Floats:
        """Communication while no kernel runs, weight synchronisation apart: for nothing else do kernels wait."""
        kernels = self._of_micro_batch(self.ran.kernels).sum(axis=0) * self.micro_batches
        exposed: Floats = self._passes - kernels
        return exposed

    @lazy
    def exact(self) -> Points:
        """For which workloads all numbers hold; others have to be simulated."""
        return self.ran.holds & (self.end < EXACT) & (self.memory.highest < EXACT)
