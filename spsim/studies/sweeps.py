"""Sweeps: many configurations, one row each, and experiments that turn rows into figures and tables.

A row is written the moment it is known. A configuration that cannot be simulated is a row with its reason;
an interrupted sweep keeps its rows, and running it again computes only what is missing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from spsim.errors import InputError
from spsim.files import write_text
from spsim.studies.grids import tables_of
from spsim.studies.points import Point, Settings, plain, program_fingerprint
from spsim.studies.rows import row
from spsim.studies.tables import frame

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Experiment:
    """One question: its configurations, and the figures and tables that answer it."""

    name: str
    title: str
    points: Sequence[Point]
    quick: Sequence[Point] = ()
    """A small selection for `--quick`; every fourth point unless given."""
    figures: Callable[[pd.DataFrame], Mapping[str, Figure]] = lambda frame: {}
    """File name -> figure, from the rows."""
    tables: Callable[[pd.DataFrame], Iterable[Any]] = lambda frame: ()
    """What to print, from the rows: text or rich tables."""

    def selection(self, *, quick: bool) -> Sequence[Point]:
        """The points to compute."""
        return (self.quick or self.points[::4]) if quick else self.points


def package_version() -> str:
    """Version of the installed package."""
    try:
        return version("spsim")
    except PackageNotFoundError:
        return "unknown"


def sweep(grid: Iterable[Point | Settings], executor: Executor | None = None) -> pd.DataFrame:
    """One row per configuration, in the order of the grid; failures with their reason in `error`.

    Any `concurrent.futures.Executor` can compute them; without one they are computed here.
    """
    points = [point if isinstance(point, Point) else Point(point) for point in grid]
    if executor is None:
        return frame(tables_of(points), len(points))
    rows = dict(rows_of(points, executor))
    return pd.DataFrame([rows[index] for index in range(len(points))])


def rows_of(points: Sequence[Point], executor: Executor | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
    """(index, row) as rows are finished, in any order when an executor computes them."""
    if executor is None:
        yield from ((index, row(point)) for index, point in enumerate(points))
        return
    futures = {executor.submit(_rows, points[start : start + CHUNK]): start for start in range(0, len(points), CHUNK)}
    try:
        for future in as_completed(futures):
            yield from enumerate(future.result(), futures[future])
    finally:
        for future in futures:
            future.cancel()


CHUNK = 32
"""Configurations that travel to a worker together."""


def _rows(points: Sequence[Point]) -> list[dict[str, Any]]:
    return [row(point) for point in points]


class RowFile:
    """Rows on disk, one JSON document a line: a row that was cut short is computed again."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> dict[str, dict[str, Any]]:
        """Finished rows by key."""
        if self.path.is_dir():
            raise InputError(
                f"{self.path}: is a directory, expected the rows of a sweep; remove it or give another --out"
            )
        rows = {}
        text = self.path.read_text(encoding="utf-8", errors="replace") if self.path.exists() else ""
        for line in text.splitlines():
            try:
                finished = json.loads(line)
                if "error" in finished:
                    rows[finished["key"]] = finished
            except (json.JSONDecodeError, KeyError, TypeError, RecursionError):
                continue
        return rows

    def start(self, kept: Iterable[Mapping[str, Any]]) -> None:
        """Rewrite the file with the rows that are kept, which also drops a line that was cut short."""
        text = "".join(f"{json.dumps(finished)}\n" for finished in kept)
        write_text(self.path, text)

    @contextmanager
    def appending(self) -> Iterator[Callable[[Mapping[str, Any]], None]]:
        """Add rows; each is handed to the system at once, so that it outlives the process."""
        with self.path.open("a", encoding="utf-8") as file:

            def append(finished: Mapping[str, Any]) -> None:
                file.write(f"{json.dumps(finished)}\n")
                file.flush()

            yield append


def run_points(
    points: Sequence[Point], file: RowFile, executor: Executor | None, progress: Callable[[int], None]
) -> pd.DataFrame:
    """Compute what the file does not have; `progress` is told how many rows are finished."""
    keys = {point.key for point in points}
    finished = {key: kept for key, kept in file.read().items() if key in keys}
    file.start(finished.values())
    progress(len(finished))
    missing = [point for point in points if point.key not in finished]
    with file.appending() as append:
        for index, new in rows_of(missing, executor):
            key = missing[index].key
            finished[key] = {"key": key, **new}
            append(finished[key])
            progress(len(finished))
    return pd.DataFrame([finished[point.key] for point in points if point.key in finished])


def manifest(experiment: Experiment, points: Sequence[Point]) -> dict[str, Any]:
    """What a directory of results was made from."""
    return {
        "experiment": experiment.name,
        "title": experiment.title,
        "spsim": package_version(),
        "program": program_fingerprint(),
        "packages": {name: version(name) for name in ("numpy", "pandas", "simpy", "pydantic")},
        "points": [{"key": p.key, "labels": dict(p.labels), "settings": plain(p.settings)} for p in points],
    }
