"""What an experiment leaves in its directory."""

import io
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from rich.console import Console

import spsim
from spsim.studies.csvfile import write_csv
from spsim.studies.experiments import run_experiment
from spsim.studies.points import Point
from tests.test_sweeps import GRID, point


def run(directory: Path, grid: Sequence[Point] = GRID) -> pd.DataFrame:
    directory.mkdir(exist_ok=True)
    experiment = spsim.Experiment(name="mine", title="t", points=grid)
    return run_experiment(experiment, directory, None, quick=False, console=Console(file=io.StringIO()))


def document(directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((directory / "manifest.json").read_text())
    return found


def test_the_table_is_what_pandas_would_write(tmp_path: Path) -> None:
    frame = run(tmp_path).drop(columns="key")
    assert (tmp_path / "mine.csv").read_text() == frame.to_csv(index=False)


def test_any_frame_is_written_as_pandas_would(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Quotes, what is missing, numbers of all kinds, several parts."""
    monkeypatch.setattr("spsim.studies.csvfile.PART", 2)
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
