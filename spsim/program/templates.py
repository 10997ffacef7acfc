"""The program of a layer for every workload, made once for all plans that share it.

Where programs of a `single` sequence are others (`rules.is_single`), for those.
"""

from __future__ import annotations

from collections.abc import Hashable
from math import lcm

import numpy as np
import numpy.typing as npt

from spsim.inputs.model import Model
from spsim.inputs.plan import Plan
from spsim.inputs.rules import sequence_unit
from spsim.inputs.serving_rules import batch_unit, served_unit
from spsim.inputs.workload import Precision, Workload
from spsim.lazy import Cache
from spsim.program.assembly import (
    compile_embedding,
    compile_head,
    compile_layer,
    compile_step,
    embedding_key,
    head_key,
    kinds_of_layers,
    layer_key,
    layers_of_blocks,
    step_key,
)
from spsim.program.instructions import LAYER
from spsim.program.recompute import LayerKind, usual_kind
from spsim.program.routing import routing_of
from spsim.program.serving import serving_programs
from spsim.program.sizes import Template, Vector, every_workload
from spsim.units import MIB

_templates: Cache[Template] = Cache(64 * MIB, lambda template: template.nbytes)


def dealt_among(model: Model, plan: Plan) -> int:
    """What divides the tokens of a sequence: experts over those of a token, or over copies of it, in lowest terms."""
    if model.experts is None or model.experts_per_token is None:
        return 1
    routing = routing_of(model, plan)
    tokens, copies = (own / model.experts for own in (model.experts_per_token * routing.load, routing.copies))
    return lcm(tokens.denominator, copies.denominator)


def are_whole(model: Model, plan: Plan, seq_len: Vector) -> npt.NDArray[np.bool_]:
    """For which sequences no size is rounded, since the tokens of each are dealt out evenly."""
    found: npt.NDArray[np.bool_] = seq_len % (sequence_unit(model, plan) * dealt_among(model, plan)) == 0
    return found


def layer_template(
    model: Model, plan: Plan, precision: Precision = "bf16", kind: LayerKind | None = None, *, single: bool = False
) -> Template:
    """The program of one layer, or of a unit of layers, for every workload of a precision."""
    unit, kind, divisor = sequence_unit(model, plan), kind or usual_kind(plan), dealt_among(model, plan)
    key = (layer_key(model, plan, kind), precision, single)
    every = every_workload(unit * divisor, precision, single=single)
    return _templates.get(key, lambda: Template(compile_layer(model, plan, every, kind), unit, divisor))


def layers_template(model: Model, plan: Plan, precision: Precision = "bf16", *, single: bool = False) -> Template:
    """The programs of the layers of a step, of each kind, for every workload of a precision."""
    kinds, unit = kinds_of_layers(model, plan), sequence_unit(model, plan)
    first, *others = kinds
    if not others:
        return layer_template(model, plan, precision, first, single=single)
    divisor = dealt_among(model, plan)
    every = every_workload(unit * divisor, precision, single=single)
    programs = {kinds[kind]: compile_layer(model, plan, every, kind) for kind in others}
    return Template(
        compile_layer(model, plan, every, first), unit, divisor, others=programs, layers=layers_of_blocks(model, plan)
    )


def step_template(model: Model, plan: Plan, precision: Precision = "bf16", *, single: bool = False) -> Template:
    """The programs of embedding, layer and head for every workload of a precision."""
    unit, divisor = sequence_unit(model, plan), dealt_among(model, plan)

    def compiled() -> Template:
        programs = compile_step(model, plan, every_workload(unit * divisor, precision, single=single))
        layers = layers_of_blocks(model, plan)
        return Template(programs.pop(LAYER), unit, divisor, others=programs, layers=layers)

    return _templates.get((*step_key(model, plan), unit, precision, single), compiled)


def embedding_template(model: Model, plan: Plan, precision: Precision = "bf16") -> Template:
    """The program of the embedding for every workload of a precision."""
    unit = sequence_unit(model, plan)
    key = (*embedding_key(model, plan), unit, precision)
    return _templates.get(key, lambda: Template(compile_embedding(model, plan, every_workload(unit, precision)), unit))


def head_template(
    model: Model,
    plan: Plan,
    precision: Precision = "bf16",
    *,
    loss_fusion: bool = False,
    beside_embedding: bool = False,
) -> Template:
    """The program of final norm, output layer and loss for every workload of a precision; `head_program` has the
    options. Its products are in 16 bits where those of the layers are in 8 or 4.
    """
    unit, options = sequence_unit(model, plan), {"loss_fusion": loss_fusion, "beside_embedding": beside_embedding}
    key = (*head_key(model, plan, **options), unit, precision)
    return _templates.get(
        key, lambda: Template(compile_head(model, plan, every_workload(unit, precision), **options), unit)
    )


def serving_key(model: Model, plan: Plan, workload: Workload) -> tuple[Hashable, ...]:
    """What the programs of a step of inference depend on, but for the sizes that a template holds for all workloads."""
    sizes = (workload.seq_len, workload.micro_batch, workload.passages) if _of_one(model, plan, workload) else ()
    return model, plan, workload.phase, workload.precision, workload.cache_bytes, *sizes


def _of_one(model: Model, plan: Plan, workload: Workload) -> bool:
    """Whether a template holds for one workload: where a prompt passes in chunks, a batch is cut, tokens are
    dealt out to experts, or a window ends what is seen.
    """
    unlike = model.experts is not None or model.sliding_window is not None
    return unlike or len(workload.passages) > 1 or batch_unit(plan, workload) > 1


def serving_template(model: Model, plan: Plan, workload: Workload) -> Template:
    """The programs of a step, if they can be for every workload."""

    def compiled() -> Template:
        unit, own = 1, workload
        if not _of_one(model, plan, workload):
            unit = served_unit(plan, workload)
            every = every_workload(unit, workload.precision)
            sizes = {"seq_len": every.seq_len, "micro_batch": every.micro_batch, "chunk_tokens": None}
            own = workload.model_copy(update=sizes)
        programs = serving_programs(model, plan, own)
        return Template(programs.pop(LAYER), unit, others=programs)

    return _templates.get(serving_key(model, plan, workload), compiled)
