"""Families of Hugging Face transformers by `model_type`: the keys that their code reads, as fields of `Model`.

A default is what that code assumes for a key that the file leaves out, and `traits` are what the code fixes. Keys that
change neither shapes nor time (initialisation, token ids, scaling of the rotations, multipliers of Granite and MiniCPM,
dtype) are passed over; a computation that is not simulated is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Self

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, model_validator

Count = Annotated[int, Field(ge=1)]
LayerCount = Annotated[int, Field(ge=1, le=10_000)]

_GELU = ("gelu", "gelu_fast", "gelu_new", "gelu_python", "gelu_pytorch_tanh")
GATED_ACTIVATIONS = {"silu": "swiglu", "swish": "swiglu", **dict.fromkeys(_GELU, "geglu")}
PLAIN_ACTIVATIONS = {"relu2": "squared_relu", **dict.fromkeys(_GELU, "gelu")}


class Family(BaseModel):
    """Keys of every family."""

    model_config = ConfigDict(frozen=True, strict=True, extra="ignore", allow_inf_nan=False)
    traits: ClassVar[Mapping[str, Any]] = {}
    activations: ClassVar[Mapping[str, str]] = PLAIN_ACTIVATIONS
    sizes: ClassVar[Mapping[str, int]] = {}
    """Of the family's first model: a table inside a multimodal file leaves out what is equal to them."""

    num_hidden_layers: LayerCount
    hidden_size: Count
    num_attention_heads: Count
    vocab_size: Count
    max_position_embeddings: Count | None = None
    """Rows of a learned table; rotary positions have none, and early LLaMA files do not have the key."""
    hidden_act: str
    tie_word_embeddings: bool = False
    is_causal: bool = True
    """Embedding models may look at all positions."""
    dropout: Annotated[float, Field(ge=0, lt=1, alias="resid_pdrop")] = 0.0
    """After attention and MLP. Flash attention drops its weights inside the kernel, at no cost."""

    @model_validator(mode="before")
    @classmethod
    def _check_names(cls, config: Any) -> Any:
        """A key under two of its names says the same."""
        for field in cls.model_fields.values():
            names = field.validation_alias.choices if isinstance(field.validation_alias, AliasChoices) else []
            given = [str(name) for name in names if name in config]
            if len({repr(config[name]) for name in given}) > 1:
                raise ValueError(f"{' and '.join(given)} are the same and differ; keep one")
        return config

    @model_validator(mode="after")
    def _check_activation(self) -> Self:
        if self.hidden_act not in self.activations:
            raise ValueError(
                f"activation {self.hidden_act!r} is not simulated yet; use one of {', '.join(self.activations)}"
            )
        return self

    @property
    def biases(self) -> tuple[bool, bool, bool]:
        """Whether q, k and v, the projection of attention's output, and the MLP have biases."""
        return True, True, True

    def fields(self) -> dict[str, Any]:
        """Fields of `Model`."""
        positions = {} if self.max_position_embeddings is None else {"max_positions": self.max_position_embeddings}
        return {
            "layers": self.num_hidden_layers, "hidden": self.hidden_size, "heads": self.num_attention_heads,
            "vocab": self.vocab_size, "dropout": self.dropout, "causal": self.is_causal,
            "tied_embeddings": self.tie_word_embeddings, "activation": self.activations[self.hidden_act],
            "qkv_bias": self.biases[0], "bias": self.biases[1], "mlp_bias": self.biases[2], **positions, **self.traits,
        }  # fmt: skip


