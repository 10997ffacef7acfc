"""Sweeps keep every finished row, resume, and say why a configuration failed."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pandas as pd
import pytest

import spsim
from spsim.inputs.resources import profiles_directory
from spsim.studies import grids, points, rows, sweeps
from spsim.studies.grids import tables_of_points
from spsim.studies.points import Point, Register
from spsim.studies.rowfile import RowFile
from spsim.studies.spool import Spool
from spsim.studies.sweeps import run_points, sweep
from spsim.studies.tables import Table, frame, tables_of_rows

MODEL = spsim.Model(name="small", layers=2, hidden=256, heads=8, vocab=1000)


def point(seq_len: int, plan: str = "tp=8", **changes: Any) -> Point:
    settings = {"hardware": "dgx-h100", "model": MODEL, "plan": plan, "workload": {"seq_len": seq_len}, **changes}
    return Point(settings, {"strategy": plan, "seq_len": seq_len})


GRID = [point(256), point(512), point(512, "tp=3"), point(512, "ulysses=8")]


def keys(grid: Sequence[Point]) -> list[str]:
    return [key for key, _ in Register().entries(grid)]


def run(grid: Sequence[Point], file: RowFile, executor: Executor | None = None) -> pd.DataFrame:
    return spooled(grid, file, executor).frame()


def spooled(
    grid: Sequence[Point], file: RowFile, executor: Executor | None = None,
    progress: Callable[[int], None] = lambda finished: None,
) -> Spool:  # fmt: skip
    return run_points(zip(keys(grid), grid, strict=True), Spool(file.path.parent), file, executor, progress)


def on_disk(file: RowFile) -> dict[str, Any]:
    """Key -> row of each line, all of them whole."""
    return {row["key"]: row for row in map(json.loads, file.path.read_text().splitlines())}


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[Point]:
    """The points that are computed from now on; one at a time, so that interrupts come between them."""
    seen: list[Point] = []

    def watched(chunk: Sequence[Point]) -> list[Table]:
        tables = tables_of_points(chunk)
        seen.extend(chunk)
        return tables

    monkeypatch.setattr(sweeps, "tables_of_points", watched)
    monkeypatch.setattr(sweeps, "LARGEST_CHUNK", 1)
    return seen


@pytest.fixture
def file(tmp_path: Path) -> RowFile:
    return RowFile(tmp_path / "rows.jsonl")


# ------------------------------------------------------------ rows


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


def test_layers_and_whole_steps_are_told_apart() -> None:
    settings = {"hardware": "dgx-h100", "model": "llama-3-8b", "plan": "tp=8", "workload": {"seq_len": 2048}}
    both = [{**settings, "scope": scope} for scope in ("layers", "step")]
    found = sweep(both)["step_time_ms"]
    alone = [1e3 * spsim.simulate(spsim.Scenario(**scenario)).step_time_s for scenario in both]
    assert found.tolist() == pytest.approx(alone, rel=1e-12)
    assert alone[0] < 0.95 * alone[1]


def test_a_failing_configuration_is_a_row_with_its_reason() -> None:
    frame = sweep(GRID)
    assert list(frame["error"] != "") == [False, False, True, False]
    assert "heads = 8" in frame["error"][2]


def test_executor_gives_the_same_rows_in_the_same_order(file: RowFile) -> None:
    """Columns too, although the row that fails has few of them and may be finished first."""
    grid = [GRID[2], *GRID] * 3
    with ThreadPoolExecutor(2) as executor:
        pd.testing.assert_frame_equal(sweep(grid, executor), sweep(grid))
        pd.testing.assert_frame_equal(run(grid, file, executor).drop(columns="key"), sweep(grid))


def test_chunks_of_an_executor_do_not_divide_what_is_computed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three plans in turn, 20 points of each: three chunks of one plan."""
    chunks: list[Sequence[Point]] = []

    def watched(chunk: Sequence[Point]) -> list[Table]:
        chunks.append(chunk)
        return tables_of_points(chunk)

    monkeypatch.setattr(sweeps, "tables_of_points", watched)
    monkeypatch.setattr(sweeps, "WORKERS_CHUNKS", 3)
    grid = [point(256 * n, plan) for n in range(1, 21) for plan in ("tp=8", "ulysses=8", "tp=4")]
    with ThreadPoolExecutor(2) as executor:
        found = sweep(grid, executor)
    plans = [{item.settings["plan"] for item in chunk} for chunk in chunks]
    assert len(plans) == 3
    assert set.union(*plans) == {"tp=8", "ulysses=8", "tp=4"}
    assert all(len(own) == 1 for own in plans)
    pd.testing.assert_frame_equal(found, sweep(grid))


