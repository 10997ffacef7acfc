"""Reads the config.json of Hugging Face transformers: the fields of `Model` that it says.

`families` has the keys; here are the file, its language model where it describes more, and its head.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from spsim.errors import InputError, first_problem
from spsim.inputs.expert_families import EVERY_FAMILY, OF_EXPERTS, OF_LATENTS
from spsim.inputs.families import Count, Family
from spsim.inputs.resources import parse_json, read_text

T = TypeVar("T", bound=BaseModel)

EXPERTS, LATENTS = "mixture of experts", "latent attention"
NOT_SIMULATED = {
    EXPERTS: ("num_experts", "num_local_experts", "n_routed_experts", "moe_"),
    LATENTS: ("kv_lora_rank", "q_lora_rank"),
    "cross attention": ("add_cross_attention", "is_encoder_decoder"),
}
"""Part of a model -> beginnings of the keys that bring it."""

NOT_SIMULATED_FAMILIES = {"bloom": "positions as biases of scores, and a norm of the embedding,"}
STORED = ("fp8", "mxfp4")
"""Types that weights of a checkpoint are stored in, which says nothing of how the model is trained."""

LANGUAGE = ("text_config", "llm_config", "language_config")
"""Keys under which multimodal files have their language model."""
_TIED = "tie_word_embeddings"

QUESTION_ANSWERING_ROWS = 2
"""Where an answer begins, and where it ends."""


class _Task(BaseModel):
    """What a file says of the head behind the last layer."""

    model_config = ConfigDict(frozen=True, strict=True, extra="ignore")

    architectures: list[str] | None = None
    num_labels: Count | None = None
    id2label: dict[str, Any] | None = None
    token_classification_bias: bool = True

    def labels(self, otherwise: int) -> int:
        """Rows of a classifier, or as many as its code assumes."""
        return self.num_labels or len(self.id2label or ()) or otherwise


def read_config(path: Path) -> dict[str, Any]:
    """The fields of `Model` that a config.json says; `InputError` names the file and the key."""
    config = _read_json(path)
    _refuse_family(config, str(path))
    key = next((name for name in LANGUAGE if config.get(name) is not None), None)
    where = str(path) if key is None else f"{path}: {key}"
    inner = config if key is None else _language_model(config[key], config, where)
    parts = [f"{part} ({found})" for part, found in _not_simulated({**inner, **config})]
    if parts:
        raise InputError(f"{path}: not simulated yet: {', '.join(parts)}; use a dense model")
    _refuse_family(inner, where)
    family = _validated(_family(inner, where), inner, where)
    task = _validated(_Task, config if config.get("architectures") else inner, str(path))
    return {**family.fields(), **_head(task, str(path)), **_left_out(config, key)}


def _read_json(path: Path) -> dict[str, Any]:
    return parse_json(read_text(path), str(path), "the config of a model")


def _language_model(table: Any, config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The table of the language model with what it leaves out: sizes of its family, whether embeddings are tied."""
    if not isinstance(table, dict):
        raise InputError(f"{where}: must be a table with the keys of the language model, got {table!r}")
    family = table.get("model_type")
    sizes = EVERY_FAMILY[family].sizes if isinstance(family, str) and family in EVERY_FAMILY else {}
    tied = {_TIED: config[_TIED]} if _TIED in config else {}
    return {**sizes, **tied, **table}


def _left_out(config: Mapping[str, Any], key: str | None) -> dict[str, str]:
    """What of a multimodal model is not read: the other parts with a table, such as `vision_config`."""
    others = sorted(name for name, value in config.items() if name != key and _is_part(name, value))
    if key is None and not others:
        return {}
    return {"left_out": ", ".join(others) or f"what stands outside {key}"}


def _is_part(name: str, value: Any) -> bool:
    return (
        name.endswith("_config") and isinstance(value, dict) and any("hidden" in key or "dim" in key for key in value)
    )


def _refuse_family(config: Mapping[str, Any], where: str) -> None:
    name = config.get("model_type")
    reason = NOT_SIMULATED_FAMILIES.get(name) if isinstance(name, str) else None
    if reason is not None:
        raise InputError(f"{where}: model_type {name!r}: {reason} are not simulated yet")


def _not_simulated(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(part, key) of what the family cannot express; a key of 0, false or null asks for nothing."""
    family, quantised = config.get("model_type"), config.get("quantization_config")
    if quantised and not (isinstance(quantised, dict) and quantised.get("quant_method") in STORED):
        yield "quantised weights", "quantization_config"
    known = {EXPERTS: family in (*OF_EXPERTS,), LATENTS: family in OF_LATENTS}
    for part, beginnings in NOT_SIMULATED.items():
        if known.get(part):
            continue
        key = next((key for key, value in config.items() if value and key.startswith(beginnings)), None)
        if key is not None:
            yield part, key


def _family(config: Mapping[str, Any], where: str) -> type[Family]:
    name = config.get("model_type")
    if not isinstance(name, str):
        raise InputError(f"{where}: model_type: required, a word such as 'llama'; got {name!r}")
    if name not in EVERY_FAMILY:
        raise InputError(
            f"{where}: model_type {name!r} is not simulated yet; use one of {', '.join(sorted(EVERY_FAMILY))}"
        )
    return EVERY_FAMILY[name]


def _validated(kind: type[T], config: Mapping[str, Any], where: str) -> T:
    try:
        return kind.model_validate(config)
    except ValidationError as error:
        raise first_problem(error, where) from None


def _head(task: _Task, where: str) -> dict[str, Any]:
    """Fields of `Model`, by the ending of the class; the head of a language model where none is named."""
    name = task.architectures[0] if task.architectures else "ForCausalLM"
    if name.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "ForImageTextToText")):
        return {}
    if name.endswith("RewardModel"):
        return {"head_rows": task.labels(1)}
    if name.endswith("ForSequenceClassification"):
        return {"head_rows": task.labels(2)}
    if name.endswith("ForTokenClassification"):
        return {"head_rows": task.labels(2), "head_bias": task.token_classification_bias}
    if name.endswith("ForQuestionAnswering"):
        return {"head_rows": QUESTION_ANSWERING_ROWS, "head_bias": True}
    if name.endswith("Model"):
        return {"head_rows": 0}
    raise InputError(
        f"{where}: architectures: the head of {name!r} is not known; use a class that ends in ForCausalLM, "
        "ForSequenceClassification or, for no head, Model"
    )
