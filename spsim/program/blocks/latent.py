"""Multi-head latent attention: q, k and v from latents (DeepSeek-AI 2024, arXiv:2405.04434, section 2.1).

As Megatron-Core runs it (`MLASelfAttention`). The products down are not split over tp: they are duplicated, and with
sequence parallelism each rank makes the latents of its part of the sequence, and normalises them. The products up are
split by heads, so that latents are gathered before them, and the one rotated part of k before each head gets it: what
Megatron-Core gathers, and what it sums of the gradients, follows from that.

Dimensions: q and l latents of q and of k and v, c width of a head of q and k, n and r what is not and what is rotated
of that, d width of a head of v.
"""

from __future__ import annotations

from spsim.inputs.model import Model
from spsim.program.blocks.block import ModelBlock
from spsim.program.operators import Tensor


def latent_sizes(model: Model) -> dict[str, int]:
    """Sizes of the dimensions that only a layer with latent attention has."""
    if model.kv_lora_rank is None:
        return {}
    sizes = {
        "q": model.q_lora_rank, "l": model.kv_lora_rank, "c": model.head_dim, "n": model.qk_nope_head_dim,
        "r": model.qk_rope_head_dim,
    }  # fmt: skip
    return {dim: size for dim, size in sizes.items() if size is not None}


def latent_qkv(block: ModelBlock, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Q, K and V of core attention, rotated; K and V have a head for each of Q."""
    q = _queries(block, x)
    latent, of_k = block.tensor("kv_latent", "s b l"), block.tensor("k_rope", "s b r")
    block.add(
        "kv_down", "gemm", "s b h, h l, h r -> s b l, s b r",
        [x, block.weight("kv_down_weight", "h l"), block.weight("k_rope_weight", "h r")], [latent, of_k], saves=[x],
    )  # fmt: skip
    latent = block.norm("kv_norm", latent, "l")
    k, v = block.tensor("k_nope", "s b a n"), block.tensor("v_up", "s b a d")
    block.add(
        "kv_up", "gemm", "s b l, l a n, l a d -> s b a n, s b a d",
        [latent, block.weight("k_up_weight", "l a n"), block.weight("v_up_weight", "l a d")], [k, v],
        saves=[latent], owns_gather=[latent],
    )  # fmt: skip
    return block.rope("rope_q", q), *_keys_and_values(block, k, of_k, v)


def _queries(block: ModelBlock, x: Tensor) -> Tensor:
    """Of a latent, or of the hidden states."""
    out = block.tensor("q", "s b a c")
    if "q" not in block.sizes:
        block.add(
            "q_up", "gemm", "s b h, h a c -> s b a c", [x, block.weight("q_up_weight", "h a c")], [out],
            saves=[x], owns_gather=[x],
        )  # fmt: skip
        return out
    latent = block.tensor("q_latent", "s b q")
    block.add("q_down", "gemm", "s b h, h q -> s b q", [x, block.weight("q_down_weight", "h q")], [latent], saves=[x])
    latent = block.norm("q_norm", latent, "q")
    block.add(
        "q_up", "gemm", "s b q, q a c -> s b a c", [latent, block.weight("q_up_weight", "q a c")], [out],
        saves=[latent], owns_gather=[latent],
    )  # fmt: skip
    return out


def _keys_and_values(block: ModelBlock, nope: Tensor, rope: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """K of each head with the rotated part that all share, and V as a tensor of its own, in one kernel
    (`fused_mla_rope_kv_split`); its gradient sums that part over heads.
    """
    out, values = block.tensor("k", "s b a c"), block.tensor("v", "s b a d")
    block.add(
        "rope_k", "elementwise", "s b a n, s b r, s b a d, s r -> s b a c, s b a d",
        [nope, rope, v, block.tensor("rotations", "s r", "constant")], [out, values], mixes="c n r d", kernel="rope",
    )  # fmt: skip
    return out, values
