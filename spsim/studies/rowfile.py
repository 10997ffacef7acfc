"""Rows on disk, one JSON document a line: a row that was cut short is computed again."""

from __future__ import annotations

import json
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

from spsim.errors import InputError
from spsim.files import whole_text
from spsim.studies.rows import Row

BATCH = 64
"""Lines that are parsed together: enough to share the names of columns, and few enough for the cache."""


class RowFile:
    """The finished rows of a sweep by the key of their point."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def keep(self, wanted: Container[str]) -> Iterator[dict[str, Row]]:
        """The rows that are wanted, some at a time: a long sweep is never in memory as text.

        Once the last were taken the file has nothing else, so that what is added begins on a line of its own.
        """
        complete = True
        for lines in self._batches():
            kept = {key: row for key, row in _parse(lines) if key in wanted}
            complete = complete and len(kept) == len(lines)
            yield kept
        if not complete:
            with whole_text(self.path) as file:
                for lines in self._batches():
                    file.writelines(line for line in lines for key, _ in _parse([line]) if key in wanted)

    def _batches(self) -> Iterator[list[str]]:
        if self.path.is_dir():
            raise InputError(
                f"{self.path}: is a directory, expected the rows of a sweep; remove it or give another --out"
            )
        if self.path.exists():
            with self.path.open(encoding="utf-8", errors="replace") as file:
                while lines := list(islice(file, BATCH)):
                    yield lines

    @contextmanager
    def appending(self) -> Iterator[Callable[[Mapping[str, Row]], None]]:
        """Add rows; they are handed to the system at once, so that they outlive the process."""
        with self.path.open("a", encoding="utf-8") as file:

            def append(rows: Mapping[str, Row]) -> None:
                file.write("".join([f'{{"key": "{key}", {json.dumps(row)[1:]}\n' for key, row in rows.items()]))
                file.flush()

            yield append


def _parse(lines: Sequence[str]) -> list[tuple[str, Row]]:
    """(key, row) of some lines, without those that were cut short."""
    if not lines[-1].endswith("\n"):
        return _parse(lines[:-1]) if lines[1:] else []
    try:
        rows = json.loads(f"[{','.join(lines)}]")
        return [(str(row.pop("key")), row) for row in rows if "error" in row]
    except (json.JSONDecodeError, RecursionError, AttributeError, KeyError, TypeError):
        return [] if len(lines) == 1 else [found for line in lines for found in _parse([line])]
