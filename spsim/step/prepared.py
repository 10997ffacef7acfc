"""Steps and layers under a plan, prepared once for all that read the same of model and plan."""

from __future__ import annotations

from functools import lru_cache

from spsim.inputs.model import Model
from spsim.inputs.plan import Plan
from spsim.inputs.rules import sequence_unit
from spsim.inputs.workload import ELEMENT_BYTES, Precision
from spsim.lazy import Cache
from spsim.program.assembly import kinds_of_layers, layer_key, layer_programs, layers_of_blocks, programs_at, step_key
from spsim.program.blocks.optimizer import parameter_state
from spsim.program.recipes import in_precision
from spsim.program.templates import layers_template, step_template
from spsim.step.closing import Optimizer
from spsim.step.hidden import hidden_by
from spsim.step.preparation import PreparedStep, has_halves
from spsim.units import MIB

_steps: Cache[PreparedStep] = Cache(64 * MIB, lambda step: step.nbytes)


def prepared_layer(
    model: Model, plan: Plan, fold: bool, precision: Precision = "bf16", *, single: bool = False
) -> PreparedStep:
    """The layers of a model under a plan; `fold` simulates identical ranks once, `single` as of templates."""
    kinds = *kinds_of_layers(model, plan), *layers_of_blocks(model, plan).items()
    return _steps.get(
        (layer_key(model, plan), *kinds, precision, single, issued_by(plan), fold),
        lambda: PreparedStep(
            layers_template(model, plan, precision, single=single),
            plan,
            lambda workload: layer_programs(model, plan, in_precision(workload, precision)),
            fold=fold,
        ),
    )


def prepared_step(
    model: Model, plan: Plan, fold: bool, precision: Precision = "bf16", *, single: bool = False
) -> PreparedStep:
    """The whole of a model under a plan: embedding, layers, and the head if it has one."""
    optimizer = plan.grad_dtype, plan.moment_dtype, plan.precision_aware_optimizer
    key = (*step_key(model, plan), sequence_unit(model, plan), precision, single, issued_by(plan), optimizer, fold)
    return _steps.get(
        key,
        lambda: PreparedStep(
            step_template(model, plan, precision, single=single),
            plan,
            programs_at(model, plan, precision),
            fold=fold,
            gradient_bytes=parameter_state(plan, ELEMENT_BYTES[precision]).gradient,
            optimizer=Optimizer(plan, precision),
        ),
    )


@lru_cache(maxsize=256)
def issued_by(plan: Plan) -> tuple[bool | int | str, ...]:
    """What of a plan says in which order its program is issued, and by what; among how many ranks, with the stages."""
    overlap, sharded = (plan.tp_backward_overlap, *hidden_by(plan)), plan.zero_stage > 0
    return plan.norm_gradients, *overlap, sharded, plan.cuda_graphs, has_halves(plan), plan.pp, plan.mesh_order
