"""What the simulation of many workloads at once found: the figures of `Result`, as arrays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from spsim.costs.static_memory import StaticMemory
from spsim.lazy import lazy
from spsim.program.operators import TensorKind
from spsim.results.derived import Amounts, Derived, operator_name
from spsim.step.columns.fill import Floats
from spsim.step.columns.replay import Points
from spsim.step.columns.step import EXACT, StepColumns
from spsim.step.columns.walk import Spots
from spsim.step.preparation import PreparedStep


@dataclass(frozen=True)
class ResultColumns(Derived):
    """One value of each figure for each workload, or one for all."""

    scope: str
    scenario: Any
    prepared: PreparedStep
    numbers: Floats
    """Of the program, a column for each workload."""
    amounts: Amounts
    step: StepColumns
    static: StaticMemory
    outside: Any
    """Bytes that are not the tensors'."""

    error_band: ClassVar[None] = None
    flagged: ClassVar[tuple[str, ...]] = ()
    """Profiles that a calibration wrote are simulated one workload at a time."""

    @property
    def _outside(self) -> Any:
        return self.outside

    @property
    def exact(self) -> Points:
        """Workloads whose figures are, to the bit, those of `simulate`; it has to find those of others."""
        return self.step.exact & (self.static.total + self.step.memory.highest < EXACT)

    @lazy
    def step_ps(self) -> Any:
        """See `Derived`."""
        return self.step.end

    @lazy
    def pass_ps(self) -> Any:
        """See `Derived`."""
        return {"backward": 0, **self.step.phases}

    @lazy
    def exposed_ps(self) -> Any:
        """See `Derived`."""
        return self.step.exposed

    @lazy
    def weight_sync_ps(self) -> Any:
        """See `Derived`."""
        return self.step.weight_sync

    @lazy
    def optimizer_ps(self) -> Any:
        """See `Derived`."""
        return self.step.optimizer

    @lazy
    def compute_ps(self) -> Any:
        """See `Derived`."""
        return self.step.compute

    @lazy
    def peak_bytes(self) -> Any:
        """See `Derived`."""
        return self.static.total + np.maximum(self.step.memory.highest, 0.0)

    def _of_step(self, flops: Any) -> Any:
        return np.asarray(super()._of_step(flops)).astype(np.float64)

    @lazy
    def peak_operator(self) -> Any:
        """The operators whose allocations make the peaks."""
        return self._names(self.step.memory.fullest(), self.step.memory.highest > 0)

    @lazy
    def out_of_memory_at(self) -> Any:
        """The operators at which memory runs out; None where it does not."""
        short: Points = np.logical_not(self.fits)
        if not short.any():
            return np.full(short.shape, None)
        room: Any = np.broadcast_to(self.limit - self.static.total, short.shape).astype(np.float64)
        by_task = short & (room >= 0)
        names = self._names(self.step.memory.first_above(room, by_task), by_task)
        return np.where(short, names, None)

    def _names(self, spots: Spots, by_task: Points) -> Any:
        """What tasks are called; where it is by none, what is there all the time."""
        if not by_task.any():
            return np.full(by_task.shape, self.always, dtype=object)
        places = [*zip(*(column.tolist() for column in spots), strict=True)]
        names = {place: self._name(*place) for place in set(places)}
        found = np.array([*map(names.__getitem__, places)], dtype=object)
        if not by_task.all():
            found[~by_task] = self.always
        return found

    def _name(self, leaf: int, layer: int, task: int) -> str:
        return operator_name(self.step.ran.block.labels[leaf][task], layer if layer >= 0 else None)

    def saved_bytes(self, *categories: TensorKind) -> Any:
        """See `Derived`."""
        template = self.prepared.template
        kept = [saved.category in categories for saved in template.program.saved]
        return self.numbers[template.index.saved][kept].sum(axis=0)
