"""Figures of a step of one rank whose segments leave nothing undone: sums over segments, no trace is written out.

They are what `metrics` finds in the trace of the step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from spsim.costs.static_memory import StaticMemory
from spsim.engine.pieces import Pass
from spsim.results.derived import operator_name
from spsim.results.metrics import Idle
from spsim.results.staged import Spot
from spsim.step.levels import Place
from spsim.step.rows import RanApart


@dataclass(frozen=True)
class Added:
    """Reads a step that ran; it is the first row."""

    ran: RanApart
    rank: int

    @property
    def end_ps(self) -> int:
        """When it has ended."""
        return self.ran.ends_ps[0]

    def layer_window(self, phase: Pass) -> int:
        """One layer's pass."""
        return sum([count * self.ran.lengths[name] for name, count in self.ran.rows.sums.windows[phase].items()])

    @property
    def idle(self) -> dict[int, Idle]:
        """As `metrics.idle`: a rank that meets no other waits for transfers only."""
        ran = self.ran
        lengths = (count * (ran.lengths[name] - sum(ran.kernels[name])) for name, count in ran.rows.sums.passes)
        return {self.rank: Idle(sum(lengths))}

    @property
    def weight_sync_ps(self) -> int:
        """Synchronisation of weight gradients."""
        return sum([self.ran.lengths[name] for name in self.ran.rows.sums.syncs])

    @property
    def optimizer_ps(self) -> int:
        """The optimizer's kernels and what ranks agree on."""
        return sum([self.ran.lengths[name] for name in self.ran.rows.sums.optimizer])

    def compute_by_class(self) -> dict[str, int]:
        """Kernels in the layers."""
        totals: dict[str, int] = {}
        for name, count in self.ran.rows.sums.layers:
            for own, time in zip(self.ran.rows.sums.classes[name], self.ran.kernels[name], strict=True):
                totals[own] = totals.get(own, 0) + count * time
        return totals

    def peak_bytes(self, static: Mapping[int, StaticMemory]) -> int:
        """With what is there all the time."""
        return static[self.rank].total + max(0, self.ran.filled.levels[0].highest)

    def spot(self, static: Mapping[int, StaticMemory]) -> Spot:
        """When it is fullest."""
        return Spot(0, self.rank, self.peak_bytes(static), self._name(self.ran.filled.fullest(0)))

    def first_above(self, stage: int, static: int, limit: int) -> str | None:
        """The operator whose allocation first takes it above a limit; there is one stage."""
        return self._name(self.ran.filled.first_above(stage, limit - static))

    def _name(self, place: Place | None) -> str | None:
        if place is None:
            return None
        return operator_name(self.ran.rows.segments[place.segment].labels[place.task], place.layer)
