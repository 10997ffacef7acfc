"""Sweeps that are longer than memory: parts of them in order on disk, and nothing that grows but where rows stand."""

import io
import os
import tracemalloc
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

import spsim
from spsim.studies import spool, sweeps
from spsim.studies.experiments import load_experiment, run_experiment
from spsim.studies.points import Point
from spsim.studies.rowfile import RowFile
from spsim.studies.rowindex import MISSING, RowIndex
from spsim.studies.tables import Table
from tests.test_sweeps import GRID, keys, on_disk, point, spooled

LONG = [point(64 * n, plan) for n in range(1, 5) for plan in ("tp=8", "tp=3", "ulysses=8")]
"""Rows with numbers and without, in turn."""


def experiment(points: Any = GRID, **fields: Any) -> spsim.Experiment:
    return spsim.Experiment(name="mine", title="t", points=points, **fields)


def run(
    made: spsim.Experiment, directory: Path, *, quick: bool = False, said: io.StringIO | None = None
) -> spool.Spool:
    return run_experiment(made, directory, None, quick=quick, console=Console(file=said or io.StringIO()))


# ------------------------------------------------------------ windows


@pytest.mark.parametrize("executor", [None, ThreadPoolExecutor(2)])
@pytest.mark.parametrize("window", [1, 5])
def test_rows_are_the_same_however_many_points_are_looked_at(
    window: int, executor: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some are on file, some fail, some stand twice."""
    whole = sweeps.sweep(LONG)
    file = RowFile(tmp_path / "rows.jsonl")
    spooled(LONG[2:7], file)
    monkeypatch.setattr(sweeps, "WINDOW", window)
    monkeypatch.setattr(sweeps, "IN_FLIGHT", window)
    found = spooled([*LONG, *LONG[:2]], file, executor)
    pd.testing.assert_frame_equal(found.frame().drop(columns="key"), pd.concat([whole, whole[:2]], ignore_index=True))
    assert sum(found.failures.values()) == found.failed == 5
    assert {*on_disk(file)} == {*keys(LONG)}


def test_a_row_that_was_damaged_is_computed_again_and_then_kept(tmp_path: Path) -> None:
    """Its line ends as it should; the next run finds the new one."""
    file = RowFile(tmp_path / "rows.jsonl")
    whole = spooled(GRID, file).frame()
    first, *others = file.path.read_text().splitlines(keepends=True)
    file.path.write_text("".join([first.replace('"step_time_ms": ', '"step_time_ms": x'), *others]))
    for _ in range(2):
        pd.testing.assert_frame_equal(spooled(GRID, file).frame(), whole)
    assert {*on_disk(file)} == {*keys(GRID)}


@pytest.mark.slow
@settings(max_examples=50)
@given(st.lists(st.lists(st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 9)), max_size=20), max_size=5))
def test_an_index_is_a_dictionary(parts: list[list[tuple[int, int]]]) -> None:
    """Of the first part, to which others are added; what is asked for is no longer unwanted."""
    index, known = RowIndex(*zip(*parts[0], strict=True)) if parts and parts[0] else RowIndex((), ()), {}
    known |= dict(parts[0]) if parts else {}
    assert index.unwanted == len(known)
    for part in parts[1:]:
        own = dict(part)
        index.add(np.array([*own], dtype=np.uint64), np.array([*own.values()], dtype=np.int64))
        known |= own
    asked = np.array([*known, 5], dtype=np.uint64)
    assert index.wanted(asked).tolist() == [*known.values(), known.get(5, MISSING)]
    assert (len(index), index.unwanted) == (len(known), 0)


# ------------------------------------------------------------ rows to a file


def test_rows_go_to_a_file_in_the_place_of_a_frame(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of a generator; columns that only later rows have are empty before."""
    monkeypatch.setattr(sweeps, "WINDOW", 5)
    failing = [point(512, "tp=3"), *LONG]
    spsim.sweep((item for item in failing), to=tmp_path / "rows.csv")
    assert (tmp_path / "rows.csv").read_text() == spsim.sweep(failing).to_csv(index=False)
    assert [path.name for path in tmp_path.iterdir()] == ["rows.csv"]


def test_whole_numbers_stay_whole_where_some_rows_have_none(tmp_path: Path) -> None:
    labelled = [Point(item.settings, labels) for item, labels in zip(GRID, [{"n": 1}, {}, {}, {"n": 2}], strict=True)]
    spsim.sweep(labelled, to=tmp_path / "rows.csv")
    assert pd.read_csv(tmp_path / "rows.csv", dtype=str)["n"].fillna("").tolist() == ["1", "", "", "2"]


def test_parquet_has_the_rows_of_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pyarrow")
    monkeypatch.setattr(sweeps, "WINDOW", 5)
    frame = spsim.sweep(LONG)
    spsim.sweep(LONG, to=tmp_path / "mine.parquet")
    found = pd.read_parquet(tmp_path / "mine.parquet")
    missing = frame.isna()
    pd.testing.assert_frame_equal(found.isna(), missing)
    pd.testing.assert_frame_equal(found.astype(object).mask(missing, 0), frame.astype(object).mask(missing, 0))


def test_labels_of_several_types_are_one_line(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    labelled = [Point(GRID[0].settings, {"size": size}) for size in (1, "two")]
    with pytest.raises(spsim.InputError, match="a label is of one type in all rows"):
        spsim.sweep(labelled, to=tmp_path / "mine.parquet")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("rows.txt", r"ends in .csv or .parquet"),
        ("none/rows.csv", "is no directory"),
        ("there.csv", "is a directory"),
    ],
)
def test_where_no_rows_can_go_is_one_line(name: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "there.csv").mkdir()
    with pytest.raises(spsim.InputError, match=words):
        spsim.sweep((pytest.fail("nothing is computed before") for _ in GRID), to=tmp_path / name)


