"""Options of a plan that change nothing under it, and why."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from spsim.inputs.expert_rules import expert_notes, expert_reasons
from spsim.inputs.libraries import CHOICES, LIBRARIES, library_defaults, some_library_has
from spsim.inputs.model import Model
from spsim.inputs.plan import MESH_ORDER, Plan
from spsim.inputs.step_rules import grouped, overlaps_messages, sends
from spsim.inputs.workload import Workload

OF_THE_STEP = ("loss_fusion", "loss_parallel", "fp8_output_proj")
"""Options that layers alone have nothing of."""


def notes_of(model: Model, plan: Plan, scope: Literal["step", "layers"] = "step") -> tuple[str, ...]:
    """What a reader of a result should know of its model and plan, said once."""
    of_plan = (*of_library(model, plan, scope), *of_no_library(model, plan), *of_ring(plan), *of_heads(model, plan))
    return (*model.notes, *expert_notes(model, plan), *of_plan, *of_modules(model), *without_effect(model, plan, scope))


def without_effect(model: Model, plan: Plan, scope: Literal["step", "layers"] = "step") -> Iterator[str]:
    """Options of a plan that differ from those of its library and change nothing under it, each with the reason."""
    differing = plan.differing
    of_step = dict.fromkeys(OF_THE_STEP if scope == "layers" else (), "with scope = 'layers'")
    for name, reason in {**reasons(model, plan), **of_step}.items():
        if reason and name in differing:
            yield f"{setting(name, differing[name])} has no effect {reason}"


def on_nodes(plan: Plan, nodes: int) -> Iterator[str]:
    """An order of axes whose links are all alike."""
    if nodes == 1 and plan.mesh_order != MESH_ORDER and not _numbered_alike(plan):
        yield f"within one node {setting('mesh_order', plan.mesh_order)} changes nothing but the numbers of ranks"


def of_library(model: Model, plan: Plan, scope: Literal["step", "layers"] = "step") -> Iterator[str]:
    """What a plan does because its library does, not Megatron-Core: options that nobody gave."""
    if not (usual := library_defaults(plan.library, plan.pp)):
        return
    left_out = {*plan.differing, *(("zero", "dp_library", "fsdp_ends") if scope == "layers" else ())}
    idle = reasons(model, plan)
    chosen = [setting(name, value) for name, value in usual.items() if name not in left_out and not idle.get(name)]
    yield f"as {plan.library} {LIBRARIES[plan.library].version} does it: {', '.join(chosen) or 'as Megatron-Core does'}"


def of_no_library(model: Model, plan: Plan) -> Iterator[str]:
    """Choices that no library makes together, as far as they have an effect."""
    fields, idle, given = type(plan).model_fields, reasons(model, plan), plan.differing
    made = {name: getattr(plan, name) for name in CHOICES if not idle.get(name)}
    if not some_library_has(made, {name: fields[name].default for name in made}):
        told = [setting(name, value) for name, value in made.items() if name in given]
        yield f"no library that is known here does {' and '.join(told)} with all else as in {plan.library}"


def of_ring(plan: Plan) -> Iterator[str]:
    """Where K and V that are sent apart are gathered, as after Llama 3 in ring-flash-attn."""
    gathered = plan.ring > 1 and plan.ring_kind == "all_gather" and plan.ring_messages == "separate"
    if gathered and plan.heads_k_stride is None:
        yield (
            "K and V of all heads are gathered before attention: ring-flash-attn's llama3_flash_attn_varlen_func with "
            "heads_k_stride = KV heads; a smaller stride sends the same bytes in more messages, behind attention"
        )


def of_heads(model: Model, plan: Plan) -> Iterator[str]:
    """Where ranks of `ulysses` do not have equally many, or K and V more than once."""
    groups, size = model.kv_heads // plan.tp, model.heads // model.kv_heads
    if deals_out_groups(model, plan):
        most, rest = -(-groups // plan.ulysses), groups % plan.ulysses
        yield (
            f"uneven_heads = 'by_group': {rest} of {plan.ulysses} ranks have {most * size} heads, the others "
            f"{(most - 1) * size}; times, memory and messages are of a rank with the most"
        )
    elif 0 < groups < plan.ulysses:
        degree = plan.tp * plan.ulysses
        yield f"tp x ulysses = {degree} with kv_heads = {model.kv_heads}: K and V are replicated, a head on each rank"


def of_modules(model: Model) -> Iterator[str]:
    """How modules run, where that is not as one kernel each."""
    if model.attention == "unfused" and model.kv_heads < model.heads and not model.repeats_kv:
        yield (
            "unfused attention reads K and V as they are; Megatron-Core and transformers write them out for the heads "
            "of Q that share them, and keep them so: repeat_kv = true"
        )
    if model.kernels == "compiled":
        yield "kernels = 'compiled': what stands between products is one kernel, as torch.compile joins it"
    elif model.kernels == "eager":
        composite = "RMSNorm among them" if model.composite_norm else "norms as kernels of torch"
        yield f"kernels = 'eager': activations, rotations and residuals are single operations, {composite}"


MEGATRON_SOFTMAX = range(17, 4097)
"""Keys of a row that Megatron-Core's kernel for scale, mask and softmax takes."""


