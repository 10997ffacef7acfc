"""What an experiment leaves in its directory."""

import io
import json
import os
import signal
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from rich.console import Console

import spsim
from spsim.files import write_text
from spsim.studies.experiments import run_experiment
from spsim.studies.points import Point
from spsim.studies.tablefile import write_csv
from tests.test_sweeps import GRID, point


def run(directory: Path, grid: Sequence[Point] = GRID) -> pd.DataFrame:
    directory.mkdir(exist_ok=True)
    experiment = spsim.Experiment(name="mine", title="t", points=grid)
    return run_experiment(experiment, directory, None, quick=False, console=Console(file=io.StringIO())).frame()


def document(directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((directory / "manifest.json").read_text())
    return found


def test_the_table_is_what_pandas_would_write(tmp_path: Path) -> None:
    frame = run(tmp_path).drop(columns="key")
    assert (tmp_path / "mine.csv").read_text() == frame.to_csv(index=False)


def test_any_frame_is_written_as_pandas_would(tmp_path: Path) -> None:
    """Quotes, what is missing, numbers of all kinds."""
    rows: list[dict[str, Any]] = [
        {"text": 'say "a, b"', "number": 0.1 + 0.2, "whole": 3, "some": 1e300, "fits": True, "mixed": 1},
        {"text": "two\nlines", "number": -0.0, "whole": 2**60, "fits": False, "mixed": True},
        {"text": "", "number": 1e-7, "whole": 0, "some": float("nan"), "mixed": "tp=2,ring=2"},
        {"text": "é", "number": 123456789.0, "whole": -1, "some": float("inf"), "mixed": 1.0},
        {"text": "tab\tand blank ", "number": 5.0, "whole": 7},
    ]
    frame = pd.DataFrame(rows)
    write_csv(frame, tmp_path / "t.csv")
    assert (tmp_path / "t.csv").read_bytes() == frame.to_csv(index=False).encode()


def test_manifest_names_inputs_and_versions(tmp_path: Path) -> None:
    frame = run(tmp_path)
    found = document(tmp_path)
    assert found["experiment"] == "mine"
    assert [p["settings"]["plan"] for p in found["points"]] == ["tp=8", "tp=8", "tp=3", "ulysses=8"]
    assert [p["labels"] for p in found["points"]] == [dict(p.labels) for p in GRID]
    assert [p["key"] for p in found["points"]] == list(frame["key"])
    assert {"simpy", "numpy"} <= set(found["packages"])


def test_manifest_has_each_profile_and_model_once(tmp_path: Path) -> None:
    """Objects are described under `inputs`, and points refer to them."""
    profile = spsim.load_profile("dgx-h100")
    run(tmp_path, [point(length, hardware=profile) for length in range(256, 2560, 256)])
    found = document(tmp_path)
    references = {name: {p["settings"][name]["input"] for p in found["points"]} for name in ("hardware", "model")}
    described = {name: found["inputs"][digest] for name, (digest,) in references.items()}
    assert len(found["inputs"]) == 2
    assert described["model"]["hidden"] == 256
    assert described["hardware"]["name"] == "dgx-h100"
    assert (tmp_path / "manifest.json").read_text().count(profile.description) == 1


def test_results_that_are_complete_are_left_alone(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("mine.csv", "manifest.json", "rows.jsonl")]
    first = run(tmp_path)
    before = [path.stat().st_ino for path in paths]
    pd.testing.assert_frame_equal(run(tmp_path), first)
    assert [path.stat().st_ino for path in paths] == before


@pytest.mark.parametrize("change", ["table deleted", "table edited", "manifest damaged", "other points"])
def test_results_that_are_not_are_written_again(change: str, tmp_path: Path) -> None:
    table, manifest = tmp_path / "mine.csv", tmp_path / "manifest.json"
    run(tmp_path, GRID[1:] if change == "other points" else GRID)
    if change == "table deleted":
        table.unlink()
    elif change == "table edited":
        table.write_text("edited")
        later = manifest.stat().st_mtime + 1
        os.utime(table, (later, later))
    elif change == "manifest damaged":
        manifest.write_text(manifest.read_text()[:-2])
    frame = run(tmp_path)
    assert table.read_text() == frame.drop(columns="key").to_csv(index=False)
    assert len(document(tmp_path)["points"]) == len(GRID)


# ------------------------------------------------------------ what a user may get wrong


def test_settings_and_generators_are_points() -> None:
    settings = [dict(item.settings) for item in GRID]
    experiment = spsim.Experiment(name="mine", title="t", points=(item for item in settings))  # type: ignore[arg-type]
    assert [item.settings for item in experiment.selection(quick=False)] == settings


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"points": 5}, ["no list of points"]),
        ({"points": [5]}, ["points[0]: 5"]),
        ({"points": [], "name": 5}, ["name = 5"]),
        ({"points": [], "figures": 3}, ["figures", "function"]),
        ({"points": [], "tables": None}, ["tables", "function"]),
    ],
)
def test_a_field_of_another_kind_is_a_line(fields: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(spsim.InputError) as caught:
        spsim.Experiment(**{"name": "mine", "title": "t", **fields})
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "figures", [None, [1], {"a.png": 3}, {"a.png": None}, {"../a.png": "x"}, {"/a.png": "x"}, {3: "x"}]
)
def test_figures_that_are_none_are_a_line(figures: Any, tmp_path: Path) -> None:
    """The rows are there; nothing is written outside the directory."""
    experiment = spsim.Experiment(name="mine", title="t", points=GRID, figures=lambda rows: figures)
    with pytest.raises(spsim.InputError, match="figures"):
        run_experiment(experiment, tmp_path, None, quick=False, console=Console(file=io.StringIO()))
    assert (tmp_path / "rows.jsonl").read_text().count("\n") == len(GRID)


def test_all_configurations_failing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(spsim.InputError, match="all 2 configurations failed"):
        run(tmp_path, [point(256, "tp=3"), point(256, "tp=5")])
    assert (tmp_path / "mine.csv").read_text().count("\n") == 3


def test_a_worker_that_is_ended_from_outside_is_a_line(tmp_path: Path) -> None:
    """As the system does where memory runs out; rows that were there stay."""
    run(tmp_path, GRID[:1])
    experiment = spsim.Experiment(name="mine", title="t", points=GRID)
    with ProcessPoolExecutor(1, initializer=_end_soon) as pool, pytest.raises(spsim.InputError, match="worker process"):
        run_experiment(experiment, tmp_path, pool, quick=False, console=Console(file=io.StringIO()))
    assert (tmp_path / "rows.jsonl").read_text().count("\n") == 1


def _end_soon() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_the_program_says_what_a_smaller_selection_keeps(tmp_path: Path) -> None:
    run(tmp_path)
    said = io.StringIO()
    experiment = spsim.Experiment(name="mine", title="t", points=GRID)
    run_experiment(experiment, tmp_path, None, quick=True, console=Console(file=said))
    assert "keeps 3 rows of other configurations" in said.getvalue()
    assert (tmp_path / "rows.jsonl").read_text().count("\n") == len(GRID)


def test_a_link_in_the_place_of_a_temporary_file_is_not_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.urandom", lambda count: b"\0" * count)
    (tmp_path / ".a.csv.00000000.tmp").symlink_to(tmp_path / "victim")
    with pytest.raises(spsim.InputError, match=r"a\.csv"):
        write_text(tmp_path / "a.csv", "text")
    assert not (tmp_path / "victim").exists()
    assert not (tmp_path / "a.csv").exists()
