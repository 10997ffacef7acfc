"""Waterfalls: from the total of one plan to that of the next, a bar for what each part adds or takes away."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise, zip_longest

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from spsim.plots.colours import GRID, MUTED
from spsim.plots.figure import (
    MARGIN,
    POINTS,
    SMALL_SIZE,
    TEXT_SIZE,
    WIDTH,
    Picture,
    add_legend,
    add_title,
    axes_at,
    text_size,
)
from spsim.plots.timeline import SHORT

TOTAL, LESS, MORE = "#BBBBBB", "#4477AA", "#EE6677"
HEADING_SIZE = 11.0
ROW, BAR = 0.42, 0.72
"""Inches of a row, and the share of it that a bar takes."""
TOP, HEADING, BELOW, LEGEND, EDGE = 0.75, 0.4, 0.6, 0.4, 0.3
"""Inches of the title, the heading of a panel, its axis, the legend, and the margin between panels."""
NOTICEABLE = 0.01
"""Share of the largest change below which changes are drawn as one bar."""
MOST = 5
"""Changes that are drawn from one plan to the next where there are more than two plans."""
REST = "all other parts"
DIGITS = 2
"""Of labels."""
NAMES = 2.6
"""Inches that names may take; longer ones are smaller."""
STUB, STROKES = 0.8, 22.0
"""What a cut axis leaves of the smallest bar, in widths of all changes; points of the strokes that show the cut."""
CUT = 0.8
"""The axis starts at zero unless all of the changes happen beyond this share of it."""


@dataclass(frozen=True)
class Waterfall:
    """Totals of plans and their parts, of two or more, each reached from the one before it."""

    heading: str
    unit: str
    plans: tuple[str, ...]
    parts: tuple[Mapping[str, float], ...]
    """Of each plan."""
    details: tuple[Mapping[str, Mapping[str, float]], ...] = ()
    """Of each plan but the first: part -> what its change consists of, by kind of collective; stands below its name."""

    @property
    def totals(self) -> tuple[float, ...]:
        """Sum of the parts under each plan."""
        return tuple(sum(own.values()) for own in self.parts)

    @cached_property
    def changes(self) -> tuple[dict[str, float], ...]:
        """What each part adds from one plan to the next; parts that hardly change as one, and of more than two plans
        all but the largest.
        """
        most = MOST if len(self.plans) > 2 else sys.maxsize
        return tuple(_changes(before, after, most) for before, after in pairwise(self.parts))


def _changes(before: Mapping[str, float], after: Mapping[str, float], most: int) -> dict[str, float]:
    every = {name: after.get(name, 0.0) - before.get(name, 0.0) for name in {**before, **after}}
    limit = NOTICEABLE * max(map(abs, every.values()), default=0.0)
    largest = sorted(every, key=lambda name: -abs(every[name]))[:most]
    shown = {name: every[name] for name in every if name in largest and every[name] and abs(every[name]) >= limit}
    rest = sum(change for name, change in every.items() if name not in shown)
    return {**shown, REST: rest} if round(rest, DIGITS) else shown


@dataclass(frozen=True)
class Panel:
    """A waterfall as it is drawn."""

    heading: str
    unit: str
    rows: Sequence[Row]


@dataclass(frozen=True, slots=True)
class Row:
    """A bar from one level to another."""

    name: str
    start: float
    end: float
    colour: str
    label: str
    detail: str = ""

    @property
    def is_total(self) -> bool:
        return self.colour == TOTAL

    @property
    def right(self) -> float:
        return max(self.start, self.end)

    @property
    def label_points(self) -> float:
        return text_size(self.label, TEXT_SIZE, bold=self.is_total)[0] + 2 * MARGIN

    def fits(self, points: float) -> bool:
        """Whether the label stands inside a bar of this length, beside the strokes of a cut axis."""
        return self.is_total and points >= self.label_points + STROKES


def plot_waterfalls(falls: Sequence[Waterfall], *, title: str, subtitle: str, columns: int = 2) -> Figure:
    """Panels in rows of `columns`, each from the total of its first plan down to that of its last; percents are against
    the first.
    """
    panels = [Panel(fall.heading, fall.unit, [*_rows(fall)]) for fall in falls]
    figure = draw_panels(panels, columns)
    add_legend(figure, [Patch(facecolor=LESS, label="takes less"), Patch(facecolor=MORE, label="takes more")])
    add_title(figure, title, " · ".join(filter(None, [subtitle, _abbreviations(falls)])))
    return figure


def draw_panels(panels: Sequence[Panel], columns: int, *, together: bool = False) -> Figure:
    """Panels in rows of `columns`, all on one scale where they are `together`; without title and legend."""
    rows = [panel.rows for panel in panels]
    lines = [range(at, min(at + columns, len(panels))) for at in range(0, len(panels), columns)]
    heights = [max(len(rows[index]) for index in line) * ROW for line in lines]
    figure = Picture(figsize=(WIDTH, TOP + LEGEND + sum(heights) + len(lines) * (HEADING + BELOW)))
    names = [_name_width([rows[at] for at in range(column, len(panels), columns)]) for column in range(columns)]
    top = float(figure.get_figheight()) - TOP
    for line, height in zip(lines, heights, strict=True):
        top -= HEADING
        for column, index in enumerate(line):
            left, width = WIDTH / columns * column + names[column], WIDTH / columns - names[column] - EDGE
            own = len(rows[index]) * ROW
            axes = axes_at(figure, left, top - own, width, own)
            scale = [row for all_rows in rows for row in all_rows] if together else rows[index]
            _draw(axes, panels[index], _limits(scale, width * POINTS), width * POINTS)
            _heading(axes, panels[index].heading, EDGE - names[column], WIDTH / columns - 2 * EDGE)
        top -= height + BELOW
    return figure


def _rows(fall: Waterfall) -> Iterator[Row]:
    """The first total, and then for each further plan the changes from there on and its total."""
    first = level = fall.totals[0]
    yield Row(fall.plans[0], 0.0, first, TOTAL, f"{first:.{DIGITS}f} {fall.unit}")
    for plan, changes, details, total in zip_longest(fall.plans[1:], fall.changes, fall.details, fall.totals[1:]):
        for name, change in changes.items():
            kinds = _kinds((details or {}).get(name, {}))
            detail = ", ".join(f"{_short(kind)} {signed(size)}" for kind, size in kinds.items())
            yield Row(name, level, level + change, LESS if change < 0 else MORE, signed(change), detail)
            level += change
        percent = f" ({signed(100 * (total / first - 1), 1)} %)" if first else ""
        yield Row(plan, 0.0, total, TOTAL, f"{total:.{DIGITS}f} {fall.unit}{percent}")
        level = total


def _kinds(sizes: Mapping[str, float]) -> dict[str, float]:
    """What the change of a part consists of, if of several kinds; the smallest of many as one."""
    kinds = {kind: size for kind, size in sizes.items() if round(size, DIGITS)}
    if len(kinds) <= 3:
        return kinds if len(kinds) > 1 else {}
    largest = sorted(kinds, key=lambda kind: -abs(kinds[kind]))[:2]
    return {kind: kinds[kind] for kind in largest} | {
        "others": sum(size for kind, size in kinds.items() if kind not in largest)
    }


def _short(kind: str) -> str:
    return SHORT.get(kind.replace("-", "_"), kind)


def _abbreviations(falls: Iterable[Waterfall]) -> str:
    """What the short names in the details stand for."""
    sizes = (own for fall in falls for details in fall.details for own in details.values())
    kinds = {kind: None for own in sizes for kind in _kinds(own)}
    return ", ".join(f"{_short(kind)} {kind}" for kind in kinds if _short(kind) != kind)


def signed(amount: float, digits: int = DIGITS) -> str:
    """A number with its sign."""
    return f"{amount:+.{digits}f}".replace("-", "−")


def _name_width(panels: Sequence[Sequence[Row]]) -> float:
    """Inches that the names beside the axes need."""
    texts = [(row.name, TEXT_SIZE, row.is_total) for rows in panels for row in rows]
    texts += [(row.detail, SMALL_SIZE, False) for rows in panels for row in rows if row.detail]
    needed = max((text_size(text, size, bold=bold)[0] for text, size, bold in texts), default=0.0) / POINTS
    return min(needed, NAMES) + EDGE + 0.15


def _heading(axes: Axes, text: str, left: float, room: float) -> None:
    """Above the names on the left, smaller where it would not fit; inches."""
    width = text_size(text, HEADING_SIZE, bold=True)[0] + MARGIN if text else 0.0
    fit = min(1.0, room * POINTS / width) if width else 1.0
    axes.annotate(
        text, (0, 1), (left * POINTS, 8), xycoords="axes fraction", textcoords="offset points",
        size=HEADING_SIZE * fit, weight="bold", annotation_clip=False,
    )  # fmt: skip


def _draw(axes: Axes, panel: Panel, limits: tuple[float, float], points: float) -> None:
    rows, (low, high) = panel.rows, limits
    scale = points / (high - low)
    for position, row in enumerate(rows):
        left = low if row.is_total else min(row.start, row.end)
        axes.barh(position, row.right - left, BAR, left, color=row.colour, linewidth=0)
        _words(axes, position, row, inside=row.fits((row.right - left) * scale))
        if position + 1 < len(rows):
            axes.plot([row.end, row.end], [position - BAR / 2, position + 1 + BAR / 2], color=MUTED, linewidth=0.8)
        if row.is_total and low:
            _cut(axes, position, points)
    axes.set_xlim(low, high)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_yticks([])
    axes.spines["left"].set_visible(not low)
    axes.grid(axis="x", color=GRID, linewidth=0.6)
    cut = f", axis starts at {low:g}" if low else ""
    axes.set_xlabel(f"{panel.unit}{cut}", size=SMALL_SIZE, color=MUTED)


def _limits(rows: Sequence[Row], points: float) -> tuple[float, float]:
    """Limits that leave room for the labels; the axis is cut where all changes are far from zero."""
    levels = [row.end for row in rows]
    least, most = min(levels), max(levels)
    low = 0.0
    if most > least >= CUT * most:
        low = _round_down(least - STUB * (most - least), most - least)
    span = (most - low) or 1.0
    for _ in rows:
        outside = [row for row in rows if not row.fits((row.right - low) / span * points)]
        span = max([span, *((row.right - low) * points / (points - row.label_points) for row in outside)])
    return low, low + span


def _round_down(value: float, step: float) -> float:
    """The value or a little less, in at most two digits of the step."""
    digits = 10.0 ** (len(str(int(step))) - 2 if step >= 1 else -_zeros(step) - 1)
    return max(0.0, round(value // digits * digits, 6))


def _zeros(step: float) -> int:
    """Place of the first digit of a number below one."""
    place = 1
    while step * 10**place < 1 and place < 6:
        place += 1
    return place


def _words(axes: Axes, position: int, row: Row, *, inside: bool) -> None:
    """The name on the left of the axes, with its detail below, and the amount beside the bar or in it."""
    weight = "bold" if row.is_total else "normal"
    for text, size, up, colour in ((row.name, TEXT_SIZE, 4.5, "black"), (row.detail, SMALL_SIZE, -6.5, MUTED)):
        if text:
            fit = min(1.0, NAMES * POINTS / text_size(text, size, bold=row.is_total)[0])
            axes.annotate(
                text, (0, position), (-8, up if row.detail else 0), xycoords=("axes fraction", "data"),
                textcoords="offset points", ha="right", va="center", size=size * fit, weight=weight, color=colour,
                annotation_clip=False,
            )  # fmt: skip
    axes.annotate(
        row.label, (row.right, position), (-MARGIN if inside else MARGIN, 0), textcoords="offset points", va="center",
        ha="right" if inside else "left", size=TEXT_SIZE, weight=weight,
    )  # fmt: skip


def _cut(axes: Axes, position: int, points: float) -> None:
    """Two strokes through a bar that does not start at zero."""
    for place in (10, 15):
        across = (place / points, (place + 4) / points)
        axes.plot(
            across, (position + BAR / 2, position - BAR / 2), color="white", linewidth=1.6,
            transform=axes.get_yaxis_transform(),
        )  # fmt: skip
