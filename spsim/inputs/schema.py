"""JSON Schema (draft 2020-12) of the files that spsim reads, for editors: hardware profiles, cases and models.

It is made of the pydantic models that read them, with what these do beforehand: other names and spellings of settings,
tables that a preset or a base completes. What several numbers have to be together no schema says; the reader does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from spsim.inputs import plan_words, words
from spsim.inputs.hardware import Coefficients, Datasheet, HardwareProfile
from spsim.inputs.inheritance import BLOCKS, ScaledCurves
from spsim.inputs.model import Model
from spsim.inputs.perturbations import KINDS, SlowRanks
from spsim.inputs.plan import Plan
from spsim.inputs.presets import PRESET, PRESETS
from spsim.inputs.profiles import profile_names
from spsim.inputs.scenario import Scenario
from spsim.inputs.schema_models import PARTIAL, REFERENCE, Schema, of_model, partial, reference
from spsim.inputs.schema_words import of_configuration, plan_values, read_otherwise, workload_values
from spsim.inputs.workload import Workload

DIALECT = "https://json-schema.org/draft/2020-12/schema"
DERIVED = ("coefficients", "assumed", "inherited", "fitted_on")
"""Fields of a profile that its blocks of coefficients become."""


def profile_schema() -> Schema:
    """Of a hardware profile: with a base it may lack what the base has."""
    whole, curves = of_model(HardwareProfile), of_model(ScaledCurves)
    definitions = {**whole.pop("$defs"), **curves.pop("$defs", {}), "ScaledCurves": curves}
    definitions |= dict(partial(definitions, [Coefficients, Datasheet]))
    properties = {name: of for name, of in whole["properties"].items() if name not in DERIVED}
    text = {"type": "string"}
    properties["base"] = {**text, "description": "Profile that says what this one does not: a shipped name, or a file."}
    properties["datasheet"] = reference(PARTIAL + "Datasheet")
    properties["scaled"] = {"type": "array", "items": reference("ScaledCurves"), "description": "Curves of the base."}
    properties |= {block: reference(PARTIAL + "Coefficients") for block in BLOCKS}
    stated = [name for name in whole["required"] if name not in DERIVED]
    alone = {"required": ["sources", "datasheet"], "properties": {"datasheet": reference("Datasheet")}}
    return _document(
        "Hardware profile of spsim", properties, definitions,
        required=[name for name in stated if name not in alone["required"]],
        anyOf=[{"required": ["base"]}, {**alone, "not": {"required": ["scaled"]}}],
    )  # fmt: skip


def case_schema() -> Schema:
    """Of a case file of `run`, `compare` and `explain`, which needs nothing from the command line."""
    scenario = of_model(Scenario)
    definitions = {
        **scenario["$defs"],
        "Model": _model(),
        "Plan": of_configuration(Plan, plan_words.PLAN, plan_values, read_otherwise()),
        "Workload": of_configuration(Workload, words.WORKLOAD, workload_values),
    }
    named = {"type": "string"}
    properties = {
        "hardware": {**named, "description": "A shipped profile, or the path of a file.", "examples": profile_names()},
        "model": {
            "anyOf": [{**named, "examples": [*PRESETS]}, reference("Model")],
            "description": "Name of a preset, path of a .toml or config.json, or a table.",
        },
        "plan": {"anyOf": [named, reference("Plan")], "description": "As the command line writes it, or a table."},
        "workload": reference("Workload"),
        "perturbations": _perturbations(definitions),
    }  # fmt: skip
    properties |= {name: of for name, of in scenario["properties"].items() if name not in properties}
    required = ["hardware", "model", "workload"]
    return _document("Case of spsim", properties, definitions, required=required)


def _perturbations(definitions: Schema) -> Schema:
    """One, several, or the path of a file of them; their tables are added to the definitions."""
    for kind in KINDS.values():
        table = of_model(kind)
        definitions |= {**table.pop("$defs", {}), kind.__name__: table}
    ranks = definitions[SlowRanks.__name__]["properties"]["ranks"]
    place = {"description": ranks.pop("description"), "anyOf": [ranks["items"], {**ranks}]}
    definitions[SlowRanks.__name__]["properties"]["ranks"] = place
    one = {"anyOf": [reference(kind.__name__) for kind in KINDS.values()]}
    several = {"type": "array", "items": one}
    return {"anyOf": [{"type": "string"}, one, several], "description": "What is slow, fails or varies in the step."}


def model_schema() -> Schema:
    """Of the file of a model: its dimensions, or what differs from a preset, alone or under `[model]`."""
    table = _model()
    properties = {**table["properties"], "model": reference("Model")}
    flat = {**table, "not": {"required": ["model"]}, "properties": dict.fromkeys(table["properties"], True)}
    return {
        "$schema": DIALECT, "title": "Model of spsim", "type": "object", "properties": properties,
        "anyOf": [{"required": ["model"]}, flat], "$defs": {"Model": table},
    }  # fmt: skip


def _model() -> Schema:
    """Dimensions of a model, or a preset and what differs from it."""
    table = of_configuration(Model, words.MODEL)
    preset = {"type": "string", "description": "Model that the other fields change.", "examples": [*PRESETS]}
    dimensions = {"allOf": table.pop("allOf")}
    return {
        **table, "properties": {PRESET: preset, **table["properties"]},
        "anyOf": [{"required": [PRESET]}, dimensions],
    }  # fmt: skip


SCHEMAS: Mapping[str, Callable[[], Schema]] = {
    "profile": profile_schema, "case": case_schema, "model": model_schema
}  # fmt: skip
"""By what a file is."""


def _document(title: str, properties: Schema, definitions: Schema, **rules: Any) -> Schema:
    document = {
        "$schema": DIALECT, "title": title, "type": "object", "properties": properties, "additionalProperties": False,
        **rules,
    }  # fmt: skip
    used = _reached(document, definitions)
    return {**document, "$defs": {name: definitions[name] for name in sorted(used)}}


def _references(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if isinstance(value.get("$ref"), str):
            yield value["$ref"].removeprefix(REFERENCE)
        for item in value.values():
            yield from _references(item)
    elif isinstance(value, list):
        for item in value:
            yield from _references(item)


def _reached(document: Schema, definitions: Schema) -> set[str]:
    found: set[str] = set()
    left = [*_references(document)]
    while left:
        name = left.pop()
        if name not in found:
            found.add(name)
            left += _references(definitions[name])
    return found
