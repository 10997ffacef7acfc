"""JSON Schema of files: an independent validator takes what spsim reads, and refuses mistakes."""

import json
import tomllib
from copy import deepcopy
from pathlib import Path

import pytest

from spsim.cli import main
from spsim.errors import InputError
from spsim.inputs import words
from spsim.inputs.model import Model
from spsim.inputs.plan import Plan
from spsim.inputs.plan_words import PLAN
from spsim.inputs.presets import PRESETS, model_of
from spsim.inputs.profiles import parse_profile, profile_names
from spsim.inputs.resources import profiles_directory, read_toml
from spsim.inputs.scenario import Scenario, scenario_from
from spsim.inputs.schema import SCHEMAS

jsonschema = pytest.importorskip("jsonschema")
VALIDATORS = {kind: jsonschema.Draft202012Validator(made()) for kind, made in SCHEMAS.items()}
ROOT = Path(__file__).parent.parent
CASE = {
    "hardware": "dgx-h100",
    "model": {"layers": 2, "hidden": 1024, "heads": 8, "vocab": 1000},
    "plan": {"tp": 8, "recompute": "selective"},
    "workload": {"seq_len": 2048},
}


def errors(kind, data):
    """What an independent validator says of some tables."""
    return [f"{error.json_path}: {error.message[:100]}" for error in VALIDATORS[kind].iter_errors(data)]


def is_read(kind, data):
    """Whether spsim reads them."""
    readers = {
        "profile": lambda: parse_profile(data, str(profiles_directory() / "mine.toml")),
        "case": lambda: scenario_from(data, "case"),
        "model": lambda: model_of(data.get("model", data)),
    }
    try:
        readers[kind]()
    except InputError:
        return False
    return True


# ------------------------------------------------------------ what is taken


