"""Reads the config.json of Hugging Face transformers: the fields of `Model` that it says.

A family is a table of the keys that its code reads; a default is what that code assumes for a key that the
file leaves out, and `traits` are what the code fixes. Keys that change neither shapes nor time (initialisation,
token ids, scaling of the rotations, dtype) are passed over; a computation that is not simulated is refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from spsim.errors import InputError, first_problem
from spsim.inputs.resources import read_text

Count = Annotated[int, Field(ge=1)]

_GELU = ("gelu", "gelu_fast", "gelu_new", "gelu_python", "gelu_pytorch_tanh")
GATED_ACTIVATIONS = {"silu": "swiglu", "swish": "swiglu", **dict.fromkeys(_GELU, "geglu")}
PLAIN_ACTIVATIONS = {"relu2": "squared_relu", **dict.fromkeys(_GELU, "gelu")}

NOT_SIMULATED = {
    "mixture of experts": ("num_experts", "num_local_experts", "n_routed_experts", "moe_"),
    "latent attention": ("kv_lora_rank", "q_lora_rank"),
    "cross attention": ("add_cross_attention", "is_encoder_decoder"),
    "quantised weights": ("quantization_config",),
}
"""Part of a model -> beginnings of the keys that bring it."""

_LOCAL_AND_GLOBAL = "layers with local and with global attention, and norms after attention and MLP"
NOT_SIMULATED_FAMILIES = dict.fromkeys(("gemma2", "gemma3", "gemma3_text"), _LOCAL_AND_GLOBAL)


class _Config(BaseModel):
    """Keys of every family."""

    model_config = ConfigDict(frozen=True, strict=True, extra="ignore", allow_inf_nan=False)
    traits: ClassVar[Mapping[str, Any]] = {}
    activations: ClassVar[Mapping[str, str]] = PLAIN_ACTIVATIONS

    num_hidden_layers: Count
    hidden_size: Count
    num_attention_heads: Count
    vocab_size: Count
    max_position_embeddings: Count
    hidden_act: str
    tie_word_embeddings: bool = False
    dropout: Annotated[float, Field(ge=0, lt=1, alias="resid_pdrop")] = 0.0
    """After attention and MLP. Flash attention drops its weights inside the kernel, at no cost."""

    @model_validator(mode="after")
    def _check_activation(self) -> Self:
        if self.hidden_act not in self.activations:
            raise ValueError(
                f"activation {self.hidden_act!r} is not simulated yet; use one of {', '.join(self.activations)}"
            )
        return self

    def fields(self) -> dict[str, Any]:
        """Fields of `Model`."""
        return {
            "layers": self.num_hidden_layers, "hidden": self.hidden_size, "heads": self.num_attention_heads,
            "vocab": self.vocab_size, "max_positions": self.max_position_embeddings, "dropout": self.dropout,
            "tied_embeddings": self.tie_word_embeddings, "activation": self.activations[self.hidden_act],
            **self.traits,
        }  # fmt: skip


class _GPT2(_Config):
    num_hidden_layers: Count = Field(alias="n_layer")
    hidden_size: Count = Field(alias="n_embd")
    num_attention_heads: Count = Field(alias="n_head")
    max_position_embeddings: Count = Field(alias="n_positions")
    intermediate_size: Count | None = Field(None, alias="n_inner")
    hidden_act: str = Field("gelu_new", alias="activation_function")
    tie_word_embeddings: bool = True
    dropout: Annotated[float, Field(ge=0, lt=1, alias="resid_pdrop")] = 0.1

    def fields(self) -> dict[str, Any]:
        return {**super().fields(), "ffn_hidden": self.intermediate_size or 4 * self.hidden_size}


class _GPTNeoX(_Config):
    traits: ClassVar[Mapping[str, Any]] = {"positions": "rope"}

    intermediate_size: Count
    dropout: Annotated[float, Field(ge=0, lt=1, alias="hidden_dropout")] = 0.0
    use_parallel_residual: bool = True
    attention_bias: bool = True

    @model_validator(mode="after")
    def _check_bias(self) -> Self:
        _equal_biases(attention=self.attention_bias, mlp=True)
        return self

    def fields(self) -> dict[str, Any]:
        return {
            **super().fields(),
            "ffn_hidden": self.intermediate_size,
            "parallel_residual": self.use_parallel_residual,
        }


class _Gated(_Config):
    """Keys of the decoders after Llama: grouped-query attention, rotary positions, perhaps a sliding window."""

    traits: ClassVar[Mapping[str, Any]] = {"gated_mlp": True}
    activations: ClassVar[Mapping[str, str]] = GATED_ACTIVATIONS

    intermediate_size: Count
    num_key_value_heads: Count | None
    head_dim: Count | None = None
    hidden_act: str = "silu"
    sliding_window: Count | None = None
    use_sliding_window: bool = True
    layer_types: list[str] | None = None

    @model_validator(mode="after")
    def _check_window(self) -> Self:
        others = set(self.layer_types or ()) - {"full_attention", "sliding_attention"}
        if others:
            raise ValueError(f"layer_types: {min(others)!r} is not simulated yet; use 'full_attention'")
        window, longest = self.sliding_window, self.max_position_embeddings
        if self.use_sliding_window and window is not None and window < longest:
            which = "in some layers " if len(set(self.layer_types or ())) > 1 else ""
            raise ValueError(
                f"sliding_window {window} is below max_position_embeddings {longest}: local attention {which}"
                "is not simulated yet; set it to null for attention to the whole sequence"
            )
        return self

    def fields(self) -> dict[str, Any]:
        optional = {"kv_heads": self.num_key_value_heads, "head_dim": self.head_dim}
        given = {name: value for name, value in optional.items() if value is not None}
        return {**super().fields(), "ffn_hidden": self.intermediate_size, **given}


class _Mistral(_Gated):
    sliding_window: Count | None = 4096


class _Phi3(_Gated):
    num_key_value_heads: Count | None = None


class _Qwen2(_Gated):
    traits: ClassVar[Mapping[str, Any]] = {"gated_mlp": True, "qkv_bias": True}

    use_sliding_window: bool = False


class _Llama(_Gated):
    num_key_value_heads: Count | None = None
    attention_bias: bool = False
    mlp_bias: bool = False

    @model_validator(mode="after")
    def _check_bias(self) -> Self:
        _equal_biases(attention=self.attention_bias, mlp=self.mlp_bias)
        return self

    def fields(self) -> dict[str, Any]:
        return {**super().fields(), "bias": self.attention_bias}


class _Qwen3(_Llama):
    traits: ClassVar[Mapping[str, Any]] = {"gated_mlp": True, "qk_norm": True}

    num_key_value_heads: Count | None
    head_dim: Count | None = 128
    use_sliding_window: bool = False


class _Gemma(_Llama):
    num_key_value_heads: Count | None
    head_dim: Count | None = 256
    hidden_act: str = "gelu_pytorch_tanh"
    tie_word_embeddings: bool = True


class _Nemotron(_Llama):
    traits: ClassVar[Mapping[str, Any]] = {"positions": "rope"}
    activations: ClassVar[Mapping[str, str]] = PLAIN_ACTIVATIONS

    hidden_act: str = "relu2"


FAMILIES: dict[str, type[_Config]] = {
    "gemma": _Gemma,
    "gpt2": _GPT2,
    "gpt_neox": _GPTNeoX,
    "llama": _Llama,
    "mistral": _Mistral,
    "nemotron": _Nemotron,
    "phi3": _Phi3,
    "qwen2": _Qwen2,
    "qwen3": _Qwen3,
}
"""By `model_type`."""


def read_config(path: Path) -> dict[str, Any]:
    """The fields of `Model` that a config.json says; `InputError` names the file and the key."""
    config = _read_json(path)
    parts = [f"{part} ({key})" for part, key in _not_simulated(config)]
    if parts:
        raise InputError(f"{path}: not simulated yet: {', '.join(parts)}; use a dense model")
    family = config.get("model_type")
    if not isinstance(family, str):
        raise InputError(f"{path}: model_type: required, a word such as 'llama'; got {family!r}")
    if family in NOT_SIMULATED_FAMILIES:
        raise InputError(f"{path}: model_type {family!r}: {NOT_SIMULATED_FAMILIES[family]} are not simulated yet")
    if family not in FAMILIES:
        raise InputError(f"{path}: model_type {family!r} is not simulated yet; use one of {', '.join(FAMILIES)}")
    try:
        return FAMILIES[family].model_validate(config).fields()
    except ValidationError as error:
        raise first_problem(error, str(path)) from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(read_text(path))
    except InputError:
        raise
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise InputError(f"{path}: not the config of a model; expected a JSON object")
    return config


def _not_simulated(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(part, key) of what no family can express; a key of 0, false or null asks for nothing."""
    for part, beginnings in NOT_SIMULATED.items():
        key = next((key for key, value in config.items() if value and key.startswith(beginnings)), None)
        if key is not None:
            yield part, key


def _equal_biases(*, attention: bool, mlp: bool) -> None:
    if attention != mlp:
        raise ValueError(
            f"attention_bias is {str(attention).lower()} where the MLP's is {str(mlp).lower()}: "
            "biases in one of the two are not simulated yet; make them equal"
        )