class Rotary(Family):
    """Keys of the decoders after Llama: grouped-query attention, rotary positions, perhaps a sliding window."""

    traits: ClassVar[Mapping[str, Any]] = {"gated_mlp": True}
    activations: ClassVar[Mapping[str, str]] = GATED_ACTIVATIONS

    intermediate_size: Count
    num_key_value_heads: Count | None = None
    head_dim: Count | None = None
    hidden_act: str = "silu"
    sliding_window: Count | None = None
    use_sliding_window: bool = True
    layer_types: list[str] | None = None
    further_types: ClassVar[tuple[str, ...]] = ()

    @model_validator(mode="after")
    def _check_layers(self) -> Self:
        if self.layer_types is None:
            return self
        others = set(self.layer_types) - {"full_attention", "sliding_attention", *self.further_types}
        if others:
            raise ValueError(f"layer_types: {min(others)!r} is not simulated yet; use 'full_attention'")
        if len(self.layer_types) != self.num_hidden_layers:
            raise ValueError(
                f"layer_types: names {len(self.layer_types)} layers where num_hidden_layers is "
                f"{self.num_hidden_layers}; make them equal"
            )
        return self

    @property
    def biases(self) -> tuple[bool, bool, bool]:
        return False, False, False

    @property
    def first_sliding(self) -> int:
        """Number of the first layer whose attention has the window, where `layer_types` does not say."""
        return 0

    @property
    def turns(self) -> tuple[str, ...]:
        """Type of attention of each layer."""
        if self.sliding_window is None or not self.use_sliding_window:
            return ("full_attention",)
        first = min(self.first_sliding, self.num_hidden_layers)
        sliding = (self.num_hidden_layers - first) * ("sliding_attention",)
        return tuple(self.layer_types or (*first * ("full_attention",), *sliding))

    def fields(self) -> dict[str, Any]:
        slides = self.sliding_window is not None
        optional = {
            "kv_heads": self.num_key_value_heads, "head_dim": self.head_dim,
            "sliding_window": self.sliding_window, "layer_types": self.turns if slides else None,
        }  # fmt: skip
        given = {name: value for name, value in optional.items() if value is not None}
        return {**super().fields(), "ffn_hidden": self.intermediate_size, **given}


def sizes_of(hidden: int, mlp: int, layers: int, heads: int, kv_heads: int | None, vocab: int) -> dict[str, int]:
    """Without KV heads where the code takes as many as heads."""
    sizes = {
        "hidden_size": hidden, "intermediate_size": mlp, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "vocab_size": vocab,
    }  # fmt: skip
    return {name: size for name, size in sizes.items() if size is not None}


class Mistral(Rotary):
    sizes: ClassVar[Mapping[str, int]] = sizes_of(4096, 14336, 32, 32, 8, 32000)
    num_key_value_heads: Count | None
    sliding_window: Count | None = 4096


class _Ministral3(Rotary):
    sizes: ClassVar[Mapping[str, int]] = sizes_of(4096, 14336, 34, 32, 8, 131072)
    num_key_value_heads: Count | None
    head_dim: Count | None = 128


class _Phi3(Rotary):
    sizes: ClassVar[Mapping[str, int]] = sizes_of(3072, 8192, 32, 32, None, 32064)


class _Qwen2(Rotary):
    sizes: ClassVar[Mapping[str, int]] = sizes_of(4096, 22016, 32, 32, 32, 151936)
    num_key_value_heads: Count | None
    use_sliding_window: bool = False
    sliding_window: Count | None = 4096
    max_window_layers: Annotated[int, Field(ge=0)] = 28

    @property
    def biases(self) -> tuple[bool, bool, bool]:
        return True, False, False

    @property
    def first_sliding(self) -> int:
        return self.max_window_layers


class _Qwen2VL(_Qwen2):
    sizes: ClassVar[Mapping[str, int]] = sizes_of(8192, 29568, 80, 64, 8, 152064)
    max_window_layers: Annotated[int, Field(ge=0)] = 80


class Llama(Rotary):
    """Granite too: its multipliers of embeddings, residuals and logits move nothing and cost next to nothing."""

    sizes: ClassVar[Mapping[str, int]] = sizes_of(4096, 11008, 32, 32, None, 32000)
    attention_bias: bool = False
    mlp_bias: bool = False

    @property
    def biases(self) -> tuple[bool, bool, bool]:
        return self.attention_bias, self.attention_bias, self.mlp_bias


class _LlamaLike(Llama):
    """Code beside the weights."""

    sizes: ClassVar[Mapping[str, int]] = {}


