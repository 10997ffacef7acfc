"""The rows of a sweep in the order of its points, on disk until somebody wants all of them."""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from spsim.files import Scratch
from spsim.studies.tables import Table, frame, kinds

if TYPE_CHECKING:
    import pandas as pd

REASONS = 1000
"""Why rows failed, at most so many that are told apart."""
OTHER_REASONS = "other reasons"


class Part(NamedTuple):
    """Some rows of a sweep."""

    tables: Sequence[Table]
    order: Sequence[int]
    """Of each row its place in the tables; a point that stands twice has one there."""


class Spool:
    """Parts of a sweep, added as they come: what is kept here is what they are made of.

    They stand on the disk where they are to be written.
    """

    def __init__(self, directory: Path) -> None:
        self._scratch = Scratch(directory)
        self._sizes: list[int] = []
        """Bytes of each part."""
        self.count = 0
        """Rows."""
        self.columns: dict[str, set[type]] = {}
        """The types of the values of each; columns stand in the order in which rows name them."""
        self.failures: Counter[str] = Counter()
        """Rows by reason."""

    @property
    def failed(self) -> int:
        """Rows without numbers."""
        return self.failures.total()

    def add(self, part: Part) -> None:
        """The next rows."""
        rows = np.bincount(part.order, minlength=1)
        for table in _as_met(part):
            for name, column in table.columns.items():
                self.columns.setdefault(name, set()).update(kinds(column))
            self._count_failures(table, rows)
        self.count += len(part.order)
        data = pickle.dumps(part, pickle.HIGHEST_PROTOCOL)
        self._sizes.append(len(data))
        self._scratch.append(data)

    def _count_failures(self, table: Table, rows: npt.NDArray[np.intp]) -> None:
        errors = table.columns["error"]
        if isinstance(errors, str):
            errors = [errors] * len(table.places) if errors else ()
        for place, reason in zip(table.places, errors, strict=False):
            if reason:
                known = reason in self.failures or len(self.failures) < REASONS
                self.failures[reason if known else OTHER_REASONS] += int(rows[place])

    def parts(self) -> Iterator[Part]:
        """All of them, one after another."""
        for start, end in pairwise(accumulate(self._sizes, initial=0)):
            yield pickle.loads(self._scratch.read(start, end - start))

    def frame(self) -> pd.DataFrame:
        """All rows."""
        tables: list[Table] = []
        order: list[int] = []
        first = 0
        for part in self.parts():
            tables += [Table([first + place for place in table.places], table.columns) for table in part.tables]
            order += [first + place for place in part.order]
            first += sum(len(table.places) for table in part.tables)
        return frame(tables, order)


def _as_met(part: Part) -> Sequence[Table]:
    """The tables in the order of their first rows."""
    number = np.empty(sum(len(table.places) for table in part.tables), dtype=np.intp)
    for index, table in enumerate(part.tables):
        number[table.places] = index
    return [part.tables[index] for index in dict.fromkeys(number[part.order].tolist())]
