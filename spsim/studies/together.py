"""Plans whose passes are alike, simulated together: a space of plans as a search enumerates it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import replace
from itertools import count, pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from spsim.costs.models import cost_models
from spsim.inputs.grid import Grid
from spsim.inputs.workload import Workloads
from spsim.lazy import Cache
from spsim.program.sizes import Numbers, products
from spsim.results.amounts import amounts_of, counted
from spsim.results.columns import ResultColumns
from spsim.results.derived import Amounts
from spsim.results.joined import JoinedColumns
from spsim.results.staged_columns import StagedResultColumns
from spsim.results.uncertainty import has_flags, is_calibrated
from spsim.simulation import (
    is_one_sequence,
    one_if_alike,
    precision_of,
    stages_of,
    static_of,
)
from spsim.step.apart import Costs, closing_times, one_stage, prepared_passes, runs_apart
from spsim.step.columns.step import RanPasses, StepColumns
from spsim.step.costed_columns import Sends, staged_columns
from spsim.step.preparation import PreparedStep


def alike(grid: Grid) -> Hashable | None:
    """Equal of grids whose passes are the same, so that `simulate_together` takes them; None where it does not."""
    scenario = grid.scenario
    plan = scenario.plan
    alone = scenario.perturbations.changes or scenario.network == "flows" or scenario.scope != "step"
    alone = alone or scenario.model.experts is not None or len(scenario.model.types) > 1
    alone = alone or scenario.model.mtp_layers > 0
    if alone or not runs_apart(plan) or is_calibrated(grid.hardware) or has_flags(grid.hardware):
        return None
    return (
        id(grid.hardware),
        scenario.model,
        one_stage(scenario.model, plan),
        precision_of(scenario),
        grid.gpus_per_node,
    )


def come_again(key: Hashable) -> bool:
    """Whether plans that are `alike` were asked for before, so that it pays to prepare their passes for one of them."""
    return next(_asked.get(key, count)) > 0


_asked: Cache[Iterator[int]] = Cache(4096, lambda _: 1)


def simulate_together(grids: Sequence[Grid]) -> JoinedColumns | None:
    """Simulate the workloads of plans that are `alike` at once, whatever their stages and replicas: passes are worked
    out once for each different workload. None, and `exact`, as of `simulate_many`.
    """
    first, model = grids[0].scenario, grids[0].model
    prepared = prepared_passes(model, one_stage(model, first.plan), precision_of(first), single=is_one_sequence(first))
    if prepared.columns is None:
        return None
    sizes = np.concatenate([np.stack([grid.workload.seq_len, grid.workload.micro_batch]) for grid in grids], axis=1)
    different, columns = np.unique(sizes, axis=1, return_inverse=True)
    columns = np.asarray(columns).reshape(-1)
    basis = prepared.template.basis(*different)
    compute, comm = cost_models(first.hardware, first.workload.precision)
    with np.errstate(over="ignore", invalid="ignore"):
        numbers = products(prepared.columns.coefficients, basis)
        times = prepared.durations_of_many(numbers, compute, comm, gpus_per_node=first.gpus_per_node)
        ran = prepared.columns.ran(times, basis, first.hardware.coefficients.overlap_slowdown.value)
    together = Together(
        prepared, ran, numbers, prepared.template.at(first.workload), Costs(compute, comm, first.gpus_per_node)
    )
    ends = np.cumsum([0, *(len(grid.global_batch) for grid in grids)])
    parts = [_part(together, grid, columns[own[0] : own[1]]) for grid, own in zip(grids, pairwise(ends), strict=True)]
    every = Workloads(sizes[0], sizes[1], first.workload.precision)
    micro_batches = np.concatenate([grid.num_micro_batches for grid in grids])
    replicas = np.repeat([grid.plan.dp for grid in grids], np.diff(ends))
    amounts = amounts_of(first, counted(first.model, every, replicas * micro_batches), "step", replicas)
    tokens: Any = np.concatenate([grid.global_batch * grid.workload.seq_len for grid in grids])
    amounts = replace(amounts, tokens=tokens)
    return JoinedColumns("step", grids, parts, amounts, prepared.template, numbers[:, columns])


class Together(NamedTuple):
    """What plans share that are simulated together."""

    prepared: PreparedStep
    ran: RanPasses
    numbers: npt.NDArray[np.float64]
    """Of the different workloads."""
    known: Numbers
    """Those that no workload changes can be read from it."""
    costs: Costs


def _part(together: Together, grid: Grid, columns: npt.NDArray[np.intp]) -> ResultColumns | StagedResultColumns:
    """The workloads of one plan, which are some of the different ones."""
    scenario, prepared, costs = grid.scenario, together.prepared, together.costs
    plan = scenario.plan
    stages = stages_of(scenario.model, plan.pp, plan.virtual_pp, plan.pp_schedule, plan.pp_layout)
    closings = closing_times(together.known, plan, precision_of(scenario), stages, costs)
    statics = [static_of(scenario, prepared, runs, together.known) for runs in stages.kinds]
    if plan.pp > 1:
        step = staged_columns(
            together.ran, columns, stages, plan, grid.num_micro_batches, closings,
            np.array([float(own.total) for own in statics]),
            Sends(prepared, together.numbers, costs.comm, grid.gpus_per_node),
        )  # fmt: skip
        return StagedResultColumns(grid, step)
    spent = Counter[str]()
    for made, times in closings[0]:
        spent[made.segment.phase] += sum(times)
    micro_batches = one_if_alike(grid.num_micro_batches)
    ran = together.ran.at(columns)
    own = StepColumns(ran, tuple(stages.kinds[0]), micro_batches, spent["weight_sync"], spent["optimizer"])
    return ResultColumns("step", grid, prepared, together.numbers[:, columns], NO_AMOUNTS, own, statics[0])


NO_AMOUNTS = Amounts(0, 0, 0, None)
"""Of a part, where the whole has them."""
