"""What others call the settings of spsim, and what to say where a word is not known.

Arguments of Megatron-LM, torchtitan, DeepSpeed, Accelerate, xDiT and verl are spelled as these spell them, with dashes
or underscores. A word with one reading is taken as that; where it has several, the line that refuses it names the keys.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Set
from difflib import get_close_matches
from typing import Any

from spsim.errors import InputError

PLAN = {
    "tp": ("tensor_model_parallel_size", "tensor_parallel_size", "tensor_parallel_degree", "tp_size", "tp_degree"),
    "sequence_parallel": ("sp",),
    "ulysses": (
        "ulysses_degree", "ulysses_size", "ulysses_parallel_size", "ulysses_sequence_parallel_size",
        "ds_sequence_parallel_size",
    ),
    "ring": ("ring_degree", "ring_size", "ring_parallel_size"),
    "cp": ("context_parallel_size", "context_parallel_degree", "context_parallel", "cp_size", "cp_degree"),
    "pp": (
        "pipeline_model_parallel_size", "pipeline_parallel_size", "pipeline_parallel_degree", "pp_size", "pp_degree"
    ),
    "virtual_pp": (
        "virtual_pipeline_model_parallel_size", "num_virtual_stages_per_pipeline_rank", "vpp", "vpp_size"
    ),
    "dp": (
        "data_parallel_size", "data_parallel_replicate_degree", "dp_size", "dp_replicate", "dp_replicate_size",
        "dp_degree",
    ),
    "distributed_optimizer": ("use_distributed_optimizer",),
    "zero": ("zero_stage",),
    "recompute": ("recompute_granularity",),
    "recompute_layers": ("recompute_num_layers",),
    "tp_overlap": ("tp_comm_overlap", "enable_async_tensor_parallel"),
    "dp_overlap": ("overlap_grad_reduce",),
}  # fmt: skip
"""Option of a plan, or `cp`, which is a ring or Ulysses -> its names elsewhere."""

WORKLOAD = {
    "seq_len": ("seq_length", "sequence_length", "seqlen", "max_seq_len"),
    "micro_batch": ("micro_batch_size", "mbs", "train_micro_batch_size_per_gpu", "local_batch_size"),
    "global_batch": ("global_batch_size", "gbs", "train_batch_size"),
    "precision": ("dtype", "torch_dtype"),
}
"""Option of a workload -> its names elsewhere."""

MODEL = {
    "layers": ("num_layers", "num_hidden_layers", "n_layer", "n_layers"),
    "hidden": ("hidden_size", "n_embd", "dim"),
    "ffn_hidden": ("ffn_hidden_size", "intermediate_size"),
    "heads": ("num_attention_heads", "n_head", "n_heads"),
    "kv_heads": ("num_query_groups", "num_key_value_heads", "n_kv_heads"),
    "head_dim": ("kv_channels",),
    "vocab": ("vocab_size", "padded_vocab_size"),
    "max_positions": ("max_position_embeddings",),
    "tied_embeddings": ("tie_word_embeddings",),
}
"""Field of a model -> its names elsewhere."""

PRECISIONS = {
    "bfloat16": "bf16", "float16": "fp16", "half": "fp16", "float32": "fp32", "float": "fp32",
    **dict.fromkeys((
        "fp8_cs", "fp8_current_scaling", "tensorwise", "float8currentscaling", "bf16_with_fp8_current_scaling_mixed"
    ), "fp8"),
    **dict.fromkeys(("fp8_ds", "delayed", "delayedscaling", "bf16_with_fp8_delayed_scaling_mixed"), "fp8_delayed"),
    **dict.fromkeys(("fp8_mx", "mxfp8blockscaling", "bf16_with_mxfp8_mixed"), "mxfp8"),
    **dict.fromkeys((
        "fp8_sc", "blockwise", "float8blockscaling", "bf16_with_fp8_subchannel_scaling_mixed"
    ), "fp8_blockwise"),
    **dict.fromkeys(("fp4", "nvfp4blockscaling", "bf16_with_nvfp4_mixed"), "nvfp4"),
}  # fmt: skip
"""Precision elsewhere: of torch, Megatron-Core (`fp8_recipe`), Megatron-Bridge and Transformer Engine."""

_SEVERAL = (
    "write sequence_parallel over tp (Megatron), ulysses=N (DeepSpeed, all-to-all) or ring=N (context parallelism)"
)
_SHARDED = "write dp=N,zero=3 for sharded parameters, or dp=N for copies"
_EXPERTS = "experts are not simulated yet; leave it out"
_ELSEWHERE = "belongs to the workload; give --seq-len, --micro-batch, --global-batch or --precision, or [workload]"
ADVICE = {
    **dict.fromkeys(("sequence_parallel_size", "sequence_parallel_degree", "sp_size", "sp_degree"), _SEVERAL),
    **dict.fromkeys(("data_parallel_shard_degree", "dp_shard", "dp_shard_size", "fsdp"), _SHARDED),
    "hierarchical_context_parallel_sizes": "write ulysses=N,ring=M",
    **dict.fromkeys(("ep", "expert_model_parallel_size", "expert_parallel_degree", "etp"), _EXPERTS),
    **{name: _ELSEWHERE for own, others in WORKLOAD.items() for name in (own, *others)},
}
"""Option of a plan elsewhere that has several readings, or none here -> what to do instead."""

FLAGS = {"recompute_activations": "selective", "gradient_checkpointing": "full", "activation_checkpointing": "full"}
"""Flag elsewhere -> what it recomputes."""

TEXTS = ("pp_layout",)
"""Options of a plan whose capitals and dashes say something."""

_ALL_TO_ALL = ("a2a", "all_to_all", "alltoall")
_COMM = {"p2p": "p2p", "all_gather": "all_gather", "allgather": "all_gather", **dict.fromkeys(_ALL_TO_ALL, "ulysses")}
"""`cp_comm_type` of Megatron-LM, as it is spelled there and in other places."""
_ROTATE = {"allgather": "all_gather", "alltoall": "p2p"}
"""`context_parallel_rotate_method` of torchtitan: gathers K and V, or hands them round with a permuting all-to-all."""


def plain(word: str) -> str:
    """A name without dashes and capitals: `--Seq-Length` is `seq_length`."""
    return word.strip().lstrip("-").replace("-", "_").lower()


def renamed(
    table: Mapping[str, Any], names: Mapping[str, Iterable[str]], known: Collection[str], where: str
) -> dict[str, Any]:
    """A table under the names of spsim; `InputError` where a setting is there under two names."""
    own = {other: name for name, others in names.items() for other in others}
    found: dict[str, Any] = {}
    origin: dict[str, str] = {}
    for key, value in table.items():
        name = key if key in known else own.get(plain(key), plain(key))
        if name not in known and name not in names:
            name = key
        if name in found:
            raise InputError(f"{where}: {origin[name]} and {key} are the same; keep one")
        found[name], origin[name] = value, key
    return found


def plan_options(options: Mapping[str, Any], known: Set[str]) -> dict[str, Any]:
    """Options of a plan under the names of spsim; `InputError` names the key to use where one has several readings."""
    texts = [value for name, value in options.items() if isinstance(value, str) and name not in TEXTS]
    switch = isinstance(options.get("sequence_parallel", False), bool)
    if options.keys() <= known and switch and all(plain(text) == _COMM.get(text, text) == text for text in texts):
        return dict(options)
    for key in options:
        if plain(key) in ADVICE:
            raise InputError(f"plan: {key}: {ADVICE[plain(key)]}")
    further = ("cp_comm_type", "context_parallel_rotate_method", *FLAGS)
    found = renamed(options, PLAN, {*known, *further}, "plan")
    for flag, granularity in FLAGS.items():
        if found.pop(flag, False) is True and found.setdefault("recompute", granularity) != granularity:
            raise InputError(f"plan: {flag} and recompute = {found['recompute']!r} are both given; keep one")
    if isinstance(found.get("sequence_parallel"), int | float) and not isinstance(found["sequence_parallel"], bool):
        raise InputError(f"plan: sequence_parallel = {found['sequence_parallel']}: it is no degree; {_SEVERAL}")
    return _context_parallel({name: _word(name, value) for name, value in found.items()})


def _word(name: str, value: Any) -> Any:
    return plain(value) if isinstance(value, str) and name not in TEXTS else value


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
    elif options.get("ring_kind") in _COMM:
        options["ring_kind"] = _COMM[options["ring_kind"]]
    if rotate is not None:
        return _chosen("context_parallel_rotate_method", rotate, _ROTATE)
    if comm == "a2a+p2p":
        raise InputError("plan: cp_comm_type = 'a2a+p2p': write ulysses=N,ring=M, whose product is cp")
    return None if comm is None else _chosen("cp_comm_type", comm, _COMM)


def _chosen(key: str, value: Any, choices: Mapping[str, str]) -> str:
    if value not in choices:
        raise InputError(f"plan: {key} = {value!r} is not one of {', '.join(choices)}")
    return choices[value]


def _with(options: dict[str, Any], name: str, value: Any) -> dict[str, Any]:
    if name in options:
        raise InputError(f"plan: {name} = {options[name]!r} and what says the same of cp are both given; keep one")
    return {**options, name: value}


_PARTS = {"vp": "virtual_pp", "vpp": "virtual_pp"}
_PART = r"(?:tp|ulysses|ring|cp|sp|vpp|vp|pp|dp|zero)"
_LABEL = re.compile(rf"{_PART}[ -]?\d*(?: ?[+×x*/] ?{_PART}[ -]?\d*)*", re.IGNORECASE)


def label_options(item: str) -> list[tuple[str, Any]] | None:
    """Options of a plan from its label, such as `TP8+SP × PP8×VP3 × DP4+ZeRO-1` or `Ulysses 2 × Ring 4`; None if it is
    no label.
    """
    if item.lower() == "single gpu":
        return []
    if not _LABEL.fullmatch(item):
        return None
    parts = [(name.lower(), degree) for name, degree in re.findall(rf"({_PART})[ -]?(\d*)", item, re.IGNORECASE)]
    return [(_PARTS.get(name, name), int(degree) if degree else True) for name, degree in parts]


# ------------------------------------------------------------ words that are not known


def unknown_key(where: str, key: str, known: Collection[str]) -> InputError:
    """The error that names the key that was meant, or all there are."""
    close = get_close_matches(plain(key), known, n=1, cutoff=0.6)
    fix = f"did you mean {close[0]}?" if close else f"use one of {', '.join(known)}"
    return InputError(f"{where}: {key}: unknown key; {fix}")


def named(text: str, names: Collection[str], kind: str) -> str | None:
    """The name that a text means: itself, written otherwise, or the only one with its words, such as `gb200` of
    `gb200-nvl72`. None if there is none; `InputError` names all that it could be.
    """
    if text in names:
        return text
    squeezed = [name for name in names if _letters(name) == _letters(text)]
    words = _words(text)
    found = squeezed or [name for name in names if words and words <= _words(name)]
    if len(found) > 1:
        raise InputError(f"{kind} {text!r} may be any of {', '.join(found)}; give one of them")
    return found[0] if found else None


def nearest(text: str, names: Collection[str]) -> str:
    """What to use instead of an unknown name: the one that it is like, and all there are."""
    close = get_close_matches(text.lower(), names, n=1, cutoff=0.75)
    return f"{f'did you mean {close[0]}? ' if close else ''}use one of {', '.join(names)}"


def _letters(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _words(name: str) -> set[str]:
    return {*re.findall(r"[a-z0-9.]+", name.lower())}
