"""The table of an experiment as CSV."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from spsim.files import whole_text

if TYPE_CHECKING:
    import pandas as pd

PART = 4096
"""Rows that are turned into text at a time."""
_SPECIAL = re.compile(r'[",\r\n]').search


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