def unfused_softmax(model: Model, plan: Plan, workload: Workload) -> Iterator[str]:
    """Where Megatron-Core's fused softmax does not run, though kernels are fused (`fused_softmax.py`)."""
    if model.attention != "unfused" or model.kernels not in (None, "fused"):
        return
    rows = workload.micro_batch * model.heads // (plan.tp * plan.ulysses)
    if workload.seq_len not in MEGATRON_SOFTMAX or rows % 4 or workload.precision == "fp32":
        yield (
            f"fused softmax of {workload.seq_len:,} keys, {rows} heads x sequences: Megatron-Core's kernel takes 17 to "
            "4096, a multiple of 4 and 16 bits; else it keeps probabilities in fp32, as with kernels = 'eager'"
        )


def setting(name: str, value: Any) -> str:
    """An option as messages write it."""
    return name if value is True else f"{name} = {value!r}"


def reasons(model: Model, plan: Plan) -> dict[str, str]:
    """Why an option would change nothing under a plan; empty where it does."""
    own = {"mesh_order": _numbered_alike(plan), **expert_reasons(model, plan)}
    of_step = {**_of_pipeline(plan), **_of_replicas(model, plan), **_of_memory(model, plan)}
    return {**own, **_of_layers(model, plan), **of_step}


def _numbered_alike(plan: Plan) -> str:
    own, usual = ([w for w in order.split("-") if getattr(plan, w) > 1] for order in (plan.mesh_order, MESH_ORDER))
    return "as ranks are numbered alike" if own == usual else ""


def _of_layers(model: Model, plan: Plan) -> dict[str, str]:
    ring_cut = "without ring" if plan.ring == 1 else "without a causal mask" if not model.causal else ""
    if not ring_cut and model.attention == "unfused":
        ring_cut = "with unfused attention, which computes what it masks"
    one_rank = "with tp = 1" if plan.tp == 1 else ""
    whole_sequence = "" if plan.tp > 1 and plan.sequence_parallel else "without sequence_parallel over tp"
    return {
        "sequence_parallel": one_rank,
        **dict.fromkeys(("ring_kind", "ring_pass"), "without ring" if plan.ring == 1 else ""),
        **_of_ring_messages(plan),
        "heads_k_stride": _of_head_slices(model, plan),
        "ring_cut": ring_cut,
        "tp_backward_overlap": one_rank or _nothing_hidden(model, plan),
        "tp_overlap": one_rank,
        "tp_scatter": one_rank or ("" if plan.tp_overlap else "without tp_overlap"),
        "keep_gathered": whole_sequence,
        "input_gradients": one_rank or ("" if plan.projections == "separate" else "with projections = 'fused'"),
        "few_kv_heads": "" if plan.tp > model.kv_heads else f"with tp = {plan.tp} of {model.kv_heads} KV heads",
        **_of_ulysses(model, plan),
        "norm_gradients": whole_sequence,
        "batch_first": whole_sequence or ("with tp_overlap" if plan.tp_overlap else ""),
    }


