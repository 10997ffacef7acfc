"""JSON Schema of settings that have other names and spellings: those of a model, a plan and a workload."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import get_args

from spsim.errors import InputError
from spsim.inputs import plan_words, words
from spsim.inputs.configuration import Configuration
from spsim.inputs.libraries import LIBRARIES
from spsim.inputs.plan import Plan
from spsim.inputs.schema_models import Schema, of_model
from spsim.inputs.workload import Precision


def _spelled(word: str) -> str:
    """A pattern of a word as it may be written: `--Seq-Len` is `seq_len`."""
    letters = (f"[{c.lower()}{c.upper()}]" if c.isalpha() else "[-_]" if c == "_" else f"[{c}]" for c in word)
    return rf"^\s*-*{''.join(letters)}\s*$"


def _text_of(choices: Iterable[str]) -> Schema:
    """One of some words, however it is written."""
    known = [*dict.fromkeys(choices)]
    return {"anyOf": [{"enum": known}, {"type": "string", "pattern": "|".join(map(_spelled, known))}]}


def of_configuration(
    kind: type[Configuration],
    others: Mapping[str, Iterable[str]],
    values: Callable[[str, Schema], Schema] = lambda name, schema: schema,
    further: Mapping[str, Schema] = MappingProxyType({}),
) -> Schema:
    """A table of settings under their own names and those elsewhere; what is required, under either.

    `values` are what is taken in the place of what pydantic says of a field, `further` settings that become others.
    """
    made = of_model(kind)
    own = {name: values(name, of) for name, of in made["properties"].items()} | {**further}
    elsewhere = {other: own[name] for name, names in others.items() if name in own for other in names}
    patterns = {_spelled(name): of for name, of in {**own, **elsewhere}.items()}
    needed = {name: [name, *others.get(name, ())] for name in made.get("required", ())}
    found = {**made, "properties": own, "patternProperties": patterns}
    found.pop("required", None)
    if needed:
        found["allOf"] = [{"anyOf": [{"required": [word]} for word in _written(names)]} for names in needed.values()]
    return found


def _written(names: Iterable[str]) -> list[str]:
    """Names with underscores or dashes."""
    return [*dict.fromkeys(word for name in names for word in (name, name.replace("_", "-")))]


def workload_values(name: str, schema: Schema) -> Schema:
    kept: Schema = {key: schema[key] for key in ("description", "default") if key in schema}
    if name == "seq_len":
        return {"anyOf": [schema, {"type": "string", "pattern": r"^\d{1,9}[kKmM]$"}], **kept}
    if name == "precision":
        return {**_text_of([*get_args(Precision), *words.PRECISIONS]), **kept}
    return schema


def plan_values(name: str, schema: Schema) -> Schema:
    """Texts of a plan, in any spelling; of some options what others call the values, too."""
    kept: Schema = {key: schema[key] for key in ("description", "default") if key in schema}
    if name == "library":
        return {**_text_of(_libraries()), **kept}
    if name == "recompute_modules":
        return {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}], **kept}
    if name in plan_words.TEXTS:
        return schema
    choices = [choice for part in schema.get("anyOf", [schema]) for choice in part.get("enum", ())]
    if not choices:
        return schema
    texts = _text_of([*choices, *_other_values(name)])
    further = [part for part in schema.get("anyOf", ()) if "enum" not in part]
    return {"anyOf": [*further, *texts["anyOf"]], **kept}


def _other_values(name: str) -> Iterable[str]:
    if name in ("grad_dtype", "moment_dtype"):
        return [word for word, own in words.PRECISIONS.items() if own in ("fp32", "bf16")]
    others: dict[str, Iterable[str]] = {"pp_schedule": plan_words.SCHEDULES, "ring_kind": plan_words.COMM}
    return others.get(name, ())


def _libraries() -> Iterator[str]:
    """Names of libraries, and parts of them that no other has."""
    for word in [*LIBRARIES, *(part for name in LIBRARIES for part in name.split("-"))]:
        try:
            if words.named(word, LIBRARIES, "library"):
                yield word
        except InputError:
            continue


def read_otherwise() -> Schema:
    """Options elsewhere that become others here."""
    degree = of_model(Plan)["properties"]["tp"]
    found: Schema = {word: {"type": "boolean"} for word in plan_words.OVERLAPS}
    found |= dict.fromkeys(("cp", *plan_words.PLAN["cp"], *plan_words.SHARDS), degree)
    for word, values in {**plan_words.READINGS, "cp_comm_type": plan_words.COMM,
                         "context_parallel_rotate_method": plan_words.ROTATES}.items():  # fmt: skip
        texts = [value for value in values if isinstance(value, str)]
        found[word] = _text_of(texts) if texts else {"type": "boolean"}
    return found
