"""Sweeps: many configurations, one row each.

Rows are written as soon as they are known. A configuration that cannot be simulated is a row with its reason; an
interrupted sweep keeps its rows, and running it again computes only what is missing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, as_completed, wait
from itertools import count
from socket import gethostname
from time import perf_counter
from typing import TYPE_CHECKING

from spsim.errors import InputError
from spsim.studies.grids import by_family, tables_of_points
from spsim.studies.points import Point, Settings, points_of, program_fingerprint
from spsim.studies.rowfile import RowFile
from spsim.studies.tables import Table, frame, tables_of_rows

if TYPE_CHECKING:
    import pandas as pd

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
    points = points_of(grid)
    chunks = iter([tables_of_points(points)]) if executor is None else tables_of(points, executor)
    return frame([table for tables in chunks for table in tables], range(len(points)))


def run_points(
    points: Sequence[Point],
    keys: Sequence[str],
    file: RowFile,
    executor: Executor | None,
    progress: Callable[[int], None],
) -> pd.DataFrame:
    """Compute what the file does not have; `progress` is told how many rows are finished."""
    tables: list[Table] = []
    place: dict[str, int] = {}
    for kept in file.keep(set(keys)):
        places = range(len(place), len(place) + len(kept))
        tables += tables_of_rows(list(kept.values()), places)
        place.update(zip(kept, places, strict=True))
        progress(len(place))
    missing = {key: point for key, point in zip(keys, points, strict=True) if key not in place}
    first = finished = len(place)
    place.update(zip(missing, count(first)))
    with file.appending(list(missing)) as append:
        for computed in tables_of(list(missing.values()), executor):
            append(computed)
            tables += [table.placed(range(first, first + len(missing))) for table in computed]
            finished += sum(len(table.places) for table in computed)
            progress(finished)
    found = frame(tables, [place[key] for key in keys])
    found.insert(0, "key", list(keys))
    return found


def tables_of(points: Sequence[Point], executor: Executor | None) -> Iterator[list[Table]]:
    """The rows of chunks of points as they are finished, in any order; what is computed at once stands together."""
    order = by_family(points)
    return _computed_here(points, order) if executor is None else _computed_by(executor, points, order)


def _computed_here(points: Sequence[Point], order: Sequence[int]) -> Iterator[list[Table]]:
    start, size = 0, 1
    while start < len(order):
        begin = perf_counter()
        chunk = order[start : start + size]
        tables = tables_of_points([points[place] for place in chunk])
        in_time = int(size * INTERVAL_S / (perf_counter() - begin))
        yield [table.placed(chunk) for table in tables]
        start += size
        size = min(max(in_time, 1), 4 * size, LARGEST_CHUNK)


def _computed_there(program: str, points: Sequence[Point]) -> list[Table]:
    """What a worker computes; `InputError` where its spsim would compute other rows than those that are asked for."""
    if program_fingerprint() != program:
        raise InputError(
            f"the worker on {gethostname()} has another version of spsim; install there the one that runs here"
        )
    return tables_of_points(points)


def _computed_by(executor: Executor, points: Sequence[Point], order: Sequence[int]) -> Iterator[list[Table]]:
    size = min(max(len(order) // WORKERS_CHUNKS, 1), LARGEST_WORKERS_CHUNK)
    chunks = [order[start : start + size] for start in range(0, len(order), size)]
    program = program_fingerprint()
    running = {executor.submit(_computed_there, program, [points[place] for place in chunk]): chunk for chunk in chunks}
    try:
        for future in as_completed(running):
            chunk = running.pop(future)
            yield [table.placed(chunk) for table in future.result()]
            del future  # with its rows
    finally:
        wait(running, timeout=LAST_WORDS_S)
        for future in running:
            future.cancel()
