"""From a model, a plan and a workload to the program of one layer."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from spsim.inputs.model import Model
from spsim.inputs.plan import Plan
from spsim.inputs.workload import Workload
from spsim.program.blocks.transformer import transformer_layer
from spsim.program.compiler import compile_program
from spsim.program.instructions import Program
from spsim.program.kernels import Kernels
from spsim.program.lowerings.ring import lower_ring
from spsim.program.mesh import mesh_of
from spsim.program.operators import Operator, operator_splits
from spsim.program.strategies import split_rules


@lru_cache(maxsize=256)
def layer_program(model: Model, plan: Plan, workload: Workload) -> Program:
    """The program of one layer of a model."""
    return program_of(transformer_layer(model, workload), plan, causal=model.causal)


def program_of(operators: Sequence[Operator], plan: Plan, *, causal: bool) -> Program:
    """The program of some operators, ring attention lowered to its exchange where the plan says p2p."""
    mesh = mesh_of(plan)
    program = compile_program(operators, plan, mesh, causal=causal)
    if plan.ring == 1 or plan.ring_kind != "p2p":
        return program
    for attention in (op for op in operators if op.kind == "attention"):
        kernels = Kernels(attention, operator_splits(attention, split_rules(plan), mesh), mesh)
        program = lower_ring(program, plan, mesh, kernels, causal=causal)
    return program
