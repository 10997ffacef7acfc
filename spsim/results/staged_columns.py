"""What the simulation of steps of several pipeline stages found for many plans and workloads, as `ResultColumns`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from spsim.lazy import lazy
from spsim.results.derived import STATIC, Derived, operator_name
from spsim.step.columns.chunks import ChunkPasses
from spsim.step.columns.fill import Floats, Places
from spsim.step.columns.replay import Points
from spsim.step.columns.stages import StagedColumns


@dataclass(frozen=True)
class StagedResultColumns(Derived):
    """One value of each figure for each step, or one for all."""

    scenario: Any
    step: StagedColumns
    outside: Any
    """Bytes of each step that are not the tensors'."""

    @property
    def _outside(self) -> Any:
        return self.outside

    @property
    def exact(self) -> Points:
        """Steps whose figures are, to the bit, those of `simulate`; it has to find those of others."""
        return self.step.exact

    @property
    def step_ps(self) -> Any:  # type: ignore[override]
        """See `Derived`."""
        return self.step.end

    @property
    def pass_ps(self) -> Any:  # type: ignore[override]
        """See `Derived`."""
        return self.step.phases

    @property
    def exposed_ps(self) -> Any:  # type: ignore[override]
        """See `Derived`."""
        return self.step.exposed

    @property
    def weight_sync_ps(self) -> Any:  # type: ignore[override]
        """See `Derived`."""
        return self.step.weight_sync

    @property
    def optimizer_ps(self) -> Any:  # type: ignore[override]
        """See `Derived`."""
        return self.step.optimizer

    @property
    def compute_ps(self) -> Any:  # type: ignore[override]
        """See `Derived`."""
        return self.step.compute

    @property
    def bubble(self) -> Any:
        """See `Derived`."""
        return self.step.bubble_ps / len(self.step.stages) / self.step.end

    @property
    def peak_bytes(self) -> Any:  # type: ignore[override]
        """See `Derived`."""
        return self.step.fullest.bytes

    @lazy
    def peak_operator(self) -> Any:
        """The operators whose allocations make the peaks."""
        found = self.step.fullest
        names = np.full(len(self.step.plan_of), STATIC, dtype=object)
        for passes, at in self._by_passes(np.flatnonzero(found.level > 0)):
            rows = self._rows(passes, found.stage[at], found.chunk[at])
            spots = passes.fullest(found.place[at], rows, self.step.workloads[at])
            names[at] = self._names(passes, spots, found.stage[at], found.chunk[at])
        return names

    @lazy
    def out_of_memory_at(self) -> Any:
        """The operators at which memory runs out; None where it does not."""
        step = self.step
        names = np.full(len(step.plan_of), None)
        short = np.flatnonzero(np.logical_not(self.fits))
        kinds = np.array(step.stages.kind_of)[step.fullest.stage[short]]
        room: Floats = self.limit[short] - step.statics[kinds, short]  # type: ignore[index]
        names[short[room < 0]] = STATIC
        short, room = short[room >= 0], room[room >= 0]
        if not len(short):
            return names
        chunks, places, left = step.first_above(short, room)
        for passes, at in self._by_passes(short):
            own = np.searchsorted(short, at)
            stages = step.fullest.stage[at]
            rows = self._rows(passes, stages, chunks[own])
            spots = passes.first_above(places[own], rows, step.workloads[at], left[own])
            names[at] = self._names(passes, spots, stages, chunks[own])
        return names

    def _by_passes(self, steps: Places) -> Iterator[tuple[ChunkPasses, Places]]:
        """Some steps by the blocks that they have."""
        plans = self.step.plan_of[steps]
        keys = np.array([id(plan.passes) for plan in self.step.plans])[plans]
        for key in dict.fromkeys(keys.tolist()):
            own = keys == key
            yield self.step.plans[plans[own.argmax()]].passes, steps[own]

    def _rows(self, passes: ChunkPasses, stages: Places, chunks: Places) -> Places:
        """Where chunks of stages stand among those of some blocks."""
        rows = np.array([passes.rows[chunk] for chunk in self.step.stages.chunk_kinds], dtype=np.intp)
        return rows[self.step.stages.kinds_of_chunks[stages, chunks]]

    def _names(self, passes: ChunkPasses, spots: Any, stages: Places, chunks: Places) -> list[str]:
        """What tasks of chunks are called."""
        known: dict[tuple[int, ...], str] = {}
        found = []
        for leaf, layer, task, stage, chunk in zip(*(own.tolist() for own in (*spots, stages, chunks)), strict=True):
            number = layer + self.step.stages[stage][chunk].first if layer >= 0 else -1
            key = leaf, task, number
            if key not in known:
                known[key] = operator_name(passes.ran.block.labels[leaf][task], number if layer >= 0 else None)
            found.append(known[key])
        return found
