"""Keys of a config.json of decoders whose MLP has no gate, as those before Llama."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Self

from pydantic import AliasChoices, Field, model_validator

from spsim.inputs.families import PLAIN_ACTIVATIONS, Count, Family, LayerCount, Llama, Rotary, sizes_of


class _GPT2(Family):
    num_hidden_layers: LayerCount = Field(validation_alias=AliasChoices("n_layer", "num_hidden_layers"))
    hidden_size: Count = Field(validation_alias=AliasChoices("n_embd", "hidden_size"))
    num_attention_heads: Count = Field(validation_alias=AliasChoices("n_head", "num_attention_heads"))
    max_position_embeddings: Count = Field(validation_alias=AliasChoices("n_positions", "max_position_embeddings"))
    intermediate_size: Count | None = Field(None, alias="n_inner")
    hidden_act: str = Field("gelu_new", alias="activation_function")
    tie_word_embeddings: bool = True
    dropout: Annotated[float, Field(ge=0, lt=1, alias="resid_pdrop")] = 0.1

    def fields(self) -> dict[str, Any]:
        return {**super().fields(), "ffn_hidden": self.intermediate_size or 4 * self.hidden_size}


class _GPTBigCode(_GPT2):
    multi_query: bool = True

    def fields(self) -> dict[str, Any]:
        return {**super().fields(), "kv_heads": 1 if self.multi_query else self.num_attention_heads}


class _GPTNeoX(Family):
    traits: ClassVar[Mapping[str, Any]] = {"positions": "rope"}

    intermediate_size: Count
    dropout: Annotated[float, Field(ge=0, lt=1, alias="hidden_dropout")] = 0.0
    use_parallel_residual: bool = True
    attention_bias: bool = True

    @property
    def biases(self) -> tuple[bool, bool, bool]:
        return self.attention_bias, self.attention_bias, True

    def fields(self) -> dict[str, Any]:
        own = {"ffn_hidden": self.intermediate_size, "parallel_residual": self.use_parallel_residual}
        return {**super().fields(), **own}


class _GPTJ(_GPT2):
    """No biases in attention, and one norm for attention and MLP."""

    traits: ClassVar[Mapping[str, Any]] = {
        "positions": "rope", "parallel_residual": True, "shared_norm": True, "head_bias": True
    }  # fmt: skip
    tie_word_embeddings: bool = False
    dropout: Annotated[float, Field(ge=0, lt=1, alias="resid_pdrop")] = 0.0

    @property
    def biases(self) -> tuple[bool, bool, bool]:
        return False, False, True


class _OPT(Family):
    """Its table of positions has two rows more than positions."""

    activations: ClassVar[Mapping[str, str]] = {"relu": "relu", **PLAIN_ACTIVATIONS}
    ffn_dim: Count
    hidden_act: str = Field("relu", alias="activation_function")
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    tie_word_embeddings: bool = True
    do_layer_norm_before: bool = True
    word_embed_proj_dim: Count | None = None
    enable_bias: bool = True
    layer_norm_elementwise_affine: bool = True
    remove_final_layer_norm: bool = Field(False, alias="_remove_final_layer_norm")

    @model_validator(mode="after")
    def _check_blocks(self) -> Self:
        for key, value, only in (
            ("do_layer_norm_before", self.do_layer_norm_before, True),
            ("word_embed_proj_dim", self.word_embed_proj_dim or self.hidden_size, self.hidden_size),
            ("layer_norm_elementwise_affine", self.layer_norm_elementwise_affine, True),
            ("_remove_final_layer_norm", self.remove_final_layer_norm, False),
        ):
            if value != only:
                raise ValueError(f"{key} = {value} is not simulated in this family; use a model with {only}")
        return self

    @property
    def biases(self) -> tuple[bool, bool, bool]:
        return (self.enable_bias,) * 3

    def fields(self) -> dict[str, Any]:
        rows = {"max_positions": self.max_position_embeddings + 2} if self.max_position_embeddings else {}
        return {**super().fields(), "ffn_hidden": self.ffn_dim, **rows}


class _Falcon(Family):
    traits: ClassVar[Mapping[str, Any]] = {"positions": "rope"}

    num_hidden_layers: LayerCount = Field(validation_alias=AliasChoices("num_hidden_layers", "n_layer"))
    num_attention_heads: Count = Field(validation_alias=AliasChoices("num_attention_heads", "n_head"))
    num_kv_heads: Count | None = None
    ffn_hidden_size: Count | None = None
    hidden_act: str = Field("gelu", alias="activation")
    dropout: Annotated[float, Field(ge=0, lt=1, alias="hidden_dropout")] = 0.0
    tie_word_embeddings: bool = True
    alibi: bool = False
    new_decoder_architecture: bool = False
    num_ln_in_parallel_attn: Count | None = None
    multi_query: bool = True
    parallel_attn: bool = True
    bias: bool = False

    @model_validator(mode="after")
    def _check_positions(self) -> Self:
        if self.alibi:
            raise ValueError("alibi: positions as biases of scores are not simulated; use a model with rotations")
        return self

    @property
    def biases(self) -> tuple[bool, bool, bool]:
        return (self.bias,) * 3

    def fields(self) -> dict[str, Any]:
        new, heads = self.new_decoder_architecture, self.num_attention_heads
        of_keys = (self.num_kv_heads or heads) if new else 1 if self.multi_query else heads
        norms = (self.num_ln_in_parallel_attn or 2) if new else 1
        return {
            **super().fields(), "kv_heads": of_keys, "ffn_hidden": self.ffn_hidden_size or 4 * self.hidden_size,
            "parallel_residual": new or self.parallel_attn,
            "shared_norm": (new or self.parallel_attn) and norms == 1,
        }  # fmt: skip


class _Plain(Rotary):
    """Rotary positions and grouped queries with an MLP without gate."""

    traits: ClassVar[Mapping[str, Any]] = {"positions": "rope"}
    activations: ClassVar[Mapping[str, str]] = PLAIN_ACTIVATIONS


class _StarCoder2(_Plain):
    hidden_act: str = "gelu_pytorch_tanh"
    dropout: Annotated[float, Field(ge=0, lt=1, alias="residual_dropout")] = 0.0
    use_bias: bool = True
    tie_word_embeddings: bool = True

    @property
    def biases(self) -> tuple[bool, bool, bool]:
        return self.use_bias, self.use_bias, self.use_bias


class _Nemotron(_Plain, Llama):
    sizes: ClassVar[Mapping[str, int]] = sizes_of(6144, 24576, 32, 48, None, 256000)
    hidden_act: str = "relu2"


class _Arcee(_Nemotron):
    traits: ClassVar[Mapping[str, Any]] = {"positions": "rope", "norm": "rmsnorm"}
    sizes: ClassVar[Mapping[str, int]] = sizes_of(2560, 18432, 32, 32, None, 32000)


OF_GPT: dict[str, type[Family]] = {
    "arcee": _Arcee, "nemotron": _Nemotron, "starcoder2": _StarCoder2,
    "falcon": _Falcon, "gpt2": _GPT2, "gpt_bigcode": _GPTBigCode, "gpt_neox": _GPTNeoX, "gptj": _GPTJ, "opt": _OPT,
}  # fmt: skip
"""By `model_type`."""
