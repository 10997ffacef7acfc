"""What the simulation of a step of several pipeline stages found for many workloads at once, as `ResultColumns`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from spsim.costs.static_memory import outside_tensors
from spsim.lazy import lazy
from spsim.program.mesh import mesh_of
from spsim.results.derived import STATIC, Derived, operator_name
from spsim.step.columns.replay import Points
from spsim.step.columns.stages import StagedColumns
from spsim.step.columns.walk import Spots


@dataclass(frozen=True)
class StagedResultColumns(Derived):
    """One value of each figure for each workload, or one for all."""

    scenario: Any
    step: StagedColumns

    @lazy
    def _outside(self) -> int:
        return outside_tensors(self.scenario.hardware, mesh_of(self.scenario.plan))

    @property
    def exact(self) -> Points:
        """Workloads whose figures are, to the bit, those of `simulate`; it has to find those of others."""
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
        spots: dict[int, Spots] = {}
        names = []
        columns = zip(
            self.step.columns.tolist(), found.level, found.sort.tolist(), found.stage, found.chunk, strict=True
        )
        for workload, level, sort, stage, chunk in columns:
            if sort not in spots:
                spots[sort] = self.step.memories[sort].fullest()
            names.append(self._name(spots[sort], workload, stage, chunk) if level > 0 else STATIC)
        return np.array(names, dtype=object)

    @lazy
    def out_of_memory_at(self) -> Any:
        """The operators at which memory runs out; None where it does not."""
        names = np.full(len(self.step.columns), None)
        for column in np.flatnonzero(np.logical_not(self.fits)).tolist():
            names[column] = self._out_of_memory_at(column)
        return names

    def _out_of_memory_at(self, column: int) -> str | None:
        step = self.step
        stage, workload = int(step.fullest.stage[column]), int(step.columns[column])
        room = self.limit - float(step.statics[step.stages.kind_of[stage]])
        if room < 0:
            return STATIC
        found = step.first_above(column, stage, room)
        if found is None:
            return None
        chunk, sort, left = found
        memory = step.memories[sort]
        asked = np.arange(len(memory.highest)) == workload
        return self._name(memory.first_above(np.full(len(asked), left), asked), workload, stage, chunk)

    def _name(self, spots: Spots, workload: int, stage: int, chunk: int) -> str:
        """What a task of a chunk is called."""
        layer = int(spots.layer[workload])
        label = self.step.ran.block.labels[int(spots.leaf[workload])][int(spots.task[workload])]
        return operator_name(label, layer + self.step.stages[stage][chunk].first if layer >= 0 else None)
