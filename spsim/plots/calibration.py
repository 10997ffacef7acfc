"""Picture of a calibration: measured against fitted time, a panel for each class of measurements.

The frame is that of `FittedProfile.frame`: a row a measurement, times in microseconds.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter

from spsim.plots.colours import COLOURS, GRID, MUTED
from spsim.plots.figure import LABEL_SIZE, POINTS, SMALL_SIZE, WIDTH, Picture, add_legend, add_title, axes_at, text_size

COLUMNS = 5
LEFT, RIGHT, TOP, BOTTOM = 0.75, 0.15, 0.95, 0.85
GAP_ACROSS, GAP_UP = 0.55, 0.62
LARGEST = 2.8
"""Inches of a panel where there are few."""
TITLE = 9.5
FLAG = "#CC3311"
"""Colour of what a flagged class is marked with."""
OUTSIDE = "#555555"
"""Colour of classes that stand outside the layers."""
DARK = frozenset({"embedding", "cross_entropy", "optimizer", "elementwise"})
"""These classes, and one whose own grey would vanish in the band."""
BAND = "#E3E3E3"
"""Colour of what is within the limit."""
FITTED, HELD_OUT = "final coefficients", "held out: coefficients from other shapes"
"""What the filled and the hollow points are."""
MARGIN = 1.5
"""Factor between the outermost point and the edge of a panel."""
UNITS = ((1e6, "s"), (1e3, "ms"), (1.0, "µs"), (1e-3, "ns"))


def plot_calibration(frame: pd.DataFrame, *, limit_percent: float, note: str = "") -> Figure:
    """Measured time across, fitted time up, both logarithmic; the band is the limit of the held-out error."""
    groups = list(frame.groupby("class", sort=False))
    columns = min(COLUMNS, len(groups))
    rows = -(-len(groups) // columns)
    side = min((WIDTH - LEFT - RIGHT - (columns - 1) * GAP_ACROSS) / columns, LARGEST)
    figure = Picture(figsize=(WIDTH, TOP + BOTTOM + rows * side + (rows - 1) * GAP_UP))
    for index, (name, group) in enumerate(groups):
        row, column = divmod(index, columns)
        bottom = float(figure.get_figheight()) - TOP - (row + 1) * side - row * GAP_UP
        axes = axes_at(figure, LEFT + column * (side + GAP_ACROSS), bottom, side, side)
        _panel(axes, str(name), group, limit_percent)
        if column == 0:
            axes.set_ylabel("fitted time", size=SMALL_SIZE)
        if index + columns >= len(groups):
            axes.set_xlabel("measured time", size=SMALL_SIZE)
    subtitle = "time of one call · % in a panel: 90th percentile of the held-out error"
    add_title(figure, "Calibration: measured against fitted", f"{note} · {subtitle}" if note else subtitle)
    _legend(figure, limit_percent, flagged=bool(frame["flagged"].any()))
    return figure


def _panel(axes: Axes, name: str, group: pd.DataFrame, limit_percent: float) -> None:
    flagged = bool(group["flagged"].iloc[0])
    colour = _colour(str(group["operator_class"].iloc[0]))
    times = group[["measured_us", "fitted_us", "held_out_us"]].to_numpy()
    low, high = np.nanmin(times) / MARGIN, np.nanmax(times) * MARGIN
    line = np.array([low, high])
    axes.fill_between(
        line, line * (1 - limit_percent / 100), line * (1 + limit_percent / 100), color=BAND, linewidth=0
    )  # fmt: skip
    axes.plot(line, line, color=MUTED, linewidth=0.8)
    axes.plot(group["measured_us"], group["held_out_us"], **_hollow(colour))
    axes.plot(group["measured_us"], group["fitted_us"], **_filled(colour))
    axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(_ticks(low, high))
        axis.set_major_formatter(FuncFormatter(lambda value, _: _time(value)))
        axis.set_minor_formatter(NullFormatter())
        axis.set_minor_locator(FixedLocator([]))
    axes.tick_params(labelsize=LABEL_SIZE)
    axes.grid(color=GRID, linewidth=0.6)
    _label(axes, name, group, flagged)


def _label(axes: Axes, name: str, group: pd.DataFrame, flagged: bool) -> None:
    """The class above the panel, its error inside, and a frame in the colour of the flag."""
    width = float(axes.get_window_extent().width) / axes.figure.dpi * POINTS
    size = min(TITLE, TITLE * width / text_size(name, TITLE, bold=True)[0])
    colour = FLAG if flagged else MUTED
    axes.set_title(name, loc="left", size=size, weight="bold", color=FLAG if flagged else "black")
    axes.annotate(
        f"{_error(group)}{', flagged' if flagged else ''}", (0, 1), (5, -5), xycoords="axes fraction",
        textcoords="offset points", va="top", size=SMALL_SIZE, color=colour,
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1.0},
    )  # fmt: skip
    for spine in axes.spines.values() if flagged else ():
        spine.set(visible=True, color=FLAG, linewidth=1.2)


def _ticks(low: float, high: float) -> FixedLocator | LogLocator:
    """Decades; where there are fewer than two, also their third parts."""
    decades = np.log10(high / low)
    if decades >= 2:
        return LogLocator(base=10, numticks=5)
    return FixedLocator(
        [step * 10.0**power for power in range(-4, 9) for step in ((1, 3) if decades > 0.7 else (1, 1.5, 2, 3, 5, 7))]
    )


def _time(microseconds: float) -> str:
    """A time with the unit that makes it short."""
    size, unit = next(((s, u) for s, u in UNITS if microseconds >= s * 0.999), UNITS[-1])
    return f"{microseconds / size:g} {unit}"


def _error(group: pd.DataFrame) -> str:
    errors = (100 * (group["held_out_us"] / group["measured_us"] - 1).abs()).dropna()
    return f"{np.percentile(errors, 90):.1f} %, n = {len(group)}" if len(errors) else f"not checked, n = {len(group)}"


def _colour(kind: str) -> str:
    """The colour of an operator class in every picture; of collectives that of communication."""
    return OUTSIDE if kind in DARK else COLOURS.get(kind, COLOURS["communication"])


def _hollow(colour: str) -> dict[str, Any]:
    return {"marker": "o", "markersize": 5, "markerfacecolor": "none", "markeredgecolor": colour, "linestyle": "none",
            "markeredgewidth": 0.6, "alpha": 0.7}  # fmt: skip


def _filled(colour: str) -> dict[str, Any]:
    return {"marker": "o", "markersize": 2.6, "markerfacecolor": colour, "markeredgecolor": "none", "linestyle": "none"}


def _legend(figure: Figure, limit_percent: float, *, flagged: bool) -> None:
    entries = [
        Line2D([], [], label=FITTED, **_filled(MUTED)),
        Line2D([], [], label=HELD_OUT, **_hollow(MUTED)),
        Line2D([], [], label="fitted = measured", color=MUTED, linewidth=0.8),
        Patch(facecolor=BAND, label=f"within ±{limit_percent:g} % of the measurement"),
    ]
    if flagged:
        entries.append(Line2D([], [], label="flagged: missed the limit", color=FLAG, linewidth=1.6))
    add_legend(figure, entries)
