"""From a model, a plan and a workload to the program of a layer. What plans have in common is made once."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence, Set
from functools import lru_cache

from spsim.inputs.model import LayerType, Model
from spsim.inputs.plan import Plan
from spsim.inputs.rules import gathers_qkv
from spsim.inputs.stages import all_chunks
from spsim.inputs.workload import Precision, Workload
from spsim.lazy import Cache
from spsim.program.attention import Attention
from spsim.program.blocks.embedding import TABLE, embedding_block, embedding_traits, padded_vocab
from spsim.program.blocks.experts import fused_experts
from spsim.program.blocks.head import head_block, head_traits, is_tied
from spsim.program.blocks.prediction import prediction_block
from spsim.program.blocks.transformer import Projections, layer_traits, transformer_layer
from spsim.program.compiler import compile_region
from spsim.program.instructions import LAYER, Program, next_ids
from spsim.program.lowerings.chunks import lower_chunks
from spsim.program.lowerings.head_slices import lower_heads
from spsim.program.lowerings.offload import offload
from spsim.program.lowerings.position_ids import gather_position_ids
from spsim.program.lowerings.ring import lower_ring
from spsim.program.lowerings.units import unit_of
from spsim.program.mesh import mesh_of
from spsim.program.operators import Operator
from spsim.program.quantisation import quantised, with_cast_attention
from spsim.program.recipes import RECIPES, in_precision
from spsim.program.recompute import LayerKind, layer_kinds, usual_kind
from spsim.program.region import Region
from spsim.program.routing import USUAL, Routed, Routing, routed_by, routing_of
from spsim.program.strategies import named_rules, split_rules
from spsim.units import KIB, MIB

EMBEDDING, MTP, HEAD = "embedding", "mtp", "head"
"""What stands around the layers of a step."""
ProgramsAt = Callable[[Workload], Mapping[str, Program]]
"""From a workload to the programs of its blocks."""

_layers: Cache[tuple[Operator, ...]] = Cache(4 * MIB, lambda operators: 3 * KIB * len(operators))
_regions: Cache[Region] = Cache(16 * MIB, lambda region: 5 * KIB * len(region.operators))
_programs: Cache[Program] = Cache(16 * MIB, lambda program: KIB * next_ids(program)[0])


def placed_by(plan: Plan) -> tuple[int | tuple[str, ...], ...]:
    """What of a plan says where tensors lie."""
    replicas = plan.dp, plan.shard_group or plan.dp
    experts = (plan.ep, plan.expert_axes)
    return *replicas, *experts, plan.ring, plan.ulysses, plan.tp, plan.sequence_parallel and plan.tp > 1


def one_replica(plan: Plan) -> Plan:
    """As the programs of a step see a plan whose replicas are synchronised apart: a micro-batch of one replica is
    passed alike however many there are.
    """
    return plan.model_copy(update={"dp": plan.expert_replicas, "shard_group": None}) if plan.dp > 1 else plan


def compiled_by(plan: Plan, kind: LayerKind | None = None) -> tuple[Hashable, ...]:
    """What of a plan the program of layers of a kind depends on: plans that differ in nothing else have the same."""
    messages = plan.ring_gradients, plan.ring_messages, plan.heads_k_stride
    ring = (plan.ring_kind, plan.ring_cut, *messages) if plan.ring > 1 else ()
    chunks = (plan.tp_scatter,) if plan.tp_overlap and plan.tp > 1 else ()
    again = (plan.recompute_early_stop, plan.recompute_reentrant) if plan.recompute != "none" else ()
    moved = again, plan.keep_gathered, chunks, plan.input_gradients, plan.batch_first, plan.fp8_dot_product_attention
    exchanged = (plan.gathers_position_ids, plan.ulysses_gradients) if plan.ulysses > 1 else ()
    return *placed_by(plan), kind or usual_kind(plan), *moved, *exchanged, *ring


def projections(model: Model, plan: Plan) -> Projections:
    """How the products of a layer are joined."""
    return "gathered" if gathers_qkv(model, plan) else plan.projections


@lru_cache(maxsize=256)
def layer_key(model: Model, plan: Plan, kind: LayerKind | None = None) -> tuple[Hashable, ...]:
    """What of model and plan the program of layers of a kind depends on."""
    return layer_traits(model), projections(model, plan), routing_of(model, plan), compiled_by(plan, kind)


def layer_program(model: Model, plan: Plan, workload: Workload, kind: LayerKind | None = None) -> Program:
    """The program of one layer of a model, or of a unit of layers, of a kind; else as the plan recomputes layers."""
    kind = kind or usual_kind(plan)
    key = (layer_key(model, plan, kind), workload.seq_len, workload.micro_batch, workload.precision)
    return _programs.get(key, lambda: compile_layer(model, plan, workload, kind))


def compile_layer(model: Model, plan: Plan, workload: Workload, kind: LayerKind | None = None) -> Program:
    """The program of one layer or unit, compiled; `layer_program` keeps it."""
    kind = kind or usual_kind(plan)
    model = model.of_type(kind.type)
    joined, routing, low = projections(model, plan), routing_of(model, plan), plan.fp8_dot_product_attention
    traits = layer_traits(model), joined, routing, low
    key = (*traits, workload.seq_len, workload.micro_batch * plan.dp, workload.precision)
    operators = _layers.get(key, lambda: layer_operators(model, workload, plan.dp, joined, routing, cast_attention=low))
    routed = routed_by(model, plan)
    region = _regions.get((key, placed_by(plan)), lambda: _region(operators, plan, routed=routed))
    program = program_in(region, plan, causal=model.causal, kind=kind)
    if kind.leaves or kind.fetches:
        return offload(program, leaves=kind.leaves, fetches=kind.fetches)
    if kind.layers == 1:
        return program
    return unit_of(program_in(region, plan, causal=model.causal, kind=LayerKind()), program, kind.layers)


def _region(
    operators: Sequence[Operator], plan: Plan, elsewhere: Set[str] = frozenset(), routed: Routed | None = None
) -> Region:
    return Region(operators, split_rules(plan), mesh_of(plan), named_rules(plan), elsewhere, routed)


def layer_operators(
    model: Model,
    workload: Workload,
    replicas: int = 1,
    joined: Projections = "fused",
    routing: Routing = USUAL,
    *,
    cast_attention: bool = False,
) -> tuple[Operator, ...]:
    """The operators of a layer, with the casts of the recipe of its precision, if that has one; of core attention only
    where asked for.
    """
    operators = transformer_layer(model, workload, replicas, joined, routing)
    recipe = RECIPES.get(workload.precision)
    if recipe is None:
        return operators
    operators = quantised(operators, recipe)
    operators = with_cast_attention(operators, recipe) if cast_attention else operators
    return fused_experts(operators) if routing.fused else operators


@lru_cache(maxsize=256)
def kinds_of_layers(model: Model, plan: Plan) -> Mapping[LayerKind, str]:
    """The kinds of layers in a step, and names of their blocks: `LAYER` is the first, of experts if there are any."""
    if plan.recompute_layers is None and not plan.cpu_offload_layers and len(model.types) == 1:
        return {usual_kind(plan): LAYER}
    chunks = dict.fromkeys([model.each_type[own.layers.start : own.layers.stop] for own in all_chunks(model, plan)])
    kinds = dict.fromkeys([kind for types in chunks for kind, _ in layer_kinds(plan, types)])
    kinds = dict.fromkeys(sorted(kinds, key=lambda kind: kind.type))
    return {kind: f"{LAYER} {place}" if place else LAYER for place, kind in enumerate(kinds)}


@lru_cache(maxsize=256)
def layers_of_blocks(model: Model, plan: Plan) -> Mapping[str, int]:
    """Block -> how many layers of the model are of its type; those that recomputation tells apart once."""
    names: dict[LayerType, str] = {}
    for kind, name in kinds_of_layers(model, plan).items():
        names.setdefault(kind.type, name)
    return {name: model.types.get(own, model.layers) for own, name in names.items()}


def layer_programs(model: Model, plan: Plan, workload: Workload) -> dict[str, Program]:
    """The programs of the layers of a step, of each kind."""
    kinds = kinds_of_layers(model, plan)
    return {name: layer_program(model, plan, workload, kind) for kind, name in kinds.items()}


@lru_cache(maxsize=256)
def step_key(model: Model, plan: Plan) -> tuple[Hashable, ...]:
    """What of model and plan the programs of a step depend on."""
    head = head_key(model, plan, **_head_options(plan)) if model.head_rows else ()
    head += (_last_layer(model), beside_table(model, plan)) if model.mtp_layers else ()
    layers = (*layers_of_blocks(model, plan).items(),) if len(model.types) > 1 else ()
    return layer_key(model, plan), *kinds_of_layers(model, plan), *layers, embedding_key(model, plan), head


def step_programs(model: Model, plan: Plan, workload: Workload) -> dict[str, Program]:
    """The programs of a layer, of the embedding, and of the head if the model has one."""
    found = {**layer_programs(model, plan, workload), EMBEDDING: embedding_program(model, plan, workload)}
    if model.mtp_layers:
        found[MTP] = compile_prediction(model, plan, workload)
    if model.head_rows:
        found[HEAD] = head_program(model, plan, workload, **_head_options(plan))
    return found


def programs_at(model: Model, plan: Plan, precision: Precision) -> ProgramsAt:
    """The same for any workload, in a precision whatever it says."""
    return lambda workload: step_programs(model, plan, in_precision(workload, precision))


def compile_step(model: Model, plan: Plan, workload: Workload) -> dict[str, Program]:
    """The same, the layers compiled; what stands around them is kept, for plans differ more often in their layers."""
    kinds = kinds_of_layers(model, plan)
    found = {name: compile_layer(model, plan, workload, kind) for kind, name in kinds.items()}
    found[EMBEDDING] = embedding_program(model, plan, workload)
    if model.mtp_layers:
        found[MTP] = compile_prediction(model, plan, workload)
    if model.head_rows:
        found[HEAD] = head_program(model, plan, workload, **_head_options(plan))
    return found


def _last_layer(model: Model) -> LayerType:
    return model.type_of(model.layers - 1)


def beside_table(model: Model, plan: Plan) -> bool:
    """Whether the rank of multi-token prediction has the table of the embedding in another block, that of the embedding
    or the head; else it has a copy.
    """
    return plan.pp == 1 or is_tied(model)


def compile_prediction(model: Model, plan: Plan, workload: Workload) -> Program:
    """The program of multi-token prediction, whose layer is as the last one and recomputed as layers are."""
    own, low = model.of_type(_last_layer(model)), plan.fp8_dot_product_attention
    joined, routing = projections(own, plan), routing_of(own, plan)
    layer = layer_operators(own, workload, plan.dp, joined, routing, cast_attention=low)
    operators = prediction_block(own, workload, plan.dp, layer, vocab=padded_vocab(model.vocab, plan.tp))
    recipe = RECIPES.get(workload.precision)
    operators = operators if recipe is None else quantised(operators, recipe.of_prediction)
    elsewhere = {TABLE} if beside_table(model, plan) else frozenset()
    region = _region(operators, plan, elsewhere, routed_by(own, plan))
    return program_in(region, plan, causal=model.causal, kind=usual_kind(plan))


def _head_options(plan: Plan) -> dict[str, bool]:
    return {"loss_fusion": plan.loss_fusion, "beside_embedding": plan.pp == 1}


def embedding_key(model: Model, plan: Plan) -> tuple[Hashable, ...]:
    """What of model and plan the program of the embedding depends on."""
    return "embedding", embedding_traits(model), padded_vocab(model.vocab, plan.tp), _around_by(plan)


def embedding_program(model: Model, plan: Plan, workload: Workload) -> Program:
    """The program of the embedding of a model, its vocabulary padded."""
    key = (*embedding_key(model, plan), workload.seq_len, workload.micro_batch, workload.precision)
    return _programs.get(key, lambda: compile_embedding(model, plan, workload))


def compile_embedding(model: Model, plan: Plan, workload: Workload) -> Program:
    """The same, compiled; `embedding_program` keeps it."""
    vocab = padded_vocab(model.vocab, plan.tp)
    return _program_around(embedding_block(model, workload, plan.dp, vocab=vocab), plan, causal=model.causal)


def head_key(model: Model, plan: Plan, *, loss_fusion: bool, beside_embedding: bool) -> tuple[Hashable, ...]:
    """What of model and plan the program of the head depends on."""
    rows, shared = padded_vocab(model.head_rows, plan.tp), is_tied(model) and beside_embedding
    by_model = (head_traits(model), rows, is_tied(model))
    loss = loss_fusion, plan.loss_parallel or plan.tp == 1
    return "head", by_model, loss, plan.fp8_output_proj, shared, _around_by(plan)


def head_program(
    model: Model, plan: Plan, workload: Workload, *, loss_fusion: bool = False, beside_embedding: bool = False
) -> Program:
    """The program of final norm, output layer and loss.

    `beside_embedding` where the rank has the embedding too, of one pipeline stage: then tied weights are the
    embedding's, counted and synchronised there. On the last of several stages they are a copy.
    """
    options = {"loss_fusion": loss_fusion, "beside_embedding": beside_embedding}
    key = (*head_key(model, plan, **options), workload.seq_len, workload.micro_batch, workload.precision)
    return _programs.get(key, lambda: compile_head(model, plan, workload, **options))


def compile_head(
    model: Model, plan: Plan, workload: Workload, *, loss_fusion: bool = False, beside_embedding: bool = False
) -> Program:
    """The same, compiled; `head_program` keeps it."""
    vocab = padded_vocab(model.head_rows, plan.tp)
    options = {"loss_fusion": loss_fusion, "loss_parallel": plan.loss_parallel}
    operators = head_block(model, workload, plan.dp, vocab=vocab, **options)
    if plan.fp8_output_proj and (recipe := RECIPES.get(workload.precision)):
        operators = quantised(operators, recipe.of_output_layer)
    elsewhere = {TABLE} if beside_embedding else frozenset()
    return _program_around(operators, plan, causal=model.causal, elsewhere=elsewhere)


def _around_by(plan: Plan) -> tuple[int | tuple[str, ...], ...]:
    """What of a plan the programs around the layers depend on: neither rings nor recomputation, which are of layers."""
    return *placed_by(plan), plan.keep_gathered, plan.batch_first


def around_layers(plan: Plan) -> Plan:
    """As what stands around the layers sees a plan: recomputation and chunks of tp are of layers."""
    usual = {"recompute": "none", "recompute_layers": None, "recompute_modules": None, "tp_overlap": False}
    return plan.model_copy(update=usual)


def _program_around(
    operators: Sequence[Operator], plan: Plan, *, causal: bool, elsewhere: Set[str] = frozenset()
) -> Program:
    return program_in(_region(operators, plan, elsewhere), around_layers(plan), causal=causal)


def program_in(
    region: Region, plan: Plan, *, causal: bool, kind: LayerKind | None = None, forward_only: bool = False
) -> Program:
    """The program of a region, messages of tp lowered to chunks where the plan overlaps them, and ring attention to its
    steps unless it gathers before attention; `kind` says what of the region is recomputed, else the plan does.
    """
    program = compile_region(region, plan, causal=causal, kind=kind, forward_only=forward_only)
    if plan.gathers_position_ids and plan.ulysses > 1:
        program = gather_position_ids(program, region)
    if plan.tp_overlap and plan.tp > 1:
        program = lower_chunks(program, region, plan.tp_scatter)
    if plan.ring == 1 or (plan.ring_kind == "all_gather" and plan.heads_k_stride is None):
        return program
    lower = lower_heads if plan.ring_kind == "all_gather" else lower_ring
    for kernels in region.kernels.values():
        if isinstance(kernels, Attention):
            program = lower(program, plan, region.mesh, kernels, causal=causal)
    return program
