"""The application: what it says of its commands, and what it is asked without one."""

import inspect
import json
import os
import re
import subprocess
import sys
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

import pytest

import spsim
from spsim.cli import app, main
from spsim.cli.app import COMMANDS, EXPERIMENT
from spsim.inputs.libraries import LIBRARIES
from spsim.inputs.plan import Plan
from spsim.report.listing import PLAN_OPTIONS

MODULES = {path.stem for path in (Path(app.__file__).parent / "commands").glob("*.py")}


def test_every_module_is_a_command_and_is_listed():
    assert {*COMMANDS, EXPERIMENT, "__init__"} == MODULES


@pytest.mark.parametrize("name", COMMANDS)
def test_the_list_says_of_a_command_what_its_help_begins_with(name, capsys):
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert ended.value.code == 0
    assert text.startswith(f"Usage: spsim {name} ")
    assert re.search(rf"[]}}](\.\.\.)? {re.escape(COMMANDS[name])} ", text)


@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_help_lists_all_commands(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    text = " ".join(capsys.readouterr().out.split())
    assert ended.value.code == 0
    assert text.endswith("Commands: " + " ".join(f"{name} {line}" for name, line in COMMANDS.items()))


def test_version(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert (ended.value.code, capsys.readouterr().out) == (0, f"spsim {spsim.__version__}\n")
    assert spsim.__version__ == version("spsim")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("schema foo", "Invalid value for 'kind': 'foo' is not one of 'profile', 'case', 'model'; see spsim --help"),
        ("plan --max foo", "Invalid value for '--max': 'foo' is not one of 'seq_len'; see spsim --help"),
        ("sweep", "No such command 'sweep'; see spsim --help"),
    ],
)
def test_what_is_no_choice_is_one_line_in_our_words(line, said, capsys):
    with pytest.raises(SystemExit) as ended:
        main(line.split())
    assert (ended.value.code, capsys.readouterr().err) == (2, f"error: {said}\n")


def test_names_of_the_package():
    assert {"simulate", "Plan"} <= set(dir(spsim))
    with pytest.raises(AttributeError, match="nothing"):
        _ = spsim.nothing


@pytest.mark.slow
def test_threads_are_left_as_they_were_set():
    """What numpy is told while a command is imported does not reach what the command starts."""
    code = (
        "import os\nfrom spsim.cli import main\n"
        "try:\n    main(['run', '--help'])\nfinally:\n    print(os.environ.get('OPENBLAS_NUM_THREADS'))"
    )
    kept = {name: value for name, value in os.environ.items() if name != "OPENBLAS_NUM_THREADS"}
    for environment, expected in ((kept, "None"), ({**kept, "OPENBLAS_NUM_THREADS": "3"}, "3")):
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        assert done.stdout.splitlines()[-1] == expected


# ------------------------------------------------------------ one set of options

CASE = """
hardware = "dgx-h100"
[model]
preset = "gpt-22b"
layers = 2
attention = "flash"
[plan]
tp = 8
[workload]
seq_len = 2048
"""
SAME = {
    "case", "model", "hardware", "plan", "seq_len", "micro_batch", "global_batch", "precision", "phase", "nodes",
    "changes", "as_json", "out",
}  # fmt: skip


def printed(capsys, *arguments):
    """The JSON document that a command prints."""
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--json"])
    found = capsys.readouterr()
    assert ended.value.code == 0, found.err
    return json.loads(found.out)


@pytest.mark.parametrize("name", ["run", "compare", "explain"])
def test_a_scenario_is_given_to_all_commands_alike(name):
    command = import_module(f"spsim.cli.commands.{name}").command
    assert set(inspect.signature(command).parameters) >= SAME


@pytest.mark.parametrize("arguments", [[], ["run"], ["compare"], ["list"], ["validate"]])
def test_the_short_option_of_help(arguments, capsys):
    texts = []
    for option in ("-h", "--help"):
        with pytest.raises(SystemExit) as ended:
            main([*arguments, option])
        assert ended.value.code == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    assert "-h, --help" in texts[0]