class _Exaone(Llama):
    sizes: ClassVar[Mapping[str, int]] = sizes_of(4096, 14336, 32, 32, 8, 102400)
    num_hidden_layers: LayerCount = Field(validation_alias=AliasChoices("num_layers", "num_hidden_layers"))
    hidden_act: str = Field("silu", validation_alias=AliasChoices("activation_function", "hidden_act"))


class _HunYuan(Llama):
    """Its norms of q and k stand behind the rotation, at the same cost."""

    traits: ClassVar[Mapping[str, Any]] = {"gated_mlp": True, "qk_norm": True}
    sizes: ClassVar[Mapping[str, int]] = sizes_of(4096, 11008, 32, 32, None, 290943)


class _Glm(Llama):
    sizes: ClassVar[Mapping[str, int]] = sizes_of(4096, 13696, 40, 32, 2, 151552)
    head_dim: Count | None = 128
    attention_bias: bool = True

    @property
    def biases(self) -> tuple[bool, bool, bool]:
        return self.attention_bias, False, False


class _SeedOss(Llama):
    sizes: ClassVar[Mapping[str, int]] = sizes_of(4096, 27648, 64, 80, 8, 155136)
    num_key_value_heads: Count | None
    head_dim: Count | None = 128
    attention_bias: bool = True
    attention_out_bias: bool = False
    dropout: Annotated[float, Field(ge=0, lt=1, alias="residual_dropout")] = 0.1

    @property
    def biases(self) -> tuple[bool, bool, bool]:
        return self.attention_bias, self.attention_out_bias, self.mlp_bias


class _InternLM2(Rotary):
    bias: bool = True
    """Of attention."""

    @property
    def biases(self) -> tuple[bool, bool, bool]:
        return self.bias, self.bias, False


class _InternLM3(Rotary):
    qkv_bias: bool = Field(False, validation_alias=AliasChoices("qkv_bias", "attention_bias"))
    bias: bool = Field(False, validation_alias=AliasChoices("bias", "mlp_bias"))
    head_dim: Count | None = 128

    @property
    def biases(self) -> tuple[bool, bool, bool]:
        return self.qkv_bias, self.bias, self.bias


class _Ernie(Rotary):
    use_bias: bool = False
    head_dim: Count | None = 128
    tie_word_embeddings: bool = True

    @property
    def biases(self) -> tuple[bool, bool, bool]:
        return self.use_bias, self.use_bias, self.use_bias


class Qwen3(Llama):
    traits: ClassVar[Mapping[str, Any]] = {"gated_mlp": True, "qk_norm": True}
    sizes: ClassVar[Mapping[str, int]] = sizes_of(4096, 22016, 32, 32, 32, 151936)
    num_key_value_heads: Count | None
    head_dim: Count | None = 128
    use_sliding_window: bool = False
    sliding_window: Count | None = 4096
    max_window_layers: Annotated[int, Field(ge=0)] = 28

    @property
    def first_sliding(self) -> int:
        return self.max_window_layers


class _Gemma(Llama):
    sizes: ClassVar[Mapping[str, int]] = sizes_of(3072, 24576, 28, 16, 16, 256000)
    num_key_value_heads: Count | None
    head_dim: Count | None = 256
    hidden_act: str = "gelu_pytorch_tanh"
    tie_word_embeddings: bool = True


class _Gemma2(_Gemma):
    """Caps of scores and logits move nothing and cost next to nothing."""

    traits: ClassVar[Mapping[str, Any]] = {"gated_mlp": True, "norms": "both"}
    sizes: ClassVar[Mapping[str, int]] = sizes_of(2304, 9216, 26, 8, 4, 256000)
    hidden_act: str = Field("gelu_pytorch_tanh", validation_alias=AliasChoices("hidden_activation", "hidden_act"))
    sliding_window: Count | None = 4096
    sliding_window_pattern: LayerCount = Field(
        2, validation_alias=AliasChoices("sliding_window_pattern", "_sliding_window_pattern")
    )
    use_bidirectional_attention: bool | None = None

    @model_validator(mode="after")
    def _check_direction(self) -> Self:
        if self.use_bidirectional_attention:
            raise ValueError("use_bidirectional_attention: windows to both sides are not simulated; use a causal model")
        return self

    @property
    def turns(self) -> tuple[str, ...]:
        """See `Rotary`: all but the last of so many layers have the window."""
        usual = (self.sliding_window_pattern - 1) * ("sliding_attention",) + ("full_attention",)
        return super().turns if self.layer_types else usual


