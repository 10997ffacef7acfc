"""What others call the options of a plan, and what their options are here.

Arguments of Megatron-LM, torchtitan, DeepSpeed, Accelerate, xDiT and verl are spelled as these spell them, with dashes
or underscores. A word with one reading is taken as that; where it has several, the line that refuses it names the keys.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Set
from typing import Any

from spsim.errors import InputError
from spsim.inputs.libraries import LIBRARIES
from spsim.inputs.words import PRECISIONS, WORKLOAD, named, plain, renamed

SHARDS = ("data_parallel_shard_degree", "dp_shard", "dp_shard_size")
_COPIES = ("data_parallel_replicate_degree", "dp_replicate", "dp_replicate_size")
"""Degrees of torchtitan and Accelerate: groups that share one set of parameters, and copies of such groups."""

PLAN = {
    "tp": ("tensor_model_parallel_size", "tensor_parallel_size", "tensor_parallel_degree", "tp_size", "tp_degree"),
    "sequence_parallel": ("sp",),
    "ulysses": (
        "ulysses_degree", "ulysses_size", "ulysses_parallel_size", "ulysses_sequence_parallel_size",
        "ds_sequence_parallel_size",
    ),
    "ring": ("ring_degree", "ring_size", "ring_parallel_size"),
    "cp": ("context_parallel_size", "context_parallel_degree", "context_parallel", "cp_size", "cp_degree"),
    "ep": ("expert_model_parallel_size", "expert_parallel_size", "expert_parallel_degree", "ep_size", "ep_degree"),
    "expert_tp": ("expert_tensor_parallel_size", "expert_tensor_parallel_degree", "etp"),
    "moe_dispatcher": ("moe_token_dispatcher_type", "moe_flex_dispatcher_backend"),
    "moe_capacity_factor": ("moe_expert_capacity_factor",),
    "moe_a2a_overlap": ("overlap_moe_expert_parallel_comm",),
    "delay_wgrad": ("delay_wgrad_compute",),
    "fused_grouped_mlp": ("use_transformer_engine_op_fuser",),
    "pp": (
        "pipeline_model_parallel_size", "pipeline_parallel_size", "pipeline_parallel_degree", "pp_size", "pp_degree"
    ),
    "virtual_pp": (
        "virtual_pipeline_model_parallel_size", "num_virtual_stages_per_pipeline_rank", "vpp", "vpp_size"
    ),
    "pp_group": (
        "microbatch_group_size_per_virtual_pipeline_stage", "microbatch_group_size_per_vp_stage",
    ),
    "pp_layout": ("pipeline_model_parallel_layout",),
    "pp_overlap": ("overlap_p2p_comm", "overlap_p2p_communication"),
    "pp_warmup_flush": ("overlap_p2p_comm_warmup_flush", "overlap_p2p_communication_warmup_flush"),
    "pp_deallocate": ("deallocate_pipeline_outputs",),
    "mesh_order": ("order", "rank_order"),
    "dp": ("data_parallel_size", "dp_size", "dp_degree", *_COPIES),
    "distributed_optimizer": ("use_distributed_optimizer",),
    "zero": ("zero_stage",),
    "bucket_elements": ("ddp_bucket_size", "reduce_bucket_size"),
    "grad_dtype": ("main_grads_dtype", "grad_accum_dtype", "mixed_precision_reduce"),
    "moment_dtype": ("exp_avg_dtype", "exp_avg_sq_dtype"),
    "precision_aware_optimizer": ("use_precision_aware_optimizer",),
    "loss_fusion": ("cross_entropy_loss_fusion",),
    "recompute": ("recompute_granularity",),
    "recompute_layers": ("recompute_num_layers",),
    "cpu_offload_layers": ("cpu_offloading_num_layers",),
    "tp_overlap": ("tp_comm_overlap", "enable_async_tensor_parallel"),
}  # fmt: skip
"""Option of a plan, or `cp`, which is a ring or Ulysses -> its names elsewhere."""

_TORCH = {"pp_schedule": "1f1b", "pp_sends": "torch"}
SCHEDULES = {
    "1f1b": _TORCH, "interleaved1f1b": _TORCH, "gpipe": {"pp_schedule": "gpipe"},
    "loopedbfs": {"pp_schedule": "looped_bfs"}, "interleavedzerobubble": {"pp_schedule": "interleaved_zero_bubble"},
    "zbvzerobubble": {"pp_schedule": "zbv"}, "dualpipev": {"pp_schedule": "dualpipev"},
}  # fmt: skip
"""Classes of torch.distributed.pipelining without `Schedule` -> options."""

_BATCHED = {True: {"pp_overlap": False}, False: {"pp_overlap": True}}
_GRADIENTS = {True: {"grad_dtype": "fp32"}, False: {"grad_dtype": "bf16"}}
_GRAPHS = {True: {"cuda_graphs": "per_layer"}, False: {}}
_FULLY_SHARDED = {True: {"zero": 3, "dp_library": "fsdp"}, False: {}}
_WHOLE = {True: {"recompute": "full"}, False: {}}
_OF_GATHERED = {True: {"loss_parallel": False}, False: {}}
READINGS: Mapping[str, Mapping[Any, Mapping[str, Any]]] = {
    "recompute_activations": {True: {"recompute": "selective"}, False: {}},
    "disable_loss_parallel": _OF_GATHERED,
    "gradient_checkpointing": _WHOLE,
    "activation_checkpointing": _WHOLE,
    "pipeline_parallel_schedule": SCHEDULES,
    "batch_p2p_comm": _BATCHED,
    "no_overlap_p2p_communication": _BATCHED,
    "grad_reduce_in_fp32": _GRADIENTS,
    "accumulate_allreduce_grads_in_fp32": _GRADIENTS,
    "data_parallel_sharding_strategy": {
        "no_shard": {"zero": 0}, "optim": {"zero": 1}, "optim_grads": {"zero": 2}, "optim_grads_params": {"zero": 3},
    },
    "fsdp_reshard_after_forward": {"default": {"zero": 3}, "always": {"zero": 3}, "never": {"zero": 2}},
    "use_tp_pp_dp_mapping": {True: {"mesh_order": "tp-ulysses-ring-pp-dp"}, False: {}},
    "use_torch_fsdp2": _FULLY_SHARDED,
    "use_megatron_fsdp": _FULLY_SHARDED,
    "enable_cuda_graph": _GRAPHS,
    "external_cuda_graph": _GRAPHS,
}  # fmt: skip
"""Option elsewhere -> its values -> options here."""

OVERLAPS = {"overlap_grad_reduce": "gradients", "overlap_param_gather": "parameters"}

_SEVERAL = (
    "write sequence_parallel over tp (Megatron), ulysses=N (DeepSpeed, all-to-all) or ring=N (context parallelism)"
)
_SHARDED = "write dp=N,zero=3 for sharded parameters, or dp=N for copies"
_VIRTUAL = "write virtual_pp=N, the layers of a stage divided by that"
_LAYOUT = "write pp_layout, such as Et3/t4/t4/t3L"
_SLOTS = f"is so where pp x virtual_pp divides layers + 2 and not layers; else {_LAYOUT}"
_ELSEWHERE = "belongs to the workload; give --seq-len, --micro-batch, --global-batch or --precision, or [workload]"
_EIGHT_BITS = "Q, K and V that projections leave in 8 bits are not simulated yet; use fp8_dot_product_attention"
_SOME_LAYERS = "layers in 16 bits among others in 8 are not simulated yet; leave it out"
_ACCUMULATED = "write global_batch = micro-batches x micro_batch x dp in the workload"
_GRAPH = "write cuda_graphs=per_layer or cuda_graphs=full_iteration"
_HOST = "an optimizer on the host is not simulated yet; leave it out"
ADVICE = {
    **dict.fromkeys(("sequence_parallel_size", "sequence_parallel_degree", "sp_size", "sp_degree"), _SEVERAL),
    "fsdp": _SHARDED,
    "zero_optimization": "write zero=1, zero=2 or zero=3, and dp_library=deepspeed",
    "num_distributed_optimizer_instances": "several distributed optimizers are not simulated yet; leave it out",
    "mics_shard_size": "write zero=3,shard_group=N,dp_library=fsdp",
    "zero_hpz_partition_size": "a second copy of the shards is not simulated yet; leave it out",
    "bucket_cap_mb": "write bucket_elements=N, MiB x 2^20 divided by the bytes of a gradient",
    "hierarchical_context_parallel_sizes": "write ulysses=N,ring=M",
    **dict.fromkeys(
        ("num_layers_per_virtual_pipeline_stage", "num_layers_per_virtual_stage",
         "pipeline_parallel_layers_per_stage"), _VIRTUAL,
    ),
    **dict.fromkeys(
        ("decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers", "pipeline_parallel_split_points",
         "num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage", "module_fqns_per_model_part"),
        _LAYOUT,
    ),
    **dict.fromkeys(("account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split"), _SLOTS),
    **dict.fromkeys(("num_microbatches", "gradient_accumulation_steps"), _ACCUMULATED),
    **dict.fromkeys(("cuda_graph_impl", "cuda_graph_scope"), _GRAPH),
    **dict.fromkeys(("fp8_multi_head_attention", "fp8_mha"), _EIGHT_BITS),
    **dict.fromkeys(
        ("first_last_layers_bf16", "num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16"), _SOME_LAYERS
    ),
    **dict.fromkeys(("offload_optimizer", "optimizer_cpu_offload", "cpu_offload"), _HOST),
    "cpu_offloading": "write how many: cpu_offload_layers=N",
    **{name: _ELSEWHERE for own, others in WORKLOAD.items() for name in (own, *others)},
    "pipeline_parallel_microbatch_size": _ELSEWHERE,
}  # fmt: skip
"""Option of a plan elsewhere that has several readings, or none here -> what to do instead."""

TEXTS = ("pp_layout",)
"""Options of a plan whose capitals and dashes say something."""

_ALL_TO_ALL = ("a2a", "all_to_all", "alltoall")
COMM = {"p2p": "p2p", "all_gather": "all_gather", "allgather": "all_gather", **dict.fromkeys(_ALL_TO_ALL, "ulysses")}
"""`cp_comm_type` of Megatron-LM, as it is spelled there and in other places."""
ROTATES = {"allgather": "gather_permute", "alltoall": "p2p"}
"""`context_parallel_rotate_method` of torchtitan: gathers K and V, or hands them round with a permuting all-to-all."""
_ROTATED = {"ring_gradients": "fp32", "ring_messages": "concatenated"}
"""What torch's context parallelism does either way."""
_TRANSLATED = {*PRECISIONS, *_ALL_TO_ALL, "allgather", *SCHEDULES} - {"1f1b", "gpipe", "dualpipev"}
"""Values that are called otherwise here."""
_FURTHER = ("cp_comm_type", "context_parallel_rotate_method", *READINGS, *SHARDS, *OVERLAPS)


