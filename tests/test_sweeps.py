"""Sweeps keep every finished row, resume, and say why a configuration failed."""

import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas as pd
import pytest

import spsim
from spsim.studies.sweeps import Point, RowFile, manifest, rows_of, run_points, sweep

MODEL = spsim.Model(name="small", layers=2, hidden=256, heads=8, vocab=1000)


def point(seq_len: int, plan: str = "tp=8") -> Point:
    settings = {"hardware": "dgx-h100", "model": MODEL, "plan": plan, "workload": {"seq_len": seq_len}}
    return Point(settings, {"strategy": plan, "seq_len": seq_len})


GRID = [point(256), point(512), point(512, "tp=3"), point(512, "ulysses=8")]


def test_rows_equal_single_simulations() -> None:
    frame = sweep(GRID)
    for row, item in zip(frame.to_dict("records"), GRID, strict=True):
        if row["error"]:
            continue
        result = spsim.simulate(spsim.Scenario(**item.settings))
        assert row["step_time_ms"] == result.step_time_s * 1e3
        assert row["layer_time_ms"] == (result.layer_forward_s + result.layer_backward_s) * 1e3
        assert row["peak_memory_gib"] == result.peak_memory_gib
        assert row["strategy"] == item.labels["strategy"]


def test_a_failing_configuration_is_a_row_with_its_reason() -> None:
    frame = sweep(GRID)
    assert list(frame["error"] != "") == [False, False, True, False]
    assert "heads = 8" in frame["error"][2]


def test_executor_gives_the_same_rows_in_the_same_order() -> None:
    with ThreadPoolExecutor(2) as executor:
        pd.testing.assert_frame_equal(sweep(GRID, executor), sweep(GRID))


def test_settings_without_labels_are_accepted() -> None:
    frame = sweep([dict(GRID[0].settings)])
    assert frame["seq_len"][0] == 256


def test_interruption_keeps_rows_and_a_rerun_computes_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The third row is interrupted; two rows are on disk, and the rerun computes the other two only."""
    file = RowFile(tmp_path / "rows.jsonl")
    seen: list[int] = []

    def interrupt(finished: int) -> None:
        seen.append(finished)
        if finished == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_points(GRID, file, None, interrupt)
    assert len(file.read()) == 2
    computed: list[str] = []

    def counting(points: list[Point], executor: object) -> object:
        computed.extend(p.key for p in points)
        return rows_of(points)

    monkeypatch.setattr("spsim.studies.sweeps.rows_of", counting)
    frame = run_points(GRID, file, None, lambda finished: None)
    assert computed == [GRID[2].key, GRID[3].key]
    assert list(frame["key"]) == [item.key for item in GRID]
    pd.testing.assert_frame_equal(frame.drop(columns="key"), sweep(GRID), check_dtype=False)


def test_a_row_that_was_cut_short_is_computed_again(tmp_path: Path) -> None:
    """kill -9 in the middle of a write leaves half a line."""
    file = RowFile(tmp_path / "rows.jsonl")
    run_points(GRID, file, None, lambda finished: None)
    text = file.path.read_text()
    file.path.write_text(text[:-40])
    assert len(file.read()) == 3
    run_points(GRID, file, None, lambda finished: None)
    assert len(file.read()) == 4
    assert all(json.loads(line) for line in file.path.read_text().splitlines())


def test_kill_of_a_parallel_sweep(tmp_path: Path) -> None:
    """Finished rows are there, and no worker stays behind: each holds the pipe, so it ends only when all have."""
    experiment = Path(__file__).parent.parent / "experiments" / "sweep.py"
    rows = tmp_path / "sweep" / "rows.jsonl"
    with subprocess.Popen(
        [sys.executable, "-m", "spsim", str(experiment), "--out", str(tmp_path), "--jobs", "2"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    ) as process:  # fmt: skip
        while process.poll() is None and not (rows.exists() and rows.stat().st_size):
            time.sleep(0.01)
        process.kill()
        process.communicate(timeout=60)
    assert RowFile(rows).read()


def test_a_row_of_other_inputs_is_not_resumed_from(tmp_path: Path) -> None:
    file = RowFile(tmp_path / "rows.jsonl")
    run_points([point(256)], file, None, lambda finished: None)
    frame = run_points([point(1024)], file, None, lambda finished: None)
    assert list(frame["seq_len"]) == [1024]


def test_manifest_names_inputs_and_versions() -> None:
    experiment = spsim.Experiment(name="x", title="t", points=GRID)
    document = manifest(experiment, GRID)
    assert json.loads(json.dumps(document)) == document
    assert [p["settings"]["plan"] for p in document["points"]] == ["tp=8", "tp=8", "tp=3", "ulysses=8"]
    assert {"simpy", "numpy"} <= set(document["packages"])
