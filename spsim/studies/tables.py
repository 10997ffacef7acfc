"""Rows of a sweep as columns: how many configurations come out of one computation, and the frame of all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from spsim.studies.rows import Row

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, slots=True)
class Table:
    """Rows with the same columns: of each an array, a list, or one value for all."""

    places: Sequence[int]
    """Of the rows in the sweep, in order."""
    columns: Row

    def rows(self) -> Iterator[tuple[int, Row]]:
        """(place, row), with values as Python has them."""
        count = len(self.places)
        values = [_listed(column, count) for column in self.columns.values()]
        for place, row in zip(self.places, zip(*values, strict=True), strict=True):
            yield place, dict(zip(self.columns, row, strict=True))


def _listed(column: Any, count: int) -> list[Any]:
    if isinstance(column, np.ndarray):
        found: list[Any] = column.tolist()
        return found if len(found) == count else found * count
    return column if isinstance(column, list) else [column] * count


def frame(tables: Sequence[Table], count: int) -> pd.DataFrame:
    """All rows in their order, as pandas makes it of rows; columns stand in the order in which the rows name them."""
    import pandas as pd

    tables = sorted(tables, key=lambda table: table.places[0])
    places = [np.array(table.places, dtype=np.intp) for table in tables]
    columns: dict[str, Any] = {}
    mixed: list[str] = []
    for name in dict.fromkeys(name for table in tables for name in table.columns):
        parts = [
            (where, *_kind(table.columns[name]))
            for where, table in zip(places, tables, strict=True)
            if name in table.columns
        ]
        columns[name] = _joined(parts, count)
        if columns[name] is None:
            mixed.append(name)
    if mixed:
        inferred = pd.DataFrame(_rows(tables, mixed, count), columns=mixed)
        columns |= {name: inferred[name] for name in mixed}
    return pd.DataFrame(columns, index=range(count), copy=False)


_Part = tuple[npt.NDArray[np.intp], type, Any]
"""Places, the type of the values there, and the values or one for all."""


def _kind(column: Any) -> tuple[type, Any]:
    """The type that all values of a column have, `object` if there is none, and an array of them or one for all."""
    if isinstance(column, np.ndarray):
        return _KINDS.get(column.dtype.char, object), column
    if isinstance(column, list):
        kinds = set(map(type, column))
        return kinds.pop() if len(kinds) == 1 else object, column
    return type(column), column


_KINDS: dict[str, type] = {"d": float, "l": int, "?": bool, "O": str}
"""Of arrays that figures are; those of objects are texts."""


def _joined(parts: Sequence[_Part], count: int) -> Any:
    """A column whose values are numbers of one kind, or texts; None where pandas has to find out what it is."""
    kinds = {kind for _, kind, _ in parts}
    kind = kinds.pop()
    whole = sum(len(places) for places, _, _ in parts) == count
    if kinds or kind not in (float, int, bool, str) or not (whole or kind in (float, int)):
        return None
    dtype = object if kind is str else kind
    if not whole:
        column = np.full(count, np.nan)
    elif len(parts) == 1 and isinstance(parts[0][2], np.ndarray):
        return parts[0][2]
    else:
        column = np.empty(count, dtype=dtype)
    for places, _, values in parts:
        column[places] = values
    return column


def _rows(tables: Sequence[Table], names: Sequence[str], count: int) -> list[Row]:
    """The rows with some columns only."""
    rows: list[Row] = [{} for _ in range(count)]
    for table in tables:
        for name in names:
            if name in table.columns:
                values = _listed(table.columns[name], len(table.places))
                for place, value in zip(table.places, values, strict=True):
                    rows[place][name] = value
    return rows