def elsewhere(option: str) -> tuple[str, ...]:
    """What others call an option, or call what has to do with it."""
    read = [word for word, values in READINGS.items() if any(option in given for given in values.values())]
    further = {"ring": ("cp", *PLAN["cp"]), "dp_overlap": (*OVERLAPS,), "shard_group": SHARDS}
    return (*PLAN.get(option, ()), *further.get(option, ()), *read)


def plan_options(options: Mapping[str, Any], known: Set[str]) -> dict[str, Any]:
    """Options of a plan under the names of spsim; `InputError` names the key to use where one has several readings."""
    if options.keys() <= known and all(_is_own(name, value) for name, value in options.items()):
        return dict(options)
    for key in options:
        if plain(key) in ADVICE:
            raise InputError(f"plan: {key}: {ADVICE[plain(key)]}")
    copies = any(
        plain(key) in ("data_parallel_replicate_degree", "dp_replicate", "dp_replicate_size") for key in options
    )
    found = renamed(options, PLAN, {*known, *_FURTHER}, "plan")
    found = {name: _value(name, value) for name, value in found.items()}
    if isinstance(found.get("sequence_parallel"), int | float) and not isinstance(found["sequence_parallel"], bool):
        raise InputError(f"plan: sequence_parallel = {found['sequence_parallel']}: it is no degree; {_SEVERAL}")
    return _context_parallel(_sharded(_overlapped(_read(found)), copies=copies))


