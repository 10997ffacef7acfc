"""Pages and parts of them from templates, in which all text is escaped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from rich.table import Table

from spsim.files import write_text

Chart = Mapping[str, Any]
"""A figure of plotly.js, its `data` and `layout`; the `windows` of time that buttons show, and a `title` above it."""


class Cells(NamedTuple):
    """A table as a page shows it."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    numbers: Sequence[bool]
    """Which columns are aligned to the right."""
    caption: str


@dataclass(frozen=True)
class Section:
    """A part of a page: a heading, a sentence that says how to read it, and what it shows."""

    heading: str
    lead: str = ""
    charts: Sequence[Chart] = ()
    tables: Sequence[Table] = ()
    lines: Sequence[str] = ()
    folded: bool = False
    """Shown when somebody asks for it."""

    @property
    def cells(self) -> list[Cells]:
        """Its tables."""
        return [cells_of(table) for table in self.tables]

    @property
    def legend(self) -> dict[str, str]:
        """The colour of each name in its charts."""
        data = [trace for chart in self.charts for trace in chart["data"] if trace.get("showlegend", True)]
        return {trace["name"]: trace.get("fillcolor") or trace["marker"]["color"] for trace in data}


@dataclass(frozen=True)
class Page:
    """A report: what it is of, the answer, and the parts below it."""

    title: str
    subtitle: str
    verdict: Sequence[str]
    """Sentences, of which the first is the answer."""
    sections: Sequence[Section] = field(default_factory=tuple)


def cells_of(table: Table) -> Cells:
    """What a table of the terminal shows, as text."""
    columns = [[str(cell) for cell in column.cells] for column in table.columns]
    return Cells(
        str(table.title or ""),
        [str(column.header) for column in table.columns],
        [*zip(*columns, strict=True)],
        [column.justify == "right" for column in table.columns],
        str(table.caption or ""),
    )


def write_page(page: Page, path: Path) -> None:
    """Write a page whole or not at all; `InputError` where that fails."""
    here = Path(__file__).parent
    parts = {name: (here / f"{name}").read_text(encoding="utf-8") for name in ("page.css", "page.js", LIBRARY)}
    charts = [chart for section in page.sections for chart in section.charts]
    text = _templates().get_template("page.html").render(
        page=page, charts=charts, css=parts["page.css"], script=parts["page.js"], library=parts[LIBRARY]
    )  # fmt: skip
    write_text(path, text)


LIBRARY = "plotly-basic.min.js"
"""The part of plotly.js that draws lines and bars, in the MIT licence that stands beside it."""


def fragment(sentences: Sequence[str], table: Table) -> str:
    """Sentences and a table for a notebook."""
    return _templates().get_template("fragment.html").render(sentences=sentences, table=cells_of(table))


@cache
def _templates() -> Environment:
    return Environment(
        loader=PackageLoader("spsim.report", "page"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
