"""Plans of one model, simulated together: a space of plans as a search enumerates it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import replace
from itertools import accumulate, count
from typing import Any

import numpy as np

from spsim.costs.models import cost_models
from spsim.costs.static_memory import StaticMemory, outside_tensors
from spsim.inputs.grid import Grid
from spsim.inputs.workload import Workloads
from spsim.lazy import Cache
from spsim.program.blocks.optimizer import shard_ranks
from spsim.program.mesh import mesh_of
from spsim.program.sizes import products
from spsim.results.amounts import amounts_of, counted
from spsim.results.columns import ResultColumns
from spsim.results.derived import Amounts
from spsim.results.joined import Blocks, JoinedColumns
from spsim.results.joined import Part as Columns
from spsim.results.staged_columns import StagedResultColumns
from spsim.results.uncertainty import has_flags, is_calibrated
from spsim.simulation import is_one_sequence, precision_of, stages_of
from spsim.step.apart import Costs, Weights, closing_times, one_stage, prepared_passes, runs_apart, weights_of
from spsim.step.columns.chunks import ChunkPasses
from spsim.step.columns.closing import Part, parts_of
from spsim.step.columns.endings import Endings
from spsim.step.columns.fill import Places
from spsim.step.columns.stages import PlanColumns, StagedColumns
from spsim.step.columns.step import StepColumns
from spsim.step.costed_columns import Pipelining, Sends, nodes_of_lanes
from spsim.step.itinerary import Chunk
from spsim.step.stages import Stages


def alike(grid: Grid) -> tuple[Hashable, ...] | None:
    """Equal of grids whose passes are the same, so that `simulate_together` takes them; None where it does not."""
    scenario = grid.scenario
    plan = scenario.plan
    alone = scenario.perturbations.changes or scenario.network == "flows" or scenario.scope != "step"
    alone = alone or scenario.model.mtp_layers > 0
    if alone or not runs_apart(plan) or is_calibrated(grid.hardware) or has_flags(grid.hardware):
        return None
    return (
        id(grid.hardware),
        scenario.model,
        precision_of(scenario),
        one_stage(scenario.model, plan),
        is_one_sequence(scenario),
        grid.gpus_per_node,
    )


OF_ALL = 3
"""Parts of what is `alike` of which all that is simulated together has the same."""


def come_again(key: Hashable) -> bool:
    """Whether plans that are `alike` were asked for before, so that it pays to prepare their passes for one of them."""
    return next(_asked.get(key, count)) > 0


_asked: Cache[Iterator[int]] = Cache(4096, lambda _: 1)


def simulate_together(every: Sequence[Sequence[Grid]]) -> JoinedColumns | None:
    """Simulate the workloads of plans of one model at once: those in a row are `alike`, whatever their stages and
    replicas, and their passes are worked out once for each different workload. None, and `exact`, as of
    `simulate_many`.
    """
    own = [_Alike(grids) for grids in every]
    if any(one.prepared.columns is None for one in own):
        return None
    compute, comm, _ = own[0].costs
    endings = Endings(compute, comm, precision_of(every[0][0]))
    for one in own:
        one.ask(endings)
    endings.price()
    first = [0, *accumulate(len(one.columns) for one in own)]
    parts: list[Columns] = []
    staged: dict[tuple[Stages, Pipelining], list[tuple[_Alike, int, int]]] = defaultdict(list)
    for one, start in zip(own, first, strict=False):
        alone = []
        for number, grid in enumerate(one.grids):
            if grid.plan.pp > 1:
                staged[one.stages[number], Pipelining.of(grid.plan)].append((one, number, start))
            else:
                alone.append(number)
        if alone:
            parts.append(Columns(one.places(alone, start), one.of_one_stage(alone)))
    for (stages, pipelining), plans in staged.items():
        step = StagedColumns(stages, [one.of_stages(number) for one, number, _ in plans], pipelining.clock_of)
        places = np.concatenate([one.places([number], start) for one, number, start in plans])
        outside = np.repeat([one.outside(number) for one, number, _ in plans], step.lengths)
        parts.append(Columns(places, StagedResultColumns(every[0][0], step, outside)))
    return JoinedColumns("step", every, parts, [one.blocks for one in own])


class _Alike:
    """Plans whose passes are the same."""

    def __init__(self, grids: Sequence[Grid]) -> None:
        self.grids = grids
        first = grids[0].scenario
        self.prepared = prepared_passes(
            first.model, one_stage(first.model, first.plan), precision_of(first), single=is_one_sequence(first)
        )
        self.ends = [0, *accumulate(len(grid.global_batch) for grid in grids)]
        self.sizes = np.concatenate([np.stack([grid.workload.seq_len, grid.workload.micro_batch]) for grid in grids], 1)
        different, columns = np.unique(self.sizes, axis=1, return_inverse=True)
        self.columns: Places = np.asarray(columns).reshape(-1)
        """Which of the different workloads each is."""
        compute, comm = cost_models(first.hardware, first.workload.precision)
        self.costs = Costs(compute, comm, first.gpus_per_node)
        self.known = self.prepared.template.at(first.workload)
        """Numbers that no workload changes can be read from it."""
        self._weights: dict[Chunk, Weights] = {}
        """Of the blocks of stages."""
        self.stages = [stages_of(grid.model, *_staging(grid)) for grid in grids]
        if self.prepared.columns is not None:
            self._run(different)

    def _run(self, different: Any) -> None:
        prepared, first = self.prepared, self.grids[0]
        assert prepared.columns is not None
        basis = prepared.template.basis(*different)
        compute, comm, per_node = self.costs
        with np.errstate(over="ignore", invalid="ignore"):
            self.numbers = products(prepared.columns.coefficients, basis)
            times = prepared.durations_of_many(self.numbers, compute, comm, gpus_per_node=per_node)
            self.ran = prepared.columns.ran(times, basis, first.hardware.coefficients.overlap_slowdown.value)
        chunks = dict.fromkeys(chunk for stages in self.stages for chunk in stages.chunk_kinds)
        self.passes = ChunkPasses(self.ran, [*chunks])
        self.sends = Sends(prepared, self.numbers, comm)

    def places(self, numbers: Sequence[int], start: int) -> Places:
        """Of the workloads of some plans among all, of which those of these plans begin at `start`."""
        return np.concatenate([np.arange(start + self.ends[n], start + self.ends[n + 1]) for n in numbers])

    def outside(self, number: int) -> int:
        """Bytes of a plan that are not the tensors'."""
        return outside_tensors(self.grids[number].hardware, mesh_of(self.grids[number].plan))

    def of_stages(self, number: int) -> PlanColumns:
        """A plan of several stages."""
        grid, stages = self.grids[number], self.stages[number]
        nodes = nodes_of_lanes(grid.plan, grid.gpus_per_node)
        return PlanColumns(
            self.passes, self.columns[self.ends[number] : self.ends[number + 1]], grid.num_micro_batches,
            self.sends.times(frozenset(node + 1 for node in nodes)), nodes,
            self._closings(number),
            [self._static(number, kind).total for kind in range(len(stages.kinds))],
        )  # fmt: skip

    def ask(self, endings: Endings) -> None:
        """What closes the steps of all plans."""
        every = zip(self.grids, self.stages, strict=True)
        self._asked = [
            endings.ask(self.known, grid.plan, stages, grid.gpus_per_node) if self._has_stages(grid) else None
            for grid, stages in every
        ]

    @staticmethod
    def _has_stages(grid: Grid) -> bool:
        """Whether a step is closed as those of stages, or of ranks that share weights."""
        return grid.plan.pp > 1 or shard_ranks(grid.plan) > 1

    def _closings(self, number: int) -> list[list[Part]]:
        asked, grid = self._asked[number], self.grids[number]
        if asked is not None:
            return [own.parts for own in asked]
        times = closing_times(self.known, grid.plan, precision_of(grid.scenario), self.stages[number], self.costs)
        return [parts_of(own) for own in times]

    def _static(self, number: int, kind: int) -> StaticMemory:
        runs, grid = self.stages[number].kinds[kind], self.grids[number]
        if runs not in self._weights:
            self._weights[runs] = weights_of(self.prepared, runs, self.known, grid.scenario.workload.element_bytes)
        return self._weights[runs].under(grid.plan)

    def of_one_stage(self, numbers: Sequence[int]) -> ResultColumns:
        """Plans of one stage, as one."""
        grids = [self.grids[number] for number in numbers]
        lengths = [len(grid.global_batch) for grid in grids]
        spent: list[dict[str, Any]] = []
        for number in numbers:
            spent.append(defaultdict(int))
            for part in self._closings(number)[0]:
                spent[-1][part.phase] += part.ps
        columns = self.columns[self.places(numbers, 0)]
        step = StepColumns(
            self.ran.at(columns), tuple(self.stages[numbers[0]].kinds[0]),
            np.concatenate([grid.num_micro_batches for grid in grids]),
            np.repeat([own["weight_sync"] for own in spent], lengths),
            np.repeat([own["optimizer"] for own in spent], lengths),
        )  # fmt: skip
        statics = [self._static(number, 0) for number in numbers]

        def held(name: str) -> Any:
            return np.repeat([getattr(own, name) for own in statics], lengths)

        static = StaticMemory(held("weights"), held("gradients"), held("optimizer"))
        return ResultColumns(
            "step", grids[0], self.prepared, self.numbers[:, columns], NO_AMOUNTS, step, static,
            np.repeat([self.outside(number) for number in numbers], lengths),
        )  # fmt: skip

    @property
    def blocks(self) -> Blocks:
        """What a result of all plans reads of their blocks."""
        every = Workloads(self.sizes[0], self.sizes[1], self.grids[0].workload.precision)
        micro_batches = np.concatenate([grid.num_micro_batches for grid in self.grids])
        replicas = np.repeat([grid.plan.dp for grid in self.grids], np.diff(self.ends))
        first = self.grids[0].scenario
        amounts = amounts_of(first, counted(first.model, every, replicas * micro_batches), "step", replicas)
        tokens: Any = np.concatenate([grid.global_batch * grid.workload.seq_len for grid in self.grids])
        return Blocks(replace(amounts, tokens=tokens), self.prepared.template, self.numbers, self.columns)


def _staging(grid: Grid) -> tuple[Any, ...]:
    """What stages know of a plan."""
    plan = grid.plan
    return plan.pp, plan.virtual_pp, plan.pp_schedule, plan.pp_layout


NO_AMOUNTS = Amounts(0, 0, 0, None)
"""Of a part, where the whole has them."""