def _of_ulysses(model: Model, plan: Plan) -> dict[str, str]:
    alone = "with ulysses = 1" if plan.ulysses == 1 else ""
    few = model.kv_heads < plan.tp * plan.ulysses and model.kv_heads >= plan.tp
    return {
        "uneven_heads": alone or ("" if deals_out_groups(model, plan) else "with heads that ulysses divides"),
        "ulysses_few_kv_heads": alone
        or ("" if few else f"with {model.kv_heads} KV heads for ulysses = {plan.ulysses}"),
        "ulysses_gradients": alone or ("with gradients that are all alike" if _exchanges_alike(model, plan) else ""),
        "gathers_position_ids": alone,
    }


def _exchanges_alike(model: Model, plan: Plan) -> bool:
    """Whether gradients of Q, K and V are made by one kernel, as large, and read by one."""
    apart = model.attention == "unfused" or model.positions == "rope" or model.qk_norm
    return model.kv_heads == model.heads and plan.ring == 1 and not apart


def deals_out_groups(model: Model, plan: Plan) -> bool:
    """Whether heads are dealt out over `ulysses` unevenly."""
    groups, left = divmod(model.kv_heads, plan.tp)
    return plan.uneven_heads == "by_group" and not left and groups > plan.ulysses and groups % plan.ulysses > 0


def _of_ring_messages(plan: Plan) -> dict[str, str]:
    whole = "without ring" if plan.ring == 1 else ""
    if not whole and plan.ring_kind == "all_gather":
        whole = "with ring_kind = 'all_gather', which gathers and scatters each of K and V"
    fp32 = "with ring_kind = 'gather_permute', which sends fp32 anyhow" if plan.ring_kind == "gather_permute" else ""
    return {"ring_gradients": whole or fp32, "ring_messages": whole}


def _of_head_slices(model: Model, plan: Plan) -> str:
    if plan.ring == 1 or plan.ring_kind != "all_gather":
        return "without ring" if plan.ring == 1 else "without ring_kind = 'all_gather'"
    return "as these are all" if plan.heads_k_stride == own_kv_heads(model, plan) else ""


