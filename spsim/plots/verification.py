"""Measured against simulated times: a point per case and pass, a panel per kind of time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from spsim.plots.colours import GRID, MUTED, SERIES
from spsim.plots.figure import SMALL_SIZE, TEXT_SIZE, WIDTH, Picture, add_legend, add_title, axes_at, logarithmic

BAND = 0.2
"""Share by which a prediction may be off inside the band."""
PASSES = {"forward": "o", "backward": "s"}
HOLLOW = "unfused"
"""The attention kernel whose markers are hollow."""
SIDE, LEFT, BETWEEN, TOP, BOTTOM = 3.55, 0.75, 0.75, 1.15, 1.05
"""Inches of a square panel and around it."""


def plot_verification(frame: pd.DataFrame, *, title: str, subtitle: str = "") -> Figure:
    """Times of `frame` on logarithmic axes with the line of equality, the same axes in every panel.

    Columns: strategy, attention, name (`forward_compute_ms`, …), clock, and measured, p10, p90 and predicted in
    milliseconds. Names with `compute` and `communication` have a panel each, other times the last.
    """
    times = frame[frame["name"].str.endswith("_ms") & (frame["measured"] > 0) & (frame["predicted"] > 0)]
    kind = np.select([times["name"].str.contains(part) for part in ("compute", "communication")], [0, 1], 2)
    strategies = list(dict.fromkeys(times["strategy"]))
    figure = Picture(figsize=(WIDTH, TOP + SIDE + BOTTOM))
    for place, name in enumerate(("compute", "communication", "whole pass")):
        axes = axes_at(figure, LEFT + place * (SIDE + BETWEEN), BOTTOM, SIDE, SIDE)
        _panel(axes, times[kind == place], strategies, name, _limits(times))
    add_title(figure, title, subtitle)
    add_legend(figure, _entries(strategies, list(dict.fromkeys(times["attention"]))))
    return figure


def _panel(
    axes: Axes, rows: pd.DataFrame, strategies: Sequence[str], name: str, limits: tuple[float, float]
) -> None:  # fmt: skip
    clocks = ", ".join(dict.fromkeys(rows["clock"]))
    axes.set_title(f"{name} ({clocks})" if clocks else name, size=TEXT_SIZE, weight="bold", loc="left")
    if rows.empty:
        axes.text(0.5, 0.5, "no such time", ha="center", va="center", color=MUTED, transform=axes.transAxes)
        axes.set_axis_off()
        return
    ends = np.array(limits)
    axes.fill_between(ends, ends * (1 - BAND), ends * (1 + BAND), color=GRID, linewidth=0)
    axes.plot(ends, ends, color=MUTED, linewidth=1)
    for (strategy, attention), own in rows.groupby(["strategy", "attention"], sort=False):
        colour = SERIES[strategies.index(str(strategy)) % len(SERIES)]
        for phase, marker in PASSES.items():
            points = own[own["name"].str.startswith(phase)]
            axes.errorbar(
                points["measured"], points["predicted"],
                xerr=[points["measured"] - points["p10"], points["p90"] - points["measured"]], fmt=marker,
                color=colour, ecolor=colour, elinewidth=0.8, **_marker(colour, hollow=attention == HOLLOW),
            )  # fmt: skip
    _scales(axes, *limits)


def _marker(colour: str, *, hollow: bool) -> dict[str, Any]:
    return {"markersize": 5.5, "markerfacecolor": "none" if hollow else colour, "markeredgecolor": colour,
            "markeredgewidth": 1.1}  # fmt: skip


def _limits(rows: pd.DataFrame) -> tuple[float, float]:
    """The same for all axes, with all bars inside; any where there is nothing to draw."""
    if rows.empty:
        return 1.0, 10.0
    values = rows[["measured", "p10", "p90", "predicted"]].to_numpy()
    return float(values.min()) / 1.3, float(values.max()) * 1.3


def _scales(axes: Axes, low: float, high: float) -> None:
    logarithmic(axes, low, high)
    axes.set_xlabel("measured (ms)", size=SMALL_SIZE)
    axes.set_ylabel("simulated (ms)", size=SMALL_SIZE)


def _entries(strategies: Sequence[str], kernels: Sequence[str]) -> list[Artist]:
    """Colour is the strategy, shape the pass, filled or hollow the attention kernel."""
    found: list[Artist] = [
        Patch(facecolor=SERIES[index % len(SERIES)], label=strategy) for index, strategy in enumerate(strategies)
    ]
    for phase, marker in PASSES.items():
        for kernel in kernels:
            style = _marker(MUTED, hollow=kernel == HOLLOW)
            found.append(Line2D([], [], linestyle="", marker=marker, label=f"{phase}, {kernel}", **style))
    found.append(Line2D([], [], color=MUTED, linewidth=1, label="equal"))
    return [*found, Patch(facecolor=GRID, label=f"within {100 * BAND:.0f} %")]