def _is_own(name: str, value: Any) -> bool:
    if name == "library":
        return value in LIBRARIES if isinstance(value, str) else True
    if name == "mesh_order":
        return not isinstance(value, str) or value == _order(value)
    if isinstance(value, str):
        return name in TEXTS or (plain(value) == value and value not in _TRANSLATED)
    return isinstance(value, bool) if name == "sequence_parallel" else not isinstance(value, list)


def _value(name: str, value: Any) -> Any:
    """As options here have it: texts in small letters, lists joined."""
    if isinstance(value, list) and all(isinstance(part, str) for part in value):
        return "+".join(map(plain, value))
    if name == "mesh_order" and isinstance(value, str):
        return _order(value)
    if not isinstance(value, str) or name in TEXTS:
        return value
    if name == "library":
        return named(value, LIBRARIES, "plan: library") or value
    word = plain(value).removeprefix("torch.")
    return PRECISIONS.get(word, word) if name in ("grad_dtype", "moment_dtype") else word


def _order(value: str) -> str:
    """Megatron's cp is ulysses and ring; experts are no axis of a plan."""
    words = [word for word in value.lower().replace("_", "-").split("-") if word != "ep"]
    return "-".join(words).replace("cp", "ulysses-ring")


def _read(options: dict[str, Any]) -> dict[str, Any]:
    """Options whose values are other options here."""
    if (schedule := options.get("pp_schedule")) in SCHEDULES.keys() & _TRANSLATED:
        options = {**options, **SCHEDULES[schedule]}
    for word in [word for word in options if word in READINGS]:
        value = options.pop(word)
        for name, given in _chosen(word, value, READINGS[word]).items():
            if options.setdefault(name, given) != given:
                raise InputError(f"plan: {word} and {name} = {options[name]!r} are both given; keep one")
    return options


