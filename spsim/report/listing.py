"""Tables of the shipped profiles and models."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from rich.table import Table

from spsim.inputs.model import PRESETS
from spsim.inputs.plan import Plan
from spsim.inputs.profiles import load_profile, profile_names
from spsim.inputs.words import PLAN
from spsim.report.table import table
from spsim.units import GIB, MIB


def hardware_table() -> Table:
    """The shipped profiles."""
    columns = ["profile", "device", "16-bit TFLOP/s", "memory GiB", "GB/s", "node", "assumed"]
    made = table("Hardware profiles", columns, numbers=columns[2:5])
    for name in profile_names():
        profile = load_profile(name)
        sheet = profile.datasheet
        peak = sheet.peak_tflops.get("bf16") or next(iter(sheet.peak_tflops.values()))
        made.add_row(
            name, sheet.device, f"{peak.value:g}", f"{sheet.memory.reported_mib.value * MIB / GIB:.1f}",
            f"{sheet.memory.bandwidth_gb_per_s.value:g}",
            ", ".join(f"{level.name} × {level.gpus or 'any'}" for level in sheet.topology),
            f"{len(profile.assumed)} coefficients",
        )  # fmt: skip
    return made


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


PLAN_OPTIONS: Mapping[str, str] = {
    "tp": "GPUs that share heads and the width of the MLP: Megatron tensor parallelism",
    "sequence_parallel": "norms, dropouts and residuals on a shard of the sequence over tp: Megatron SP",
    "ulysses": "GPUs that share the sequence, and heads in attention, by all-to-all: DeepSpeed-Ulysses",
    "ring": "GPUs that share the sequence in attention too: ring attention, context parallelism (cp)",
    "ring_kind": "K and V go round from GPU to GPU, or are gathered before attention",
    "ring_cut": "how a ring cuts a causal sequence: evenly in work, or in one piece a GPU",
    "pp": "pipeline stages (not simulated yet)",
    "virtual_pp": "chunks of a stage (not simulated yet)",
    "pp_schedule": "order of passes on the stages (only 1f1b yet)",
    "pp_group": "micro-batches that a chunk runs before the next takes over (not simulated yet)",
    "pp_layout": "what each chunk holds, as Et3/t4/t4/t3L (not simulated yet)",
    "pp_sends": "whose way to post messages and wait for them (not simulated yet)",
    "pp_overlap": "messages between stages behind passes (not simulated yet)",
    "pp_warmup_flush": "and those of warm-up and cool-down, too (not simulated yet)",
    "pp_deallocate": "free the output of a stage once it is sent (not simulated yet)",
    "dp": "replicas (not simulated yet)",
    "distributed_optimizer": "optimizer state sharded over ulysses x ring: ZeRO stage 1",
    "zero": "ZeRO stage (2 and 3 are not simulated yet)",
    "dp_library": "whose buckets and collectives synchronise replicas (not simulated yet)",
    "shard_group": "replicas that share one copy of what is sharded (not simulated yet)",
    "bucket_elements": "elements at which a bucket of gradients is closed (not simulated yet)",
    "grad_dtype": "in which gradients are accumulated and reduced (not simulated yet)",
    "moment_dtype": "of the two moments of Adam (not simulated yet)",
    "precision_aware_optimizer": "master weights as what 16 bits leave of them (not simulated yet)",
    "loss_fusion": "cross-entropy in one kernel (not simulated yet)",
    "recompute": "recompute core attention (selective) or the layer (full) in the backward pass",
    "recompute_layers": "layers of each chunk that are recomputed (not simulated yet)",
    "recompute_method": "which layers those are (not simulated yet)",
    "recompute_modules": "modules that selective recomputes: core_attn, mlp, mlp_act, layernorm, as core_attn+mlp",
    "cpu_offload_layers": "layers whose activations wait in host memory (not simulated yet)",
    "cuda_graphs": "what is launched as a graph (not simulated yet)",
    "tp_backward_overlap": "gradient communication of tp behind weight gradients, as Megatron does",
    "tp_overlap": "forward communication of tp in pieces behind its products (not simulated yet)",
    "dp_overlap": "gradients of replicas behind the backward pass (not simulated yet)",
    "keep_gathered": "keep the gathered input of a linear, as DTensor does, instead of gathering it again",
}
"""What each option of a plan means."""


def plan_table() -> Table:
    """The options of a plan, with what others call them."""
    made = table("Plans: options joined by commas", ["option", "values", "default", "what it does", "elsewhere"])
    for column in (0, 2):
        made.columns[column].no_wrap = True
    for name, meaning in PLAN_OPTIONS.items():
        field = Plan.model_fields[name]
        elsewhere = (*PLAN.get(name, ()), *(("cp", *PLAN["cp"]) if name == "ring" else ()))
        made.add_row(name, _values(field.annotation, name), _shown(field.default), meaning, ", ".join(elsewhere))
    made.caption = (
        "For instance tp=8,sequence_parallel,recompute=selective; a bare switch is true. Labels are plans too: TP8+SP, "
        "Ulysses 8, TP2 × Ring 4. cp is ring, or ulysses with cp_comm_type=a2a. A plan has "
        "tp × ulysses × ring × pp × dp GPUs"
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
