"""Arguments of Megatron-LM for multi-head latent attention, both ways.

Widths that are left out are 32 of the latent of K and V, 128 and 64 of a head of Q and K, 128 of a head of V, and no
latent of Q. `--qk-layernorm` are the norms of the latents; `--kv-channels` says nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from spsim.inputs.launch.draft import Draft
from spsim.inputs.launch.options import Options

if TYPE_CHECKING:
    from spsim.inputs.model import Model

_WIDTHS = {
    "kv_lora_rank": ("kv_lora_rank", 32), "qk_head_dim": ("qk_nope_head_dim", 128),
    "qk_pos_emb_head_dim": ("qk_rope_head_dim", 64), "v_head_dim": ("v_head_dim", 128),
}  # fmt: skip
"""Argument -> field of a model, and default."""
_OTHERS = ("q_lora_rank", *_WIDTHS, "rope_type", "rotary_scaling_factor", "mscale", "mscale_all_dim")


def read_latents(options: Options, draft: Draft) -> None:
    """Widths of the latents and of heads, behind all else of the model."""
    if not options.flag("multi_latent_attention"):
        for name in _OTHERS:
            options.ignore(name)
        return
    model = draft.model
    model |= {field: options.number(name, usual) for name, (field, usual) in _WIDTHS.items()}
    if (rank := options.number("q_lora_rank", None)) is not None:
        model["q_lora_rank"] = rank
    for name in ("head_dim", "kv_heads"):
        model.pop(name, None)
    model["qkv_bias"] = False
    if not model.pop("qk_norm", False):
        options.aside.append(f"{options.where}: --qk-layernorm is missing: latents are simulated with their norms")
    options.leave("rope_type", ("rope", "yarn"))
    for name in ("rotary_scaling_factor", "mscale", "mscale_all_dim"):
        options.ignore(name)


def latent_arguments(model: Model) -> dict[str, Any]:
    """Names and values; none where Q, K and V are projected from the hidden states."""
    if model.kv_lora_rank is None:
        return {}
    widths = {name: getattr(model, field) for name, (field, _) in _WIDTHS.items()}
    return {
        "multi_latent_attention": True, "q_lora_rank": model.q_lora_rank, **widths, "qk_layernorm": True,
        "kv_channels": None,
    }  # fmt: skip
