"""Models by name, by file and by table: the presets, and what a user may give for a model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spsim.errors import InputError
from spsim.inputs import words
from spsim.inputs.model import Model
from spsim.inputs.resources import read_toml


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


_QWEN3_MOE: dict[str, Any] = {"qk_norm": True, "head_dim": 128, "experts": 128, "experts_per_token": 8}
_DEEPSEEK_V3: dict[str, Any] = {
    "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
    "experts": 256, "experts_per_token": 8, "expert_ffn_hidden": 2048, "shared_ffn_hidden": 2048, "dense_layers": 3,
}  # fmt: skip
_GPT_OSS: dict[str, Any] = {
    "head_dim": 64, "bias": True, "attention_sinks": True, "sliding_window": 128,
    "layer_types": ("sliding_attention", "full_attention"), "experts": 128, "experts_per_token": 4,
}  # fmt: skip
_GEMMA_3: dict[str, Any] = {
    "head_dim": 128, "qk_norm": True, "norms": "both", "activation": "geglu", "tied_embeddings": True,
    "sliding_window": 1024, "layer_types": (*5 * ("sliding_attention",), "full_attention"),
}  # fmt: skip

# GPT: Korthikanti et al. 2022 (arXiv:2205.05198), Table 3. Llama: Touvron et al. 2023 (arXiv:2307.09288); Llama
# Team 2024 (arXiv:2407.21783), Table 3. Mistral 7B: Jiang et al. 2023 (arXiv:2310.06825), Table 1, without its
# sliding window, as of v0.2. Qwen2.5: Qwen Team 2024 (arXiv:2412.15115) and config.json of Qwen/Qwen2.5-32B; Qwen3:
# Qwen Team 2025 (arXiv:2505.09388), Tables 1 and 2, and config.json of Qwen/Qwen3-8B. Mixtral 8x7B: Jiang et al. 2024
# (arXiv:2401.04088), Table 1. DeepSeek-V3: DeepSeek-AI 2024 (arXiv:2412.19437), section 4.2, without the layer of
# multi-token prediction. gpt-oss: OpenAI 2025 (arXiv:2508.10925) and config.json of openai/gpt-oss-120b. Gemma 3: Gemma
# Team 2025 (arXiv:2503.19786) and config.json of google/gemma-3-27b-it, the language model.
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
        _llama("qwen3-30b-a3b", 48, 2048, 6144, 32, 4, 151936, **_QWEN3_MOE, expert_ffn_hidden=768),
        _llama("qwen3-235b-a22b", 94, 4096, 12288, 64, 4, 151936, **_QWEN3_MOE, expert_ffn_hidden=1536),
        _llama("deepseek-v3", 61, 7168, 18432, 128, 128, 129280, **_DEEPSEEK_V3),
        _llama("gpt-oss-120b", 36, 2880, 2880, 64, 8, 201088, **_GPT_OSS),
        _llama("gemma-3-27b", 62, 5376, 21504, 32, 16, 262208, **_GEMMA_3),
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
        if field.default is None and Model.filled(without).get(name) == fields.get(name):
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
