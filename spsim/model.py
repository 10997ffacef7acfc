"""Transformer models: dimensions, and the parameters that follow from them.

Two families share one layer: GPT (LayerNorm, learned positions, biases, tied embeddings, GeLU) and Llama
(`gated_mlp`: RMSNorm, rotary positions, no biases, untied embeddings, SwiGLU). Each trait can be set.
"""

from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from spsim.configuration import Configuration
from spsim.errors import InputError
from spsim.resources import read_toml

Size = Annotated[int, Field(ge=1, le=2**24)]


_DERIVED: Any = Field(default=None)
"""Follows from other fields unless given; see `Model._fill_defaults`."""


class Model(Configuration):
    """A decoder-only transformer; every layer is the same."""

    name: str = "custom"
    layers: Annotated[int, Field(ge=1, le=10_000)]
    hidden: Size
    ffn_hidden: Size = _DERIVED
    """Width of the MLP; 4 x hidden unless given, and required for a gated MLP."""
    heads: Annotated[int, Field(ge=1, le=2**16)]
    kv_heads: Annotated[int, Field(ge=1, le=2**16)] = _DERIVED
    head_dim: Annotated[int, Field(ge=1, le=2**14)] = _DERIVED
    vocab: Size
    gated_mlp: bool = False
    norm: Literal["layernorm", "rmsnorm"] = _DERIVED
    positions: Literal["learned", "rope", "none"] = _DERIVED
    max_positions: Size = 2048
    """Rows of the learned position table."""
    bias: bool = _DERIVED
    tied_embeddings: bool = _DERIVED
    attention: Literal["flash", "unfused"] = "flash"
    causal: bool = True
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0

    @model_validator(mode="before")
    @classmethod
    def _fill_defaults(cls, data: Any) -> Any:
        """Traits that follow from others: the family from `gated_mlp`, sizes from `hidden` and `heads`."""
        if not isinstance(data, dict):
            return data
        filled = dict(data)
        gated = filled.get("gated_mlp", False) is True
        filled.setdefault("norm", "rmsnorm" if gated else "layernorm")
        filled.setdefault("positions", "rope" if gated else "learned")
        filled.setdefault("bias", not gated)
        filled.setdefault("tied_embeddings", not gated)
        hidden, heads = filled.get("hidden"), filled.get("heads")
        if "heads" in filled:
            filled.setdefault("kv_heads", heads)
        if isinstance(hidden, int) and not gated:
            filled.setdefault("ffn_hidden", 4 * hidden)
        if gated and "ffn_hidden" not in filled:
            raise ValueError("ffn_hidden is missing; a gated MLP needs it")
        if "head_dim" not in filled and isinstance(hidden, int) and isinstance(heads, int) and heads > 0:
            if hidden % heads:
                raise ValueError(f"hidden {hidden} is not divisible by heads {heads}; change one or give head_dim")
            filled["head_dim"] = hidden // heads
        return filled

    @model_validator(mode="after")
    def _heads_fit(self) -> Self:
        if self.kv_heads > self.heads or self.heads % self.kv_heads:
            raise ValueError(f"kv_heads {self.kv_heads} must divide heads {self.heads}; change one")
        return self

    @cached_property
    def layer_parameters(self) -> int:
        """Parameters of one transformer layer."""
        norms = 2 * self.hidden * (2 if self.norm == "layernorm" else 1)
        qkv_width = (self.heads + 2 * self.kv_heads) * self.head_dim
        attention = self.hidden * qkv_width + self.heads * self.head_dim * self.hidden
        mlp = self.hidden * self.ffn_hidden * (3 if self.gated_mlp else 2)
        fc1_width = self.ffn_hidden * (2 if self.gated_mlp else 1)
        biases = qkv_width + self.hidden + fc1_width + self.hidden if self.bias else 0
        return norms + attention + mlp + biases

    @cached_property
    def parameters(self) -> int:
        """Parameters of the whole model: embeddings, layers, final norm and, if untied, the head."""
        embeddings = self.vocab * self.hidden * (1 if self.tied_embeddings else 2)
        positions = self.max_positions * self.hidden if self.positions == "learned" else 0
        final_norm = self.hidden * (2 if self.norm == "layernorm" else 1)
        return embeddings + positions + self.layers * self.layer_parameters + final_norm


def _gpt(name: str, layers: int, hidden: int, heads: int) -> Model:
    return Model(name=name, layers=layers, hidden=hidden, heads=heads, vocab=51200, attention="unfused", dropout=0.1)


def _llama(name: str, layers: int, hidden: int, ffn_hidden: int, heads: int, kv_heads: int, vocab: int) -> Model:
    return Model(
        name=name, layers=layers, hidden=hidden, ffn_hidden=ffn_hidden, heads=heads, kv_heads=kv_heads,
        vocab=vocab, gated_mlp=True,
    )  # fmt: skip


# Korthikanti et al. 2022 (arXiv:2205.05198), Table 3; Touvron et al. 2023 (arXiv:2307.09288);
# Llama Team 2024 (arXiv:2407.21783), Table 3.
PRESETS: dict[str, Model] = {
    model.name: model
    for model in (
        _gpt("gpt-22b", 48, 6144, 64),
        _gpt("gpt-175b", 96, 12288, 96),
        _gpt("gpt-530b", 105, 20480, 128),
        _gpt("gpt-1t", 128, 25600, 160),
        _llama("llama-2-7b", 32, 4096, 11008, 32, 32, 32000),
        _llama("llama-3-8b", 32, 4096, 14336, 32, 8, 128256),
        _llama("llama-3-70b", 80, 8192, 28672, 64, 8, 128256),
        _llama("llama-3-405b", 126, 16384, 53248, 128, 8, 128256),
    )
}


def load_model(name_or_path: str | Path) -> Model:
    """The model of a preset name or of a TOML file with the fields of `Model`; `InputError` otherwise."""
    text = str(name_or_path)
    if text in PRESETS:
        return PRESETS[text]
    if text.endswith(".toml"):
        table = read_toml(Path(text))
        return Model(**{"name": Path(text).stem, **table.get("model", table)})
    if text.endswith(".json"):
        raise InputError(f"model {text!r}: Hugging Face config.json is not simulated yet; give a TOML table")
    raise InputError(f"unknown model {text!r}; use one of {', '.join(PRESETS)}, or the path of a .toml table")
