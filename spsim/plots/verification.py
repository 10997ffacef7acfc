"""Measured against simulated times: a point per case and pass, a panel per kind of time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from spsim.plots.figure import GRID, MUTED, SERIES, SMALL_SIZE, TEXT_SIZE, WIDTH, add_legend, add_title, axes_at

BAND = 0.2
"""Share by which a prediction may be off inside the band."""
PASSES = {"forward": "o", "backward": "s"}
SIDE, LEFT, BETWEEN, TOP, BOTTOM = 3.55, 0.75, 0.75, 1.15, 1.05
"""Inches of a square panel and around it."""


def plot_verification(frame: pd.DataFrame, *, title: str, subtitle: str = "") -> Figure:
    """Times of `frame` on logarithmic axes with the line of equality.

    Columns: strategy, name (`forward_compute_ms`, …), clock, and measured, p10, p90 and predicted in milliseconds.
    Names with `compute` and `communication` have a panel each, other times the last.
    """
    times = frame[frame["name"].str.endswith("_ms") & (frame["measured"] > 0) & (frame["predicted"] > 0)]
    kind = np.select([times["name"].str.contains(part) for part in ("compute", "communication")], [0, 1], 2)
    strategies = list(dict.fromkeys(times["strategy"]))
    figure = Figure(figsize=(WIDTH, TOP + SIDE + BOTTOM))
    for place, name in enumerate(("compute", "communication", "whole pass")):
        axes = axes_at(figure, LEFT + place * (SIDE + BETWEEN), BOTTOM, SIDE, SIDE)
        _panel(axes, times[kind == place], strategies, name)
    add_title(figure, title, subtitle)
    add_legend(figure, _entries(strategies))
    return figure


def _panel(axes: Axes, rows: pd.DataFrame, strategies: Sequence[str], name: str) -> None:
    clocks = ", ".join(dict.fromkeys(rows["clock"]))
    axes.set_title(f"{name} ({clocks})" if clocks else name, size=TEXT_SIZE, weight="bold", loc="left")
    if rows.empty:
        axes.text(0.5, 0.5, "no such time", ha="center", va="center", color=MUTED, transform=axes.transAxes)
        axes.set_axis_off()
        return
    low, high = _limits(rows)
    ends = np.array([low, high])
    axes.fill_between(ends, ends * (1 - BAND), ends * (1 + BAND), color=GRID, linewidth=0)
    axes.plot(ends, ends, color=MUTED, linewidth=1)
    for phase, marker in PASSES.items():
        for strategy in strategies:
            own = rows[rows["name"].str.startswith(phase) & (rows["strategy"] == strategy)]
            colour = SERIES[strategies.index(strategy) % len(SERIES)]
            axes.errorbar(
                own["measured"], own["predicted"],
                xerr=[own["measured"] - own["p10"], own["p90"] - own["measured"]], fmt=marker, markersize=5.5,
                color=colour, ecolor=colour, elinewidth=0.8, alpha=0.85, markeredgewidth=0,
            )  # fmt: skip
    _scales(axes, low, high)


def _limits(rows: pd.DataFrame) -> tuple[float, float]:
    """The same for both axes, with all bars inside."""
    values = rows[["measured", "p10", "p90", "predicted"]].to_numpy()
    return float(values.min()) / 1.3, float(values.max()) * 1.3


def _scales(axes: Axes, low: float, high: float) -> None:
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(low, high)
    axes.set_ylim(low, high)
    steps = (1, 2, 3, 5, 7) if high / low < 10 else (1, 2, 5) if high / low < 100 else (1,)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=steps))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("measured (ms)", size=SMALL_SIZE)
    axes.set_ylabel("simulated (ms)", size=SMALL_SIZE)


def _entries(strategies: Sequence[str]) -> list[Artist]:
    found: list[Artist] = [
        Line2D([], [], linestyle="", marker="D", color=SERIES[index % len(SERIES)], label=strategy)
        for index, strategy in enumerate(strategies)
    ]
    found += [Line2D([], [], linestyle="", marker=marker, color=MUTED, label=phase) for phase, marker in PASSES.items()]
    found.append(Line2D([], [], color=MUTED, linewidth=1, label="equal"))
    return [*found, Patch(facecolor=GRID, label=f"within {100 * BAND:.0f} %")]
