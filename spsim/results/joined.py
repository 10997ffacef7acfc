"""The results of many plans whose passes are alike, as one: a column for each workload of each plan."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np

from spsim.inputs.grid import Grid
from spsim.inputs.workload import Workloads
from spsim.lazy import lazy
from spsim.program.operators import TensorKind
from spsim.program.sizes import Template
from spsim.results.columns import ResultColumns
from spsim.results.derived import Amounts, Derived
from spsim.results.staged_columns import StagedResultColumns
from spsim.step.columns.fill import Floats
from spsim.step.columns.replay import Points

Part = ResultColumns | StagedResultColumns


@dataclass(frozen=True)
class JoinedColumns(Derived):
    """One value of each figure for each workload of each plan, or one for all."""

    scope: str
    grids: Sequence[Grid]
    parts: Sequence[Part]
    """Of each grid."""
    amounts: Amounts
    template: Template
    numbers: Floats
    """Of the program, a column for each workload of each plan."""

    error_band: ClassVar[None] = None
    flagged: ClassVar[tuple[str, ...]] = ()

    @lazy
    def scenario(self) -> Any:
        """What is asked of a scenario; of plans what differs as arrays."""
        first = self.grids[0]
        plan = SimpleNamespace(
            gpus=first.plan.gpus,
            label=self._of_plans([grid.plan.label for grid in self.grids]),
            text=self._of_plans([grid.plan.text for grid in self.grids]),
        )
        sizes = [
            self._joined([getattr(grid.workload, name) for grid in self.grids]) for name in ("seq_len", "micro_batch")
        ]
        workload = Workloads(sizes[0], sizes[1], first.workload.precision)
        batches = self._joined([grid.num_micro_batches for grid in self.grids])
        return SimpleNamespace(
            hardware=first.hardware, model=first.model, plan=plan, workload=workload, num_micro_batches=batches,
            gpus_per_node=first.gpus_per_node,
        )  # fmt: skip

    @property
    def _lengths(self) -> list[int]:
        return [len(grid.global_batch) for grid in self.grids]

    def _of_plans(self, values: Sequence[Any]) -> Any:
        """What each plan has, for each of its workloads."""
        kind = object if isinstance(values[0], str) else None
        return np.repeat(np.array(values, dtype=kind), self._lengths)

    def _joined(self, values: Sequence[Any]) -> Any:
        """What the workloads of each plan have, or all of them alike."""
        pairs = zip(values, self._lengths, strict=True)
        return np.concatenate([own if isinstance(own, np.ndarray) else np.full(count, own) for own, count in pairs])

    def _of_parts(self, of: Callable[[Part], Any]) -> Any:
        return self._joined([of(part) for part in self.parts])

    @lazy
    def exact(self) -> Points:
        """Workloads whose figures are, to the bit, those of `simulate`; it has to find those of others."""
        return self._of_parts(lambda part: part.exact)  # type: ignore[no-any-return]

    @lazy
    def step_ps(self) -> Any:
        """See `Derived`."""
        return self._of_parts(lambda part: part.step_ps)

    @lazy
    def pass_ps(self) -> Any:
        """See `Derived`."""
        return {phase: self._of_parts(lambda part, p=phase: part.pass_ps[p]) for phase in ("forward", "backward")}  # type: ignore[misc]

    @lazy
    def exposed_ps(self) -> Any:
        """See `Derived`."""
        return self._of_parts(lambda part: part.exposed_ps)

    @lazy
    def weight_sync_ps(self) -> Any:
        """See `Derived`."""
        return self._of_parts(lambda part: part.weight_sync_ps)

    @lazy
    def optimizer_ps(self) -> Any:
        """See `Derived`."""
        return self._of_parts(lambda part: part.optimizer_ps)

    @lazy
    def compute_ps(self) -> Any:
        """See `Derived`."""
        names = dict.fromkeys(name for part in self.parts for name in part.compute_ps)
        return {name: self._of_parts(lambda part, n=name: part.compute_ps.get(n, 0.0)) for name in names}  # type: ignore[misc]

    @lazy
    def bubble(self) -> Any:
        """See `Derived`."""
        return self._of_parts(lambda part: part.bubble)

    @lazy
    def peak_bytes(self) -> Any:
        """See `Derived`."""
        return self._of_parts(lambda part: part.peak_bytes)

    @lazy
    def _outside(self) -> Any:
        return self._of_plans([part._outside for part in self.parts])

    @lazy
    def peak_operator(self) -> Any:
        """The operators whose allocations make the peaks."""
        return self._of_parts(lambda part: part.peak_operator)

    @lazy
    def out_of_memory_at(self) -> Any:
        """The operators at which memory runs out; None where it does not."""
        return self._of_parts(lambda part: part.out_of_memory_at)

    def _of_step(self, flops: Any) -> Any:
        return np.asarray(super()._of_step(flops)).astype(np.float64)

    def saved_bytes(self, *categories: TensorKind) -> Any:
        """See `Derived`."""
        kept = [saved.category in categories for saved in self.template.program.saved]
        return self.numbers[self.template.index.saved][kept].sum(axis=0)
