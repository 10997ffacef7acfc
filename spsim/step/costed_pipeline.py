"""A step of several pipeline stages with the times that a profile gives it."""

from __future__ import annotations

from spsim.costs.collectives import CommCost
from spsim.costs.kernels import ComputeCost
from spsim.inputs.hardware import HardwareProfile
from spsim.inputs.plan import Plan
from spsim.program.instructions import LAYER
from spsim.program.sizes import Numbers
from spsim.step.folding import Step
from spsim.step.itinerary import Run
from spsim.step.pipeline.clock import Clock
from spsim.step.pipeline.exchange import Exchange
from spsim.step.pipelined import Closed, Pipelined, Stages, run_pipeline
from spsim.step.preparation import PreparedStep
from spsim.units import picoseconds


def costed_pipeline(
    prepared: PreparedStep,
    stages: Stages,
    numbers: Numbers,
    hardware: HardwareProfile,
    plan: Plan,
    costs: tuple[ComputeCost, CommCost],
    *,
    micro_batches: int,
    gpus_per_node: int,
) -> Pipelined:
    """All stages and micro-batches of one workload, gradients summed and the optimizer stepped."""
    compute, comm = costs
    step = Step(
        (),
        prepared.programs,
        prepared.durations(numbers, compute, comm, gpus_per_node=gpus_per_node, chunk=None),
        prepared.sizes(numbers),
        hardware.coefficients.overlap_slowdown.value,
        prepared.abreast,
    )
    message = boundary_bytes(prepared, numbers)
    times = [
        prepared.closing_times(numbers, stage_runs(stages, stage), compute, comm, gpus_per_node=gpus_per_node)
        for stage in range(plan.pp)
    ]
    clock = Clock(plan.pp_schedule, plan.pp, plan.virtual_pp, micro_batches, plan.pp_group, exchange_of(plan))
    return run_pipeline(
        prepared.blocks,
        stages,
        clock,
        step,
        _transfers(plan, message, comm, prepared.mesh.ranks, gpus_per_node),
        Closed(times),
        stride=prepared.mesh.ranks,
        message_bytes=message,
    )


def stage_runs(stages: Stages, stage: int) -> tuple[Run, ...]:
    """The blocks of all chunks of a stage."""
    return tuple([run for chunk in stages[stage] for run in chunk.runs])


def boundary_bytes(prepared: PreparedStep, numbers: Numbers) -> int:
    """What a stage sends of a micro-batch: [s / cp / (tp under sequence parallelism), b, h]; there is no scatter and
    gather, so that without sequence parallelism every rank of tp sends all of it (megatron-core 0.16.1).
    """
    (hidden,) = prepared.template.programs[LAYER].inputs
    return int(numbers.values[prepared.template.index.buffers[hidden.id]])


def exchange_of(plan: Plan) -> Exchange:
    """How stages post their messages and wait for them."""
    library = plan.pp_sends or ("megatron" if plan.pp_schedule == "1f1b" else "torch")
    overlap = plan.virtual_pp > 1 if plan.pp_overlap is None else plan.pp_overlap
    if library == "torch":
        return Exchange("torch")
    return Exchange("megatron", overlap, plan.pp_warmup_flush and overlap)


def _transfers(plan: Plan, message: int, comm: CommCost, stride: int, gpus_per_node: int) -> dict[tuple[int, int], int]:
    """Picoseconds of a message between any two neighbouring stages, of which the last and the first are, too."""
    pairs = [(stage, (stage + 1) % plan.pp) for stage in range(plan.pp)]
    nodes = {pair: _nodes(*pair, stride, gpus_per_node) for pair in pairs}
    times = {n: picoseconds(comm.duration("send_receive", message, 2, n)) for n in set(nodes.values())}
    return {way: times[nodes[pair]] for pair in pairs for way in (pair, pair[::-1])}


def _nodes(stage: int, other: int, stride: int, gpus_per_node: int) -> int:
    """Nodes on which a rank of a stage and its counterpart on another lie: of the pair that is farthest apart."""
    ranks = range(min(stride, gpus_per_node))
    apart = ((stage * stride + n) // gpus_per_node != (other * stride + n) // gpus_per_node for n in ranks)
    return 2 if any(apart) else 1
