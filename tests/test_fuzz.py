"""Whatever a user writes: a result of finite times, or one line and exit status 2; never a traceback.

Few examples of each kind here; `python -m pytest -m fuzz` tries a thousand.
"""

import contextlib
import csv
import io
import json
import math
import re
import signal
import warnings
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import tomli_w
from hypothesis import given, settings
from hypothesis import strategies as st

import spsim
from spsim.cli import main
from spsim.inputs.profiles import profile_names
from spsim.inputs.resources import measured_cases, profiles_directory, read_toml
from spsim.measuring.calibrate.records import COLUMNS, Measurement
from tests import fuzz
from tests.test_calibration_fit import H100, measurements
from tests.test_huggingface import FAMILIES
from tests.test_kineto import gpu_rank

pytestmark = [pytest.mark.fuzz, pytest.mark.slow]
EXAMPLES = settings.get_profile("fuzz")
DEAR = settings(EXAMPLES, max_examples=-(-EXAMPLES.max_examples // 20))
"""For inputs that take a second each."""
SECONDS = 30
"""Processor time after which an input is taken to hang."""
MEASURES = re.compile(r"(_s|_ms|_us|_gib|_gib_.*|_bytes|time_.*|tokens_per_.*|tflops_.*)$")
"""Keys of numbers that are at least 0."""

RUN = ["run", "--model", "gpt-22b", "--hardware", "dgx-h100", "--seq-len", "2048"]
CASE = {
    "hardware": "dgx-h100",
    "model": {"layers": 2, "hidden": 1024, "heads": 16, "kv_heads": 8, "vocab": 1000, "dropout": 0.1, "name": "mine"},
    "plan": {"tp": 4, "sequence_parallel": True, "ring": 2, "recompute": "full"},
    "workload": {"seq_len": 2048, "micro_batch": 2, "global_batch": 4, "precision": "bf16"},
}
LLAMA = {"layers": 2, "hidden": 1024, "ffn_hidden": 2816, "heads": 16, "kv_heads": 4, "vocab": 999, "gated_mlp": True}
GPT = {"name": "gpt", "layers": 2, "hidden": 1024, "heads": 16, "vocab": 1000, "attention": "unfused", "dropout": 0.1}


# ------------------------------------------------------------ what a command comes to


def command(arguments):
    """Exit status, stdout and stderr of a command in this process; warnings and hanging are errors."""

    def hangs(*_):
        raise TimeoutError(f"over {SECONDS} s")

    out, err = io.StringIO(), io.StringIO()
    before = signal.signal(signal.SIGPROF, hangs)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)
            with pytest.raises(SystemExit) as stop:
                main(arguments)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
    return stop.value.code, out.getvalue(), err.getvalue()


def answer(*arguments):
    """What a command prints; None where it refuses, in one line of what can be seen."""
    status, out, err = command([str(argument) for argument in arguments])
    if status == 0:
        assert err == ""
        assert out.replace("\n", "").isprintable(), out
        return out
    assert (status, out) == (2, ""), (status, out, err)
    assert re.fullmatch(r"error: .+\n", err)
    assert err[:-1].isprintable(), repr(err)
    return None


def document(*arguments):
    """The JSON that a command prints, all its numbers finite, and none negative that measures; None if it refuses."""
    text = answer(*arguments, "--json")
    if text is None:
        return None
    found = json.loads(text, parse_constant=pytest.fail)
    for owner, key in fuzz.places(found):
        if fuzz.is_number(owner[key]):
            assert math.isfinite(owner[key]), key
            assert owner[key] >= 0 or not MEASURES.search(str(key)), (key, owner[key])
    return found


@contextlib.contextmanager
def written(name, content):
    """A file: of tables as TOML or JSON, by its name; of rows as CSV; of text as it is."""
    if isinstance(content, list):
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(content)
        content = text.getvalue()
    if isinstance(content, dict):
        content = json.dumps(content) if name.endswith(".json") else tomli_w.dumps(content)
    with TemporaryDirectory() as directory:
        path = Path(directory) / name
        path.write_bytes(content.encode("utf-8", "surrogatepass"))
        yield path


# ------------------------------------------------------------ case files, words, models


@given(fuzz.damaged(CASE))
@EXAMPLES
def test_case_files(case):
    with written("case.toml", case) as path:
        document("run", path)


@given(fuzz.TEXTS, st.sampled_from(["run", "compare", "explain"]))
@EXAMPLES
def test_names(name, told_by):
    """In tables."""
    with written("case.toml", {**CASE, "model": {**CASE["model"], "name": name}}) as path:
        answer(told_by, path, *(["--plan", "tp=8"] if told_by == "compare" else []))


@given(fuzz.TEXTS)
@DEAR
def test_names_in_pictures(name):
    with written("case.toml", {**CASE, "model": {**CASE["model"], "name": name}}) as path:
        if answer("run", path, "--out", path.parent / "out") is not None:
            assert len([*(path.parent / "out").iterdir()]) == 9


@given(fuzz.damaged_text(tomli_w.dumps(CASE)))
@EXAMPLES
def test_texts_of_case_files(text):
    with written("case.toml", text) as path:
        document("run", path)


@given(fuzz.PLANS, st.sampled_from(["gpt-22b", "llama-3-8b"]))
@EXAMPLES
def test_plans(plan, model):
    run = document("run", "--model", model, "--hardware", "dgx-h100", "--seq-len", "4096", f"--plan={plan}")
    explained = document("explain", "--model", model, f"--plan={plan}")
    assert run is None or explained is not None


@given(st.lists(fuzz.CHANGES, min_size=1, max_size=3))
@EXAMPLES
def test_changes(changes):
    document(*RUN, *(f"--set={change}" for change in changes))


@given(st.sampled_from(["run", "compare", "explain"]), st.lists(fuzz.ARGUMENTS, min_size=1, max_size=4))
@EXAMPLES
def test_arguments(name, arguments):
    words = [word for argument in arguments for word in argument]
    if not {"--help", "-h"} & {*words}:
        answer(name, *RUN[1:], *words)


@given(st.sampled_from([LLAMA, GPT]).flatmap(fuzz.damaged))
@EXAMPLES
def test_models(model):
    with written("model.toml", model) as path:
        document("run", "--model", path, "--hardware", "dgx-a100-80gb", "--seq-len", "2048", "--plan", "tp=4")


@given(st.sampled_from(FAMILIES).flatmap(fuzz.damaged))
@EXAMPLES
def test_configs_of_hugging_face(config):
    with written("config.json", config) as path:
        document("run", "--model", path, "--hardware", "dgx-h100", "--seq-len", "2048", "--plan", "tp=4")


@given(
    st.fixed_dictionaries(
        {"hardware": fuzz.VALUES, "model": fuzz.VALUES, "plan": fuzz.VALUES, "workload": fuzz.VALUES}
    ),
    st.sets(st.sampled_from(["hardware", "model", "plan", "workload"])),
    fuzz.damaged(CASE),
)
@EXAMPLES
def test_settings_of_python(values, strange, case):
    """Those of a scenario, and those of a sweep, which keeps the reason."""
    given_settings = {**case, **{name: values[name] for name in strange}}
    (row,) = spsim.sweep([given_settings]).to_dict("records")
    if row["error"]:
        with pytest.raises(spsim.InputError, match=r"^.+$") as refused:
            spsim.Scenario(**given_settings)
        assert str(refused.value).isprintable()
    else:
        result = spsim.simulate(spsim.Scenario(**given_settings))
        assert math.isfinite(result.step_time_s)
        assert row["step_time_ms"] == result.step_time_s * 1e3 > 0


# ------------------------------------------------------------ hardware


@cache
def profile(name):
    """The tables of a shipped profile."""
    return read_toml(profiles_directory() / f"{name}.toml")


def runs(path):
    """The documents of runs that between them use most of a profile."""
    plans = ("", "tp=2", "tp=2,sequence_parallel", "ulysses=2", "ring=2")
    model = ["run", "--hardware", path, "--model", "llama-3-8b", "--seq-len", "8192"]
    return [document(*model, "--plan", plan) for plan in plans]


@given(st.sampled_from(profile_names()).map(profile).flatmap(fuzz.damaged))
@EXAMPLES
def test_profiles(tables):
    with written("mine.toml", tables) as path:
        document("run", "--hardware", path, "--model", "llama-3-8b", "--seq-len", "8192", "--plan", "tp=2")


@given(fuzz.damaged_text((profiles_directory() / "cpu-2.toml").read_text()))
@EXAMPLES
def test_texts_of_profiles(text):
    with written("mine.toml", text) as path:
        document("run", "--hardware", path, "--model", "llama-3-8b", "--seq-len", "8192", "--plan", "tp=2")


# ------------------------------------------------------------ what others measured


@cache
def measured():
    """Header and some rows of the shipped file of measured cases."""
    header, *rows = csv.reader(measured_cases()[0].read_text().splitlines())
    return [header, *rows[::12]]


@given(st.builds(measured).flatmap(fuzz.damaged_table))
@EXAMPLES
def test_measured_cases(rows):
    with written("measured.csv", rows) as path:
        document("validate", path)


KERNELS = {
    "gemm": [["m", "n", "k", "direction", "time_us", "host"], ["4096", "4096", "4096", "wgrad", "200.5", "a"],
             ["512", "1024", "8192", "forward", "31", "b"]],
    "attention": [["heads", "kv_heads", "head_dim", "tokens", "causal", "forward_us", "backward_us"],
                  ["32", "8", "128", "4096", "1", "700", "2000.5"], ["16", "16", "64", "1000", "0", "90", ""]],
}  # fmt: skip


@given(st.sampled_from(sorted(KERNELS)).map(KERNELS.get).flatmap(fuzz.damaged_table))
@EXAMPLES
def test_microbenchmarks(rows):
    with written("measured.csv", rows) as path:
        document("kernels", path, "--hardware", "dgx-h100")


@cache
def raw():
    """A row of each kernel and collective of bf16 that a quick calibration of an H100 would write."""
    rows = {(row.kind, row.name): row for row in measurements(H100, collectives=True, quick=True) if row.dtype != "fp8"}
    device = Measurement(kind="environment", name="device", text="NVIDIA H100 80GB HBM3")
    table = [["" if value is None else str(value) for _, value in row] for row in (device, *rows.values())]
    return [list(COLUMNS), *table]


@given(st.builds(raw).flatmap(fuzz.damaged_table))
@DEAR
def test_raw_rows_of_a_calibration(rows):
    """What is fitted is a profile that runs."""
    with written("raw.csv", rows) as path:
        out = path.with_name("fitted.toml")
        if answer("calibrate", "--fit", path, "--base", "dgx-h100", "--out", out) is None:
            assert not out.exists()
        else:
            document("run", "--hardware", out, "--model", "llama-3-8b", "--seq-len", "8192", "--plan", "tp=2")


@given(fuzz.damaged(gpu_rank(0, late=0)))
@EXAMPLES
def test_measured_traces(trace):
    with written("rank0.json", trace) as path:
        document("trace", path)


@given(fuzz.damaged_text(json.dumps(gpu_rank(0, late=0), indent=1)))
@EXAMPLES
def test_texts_of_measured_traces(text):
    with written("rank0.json", text) as path:
        document("trace", path)


# ------------------------------------------------------------ experiments and their rows

POINTS = """
import spsim

MODEL = {"layers": 2, "hidden": 256, "heads": 8, "vocab": 512}


def build():
    points = [
        spsim.Point({"hardware": "dgx-h100", "model": MODEL, "plan": plan, "workload": {"seq_len": 64 * n}})
        for n in range(1, 4) for plan in ("tp=8", "ulysses=8", "tp=3")
    ]
    return spsim.Experiment(name="mine", title="Mine", points=points)
"""


@cache
def finished():
    """What the experiment leaves: its rows as text, its table and manifest."""
    with written("mine.py", POINTS) as path:
        assert answer(path, "--out", path.parent) is not None
        left = path.parent / "mine"
        table, manifest = ((left / name).read_bytes() for name in ("mine.csv", "manifest.json"))
        return (left / "rows.jsonl").read_text(), table, manifest


@given(st.builds(lambda: finished()[0]).flatmap(fuzz.damaged_lines))
@EXAMPLES
def test_rows_that_a_sweep_resumes_from(rows):
    """Lines that are lost, doubled, exchanged, joined, cut or no rows: the table is that of an undisturbed sweep."""
    with written("mine.py", POINTS) as path:
        left = path.parent / "mine"
        left.mkdir()
        (left / "rows.jsonl").write_bytes(rows.encode("utf-8", "surrogatepass"))
        assert answer(path, "--out", path.parent) is not None
        assert ((left / "mine.csv").read_bytes(), (left / "manifest.json").read_bytes()) == finished()[1:]


EXPERIMENT = """
import spsim

SETTINGS = {{"hardware": "dgx-h100", "model": "llama-3-8b", "plan": "tp=8", "workload": {{"seq_len": 8192}}}}


def build():
    return spsim.Experiment(
        name={name}, title={title}, points={points}, figures=lambda rows: {figures}, tables=lambda rows: {tables}
    )
"""
USUAL = {"name": "'mine'", "title": "'Mine'", "points": "[spsim.Point(SETTINGS)]", "figures": "{}", "tables": "[]"}
STRANGE = st.one_of(
    st.sampled_from([
        "None", "3", "rows", "build", "spsim", "1 / 0", "[SETTINGS]", "[None]", "(SETTINGS for _ in range(2))",
        "[spsim.Point({})]", "[spsim.Point(SETTINGS, {'a': {}})]", "[spsim.Point(SETTINGS, {'error': 'x'})]",
        "[spsim.Point(SETTINGS, {'key': 'x', 'step_time_ms': 1})]", "[spsim.Point(SETTINGS, {1: float('nan')})]",
        "{'a.png': 3}", "{'../a.png': None}", "[None, 3]", "['[/red]']", "[rows]", "'$x^$'",
    ]),
    fuzz.VALUES.map(repr),
)  # fmt: skip


@given(st.dictionaries(st.sampled_from(sorted(USUAL)), STRANGE, min_size=1, max_size=2))
@EXAMPLES
def test_experiments(changes):
    with written("mine.py", EXPERIMENT.format(**{**USUAL, **changes})) as path:
        status, _, err = command([str(path), "--out", str(path.parent)])
        assert (status, err) == (0, "") or (status == 2 and re.fullmatch(r"error: .+\n", err))
        assert err[:-1].isprintable()


# ------------------------------------------------------------ numbers that matter

NUMBERS = {
    "case.toml": (CASE, lambda path: [document("run", path)]),
    "llama.toml": (LLAMA, lambda path: [document(*RUN, "--plan", "tp=4", "--model", path)]),
    **{
        f"{config['model_type']}.json": (config, lambda path: [document(*RUN, "--plan", "tp=2", "--model", path)])
        for config in FAMILIES
    },
    **{f"{name}.toml": (profile(name), runs) for name in ("dgx-a100-80gb", "l40s-8", "cpu-2")},
    "measured.csv": (measured(), lambda path: [document("validate", path)]),
    **{
        f"{name}.csv": (rows, lambda path: [document("kernels", path, "--hardware", "dgx-h100")])
        for name, rows in KERNELS.items()
    },
}
"""File -> what stands in it, and what is made of it."""
FACTORS = (1e3, 1e-3)
SHARE = 1 if EXAMPLES.max_examples > 100 else 60
"""One number in so many is tried."""


@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_in_another_unit_is_refused_or_changes_the_result(name):
    """Nine in ten at least, of the numbers of which a tenth more and a tenth less do."""
    content, made = NUMBERS[name]

    def seen(number, factor):
        with written(name, fuzz.scaled(content, number, factor)) as path:
            return made(path) != usual

    with written(name, content) as path:
        usual = made(path)
    assert None not in usual
    matter = [number for number in fuzz.numbers(content)[::SHARE] if seen(number, 1.1) and seen(number, 0.9)]
    silent = [(number, factor) for number in matter for factor in FACTORS if not seen(number, factor)]
    assert len(silent) <= 0.1 * len(FACTORS) * len(matter), silent