@pytest.mark.parametrize("what", ["directory", "pipe", "device"])
def test_rows_that_are_no_file_are_one_line(what: str, tmp_path: Path) -> None:
    """Nothing waits for a pipe, or reads a device without end."""
    path = tmp_path / "rows.jsonl"
    {"directory": path.mkdir, "pipe": lambda: os.mkfifo(path), "device": lambda: path.symlink_to("/dev/zero")}[what]()
    with pytest.raises(spsim.InputError, match="a directory" if what == "directory" else "no regular file"):
        run(experiment(), tmp_path)


# ------------------------------------------------------------ points of a function


def given_anew() -> Iterator[Point]:
    yield from LONG


def test_points_of_a_function_are_those_of_a_list(tmp_path: Path) -> None:
    for name, points in (("list", LONG), ("function", given_anew)):
        (tmp_path / name).mkdir()
        run(experiment(points), tmp_path / name)
    for file in ("mine.csv", "manifest.json", "rows.jsonl"):
        assert (tmp_path / "list" / file).read_bytes() == (tmp_path / "function" / file).read_bytes()


def test_a_quick_selection_of_a_function(tmp_path: Path) -> None:
    frame = run(experiment(given_anew), tmp_path, quick=True).frame()
    pd.testing.assert_frame_equal(frame.drop(columns="key"), spsim.sweep(LONG[::4]))


def test_a_function_that_gives_fewer_points_later_is_a_line(tmp_path: Path) -> None:
    once = iter(GRID)
    with pytest.raises(spsim.InputError, match="gave 4 configurations at first and 0 later"):
        run(experiment(lambda: once), tmp_path)


@pytest.mark.parametrize(("points", "words"), [("[GRID, 5]", r"points\[1\]"), ("1 / 0", "line 5: ZeroDivisionError")])
def test_what_a_function_gets_wrong_is_said_before_anything_is_computed(
    points: str, words: str, tmp_path: Path
) -> None:
    path = tmp_path / "mine.py"
    path.write_text(f"import spsim\nGRID = {{}}\n\ndef points():\n    return {points}\n\n"
                    "def build():\n    return spsim.Experiment('mine', 't', points)\n")  # fmt: skip
    with pytest.raises(spsim.InputError, match=words):
        load_experiment(path)


def test_a_frame_is_made_where_somebody_asks_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[pd.DataFrame] = []
    run(experiment(tables=lambda rows: asked.append(rows) or ()), tmp_path)
    assert len(asked[0]) == 3  # one of four fails
    monkeypatch.delattr(spool, "frame")
    assert run(experiment(), tmp_path).count == 4


def test_reasons_are_counted_and_the_commonest_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool, "REASONS", 30)
    said = io.StringIO()
    grid = [GRID[0], *(point(256, f"tp={n}") for n in range(9, 49)), *[point(256, "tp=3", nodes=n) for n in (1, 2)]]
    run(experiment(grid), tmp_path, said=said)
    lines = [line for line in said.getvalue().splitlines() if "configurations failed" in line]
    assert len(lines) == 21
    assert sum(int(line.split()[0]) for line in lines) == 42
    assert "for other reasons" in lines[-1]


# ------------------------------------------------------------ memory


def cheap(points: Sequence[Point]) -> list[Table]:
    """Rows of a few columns."""
    rows = len(points)
    return [Table(range(rows), {**{f"column {n}": np.arange(rows) / 7 for n in range(5)}, "error": ""})]


@pytest.mark.slow
@pytest.mark.parametrize("again", [False, True])
def test_memory_does_not_grow_with_the_rows(again: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """But by 17 bytes of where each stands, a few times those while they are sorted; its key alone has 80."""
    monkeypatch.setattr(sweeps, "WINDOW", 250)
    monkeypatch.setattr(sweeps, "tables_of_points", cheap)
    peaks = []
    for rows in (500, 1_000, 4_000):
        made = experiment(lambda rows=rows: (Point({}, {"n": n}) for n in range(rows)))
        (tmp_path / str(rows)).mkdir()
        if again:
            run(made, tmp_path / str(rows))
        tracemalloc.start()
        run(made, tmp_path / str(rows))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[2] - peaks[1] < 3_000 * 4 * 17
