"""A step for many workloads at once: its times and its memory as arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from spsim.engine.pieces import Pass
from spsim.lazy import lazy
from spsim.step.columns.fill import Fill, Floats, Places
from spsim.step.columns.order import order_of
from spsim.step.columns.passes import PassColumns
from spsim.step.columns.replay import Points, Times, contention, replay
from spsim.step.columns.walk import Leaf, Level, Memory, Node, counts, nodes_of
from spsim.step.itinerary import Item, Runs
from spsim.step.segments import BlockPass, Segment

EXACT = 2.0**53
"""Whole numbers below it have a float of their own."""


class BlockColumns:
    """The passes of a block of which one rank stands for all, prepared for many workloads at once."""

    def __init__(
        self,
        passes: Mapping[Pass, BlockPass],
        sync: Segment | None,
        slots: Mapping[str, Places],
        positions: Mapping[str, Places],
        coefficients: Floats,
    ) -> None:
        """`slots` of the durations of the tasks of each segment, and `positions` of the bytes of its buffers among
        numbers with `coefficients`. The communications of `sync` follow each other.
        """
        self.positions = positions
        self.coefficients = coefficients
        self.monomials: Floats = coefficients.sum(axis=0)
        """Coefficients of the sum of all numbers."""
        orders = {phase: order_of(block) for phase, block in passes.items()}
        pieces = [piece for order in orders.values() for piece in order.pieces]
        segments = [piece.segment for piece in pieces] + ([sync] if sync else [])
        self.labels = [
            [label for piece in order.pieces for label in piece.segment.labels]
            for order in orders.values()
            for _ in order.pieces
        ]
        """Of each leaf, what the tasks of its pass are."""
        self.leaves: dict[str, list[Leaf]] = {segment.name: [] for segment in segments}
        for number, segment in enumerate(segments):
            runs = pieces[number].runs if number < len(pieces) else 1
            self.leaves[segment.name].append(Leaf(number, runs))
        self.classes = sorted({name for segment in segments for name in segment.outline.classes[0]})
        self.passes = {
            phase: PassColumns(order, positions, coefficients, self.classes) for phase, order in orders.items()
        }
        self.slots = np.concatenate([slots[piece.segment.name] for piece in pieces])
        self._sizes: dict[tuple[str, Sequence[int]], Floats] = {}

    def run(self, itinerary: Sequence[Item], times: Times, sync_ps: int, basis: Floats, slowdown: float) -> StepColumns:
        """A step that walks the passes, with picoseconds by slot and of the synchronisation, and the monomials of the
        sizes of all workloads.
        """
        rate = contention(slowdown)
        durations = times[self.slots]
        holds = self.monomials @ basis < EXACT
        holds &= durations.min(axis=0) > 0
        holds &= durations.sum(axis=0) < 2**62 // rate.whole
        lengths: list[Floats] = []
        compute: list[Floats] = []
        fills: list[Fill] = []
        phases: dict[Pass, Floats] = {}
        first = 0
        for phase, own in self.passes.items():
            run = replay(own.order, durations[first : first + len(own.order.tasks)], rate)
            first += len(own.order.tasks)
            holds &= own.holds(run)
            found = own.lengths(run)
            phases[phase] = own.runs @ found
            lengths += [*found]
            compute += own.compute(run)
            fills += own.fills.of(run, basis)
        nodes = nodes_of(itinerary, self.leaves, lambda *buffers: self._size(*buffers) @ basis)
        return StepColumns(self, nodes, holds, phases, lengths, compute, fills, sync_ps)

    def _size(self, segment: Segment, buffers: Sequence[int]) -> Floats:
        """Coefficients of the bytes of some buffers."""
        key = (segment.name, buffers)
        if key not in self._sizes:
            self._sizes[key] = self.coefficients[self.positions[segment.name][[*buffers]]].sum(axis=0)
        return self._sizes[key]


@dataclass(frozen=True)
class StepColumns:
    """What a step came to; times in picoseconds."""

    block: BlockColumns
    nodes: Sequence[Node]
    holds: Points
    """For which workloads the segments ran as they are recorded."""
    phases: Mapping[Pass, Floats]
    """Of each pass of one layer and micro-batch."""
    lengths: Sequence[Floats]
    """Of each leaf but the synchronisation, as what follows."""
    kernels: Sequence[Floats]
    """By class."""
    fills: Sequence[Fill]
    weight_sync: int
    """Synchronisation of weight gradients at the end of the step."""

    @lazy
    def _counts(self) -> list[Runs]:
        found = counts(self.nodes)
        return [found[number] for number in range(len(self.lengths))]

    @lazy
    def _layers(self) -> Floats:
        return _total(self._counts, self.lengths)

    @lazy
    def end(self) -> Floats:
        """All layers and micro-batches, and the synchronisation of weight gradients."""
        return self._layers + self.weight_sync

    @lazy
    def compute(self) -> Mapping[str, Floats]:
        """Kernels by class."""
        return dict(zip(self.block.classes, self._compute, strict=True))

    @lazy
    def _compute(self) -> Floats:
        return _total(self._counts, self.kernels)

    @lazy
    def exposed(self) -> Floats:
        """Communication while no kernel runs, weight synchronisation apart: for nothing else do kernels wait."""
        exposed: Floats = self._layers - self._compute.sum(axis=0)
        return exposed

    @lazy
    def memory(self) -> Memory:
        """The memory of the step."""
        return Memory(self.nodes, dict(enumerate(self.fills)))

    @lazy
    def level(self) -> Level:
        """Where memory is highest over what is there all the time."""
        return self.memory.level()

    @lazy
    def exact(self) -> Points:
        """For which workloads all numbers hold; others have to be simulated."""
        return self.holds & (self.end < EXACT) & (self.level.highest < EXACT)


def _total(counts: Sequence[Runs], amounts: Sequence[Floats]) -> Floats:
    return sum((count * amount for count, amount in zip(counts[1:], amounts[1:], strict=True)), counts[0] * amounts[0])
