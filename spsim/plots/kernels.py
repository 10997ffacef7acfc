"""A user's microbenchmarks against a profile: measured and predicted times on logarithmic axes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from spsim.plots.colours import GRID, MUTED, SERIES
from spsim.plots.figure import TEXT_SIZE, Picture, add_title, axes_at, logarithmic
from spsim.studies.microbenchmarks import MeasuredKernel

BAND = 0.1
"""Share by which a prediction may be off inside the band."""
SIDE, LEFT, RIGHT, TOP, BOTTOM = 5.0, 0.9, 3.5, 1.1, 0.7
"""Inches of the square panel and around it."""


def plot_kernels(rows: Sequence[MeasuredKernel], *, title: str, subtitle: str = "") -> Figure:
    """A point a row, a colour for each kind, kernel and direction, with the line of equality and a band of 10 %."""
    predicted = [row for row in rows if row.predicted_us is not None]
    figure = Picture(figsize=(LEFT + SIDE + RIGHT, TOP + SIDE + BOTTOM))
    axes = axes_at(figure, LEFT, BOTTOM, SIDE, SIDE)
    times = [time for row in predicted for time in (row.measured_us, row.predicted_us or 0.0)] or [1.0, 10.0]
    ends = np.array([min(times) / 1.3, max(times) * 1.3])
    axes.fill_between(ends, ends * (1 - BAND), ends * (1 + BAND), color=GRID, linewidth=0, label="within 10 %")
    axes.plot(ends, ends, color=MUTED, linewidth=1)
    for place, group in enumerate(dict.fromkeys(row.group for row in predicted)):
        own = [row for row in predicted if row.group == group]
        axes.scatter(
            [row.measured_us for row in own], [row.predicted_us or 0.0 for row in own], s=18, alpha=0.8, linewidths=0,
            color=SERIES[place % len(SERIES)], label=group.replace("_", " "),
        )  # fmt: skip
    logarithmic(axes, *ends)
    axes.set_xlabel("measured, us", size=TEXT_SIZE)
    axes.set_ylabel("predicted, us", size=TEXT_SIZE)
    axes.legend(loc="upper left", bbox_to_anchor=(1.02, 1.0), fontsize=TEXT_SIZE, frameon=False)
    add_title(figure, title, subtitle)
    return figure
