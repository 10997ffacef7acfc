"""Transformer models: dimensions, and the parameters that follow from them.

Two families share one layer: GPT (LayerNorm, learned positions, biases, tied embeddings, GeLU) and Llama
(`gated_mlp`: RMSNorm, rotary positions, no biases, untied embeddings, SwiGLU). Each trait can be set. Variants
of equal shape and cost are one: LayerNorm1p and Gemma's RMSNorm, exact and approximate GeLU, rotation of a
part of the head.
"""

from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from spsim.errors import InputError
from spsim.inputs import words
from spsim.inputs.configuration import Configuration, Name
from spsim.inputs.resources import read_toml
from spsim.work import AttentionKernel, Framework

Size = Annotated[int, Field(ge=1, le=2**24)]
Activation = Literal["gelu", "squared_relu", "swiglu", "geglu"]
Attention = Literal["flash", "unfused", AttentionKernel]
GATED: tuple[Activation, ...] = ("swiglu", "geglu")


_DERIVED: Any = Field(default=None)
"""Follows from other fields unless given; see `Model.filled`."""


class Model(Configuration):
    """A decoder-only transformer; every layer is the same, but for a dense MLP in the first and experts in others."""

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
    heads: Annotated[int, Field(ge=1, le=2**16)]
    kv_heads: Annotated[int, Field(ge=1, le=2**16)] = _DERIVED
    head_dim: Annotated[int, Field(ge=1, le=2**14)] = _DERIVED
    vocab: Size
    gated_mlp: bool = False
    activation: Activation = _DERIVED
    norm: Literal["layernorm", "rmsnorm"] = _DERIVED
    positions: Literal["learned", "rope", "none"] = _DERIVED
    max_positions: Size = 2048
    """Rows of the learned position table."""
    bias: bool = _DERIVED
    """Of every linear, q, k and v apart if `qkv_bias` says so."""
    qkv_bias: bool = _DERIVED
    """Of the q, k and v projections (Qwen2); as the others unless given."""
    qk_norm: bool = False
    """RMSNorm over the head size of q and k, before the rotation (Qwen3)."""
    parallel_residual: bool = False
    """Attention and MLP read the same input through a norm each: x + attention + MLP (GPT-NeoX)."""
    tied_embeddings: bool = _DERIVED
    """The output head is the embedding."""
    head_rows: Annotated[int, Field(ge=0, le=2**24)] = _DERIVED
    """Of the output head: the vocabulary unless given, 0 without a head, the labels of a classifier."""
    head_bias: bool = False
    """One number a row of the head."""
    attention: Attention = "flash"
    """`flash`: the fused kernel that Transformer Engine picks on the hardware; or a kernel of the profile by name."""
    sliding_window: Size | None = None
    """Keys that a query looks back at, itself included. Sequences that are longer are refused."""
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
        if "head_dim" not in filled and isinstance(hidden, int) and isinstance(heads, int) and heads > 0:
            raise ValueError(f"hidden {hidden} is not divisible by heads {heads}; change one or give head_dim")
        return filled

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
        filled.setdefault("tied_embeddings", not gated)
        hidden, heads = filled.get("hidden"), filled.get("heads")
        for name, source in (("kv_heads", "heads"), ("head_rows", "vocab")):
            if source in filled:
                filled.setdefault(name, filled[source])
        if isinstance(hidden, int) and not gated:
            filled.setdefault("ffn_hidden", 4 * hidden)
        if filled.get("experts") is not None and "ffn_hidden" in filled:
            filled.setdefault("expert_ffn_hidden", filled["ffn_hidden"])
        if isinstance(hidden, int) and isinstance(heads, int) and heads > 0 and hidden % heads == 0:
            filled.setdefault("head_dim", hidden // heads)
        return filled

    @model_validator(mode="after")
    def _heads_fit(self) -> Self:
        if self.kv_heads > self.heads or self.heads % self.kv_heads:
            raise ValueError(f"kv_heads {self.kv_heads} must divide heads {self.heads}; change one")
        return self

    @model_validator(mode="after")
    def _experts_fit(self) -> Self:
        if self.experts is None:
            given = {
                "experts_per_token",
                "expert_ffn_hidden",
                "shared_ffn_hidden",
                "dense_layers",
            } & self.model_fields_set
            if given and any(getattr(self, name) for name in given):
                raise ValueError(
                    f"{min(given)} = {getattr(self, min(given))} needs experts; give how many, or leave it out"
                )
            return self
        if self.experts_per_token is None or self.experts_per_token > self.experts:
            raise ValueError(
                f"experts_per_token = {self.experts_per_token} with experts = {self.experts}; give 1 to {self.experts}"
            )
        if self.dense_layers >= self.layers:
            raise ValueError(
                f"dense_layers = {self.dense_layers} leaves none of layers = {self.layers} with experts; "
                "use fewer, or a model without experts"
            )
        return self

    @model_validator(mode="after")
    def _activation_fits(self) -> Self:
        if (self.activation in GATED) != self.gated_mlp:
            raise ValueError(
                f"activation {self.activation!r} and gated_mlp = {self.gated_mlp} exclude each other; change one"
            )
        return self

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
        return (f"of {self.name} the language model alone: {self.left_out} is left out",) if self.left_out else ()

    @cached_property
    def as_dense(self) -> Self:
        """The model whose layers are all as the first, where their MLP is dense."""
        none = {"experts": None, "experts_per_token": None, "expert_ffn_hidden": None, "shared_ffn_hidden": 0}
        return type(self)(**{**self.model_dump(), **none, "dense_layers": 0})

    @cached_property
    def expert_parameters(self) -> int:
        """Parameters of all experts of a layer."""
        if self.experts is None or self.expert_ffn_hidden is None:
            return 0
        return self.experts * self.hidden * self.expert_ffn_hidden * (3 if self.gated_mlp else 2)

    @cached_property
    def layer_parameters(self) -> int:
        """Parameters of one transformer layer, of experts if the model has any."""
        norms = 2 * self.hidden * (2 if self.norm == "layernorm" else 1)
        qkv_width = (self.heads + 2 * self.kv_heads) * self.head_dim
        attention = self.hidden * qkv_width + self.heads * self.head_dim * self.hidden
        width = self.ffn_hidden if self.experts is None else self.shared_ffn_hidden
        mlp = self.hidden * width * (3 if self.gated_mlp else 2)
        mlp += self.expert_parameters + (self.experts or 0) * self.hidden
        fc1_width = self.ffn_hidden * (2 if self.gated_mlp else 1)
        biases = self.hidden + fc1_width + self.hidden if self.bias else 0
        biases += qkv_width if self.qkv_bias else 0
        head_norms = 2 * self.head_dim if self.qk_norm else 0
        return norms + attention + mlp + biases + head_norms

    @cached_property
    def parameters(self) -> int:
        """Parameters of the whole model: embeddings, layers, final norm and, unless it is the embedding, the head."""
        embeddings = self.vocab * self.hidden
        shared = self.tied_embeddings and self.head_rows == self.vocab
        head = (0 if shared else self.head_rows * self.hidden) + (self.head_rows if self.head_bias else 0)
        positions = self.max_positions * self.hidden if self.positions == "learned" else 0
        final_norm = self.hidden * (2 if self.norm == "layernorm" else 1)
        layers = (self.layers - self.dense_layers) * self.layer_parameters
        if self.dense_layers:
            layers += self.dense_layers * self.as_dense.layer_parameters
        return embeddings + positions + layers + final_norm + head


def _gpt(name: str, layers: int, hidden: int, heads: int) -> Model:
    return Model(name=name, layers=layers, hidden=hidden, heads=heads, vocab=51200, attention="unfused", dropout=0.1)


def _llama(
    name: str, layers: int, hidden: int, ffn_hidden: int, heads: int, kv_heads: int, vocab: int, **traits: Any
) -> Model:
    return Model(
        name=name, layers=layers, hidden=hidden, ffn_hidden=ffn_hidden, heads=heads, kv_heads=kv_heads,
        vocab=vocab, gated_mlp=True, **traits,
    )  # fmt: skip


def _nemotron(name: str, layers: int, hidden: int, heads: int) -> Model:
    """LayerNorm, rotary positions, no biases, untied embeddings, squared ReLU."""
    return Model(
        name=name, layers=layers, hidden=hidden, heads=heads, kv_heads=8, vocab=256000,
        activation="squared_relu", positions="rope", bias=False, tied_embeddings=False,
    )  # fmt: skip


# GPT: Korthikanti et al. 2022 (arXiv:2205.05198), Table 3. Llama: Touvron et al. 2023 (arXiv:2307.09288); Llama
# Team 2024 (arXiv:2407.21783), Table 3. Mistral 7B: Jiang et al. 2023 (arXiv:2310.06825), Table 1, without its
# sliding window, as of v0.2. Qwen2.5: Qwen Team 2024 (arXiv:2412.15115) and config.json of Qwen/Qwen2.5-32B; Qwen3:
# Qwen Team 2025 (arXiv:2505.09388), Tables 1 and 2, and config.json of Qwen/Qwen3-8B. Mixtral 8x7B: Jiang et al. 2024
# (arXiv:2401.04088), Table 1.
# Nemotron-4: Parmar et al. 2024 (arXiv:2402.16819), section 2; Adler et al. 2024 (arXiv:2406.11704), Table 1.
PRESETS: dict[str, Model] = {
    model.name: model
    for model in (
        _gpt("gpt-22b", 48, 6144, 64),
        _gpt("gpt-175b", 96, 12288, 96),
        _gpt("gpt-530b", 105, 20480, 128),
        _gpt("gpt-1t", 128, 25600, 160),
        _llama("llama-2-7b", 32, 4096, 11008, 32, 32, 32000),
        _llama("llama-2-13b", 40, 5120, 13824, 40, 40, 32000),
        _llama("llama-2-70b", 80, 8192, 28672, 64, 8, 32000),
        _llama("llama-3-8b", 32, 4096, 14336, 32, 8, 128256),
        _llama("llama-3-70b", 80, 8192, 28672, 64, 8, 128256),
        _llama("llama-3-405b", 126, 16384, 53248, 128, 8, 128256),
        _llama("mistral-7b", 32, 4096, 14336, 32, 8, 32000),
        _llama("qwen2.5-32b", 64, 5120, 27648, 40, 8, 152064, qkv_bias=True),
        _llama("qwen3-8b", 36, 4096, 12288, 32, 8, 151936, qk_norm=True),
        _llama("mixtral-8x7b", 32, 4096, 14336, 32, 8, 32000, experts=8, experts_per_token=2),
        _llama(
            "qwen3-30b-a3b",
            48,
            2048,
            6144,
            32,
            4,
            151936,
            qk_norm=True,
            head_dim=128,
            experts=128,
            experts_per_token=8,
            expert_ffn_hidden=768,
        ),
        _llama(
            "qwen3-235b-a22b",
            94,
            4096,
            12288,
            64,
            4,
            151936,
            qk_norm=True,
            head_dim=128,
            experts=128,
            experts_per_token=8,
            expert_ffn_hidden=1536,
        ),
        _nemotron("nemotron-4-15b", 32, 6144, 48),
        _nemotron("nemotron-4-340b", 96, 18432, 96),
    )
}


SAME_SHAPE = {f"llama-3.1-{size}": f"llama-3-{size}" for size in ("8b", "70b", "405b")}
"""Models that differ from a preset in what they were trained on, or in how they rotate, by its name."""


def load_model(name_or_path: str | Path) -> Model:
    """The model of a preset name (or of a part of it that no other has, as `mistral`), of a TOML file with the fields
    of `Model`, or of a Hugging Face config.json (or the directory that holds one); `InputError` otherwise.
    """
    if not isinstance(name_or_path, str | Path):
        raise InputError(f"model {name_or_path!r} is neither a name nor a path; give for instance 'llama-3-8b'")
    text = str(name_or_path)
    if text in PRESETS:
        return PRESETS[text]
    path = Path(text)
    if path.suffix == ".toml":
        table = read_toml(path)
        if not isinstance(table.get("model", table), dict):
            raise InputError(f"{text}: model: must be a table of dimensions, not a name; write [model]")
        return model_of({"name": path.stem, **table.get("model", table)})
    if path.suffix == ".json":
        return _from_config(path)
    if text and _is_directory(path):
        return _from_config(path / "config.json")
    preset = words.named(text, PRESETS, "model") or SAME_SHAPE.get(words.named(text, SAME_SHAPE, "model") or "")
    if preset is None:
        raise InputError(
            f"unknown model {text!r}; {words.nearest(text, PRESETS)}, or the path of a .toml table or a config.json"
        )
    return PRESETS[preset]


PRESET = "preset"
"""Key of a model that the others change."""


def model_of(table: Mapping[str, Any]) -> Model:
    """The model of a table: the fields of `Model`, or a `preset` (a model, or what `load_model` takes) and what differs
    from it.

    What followed from other fields in the preset follows from the changed ones; the name says what was changed.
    """
    if PRESET not in table:
        return Model.of_table(table)
    preset = table[PRESET]
    base = preset if isinstance(preset, Model) else load_model(preset)
    changes = Model.own_words({k: v for k, v in table.items() if k != PRESET})
    changed = ", ".join(f"{key} = {value}" for key, value in changes.items())
    name = {"name": f"{base.name} ({changed})"} if changed else {}
    return Model(**{**_given(base), **name, **changes})


def _given(model: Model) -> dict[str, Any]:
    """The fields from which all others follow."""
    fields = model.model_dump()
    for name, field in Model.model_fields.items():
        without = {key: value for key, value in fields.items() if key != name}
        if field.default is None and Model.filled(without).get(name) == fields[name]:
            fields = without
    return fields


def _is_directory(path: Path) -> bool:
    try:
        return path.is_dir()
    except (OSError, ValueError):  # a name too long or with a null byte
        return False


def _from_config(path: Path) -> Model:
    from spsim.inputs.huggingface import read_config

    name = path.resolve().parent.name if path.name == "config.json" else path.stem
    fields = read_config(path)
    try:
        return Model(name=name, **fields)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
