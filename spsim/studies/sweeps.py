"""Sweeps: many configurations, one row each.

Rows are written as soon as they are known. A configuration that cannot be simulated is a row with its reason; an
interrupted sweep keeps its rows, and running it again computes only what is missing. Points are looked at so many at a
time, and their rows handed on in order, so that a sweep takes as much memory as one of `WINDOW` points.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from contextlib import nullcontext
from itertools import count, islice
from pathlib import Path
from socket import gethostname
from time import perf_counter
from typing import TYPE_CHECKING, NamedTuple, overload

from spsim.errors import InputError
from spsim.studies.grids import by_family, tables_of_points
from spsim.studies.points import Point, Settings, checked, points_of, program_fingerprint
from spsim.studies.rowfile import RowFile
from spsim.studies.spool import Spool
from spsim.studies.tablefile import check_format, write_table
from spsim.studies.tables import Table, frame
from spsim.studies.windows import Windows

if TYPE_CHECKING:
    import pandas as pd

WINDOW = 16_384
"""Points that are looked at together: enough for what is computed at once, wherever it stands among them."""
INTERVAL_S = 0.2
"""Time that a chunk computed here should take: rows are on disk that soon, and progress is seen."""
LARGEST_CHUNK = 4096
WORKERS_CHUNKS = 128
"""Chunks into which the points of an executor are divided at least, so that its workers end together."""
LARGEST_WORKERS_CHUNK = 256
IN_FLIGHT = 2 * WINDOW
"""Points that an executor has at a time."""
LAST_WORDS_S = 0.5
"""Processes that an interrupt has ended are found by their pool, which fails on futures that were cancelled before."""


@overload
def sweep(grid: Iterable[Point | Settings], executor: Executor | None = None) -> pd.DataFrame: ...
@overload
def sweep(grid: Iterable[Point | Settings], executor: Executor | None = None, *, to: str | Path) -> None: ...
def sweep(
    grid: Iterable[Point | Settings], executor: Executor | None = None, *, to: str | Path | None = None
) -> pd.DataFrame | None:
    """One row per configuration, in the order of the grid; failures with their reason in `error`.

    Any `concurrent.futures.Executor` can compute them; without one they are computed here. The rows are a frame, or are
    written `to` a file, CSV or, as its name ends, Parquet: then nothing is kept that grows with their number, and the
    grid may be a generator.
    """
    if to is not None:
        _sweep_to(to, checked(grid), executor)
        return None
    points = points_of(grid)
    chunks = [tables_of_points(points)] if executor is None else (own for _, own in tables_of([points], executor))
    return frame([table for tables in chunks for table in tables], range(len(points)))


def _sweep_to(to: str | Path, points: Iterable[Point], executor: Executor | None) -> None:
    if not isinstance(to, str | Path) or Path(to).suffix not in (".csv", ".parquet"):
        raise InputError(
            f"to = {str(to)!r}: rows are written as CSV or Parquet; give a name that ends in .csv or .parquet"
        )
    path = Path(to)
    if path.is_dir() or not path.parent.is_dir():
        wrong = f"{path.parent} is no directory" if not path.is_dir() else "is a directory"
        raise InputError(f"to = {str(to)!r}: {wrong}; give a file in a directory that is there")
    if path.suffix == ".parquet":
        check_format("parquet", str(path))
    keyed = zip(map(str, count()), points, strict=False)
    write_table(run_points(keyed, Spool(path.parent), None, executor, lambda finished: None), path)


def run_points(
    keyed: Iterable[tuple[str, Point]],
    spool: Spool,
    file: RowFile | None,
    executor: Executor | None,
    progress: Callable[[int], None],
) -> Spool:
    """The rows of points, each given with its key: those that the file does not have are computed and added to it.

    `progress` is told how many rows are finished.
    """
    windows = Windows(spool, progress)
    rest = iter(keyed)

    def missing() -> Iterator[Sequence[Point]]:
        while window := [*islice(rest, WINDOW)]:
            yield windows.open(window, file.take([key for key, _ in window]) if file else ())

    with file.opened() if file else nullcontext():
        for number, computed in tables_of(missing(), executor):
            rows = windows.keyed(number, computed)
            if file:
                file.append(rows)
            windows.add(number, rows)
    return spool


def tables_of(windows: Iterable[Sequence[Point]], executor: Executor | None) -> Iterator[tuple[int, list[Table]]]:
    """(window, rows) of chunks of points as they are finished; what is computed at once stands together."""
    return _computed_here(windows) if executor is None else _computed_by(executor, windows)


def _computed_here(windows: Iterable[Sequence[Point]]) -> Iterator[tuple[int, list[Table]]]:
    size = 1
    for number, points in enumerate(windows):
        order = by_family(points)
        while order:
            begin = perf_counter()
            chunk, order = order[:size], order[size:]
            tables = tables_of_points([points[place] for place in chunk])
            in_time = int(len(chunk) * INTERVAL_S / (perf_counter() - begin))
            yield number, [table.placed(chunk) for table in tables]
            size = min(max(in_time, 1), 4 * size, LARGEST_CHUNK)


def _computed_there(program: str, points: Sequence[Point]) -> list[Table]:
    """What a worker computes; `InputError` where its spsim would compute other rows than those that are asked for."""
    if program_fingerprint() != program:
        raise InputError(
            f"the worker on {gethostname()} has another version of spsim; install there the one that runs here"
        )
    return tables_of_points(points)


class _Chunk(NamedTuple):
    """What a worker computes at a time."""

    window: int
    places: list[int]


def _computed_by(executor: Executor, windows: Iterable[Sequence[Point]]) -> Iterator[tuple[int, list[Table]]]:
    program = program_fingerprint()
    running: dict[Future[list[Table]], _Chunk] = {}
    try:
        for chunk, points in _chunks(windows):
            running[executor.submit(_computed_there, program, points)] = chunk
            while sum(len(own.places) for own in running.values()) > IN_FLIGHT:
                yield from _ended(running)
        while running:
            yield from _ended(running)
    finally:
        wait(running, timeout=LAST_WORDS_S)
        for future in running:
            future.cancel()


def _chunks(windows: Iterable[Sequence[Point]]) -> Iterator[tuple[_Chunk, list[Point]]]:
    for number, points in enumerate(windows):
        order = by_family(points)
        size = min(max(len(order) // WORKERS_CHUNKS, 1), LARGEST_WORKERS_CHUNK)
        for start in range(0, len(order), size):
            places = order[start : start + size]
            yield _Chunk(number, places), [points[place] for place in places]


def _ended(running: dict[Future[list[Table]], _Chunk]) -> Iterator[tuple[int, list[Table]]]:
    """What has been computed since."""
    for future in wait(running, return_when=FIRST_COMPLETED).done:
        chunk = running.pop(future)
        yield chunk.window, [table.placed(chunk.places) for table in future.result()]
