"""What the blocks of a model take under a plan, whatever its pipeline and its replicas: a step cannot take less.

Embedding, a layer and the head are compiled once for all plans that split them in the same way. A pass of a block is at
least the longest chain of its kernels and communications from its start to its last kernel, with durations by the
profile's own cost models, for passes of a stage follow each other. Where nothing else is on the lanes, that is the pass
as it is simulated. Where messages of replicas may run between its tasks, kernels are taken as slowed by no
communication, so that what delays a task never shortens the chain; and where no chain is known, as of ranks that
differ, its kernels alone count.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from spsim.costs.models import cost_models
from spsim.engine.recording import COMPUTE_LANE
from spsim.inputs.hardware import HardwareProfile
from spsim.inputs.model import Model
from spsim.inputs.plan import Plan
from spsim.inputs.rules import gpus_per_node, is_single
from spsim.inputs.workload import Workload, Workloads
from spsim.program.assembly import EMBEDDING, HEAD
from spsim.program.instructions import LAYER
from spsim.program.recipes import program_precision
from spsim.step.itinerary import Run
from spsim.step.preparation import PreparedStep
from spsim.step.prepared import prepared_step
from spsim.step.segments import BlockPass

BLOCKS = (EMBEDDING, LAYER, HEAD)
Numbers = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Blocks:
    """What each of `BLOCKS` takes at least, of one micro-batch on one rank: a row for each, a column for each workload;
    nothing of a head where the model has none.
    """

    passes_ps: Numbers
    """Forward and backward together."""
    saved_bytes: Numbers
    """From the forward pass to the backward one."""
    beyond_bytes: Numbers
    """What the backward pass takes over these at its fullest."""
    parameters: Numbers
    """These and the next have no columns."""
    weight_bytes: Numbers
    """Of all copies that products read."""

    def at(self, places: Sequence[int]) -> Blocks:
        """For some of the workloads."""
        passes, saved, beyond = (of[:, places] for of in (self.passes_ps, self.saved_bytes, self.beyond_bytes))
        return Blocks(passes, saved, beyond, self.parameters, self.weight_bytes)


def of_blocks(plan: Plan) -> Plan:
    """One stage of as many replicas as fill the GPUs, whose blocks are those of the plan, with nothing recomputed or
    offloaded where some layers are: plans with the same are one here. Stages stay where they lie within other groups.
    """
    pp = 1 if {*plan.mesh_order.split("-")[-2:]} == {"dp", "pp"} else plan.pp
    alone = {"pp": pp, "virtual_pp": 1, "pp_schedule": "1f1b", "pp_group": None, "pp_layout": None, "pp_sends": None}
    states = {"distributed_optimizer": False, "zero": 0, "shard_group": None, "dp_overlap": weaves(plan)}
    every = {"recompute": "none", "recompute_layers": None, "recompute_method": "block", "cpu_offload_layers": 0}
    update = {**alone, **states, "dp": plan.dp * plan.pp // pp, **({} if layers_are_alike(plan) else every)}
    return plan.model_copy(update=update)


def weaves(plan: Plan) -> bool:
    """Whether messages of replicas may run beside the tasks of a pass."""
    return bool(plan.dp_overlap) or plan.zero_stage > 1 or plan.dp_library == "ddp"


def layers_are_alike(plan: Plan) -> bool:
    """Whether no layer is recomputed or offloaded that others are not."""
    return plan.recompute_layers is None and not plan.cpu_offload_layers


def blocks_of(hardware: HardwareProfile, model: Model, plan: Plan, workloads: Workloads) -> Blocks:
    """The blocks of a plan that `of_blocks` has made, for some workloads, those of a single sequence apart where their
    programs are.
    """
    batches = workloads.micro_batch
    single = np.broadcast_to(is_single(plan, batches), batches.shape)
    if single.all() or not single.any():
        return _alike(hardware, model, plan, workloads, single=bool(single.all()))
    order = np.argsort(single, kind="stable")
    own = Workloads(workloads.seq_len[order], batches[order], workloads.precision)
    several = len(order) - int(single.sum())
    parts = [Workloads(own.seq_len[at], own.micro_batch[at], own.precision)
             for at in (slice(several), slice(several, None))]  # fmt: skip
    first, last = (_alike(hardware, model, plan, part, single=place == 1) for place, part in enumerate(parts))
    rows = ("passes_ps", "saved_bytes", "beyond_bytes")
    joined = {name: np.hstack([getattr(first, name), getattr(last, name)]) for name in rows}
    return replace(first, **joined).at(np.argsort(order).tolist())


def _alike(hardware: HardwareProfile, model: Model, plan: Plan, workloads: Workloads, *, single: bool) -> Blocks:
    """The same of workloads of one structure."""
    precision = program_precision(workloads.precision, any_layout=hardware.fp8_any_layout)
    prepared = prepared_step(model, plan, True, precision, single=single)
    template = prepared.template
    every = [template.at(workload) for workload in _each(workloads)]
    numbers = np.array([own.values for own in every], dtype=np.float64).T
    compute, comm = cost_models(hardware, workloads.precision)
    with np.errstate(over="ignore", invalid="ignore"):  # beyond int64 picoseconds chains do not hold: bounds of 0
        times = prepared.durations_of_many(numbers, compute, comm, gpus_per_node=gpus_per_node(hardware, plan))
    slowdown = 0.0 if plan.dp_overlap else hardware.coefficients.overlap_slowdown.value
    chains = _chains(prepared, workloads, times, slowdown)
    passes, saved, beyond = (np.zeros((len(BLOCKS), len(every))) for _ in range(3))
    found = Blocks(passes, saved, beyond, np.zeros(len(BLOCKS)), np.zeros(len(BLOCKS)))
    for row, name in enumerate(BLOCKS):
        if name not in prepared.blocks:
            continue
        chain, highest = chains.get(name, (0.0, 0.0))
        found.passes_ps[row] = np.where(np.greater(chain, 0), chain, _kernels(prepared, name, times))
        found.saved_bytes[row] = numbers[template.indices[name].saved].sum(axis=0)
        if not plan.dp_overlap:
            found.beyond_bytes[row] = np.maximum(highest - found.saved_bytes[row], 0.0)
        found.parameters[row] = every[0].parameters(name)
        found.weight_bytes[row] = template.programs[name].weight_bytes
    return found


def _each(workloads: Workloads) -> list[Workload]:
    sizes = zip(workloads.seq_len.tolist(), workloads.micro_batch.tolist(), strict=True)
    return [Workload(seq_len=length, micro_batch=batch, precision=workloads.precision) for length, batch in sizes]


def _chains(
    prepared: PreparedStep, workloads: Workloads, times: npt.NDArray[np.int64], slowdown: float
) -> Mapping[str, tuple[Numbers, Numbers]]:
    """Picoseconds of both passes of each block, and its bytes at the fullest; 0 where they do not hold for a workload,
    none of ranks that differ.
    """
    columns = prepared.columns
    if columns is None:
        return {}
    basis = prepared.template.basis(workloads.seq_len, workloads.micro_batch)
    ran = columns.ran(times, basis, slowdown)
    found = {}
    for name in prepared.blocks:
        length: Any = sum(own for (block, _), own in ran.lengths.items() if block == name)
        highest = ran.memory((Run(name),), 1).highest
        found[name] = np.where(ran.holds, length, 0.0), np.where(ran.holds, highest, 0.0)
    return found


def _kernels(prepared: PreparedStep, name: str, times: npt.NDArray[np.int64]) -> Numbers:
    """Picoseconds of the kernels of both passes of a block, on ranks that have the least to do."""
    passes: Mapping[Any, BlockPass] = prepared.blocks[name]
    total = np.zeros(times.shape[1])
    for part in (part for own in passes.values() for part in own.parts):
        slots = prepared.index_of(part.segment).slots
        tasks = zip(part.segment.tasks, part.segment.instructions, strict=True)
        kernels = [[*slots[step.id]] for task, step in tasks if task.lane == COMPUTE_LANE]
        total += part.runs * sum((times[own].min(axis=0) for own in kernels), start=np.zeros(times.shape[1]))
    return total
