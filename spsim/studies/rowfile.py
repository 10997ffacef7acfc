"""Rows on disk, one JSON document a line: a row that was cut short is computed again."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from pydantic_core import from_json

from spsim.errors import InputError
from spsim.files import whole_text
from spsim.studies.points import of_this_program
from spsim.studies.rows import DEFECT, Row
from spsim.studies.tables import Table

BATCH = 64
"""Lines that are parsed together: enough to share the names of columns, and few enough for the cache."""
PART = 256
"""Rows that are handed out together: as objects of Python they stay in a cache."""


class RowFile:
    """The finished rows of a sweep by the key of their point."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.others = 0
        """Rows of points that were not wanted, once all that were are taken."""

    def keep(self, wanted: Set[str]) -> Iterator[dict[str, Row]]:
        """The rows that are wanted, many at a time: a long sweep is never in memory as text.

        Once the last were taken the file has nothing but rows of this program, each once, so that what is added begins
        on a line of its own. Rows of points that are not wanted now stay: they may be of a larger selection.
        """
        missing, found, lines = set(wanted), set[str](), 0
        kept: dict[str, Row] = {}
        for batch in self._batches():
            rows = dict(_parse(batch))
            found.update(rows)
            for key in missing.intersection(rows):
                missing.remove(key)
                kept[key] = rows[key]
            lines += len(batch)
            if len(kept) >= PART:
                yield kept
                kept = {}
        yield kept
        ours = set(of_this_program(found))
        self.others = len(ours - wanted)
        if lines > len(ours):
            self._keep_only(ours)

    def _keep_only(self, keys: set[str]) -> None:
        left = set(keys)
        with whole_text(self.path) as file:
            for batch in self._batches():
                for line in batch:
                    for key, _ in _parse([line]):
                        if key in left:
                            left.remove(key)
                            file.write(line.decode())

    def _batches(self) -> Iterator[list[bytes]]:
        if self.path.is_dir():
            raise InputError(
                f"{self.path}: is a directory, expected the rows of a sweep; remove it or give another --out"
            )
        if self.path.exists():
            with self.path.open("rb") as file:
                while lines := list(islice(file, BATCH)):
                    yield lines

    @contextmanager
    def appending(self, keys: Sequence[str]) -> Iterator[Callable[[Iterable[Table]], None]]:
        """Add rows, whose places are those of their keys. They are handed to the system at once, so that they outlive
        the process.
        """
        with self.path.open("a", encoding="utf-8") as file:

            def append(tables: Iterable[Table]) -> None:
                for table in tables:
                    file.write("".join(_lines(keys, table)))
                file.flush()

            yield append


def _lines(keys: Sequence[str], table: Table) -> Iterator[str]:
    """Each row as JSON; a value that all have is written once."""
    fields, varying = ['{"key": "%s"'], [[keys[place] for place in table.places]]
    for name, column in table.columns.items():
        single = not isinstance(column, list | np.ndarray)
        text = _escaped(column) if single else "%s"
        fields.append(f"{_escaped(name)}: {text}")
        if not single:
            varying.append(_texts(column))
    template = ", ".join(fields) + "}\n"
    return (template % values for values in zip(*varying, strict=True))


def _escaped(value: Any) -> str:
    return json.dumps(value).replace("%", "%%")


def _texts(column: Any) -> list[str]:
    """JSON of each value."""
    values = column.tolist() if isinstance(column, np.ndarray) else column
    kinds = set(map(type, values))
    if kinds == {str}:
        known = {value: json.dumps(value) for value in set(values)}
        return [known[value] for value in values]
    return json.dumps(values)[1:-1].split(", ") if kinds <= {float, int, bool} else list(map(json.dumps, values))


def _parse(lines: Sequence[bytes]) -> list[tuple[str, Row]]:
    """(key, row) of some lines, without those that were cut short or that say of spsim that it failed."""
    if not lines[-1].endswith(b"\n"):
        return _parse(lines[:-1]) if lines[1:] else []
    try:
        rows = from_json(b"[%b]" % b",".join(lines), cache_strings="keys")
        return [(str(row.pop("key")), row) for row in rows if not row["error"].startswith(DEFECT)]
    except (ValueError, AttributeError, KeyError, TypeError):
        return [] if len(lines) == 1 else [found for line in lines for found in _parse([line])]