def own_kv_heads(model: Model, plan: Plan) -> int:
    """KV heads of a rank in core attention."""
    return max(1, -(-model.kv_heads // (plan.tp * plan.ulysses)))


def _nothing_hidden(model: Model, plan: Plan) -> str:
    """Gradients that are summed over several products are complete when none is left to hide their communication."""
    regathers = plan.sequence_parallel and not plan.keep_gathered
    several = plan.projections == "separate" and plan.input_gradients == "summed" and model.gated_mlp
    return "with projections = 'separate', whose gradients are summed last" if several and not regathers else ""


def _of_pipeline(plan: Plan) -> dict[str, str]:
    options = (
        "pp_schedule", "pp_group", "pp_layout", "pp_sends", "pp_overlap", "pp_warmup_flush", "pp_deallocate"
    )  # fmt: skip
    if plan.pp == 1:
        return dict.fromkeys(options, "with pp = 1")
    torch = "under pp_sends = 'torch'" if sends(plan) == "torch" else ""
    group = "as it is pp anyhow" if plan.pp_group == plan.pp and not torch else torch
    usual = plan.model_copy(update={"pp_sends": None, "pp_overlap": None})
    return {
        "pp_group": group if grouped(plan) else f"with pp_schedule = {plan.pp_schedule!r} of {plan.virtual_pp} chunks",
        "pp_sends": f"with pp_schedule = {plan.pp_schedule!r}" if sends(usual) == sends(plan) else "",
        "pp_overlap": torch or ("by default" if overlaps_messages(usual) == overlaps_messages(plan) else ""),
        "pp_warmup_flush": torch,
        "pp_deallocate": torch,
    }


def _of_replicas(model: Model, plan: Plan) -> dict[str, str]:
    one_shard = "with one rank along dp x ulysses x ring" if plan.copies == 1 else ""
    return {
        "dp_overlap": one_shard or _overlap(plan),
        "zero": one_shard,
        "distributed_optimizer": one_shard or ("beside zero, which shards the optimizer too" if plan.zero else ""),
        "dp_library": one_shard,
        "fsdp_ends": one_shard or _ends(model, plan),
        "shard_group": f"with dp = {plan.dp}" if plan.shard_group == plan.dp else "",
        "bucket_elements": one_shard or _buckets(plan),
    }


def _overlap(plan: Plan) -> str:
    """Of the libraries Megatron's two stages with buckets let the user choose, and DeepSpeed's first for gradients."""
    if plan.dp_library == "megatron" and plan.zero_stage < 2:
        return ""
    if plan.dp_library == "deepspeed" and plan.pp > 1:
        return "with pp, for which DeepSpeed switches it off"
    if plan.dp_library == "deepspeed" and plan.zero_stage == 1 and plan.dp_overlap != "parameters":
        return ""
    return f"with zero = {plan.zero_stage} of dp_library = {plan.dp_library!r}, which overlaps in its own way"


def _ends(model: Model, plan: Plan) -> str:
    tied = model.tied_embeddings and model.head_rows == model.vocab
    return (
        "without units of FSDP" if not _has_units(plan) else "with tied embeddings, whose ends are one" if tied else ""
    )


def _has_units(plan: Plan) -> bool:
    """Whether weights travel in units of FSDP."""
    return plan.dp_library == "fsdp" or (plan.dp_library == "megatron" and plan.zero_stage > 1)


def _buckets(plan: Plan) -> str:
    if _has_units(plan):
        return "where a layer is a unit"
    behind = plan.dp_library != "megatron" or plan.dp_overlap in (True, "gradients")
    return "" if behind else "without dp_overlap of gradients"


def _nothing_left(model: Model, plan: Plan) -> str:
    """Where a recomputation ends with what the backward pass reads anyhow."""
    modules, unfused = plan.recomputed_modules, model.attention == "unfused"
    if plan.recompute == "none":
        return "with recompute = 'none'"
    if model.dropout if plan.recompute == "full" else not ("mlp" in modules or ("core_attn" in modules and unfused)):
        return "as what is recomputed ends with what the backward pass reads"
    return ""


def _nothing_earlier(model: Model, plan: Plan) -> str:
    """Where nothing runs before the backward pass reads what was not kept. Sequence parallelism moves the gradient of
    fc2, and a bias behind it gets one, unless dropout has kept a mask; ulysses moves that of core attention.
    """
    if plan.recompute == "none":
        return "with recompute = 'none'"
    over_tp = plan.tp > 1 and plan.sequence_parallel
    of_layer = plan.recompute == "full" and not model.dropout and (over_tp or model.mlp_bias)
    of_modules = {"mlp": over_tp, "core_attn": plan.ulysses > 1}
    runs = of_layer or any(of_modules.get(name, False) for name in plan.recomputed_modules)
    return "" if runs else "as nothing runs before what is recomputed is read"


def _of_memory(model: Model, plan: Plan) -> dict[str, str]:
    without_head = "without a head" if model.head_rows == 0 else ""
    return {
        "recompute_early_stop": _nothing_left(model, plan),
        "recompute_reentrant": _nothing_earlier(model, plan),
        "loss_fusion": without_head,
        "fp8_output_proj": without_head,
        "loss_parallel": without_head or ("with tp = 1" if plan.tp == 1 else ""),
        "recompute_modules": "as core attention is recomputed anyhow"
        if plan.recomputed_modules == ("core_attn",)
        else "",
    }
