"""The program of a layer for every workload, made once for all plans that share it."""

from __future__ import annotations

from spsim.inputs.model import Model
from spsim.inputs.plan import Plan
from spsim.inputs.rules import sequence_unit
from spsim.inputs.workload import Precision
from spsim.lazy import Cache
from spsim.program.assembly import compile_layer, compiled_by
from spsim.program.blocks.transformer import layer_traits
from spsim.program.sizes import Template, every_workload
from spsim.units import MIB

_templates: Cache[Template] = Cache(64 * MIB, lambda template: template.nbytes)


def layer_template(model: Model, plan: Plan, precision: Precision = "bf16") -> Template:
    """The program of one layer for every workload of a precision."""
    unit = sequence_unit(model, plan)
    key = (layer_traits(model), compiled_by(plan), precision)
    return _templates.get(key, lambda: Template(compile_layer(model, plan, every_workload(unit, precision)), unit))
