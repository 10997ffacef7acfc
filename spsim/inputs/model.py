"""Transformer models: dimensions, and the parameters that follow from them.

Two families share one layer: GPT (LayerNorm, learned positions, biases, tied embeddings, GeLU) and Llama
(`gated_mlp`: RMSNorm, rotary positions, no biases, untied embeddings, SwiGLU). Each trait can be set. Variants
of equal shape and cost are one: LayerNorm1p and Gemma's RMSNorm, exact and approximate GeLU, rotation of a
part of the head.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from functools import cached_property, lru_cache
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self, TypeVar

from pydantic import Field, model_validator

from spsim.inputs import parameters, words
from spsim.inputs.configuration import Configuration, Name
from spsim.inputs.traits import check_traits
from spsim.work import AttentionKernel, Framework

Size = Annotated[int, Field(ge=1, le=2**24)]
Activation = Literal["gelu", "relu", "squared_relu", "swiglu", "geglu"]
Attention = Literal["flash", "unfused", AttentionKernel]
AttentionType = Literal["full_attention", "sliding_attention"]
MlpType = Literal["dense", "sparse"]
"""Of layers, as `layer_types` and `mlp_layer_types` of Hugging Face name them."""


T = TypeVar("T")


class LayerType(NamedTuple):
    """What a layer has otherwise than the model says of its layers."""

    dense: bool = False
    """Its MLP is dense, in a model whose other layers have experts."""
    full: bool = False
    """Its attention looks at all positions, in a model whose other layers have a window."""


_DERIVED: Any = Field(default=None)
"""Follows from other fields unless given; see `Model.filled`."""


class Model(Configuration):
    """A decoder-only transformer, whose layers may differ in having experts or a dense MLP, and a window or none."""

    words: ClassVar[Mapping[str, Iterable[str]]] = words.MODEL

    name: Name = "custom"
    layers: Annotated[int, Field(ge=1, le=10_000)]
    hidden: Size
    ffn_hidden: Size = _DERIVED
    """Width of the MLP; 4 x hidden unless given, and required for a gated MLP."""
    experts: Annotated[int, Field(ge=2, le=2**16)] | None = None
    """MLPs of a layer, of which a router picks `experts_per_token` for each token; one dense MLP unless given."""
    experts_per_token: Annotated[int, Field(ge=1, le=2**16)] | None = None
    expert_ffn_hidden: Size | None = _DERIVED
    """Width of an expert; as `ffn_hidden` unless given."""
    shared_ffn_hidden: Annotated[int, Field(ge=0, le=2**24)] = 0
    """Width of the MLP of a layer of experts that every token goes through beside them."""
    dense_layers: Annotated[int, Field(ge=0, le=10_000)] = 0
    """First layers whose MLP is dense."""
    mlp_layer_types: Annotated[tuple[MlpType, ...], Field(min_length=1, strict=False)] | None = None
    """Of the layers in turn, over again until there are as many, whether their MLP is dense or experts (`sparse`)."""
    mtp_layers: Annotated[int, Field(ge=0, le=1)] = 0
    """Layers beside these that predict a further token, with a projection and a head (multi-token prediction)."""
    heads: Annotated[int, Field(ge=1, le=2**16)]
    kv_heads: Annotated[int, Field(ge=1, le=2**16)] = _DERIVED
    head_dim: Annotated[int, Field(ge=1, le=2**14)] = _DERIVED
    """Width of a head of q and k, and of v unless `v_head_dim` says otherwise."""
    q_lora_rank: Size | None = None
    """Width of the latent that q is projected up from, in latent attention; from the hidden states unless given."""
    kv_lora_rank: Size | None = None
    """Width of the latent that k and v are projected up from: multi-head latent attention (DeepSeek-AI 2024,
    arXiv:2405.04434, section 2.1), whose heads have `qk_nope_head_dim` + `qk_rope_head_dim` of q and k."""
    qk_nope_head_dim: Annotated[int, Field(ge=1, le=2**14)] | None = None
    """Of a head, what is not rotated."""
    qk_rope_head_dim: Annotated[int, Field(ge=1, le=2**14)] | None = None
    """Of a head, what is rotated; of k one for all heads."""
    v_head_dim: Annotated[int, Field(ge=1, le=2**14)] = _DERIVED
    """Width of a head of v; as `head_dim` unless given."""
    vocab: Size
    gated_mlp: bool = False
    activation: Activation = _DERIVED
    norm: Literal["layernorm", "rmsnorm"] = _DERIVED
    norm_bias: bool = _DERIVED
    """Of LayerNorm; there is one unless given."""
    norms: Literal["pre", "post", "both"] = "pre"
    """Of what attention and MLP read, of what they make before it is added (OLMo 2), or both (Gemma 2, GLM-4)."""
    positions: Literal["learned", "rope", "none"] = _DERIVED
    max_positions: Size = 2048
    """Rows of the learned position table."""
    bias: bool = _DERIVED
    """Of every linear, q, k and v apart if `qkv_bias` says so, the MLP if `mlp_bias` does."""
    qkv_bias: bool = _DERIVED
    """Of the q, k and v projections (Qwen2); as the others unless given."""
    mlp_bias: bool = _DERIVED
    """Of the linears of the MLP, of experts and their router; as the others unless given."""
    qk_norm: bool = False
    """RMSNorm over the head size of q and k, before the rotation (Qwen3)."""
    qk_norm_over: Literal["head", "heads"] = "head"
    """Each head by itself, or all heads of q or of k together, with a weight for each number (OLMo 2)."""
    parallel_residual: bool = False
    """Attention and MLP read the same input through a norm each: x + attention + MLP (GPT-NeoX)."""
    shared_norm: bool = False
    """Of a parallel residual there is one norm for both (GPT-J, Falcon 7B, Cohere)."""
    tied_embeddings: bool = _DERIVED
    """The output head is the embedding."""
    head_rows: Annotated[int, Field(ge=0, le=2**24)] = _DERIVED
    """Of the output head: the vocabulary unless given, 0 without a head, the labels of a classifier."""
    head_bias: bool = False
    """One number a row of the head."""
    attention: Attention = "flash"
    """`flash`: the fused kernel that Transformer Engine picks on the hardware; or a kernel of the profile by name."""
    sliding_window: Size | None = None
    """Keys that a query looks back at, itself included; of layers of `sliding_attention` where `layer_types` are given.
    Unfused attention computes all scores and masks those outside."""
    layer_types: Annotated[tuple[AttentionType, ...], Field(min_length=1, strict=False)] | None = None
    """Of the layers in turn, over again until there are as many, whether they have the window."""
    attention_chunk_size: Size | None = None
    """Keys of a query are those of its chunk of so many positions. Sequences that are longer are refused."""
    attention_sinks: bool = False
    """The softmax of each head has one learned number beside its scores (gpt-oss; `softmax_type = learnable` of
    Transformer Engine)."""
    kernels: Literal["fused", "eager", "compiled"] | None = None
    """What a norm, an activation, a rotation, a residual and unfused attention run as: a kernel each, as Megatron-Core
    and Transformer Engine have them, the single operations of torch, or what torch.compile makes of those. The
    library's own unless given, of Megatron-Core `fused`."""
    composite_norm: bool | None = None
    """Eager RMSNorm of single operations in fp32, as in transformers, in place of torch's kernel."""
    glu_offset: bool | None = None
    """Eager gated activations add an offset to the up projection, in a tensor of its own, as Megatron-Core does
    (`glu_linear_offset`), by default of 0."""
    repeat_kv: bool | None = None
    """Unfused attention has K and V written out for the heads of Q that share them, as Megatron-Core and transformers
    do; unless given where kernels are eager."""
    causal: bool = True
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    documents: tuple[int, ...] | None = Field(default=None, exclude=True, repr=False)
    """Those of the workload, where sequences are packed of several."""
    left_out: Name = ""
    """Parts of a larger model that are not simulated, such as its vision tower; results say so in a note."""

    @model_validator(mode="before")
    @classmethod
    def _fill_defaults(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        filled = cls.filled(data)
        if filled.get("gated_mlp", False) is True and "ffn_hidden" not in filled:
            raise ValueError("ffn_hidden is missing; a gated MLP needs it")
        hidden, heads = filled.get("hidden"), filled.get("heads")
        if filled.get("kv_lora_rank") is not None and "head_dim" not in filled:
            raise ValueError("kv_lora_rank needs qk_nope_head_dim and qk_rope_head_dim; give both")
        if "head_dim" not in filled and isinstance(hidden, int) and isinstance(heads, int) and heads > 0:
            raise ValueError(f"hidden {hidden} is not divisible by heads {heads}; change one or give head_dim")
        return filled

    def __repr_args__(self) -> Iterable[tuple[str, Any]]:
        """What is no default and does not follow from the rest."""
        shown = self.differing
        others = ({name: value for name, value in shown.items() if name != own} for own in shown)
        return [
            item for item, rest in zip(shown.items(), others, strict=True) if self.filled(rest).get(item[0]) != item[1]
        ]

    @staticmethod
    def filled(data: Mapping[str, Any]) -> dict[str, Any]:
        """With the traits that follow from others: the family from `gated_mlp`, sizes from `hidden` and `heads`."""
        filled = dict(data)
        gated = filled.get("gated_mlp", False) is True
        filled.setdefault("activation", "swiglu" if gated else "gelu")
        filled.setdefault("norm", "rmsnorm" if gated else "layernorm")
        filled.setdefault("positions", "rope" if gated else "learned")
        filled.setdefault("bias", not gated)
        filled.setdefault("qkv_bias", filled["bias"])
        filled.setdefault("mlp_bias", filled["bias"])
        filled.setdefault("norm_bias", filled["norm"] == "layernorm")
        filled.setdefault("tied_embeddings", not gated)
        hidden, heads = filled.get("hidden"), filled.get("heads")
        for name, source in (("kv_heads", "heads"), ("head_rows", "vocab")):
            if source in filled:
                filled.setdefault(name, filled[source])
        if isinstance(hidden, int) and not gated:
            filled.setdefault("ffn_hidden", 4 * hidden)
        if filled.get("experts") is not None and "ffn_hidden" in filled:
            filled.setdefault("expert_ffn_hidden", filled["ffn_hidden"])
        if filled.get("kv_lora_rank") is not None:
            nope, rope = filled.get("qk_nope_head_dim"), filled.get("qk_rope_head_dim")
            if isinstance(nope, int) and isinstance(rope, int):
                filled.setdefault("head_dim", nope + rope)
        elif isinstance(hidden, int) and isinstance(heads, int) and heads > 0 and hidden % heads == 0:
            filled.setdefault("head_dim", hidden // heads)
        if "head_dim" in filled:
            filled.setdefault("v_head_dim", filled["head_dim"])
        return filled

    @model_validator(mode="after")
    def _windows_fit(self) -> Self:
        turns = _shortest(self.layer_types, self.layers) if self.layer_types else ()
        if "sliding_attention" in turns and self.sliding_window is None:
            raise ValueError("layer_types: sliding_attention needs sliding_window, the keys that a query looks back at")
        if turns == ("full_attention",):
            self.__dict__["sliding_window"] = None
        self.__dict__["layer_types"] = turns if len(turns) > 1 else None
        return self

    @model_validator(mode="after")
    def _traits_fit(self) -> Self:
        check_traits(self)
        if self.experts is not None:
            dense = [self.type_of(layer).dense for layer in range(self.layers)]
            first = dense.index(False)
            turns: tuple[MlpType, ...] = (*("dense" if own else "sparse" for own in dense),)
            only_first = not any(dense[first:])
            self.__dict__["dense_layers"] = first if only_first else 0
            self.__dict__["mlp_layer_types"] = None if only_first else _shortest(turns, self.layers)
        return self

    def masked(self, documents: tuple[int, ...] | None) -> Self:
        """With attention that stays within documents, or within none."""
        return self if documents == self.documents else self.model_copy(update={"documents": documents})

    def as_in(self, modules: Mapping[str, Any]) -> Self:
        """With modules that run as a library's do, where the model does not say how."""
        changes = {name: value for name, value in modules.items() if getattr(self, name) is None}
        return self.model_copy(update=changes) if changes else self

    @property
    def runs_as(self) -> tuple[str | bool, ...]:
        """How its modules run, by what has an effect: the kernels, and of eager ones what they are made of."""
        if self.kernels != "eager":
            return (self.kernels or "fused",)
        return "eager", self.composite_norm is True, self.gated_mlp and self.glu_offset is not False

    @property
    def repeats_kv(self) -> bool:
        """Whether K and V are written out for the heads of Q that share them."""
        repeats = self.kernels == "eager" if self.repeat_kv is None else self.repeat_kv
        return repeats and self.attention == "unfused" and self.kv_heads < self.heads

    @property
    def attention_kernel(self) -> AttentionKernel | Framework | None:
        """The fused kernel of core attention, by its name or by what picks it; none where it is unfused."""
        if self.attention == "unfused":
            return None
        return "transformer_engine" if self.attention == "flash" else self.attention

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader of a result must know of the model."""
        alone = (f"of {self.name} the language model alone: {self.left_out} is left out",) if self.left_out else ()
        kinds = ", ".join(f"{count} {self._words_of(own)}" for own, count in self.types.items())
        return (*alone, f"layers of {self.name} differ: {kinds}") if len(self.types) > 1 else alone

    def _words_of(self, own: LayerType) -> str:
        """What sets a type of layers apart."""
        mlp = "with a dense MLP" if own.dense else "with experts"
        attention = "full attention" if own.full else f"a window of {self.sliding_window} keys"
        differs = [any(kind.dense for kind in self.types), any(kind.full for kind in self.types)]
        return " and ".join([text for text, apart in zip((mlp, f"with {attention}"), differs, strict=True) if apart])

    def type_of(self, layer: int) -> LayerType:
        """Of a layer by its number, from 0."""
        turns, kinds = self.layer_types or (), self.mlp_layer_types or ()
        dense = layer < self.dense_layers or (bool(kinds) and kinds[layer % len(kinds)] == "dense")
        return LayerType(dense, bool(turns) and turns[layer % len(turns)] == "full_attention")

    @cached_property
    def each_type(self) -> tuple[LayerType, ...]:
        """Of all layers in order."""
        return tuple(map(self.type_of, range(self.layers)))

    @cached_property
    def types(self) -> Mapping[LayerType, int]:
        """How many layers are of each type, those of most traits of the model first."""
        return dict(sorted(Counter(self.each_type).items()))

    def of_type(self, own: LayerType) -> Model:
        """The model whose layers are all of a type."""
        return _of_type(self, own)

    @property
    def latents(self) -> tuple[int, ...]:
        """Widths of the latents of attention, each of which has a norm."""
        return tuple([width for width in (self.q_lora_rank, self.kv_lora_rank) if width is not None])

    @cached_property
    def layer_parameters(self) -> int:
        """Parameters of one transformer layer, of experts if the model has any."""
        return parameters.of_layer(self)

    @cached_property
    def expert_parameters(self) -> int:
        """Parameters of all experts of a layer."""
        return parameters.of_experts(self)

    @cached_property
    def prediction_parameters(self) -> int:
        """Parameters of multi-token prediction."""
        return parameters.of_prediction(self)

    @cached_property
    def parameters(self) -> int:
        """Parameters of the whole model: embeddings, layers, final norm and, unless it is the embedding, the head."""
        return parameters.of_model(self)


def _shortest(turns: tuple[T, ...], layers: int) -> tuple[T, ...]:
    """The fewest turns that make the same layers over again."""
    every = [turns[layer % len(turns)] for layer in range(layers)]
    found = next(size for size in range(1, layers + 1) if every[size:] == every[: layers - size])
    return (*every[:found],)


@lru_cache(maxsize=256)
def _of_type(model: Model, own: LayerType) -> Model:
    changes: dict[str, Any] = {"dense_layers": 0, "mlp_layer_types": None, "layer_types": None, "mtp_layers": 0}
    changes["documents"] = model.documents
    if own.dense:
        changes |= {"experts": None, "experts_per_token": None, "expert_ffn_hidden": None, "shared_ffn_hidden": 0}
    if own.full:
        changes["sliding_window"] = None
    return Model(**{**model.model_dump(), **changes})
