"""Rows on disk, one JSON document a line: a row that was cut short is computed again."""

from __future__ import annotations

import json
import os
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from pydantic_core import from_json

from spsim.errors import InputError
from spsim.files import whole_file
from spsim.studies.points import key_begin
from spsim.studies.rowindex import MISSING, RowIndex, digests
from spsim.studies.rows import DEFECT, Row
from spsim.studies.tables import Table

BATCH = 64
"""Lines that are parsed together: enough to share the names of columns, and few enough for the cache."""
PART = 256
"""Rows that are handed out together: as objects of Python they stay in a cache."""
DIGEST = 16
"""Digits of a key behind those of its program."""
FINE = b'"error": ""}\n'
"""How the line of a row ends that was simulated."""


class RowFile:
    """The finished rows of a sweep by the key of their point; of all of them together only where they stand is kept."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._index = RowIndex((), ())
        self._added: list[tuple[list[str], list[int]]] = []
        self._file: BinaryIO

    @property
    def others(self) -> int:
        """Rows of points that were not taken so far."""
        return self._index.unwanted

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Rows can be taken and added.

        The file has nothing but rows of this program then, each once, so that what is added begins on a line of its
        own. Rows of points that are not wanted now stay: they may be of a larger selection.
        """
        if self.path.exists() and not self.path.is_file():
            what = "a directory" if self.path.is_dir() else "no regular file"
            raise InputError(f"{self.path}: is {what}, expected the rows of a sweep; remove it or give another --out")
        with self.path.open("a+b") as file:
            self._index, lines = _indexed(file)
            if lines > len(self._index):
                self._keep(file, self._index.in_file.tolist())
        with self.path.open("a+b") as self._file:
            if lines > len(self._index):
                self._index, _ = _indexed(self._file)
            yield

    def _keep(self, file: BinaryIO, offsets: Iterable[int]) -> None:
        """Leave nothing but the rows that begin at some places."""
        with whole_file(self.path) as temporary, temporary.open("wb") as kept:
            kept.writelines(_lines_at(file, offsets))

    def take(self, keys: Sequence[str]) -> Iterator[dict[str, Row]]:
        """The rows that the file has of some keys, many at a time: a long sweep is never in memory as text."""
        for added, places in self._added:
            self._index.add(digests(added), np.array(places))
        self._added.clear()
        offsets = self._index.wanted(digests(keys))
        there = np.sort(offsets[offsets != MISSING]).tolist()
        wanted = set(keys)
        for first in range(0, len(there), PART):
            lines = [*_lines_at(self._file, there[first : first + PART])]
            parts = (_parse(lines[batch : batch + BATCH]) for batch in range(0, len(lines), BATCH))
            yield {key: row for part in parts for key, row in part if key in wanted}

    def append(self, tables: Iterable[Table]) -> None:
        """Add rows, which have their keys as the first column. They are handed to the system at once, so that they
        outlive the process.
        """
        for table in tables:
            lines = [*_lines(table)]
            start = self._file.seek(0, os.SEEK_END)
            self._file.write("".join(lines).encode())
            self._added.append((table.columns["key"], [*accumulate(map(len, lines[:-1]), initial=start)]))
        self._file.flush()


def _indexed(file: BinaryIO) -> tuple[RowIndex, int]:
    """Where rows of this program begin that need not be computed again, and how many lines there are."""
    begin = f'{{"key": "{key_begin()}'.encode()
    found, offsets, lines, offset = array("Q"), array("q"), 0, 0
    file.seek(0)
    for line in file:
        if line.startswith(begin) and (line.endswith(FINE) or _parse([line])):
            try:
                found.append(int(line[len(begin) : len(begin) + DIGEST], 16))
                offsets.append(offset)
            except (ValueError, OverflowError):
                pass  # no key
        lines += 1
        offset += len(line)
    return RowIndex(found, offsets), lines


def _lines_at(file: BinaryIO, offsets: Iterable[int]) -> Iterator[bytes]:
    """The lines that begin at some places; most begin where another ends."""
    at = -1
    for offset in offsets:
        if offset != at:
            file.seek(offset)
        line = file.readline()
        at = offset + len(line)
        yield line


def _lines(table: Table) -> Iterator[str]:
    """Each row as JSON; a value that all have is written once."""
    fields, varying = [], []
    for name, column in table.columns.items():
        single = not isinstance(column, list | np.ndarray)
        text = _escaped(column) if single else "%s"
        fields.append(f"{_escaped(name)}: {text}")
        if not single:
            varying.append(_texts(table, name))
    template = "{" + ", ".join(fields) + "}\n"
    return (template % values for values in zip(*varying, strict=True))


def _escaped(value: Any) -> str:
    return json.dumps(value).replace("%", "%%")


def _texts(table: Table, name: str) -> list[str]:
    """JSON of each value."""
    column = table.columns[name]
    if isinstance(column, np.ndarray) and column.dtype.char == "d" and np.isfinite(column).all():
        return table.digits(name)
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
        return [(row["key"], row) for row in rows if not row["error"].startswith(DEFECT)]
    except (ValueError, AttributeError, KeyError, TypeError):
        return [] if len(lines) == 1 else [found for line in lines for found in _parse([line])]
