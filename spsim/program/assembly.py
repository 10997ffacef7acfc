"""From a model, a plan and a workload to the program of a layer. What plans have in common is made once."""

from __future__ import annotations

from spsim.inputs.model import Model
from spsim.inputs.plan import Plan
from spsim.inputs.workload import Workload
from spsim.lazy import Cache
from spsim.program.blocks.transformer import layer_traits, transformer_layer
from spsim.program.compiler import compile_region
from spsim.program.instructions import Program, next_ids
from spsim.program.kernels import Attention
from spsim.program.lowerings.ring import lower_ring
from spsim.program.mesh import mesh_of
from spsim.program.operators import Operator
from spsim.program.region import Region
from spsim.program.strategies import split_rules
from spsim.units import KIB, MIB

_layers: Cache[tuple[Operator, ...]] = Cache(4 * MIB, lambda operators: 3 * KIB * len(operators))
_regions: Cache[Region] = Cache(16 * MIB, lambda region: 5 * KIB * len(region.operators))
_programs: Cache[Program] = Cache(16 * MIB, lambda program: KIB * next_ids(program)[0])


def placed_by(plan: Plan) -> tuple[int, ...]:
    """What of a plan says where tensors lie."""
    return plan.dp, plan.ring, plan.ulysses, plan.tp, plan.sequence_parallel and plan.tp > 1


def compiled_by(plan: Plan) -> tuple[int | str, ...]:
    """What of a plan its program depends on: plans that differ in nothing else have the same."""
    ring = (plan.ring_kind, plan.ring_cut) if plan.ring > 1 else ()
    return *placed_by(plan), plan.recompute, plan.keep_gathered, *ring


def layer_program(model: Model, plan: Plan, workload: Workload) -> Program:
    """The program of one layer of a model."""
    key = (layer_traits(model), compiled_by(plan), workload.seq_len, workload.micro_batch, workload.precision)
    return _programs.get(key, lambda: compile_layer(model, plan, workload))


def compile_layer(model: Model, plan: Plan, workload: Workload) -> Program:
    """The program of one layer, compiled; `layer_program` keeps it."""
    key = (layer_traits(model), workload.seq_len, workload.micro_batch * plan.dp, workload.precision)
    operators = _layers.get(key, lambda: transformer_layer(model, workload, plan.dp))
    region = _regions.get((key, placed_by(plan)), lambda: Region(operators, split_rules(plan), mesh_of(plan)))
    return program_in(region, plan, causal=model.causal)


def program_in(region: Region, plan: Plan, *, causal: bool) -> Program:
    """The program of a region, ring attention lowered to its exchange where the plan says p2p."""
    program = compile_region(region, plan, causal=causal)
    if plan.ring == 1 or plan.ring_kind != "p2p":
        return program
    for kernels in region.kernels.values():
        if isinstance(kernels, Attention):
            program = lower_ring(program, plan, region.mesh, kernels, causal=causal)
    return program
