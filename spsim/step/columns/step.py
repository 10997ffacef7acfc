"""A step for many workloads at once: its times and its memory as arrays."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from spsim.engine.trace import Pass
from spsim.lazy import lazy
from spsim.step.columns.fill import Floats, Places
from spsim.step.columns.order import Order, order_of
from spsim.step.columns.passes import PassColumns, Ran
from spsim.step.columns.replay import Points, Times, contention, replay
from spsim.step.columns.walk import Level, Spots, Walk
from spsim.step.itinerary import Item
from spsim.step.segments import BlockPass, Segment

MOST_TASKS = 1000
"""Of a pass: what comes before what is a table of tasks by tasks."""
EXACT = 2.0**53
"""Whole numbers below it have a float of their own."""


def _total(amounts: Iterable[Floats]) -> Floats:
    total: Floats = np.zeros(1)
    for amount in amounts:
        total = total + amount
    return total


class BlockColumns:
    """The passes of a block of which one rank stands for all, prepared for many workloads at once."""

    def __init__(
        self,
        passes: Mapping[Pass, BlockPass],
        sync: Segment | None,
        positions: Mapping[str, Places],
        coefficients: npt.NDArray[np.int64],
    ) -> None:
        """`positions` of the bytes of the buffers of each segment, among numbers with `coefficients`."""
        orders = {phase: order_of(block) for phase, block in passes.items()}
        if sync:
            orders["weight_sync"] = Order([(sync, 1)])
        self.passes = {phase: PassColumns(order, positions, coefficients) for phase, order in orders.items()}
        self.positions = positions
        self.monomials = coefficients.sum(axis=0, dtype=np.float64)
        """Coefficients of the sum of all numbers."""

    def run(
        self,
        itinerary: Sequence[Item],
        durations: Mapping[str, Times],
        basis: Floats,
        numbers: Floats,
        slowdown: float,
    ) -> StepColumns:
        """A step that walks the passes, with picoseconds of each task by segment, the monomials of all workloads, and
        the numbers of the program.
        """
        rate = contention(slowdown)
        holds = self.monomials @ basis < EXACT
        ran: dict[str, list[Ran]] = {}
        phases: dict[Pass, Floats] = {}
        for phase, own in self.passes.items():
            times = np.concatenate([durations[piece.segment.name] for piece in own.order.pieces])
            run = replay(own.order, times, rate)
            holds = holds & (times.min(axis=0) > 0) & (times.sum(axis=0) < 2**62 // rate.whole) & own.holds(run)
            pieces = [*own.ran(run, basis)]
            phases[phase] = _total(piece.runs * piece.length for piece in pieces)
            for piece in pieces:
                ran.setdefault(piece.segment.name, []).append(piece)
        sizes = {name: numbers[where] for name, where in self.positions.items()}
        return StepColumns(Walk(itinerary, ran, sizes), holds, phases)


@dataclass(frozen=True)
class StepColumns:
    """What a step came to; times in picoseconds."""

    walk: Walk
    holds: Points
    """For which workloads the segments ran as they are recorded."""
    phases: Mapping[Pass, Floats]
    """Of each pass of one layer and micro-batch."""

    @lazy
    def end(self) -> Floats:
        """All layers and micro-batches, and the synchronisation of weight gradients."""
        return _total(count * ran.length for ran, count in self.walk.counts())

    @lazy
    def weight_sync(self) -> Floats:
        """Synchronisation of weight gradients at the end of the step."""
        return _total(count * ran.length for ran, count in self.walk.counts() if ran.segment.phase == "weight_sync")

    @lazy
    def compute(self) -> Mapping[str, Floats]:
        """Kernels by class."""
        found: dict[str, Floats] = {}
        for ran, count in self.walk.counts():
            for name, time in ran.compute.items():
                found[name] = found.get(name, 0.0) + count * time
        return found

    @lazy
    def exposed(self) -> Floats:
        """Communication while no kernel runs, weight synchronisation apart: for nothing else do kernels wait."""
        return self.end - self.weight_sync - _total(self.compute.values())

    @lazy
    def level(self) -> Level:
        """Where memory is highest over what is there all the time."""
        return self.walk.level

    @property
    def exact(self) -> Points:
        """For which workloads all numbers hold; others have to be simulated."""
        return self.holds & (self.end < EXACT) & (self.level.highest < EXACT)

    @property
    def peak(self) -> Spots:
        """Whose allocation makes memory highest."""
        shape = self.holds.shape
        leaf, layer = (np.broadcast_to(own, shape) for own in (self.level.leaf, self.level.layer))
        task = np.zeros(shape, dtype=np.intp)
        for number in np.unique(leaf).tolist():
            here = leaf == number
            task[here] = self.walk.ran[number].fill.fullest[here]
        return Spots(leaf, layer, task)
