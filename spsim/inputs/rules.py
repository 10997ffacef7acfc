"""The rules between model, plan, workload and hardware; each error names the value, the rule and the fix."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from spsim.errors import InputError
from spsim.inputs.effects import deals_out_groups, own_kv_heads, reasons, setting
from spsim.inputs.expert_rules import check_experts, mlp_widths
from spsim.inputs.model import Model
from spsim.inputs.plan import Plan
from spsim.inputs.serving_rules import check_serving, served, served_unit
from spsim.inputs.step_rules import check_step, refused_count
from spsim.inputs.workload import ROW_UNITS, Workload, Workloads

if TYPE_CHECKING:
    from spsim.inputs.hardware import HardwareProfile

OF_REPLICAS = frozenset({
    "zero=2", "zero=3", "dp_library", "fsdp_ends", "shard_group", "bucket_elements", "dp_overlap", "grad_dtype",
})  # fmt: skip
"""Those of replicas: of no layers alone."""
MAX_MICRO_BATCHES = 100_000
"""Of one step; more take seconds and say nothing new."""
MAX_DIFFERING = 256
"""Ranks that are simulated one by one, since none does what another does; more take minutes and gigabytes."""


def check_shapes(model: Model, plan: Plan, workload: Workload) -> None:
    """The rules between model, plan and workload, whatever the hardware; `InputError` names the first broken."""
    plan = plan if workload.phase == "training" else served(plan)
    for check in _CHECKS:
        check(model, plan, workload)


def _check_heads(model: Model, plan: Plan, workload: Workload) -> None:
    if not deals_out_groups(model, plan):
        _check_even_heads(model, plan)
    if plan.ring > MAX_DIFFERING and plan.ring_cut == "contiguous" and model.causal and model.attention != "unfused":
        raise InputError(
            f"plan: ring = {plan.ring} with ring_cut 'contiguous': under a causal mask every rank does something else, "
            f"and at most {MAX_DIFFERING} are simulated; use ring_cut=zigzag or a smaller ring"
        )
    if model.attention == "unfused" and plan.ring > 1 and plan.ring_kind != "all_gather":
        raise InputError(
            f"plan: ring_kind = {plan.ring_kind!r} needs attention = 'flash', since an unfused softmax mixes all keys; "
            "use flash attention or ring_kind = 'all_gather'"
        )


def _check_head_slices(model: Model, plan: Plan, workload: Workload) -> None:
    stride, own = plan.heads_k_stride, own_kv_heads(model, plan)
    if stride is None or reasons(model, plan)["heads_k_stride"]:
        return
    if own % stride or deals_out_groups(model, plan):
        raise InputError(
            f"plan: heads_k_stride = {stride} does not divide the KV heads of each rank, {own}; use a divisor of them"
        )
    if model.attention == "unfused":
        raise InputError(
            f"plan: heads_k_stride = {stride} needs attention = 'flash'; use flash attention or leave it out"
        )


def _check_even_heads(model: Model, plan: Plan) -> None:
    degree = plan.tp * plan.ulysses
    if model.heads % degree:
        raise InputError(
            f"plan: tp x ulysses = {degree} does not divide heads = {model.heads}; "
            f"use a divisor of it, such as {math.gcd(model.heads, degree)}{_dealt(model, plan)}"
        )
    if model.kv_heads % degree and degree % model.kv_heads:
        raise InputError(
            f"plan: tp x ulysses = {degree} neither divides kv_heads = {model.kv_heads} nor is a multiple of it; "
            f"use {model.kv_heads} or a divisor of it{_dealt(model, plan)}"
        )
    if plan.ulysses_few_kv_heads == "refuse" and not reasons(model, plan)["ulysses_few_kv_heads"]:
        own = model.kv_heads // plan.tp
        raise InputError(
            f"plan: ulysses = {plan.ulysses} has more ranks than there are KV heads, {own}, and ulysses_few_kv_heads = "
            f"'refuse', as library = {plan.library!r} does; use ulysses_few_kv_heads=replicate, a head on each rank, "
            f"or ulysses={own}"
        )


def _dealt(model: Model, plan: Plan) -> str:
    by_group = plan.model_copy(update={"uneven_heads": "by_group"})
    return ", or uneven_heads=by_group, as DeepSpeed has it" if deals_out_groups(model, by_group) else ""


def _check_kv_heads(model: Model, plan: Plan, workload: Workload) -> None:
    """With fewer KV heads than ranks of tp, as the plan has it."""
    if plan.few_kv_heads == "refuse" and plan.tp > model.kv_heads:
        raise InputError(
            f"plan: tp = {plan.tp} with kv_heads = {model.kv_heads} and few_kv_heads = 'refuse', as library = "
            f"{plan.library!r} has it; use tp={model.kv_heads}, or few_kv_heads=replicate"
        )
    if not gathers_qkv(model, plan):
        return
    if plan.projections == "separate":
        raise InputError(
            f"plan: tp = {plan.tp} with kv_heads = {model.kv_heads} and projections = 'separate': few_kv_heads = "
            "'gather' moves Q, K and V as one; use few_kv_heads=replicate or projections=fused"
        )
    if qkv_width(model) % plan.tp:
        raise InputError(
            f"plan: tp = {plan.tp} does not divide the {qkv_width(model)} columns of Q, K and V, which few_kv_heads = "
            "'gather' cuts evenly; use few_kv_heads=replicate or a divisor"
        )


def gathers_qkv(model: Model, plan: Plan) -> bool:
    """Whether Q, K and V are cut as one width, whatever heads that separates, and gathered: Megatron-Core from 0.16 on,
    where tp has more ranks than there are KV heads.
    """
    return plan.few_kv_heads == "gather" and plan.tp > model.kv_heads


def qkv_width(model: Model) -> int:
    """Columns of Q, K and V."""
    return (model.heads + 2 * model.kv_heads) * model.head_dim


def _check_widths(model: Model, plan: Plan, workload: Workload) -> None:
    if model.ffn_hidden % plan.tp and (model.experts is None or any(own.dense for own in model.types)):
        raise InputError(
            f"plan: tp = {plan.tp} does not divide ffn_hidden = {model.ffn_hidden}; "
            f"use a divisor of it, such as {math.gcd(model.ffn_hidden, plan.tp)}"
        )


def _check_rows(model: Model, plan: Plan, workload: Workload) -> None:
    """What the products of a rank read is cast in whole blocks, along rows and columns."""
    unit = ROW_UNITS.get(workload.precision, 1)
    fused = {"(heads + 2 x kv_heads) x head_dim / tp": qkv_width(model) // plan.tp}
    own = {"kv_heads x head_dim / tp": max(1, model.kv_heads // plan.tp) * model.head_dim}
    widths = {
        "hidden": model.hidden,
        **(_latent_widths(model, plan) if model.kv_lora_rank else fused if gathers_qkv(model, plan) else own),
        "heads x head_dim / tp": model.heads * model.head_dim // plan.tp,
        **mlp_widths(model, plan),
    }
    if workload.phase != "decode":  # engines pad the few tokens of a decode
        tokens = workload.micro_batch * workload.seq_len
        widths["micro_batch x seq_len / sequence shards"] = tokens // _sequence_shards(plan)
    for name, width in widths.items():
        if width % unit:
            raise InputError(
                f"workload: precision = {workload.precision!r} casts blocks of {unit}, which do not divide "
                f"{name} = {width}; use bf16 or sizes that are multiples of {unit}"
            )


def _latent_widths(model: Model, plan: Plan) -> dict[str, int]:
    """Of the products of latent attention on a rank, but those of q."""
    kv, rope = model.kv_lora_rank or 0, model.qk_rope_head_dim or 0
    up = {"qk_nope_head_dim": model.qk_nope_head_dim or 0, "v_head_dim": model.v_head_dim}
    return {
        **({"q_lora_rank": model.q_lora_rank} if model.q_lora_rank else {}),
        "kv_lora_rank": kv,
        "kv_lora_rank + qk_rope_head_dim": kv + rope,
        **{f"heads x {name} / tp": model.heads * width // plan.tp for name, width in up.items()},
    }


def _sequence_shards(plan: Plan) -> int:
    return plan.ulysses * plan.ring * (plan.tp if plan.sequence_parallel else 1)


def sequence_unit(model: Model, plan: Plan) -> int:
    """What must divide the sequence length: the product of the sequence shards, twice for a zigzag ring, and four times
    where products run in pieces (`tp_overlap`), of which there are four before a reduce-scatter.
    """
    zigzag = 2 if plan.ring > 1 and plan.ring_cut == "zigzag" and model.causal else 1
    pieces = 4 if plan.tp_overlap and plan.tp > 1 else 1
    return _sequence_shards(plan) * zigzag * pieces


def is_single(plan: Plan, micro_batch: Any) -> Any:
    """Whether a program is that of a single sequence where that of several is another: gathered parts of several
    sequences [b s h] are put together, those of one follow each other.
    """
    return (plan.batch_first and plan.tp > 1 and plan.sequence_parallel) & (micro_batch == 1)


def keeps_sizes(model: Model, plan: Plan, workloads: Workloads, global_batch: Any) -> Any:
    """Which of many workloads keep the rules for their sizes, where others of their kind keep all others."""
    unit = workloads.micro_batch * plan.dp
    whole = (workloads.seq_len % sequence_unit(model, plan) == 0) & (global_batch % unit == 0)
    tokens = workloads.micro_batch * workloads.seq_len // _sequence_shards(plan)
    whole &= tokens % ROW_UNITS.get(workloads.precision, 1) == 0
    if model.sliding_window is not None and _sends_blocks(plan):
        whole &= workloads.seq_len <= model.sliding_window
    if model.attention_chunk_size is not None:
        whole &= workloads.seq_len <= model.attention_chunk_size
    if model.documents is not None:
        whole &= workloads.seq_len == sum(model.documents)
    count = global_batch // unit
    if plan.pp > 1:
        whole &= [refused_count(plan, number) is None for number in count.tolist()]
    return whole & (count <= MAX_MICRO_BATCHES)


def _sends_blocks(plan: Plan) -> bool:
    """Whether attention of a ring runs block by block, which no library does with a window."""
    return plan.ring > 1 and (plan.ring_kind != "all_gather" or plan.heads_k_stride is not None)


def _check_window(model: Model, plan: Plan, workload: Workload) -> None:
    window, chunk = model.sliding_window, model.attention_chunk_size
    if chunk is not None and workload.seq_len > chunk:
        raise InputError(
            f"workload: seq_len = {workload.seq_len} is above attention_chunk_size = {chunk} of the model: chunks are "
            f"not simulated; use at most {chunk}"
        )
    if window is not None and workload.seq_len > window and _sends_blocks(plan):
        raise InputError(
            f"plan: ring = {plan.ring} with sliding_window = {window} of the model and seq_len = {workload.seq_len}: "
            "Transformer Engine sends no blocks of keys round under a window; use ring_kind=all_gather or ulysses"
        )


def _check_documents(model: Model, plan: Plan, workload: Workload) -> None:
    if workload.documents is None:
        return
    if not model.causal:
        raise InputError(f"workload: documents with {model.name}, which is not causal: not simulated; leave them out")
    if plan.ring > MAX_DIFFERING:
        raise InputError(
            f"plan: ring = {plan.ring} with documents: every rank sees something else, and at most {MAX_DIFFERING} are "
            "simulated; use a smaller ring"
        )


def _check_sequence(model: Model, plan: Plan, workload: Workload) -> None:
    seq_len = workload.seq_len
    training = workload.phase == "training"
    unit = sequence_unit(model, plan) if training else served_unit(plan, workload)
    if seq_len % unit:
        below, above = seq_len // unit * unit, -(-seq_len // unit) * unit
        near = f"{below} or {above}" if below else f"{above}"
        raise InputError(
            f"workload: seq_len = {seq_len} is not divisible by {unit}, the product of the sequence shards "
            f"(x 2 for a zigzag ring, x 4 for tp_overlap); use {near}"
        )


def _check_batch(model: Model, plan: Plan, workload: Workload) -> None:
    unit = workload.micro_batch * plan.dp
    if workload.global_batch is not None and workload.global_batch // unit > MAX_MICRO_BATCHES:
        raise InputError(
            f"workload: global_batch = {workload.global_batch} makes over {MAX_MICRO_BATCHES} micro-batches of "
            f"micro_batch x dp = {unit}; they are alike, so use a smaller global_batch"
        )
    if workload.global_batch is not None and workload.global_batch % unit:
        raise InputError(
            f"workload: global_batch = {workload.global_batch} is not divisible by micro_batch x dp = {unit}; "
            f"use a multiple of {unit}"
        )


def check_scope(model: Model, plan: Plan, scope: str) -> None:
    """The rules of what is simulated; `InputError` names the broken one. Layers alone leave the replicas of a library,
    other than those that are asked for, out.
    """
    for name, value in plan.differing.items() if scope == "layers" else ():
        named = not OF_REPLICAS.isdisjoint((name, f"{name}={value}"))
        if named and not reasons(model, plan).get(name):
            raise InputError(
                f"{setting(name, value)} with scope = 'layers', whose gradients are summed when all layers have run; "
                "use scope = 'step' or leave it at its default"
            )


_CHECKS = (
    check_serving, check_experts, _check_heads, _check_head_slices, _check_kv_heads, _check_widths, _check_rows,
    _check_window, _check_documents,
    _check_sequence, _check_batch, check_step,
)  # fmt: skip


def gpus_per_node(hardware: HardwareProfile, plan: Plan, nodes: int | None = None) -> int:
    """GPUs of each node that a plan uses: spread evenly over `nodes`, or over the fewest that hold them."""
    gpus = plan.gpus
    if nodes is not None:
        return gpus // nodes
    return next(n for n in range(min(gpus, hardware.gpus_per_node), 0, -1) if gpus % n == 0)


def check_nodes(hardware: HardwareProfile, plan: Plan, nodes: int | None = None) -> None:
    """The rules between a plan, the nodes it is spread over and their hardware; `InputError` names the broken one."""
    gpus, per_node = plan.gpus, hardware.gpus_per_node
    needed = -(-gpus // per_node)
    if nodes is not None and nodes < needed:
        raise InputError(
            f"nodes = {nodes}: the plan needs {gpus} GPUs, {needed} nodes of {per_node}; "
            f"use at least {needed} or smaller degrees"
        )
    if nodes is not None and gpus % nodes:
        raise InputError(
            f"nodes = {nodes} does not divide the {gpus} GPUs of the plan evenly; "
            f"use {gpus // gpus_per_node(hardware, plan)} or another divisor"
        )
    used = gpus_per_node(hardware, plan, nodes)
    if used < gpus:
        _check_levels(hardware, plan)
        _check_groups(plan, used)


def _check_levels(hardware: HardwareProfile, plan: Plan) -> None:
    """Plans over several nodes need curves of a level between nodes."""
    measured = [level.name for level in hardware.datasheet.topology[1:2]]
    if not any(hardware.coefficients.collectives.get(name) for name in measured):
        raise InputError(
            f"plan: {plan.gpus} GPUs span several nodes, but {hardware.name} has no collective curves between "
            f"nodes; use at most {hardware.gpus_per_node} GPUs of one node, or a profile with such a level"
        )


def _check_groups(plan: Plan, per_node: int) -> None:
    """Every group has as many ranks on each of its nodes as on the others."""
    degree = 1
    for name in plan.mesh_order.split("-"):
        degree *= getattr(plan, name)
        if degree % per_node and per_node % degree:
            raise InputError(
                f"plan: {name} = {getattr(plan, name)} makes blocks of {degree} ranks, which nodes of {per_node} GPUs "
                f"cut unevenly; use degrees whose product divides {per_node} or is a multiple of it, or set nodes"
            )
