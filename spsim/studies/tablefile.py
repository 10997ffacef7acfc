"""The table of an experiment as CSV, or as Parquet where pyarrow is installed."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from spsim.errors import InputError
from spsim.files import whole_file, whole_text

if TYPE_CHECKING:
    import pandas as pd

TableFormat = Literal["csv", "parquet"]
PART = 4096
"""Rows that are turned into text at a time."""
_SPECIAL = re.compile(r'[",\r\n]').search


def check_format(rows: TableFormat) -> None:
    """`InputError` where a table cannot be written so."""
    if rows == "parquet" and find_spec("pyarrow") is None:
        raise InputError('--rows parquet needs pyarrow; install it with pip install "spsim[parquet]"')


def write_table(frame: pd.DataFrame, path: Path) -> None:
    """Write a table, whole or not at all, by the ending of its name; `InputError` where a column has no type."""
    if path.suffix != ".parquet":
        write_csv(frame, path)
        return
    try:
        with whole_file(path) as temporary:
            frame.to_parquet(temporary, engine="pyarrow", index=False)
    except (TypeError, ValueError) as error:
        raise InputError(f"{path}: {error}; a label is of one type in all rows, or give --rows csv") from None


def write_csv(frame: pd.DataFrame, path: Path) -> None:
    """What `frame.to_csv(index=False)` writes, in half its time and without a copy of the whole."""
    with whole_text(path) as file:
        file.write(f"{','.join(map(_text, frame.columns))}\n")
        for start in range(0, len(frame), PART):
            part = frame.iloc[start : start + PART]
            lines = map(",".join, zip(*(_texts(part[name]) for name in part), strict=True))
            file.write("".join([f"{line}\n" for line in lines]))


def _texts(column: pd.Series[Any]) -> list[str]:
    """Of each value; equal ones are written once, for it is digits that take the time."""
    import pandas as pd

    if column.dtype == object:  # may hold 1 and True, which are equal
        return ["" if missing else _text(value) for value, missing in zip(column, column.isna(), strict=True)]
    codes, distinct = pd.factorize(column)
    text = str if pd.api.types.is_numeric_dtype(column) else _text
    texts = np.array([*map(text, distinct.tolist()), ""], dtype=object)  # what is missing is number -1, the last
    return list(texts[codes])


def _text(value: Any) -> str:
    text = str(value)
    return '"{}"'.format(text.replace('"', '""')) if _SPECIAL(text) else text
