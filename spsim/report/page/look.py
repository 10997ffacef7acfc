"""What all charts of a page share: fonts, axes, and text as plotly.js takes it."""

from __future__ import annotations

from html import escape
from typing import Any

from spsim.plots.colours import GRID, MUTED

FONT = {"family": "system-ui, DejaVu Sans, sans-serif", "size": 13, "color": "#1a1a1a"}
LINE, NARROW = 17, 40
"""Pixels of a line of a name, and how many letters of it a narrow window holds."""
MARGIN = {"l": 10, "r": 20, "t": 10, "b": 10}


def plain(text: str) -> str:
    """Text for a chart, in which plotly.js would read tags."""
    return escape(text, quote=False)


def axis(title: str = "", **further: Any) -> dict[str, Any]:
    """An axis with the grid of all pictures."""
    heading = {"title": {"text": plain(title), "font": {"size": 12, "color": MUTED}}} if title else {}
    return {
        "gridcolor": GRID, "zeroline": False, "automargin": True, "tickfont": {"size": 12}, "exponentformat": "none",
        "separatethousands": True, **heading, **further,
    }  # fmt: skip


def layout(height: int, **further: Any) -> dict[str, Any]:
    """A layout of a height in pixels, as wide as the page; its legend is the page's."""
    return {
        "height": height, "font": FONT, "margin": MARGIN, "paper_bgcolor": "white", "plot_bgcolor": "white",
        "hoverlabel": {"align": "left", "bgcolor": "white", "font": {"size": 12}},
        "showlegend": False, **further,
    }  # fmt: skip
