"""Keys of a config.json of models with experts, beside those of the dense families that they are otherwise like."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Self

from pydantic import Field, model_validator

from spsim.inputs.families import OF_LLAMA, Count, Family, Llama, Mistral, Qwen3, Rotary, sizes_of
from spsim.inputs.gpt_families import OF_GPT


class _Mixtral(Mistral):
    """Every layer has experts of the width of a dense MLP (Jiang et al. 2024, arXiv:2401.04088)."""

    num_local_experts: Count = 8
    num_experts_per_tok: Count = 2

    def fields(self) -> dict[str, Any]:
        """Fields of `Model`."""
        routed = {"experts": self.num_local_experts, "experts_per_token": self.num_experts_per_tok}
        return {**super().fields(), **routed}


class _PhiMoe(_Mixtral):
    """LayerNorm, and biases of attention and of the head where the file says so."""

    traits: ClassVar[Mapping[str, Any]] = {"gated_mlp": True, "norm": "layernorm"}
    sizes: ClassVar[Mapping[str, int]] = sizes_of(4096, 6400, 32, 32, 8, 32064)
    num_local_experts: Count = 16
    sliding_window: Count | None = None
    attention_bias: bool = False
    lm_head_bias: bool = False

    @property
    def biases(self) -> tuple[bool, bool, bool]:
        """See `Family`: experts have none."""
        return self.attention_bias, self.attention_bias, False

    def fields(self) -> dict[str, Any]:
        """Fields of `Model`."""
        return {**super().fields(), "head_bias": self.lm_head_bias}


class _Qwen3Moe(Qwen3):
    """Experts in every layer but some (Qwen Team 2025, arXiv:2505.09388)."""

    head_dim: Count | None = None
    num_experts: Count = 128
    num_experts_per_tok: Count = 8
    moe_intermediate_size: Count = 768
    decoder_sparse_step: Count = 1
    mlp_only_layers: list[int] | None = None

    def fields(self) -> dict[str, Any]:
        """Fields of `Model`."""
        only, step = self.mlp_only_layers or [], self.decoder_sparse_step
        dense = [layer in only or (layer + 1) % step > 0 for layer in range(self.num_hidden_layers)]
        return {
            **super().fields(), "experts": self.num_experts, "experts_per_token": self.num_experts_per_tok,
            "expert_ffn_hidden": self.moe_intermediate_size, **dense_layers(dense),
        }  # fmt: skip


class _GptOss(Rotary):
    """Biases everywhere, a window in every second layer, and sinks (OpenAI 2025, arXiv:2508.10925)."""

    traits: ClassVar[Mapping[str, Any]] = {"gated_mlp": True, "attention_sinks": True}
    sizes: ClassVar[Mapping[str, int]] = sizes_of(2880, 2880, 36, 64, 8, 201088)
    head_dim: Count | None = 64
    sliding_window: Count | None = 128
    attention_bias: bool = True
    num_local_experts: Count = 128
    num_experts_per_tok: Count = 4

    @property
    def biases(self) -> tuple[bool, bool, bool]:
        """See `Family`."""
        return self.attention_bias, self.attention_bias, True

    @property
    def turns(self) -> tuple[str, ...]:
        """See `Rotary`."""
        return super().turns if self.layer_types else ("sliding_attention", "full_attention")

    def fields(self) -> dict[str, Any]:
        """Fields of `Model`."""
        routed = {"experts": self.num_local_experts, "experts_per_token": self.num_experts_per_tok}
        return {**super().fields(), **routed}


class _DeepSeek(Rotary):
    """Latent attention, shared experts, and a dense MLP in the first layers (DeepSeek-AI 2024, arXiv:2412.19437).

    transformers has no layers of multi-token prediction, so that none are read.
    """

    sizes: ClassVar[Mapping[str, int]] = sizes_of(7168, 18432, 61, 128, None, 129280)
    q_lora_rank: Count | None = 1536
    kv_lora_rank: Count = 512
    qk_nope_head_dim: Count = 128
    qk_rope_head_dim: Count = 64
    v_head_dim: Count = 128
    attention_bias: bool = False
    n_routed_experts: Count = 256
    n_shared_experts: Annotated[int, Field(ge=0)] | None = 1
    num_experts_per_tok: Count = 8
    moe_intermediate_size: Count = 2048
    first_k_dense_replace: Annotated[int, Field(ge=0)] = 3
    moe_layer_freq: Count = 1

    @model_validator(mode="after")
    def _check_blocks(self) -> Self:
        for key, value, only in (
            ("attention_bias", self.attention_bias, False), ("moe_layer_freq", self.moe_layer_freq, 1),
        ):  # fmt: skip
            if value != only:
                raise ValueError(f"{key} = {value} is not simulated in this family; use a model with {only}")
        return self

    def fields(self) -> dict[str, Any]:
        """Fields of `Model`."""
        own = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
        found = {**super().fields(), **{name: getattr(self, name) for name in own}}
        for name in ("head_dim", "kv_heads"):  # of other attention
            found.pop(name, None)
        shared = (self.n_shared_experts or 0) * self.moe_intermediate_size
        first = min(self.first_k_dense_replace, self.num_hidden_layers)
        return {
            **found, "experts": self.n_routed_experts, "experts_per_token": self.num_experts_per_tok,
            "expert_ffn_hidden": self.moe_intermediate_size, "shared_ffn_hidden": shared, "dense_layers": first,
        }  # fmt: skip


class _DeepSeekV2(_DeepSeek):
    sizes: ClassVar[Mapping[str, int]] = sizes_of(4096, 11008, 32, 32, None, 102400)
    n_routed_experts: Count = 64
    n_shared_experts: Annotated[int, Field(ge=0)] | None = 2
    moe_intermediate_size: Count = 1407
    first_k_dense_replace: Annotated[int, Field(ge=0)] = 0


class _Llama4(Llama):
    """One expert beside a shared one; chunks of attention are all that there is up to their size."""

    sizes: ClassVar[Mapping[str, int]] = sizes_of(5120, 8192, 48, 40, 8, 202048)
    further_types: ClassVar[tuple[str, ...]] = ("chunked_attention",)
    head_dim: Count | None = 128
    intermediate_size_mlp: Count = 16384
    num_local_experts: Count = 16
    num_experts_per_tok: Count = 1
    interleave_moe_layer_step: Count = 1
    moe_layers: list[int] | None = None
    attention_chunk_size: Count | None = 8192
    use_qk_norm: bool = True

    @model_validator(mode="after")
    def _check_head_norms(self) -> Self:
        if self.use_qk_norm:
            raise ValueError("use_qk_norm: norms of q and k without weights are not simulated; use another model")
        return self

    def fields(self) -> dict[str, Any]:
        """Fields of `Model`."""
        step = self.interleave_moe_layer_step
        routed = range(step - 1, self.num_hidden_layers, step) if self.moe_layers is None else self.moe_layers
        dense = [layer not in routed for layer in range(self.num_hidden_layers)]
        return {
            **super().fields(), "experts": self.num_local_experts, "experts_per_token": self.num_experts_per_tok,
            "ffn_hidden": self.intermediate_size_mlp, "expert_ffn_hidden": self.intermediate_size,
            "shared_ffn_hidden": self.intermediate_size, "attention_chunk_size": self.attention_chunk_size,
            **dense_layers(dense),
        }  # fmt: skip


def dense_layers(dense: list[bool]) -> dict[str, Any]:
    """Which layers have a dense MLP: the first ones, or some in turn."""
    first = dense.index(False) if False in dense else len(dense)
    if not any(dense[first:]):
        return {"dense_layers": first}
    return {"mlp_layer_types": tuple("dense" if own else "sparse" for own in dense)}


OF_EXPERTS: dict[str, type[Family]] = {
    "deepseek_v2": _DeepSeekV2, "deepseek_v3": _DeepSeek, "gpt_oss": _GptOss, "llama4_text": _Llama4,
    "mixtral": _Mixtral, "phimoe": _PhiMoe, "qwen3_moe": _Qwen3Moe,
}  # fmt: skip
"""By `model_type`."""
OF_LATENTS = ("deepseek_v2", "deepseek_v3")
"""Of these, those with latent attention."""
EVERY_FAMILY: dict[str, type[Family]] = {**OF_GPT, **OF_LLAMA, **OF_EXPERTS}
