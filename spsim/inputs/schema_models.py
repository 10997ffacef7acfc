"""JSON Schema of pydantic models as a TOML file has them, with the docstrings of their fields."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise
from textwrap import dedent
from typing import Any, get_args

from pydantic import BaseModel

from spsim.inputs.quantities import Provenance

Schema = dict[str, Any]
REFERENCE = "#/$defs/"
PARTIAL = "Partial"
"""Prefix of tables that others complete."""


def reference(name: str) -> Schema:
    return {"$ref": f"{REFERENCE}{name}"}


def of_model(kind: type[BaseModel]) -> Schema:
    """What pydantic says of a model, as a file has it, with the docstrings of its fields and of those in it."""
    made: Schema = tidied(kind.model_json_schema())
    tables = {kind.__name__: made, **made.get("$defs", {})}
    for table in _tables(kind):
        own = tables.get(table.__name__, {}).get("properties", {})
        for name, text in _docstrings(table).items():
            if name in own:
                own[name] = {**own[name], "description": text}
    return made


def tidied(value: Any) -> Any:
    """Without titles, and without null, which TOML does not have."""
    if isinstance(value, list):
        return [tidied(item) for item in value]
    if not isinstance(value, dict):
        return value
    found = {name: tidied(item) for name, item in value.items() if not (name == "title" and isinstance(item, str))}
    if found.get("default", 0) is None:
        del found["default"]
    if "patternProperties" in found:  # a dictionary, whose other keys are refused
        found["additionalProperties"] = False
    choices = found.get("anyOf")
    if isinstance(choices, list) and {"type": "null"} in choices:
        kept = [choice for choice in choices if choice != {"type": "null"}]
        del found["anyOf"]
        found |= kept[0] if len(kept) == 1 else {"anyOf": kept}
    return found


def _tables(kind: type[BaseModel]) -> Iterator[type[BaseModel]]:
    """A model and those that its fields hold."""
    yield kind
    for field in kind.model_fields.values():
        for inner in _models_in(field.annotation):
            yield from _tables(inner)


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _models_in(part)


def _docstrings(kind: type[BaseModel]) -> dict[str, str]:
    """The text below each field, those of its bases included."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        if issubclass(base, BaseModel) and base is not BaseModel:
            (body,) = ast.parse(dedent(inspect.getsource(base))).body
            found |= dict(_below_fields(body.body))  # type: ignore[attr-defined]
    return found


def _below_fields(body: list[ast.stmt]) -> Iterator[tuple[str, str]]:
    for statement, after in pairwise(body):
        named = isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)
        if named and isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            yield statement.target.id, " ".join(str(after.value.value).split())  # type: ignore[attr-defined]


def partial(definitions: Schema, kinds: Iterable[type[BaseModel]]) -> Iterator[tuple[str, Schema]]:
    """Tables in which anything may be missing; numbers with their source, curves and levels are whole."""
    whole = {"Level"}
    names = {table.__name__ for kind in kinds for table in _tables(kind) if not issubclass(table, Provenance)} - whole
    for name in names:
        table = {key: of for key, of in definitions[name].items() if key != "required"}
        yield PARTIAL + name, _referring(table, {inner: PARTIAL + inner for inner in names})


def _referring(value: Any, renamed: Mapping[str, str]) -> Any:
    if isinstance(value, list):
        return [_referring(item, renamed) for item in value]
    if not isinstance(value, dict):
        return value
    found = {name: _referring(item, renamed) for name, item in value.items() if name != "minProperties"}
    if isinstance(value.get("$ref"), str):
        name = value["$ref"].removeprefix(REFERENCE)
        found["$ref"] = REFERENCE + renamed.get(name, name)
    return found
