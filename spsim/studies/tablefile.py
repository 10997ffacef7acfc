"""The table of a sweep as CSV, or as Parquet where pyarrow is installed, written part by part."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from itertools import repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from spsim.errors import InputError
from spsim.files import whole_file, whole_text
from spsim.studies.spool import Part, Spool
from spsim.studies.tables import Table, kinds, listed

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

TableFormat = Literal["csv", "parquet"]
_SPECIAL = re.compile(r'[",\r\n]').search


def check_format(rows: TableFormat, option: str = "--rows parquet") -> None:
    """`InputError` where a table cannot be written so."""
    if rows == "parquet" and find_spec("pyarrow") is None:
        raise InputError(f'{option} needs pyarrow; install it with pip install "spsim[parquet]"')


def write_table(rows: Spool, path: Path) -> None:
    """Write all rows but their keys, whole or not at all, by the ending of the name; `InputError` where a column has
    no type.
    """
    columns = {name: types for name, types in rows.columns.items() if name != "key"}
    if path.suffix == ".parquet":
        _write_parquet(rows.parts(), columns, path)
    else:
        _write_csv(rows.parts(), columns, path)


def write_csv(frame: pd.DataFrame, path: Path) -> None:
    """What `frame.to_csv(index=False)` writes."""
    columns = {str(name): column.tolist() for name, column in frame.items()}
    rows = range(len(frame))
    _write_csv([Part([Table(rows, columns)], rows)], columns, path)


# ------------------------------------------------------------ CSV


def _write_csv(parts: Iterable[Part], columns: Iterable[str], path: Path) -> None:
    names = list(columns)
    with whole_text(path) as file:
        file.write(f"{','.join(map(_text, names))}\n")
        for part in parts:
            lines = dict(line for table in part.tables for line in _lines(table, names))
            file.write("".join([f"{lines[place]}\n" for place in part.order]))


def _lines(table: Table, names: Sequence[str]) -> Iterator[tuple[int, str]]:
    """(place, line) of each row; what a row does not have is empty."""
    count = len(table.places)
    texts = [_texts(table, name, count) if name in table.columns else repeat("", count) for name in names]
    return zip(table.places, map(",".join, zip(*texts, strict=True)), strict=True)


def _texts(table: Table, name: str, count: int) -> Iterable[str]:
    """The text of each value; numbers are as Python writes them, whole ones also beside rows that have none."""
    column = table.columns[name]
    if not isinstance(column, list | np.ndarray):
        return repeat(_text(column), count)
    types = kinds(column)
    if types == {float}:
        return ["" if text == "nan" else text for text in table.digits(name)]
    values = listed(column, count)
    if types == {str}:
        known = {value: _text(value) for value in set(values)}
        return [known[value] for value in values]
    return map(str, values) if types == {int} else map(_text, values)


def _text(value: Any) -> str:
    if value is None or value != value:  # NaN: what is missing
        return ""
    text = str(value)
    return '"{}"'.format(text.replace('"', '""')) if _SPECIAL(text) else text


# ------------------------------------------------------------ Parquet


def _write_parquet(parts: Iterable[Part], columns: Mapping[str, set[type]], path: Path) -> None:
    import pyarrow as pa
    from pyarrow.parquet import ParquetWriter

    try:
        schema = pa.schema([(name, _arrow(types)) for name, types in columns.items()])
        with whole_file(path) as temporary, ParquetWriter(temporary, schema) as writer:
            for part in parts:
                values = [pa.array(_column(part, field.name), field.type, from_pandas=True) for field in schema]
                writer.write_table(pa.Table.from_arrays(values, schema=schema))
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError(f"{path}: {error}; a label is of one type in all rows, or give --rows csv") from None


def _column(part: Part, name: str) -> list[Any]:
    """The values of a column in the order of the rows, None where there is none."""
    found: dict[int, Any] = {}
    for table in part.tables:
        if name in table.columns:
            found.update(zip(table.places, listed(table.columns[name], len(table.places)), strict=True))
    return [found.get(place) for place in part.order]


def _arrow(types: set[type]) -> pa.DataType:
    """The type of a column with values of some types."""
    import pyarrow as pa

    known = {str: pa.string(), bool: pa.bool_(), int: pa.int64(), float: pa.float64()}
    own = types - {type(None)}
    if own == {int, float}:
        return known[float]
    if len(own) > 1:
        raise TypeError(f"values are {' and '.join(sorted(kind.__name__ for kind in own))}")
    return known[own.pop()] if own else pa.string()
