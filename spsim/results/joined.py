"""The results of many plans of one model as one: a column for each workload of each plan."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar, NamedTuple

import numpy as np

from spsim.inputs.grid import Grid
from spsim.inputs.workload import Workloads
from spsim.lazy import lazy
from spsim.program.operators import TensorKind
from spsim.program.sizes import Template
from spsim.results.columns import ResultColumns
from spsim.results.derived import Amounts, Derived
from spsim.results.staged_columns import StagedResultColumns
from spsim.step.columns.fill import Floats, Places
from spsim.step.columns.replay import Points


class Part(NamedTuple):
    """Some of the columns."""

    places: Places
    """Among all."""
    result: ResultColumns | StagedResultColumns


class Blocks(NamedTuple):
    """Of plans in a row whose passes are the same."""

    amounts: Amounts
    template: Template
    numbers: Floats
    """Of the program, a column for each different workload,"""
    columns: Places
    """and which of those each workload of each plan is."""


@dataclass(frozen=True)
class JoinedColumns(Derived):
    """One value of each figure for each workload of each plan, or one for all."""

    scope: str
    every: Sequence[Sequence[Grid]]
    """Those in a row have the same blocks."""
    parts: Sequence[Part]
    blocks: Sequence[Blocks]

    error_band: ClassVar[None] = None
    flagged: ClassVar[tuple[str, ...]] = ()

    @property
    def _grids(self) -> Iterator[Grid]:
        return (grid for own in self.every for grid in own)

    @lazy
    def scenario(self) -> Any:
        """What is asked of a scenario; of plans what differs as arrays."""
        grids = [*self._grids]
        first = grids[0]
        lengths = [len(grid.global_batch) for grid in grids]

        def of_plans(values: Sequence[Any]) -> Any:
            kind = object if isinstance(values[0], str) else None
            return np.repeat(np.array(values, dtype=kind), lengths)

        def of_each(of: Callable[[Grid], Any]) -> Any:
            return np.concatenate([of(grid) for grid in grids])

        plan = SimpleNamespace(
            gpus=of_plans([grid.plan.gpus for grid in grids]),
            label=of_plans([grid.plan.label for grid in grids]),
            text=of_plans([grid.plan.text for grid in grids]),
        )
        sizes = (of_each(lambda grid: grid.workload.seq_len), of_each(lambda grid: grid.workload.micro_batch))
        return SimpleNamespace(
            hardware=first.hardware, model=first.model, plan=plan,
            workload=Workloads(*sizes, first.workload.precision),
            num_micro_batches=of_each(lambda grid: grid.num_micro_batches),
            gpus_per_node=of_plans([grid.gpus_per_node for grid in grids]),
        )  # fmt: skip

    @lazy
    def amounts(self) -> Any:
        """See `Derived`."""

        def of(name: str) -> Any:
            return np.concatenate([getattr(own.amounts, name) for own in self.blocks])

        return Amounts(of("model"), of("causal"), of("executed"), of("tokens"))

    def _of_parts(self, of: Callable[[Derived], Any]) -> Any:
        """What the columns of each part have, or all of them alike."""
        values = [of(part.result) for part in self.parts]
        kind = np.result_type(*values)
        found = np.empty(sum(len(part.places) for part in self.parts), kind)
        for part, own in zip(self.parts, values, strict=True):
            found[part.places] = own
        return found

    @lazy
    def exact(self) -> Points:
        """Workloads whose figures are, to the bit, those of `simulate`; it has to find those of others."""
        return self._of_parts(lambda part: part.exact)  # type: ignore[attr-defined,no-any-return]

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
        names = dict.fromkeys(name for part in self.parts for name in part.result.compute_ps)
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
        return self._of_parts(lambda part: part._outside)

    @lazy
    def peak_operator(self) -> Any:
        """The operators whose allocations make the peaks."""
        return self._of_parts(lambda part: part.peak_operator)  # type: ignore[attr-defined]

    @lazy
    def out_of_memory_at(self) -> Any:
        """The operators at which memory runs out; None where it does not."""
        return self._of_parts(lambda part: part.out_of_memory_at)  # type: ignore[attr-defined]

    def _of_step(self, flops: Any) -> Any:
        return np.asarray(super()._of_step(flops)).astype(np.float64)

    def saved_bytes(self, *categories: TensorKind) -> Any:
        """See `Derived`."""
        found = []
        for own in self.blocks:
            kept = [saved.category in categories for saved in own.template.program.saved]
            found.append(own.numbers[own.template.index.saved][kept].sum(axis=0)[own.columns])
        return np.concatenate(found)
