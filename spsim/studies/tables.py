"""Rows of a sweep as columns: what comes out of one computation, and the frame of all."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
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
    """Of the rows among all."""
    columns: Row
    _digits: dict[str, str] = field(default_factory=dict, compare=False, repr=False)
    """Of columns of floats, a line each."""

    def digits(self, name: str) -> list[str]:
        """A column of floats as Python writes them: worked out once, since that takes most of the time of a row."""
        if name not in self._digits:
            self._digits[name] = "\n".join(map(repr, listed(self.columns[name], len(self.places))))
        return self._digits[name].split("\n")

    def rows(self) -> Iterator[tuple[int, Row]]:
        """(place, row), with values as Python has them."""
        values = [listed(column, len(self.places)) for column in self.columns.values()]
        for place, row in zip(self.places, zip(*values, strict=True), strict=True):
            yield place, dict(zip(self.columns, row, strict=True))

    def placed(self, places: Sequence[int]) -> Table:
        """The same where its places are numbers of others."""
        return Table([places[place] for place in self.places], self.columns)


def tables_of_rows(rows: Sequence[Row], places: Sequence[int]) -> list[Table]:
    """Rows with the same columns together, in a fraction of the memory that they take."""
    alike: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for number, row in enumerate(rows):
        alike[tuple(row)].append(number)
    tables = []
    for names, own in alike.items():
        columns = zip(*[rows[number].values() for number in own], strict=True)
        of_each = dict(zip(names, map(_compact, columns), strict=True))
        tables.append(Table([places[number] for number in own], of_each))
    return tables


def _compact(values: Sequence[Any]) -> Any:
    """Numbers of one kind as an array; equal texts as one object."""
    types = set(map(type, values))
    if types == {str}:
        return list(map(sys.intern, values))
    return np.array(values) if types in ({float}, {int}, {bool}) else list(values)


def listed(column: Any, count: int) -> list[Any]:
    """The values of a column, as Python has them."""
    if isinstance(column, np.ndarray):
        return column.tolist()  # type: ignore[no-any-return]
    return column if isinstance(column, list) else [column] * count


def frame(tables: Sequence[Table], order: Sequence[int]) -> pd.DataFrame:
    """The rows at some places, as pandas makes it of rows; columns stand in the order in which the rows name them."""
    import pandas as pd

    if len(tables) == 1 and [*order] == [*tables[0].places] == [*range(len(order))]:
        known = tables[0].columns.items()
        ready = {name: column.copy() if isinstance(column, np.ndarray) else column for name, column in known}
        return pd.DataFrame(ready, index=range(len(order)), copy=False)
    places = [np.array(table.places, dtype=np.intp) for table in tables]
    count = sum(map(len, places))
    number = np.empty(count, dtype=np.intp)
    for index, own in enumerate(places):
        number[own] = index
    in_order = np.array(order, dtype=np.intp)
    named = dict.fromkeys(name for index in dict.fromkeys(number[in_order].tolist()) for name in tables[index].columns)
    columns = {name: _joined(name, tables, places, count) for name in named}
    mixed = [name for name, column in columns.items() if column is None]
    if mixed:
        inferred = pd.DataFrame(_rows(tables, mixed, count), columns=mixed)
        columns |= {name: inferred[name] for name in mixed}
    found = pd.DataFrame(columns, index=range(count), copy=False)
    in_place = len(in_order) == count and bool((in_order == np.arange(count)).all())
    return found if in_place else found.take(in_order).reset_index(drop=True)


_KINDS: dict[str, type] = {"d": float, "l": int, "?": bool, "O": str}
"""Of the values of arrays; those of objects are texts."""


def kinds(column: Any) -> set[type]:
    """The types of the values of a column."""
    if isinstance(column, np.ndarray):
        return {_KINDS.get(column.dtype.char, object)}
    return set(map(type, column)) if isinstance(column, list) else {type(column)}


def _kind(column: Any) -> type:
    """The type that all values of a column have, `object` if there is none."""
    found = kinds(column)
    return found.pop() if len(found) == 1 else object


def _joined(name: str, tables: Sequence[Table], places: Sequence[npt.NDArray[np.intp]], count: int) -> Any:
    """A column whose values are numbers of one kind, or texts; None where pandas has to find out what it is."""
    parts = [(own, table.columns[name]) for own, table in zip(places, tables, strict=True) if name in table.columns]
    each = {_kind(column) for _, column in parts}
    kind = each.pop()
    whole = len(parts) == len(tables)
    if each or kind not in (float, int, bool, str) or not (whole or kind in (float, int)):
        return None
    column = np.empty(count, dtype=object if kind is str else kind) if whole else np.full(count, np.nan)
    for own, values in parts:
        column[own] = values
    return column


def _rows(tables: Sequence[Table], names: Sequence[str], count: int) -> list[Row]:
    """The rows with some columns only."""
    rows: list[Row] = [{} for _ in range(count)]
    for table in tables:
        for name in names:
            if name in table.columns:
                values = listed(table.columns[name], len(table.places))
                for place, value in zip(table.places, values, strict=True):
                    rows[place][name] = value
    return rows
