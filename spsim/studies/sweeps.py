"""Sweeps: many configurations, one row each.

Rows are written as soon as they are known. A configuration that cannot be simulated is a row with its reason; an
interrupted sweep keeps its rows, and running it again computes only what is missing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, as_completed, wait
from itertools import count
from time import perf_counter
from typing import TYPE_CHECKING, TypeVar

from spsim.studies.columns import Columns
from spsim.studies.grids import rows_of_points, tables_of_points
from spsim.studies.points import Point, Settings
from spsim.studies.rowfile import RowFile
from spsim.studies.rows import Row
from spsim.studies.tables import frame

if TYPE_CHECKING:
    import pandas as pd

T = TypeVar("T")

INTERVAL_S = 0.2
"""Time that a chunk computed here should take: rows are on disk that soon, and progress is seen."""
LARGEST_CHUNK = 4096
WORKERS_CHUNKS = 128
"""Chunks into which the points of an executor are divided at least, so that its workers end together."""
LARGEST_WORKERS_CHUNK = 256
LAST_WORDS_S = 0.5
"""Processes that an interrupt has ended are found by their pool, which fails on futures that were cancelled before."""


def sweep(grid: Iterable[Point | Settings], executor: Executor | None = None) -> pd.DataFrame:
    """One row per configuration, in the order of the grid; failures with their reason in `error`.

    Any `concurrent.futures.Executor` can compute them; without one they are computed here.
    """
    points = [point if isinstance(point, Point) else Point(point) for point in grid]
    if executor is None:
        tables = tables_of_points(points)
    else:
        chunks = _computed_by(executor, tables_of_points, points)
        tables = [table.moved(start) for start, own in chunks for table in own]
    return frame(tables, range(len(points)))


def run_points(
    points: Sequence[Point],
    keys: Sequence[str],
    file: RowFile,
    executor: Executor | None,
    progress: Callable[[int], None],
) -> pd.DataFrame:
    """Compute what the file does not have; `progress` is told how many rows are finished."""
    columns = Columns()
    place: dict[str, int] = {}

    def add(rows: Mapping[str, Row]) -> None:
        place.update(zip(rows, count(len(columns))))
        columns.extend(rows.values())
        progress(len(place))

    for kept in file.keep(set(keys)):
        add(kept)
    missing = {key: point for key, point in zip(keys, points, strict=True) if key not in place}
    missing_keys = list(missing)
    with file.appending() as append:
        for start, computed in rows_of(list(missing.values()), executor):
            rows = dict(zip(missing_keys[start : start + len(computed)], computed, strict=True))
            append(rows)
            add(rows)
    found = columns.frame([place[key] for key in keys])
    found.insert(0, "key", list(keys))
    return found


def rows_of(points: Sequence[Point], executor: Executor | None = None) -> Iterator[tuple[int, list[Row]]]:
    """(index of the first, rows) of chunks of points as they are finished, in any order when an executor computes."""
    return _rows_here(points) if executor is None else _computed_by(executor, rows_of_points, points)


def _rows_here(points: Sequence[Point]) -> Iterator[tuple[int, list[Row]]]:
    start, size = 0, 1
    while start < len(points):
        begin = perf_counter()
        rows = rows_of_points(points[start : start + size])
        in_time = int(size * INTERVAL_S / (perf_counter() - begin))
        yield start, rows
        start += size
        size = min(max(in_time, 1), 4 * size, LARGEST_CHUNK)


def _computed_by(
    executor: Executor, compute: Callable[[Sequence[Point]], list[T]], points: Sequence[Point]
) -> Iterator[tuple[int, list[T]]]:
    """The same of what workers compute."""
    size = min(max(len(points) // WORKERS_CHUNKS, 1), LARGEST_WORKERS_CHUNK)
    starts = {executor.submit(compute, points[start : start + size]): start for start in range(0, len(points), size)}
    try:
        for future in as_completed(starts):
            yield starts.pop(future), future.result()
            del future  # with its rows
    finally:
        wait(starts, timeout=LAST_WORDS_S)
        for future in starts:
            future.cancel()