@pytest.mark.parametrize("settings", [{"plan": "tp=3"}, {"plan": {"tp": 3}}, {"nodes": 3}])
def test_a_failed_row_keeps_its_settings(settings: dict[str, Any]) -> None:
    """Its sizes are whole numbers, and those of the others stay so."""
    grid = [point(512).settings, point(512, **settings).settings]
    found = sweep(grid)
    assert list(found["error"] != "") == [False, True]
    good, bad = found.to_dict("records")
    assert [bad[name] for name in ("model", "hardware", "seq_len", "micro_batch", "layers")] == [
        "small", "dgx-h100", 512, 1, 2
    ]  # fmt: skip
    assert bad["plan"] == spsim.Plan(**({"tp": 3} if "plan" in settings else {"tp": 8})).text
    assert found["seq_len"].dtype == found["gpus"].dtype == found["layers"].dtype == int
    assert good["layers"] == 2


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"hardware": "x" * 300}, ["unknown hardware"]),
        ({"hardware": "x" * 300 + ".toml"}, ["cannot be read"]),
        ({"model": "no\x1b[31m"}, ["unknown model", "\\x1b"]),
        ({"workload": 5}, ["workload"]),
        ({"plan": 5}, ["plan"]),
        ({"hardware": None}, ["hardware"]),
    ],
)
def test_a_broken_row_is_one_row(settings: dict[str, Any], words: list[str]) -> None:
    found = sweep([point(256), Point({**point(256).settings, **settings}), point(512)])
    assert list(found["error"] != "") == [False, True, False]
    for word in words:
        assert word in found["error"][1]


