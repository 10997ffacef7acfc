"""Steps whose passes know nothing of stages and replicas: those of plans that differ in nothing else are the same.

Where weights are synchronised when all passes have run, and stages free what they have sent, a pass of a block takes
what it takes, however many stages and replicas there are; how passes follow each other is the pipeline's clock.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import NamedTuple

from spsim.costs.collectives import CommCost
from spsim.costs.kernels import ComputeCost
from spsim.costs.static_memory import StaticMemory, dummy_gradients, static_memory
from spsim.inputs.model import Model
from spsim.inputs.plan import MESH_ORDER, Plan
from spsim.inputs.rules import sequence_unit
from spsim.inputs.schedules import HALVED
from spsim.inputs.workload import ELEMENT_BYTES, Precision
from spsim.lazy import Cache
from spsim.program.assembly import one_replica, programs_at, step_key
from spsim.program.blocks.head import is_tied
from spsim.program.blocks.optimizer import parameter_state, shard_ranks
from spsim.program.mesh import Axis, Mesh, nodes_of, world_of
from spsim.program.sizes import Numbers, Template
from spsim.program.templates import step_template
from spsim.step.closing import Optimizer, StageClosings, closings
from spsim.step.ending import Ending, Times
from spsim.step.hidden import hidden_by
from spsim.step.itinerary import Chunk
from spsim.step.preparation import PreparedStep
from spsim.step.prepared import issued_by
from spsim.step.staged_replicas import closings_of_stages, keeps_outputs, weight_numbers
from spsim.step.stages import Stages
from spsim.units import MIB

_OF_STAGES = {
    "virtual_pp": 1, "pp_schedule": "1f1b", "pp_group": None, "pp_layout": None, "pp_sends": None, "pp_overlap": None,
    "pp_warmup_flush": False, "zero": 0, "distributed_optimizer": False, "precision_aware_optimizer": False,
    "moment_dtype": "fp32",
}  # fmt: skip
"""Options of stages, replicas and the optimizer, as plans have them that have none."""


def runs_apart(plan: Plan) -> bool:
    """Whether the passes of a plan are those of all that differ from it in stages and replicas only."""
    sends_behind = plan.dp_library != "megatron" or plan.dp_overlap or plan.zero_stage > 1 or plan.shard_group
    of_layers = plan.recompute_layers or plan.cpu_offload_layers
    staged = plan.pp > 1 and (plan.pp_schedule in HALVED or keeps_outputs(plan))
    hides, _ = hidden_by(plan)
    return not (sends_behind or of_layers or staged or hides) and plan.mesh_order == MESH_ORDER


def one_stage(model: Model, plan: Plan) -> Plan:
    """A plan of as many ranks whose passes are the same; of two stages where the head has a copy of tied weights."""
    pp = 2 if plan.pp > 1 and is_tied(model) and plan.pp % 2 == 0 else plan.pp if is_tied(model) else 1
    return plan.model_copy(update={**_OF_STAGES, "pp": pp, "dp": plan.pp * plan.dp // pp})


_steps: Cache[PreparedStep] = Cache(64 * MIB, lambda step: step.nbytes)


def prepared_passes(model: Model, plan: Plan, precision: Precision, *, single: bool) -> PreparedStep:
    """The blocks of a plan of `one_stage`, among as many ranks; `single` as of templates."""
    alone = one_replica(plan)
    key = (*step_key(model, alone), sequence_unit(model, alone), precision, single, issued_by(plan), plan.gpus)
    return _steps.get(
        key,
        lambda: PreparedStep(
            step_template(model, alone, precision, single=single),
            plan,
            programs_at(model, plan, precision),
            fold=True,
            optimizer=Optimizer(plan, precision),
        ),
    )


class Weights(NamedTuple):
    """Of the blocks of a stage."""

    parameters: int
    spread: int
    """Of these, those of experts that are spread over ranks."""
    bytes: int
    dummies: int
    """Bytes of what stands for their gradients (`dummy_gradients`)."""
    element_bytes: int

    def under(self, plan: Plan) -> StaticMemory:
        """What a rank holds for the whole step."""
        found = static_memory(self.parameters, plan, self.element_bytes, self.bytes, self.spread)
        return replace(found, gradients=found.gradients + self.dummies)


def weights_of(prepared: PreparedStep, runs: Chunk, numbers: Numbers, element_bytes: int) -> Weights:
    """Those of a stage that runs some blocks."""
    dummies = dummy_gradients((prepared.template.programs[run.block] for run in runs), element_bytes)
    return Weights(
        prepared.parameters(numbers, runs), prepared.spread_parameters(runs), prepared.weight_bytes(runs), dummies,
        element_bytes,
    )  # fmt: skip


class Costs(NamedTuple):
    """Those of a profile, and how many GPUs of each node a plan uses."""

    compute: ComputeCost
    comm: CommCost
    gpus_per_node: int


def closing_times(numbers: Numbers, plan: Plan, precision: Precision, stages: Stages, costs: Costs) -> list[Times]:
    """Picoseconds of what closes a step on the different stages of a plan; kept for plans that differ in their passes
    only.
    """
    weights = tuple(weight_numbers(numbers.template).values())
    options = plan.norm_gradients, plan.grad_dtype, plan.moment_dtype, plan.precision_aware_optimizer, plan.zero_stage
    key = weights, stages, world_key(plan), options, precision, costs
    return _times.get(key, lambda: _closing_times(numbers, plan, precision, stages, costs))


_times: Cache[list[Times]] = Cache(1024, lambda _: 1)


def world_key(plan: Plan) -> tuple[int, ...]:
    """The axes of a plan."""
    return plan.pp, plan.dp, plan.ring, plan.ulysses, plan.tp


def _closing_times(numbers: Numbers, plan: Plan, precision: Precision, stages: Stages, costs: Costs) -> list[Times]:
    optimizer = Optimizer(plan, precision)
    own = _closings(numbers.template, plan, optimizer, stages)
    ending = Ending(numbers.template, optimizer, [(runs, own[runs].closings) for runs in stages.kinds])
    return ending.times(numbers, costs.compute, costs.comm, _nodes_in(world_of(plan)), costs.gpus_per_node)


def _closings(template: Template, plan: Plan, optimizer: Optimizer, stages: Stages) -> dict[Chunk, StageClosings]:
    if plan.pp > 1 or shard_ranks(plan) > 1:
        return closings_of_stages(template, plan, optimizer, stages)
    gradient = parameter_state(plan, ELEMENT_BYTES[optimizer.precision]).gradient
    found = closings(template.programs, plan, world_of(plan), gradient, optimizer)
    return {runs: StageClosings(found, (), ()) for runs in stages.kinds}


def _nodes_in(world: Mesh) -> Callable[..., int]:
    """(axes, ranks, gpus_per_node) -> nodes that so many neighbours along some axes span, each found once."""

    @cache
    def nodes(axes: tuple[Axis, ...], ranks: int, gpus_per_node: int) -> int:
        return nodes_of(world, axes, gpus_per_node, ranks)

    return nodes