@pytest.mark.parametrize("kind", SCHEMAS)
def test_it_is_a_schema_with_properties_at_its_top(kind, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["schema", kind])
    assert stop.value.code == 0
    document = json.loads(capsys.readouterr().out)
    assert document == SCHEMAS[kind]()
    assert document["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert document["type"] == "object"
    assert {"profile": "base", "case": "workload", "model": "hidden"}[kind] in document["properties"]
    jsonschema.Draft202012Validator.check_schema(document)


@pytest.mark.parametrize("name", profile_names())
def test_every_shipped_profile_is_valid(name):
    assert errors("profile", read_toml(profiles_directory() / f"{name}.toml")) == []


def toml_blocks(page):
    """The files that a page shows."""
    return [part.partition("```")[0] for part in (ROOT / page).read_text().split("```toml\n")[1:]]


@pytest.mark.parametrize("page", ["docs/usage.md", "docs/tasks.md"])
def test_cases_of_the_pages_are_valid(page):
    cases = [data for data in map(tomllib.loads, toml_blocks(page)) if "hardware" in data]
    assert cases or page != "docs/usage.md"
    for data in cases:
        assert errors("case", data) == []
        assert is_read("case", data)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_valid_as_a_file(name):
    fields = PRESETS[name].model_dump(mode="json", exclude_none=True)
    for data in (fields, {"model": fields}, {"preset": name, "layers": 3}):
        assert errors("model", data) == []
        assert errors("case", {**CASE, "model": data.get("model", data)}) == []


def test_other_names_and_spellings_are_valid_as_they_are_read():
    for table, section, example in (
        (words.MODEL, "model", {**CASE["model"], "layers": 2}),
        (words.WORKLOAD, "workload", {"seq_len": 2048, "micro_batch": 2, "precision": "bf16"}),
    ):
        for name, others in table.items():
            for other in (*others, others[0].replace("_", "-"), f"--{others[0].upper()}"):
                if name in example and "-" not in other:
                    data = {**CASE, section: {k: v for k, v in example.items() if k != name} | {other: example[name]}}
                    assert errors("case", data) == []
                    assert is_read("case", data)


VALUES = {bool: True, int: 2, str: "none"}


@pytest.mark.parametrize("name", [name for name in PLAN if name in Plan.model_fields])
def test_other_names_of_plans_take_what_their_own_take(name):
    own = VALIDATORS["case"].schema["$defs"]["Plan"]["properties"][name]
    for other in PLAN[name]:
        for value in (True, 2, 0, "selective", "fp32", "Et3/t3L", 2.5, [1]):
            takes = jsonschema.Draft202012Validator(own).is_valid(value)
            assert (errors("case", {**CASE, "plan": {other: value}}) == []) == takes


PLANS = [
    "tp=8", {"tp": 8, "sequence-parallel": True}, {"cp": 2, "cp_comm_type": "a2a"}, {"dp_shard": 8},
    {"overlap_grad_reduce": True, "dp": 2}, {"recompute_granularity": "FULL"}, {"library": "megatron"},
    {"tp": 2, "recompute": "selective", "recompute_modules": ["core_attn", "mlp"]}, {"dp": 2, "grad_dtype": "bfloat16"},
    {"fsdp-reshard-after-forward": "always"}, {"tensor_model_parallel_size": 8},
    {"dp": 2, "dp_overlap": "gradients"}, {"dp": 2, "dp_overlap": True},
    {"library": "torchtitan", "tp": 2},
]  # fmt: skip


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_plans_are_valid_as_they_are_read(plan):
    data = {**CASE, "plan": plan}
    assert is_read("case", data)
    assert errors("case", data) == []


def test_a_case_has_what_a_scenario_has():
    assert set(VALIDATORS["case"].schema["properties"]) == set(Scenario.model_fields)


PERTURBED = [
    {"ranks": 3, "factor": 1.5},
    [{"ranks": [0, 7], "factor": 2}, {"distribution": "normal", "spread": 0.1, "each": "rank"}],
    [{"link": {"node": 0, "adapter": 1}, "outage": True, "to_s": 0.5}, {"link": {"node": 0}, "factor": 2.0}],
]


@pytest.mark.parametrize("perturbations", PERTURBED, ids=str)
def test_perturbations_are_valid_as_they_are_read(perturbations):
    data = {**CASE, "perturbations": perturbations}
    assert is_read("case", data)
    assert errors("case", data) == []


WORKLOADS = [{"seq_len": "2K"}, {"seq_len": 2048, "precision": "BFloat16"}, {"seq-length": 2048, "mbs": 2}]


@pytest.mark.parametrize("workload", WORKLOADS, ids=str)
def test_workloads_are_valid_as_they_are_read(workload):
    data = {**CASE, "workload": workload}
    assert is_read("case", data)
    assert errors("case", data) == []


# ------------------------------------------------------------ what is refused


def tables_in(data, path=()):
    """Paths of all tables."""
    if isinstance(data, dict):
        yield path
        for name, item in data.items():
            yield from tables_in(item, (*path, name))
    elif isinstance(data, list):
        for number, item in enumerate(data):
            yield from tables_in(item, (*path, number))


def at(data, path):
    for name in path:
        data = data[name]
    return data


FREE = ("provenance", "sources")
"""Tables with any keys."""
PROFILES = ("h800-8", "cpu-2")


@pytest.mark.parametrize("name", PROFILES)
def test_an_unknown_key_anywhere_in_a_profile_is_refused(name):
    """By the schema and by the reader, but where names of levels and types are the user's own."""
    data = read_toml(profiles_directory() / f"{name}.toml")
    own_names = {"collectives", "sends", "peak_tflops", "fraction", "burst_limit", "sustained_limit",
                 "weight_gradient_rate", "accumulation_exposed", "accumulation_half_k"}  # fmt: skip
    for path in tables_in(data):
        if path and (path[0] in FREE or path[-1] in own_names):
            continue
        changed = deepcopy(data)
        at(changed, path)["no_such_key"] = 1
        assert errors("profile", changed) != [], path


@pytest.mark.parametrize("name", PROFILES)
def test_a_number_as_text_or_without_its_source_is_refused(name):
    data = read_toml(profiles_directory() / f"{name}.toml")
    for path in tables_in(data):
        if "source" not in at(data, path):
            continue
        for mistake in ("text", "no source"):
            changed = deepcopy(data)
            table = at(changed, path)
            if mistake == "no source":
                del table["source"]
            else:
                key = next(key for key in ("value", "latency_us", "scale", "kernel") if key in table)
                table[key] = 3 if key == "kernel" else "1.0"
            assert errors("profile", changed) != [], (path, mistake)
            assert not is_read("profile", changed), (path, mistake)


H800 = read_toml(profiles_directory() / "h800-8.toml")
MISTAKES = {
    "no base and no coefficients": {key: value for key, value in H800.items() if key != "base"},
    "no name": {key: value for key, value in H800.items() if key != "name"},
    "another version": {**H800, "schema_version": 2},
    "a base that is a number": {**H800, "base": 3},
    "a scale of a hundred thousand": {**H800, "scaled": [{"level": "nvlink", "scale": 1e5, "source": "h800-links"}]},
    "a scale of no collective": {
        **H800, "scaled": [{"level": "nvlink", "scale": 0.5, "collective": "gather", "source": "h800-links"}]
    },
    "a kernel without direction": {**H800, "assumed": {"kernel_rates": {"bf16": {"gelu": {}}}}},
    "a type that is none": {**H800, "assumed": {"kernel_rates": {"fp31": {}}}},
    "a head size that is none": {
        **H800, "assumed": {"attention": {"cudnn": {"forward": {"full": {"big": {}}}}}}
    },
    "a level of no kind": {
        **H800,
        "datasheet": {**H800["datasheet"], "topology": [{**H800["datasheet"]["topology"][0], "kind": "mesh"}]},
    },
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_in_a_profile_are_refused(name):
    assert errors("profile", MISTAKES[name]) != []
    assert not is_read("profile", MISTAKES[name])


CASES = {
    "an unknown key": {**CASE, "harware": "dgx-h100"},
    "no model": {key: value for key, value in CASE.items() if key != "model"},
    "no sequence length": {**CASE, "workload": {"micro_batch": 1}},
    "a length in words": {**CASE, "workload": {"seq_len": "long"}},
    "a precision that is none": {**CASE, "workload": {"seq_len": 2048, "precision": "bf17"}},
    "a degree of none": {**CASE, "plan": {"tp": 0}},
    "a degree as text": {**CASE, "plan": {"tp": "eight"}},
    "a schedule that is none": {**CASE, "plan": {"pp_schedule": "2f1b"}},
    "an option that is none": {**CASE, "plan": {"tensor": 8}},
    "a library that is none": {**CASE, "plan": {"library": "megatrons"}},
    "a dimension that is missing": {**CASE, "model": {"layers": 2, "hidden": 1024}},
    "a dimension as text": {**CASE, "model": {**CASE["model"], "layers": "2"}},
    "an activation that is none": {**CASE, "model": {**CASE["model"], "activation": "relu6"}},
    "a scope that is none": {**CASE, "scope": "model"},
    "nodes of none": {**CASE, "nodes": 0},
    "a slow rank without a factor": {**CASE, "perturbations": {"ranks": 3}},
    "a distribution that is none": {**CASE, "perturbations": [{"distribution": "poisson", "spread": 0.1}]},
    "a link of no node": {**CASE, "perturbations": [{"link": {"adapter": 1}, "factor": 2.0}]},
}


@pytest.mark.parametrize("name", CASES)
def test_mistakes_in_a_case_are_refused(name):
    assert errors("case", CASES[name]) != []
    assert not is_read("case", CASES[name])


@pytest.mark.parametrize(
    "data", [{"layers": 2}, {**CASE["model"], "colour": 1}, {"preset": 3}, {"model": {"layers": 2}}], ids=str
)
def test_mistakes_in_a_model_are_refused(data):
    assert errors("model", data) != []
    assert not is_read("model", data)


def test_fields_have_their_docstrings():
    """What an editor shows beside a setting."""
    properties = SCHEMAS["model"]()["properties"]
    assert properties["qk_norm"]["description"].startswith("RMSNorm over the head size")
    assert all("description" in SCHEMAS["profile"]()["$defs"]["Level"]["properties"][name] for name in ("gpus",))
    assert set(Model.model_fields) < set(properties)
