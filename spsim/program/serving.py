"""Programs of inference: of each pass of a prefill or of a token of a decode, forward only."""

from __future__ import annotations

from collections.abc import Sequence, Set
from fractions import Fraction

from spsim.inputs.model import Model
from spsim.inputs.plan import Plan
from spsim.inputs.serving_rules import batch_unit
from spsim.inputs.workload import Passage, Workload
from spsim.program.assembly import EMBEDDING, HEAD
from spsim.program.attention import Attention
from spsim.program.blocks.embedding import TABLE, embedding_block, padded_vocab
from spsim.program.blocks.head import is_tied
from spsim.program.blocks.serving import cached_layer, next_token
from spsim.program.compiler import compile_region
from spsim.program.instructions import LAYER, Program
from spsim.program.lowerings.head_slices import lower_heads
from spsim.program.lowerings.partial import merge_partial_results
from spsim.program.lowerings.ring import lower_ring
from spsim.program.lowerings.ring_queries import lower_queries
from spsim.program.mesh import MODEL, mesh_of
from spsim.program.operators import Operator
from spsim.program.quantisation import quantised
from spsim.program.recipes import RECIPES
from spsim.program.region import Region
from spsim.program.routing import routed_by, routing_of
from spsim.program.strategies import named_serving_rules, serving_rules


def block_of(name: str, passage: int, kind: int = 0) -> str:
    """The name of a block of one of several passes, and of layers of one of several types."""
    return name + (f"/{kind}" if kind else "") + (f" {passage}" if passage else "")


def serving_programs(model: Model, plan: Plan, workload: Workload) -> dict[str, Program]:
    """The programs of a step: embedding and layer of each pass, and the head of the last."""
    vocab = padded_vocab(model.vocab, _table_ranks(plan, workload))
    made: dict[str, Program] = {}
    for place, passage in enumerate(workload.passages):
        for kind, own in enumerate(map(model.of_type, model.types)):
            made[block_of(LAYER, place, kind)] = _program(_layer(own, plan, workload, passage), own, plan, workload)
        passing = workload.model_copy(update={"seq_len": passage.tokens})
        table = embedding_block(model, passing, plan.dp, vocab=vocab)
        made[block_of(EMBEDDING, place)] = _program(table, model, plan, workload)
    if model.head_rows:
        rows = padded_vocab(model.head_rows, _table_ranks(plan, workload))
        head = next_token(model, workload, workload.passages[-1], plan.dp, vocab=rows)
        made[HEAD] = _program(head, model, plan, workload, {TABLE} if is_tied(model) else frozenset())
    return made


def last_layer(model: Model, plan: Plan, workload: Workload) -> tuple[tuple[Operator, ...], Program]:
    """The operators of a layer of the first type for the last tokens that pass, and their program."""
    model = model.of_type(next(iter(model.types)))
    operators = _layer(model, plan, workload, workload.passages[-1])
    return operators, _program(operators, model, plan, workload)


def _layer(model: Model, plan: Plan, workload: Workload, passage: Passage) -> tuple[Operator, ...]:
    """With the casts of the recipe of its precision, if that has one."""
    routing, tokens = routing_of(model, plan), _tokens(plan, workload)
    operators = cached_layer(model, workload, passage, plan.dp, plan.projections, routing, tokens)
    recipe = RECIPES.get(workload.precision)
    return operators if recipe is None else quantised(operators, recipe.forward_only)


def _tokens(plan: Plan, workload: Workload) -> Fraction:
    """That one copy of all experts is given at a time, of a decode: of ranks with tokens of their own `ep` share it."""
    ranks = plan.dp * batch_unit(plan, workload)
    return Fraction(workload.micro_batch * plan.dp * min(plan.ep, ranks), ranks)


def _table_ranks(plan: Plan, workload: Workload) -> int:
    """Ranks that a vocabulary is cut among."""
    return plan.tp * (plan.ring if workload.phase == "decode" else 1)


def _program(
    operators: Sequence[Operator], model: Model, plan: Plan, workload: Workload, elsewhere: Set[str] = frozenset()
) -> Program:
    rules, named = serving_rules(plan, workload.phase), named_serving_rules(plan, workload.phase)
    joined = MODEL if workload.phase == "decode" and plan.tp > 1 and plan.ring > 1 else ()
    region = Region(operators, rules, mesh_of(plan), named, elsewhere, routed_by(model, plan), joined)
    program = compile_region(region, plan, causal=model.causal, forward_only=True)
    for kernels in region.kernels.values():
        if isinstance(kernels, Attention) and plan.ring > 1:
            program = _lowered(program, region, plan, workload, kernels, causal=model.causal)
    return program


def _lowered(
    program: Program, region: Region, plan: Plan, workload: Workload, kernels: Attention, *, causal: bool
) -> Program:
    """The exchanges of a ring: messages of K and V, or of Q, behind attention; partial results merged."""
    if workload.phase == "prefill" and plan.ring_pass == "kv":
        if plan.ring_kind == "all_gather" and plan.heads_k_stride is None:
            return program
        lower = lower_heads if plan.ring_kind == "all_gather" else lower_ring
        return lower(program, plan, region.mesh, kernels, causal=causal)
    if workload.phase == "prefill":
        program = lower_queries(program, plan, region.mesh, kernels, causal=causal)
    return merge_partial_results(program)
