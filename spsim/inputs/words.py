"""What others call the settings of spsim (those of a plan: `plan_words`), and what to say where a word is not known.

Arguments of Megatron-LM, torchtitan, DeepSpeed, Accelerate, xDiT and verl are spelled as these spell them, with dashes
or underscores. A word with one reading is taken as that; where it has several, the line that refuses it names the keys.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from difflib import get_close_matches
from typing import Any

from spsim.errors import InputError

WORKLOAD = {
    "seq_len": ("seq_length", "sequence_length", "seqlen", "max_seq_len"),
    "micro_batch": ("micro_batch_size", "mbs", "train_micro_batch_size_per_gpu", "local_batch_size"),
    "global_batch": ("global_batch_size", "gbs", "train_batch_size"),
    "precision": ("dtype", "torch_dtype"),
    "chunk_tokens": ("chunked_prefill_size", "chunk_size"),
    "kv_cache_dtype": ("kv_dtype",),
    "kv_block_tokens": ("block_size",),
}
"""Option of a workload -> its names elsewhere."""

MODEL = {
    "layers": ("num_layers", "num_hidden_layers", "n_layer", "n_layers"),
    "hidden": ("hidden_size", "n_embd", "dim"),
    "ffn_hidden": ("ffn_hidden_size", "intermediate_size"),
    "experts": ("num_experts", "num_local_experts", "n_routed_experts"),
    "experts_per_token": ("moe_router_topk", "num_experts_per_tok"),
    "expert_ffn_hidden": ("moe_ffn_hidden_size", "moe_intermediate_size"),
    "shared_ffn_hidden": ("moe_shared_expert_intermediate_size", "shared_expert_intermediate_size"),
    "mtp_layers": ("mtp_num_layers", "num_nextn_predict_layers"),
    "dense_layers": ("first_k_dense_replace",),
    "heads": ("num_attention_heads", "n_head", "n_heads"),
    "kv_heads": ("num_query_groups", "num_key_value_heads", "n_kv_heads"),
    "head_dim": ("kv_channels",),
    "qk_rope_head_dim": ("qk_pos_emb_head_dim",),
    "vocab": ("vocab_size", "padded_vocab_size"),
    "max_positions": ("max_position_embeddings",),
    "tied_embeddings": ("tie_word_embeddings",),
}
"""Field of a model -> its names elsewhere."""

PRECISIONS = {
    "bfloat16": "bf16",
    "float16": "fp16",
    "half": "fp16",
    "float32": "fp32",
    "float": "fp32",
    **dict.fromkeys(
        ("fp8_cs", "fp8_current_scaling", "tensorwise", "float8currentscaling", "bf16_with_fp8_current_scaling_mixed"),
        "fp8",
    ),
    **dict.fromkeys(("fp8_ds", "delayed", "delayedscaling", "bf16_with_fp8_delayed_scaling_mixed"), "fp8_delayed"),
    **dict.fromkeys(("fp8_mx", "mxfp8blockscaling", "bf16_with_mxfp8_mixed"), "mxfp8"),
    **dict.fromkeys(
        ("fp8_sc", "blockwise", "float8blockscaling", "bf16_with_fp8_subchannel_scaling_mixed"), "fp8_blockwise"
    ),
    **dict.fromkeys(("fp4", "nvfp4blockscaling", "bf16_with_nvfp4_mixed"), "nvfp4"),
}


PHASES = {"train": "training"}


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