def test_run_in_other_words(capsys):
    plain = ["run", "--model", "llama-3-8b", "--hardware", "dgx-h100"]
    ours = printed(capsys, *plain, "--plan", "tp=8,sequence_parallel", "--seq-len", "65536", "--micro-batch", "2")
    theirs = printed(capsys, *plain, "--plan", "TP8+SP", "--seq-length", "64K", "--micro-batch-size", "2")
    assert ours == theirs
    assert ours["workload"]["seq_len"] == 65536


@pytest.mark.slow
def test_compare_in_other_words(capsys):
    plain = ["compare", "--model", "llama-3-8b", "--hardware", "dgx-h100"]
    ours = printed(capsys, *plain, "--plan", "tp=8,sequence_parallel", "--plan", "ulysses=8", "--seq-len", "65536")
    theirs = printed(capsys, *plain, "--plan", "TP8+SP", "--plan", "cp=8,cp_comm_type=a2a", "--seq-len", "64K")
    assert [plan["name"] for plan in theirs["plans"]] == ["TP8+SP", "Ulysses 8"]
    for document in (ours, theirs):
        for plan in document["plans"]:
            del plan["plan_text"]
    assert ours == theirs


def test_names_of_compared_plans_show_their_further_options(capsys):
    plans = ("TP8+SP,recompute_granularity=selective", "TP8+SP", "tp=8,tp_backward_overlap=false")
    given = [word for plan in plans for word in ("--plan", plan)]
    found = printed(capsys, "compare", "--model", "gpt-22b", "--hardware", "dgx-h100", "--seq-len", "2K", *given)
    names = ["TP8+SP, recompute=selective", "TP8+SP", "TP8, tp_backward_overlap=false"]
    assert [plan["name"] for plan in found["plans"]] == names


@pytest.mark.slow
def test_a_changed_setting_is_that_of_a_table(capsys, tmp_path):
    """Of presets, tables and files alike."""
    (tmp_path / "case.toml").write_text(CASE)
    case = str(tmp_path / "case.toml")
    given = ["run", "--model", "gpt-22b", "--hardware", "dgx-h100", "--plan", "tp=8", "--seq-len", "2K"]
    by_set = printed(capsys, *given, "--set", "model.layers=2", "--set", "model.attention=flash")
    assert by_set == printed(capsys, "run", case)
    assert by_set["model"] == "gpt-22b (layers = 2, attention = flash)"
    more = printed(capsys, "run", case, "--set", "plan.sequence_parallel=true", "--set", "workload.seq_len=4K")
    assert more == printed(capsys, "run", case, "--plan", "TP8+SP", "--seq-len", "4096")
    assert printed(capsys, "run", case, "--set", "model.num_layers=3")["model"].startswith("gpt-22b (layers = 3")


def test_options_take_the_place_of_what_a_case_file_says(capsys, tmp_path):
    (tmp_path / "case.toml").write_text(CASE)
    case = str(tmp_path / "case.toml")
    found = printed(capsys, "run", case, "--hardware", "dgx-a100-80gb", "--model", "llama-3-8b", "--precision", "fp16")
    assert (found["hardware"], found["model"]) == ("dgx-a100-80gb", "llama-3-8b")
    assert (found["workload"]["precision"], found["workload"]["seq_len"], found["plan"]["tp"]) == ("fp16", 2048, 8)


def test_paths_of_a_case_file_are_beside_it_too(capsys, tmp_path, monkeypatch):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "model.toml").write_text("layers = 2\nhidden = 256\nheads = 8\nvocab = 512\n")
    (tmp_path / "sub" / "case.toml").write_text(
        'hardware = "dgx-h100"\nmodel = "model.toml"\n[workload]\nseq_len = 256\n'
    )
    documents = []
    for directory, case in ((tmp_path, "sub/case.toml"), (tmp_path / "sub", "case.toml")):
        monkeypatch.chdir(directory)
        documents.append(printed(capsys, "run", case))
    assert documents[0] == documents[1]


