"""What all pictures share: colours, a layout in inches, the width of a text, and writing to a file."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from io import BytesIO
from pathlib import Path

import matplotlib as mpl
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.text import Text
from matplotlib.textpath import TextToPath
from matplotlib.ticker import LogLocator, NullFormatter

from spsim.errors import InputError
from spsim.files import whole_file
from spsim.plots.colours import MUTED
from spsim.results.result import Result

WIDTH = 13.33
"""Inches of a 16:9 slide."""
POINTS = 72
"""Points of an inch."""
LINE_PITCH = 1.2
"""Heights of a letter from one line of a text to the next."""
MARGIN = 5.0
"""Points left free before and after a text in a box; hinted letters are wider than their outlines."""
TITLE_SIZE, TEXT_SIZE, SMALL_SIZE, LABEL_SIZE = 14.0, 10.0, 9.0, 7.5

LEGEND_KEY = 36.0
"""Points of a legend entry beside its text."""

FORMATS = (".png", ".svg")


class Picture(Figure):
    """A figure that a notebook shows, although no backend knows it."""

    def _repr_png_(self) -> bytes:
        content = BytesIO()
        self.savefig(content, format="png", dpi=80)
        return content.getvalue()


def save(figure: Figure, path: str | Path) -> None:
    """Write PNG or SVG, as the suffix says; the same figure gives the same bytes."""
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in FORMATS:
        raise InputError(
            f"cannot write {str(path)!r}: a picture is a .png or .svg file; change the suffix {path.suffix!r}"
        )
    undated = {"Date": None} if suffix == ".svg" else None
    with whole_file(path) as temporary, mpl.rc_context({"svg.hashsalt": "spsim"}):
        figure.savefig(temporary, format=suffix[1:], dpi=150, metadata=undated)


def saved(figure: Figure, path: str | Path | None) -> Figure:
    """The figure, which is written where a path is given."""
    if path is not None:
        save(figure, path)
    return figure


def axes_at(figure: Figure, left: float, bottom: float, width: float, height: float) -> Axes:
    """Axes at a place in inches, with two spines and small ticks."""
    across, up = figure.get_size_inches()
    axes = figure.add_axes((left / across, bottom / up, width / across, height / up))
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=SMALL_SIZE, color=MUTED)
    axes.set_axisbelow(True)
    return axes


def logarithmic(axes: Axes, low: float, high: float) -> None:
    """Both axes from `low` to `high`, with plain numbers at as many ticks as there is room for."""
    axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high))
    steps = (1, 2, 3, 5, 7) if high / low < 10 else (1, 2, 5) if high / low < 1000 else (1,)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=steps))
        axis.set_major_formatter("{x:,g}")
        axis.set_minor_formatter(NullFormatter())


def add_title(figure: Figure, title: str, subtitle: str) -> None:
    """Title and subtitle at the top left, smaller where they would not fit; a dollar in a name is no mathematics."""
    across, up = figure.get_size_inches()
    left = 0.25
    lines = ((title, TITLE_SIZE, 0.14, "bold", "black"), (subtitle, TEXT_SIZE, 0.45, "normal", MUTED))
    for text, size, down, weight, colour in lines:
        width, _ = text_size(text, size, bold=weight == "bold")
        fit = min(1.0, (across - 2 * left) * POINTS / width) if width else 1.0
        figure.text(
            left / across, 1 - down / up, text, size=size * fit, weight=weight, color=colour, va="top", parse_math=False
        )  # fmt: skip
    _show_dollars(figure)


def _show_dollars(figure: Figure) -> None:
    """Names of models, plans and labels are no mathematics, wherever they stand."""
    for text in figure.findobj(Text):
        text.set_parse_math(False)


def describe(result: Result) -> str:
    """Model, plan and hardware of a result, for titles."""
    scenario = result.scenario
    return f"{scenario.model.name}, {scenario.plan.label}, {scenario.hardware.name}"


def describe_workload(*results: Result) -> str:
    """Sequence, micro-batch, recomputation and ring cut, for subtitles; of several results what they share."""
    described = [result.scenario.summary for result in results]
    return " · ".join(part for part in described[0] if all(part in parts for parts in described))


@lru_cache(maxsize=4096)
def text_size(text: str, size: float, *, bold: bool = False) -> tuple[float, float]:
    """Width and height in points of lines of text."""
    font = FontProperties(size=size, weight="bold" if bold else "normal")
    lines = text.split("\n")
    widths = [TextToPath().get_text_width_height_descent(line, font, ismath=False)[0] for line in lines]
    return max(widths), size * (1 + LINE_PITCH * (len(lines) - 1))


def fitting(options: Sequence[str], width: float, height: float, size: float) -> tuple[str, int] | None:
    """The first text that fits a box in points, with its rotation; upright texts first. None fits a box that is thinner
    than a line.
    """
    if min(width, height) < size:
        return None
    for rotation in (0, 90):
        for text in options:
            along, across = text_size(text, size)
            box = (width, height) if rotation == 0 else (height, width)
            if along + MARGIN <= box[0] and across + 1 <= box[1]:
                return text, rotation
    return None


def side_by_side(middles: Sequence[float], widths: Sequence[float], room: float) -> list[float]:
    """Middles in points of texts in one line from 0 to `room`: as wanted, or as near as keeps them apart."""
    lefts: list[float] = []
    free = 0.0
    for middle, width in zip(middles, widths, strict=True):
        lefts.append(max(free, middle - width / 2))
        free = lefts[-1] + width + MARGIN
    limit = room
    for index in reversed(range(len(lefts))):
        lefts[index] = min(lefts[index], limit - widths[index])
        limit = lefts[index] - MARGIN
    return [left + width / 2 for left, width in zip(lefts, widths, strict=True)]


def add_legend(figure: Figure, entries: Sequence[Artist]) -> None:
    """Entries with their labels below everything else, in one line or as many as they need."""
    widths = [text_size(str(entry.get_label()), SMALL_SIZE)[0] + LEGEND_KEY for entry in entries]
    lines = -(-sum(widths) // (float(figure.get_figwidth()) * POINTS))
    figure.legend(
        handles=list(entries), loc="lower center", ncols=-int(-len(entries) // lines), fontsize=SMALL_SIZE,
        frameon=False, handlelength=1.4, columnspacing=1.6, borderaxespad=0.4,
    )  # fmt: skip
    _show_dollars(figure)
