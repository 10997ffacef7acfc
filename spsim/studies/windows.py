"""The points of a sweep so many at a time, and their rows in order, whatever the order in which they come."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from spsim.studies.points import Point
from spsim.studies.rows import Row
from spsim.studies.spool import Part, Spool
from spsim.studies.tables import Table, tables_of_rows


@dataclass(slots=True)
class _Window:
    """Some points, whose rows are those that are known and then those to compute, each once."""

    order: list[int]
    """Of each point its row."""
    missing: list[str]
    """Keys of the rows to compute."""
    known: int
    tables: list[Table]
    left: int
    """Rows that are still to come."""


class Windows:
    """Those whose rows are not all there; what is complete goes into a spool."""

    def __init__(self, spool: Spool, progress: Callable[[int], None]) -> None:
        self._spool, self._progress = spool, progress
        self._open: dict[int, _Window] = {}
        self._opened = self._finished = 0

    def open(self, keyed: Sequence[tuple[str, Point]], known: Iterable[Mapping[str, Row]]) -> list[Point]:
        """The points to compute of the next window, of which some rows are known by their keys."""
        place: dict[str, int] = {}
        tables: list[Table] = []
        for rows in known:
            tables += tables_of_rows(list(rows.values()), range(len(place), len(place) + len(rows)))
            place.update(zip(rows, range(len(place), len(place) + len(rows)), strict=True))
        missing = {key: point for key, point in keyed if key not in place}
        found = len(place)
        place.update(zip(missing, range(found, found + len(missing)), strict=True))
        order = [place[key] for key, _ in keyed]
        self._open[self._opened] = _Window(order, list(missing), found, tables, len(missing))
        self._opened += 1
        self._advance(found)
        return list(missing.values())

    def keyed(self, number: int, tables: Iterable[Table]) -> list[Table]:
        """Rows that were to be computed of a window, with their keys and placed among all of it."""
        window = self._open[number]
        found = []
        for table in tables:
            keys = [window.missing[place] for place in table.places]
            places = [window.known + place for place in table.places]
            found.append(Table(places, {"key": keys, **table.columns}))
        return found

    def add(self, number: int, tables: Sequence[Table]) -> None:
        """Rows that are finished."""
        window = self._open[number]
        window.tables += tables
        count = sum(len(table.places) for table in tables)
        window.left -= count
        self._advance(count)

    def _advance(self, count: int) -> None:
        for number, window in list(self._open.items()):
            if window.left:
                break
            self._spool.add(Part(window.tables, window.order))
            del self._open[number]
        self._finished += count
        self._progress(self._finished)