def test_a_defect_ends_no_sweep_and_is_tried_again(file: RowFile, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row that spsim itself could not compute says so; the others, of its family too, are there."""
    usual = rows.simulate

    def broken(scenario: spsim.Scenario) -> spsim.Result:
        if scenario.workload.seq_len == 512:
            raise KeyError("bf16")
        return usual(scenario)

    def none_at_once(grid: Any) -> Any:
        raise ZeroDivisionError

    with monkeypatch.context() as patch:
        patch.setattr(rows, "simulate", broken)
        patch.setattr(grids, "simulate_together", none_at_once)
        found = run([point(256), point(512), point(1024)], file)
    assert list(found["error"] != "") == [False, True, False]
    assert found["error"][1].startswith("spsim failed: KeyError: 'bf16'")
    assert found["model"][1] == "small"
    again = run([point(256), point(512), point(1024)], file)
    assert list(again["error"]) == ["", "", ""]
    assert len(on_disk(file)) == 3


@pytest.mark.parametrize(
    ("grid", "words"),
    [
        ([0.5], ["points[0]: 0.5", "no point"]),
        ([{}, "tp=8"], ["points[1]: 'tp=8'"]),
        ("abc", ["'abc'", "no list of points"]),
        (5, ["5", "no list of points"]),
        ({"model": "llama-3-8b"}, ["no list of points"]),
        ([Point(5)], ["points[0]"]),  # type: ignore[arg-type]
        ([Point({}, {"error": "x"})], ["label 'error'", "another name"]),
        ([Point({}, {"key": "x"})], ["label 'key'"]),
        ([Point({}, {"step_time_ms": 1})], ["label 'step_time_ms'"]),
        ([Point({}, {"a": np.int64(3)})], ["label 'a'", "use text, numbers"]),
    ],
)
def test_what_is_no_grid_is_refused_in_a_line(grid: Any, words: list[str]) -> None:
    with pytest.raises(spsim.InputError) as caught:
        sweep(grid)
    for word in words:
        assert word in str(caught.value)


def test_control_characters_of_labels_are_written_out() -> None:
    found = sweep([Point(point(256).settings, {"a\x1b": "b\x1b[31m\udc80"})])
    assert found["a\\x1b"][0] == "b\\x1b[31m\\udc80"


def test_lengths_may_be_written_as_texts() -> None:
    """Several of one plan, which are computed at once."""
    grids = [
        [{**point(256).settings, "workload": {"seq_len": length}} for length in lengths]
        for lengths in (("1K", "2K", 3072), (1024, 2048, 3072))
    ]
    pd.testing.assert_frame_equal(*map(sweep, grids))


def test_settings_without_labels_are_accepted() -> None:
    frame = sweep([dict(GRID[0].settings)])
    assert frame["seq_len"][0] == 256


def test_chunks_take_a_fraction_of_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a row costs: by the clock below 10 us, later 5 ms, in the end a second."""
    clock, chunks = 0.0, []

    def costly(chunk: Sequence[Point]) -> list[Table]:
        nonlocal clock
        took = sum(item.settings["cost"] for item in chunk)
        clock += took
        chunks.append((len(chunk), took))
        return [Table(range(len(chunk)), {"error": ""})]

    monkeypatch.setattr(sweeps, "tables_of_points", costly)
    monkeypatch.setattr(sweeps, "perf_counter", lambda: clock)
    costs = [1e-5] * 20_000 + [5e-3] * 5_000 + [1.0] * 60
    assert list(sweeps.tables_of([[Point({"cost": cost}) for cost in costs]], None))
    assert sum(size for size, _ in chunks) == len(costs)
    assert max(size for size, _ in chunks) == sweeps.LARGEST_CHUNK
    late = [took for size, took in chunks if size > 1 and took > 0.5]
    assert len(late) == 2  # those in which the cost of a row jumped


# ------------------------------------------------------------ resuming


def test_interruption_keeps_rows_and_a_rerun_computes_what_is_missing(file: RowFile, computed: list[Point]) -> None:
    """The third row is interrupted; two rows are on disk, and the rerun computes the other two only."""

    def interrupt(finished: int) -> None:
        if finished == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        spooled(GRID, file, progress=interrupt)
    assert list(on_disk(file)) == keys(GRID)[:2]
    computed.clear()
    frame = run(GRID, file)
    assert computed == GRID[2:]
    assert list(frame["key"]) == keys(GRID)
    pd.testing.assert_frame_equal(frame.drop(columns="key"), sweep(GRID))


@pytest.mark.parametrize("stop", [KeyboardInterrupt, ZeroDivisionError])
def test_what_stops_a_computation_leaves_the_rows_before_it(
    stop: type[BaseException], file: RowFile, computed: list[Point], monkeypatch: pytest.MonkeyPatch
) -> None:
    until_then = sweeps.tables_of_points

    def stopped(chunk: Sequence[Point]) -> list[Table]:
        if len(computed) == 3:
            raise stop
        return until_then(chunk)

    monkeypatch.setattr(sweeps, "tables_of_points", stopped)
    with pytest.raises(stop):
        run(GRID, file)
    assert list(on_disk(file)) == keys(GRID)[:3]


@pytest.mark.parametrize("lost", [1, 2, 40])
def test_a_row_that_was_cut_short_is_computed_again(lost: int, file: RowFile, computed: list[Point]) -> None:
    """kill -9 in the middle of a write leaves part of a line."""
    whole = run(GRID, file)
    file.path.write_text(file.path.read_text()[:-lost])
    computed.clear()
    pd.testing.assert_frame_equal(run(GRID, file), whole)
    assert computed == GRID[3:]
    assert list(on_disk(file)) == keys(GRID)


@pytest.mark.slow
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
    assert json.loads(rows.read_text().splitlines()[0])["error"] == ""


def test_a_point_that_stands_twice_is_computed_once(file: RowFile, computed: list[Point]) -> None:
    frame = run([GRID[0], *GRID], file)
    assert computed == GRID
    assert list(frame["seq_len"]) == [256, 256, 512, 512, 512]


# ------------------------------------------------------------ keys


def test_a_row_of_other_inputs_is_not_resumed_from(file: RowFile) -> None:
    run([point(256)], file)
    assert list(run([point(1024)], file)["seq_len"]) == [1024]
    assert {*on_disk(file)} == {*keys([point(256), point(1024)])}


def test_a_smaller_selection_keeps_the_rows_of_the_others(file: RowFile, computed: list[Point]) -> None:
    run(GRID, file)
    computed.clear()
    assert len(run(GRID[:1], file)) == 1
    assert file.others == len(GRID) - 1
    run(GRID, file)
    assert (computed, file.others, len(on_disk(file))) == ([], 0, len(GRID))


def test_what_is_computed_is_what_stood_in_the_files_when_the_key_was_made(tmp_path: Path) -> None:
    """Also below a preset; a file that changes later changes nothing."""
    path = tmp_path / "mine.toml"
    path.write_text("layers = 2\nhidden = 256\nheads = 8\nvocab = 512\n")
    grid = [point(256, model=model) for model in (str(path), {"preset": str(path), "vocab": 1024})]
    before = keys(grid)
    resolved = [Register().resolved(item) for item in grid]
    path.write_text("layers = 3\nhidden = 256\nheads = 8\nvocab = 512\n")
    assert not {*before} & {*keys(grid)}
    assert keys(resolved) == before
    assert list(sweep(resolved)["layers"]) == [2, 2]
    assert list(sweep(grid)["layers"]) == [3, 3]


@pytest.mark.parametrize("loader", [str, Path])
def test_a_profile_that_was_written_anew_is_read_anew(loader: Any, tmp_path: Path) -> None:
    """In one process, by name and in rows."""
    path, text = tmp_path / "mine.toml", (profiles_directory() / "dgx-h100.toml").read_text()
    grid = [point(256, hardware=loader(path))]
    found, bandwidths = [], []
    for bandwidth in (3350, 3350, 1675):
        path.write_text(text.replace("{ value = 3350", f"{{ value = {bandwidth}"))
        found += keys(grid)
        bandwidths.append(spsim.load_profile(path).memory_bandwidth)
    assert bandwidths == [3350e9, 3350e9, 1675e9]
    assert found[0] == found[1] != found[2]


def test_rows_of_another_version_of_the_program_are_not_resumed_from(
    file: RowFile, computed: list[Point], monkeypatch: pytest.MonkeyPatch
) -> None:
    for version in ("one", "one", "other"):
        monkeypatch.setattr(points, "program_fingerprint", lambda version=version: version)
        run(GRID[:2], file)
        assert list(on_disk(file)) == keys(GRID[:2])
    assert computed == GRID[:2] * 2


def test_the_version_of_the_program_is_what_stands_in_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "costs.py"
    monkeypatch.setattr(points, "_program_files", lambda: [source])
    found = []
    for text in ("rate = 1", "rate = 1", "rate = 2"):
        source.write_text(text)
        found.append(points.program_fingerprint.__wrapped__())
    assert found[0] == found[1] != found[2]


def test_the_program_is_all_of_the_package_and_its_profiles() -> None:
    names = {path.name for path in points._program_files()}
    assert {"points.py", "engine.py", "kernels.py", "dgx-h100.toml"} <= names


def test_every_setting_and_label_is_part_of_the_key() -> None:
    profile = spsim.load_profile("dgx-h100")
    fewer_flops = profile.model_copy(update={"name": "other"})
    grid = [
        point(256),
        point(257),
        point(256, "tp=4"),
        point(256, nodes=1),
        point(256, model=MODEL.model_copy(update={"layers": 3})),
        point(256, model="llama-3-8b"),
        point(256, hardware="dgx-a100-80gb"),
        point(256, hardware=profile),
        point(256, hardware=fewer_flops),
        Point(point(256).settings, {"strategy": "mine"}),
    ]
    assert len(set(keys(grid))) == len(grid)


def test_a_key_does_not_depend_on_how_the_same_settings_are_given() -> None:
    settings = point(256).settings
    same = [
        Point(dict(reversed(settings.items()))),
        Point(MappingProxyType({**settings, "model": MODEL.model_copy()})),
        Point({**settings, "workload": spsim.Workload(seq_len=256)}),
    ]
    assert set(keys(same)) == set(keys([Point(settings)]))


@pytest.mark.slow
def test_keys_of_profiles_are_the_same_in_every_process() -> None:
    """Although sets, of which a profile has two, are in another order in each."""
    code = (
        "import spsim; from spsim.studies.points import Register;"
        "print(*Register().entries([spsim.Point({'hardware': spsim.load_profile('dgx-h100')})]))"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True,
            env={**os.environ, "PYTHONHASHSEED": seed},
        ).stdout
        for seed in ("1", "2")
    }  # fmt: skip
    assert len(found) == 1