@pytest.mark.slow
def test_compare_and_explain_take_a_case_file(capsys, tmp_path):
    """The plan of the file is the first."""
    (tmp_path / "case.toml").write_text(CASE)
    case = str(tmp_path / "case.toml")
    assert [p["name"] for p in printed(capsys, "compare", case, "--plan", "ulysses=8")["plans"]] == ["TP8", "Ulysses 8"]
    given = ["--hardware", "dgx-h100", "--set", "model.layers=2", "--set", "model.attention=flash", "--seq-len", "2K"]
    alone = printed(capsys, "explain", "--model", "gpt-22b", "--plan", "tp=8", *given)
    assert printed(capsys, "explain", case) == alone
    with pytest.raises(SystemExit):
        main(["explain", case, "--json", "--out", str(tmp_path / "out")])
    assert json.loads((tmp_path / "out" / "explanation.json").read_text()) == alone


@pytest.mark.slow
def test_nodes_of_a_comparison(capsys):
    """Eight GPUs on two nodes are slower than on one, and as slow as a run says."""
    given = ["--model", "llama-3-8b", "--hardware", "dgx-h100", "--seq-len", "8K", "--nodes", "2"]
    compared = printed(capsys, "compare", *given, "--plan", "tp=8", "--plan", "ulysses=8")
    alone = printed(capsys, "run", *given, "--plan", "tp=8")
    assert compared["plans"][0]["step_time_s"] == alone["step_time_s"]
    assert alone["step_time_s"] > 1.2 * printed(capsys, "run", *given[:-2], "--plan", "tp=8")["step_time_s"]


def test_list_plans_has_every_option(capsys):
    assert PLAN_OPTIONS.keys() == Plan.model_fields.keys()
    with pytest.raises(SystemExit) as ended:
        main(["list", "plans"])
    text = capsys.readouterr().out
    assert ended.value.code == 0
    for word in (*Plan.model_fields, "zigzag", "context_parallel_size", "tensor_model_parallel_size", "cp_comm_type"):
        assert word in text


def test_list_libraries_has_every_choice(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["list", "libraries"])
    text = capsys.readouterr().out
    assert ended.value.code == 0
    for name, record in LIBRARIES.items():
        assert {name, record.version, *record.options} <= {*re.split(r"[\s,]+", text)}


def test_explain_takes_a_library(capsys):
    """The same as in the plan."""
    given = ["--model", "llama-3-8b", "--plan", "tp=8"]
    found = printed(capsys, "explain", *given, "--library", "torchtitan")
    assert found == printed(capsys, "explain", *given[:-1], "tp=8,library=torchtitan")
    assert {"q", "k", "v", "gate", "up"} <= {row["operator"] for row in found["operators"]}
    assert any(note.startswith("as torchtitan 0.2.2 does it") for note in found["notes"])


def test_a_plan_under_two_libraries_is_compared(capsys):
    """Labels tell them apart."""
    given = ["--model", "llama-3-8b", "--hardware", "dgx-h100", "--seq-len", "8192"]
    found = printed(capsys, "compare", *given, "--plan", "tp=8", "--plan", "tp=8,library=transformers")
    assert [plan["name"] for plan in found["plans"]] == ["TP8", "TP8 (transformers)"]
    assert found["plans"][1]["step_time_s"] > found["plans"][0]["step_time_s"]


# ------------------------------------------------------------ completion


@pytest.mark.parametrize(
    ("typed", "completions"),
    [
        ("li", {"list"}),
        ("run --see", {"--seeds"}),
        ("run --seq-le", {"--seq-len", "--seq-length"}),
        ("run --model gpt-2", {"gpt-22b"}),
        ("compare --hardware dgx-h", {"dgx-h100", "dgx-h200"}),
        ("explain --plan tp=8,ring_k", {f"tp=8,ring_kind={kind}" for kind in ("p2p", "all_gather", "gather_permute")}),
        ("run --set model.qk_nope", {"model.qk_nope_head_dim="}),
        ("list ", {"hardware", "models", "plans", "libraries"}),
        ("explain --library torch", {"torchtitan", "torch"}),
    ],
)
def test_a_shell_completes(typed, completions, capsys, monkeypatch):
    monkeypatch.setenv("_SPSIM_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", f"spsim {typed}")
    monkeypatch.setenv("COMP_CWORD", str(len(typed.split(" "))))
    with pytest.raises(SystemExit) as ended:
        main([])
    assert ended.value.code == 0
    assert set(capsys.readouterr().out.split()) == completions
