"""Tables of the shipped profiles and models, the libraries that are known, and the options of a plan."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from rich.table import Table

from spsim.inputs.effects import setting
from spsim.inputs.hardware import HardwareProfile
from spsim.inputs.libraries import LIBRARIES
from spsim.inputs.plan import Plan
from spsim.inputs.plan_words import elsewhere
from spsim.inputs.presets import PRESETS
from spsim.inputs.profiles import load_profile, profile_names
from spsim.report.table import table
from spsim.units import GIB, MIB


def hardware_table() -> Table:
    """The shipped profiles."""
    columns = ["profile", "device", "16-bit TFLOP/s", "memory GiB", "GB/s", "node", "not measured on it"]
    made = table("Hardware profiles", columns, numbers=columns[2:5])
    for name in profile_names():
        profile = load_profile(name)
        sheet = profile.datasheet
        peak = sheet.peak_tflops.get("bf16") or next(iter(sheet.peak_tflops.values()))
        made.add_row(
            name, sheet.device, f"{peak.value:g}", f"{sheet.memory.reported_mib.value * MIB / GIB:.1f}",
            f"{sheet.memory.bandwidth_gb_per_s.value:g}",
            ", ".join(f"{level.name} × {level.gpus or 'any'}" for level in sheet.topology),
            _unmeasured(profile),
        )  # fmt: skip
    return made


def _unmeasured(profile: HardwareProfile) -> str:
    counts = {"assumed": len(profile.assumed), "inherited": len(profile.inherited)}
    return ", ".join(f"{count} {what}" for what, count in counts.items() if count) or "nothing"


def model_table() -> Table:
    """The model presets."""
    columns = [
        "model",
        "parameters",
        "layers",
        "hidden",
        "MLP width",
        "heads",
        "KV heads",
        "vocabulary",
        "attention",
    ]
    made = table("Models", columns, numbers=columns[1:8])
    for model in PRESETS.values():
        sizes = (model.layers, model.hidden, model.ffn_hidden, model.heads, model.kv_heads, model.vocab)
        made.add_row(model.name, f"{model.parameters / 1e9:.2f} B", *(str(size) for size in sizes), model.attention)
    return made


def _settings(options: Mapping[str, Any]) -> str:
    return ", ".join(setting(option, value) for option, value in options.items())


def library_table() -> Table:
    """The libraries whose implementation a plan may be, with what they do otherwise than Megatron-Core."""
    made = table("Libraries: library=NAME in a plan", ["library", "version", "options of a plan, unless given"])
    for name, record in LIBRARIES.items():
        options = _settings(record.options) + (f"; with pp {_settings(record.staged)}" if record.staged else "")
        made.add_row(name, record.version, options or "the defaults of spsim list plans")
    return made


PLAN_OPTIONS: Mapping[str, str] = {
    "library": "whose implementation it is: what options are that are not given",
    "tp": "GPUs that share heads and the width of the MLP: Megatron tensor parallelism",
    "sequence_parallel": "norms, dropouts and residuals on a shard of the sequence over tp: Megatron SP",
    "ulysses": "GPUs that share the sequence, and heads in attention, by all-to-all: DeepSpeed-Ulysses",
    "ring": "GPUs that share the sequence in attention too: ring attention, context parallelism (cp)",
    "ring_kind": "K and V go round, are gathered before attention, or behind its first step (torch)",
    "ring_gradients": "dK and dV go round in the model's dtype, P - 1 trips, or in fp32, P trips",
    "ring_messages": "K and V in one buffer, copied into one for each message, or two sends in a batch",
    "ring_cut": "how a ring cuts a causal sequence: evenly in work, or in one piece a GPU",
    "ring_pass": "in a prefill K and V go round, or Q, whose partial results are exchanged and merged (pass-Q)",
    "fp8_dot_product_attention": "core attention in 8 bits, where products are",
    "fp8_output_proj": "the output layer in 8 bits, where products are",
    "ep": "GPUs that experts are spread over: those of tp, ulysses and ring, and replicas",
    "expert_tp": "GPUs that share an expert: tp unless given, or 1",
    "moe_dispatcher": "tokens to experts by NCCL's all-to-all, by a gather, or by DeepEP or HybridEP",
    "moe_capacity_factor": "tokens of each expert over the mean, dropped or padded to that; none unless given",
    "expert_imbalance": "tokens of the rank whose experts have the most, over the mean",
    "expert_concentration": "Dirichlet distribution that layers draw the loads of experts from, in place of that",
    "routing_seed": "of these draws",
    "moe_a2a_overlap": "exchanges with experts behind passes of another micro-batch",
    "delay_wgrad": "weight gradients behind the exchange that follows, with moe_a2a_overlap",
    "fused_grouped_mlp": "products of experts with activation and casts in their epilogues (MXFP8)",
    "heads_k_stride": "KV heads that ring_kind=all_gather gathers at once, behind attention of those before",
    "pp": "pipeline stages",
    "virtual_pp": "chunks of layers that each stage holds: above 1 the schedule is interleaved",
    "pp_schedule": "order of passes on the stages, as torch.distributed.pipelining calls them",
    "pp_group": "micro-batches that a chunk runs before the next takes over; pp unless given",
    "pp_layout": "what each chunk holds, as Et3/t4/t4/t3L: E embedding, t layer, m multi-token prediction, L loss",
    "pp_sends": "whose way to post messages between stages and wait for them",
    "pp_overlap": "messages between stages behind passes; where virtual_pp is above 1 unless given",
    "pp_warmup_flush": "and those of warm-up and cool-down, too",
    "pp_deallocate": "free the output of a stage once it is sent",
    "mesh_order": "axes in the order in which ranks are numbered, those that share nodes first",
    "dp": "replicas",
    "distributed_optimizer": "optimizer state sharded over dp x ulysses x ring: ZeRO stage 1",
    "zero": "ZeRO stage: sharded are the optimizer (1), gradients too (2), parameters too (3)",
    "dp_library": "whose buckets and collectives synchronise replicas",
    "fsdp_ends": "embedding, and norm with output, sharded with the root of FSDP, or as units of their own",
    "shard_group": "replicas that share one copy of what is sharded: HSDP; all unless given",
    "bucket_elements": "elements at which a bucket of gradients is closed; as the library does unless given",
    "grad_dtype": "in which gradients are accumulated and reduced",
    "moment_dtype": "of the two moments of Adam",
    "precision_aware_optimizer": "master weights as what 16 bits leave of them",
    "loss_parallel": "cross-entropy of logits that stay split over tp, or of gathered ones",
    "loss_fusion": "cross-entropy in one kernel, without an fp32 copy of the logits",
    "recompute": "recompute core attention (selective) or the layer (full) in the backward pass",
    "recompute_layers": "layers of each chunk that are recomputed (block), or layers of a unit (uniform)",
    "recompute_early_stop": "recompute up to the last tensor that the backward pass reads, as torch does",
    "recompute_reentrant": "recompute once the gradient is there, or when the backward pass first reads what is not",
    "recompute_method": "the first layers of a chunk, or units of layers of which the input is kept",
    "recompute_modules": "modules that selective recomputes: core_attn, mlp, moe, layernorm, …, as core_attn+mlp",
    "cpu_offload_layers": "layers whose activations wait in host memory",
    "cuda_graphs": "what is launched as one graph",
    "tp_backward_overlap": "gradient communication of tp behind weight gradients, as Megatron does",
    "tp_overlap": "communication of tp in pieces behind its products: userbuffers, async TP",
    "tp_scatter": "reduce-scatters in pieces under tp_overlap: from rank to rank, or four whole ones, in 16 bits or 8",
    "dp_overlap": "gradients behind the backward pass, parameters behind the forward pass, or both (true)",
    "keep_gathered": "keep the gathered input of a linear, as DTensor does, instead of gathering it again",
    "projections": "q, k, v and gate, up: one product each, or several",
    "input_gradients": "gradients of the input of several products: summed before they move over tp, or each moved",
    "few_kv_heads": "with fewer KV heads than tp: fused q, k, v gathered, K and V replicated, or refused",
    "norm_gradients": "gradients of norms over tp: summed once a step, or again for each that reads them",
    "uneven_heads": "heads that ulysses does not divide: refused, or whole groups dealt out (DeepSpeed)",
    "ulysses_few_kv_heads": "with fewer KV heads than ulysses: K and V replicated, a head on each rank, or refused",
    "ulysses_gradients": "order in which gradients of q, k and v go back over ulysses: q first, or v first (DeepSpeed)",
    "gathers_position_ids": "position ids gathered over ulysses in every layer, as DeepSpeed's ALST does",
    "batch_first": "activations [b, s, h], as torchtitan has them: copied around collectives",
}
"""What each option of a plan means."""


def plan_table() -> Table:
    """The options of a plan, with what others call them."""
    made = table("Plans: options joined by commas", ["option", "values", "default", "what it does", "elsewhere"])
    for column in (0, 2):
        made.columns[column].no_wrap = True
    for name, meaning in PLAN_OPTIONS.items():
        field = Plan.model_fields[name]
        values, others = _values(field.annotation, name), ", ".join(elsewhere(name))
        made.add_row(name, values, _shown(field.default), meaning, others)
    made.caption = (
        "For instance tp=8,sequence_parallel,recompute=selective; a bare switch is true. Labels are plans too: TP8+SP, "
        "Ulysses 8, TP2 × Ring 4, TP8+SP × PP8×VP3 × DP4+ZeRO-1. cp is ring, or ulysses with cp_comm_type=a2a. "
        "A plan has tp × ulysses × ring × pp × dp GPUs"
    )
    made.caption_justify = "left"
    return made


def _values(annotation: Any, name: str) -> str:
    if name == "zero":
        return "0 to 3"
    return ", ".join(dict.fromkeys(_choices(annotation)))


def _choices(annotation: Any) -> Iterator[str]:
    """The values of a type, in words."""
    if annotation is bool:
        yield from ("true", "false")
    elif get_origin(annotation) is Literal:
        yield from map(str, get_args(annotation))
    elif get_origin(annotation) in (Union, UnionType):
        for one in get_args(annotation):
            yield from _choices(one)
    elif annotation is str:
        yield "text"
    elif annotation is not NoneType:
        yield "1, 2, …"


def _shown(default: Any) -> str:
    return str(default).lower()
