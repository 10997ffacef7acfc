"""README and experiments do what they say: commands are run, code is executed, figures are recomputed."""

import json
import re
import runpy
import shlex
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

import spsim
from spsim.cli import main
from spsim.cli.app import COMMANDS, EXPERIMENT
from spsim.studies.measured_cases import load_cases
from tests.cases import published

pytestmark = [pytest.mark.docs, pytest.mark.slow]

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
USAGE = (ROOT / "docs" / "usage.md").read_text()


def blocks(language: str, page: str = USAGE) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page, flags=re.DOTALL)


def usage_commands() -> list[str]:
    """The spsim commands of the examples; not those that install, nor those that measure for minutes."""
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    commands = [line.removeprefix("python -m spsim ") for line in lines if line.startswith("python -m spsim ")]
    return [command for command in commands if command.split()[0] not in ("calibrate", "verify")]


def test_the_two_commands_stand_in_the_readme() -> None:
    commands = [block.strip() for block in blocks("sh", README)]
    assert commands[0] == "python -m pip install -e . && python -m spsim experiments/sweep.py"
    assert commands[1] == 'python -m pip install -e ".[test]" && python -m pytest'


@pytest.mark.parametrize("line", usage_commands())
def test_example_command(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(shlex.split(line))
    assert stop.value.code == 0


SIMULATED = [line for line in usage_commands() if line.split()[0] in ("run", "compare") and " --emit " not in line]


@pytest.mark.parametrize("line", SIMULATED)
def test_what_the_examples_simulate_fits(line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = shlex.split(line)
    written = next(place for place, word in enumerate(arguments) if word in ("--out", "--report"))
    with pytest.raises(SystemExit):
        main([*arguments[:written], *arguments[written + 2 :], "--json"])
    document = json.loads(capsys.readouterr().out)
    assert all(plan["fits"] for plan in document.get("plans", [document]))


def test_the_first_picture_is_that_of_a_command() -> None:
    """The figures that its caption gives are those of the comparison in the README."""
    line = next(line for line in usage_commands() if line.startswith("compare"))
    plans = [word for before, word in pairwise(shlex.split(line)) if before == "--plan"]
    model = {"preset": "gpt-22b", "attention": "flash"}
    found = spsim.compare(plans, hardware="dgx-a100-80gb", model=model, workload={"seq_len": "8K"})
    tp, sp = (account.result for account in found.accounts)
    assert "--set model.attention=flash" in line
    assert "--seq-len 8K" in line
    forward, backward = sp.layer_forward_s / tp.layer_forward_s, sp.layer_backward_s / tp.layer_backward_s
    assert (round(100 * (1 - forward)), round(100 * (1 - backward))) == (5, 1)
    assert f"needs {sp.device_memory_gib:.0f} instead of {tp.device_memory_gib:.0f} of 80 GiB" in README
    exposed = [{part: ps for part, ps in a.passes["forward"].items() if "exposed" in part} for a in found.accounts]
    assert round(100 * (sum(exposed[1].values()) / sum(exposed[0].values()) - 1)) == 12


def test_python_of_the_examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for code in (*blocks("python", README), *blocks("python")):
        exec(compile(code, "example", "exec"), {})
    assert (tmp_path / "timeline.png").stat().st_size > 10_000
    assert json.loads((tmp_path / "trace.json").read_text())


def test_case_file_of_the_examples(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole, varied = blocks("toml")
    path = tmp_path / "case.toml"
    for text, name in (
        (whole, "gpt-22b"),
        (re.sub("model = .*\n", "", whole) + varied, "gpt-22b (attention = flash, layers = 12)"),
    ):
        path.write_text(text)
        with pytest.raises(SystemExit):
            main(["run", str(path), "--json"])
        document = json.loads(capsys.readouterr().out)
        assert (document["model"], document["plan"]["recompute"], document["fits"]) == (name, "selective", True)


def test_errors_in_the_examples_are_the_current_ones() -> None:
    families = published().families
    for family in ("kort22_t4", "fuser"):
        found = families[family]
        figures = f"| {found.n} | {found.mean_abs_error_percent:.1f} % | {found.max_abs_error_percent:.1f} % |"
        assert figures in USAGE
    for words, name in (
        ("the same, Table 5", "kort22_t5"), ("SimuMax", "simumax"), ("Megatron-Bridge", "bridge_dense"),
    ):  # fmt: skip
        (row,) = (line for line in USAGE.splitlines() if line.startswith("| ") and words in line)
        shown = [float(figure) for figure in re.findall(r"([\d.]+) %", row)]
        found = families[name]
        assert shown == pytest.approx([found.mean_abs_error_percent, found.max_abs_error_percent], rel=0.1)
        assert f"| {found.n} |" in row


def test_errors_in_the_readme_are_the_current_ones() -> None:
    found = published()
    on_h100 = {case.case_id for case in load_cases() if case.hardware == "dgx-h100"}
    h100 = [
        abs(case.error_percent)
        for case in found.cases
        if case.family in ("dgxc", "mlperf") and case.case_id in on_h100 and case.error_percent and not case.fitted
    ]
    shown = [float(figure) for figure in re.findall(r"within ([\d.]+) %", README)]
    expected = [found.families[name].mean_abs_error_percent for name in ("kort22_t4", "kort22_t5")]
    assert shown[:2] == pytest.approx(expected, abs=0.06)
    assert shown[2] == pytest.approx(sum(h100) / len(h100), abs=0.06)


def test_links_of_the_readme_exist() -> None:
    for target in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (ROOT / target).exists(), target


def test_the_answer_of_the_examples_is_what_compare_says(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = shlex.split(next(line for line in usage_commands() if line.startswith("compare")))
    with pytest.raises(SystemExit):
        main([*arguments[: arguments.index("--out")], "--json"])
    sentence = json.loads(capsys.readouterr().out)["words"][0]
    assert sentence.partition("against it")[0] in " ".join(USAGE.split())


def test_what_a_result_says_of_its_trust_is_documented() -> None:
    text = (ROOT / "docs" / "validation.md").read_text()
    scenario = spsim.Scenario(hardware="dgx-h100", model="llama-3-8b", plan="tp=8", workload={"seq_len": 2048})
    result = spsim.simulate(scenario).to_json()
    keys = ("nodes", "fits_scope", "collectives", "waterfall", "stage_peaks", "assumed", "assumed_effects")
    for key in (*keys, "prior_band", "far_off"):
        assert key in result
        assert f"`{key}`" in text
    for key in result["collectives"][0]:
        assert f"`{key}`" in text


TASKS = (ROOT / "docs" / "tasks.md").read_text().split("\n## ")[1:]
NUMBER = r"\d[\d,]*(?:\.\d+)?"


def run_line(line: str) -> None:
    """A command of a page, in this process."""
    program, *arguments = shlex.split(line.removeprefix("python "))
    if program == "-m":
        with pytest.raises(SystemExit) as stop:
            main(arguments[1:])
        assert stop.value.code == 0
    else:
        runpy.run_path(program)


def words(text: str) -> str:
    """Text without the rules and paddings of its tables."""
    return " ".join(text.replace("─", " ").split())


def assert_shown(shown: str, printed: str) -> None:
    """The parts between the ellipses are printed in that order; numbers within a twentieth, percentages within two."""
    end = 0
    for part in filter(None, map(words, shown.split("…"))):
        pattern = re.sub(NUMBER, "\0", part)
        found = re.compile(re.escape(pattern).replace("\0", f"({NUMBER})")).search(printed, end)
        assert found, part
        for expected, actual in zip(re.finditer(NUMBER, part), found.groups(), strict=True):
            slack = 2 if part[expected.end() :].startswith(" %") else 0
            number = float(expected.group().replace(",", ""))
            assert float(actual.replace(",", "")) == pytest.approx(number, rel=0.05, abs=slack), part
        end = found.end()


BLOCK = re.compile(r"(?:^`(\S+)`:\n\n)?^```(\w+)\n(.*?)^```", flags=re.DOTALL | re.MULTILINE)
"""A block of code, and the file that it is to be, if the line before names one."""


def follow(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Write the files of a page, run its commands in order, and look for what it shows of each."""
    printed = ""
    for name, language, text in BLOCK.findall(page):
        if name:
            Path(name).write_text(text)
        elif language == "sh":
            for line in text.splitlines():
                if "pip install" not in line:
                    run_line(line)
            printed = words(capsys.readouterr().out)
        elif language == "text":
            assert_shown(text, printed)


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.partition("\n")[0])
def test_task(task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    assert {"sh", "text"} <= {language for _, language, _ in BLOCK.findall(task)}
    follow(task, capsys)


PAGES = [ROOT / "docs" / "tutorial.md", ROOT / "docs" / "hardware.md", *sorted((ROOT / "docs" / "how-to").glob("*.md"))]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_page(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    follow(path.read_text(), capsys)


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text()
    for path in (ROOT / "docs").rglob("*.md"):
        assert f" {path.relative_to(ROOT / 'docs').as_posix()}\n" in navigation, path


def test_every_command_and_public_name_is_in_the_reference() -> None:
    commands, names = ((ROOT / "docs" / "reference" / page).read_text() for page in ("command-line.md", "python.md"))
    assert set(re.findall(r"<!-- help: (\w+) -->", commands)) == {*COMMANDS, EXPERIMENT}
    assert set(spsim.__all__) <= set(re.findall(r"^::: spsim\.(\w+)$", names, flags=re.MULTILINE))


def test_there_are_fourteen_tasks() -> None:
    assert len(TASKS) == 14


EXPERIMENTS = [path for path in sorted((ROOT / "experiments").glob("*.py")) if "def build(" in path.read_text()]
"""All but the script that makes the bands of errors."""


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_experiment_in_quick_size(path: Path, tmp_path: Path) -> None:
    """Real process: it ends well, and leaves the CSV, the figures and the manifest."""
    done = subprocess.run(
        [sys.executable, "-m", "spsim", str(path), "--quick", "--out", str(tmp_path)],
        capture_output=True, text=True, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    directory = tmp_path / path.stem
    assert json.loads((directory / "manifest.json").read_text())["experiment"] == path.stem
    assert (directory / f"{path.stem}.csv").exists()
    assert not list(directory.glob(".*"))


def test_the_first_command_answers_as_the_readme_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its rows have the promised columns, and its last sentences are those of the README."""
    import pandas as pd

    with pytest.raises(SystemExit):
        main([str(ROOT / "experiments" / "sweep.py"), "--out", str(tmp_path)])
    assert_shown(blocks("text", README)[0], words(capsys.readouterr().out))
    frame = pd.read_csv(tmp_path / "sweep" / "sweep.csv", keep_default_na=False)
    promised = "model hardware strategy seq_len layer_time_ms exposed_comm_ms weight_sync_ms peak_memory_gib fits"
    assert set(promised.split()) <= set(frame.columns)
    assert set(frame["strategy"]) == {"TP only", "TP+SP", "Ulysses", "Ring", "USP"}
    assert set(frame["error"]) == {""}


def test_importing_an_experiment_runs_nothing(tmp_path: Path) -> None:
    code = "import runpy, sys; runpy.run_path(sys.argv[1], run_name='experiment')"
    done = subprocess.run(
        [sys.executable, "-c", code, str(ROOT / "experiments" / "sweep.py")],
        capture_output=True, text=True, check=True, cwd=tmp_path,
    )  # fmt: skip
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_package_version_is_in_the_changelog() -> None:
    assert "Unreleased" in (ROOT / "CHANGELOG.md").read_text()
    assert spsim.__doc__