def test_a_model_in_a_file_is_known_by_what_stands_there(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    found = []
    for layers in (2, 2, 3):
        path.write_text(f"layers = {layers}\nhidden = 256\nheads = 8\nvocab = 512\n")
        found += keys([point(256, model=str(path))])
    assert found[0] == found[1] != found[2]


def test_a_label_that_cannot_be_written_is_refused() -> None:
    with pytest.raises(spsim.InputError, match="use text, numbers"):
        sweep([Point(GRID[0].settings, {("tp", 8): "x"})])  # type: ignore[dict-item]


# ------------------------------------------------------------ tables

ROWS: list[dict[str, Any]] = [
    {"a": 1, "b": "x", "error": "broken"},
    *({"a": i, "c": i / 7, "fits": i % 2 == 0, "b": "y" * (i % 3), "error": ""} for i in range(10)),
    {"a": 2.5, "d": 2**70, "b": True, "error": ""},
    {"a": 2.5, "d": '"5 %s", said', "b": 1, "error": "", "100 %": float("inf")},
]


def in_parts(rows: Sequence[dict[str, Any]], size: int) -> list[Table]:
    return [
        table
        for start in range(0, len(rows), size)
        for table in tables_of_rows(rows[start : start + size], range(start, min(start + size, len(rows))))
    ]


@pytest.mark.parametrize("size", [1, 3, 5, 20])
def test_the_frame_of_tables_is_the_frame_of_their_rows(size: int) -> None:
    """Rows of several layouts, numbers and texts mixed, over several parts, in another order."""
    tables = in_parts(ROWS, size)
    for order in (list(range(len(ROWS))), list(reversed(range(len(ROWS)))), [5, *range(13), 2]):
        pd.testing.assert_frame_equal(frame(tables, order), pd.DataFrame([ROWS[number] for number in order]))


@pytest.mark.skipif(find_spec("pyarrow") is not None, reason="with pyarrow pandas holds texts in buffers of their own")
def test_equal_texts_are_held_once() -> None:
    tables = tables_of_rows([{"text": f"{2**40}"} for _ in range(100)], range(100))
    assert len({id(text) for text in frame(tables, range(100))["text"]}) == 1


@pytest.mark.parametrize("size", [1, 3, 20])
def test_lines_are_the_json_of_the_rows(size: int, file: RowFile) -> None:
    """Also of rows with a value that all of a table have."""
    tables = in_parts(ROWS, size)
    names = [f"key {number}" for number in range(len(ROWS))]
    rows = [{"key": name, "model": "100 %", "fits": True, **row} for name, row in zip(names, ROWS, strict=True)]
    shared = {"model": "100 %", "fits": True}
    with file.opened():
        file.append([Table(t.places, {"key": [names[n] for n in t.places], **shared, **t.columns}) for t in tables])
    lines = [*map(json.dumps, rows)]
    assert sorted(file.path.read_text().splitlines()) == sorted(lines)