class _Gemma3(_Gemma2):
    traits: ClassVar[Mapping[str, Any]] = {"gated_mlp": True, "norms": "both", "qk_norm": True}
    sizes: ClassVar[Mapping[str, int]] = sizes_of(2304, 9216, 26, 8, 4, 262208)
    sliding_window_pattern: LayerCount = Field(
        6, validation_alias=AliasChoices("sliding_window_pattern", "_sliding_window_pattern")
    )


class _Glm4(_Glm):
    traits: ClassVar[Mapping[str, Any]] = {"gated_mlp": True, "norms": "both"}
    sizes: ClassVar[Mapping[str, int]] = sizes_of(4096, 13696, 40, 32, 2, 151552)


class _Olmo2(Llama):
    """Its norms of q and k are over all heads together."""

    traits: ClassVar[Mapping[str, Any]] = {
        "gated_mlp": True, "norms": "post", "qk_norm": True, "qk_norm_over": "heads"
    }  # fmt: skip
    sizes: ClassVar[Mapping[str, int]] = sizes_of(4096, 11008, 32, 32, None, 50304)


class _Cohere(Llama):
    traits: ClassVar[Mapping[str, Any]] = {
        "gated_mlp": True, "norm": "layernorm", "norm_bias": False, "parallel_residual": True, "shared_norm": True,
    }  # fmt: skip
    sizes: ClassVar[Mapping[str, int]] = sizes_of(8192, 22528, 40, 64, None, 256000)
    tie_word_embeddings: bool = True
    use_qk_norm: bool = False

    @model_validator(mode="after")
    def _check_head_norms(self) -> Self:
        if self.use_qk_norm:
            raise ValueError("use_qk_norm: a weight of its own for each head is not simulated; use a model without it")
        return self


class _StableLM(Rotary):
    traits: ClassVar[Mapping[str, Any]] = {"gated_mlp": True, "norm": "layernorm"}

    dropout: Annotated[float, Field(ge=0, lt=1, alias="hidden_dropout")] = 0.0
    use_qkv_bias: bool = False
    qk_layernorm: bool = False
    use_parallel_residual: bool = False

    @model_validator(mode="after")
    def _check_blocks(self) -> Self:
        for key in ("qk_layernorm", "use_parallel_residual"):
            if getattr(self, key):
                raise ValueError(f"{key} is not simulated yet in this family; use a model without it")
        return self

    @property
    def biases(self) -> tuple[bool, bool, bool]:
        return self.use_qkv_bias, False, False


OF_LLAMA: dict[str, type[Family]] = {
    "aquila": _LlamaLike, "ernie4_5": _Ernie, "exaone": _Exaone, "cohere": _Cohere,
    "gemma": _Gemma, "gemma2": _Gemma2, "gemma3_text": _Gemma3, "glm": _Glm, "glm4": _Glm4, "granite": Llama,
    "hunyuan_v1_dense": _HunYuan, "internlm": _InternLM2, "internlm2": _InternLM2, "internlm3": _InternLM3,
    "llama": Llama, "minicpm": _LlamaLike, "ministral": Mistral, "ministral3": _Ministral3, "mistral": Mistral,
    "olmo2": _Olmo2, "phi3": _Phi3, "qwen2": _Qwen2, "qwen2_vl": _Qwen2VL,
    "qwen2_vl_text": _Qwen2VL,
    "qwen2_5_vl": _Qwen2VL, "qwen2_5_vl_text": _Qwen2VL, "qwen3": Qwen3, "qwen3_vl_text": Qwen3,
    "seed_oss": _SeedOss, "stablelm": _StableLM, "xverse": _LlamaLike, "Yi": _LlamaLike,
}  # fmt: skip
"""By `model_type`."""
