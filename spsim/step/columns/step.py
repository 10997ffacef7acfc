"""A step for many workloads at once: its times and its memory as arrays."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from spsim.engine.pieces import Pass
from spsim.lazy import lazy
from spsim.step.columns.fill import Fill, Floats, Places
from spsim.step.columns.order import order_of
from spsim.step.columns.passes import PassColumns
from spsim.step.columns.replay import Contention, Points, Times, replay
from spsim.step.columns.walk import Branch, Leaf, Memory, Node, nodes_of
from spsim.step.itinerary import Runs, accumulation
from spsim.step.segments import BlockPass, Segment

EXACT = 2.0**53
"""Whole numbers below it have a float of their own."""


class BlockColumns:
    """The passes of a block of which one rank stands for all, prepared for many workloads at once."""

    def __init__(
        self,
        passes: Mapping[Pass, BlockPass],
        slots: Mapping[str, Places],
        positions: Mapping[str, Places],
        coefficients: Floats,
    ) -> None:
        """`slots` of the durations of the tasks of each segment, and `positions` of the bytes of its buffers among
        numbers with `coefficients`.
        """
        self.coefficients = coefficients
        self.monomials: Floats = coefficients.sum(axis=0)
        """Coefficients of the sum of all numbers."""
        orders = {phase: order_of(block) for phase, block in passes.items()}
        pieces = [piece for order in orders.values() for piece in order.pieces]
        self.labels = [
            [label for piece in order.pieces for label in piece.segment.labels]
            for order in orders.values()
            for _ in order.pieces
        ]
        """Of each leaf, what the tasks of its pass are."""
        self.classes = sorted({name for piece in pieces for name in piece.segment.outline.classes[0]})
        self.passes = {
            phase: PassColumns(order, positions, coefficients, self.classes) for phase, order in orders.items()
        }
        self.slots = np.concatenate([slots[piece.segment.name] for piece in pieces])
        self._blocks = tuple(passes.values())
        self._positions = positions
        self._leaves: dict[str, list[Leaf]] = defaultdict(list)
        for number, piece in enumerate(pieces):
            self._leaves[piece.segment.name].append(Leaf(number, piece.runs))
        self._walks: dict[int, tuple[Sequence[Node], Floats]] = {}

    def run(
        self, layers: int, micro_batches: Runs, times: Times, sync_ps: int, basis: Floats, slowdown: float
    ) -> StepColumns:
        """A step of equal layers and micro-batches, with picoseconds by slot and of the synchronisation after it, and
        the monomials of the sizes of all workloads.
        """
        rate = Contention(slowdown)
        durations = times[self.slots]
        holds = self.monomials @ basis < EXACT
        holds &= durations.min(axis=0) > 0
        holds &= durations.sum(axis=0) < 2**62 // rate.whole
        phases: dict[Pass, Floats] = {}
        compute: list[Floats] = []
        fills: list[Fill] = []
        first = 0
        for phase, own in self.passes.items():
            run = replay(own.order, durations[first : first + len(own.order.tasks)], rate)
            first += len(own.order.tasks)
            holds &= own.holds(run)
            phases[phase] = own.length(run)
            compute.append(own.compute(run))
            fills += own.fills.of(run, basis)
        nodes, sums = self._walk(layers)
        memory = Memory([Branch(nodes, micro_batches)], fills, sums @ basis)
        kernels = sum(compute[1:], compute[0])
        return StepColumns(self, layers * micro_batches, holds, phases, kernels, memory, sync_ps)

    def _walk(self, layers: int) -> tuple[Sequence[Node], Floats]:
        """One micro-batch, and the coefficients of the sums of bytes that its nodes name."""
        if layers not in self._walks:
            sums: list[Floats] = []

            def noted(segment: Segment, buffers: Sequence[int]) -> int:
                sums.append(self.coefficients[self._positions[segment.name][[*buffers]]].sum(axis=0))
                return len(sums) - 1

            nodes = nodes_of(accumulation(self._blocks, layers, 1).body, self._leaves, noted)
            self._walks[layers] = nodes, np.array(sums).reshape(-1, self.coefficients.shape[1])
        return self._walks[layers]


@dataclass(frozen=True)
class StepColumns:
    """What a step came to; times in picoseconds."""

    block: BlockColumns
    instances: Runs
    """Passes of a layer in the step."""
    holds: Points
    """For which workloads the segments ran as they are recorded."""
    phases: Mapping[Pass, Floats]
    """Of each pass of one layer and micro-batch."""
    kernels: Floats
    """Of one layer and micro-batch, a row for each class."""
    memory: Memory
    weight_sync: int
    """Synchronisation of weight gradients at the end of the step."""

    @lazy
    def _layers(self) -> Floats:
        first, *more = self.phases.values()
        return sum(more, first) * self.instances

    @lazy
    def end(self) -> Floats:
        """All layers and micro-batches, and the synchronisation of weight gradients."""
        return self._layers + self.weight_sync

    @lazy
    def compute(self) -> Mapping[str, Floats]:
        """Kernels by class."""
        return dict(zip(self.block.classes, self.kernels * self.instances, strict=True))

    @lazy
    def exposed(self) -> Floats:
        """Communication while no kernel runs, weight synchronisation apart: for nothing else do kernels wait."""
        exposed: Floats = self._layers - self.kernels.sum(axis=0) * self.instances
        return exposed

    @lazy
    def exact(self) -> Points:
        """For which workloads all numbers hold; others have to be simulated."""
        return self.holds & (self.end < EXACT) & (self.memory.highest < EXACT)