def _overlapped(options: dict[str, Any]) -> dict[str, Any]:
    """Megatron's two switches, which are one option."""
    switches = {part: options.pop(word, False) for word, part in OVERLAPS.items()}
    chosen = [part for part, on in switches.items() if on is True]
    return _with(options, "dp_overlap", chosen[0] if len(chosen) == 1 else True) if chosen else options


def _sharded(options: dict[str, Any], *, copies: bool) -> dict[str, Any]:
    """torchtitan's degrees: replicas are copies of groups that share one set of parameters (fully_shard)."""
    given = [(word, options.pop(word)) for word in SHARDS if word in options]
    for word, shards in given:
        counted = isinstance(shards, int) and not isinstance(shards, bool) and shards > 0
        if not counted or len(given) > 1 or ("dp" in options and not copies):
            raise InputError(f"plan: {word} = {shards!r}: {_SHARDED}, and shard_group=M for groups of M")
        if shards > 1:
            group = {"shard_group": shards} if options.get("dp", 1) != 1 else {}
            again = options.get("pp", 1) == 1
            options = {
                "zero": 3 if again else 2,
                "dp_library": "fsdp",
                **options,
                "dp": options.get("dp", 1) * shards,
                **group,
            }
    return options


def _context_parallel(options: dict[str, Any]) -> dict[str, Any]:
    """`cp` is `ring` unless `cp_comm_type` is an all-to-all of heads, which is `ulysses`."""
    degree, kind = options.pop("cp", None), _kind(options)
    if kind is None:
        return options if degree is None else _with(options, "ring", degree)
    if degree is None and "ring" not in options and not (kind == "ulysses" and "ulysses" in options):
        raise InputError("plan: how context parallelism communicates is given but not its degree; add cp=N")
    if kind == "ulysses":
        if "ring" in options:
            raise InputError(
                f"plan: an all-to-all moves heads, no ring: write ulysses={options['ring']} instead of ring"
            )
        return options if degree is None else _with(options, "ulysses", degree)
    given = options if degree is None else _with(options, "ring", degree)
    return _with(given, "ring_kind", kind)


def _kind(options: dict[str, Any]) -> str | None:
    """How context parallelism communicates: `p2p`, `all_gather` or `ulysses`, taken out of the options."""
    comm, rotate = options.pop("cp_comm_type", None), options.pop("context_parallel_rotate_method", None)
    if options.get("ring_kind") in _ALL_TO_ALL:
        comm = options.pop("ring_kind")
    elif options.get("ring_kind") in COMM:
        options["ring_kind"] = COMM[options["ring_kind"]]
    if rotate is not None:
        for name, value in _ROTATED.items():
            options.setdefault(name, value)
        return str(_chosen("context_parallel_rotate_method", rotate, ROTATES))
    if comm == "a2a+p2p":
        raise InputError("plan: cp_comm_type = 'a2a+p2p': write ulysses=N,ring=M, whose product is cp")
    return None if comm is None else str(_chosen("cp_comm_type", comm, COMM))


def _chosen(key: str, value: Any, choices: Mapping[Any, Any]) -> Any:
    if not isinstance(value, bool | int | str) or value not in choices:
        raise InputError(f"plan: {key} = {value!r} is not one of {', '.join(map(_text, choices))}")
    return choices[value]


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _with(options: dict[str, Any], name: str, value: Any) -> dict[str, Any]:
    if name in options:
        raise InputError(f"plan: {name} = {options[name]!r} and what says the same of cp are both given; keep one")
    return {**options, name: value}


_PARTS = {"vp": "virtual_pp", "vpp": "virtual_pp"}
_PART = r"(?:tp|ulysses|ring|cp|sp|ep|vpp|vp|pp|dp|zero)"
_OF_LIBRARY = re.compile(r"(?P<label>.+?) ?\((?P<library>[\w-]+)\)")
_LABEL = re.compile(rf"{_PART}[ -]?\d*(?: ?[+×x*/] ?{_PART}[ -]?\d*)*", re.IGNORECASE)


def label_options(item: str) -> list[tuple[str, Any]] | None:
    """Options of a plan from its label, such as `TP8+SP × PP8×VP3 × DP4+ZeRO-1` or `Ulysses 2 × Ring 4`; None if it is
    no label.
    """
    if (own := _OF_LIBRARY.fullmatch(item)) and (options := label_options(own["label"])) is not None:
        return [("library", own["library"]), *options]
    if item.lower() == "single gpu":
        return []
    if not _LABEL.fullmatch(item):
        return None
    parts = [(name.lower(), degree) for name, degree in re.findall(rf"({_PART})[ -]?(\d*)", item, re.IGNORECASE)]
    return [(_PARTS.get(name, name), int(degree) if degree else True) for name, degree in parts]
