"""Rows of a CSV file that others wrote."""

from __future__ import annotations

import csv
import io
from typing import Any

from spsim.errors import InputError


def csv_rows(text: str, where: object) -> tuple[list[str], list[tuple[int, dict[Any, Any]]]]:
    """The columns of the header, and every row by column with the number of its last line, all as texts.

    As `csv.DictReader` has them: a field too many is under None, one too few is None. A line may end in any way.
    `InputError` where a field has no end.
    """
    reader = csv.DictReader(io.StringIO(text, newline=None))
    try:
        rows = [(reader.line_num, row) for row in reader]
    except csv.Error as error:
        raise InputError(f"{where}: line {reader.line_num + 1}: {error}; close its quotation marks") from None
    return list(reader.fieldnames or ()), rows
