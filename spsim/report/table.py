"""The look of every table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich import box
from rich.table import Table


def table(title: str, columns: Sequence[str], *, numbers: Iterable[str] = ()) -> Table:
    """An empty table; the columns in `numbers` are right-aligned and never wrapped."""
    made = Table(title=title, title_justify="left", title_style="bold", header_style="bold", box=box.SIMPLE_HEAD)
    right = set(numbers)
    for column in columns:
        made.add_column(column, justify="right" if column in right else "left", no_wrap=column in right)
    return made
