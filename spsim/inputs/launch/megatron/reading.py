"""From arguments of Megatron-LM to settings.

An argument that is left out has the default of `megatron/training/arguments.py`: LayerNorm, biases, learned positions,
tied embeddings, dropout of 0.1, a vocabulary padded to 128 x tp, gradients of bf16 weights in fp32.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

from spsim.errors import InputError
from spsim.inputs.launch.draft import Draft, stages_as
from spsim.inputs.launch.megatron.arguments import (
    BACKENDS,
    DTYPES,
    FLAGS,
    NUMBERS,
    OTHER_MODELS,
    POSITIONS,
    STAGES_INSIDE,
    STRATEGIES,
)
from spsim.inputs.launch.megatron.experts import read_experts
from spsim.inputs.launch.megatron.latent import read_latents
from spsim.inputs.launch.megatron.windows import read_windows
from spsim.inputs.launch.options import Options
from spsim.inputs.plan import GRAPH_MODULES
from spsim.inputs.stages import layers_of_chunks
from spsim.inputs.words import PRECISIONS


def read(options: Options) -> Draft:
    """The settings that arguments say; `InputError` names the first that is none."""
    for name in OTHER_MODELS:
        if name in options:
            raise options.refuse(name, "hybrid models are not read from files yet")
    draft = Draft()
    draft.read(options, NUMBERS, int)
    draft.read(options, FLAGS, bool)
    _read_model(options, draft)
    read_latents(options, draft)
    _read_precision(options, draft)
    read_experts(options, draft)
    _read_context(options, draft)
    _read_stages(options, draft)
    _read_replicas(options, draft)
    _read_recompute(options, draft)
    _read_host(options, draft)
    for name, path in NUMBERS.items():
        if path in ("model.layers", "model.hidden", "model.heads", "workload.seq_len") and name not in options:
            draft.ask(path, f"{options.where}: --{name.replace('_', '-')} is missing")
    return draft


def _read_model(options: Options, draft: Draft) -> None:
    model = draft.model
    model["gated_mlp"] = options.flag("swiglu")
    if options.flag("squared_relu"):
        model["activation"] = "squared_relu"
    if model["gated_mlp"] and "ffn_hidden_size" not in options and "hidden" in model:
        model["ffn_hidden"] = 8 * model["hidden"] // 192 * 64  # two thirds of 4 x hidden, in 64s
    if options.flag("group_query_attention"):
        model["kv_heads"] = options.number("num_query_groups", 1)
    else:
        options.ignore("num_query_groups")
    norms = {"LayerNorm": "layernorm", "RMSNorm": "rmsnorm"}
    model["norm"] = options.choice("normalization", norms, "layernorm")
    model["positions"] = options.choice("position_embedding_type", POSITIONS, "learned")
    if options.flag("use_rotary_position_embeddings"):
        model["positions"] = "rope"
    options.leave("no_position_embedding", (True,))
    positions = options.number("max_position_embeddings", None)
    if model["positions"] == "learned" and positions is not None:
        model["max_positions"] = positions
    model["bias"] = not options.flag("disable_bias_linear")
    model["qkv_bias"] = options.flag("add_qkv_bias") or model["bias"]
    model["qk_norm"] = options.flag("qk_layernorm")
    model["tied_embeddings"] = not options.flag("untie_embeddings_and_output_weights")
    model["attention"] = options.choice("attention_backend", BACKENDS, "flash")
    if "attention_backend" in options and options.items["attention_backend"].value == "flash":
        options.say("attention_backend", "which version is not said; simulated as what Transformer Engine picks")
    options.leave("use_flash_attn", (True,))
    _read_dropout(options, model)
    read_windows(options, draft)
    if predictions := options.number("mtp_num_layers", 0, least=0):
        model["mtp_layers"] = predictions
    _read_vocabulary(options, draft)


def _read_dropout(options: Options, model: dict[str, Any]) -> None:
    rates = {name: options.take(name, 0.1) for name in ("hidden_dropout", "attention_dropout")}
    for name, rate in rates.items():
        if isinstance(rate, bool) or not isinstance(rate, int | float):
            raise options.wrong(name, "a number such as 0.1")
    model["dropout"] = float(rates["hidden_dropout"])
    if "attention_dropout" in options and model["attention"] == "unfused" and len({*rates.values()}) > 1:
        options.say("attention_dropout", "there is one rate here, that of --hidden-dropout")


def _read_vocabulary(options: Options, draft: Draft) -> None:
    padded = options.number("padded_vocab_size", None)
    vocab, divisor = options.number("vocab_size", None), options.number("make_vocab_size_divisible_by", 128)
    tp = draft.plan.get("tp", 1)
    if padded is None and vocab is None:
        draft.ask("model.vocab", f"{options.where}: --vocab-size is missing, it comes from the tokenizer")
    elif padded is not None:
        draft.model["vocab"] = padded
    elif vocab is not None:
        unit = divisor * tp
        draft.model["vocab"] = -(-vocab // unit) * unit


def _read_precision(options: Options, draft: Draft) -> None:
    half = {name: options.flag(name) for name in ("bf16", "fp16")}
    if all(half.values()):
        raise options.wrong("fp16", "one of --bf16 and --fp16")
    precision = next((name for name, on in half.items() if on), "fp32")
    recipes = {"tensorwise": "tensorwise", "delayed": "delayed", "mxfp8": "mxfp8", "blockwise": "blockwise"}
    recipe = options.choice("fp8_recipe", recipes, "delayed")
    if options.take("fp8_format") is not None:
        precision = PRECISIONS.get(recipe, recipe)
    options.leave("fp4_recipe", ("nvfp4",))
    if options.take("fp4_format") is not None:
        precision = "nvfp4"
    draft.workload["precision"] = precision
    whole = options.flag("accumulate_allreduce_grads_in_fp32")
    reduced = options.flag("grad_reduce_in_bf16")
    main = options.choice("main_grads_dtype", DTYPES, "fp32")
    halved = not whole if precision == "fp16" else reduced or (main == "bf16" and not whole)
    if halved and precision != "fp32":
        draft.plan["grad_dtype"] = "bf16"
    _read_moments(options, draft)


def _read_moments(options: Options, draft: Draft) -> None:
    options.leave("main_params_dtype", ("fp32",))
    moments = {name: options.choice(name, DTYPES, "fp32") for name in ("exp_avg_dtype", "exp_avg_sq_dtype")}
    if {*moments.values()} == {"bf16"}:
        draft.plan["moment_dtype"] = "bf16"
    for name, dtype in moments.items():
        if dtype == "bf16" and "moment_dtype" not in draft.plan:
            options.say(name, "there is one type of both moments here, simulated as fp32")


def _read_context(options: Options, draft: Draft) -> None:
    size = options.number("context_parallel_size", 1)
    kinds = options.take("cp_comm_type", "p2p")
    kinds = {*kinds} if isinstance(kinds, list) else {kinds}
    if len(kinds) > 1:
        raise options.refuse("cp_comm_type", "layers that communicate in different ways are not simulated yet")
    known = ("p2p", "all_gather", "allgather", "a2a", "a2a+p2p")
    kind = str(kinds.pop())
    if kind not in known:
        raise options.wrong("cp_comm_type", f"one of {', '.join(known)}")
    levels = options.take("hierarchical_context_parallel_sizes", [])
    levels = levels if isinstance(levels, list) else [levels]
    if kind == "a2a+p2p":
        if len(levels) != 2 or not all(isinstance(n, int) for n in levels) or prod(levels) != size:
            name = "cp_comm_type" if not levels else "hierarchical_context_parallel_sizes"
            raise options.wrong(name, f"two sizes in --hierarchical-context-parallel-sizes whose product is {size}")
        draft.plan |= {"ulysses": levels[0], "ring": levels[1]}
    elif kind == "a2a":
        draft.plan["ulysses"] = size
    elif size != 1:
        draft.plan["ring"] = size
        if kind != "p2p":
            draft.plan["ring_kind"] = "all_gather"


# ------------------------------------------------------------ pipeline, replicas, memory


def _read_stages(options: Options, draft: Draft) -> None:
    if options.flag("no_overlap_p2p_communication"):
        draft.plan["pp_overlap"] = False
    if options.flag("use_tp_pp_dp_mapping"):
        draft.plan["mesh_order"] = STAGES_INSIDE
    layers, pp = draft.model.get("layers"), draft.plan.get("pp", 1)
    layout = options.take("pipeline_model_parallel_layout")
    each = options.number("num_layers_per_virtual_pipeline_stage", None)
    ends = {part: options.number(f"decoder_{part}_pipeline_num_layers", None) for part in ("first", "last")}
    slots = [options.flag(f"account_for_{part}_in_pipeline_split") for part in ("embedding", "loss")]
    if layout is not None:
        counts = _laid_out(options, layout)
        draft.plan["virtual_pp"] = len(counts) // pp
    elif layers is None or not (each or any(slots) or any(ends.values())):
        return
    elif each is not None:
        chunks, rest = divmod(layers + sum(slots), each * pp)
        if rest or not chunks:
            raise options.wrong("num_layers_per_virtual_pipeline_stage", f"a divisor of the {layers // pp} of a stage")
        draft.plan["virtual_pp"] = chunks
        counts = _slotted(options, layers, chunks * pp, slots)
    elif any(ends.values()):
        counts = _given_ends(options, layers, pp, draft.plan.get("virtual_pp", 1), ends)
    else:
        counts = _slotted(options, layers, draft.plan.get("virtual_pp", 1) * pp, slots)
    if len(counts) > 1:
        stages_as(draft, counts)


def _laid_out(options: Options, layout: Any) -> list[int]:
    try:
        return layers_of_chunks(str(layout))
    except InputError as error:
        raise options.wrong("pipeline_model_parallel_layout", f"a layout: {error}") from None


def _slotted(options: Options, layers: int, chunks: int, slots: list[bool]) -> list[int]:
    """Layers of each chunk where embedding and loss take the place of one."""
    each, rest = divmod(layers + sum(slots), chunks)
    if rest or not each:
        raise InputError(
            f"{options.where}: {layers} layers and {sum(slots)} slots of embedding and loss are not divisible by the "
            f"{chunks} chunks of the pipeline; use a number of stages that divides them"
        )
    counts = [each] * chunks
    counts[0] -= slots[0]
    counts[-1] -= slots[1]
    return counts


def _given_ends(options: Options, layers: int, pp: int, virtual: int, ends: Mapping[str, int | None]) -> list[int]:
    """Layers of each chunk where the first or last stage has a number of its own."""
    given = [count for count in ends.values() if count is not None]
    middle, rest = divmod(layers - sum(given), max(pp - len(given), 1))
    if pp > layers:
        raise options.wrong("pipeline_model_parallel_size", f"at most as many stages as {layers} layers")
    stages = [middle] * pp
    for place, name in ((0, "first"), (-1, "last")):
        if (count := ends[name]) is not None:
            stages[place] = count
    if rest or sum(stages) != layers or min(stages) < 0 or any(count % virtual for count in stages):
        part = next(name for name, count in ends.items() if count is not None)
        raise options.wrong(f"decoder_{part}_pipeline_num_layers", f"a rest of {layers} layers that the stages divide")
    return [count // virtual for _ in range(virtual) for count in stages]


def _read_replicas(options: Options, draft: Draft) -> None:
    plan = draft.plan
    if options.flag("use_torch_fsdp2"):
        whole = options.flag("torch_fsdp2_no_reshard_after_forward")
        plan |= {"zero": 2 if whole else 3, "dp_library": "fsdp"}
        options.leave("no_gradient_accumulation_fusion", (True,))
    sharded = options.flag("use_megatron_fsdp") or options.flag("use_custom_fsdp")
    zero = options.choice("data_parallel_sharding_strategy", STRATEGIES, 0)
    if sharded and zero:
        plan.pop("distributed_optimizer", None)
        plan |= {"distributed_optimizer": True} if zero == 1 else {"zero": zero}
    overlaps = [options.flag("overlap_grad_reduce"), options.flag("overlap_param_gather")]
    if any(overlaps):
        plan["dp_overlap"] = True if all(overlaps) else "gradients" if overlaps[0] else "parameters"
    options.leave("num_distributed_optimizer_instances", (1,))
    options.leave("optimizer", ("adam",))
    options.leave("transformer_impl", ("transformer_engine",))


def _read_recompute(options: Options, draft: Draft) -> None:
    plan = draft.plan
    kinds = {"selective": "selective", "full": "full"}
    kind = options.choice(
        "recompute_granularity", kinds, "selective" if options.flag("recompute_activations") else None
    )
    method = options.choice("recompute_method", {"block": "block", "uniform": "uniform"}, None)
    layers = options.number("recompute_num_layers", None)
    modules = options.take("recompute_modules")
    if kind is None:
        return
    plan["recompute"] = kind
    if kind == "full" and (method, layers) != ("uniform", 1):
        plan |= {"recompute_layers": layers} if layers is not None else {}
        plan |= {"recompute_method": "uniform"} if method == "uniform" else {}
    if kind == "selective" and modules is not None:
        plan["recompute_modules"] = "+".join(map(str, modules)) if isinstance(modules, list) else str(modules)


def _read_host(options: Options, draft: Draft) -> None:
    """Memory of the host, and graphs."""
    options.leave("cpu_offloading", (True,))
    if offloaded := options.number("cpu_offloading_num_layers", 0, least=0):
        draft.plan["cpu_offload_layers"] = offloaded
    graphs = options.flag("enable_cuda_graph") or options.flag("external_cuda_graph")
    impl = options.choice("cuda_graph_impl", {"none": False, "local": True, "transformer_engine": True}, graphs)
    scope = options.take("cuda_graph_scope", [])
    scope = scope if isinstance(scope, list) else [scope]
    if not impl:
        return
    if scope and {*scope} <= {*GRAPH_MODULES}:
        draft.plan["cuda_graphs"] = "+".join(scope)
        return
    draft.plan["cuda_graphs"] = "full_iteration" if "full_iteration" in scope else "per_layer"
    if {*scope} - {"full", "full_iteration"}:
        options.say("cuda_graph_scope", "whole layers are in graphs here")
