"""From a scenario to arguments of Megatron-LM, and to a script that launches them."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Any

from spsim.inputs.launch.megatron.arguments import (
    BACKENDS,
    FLAGS,
    NUMBERS,
    POSITIONS,
    RECIPES,
    STAGES_INSIDE,
    STRATEGIES,
    VERSION,
)
from spsim.inputs.launch.megatron.experts import expert_arguments
from spsim.inputs.launch.megatron.latent import latent_arguments
from spsim.inputs.launch.megatron.windows import window_arguments
from spsim.inputs.stages import all_chunks, layout_text, spread

if TYPE_CHECKING:
    from spsim.inputs.model import Model
    from spsim.inputs.plan import Plan
    from spsim.inputs.scenario import Scenario
    from spsim.inputs.workload import Workload

_ALWAYS = ("seq_len", "micro_batch")
_WIDTH = 110


def arguments(scenario: Scenario) -> dict[str, Any]:
    """Names and values; True where the name stands alone."""
    model, plan, workload = scenario.model, scenario.plan, scenario.workload
    found = {**_model(model, scenario), **_workload(workload, plan), **_plan(plan, model)}
    return {name: value for name, value in found.items() if value is not None and value is not False}


def text(scenario: Scenario) -> str:
    """A bash script that launches the arguments of a scenario on its nodes; data and rates are to be added."""
    given = arguments(scenario)
    per_node = scenario.gpus_per_node
    lines = [
        "#!/bin/bash",
        f"# Megatron-LM (core {VERSION}): {scenario.model.name}, {scenario.plan.label}.",
        "# Data, tokenizer, learning rate and checkpoints are to be added.",
    ]
    sharded = "use_torch_fsdp2" in given or "use_megatron_fsdp" in given
    if scenario.plan.moe_a2a_overlap:
        lines += ["export CUDA_DEVICE_MAX_CONNECTIONS=32"]
    elif not sharded and scenario.plan.tp * scenario.plan.ring * scenario.plan.ulysses > 1:
        lines += ["export CUDA_DEVICE_MAX_CONNECTIONS=1"]
    launch = f"torchrun --nnodes {scenario.plan.gpus // per_node} --nproc-per-node {per_node} pretrain_gpt.py"
    return "\n".join([*lines, "", " \\\n".join([launch, *_wrapped(given)])]) + "\n"


def _wrapped(given: dict[str, Any]) -> list[str]:
    lines = [""]
    for name, value in given.items():
        words = [f"--{name.replace('_', '-')}"]
        words += [] if value is True else map(str, value if isinstance(value, list) else [value])
        option = shlex.join(words)
        if len(lines[-1]) + len(option) > _WIDTH:
            lines.append("")
        lines[-1] += f"{' ' if lines[-1] else '    '}{option}"
    return lines


def _own(names: dict[str, str], section: str, values: Any, *, always: tuple[str, ...] = ()) -> dict[str, Any]:
    """Arguments that mean one setting, where it is not the default."""
    paths = {path.partition(".")[2]: name for name, path in names.items() if path.startswith(f"{section}.")}
    fields = type(values).model_fields
    given = {own: getattr(values, own) for own in paths}
    return {paths[own]: value for own, value in given.items() if own in always or value != fields[own].default}


def _model(model: Model, scenario: Scenario) -> dict[str, Any]:
    grouped = model.kv_heads < model.heads
    backend = next((name for name, kind in BACKENDS.items() if kind == model.attention), "flash")
    rows = model.max_positions if model.positions == "learned" else 0
    return {
        **_own(NUMBERS, "model", model, always=("layers", "hidden", "ffn_hidden", "heads", "head_dim")),
        "group_query_attention": grouped,
        "num_query_groups": model.kv_heads if grouped else None,
        "swiglu": model.activation == "swiglu",
        "squared_relu": model.activation == "squared_relu",
        "normalization": "RMSNorm" if model.norm == "rmsnorm" else None,
        "position_embedding_type": next(name for name, kind in POSITIONS.items() if kind == model.positions),
        "max_position_embeddings": max(rows, scenario.workload.seq_len),
        "disable_bias_linear": not model.bias,
        "add_qkv_bias": model.qkv_bias and not model.bias,
        "qk_layernorm": model.qk_norm,
        "untie_embeddings_and_output_weights": not model.tied_embeddings,
        "attention_backend": backend,
        "hidden_dropout": model.dropout,
        "attention_dropout": model.dropout,
        "vocab_size": model.vocab,
        "padded_vocab_size": model.vocab,
        **window_arguments(model),
        "mtp_num_layers": model.mtp_layers or None,
        **latent_arguments(model),
        **expert_arguments(model, scenario.plan),
    }


def _workload(workload: Workload, plan: Plan) -> dict[str, Any]:
    precision = workload.precision
    half = precision != "fp32"
    low, recipe = RECIPES.get(precision, (None, None))
    return {
        **_own(NUMBERS, "workload", workload, always=_ALWAYS),
        "bf16": half and precision != "fp16",
        "fp16": precision == "fp16",
        "fp8_format": low,
        "fp8_recipe": recipe,
        "fp4_format": "e2m1" if precision == "nvfp4" else None,
        "fp4_recipe": "nvfp4" if precision == "nvfp4" else None,
        "grad_reduce_in_bf16": half and precision != "fp16" and plan.grad_dtype == "bf16",
        "accumulate_allreduce_grads_in_fp32": precision == "fp16" and plan.grad_dtype == "fp32",
    }


def _plan(plan: Plan, model: Model) -> dict[str, Any]:
    offloaded = plan.cpu_offload_layers
    moments = plan.moment_dtype if plan.moment_dtype != "fp32" else None
    flags = _own(FLAGS, "plan", plan)
    return {
        **_own(NUMBERS, "plan", plan),
        **flags,
        **_context(plan),
        **_stages(plan, model),
        **_replicas(plan),
        "exp_avg_dtype": moments,
        "exp_avg_sq_dtype": moments,
        "cpu_offloading_num_layers": offloaded or None,
        **_recompute(plan),
        **_graphs(plan),
    }


def _context(plan: Plan) -> dict[str, Any]:
    size = plan.ulysses * plan.ring
    if size == 1:
        return {}
    if plan.ulysses > 1 and plan.ring > 1:
        levels = [plan.ulysses, plan.ring]
        return {
            "context_parallel_size": size, "cp_comm_type": "a2a+p2p", "hierarchical_context_parallel_sizes": levels
        }  # fmt: skip
    kind = "a2a" if plan.ulysses > 1 else plan.ring_kind
    return {"context_parallel_size": size, "cp_comm_type": kind if kind in ("a2a", "all_gather") else None}


def _stages(plan: Plan, model: Model) -> dict[str, Any]:
    if plan.pp == 1:
        return {}
    inside = {"use_tp_pp_dp_mapping": plan.mesh_order == STAGES_INSIDE}
    return {**inside, **_chunks(plan, model)}


def _chunks(plan: Plan, model: Model) -> dict[str, Any]:
    """Even, with the slots of embedding and loss, or as a layout, which says how many they are."""
    counts = [len(chunk.layers) for chunk in all_chunks(model, plan)]
    batched = {"no_overlap_p2p_communication": plan.pp_overlap is False}
    if len({*counts}) == 1:
        return batched
    usual = counts == spread(model.layers, len(counts)) and (model.layers + 2) % len(counts) == 0
    if usual:
        return {**batched, "account_for_embedding_in_pipeline_split": True, "account_for_loss_in_pipeline_split": True}
    layout = layout_text(counts, model.mtp_layers).replace("/", "|").replace("t", "t*")
    return {**batched, "num_virtual_stages_per_pipeline_rank": None, "pipeline_model_parallel_layout": layout}


def _replicas(plan: Plan) -> dict[str, Any]:
    """Overlaps, and what shards."""
    whole = plan.dp_overlap is True and plan.zero_stage > 0
    overlaps = {
        "overlap_grad_reduce": bool(plan.dp_overlap),
        "overlap_param_gather": whole or plan.dp_overlap == "parameters",
    }
    if plan.dp_library == "fsdp" and plan.zero_stage > 1:
        return {
            "use_torch_fsdp2": True,
            "torch_fsdp2_no_reshard_after_forward": plan.zero_stage == 2,
            "no_gradient_accumulation_fusion": True,
        }
    if plan.dp_library == "megatron" and plan.zero_stage > 1:
        strategy = next(name for name, stage in STRATEGIES.items() if stage == plan.zero_stage)
        sharded = {"use_megatron_fsdp": True, "data_parallel_sharding_strategy": strategy}
        return {**overlaps, **sharded, "ckpt_format": "fsdp_dtensor"}
    return {**overlaps, "use_distributed_optimizer": plan.zero_stage == 1}


def _recompute(plan: Plan) -> dict[str, Any]:
    if plan.recompute == "none":
        return {}
    if plan.recompute == "selective":
        modules = [*plan.recomputed_modules] if plan.recompute_modules is not None else None
        return {"recompute_granularity": "selective", "recompute_modules": modules}
    layers = plan.recompute_layers
    method = "uniform" if layers is None else plan.recompute_method
    return {"recompute_granularity": "full", "recompute_method": method, "recompute_num_layers": layers or 1}


def _graphs(plan: Plan) -> dict[str, Any]:
    if plan.cuda_graphs == "full_iteration":
        return {
            "cuda_graph_impl": "local", "cuda_graph_scope": "full_iteration", "no_check_for_nan_in_loss_and_grad": True
        }  # fmt: skip
    if plan.cuda_graphs == "none":
        return {}
    modules = None if plan.cuda_graphs == "per_layer" else plan.cuda_graphs.split("+")
    return {"cuda_graph_impl": "transformer_engine", "cuda_graph_scope": modules}
