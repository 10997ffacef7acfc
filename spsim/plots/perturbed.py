"""Steps under perturbations: a layer before and after, or how the steps of many seeds spread."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from spsim.plots.colours import GRID, MUTED, SERIES
from spsim.plots.figure import TEXT_SIZE, WIDTH, Picture, add_legend, add_title, axes_at, describe
from spsim.plots.timeline import plot_before_after
from spsim.studies.perturbation import PerturbedSteps
from spsim.units import MS_PER_S

HEIGHT, LEFT, RIGHT, BOTTOM, TOP = 5.0, 0.9, 0.3, 1.15, 0.85
"""Inches of the figure, and around its axes."""
FEWEST_BINS = 8
STYLES: Mapping[int, Literal["-", "--", ":"]] = {50: "-", 95: "--", 99: ":"}
"""Of the lines at percentiles."""


def plot_perturbed(found: PerturbedSteps) -> Figure:
    """Where nothing is drawn, the rank that explains most and one that waits for it, before and after."""
    what = ", ".join(found.scenario.perturbations.labels)
    title = f"{describe(found.before)}: {what}"
    if found.after is None:
        return _spread(found, title)
    before, after = (MS_PER_S * run.step_time_s for run in (found.before, found.after))
    note = f"step {before:.1f} → {after:.1f} ms"
    return plot_before_after(found.before, found.after, found.shown, title=title, note=note)


def _spread(found: PerturbedSteps, title: str) -> Figure:
    """Steps of all seeds as a histogram, with percentiles and the step without perturbations."""
    times = [MS_PER_S * time for time in found.step_s]
    figure = Picture(figsize=(WIDTH, HEIGHT))
    axes = axes_at(figure, LEFT, BOTTOM, WIDTH - LEFT - RIGHT, HEIGHT - BOTTOM - TOP)
    axes.hist(times, bins=max(FEWEST_BINS, round(len(times) ** 0.5)), color=SERIES[0])
    axes.grid(axis="y", color=GRID)
    axes.set_xlabel("step (ms)", size=TEXT_SIZE)
    axes.set_ylabel("seeds", size=TEXT_SIZE)
    without = (MS_PER_S * found.before.step_time_s, "without", SERIES[2], STYLES[50])
    spread = [(MS_PER_S * time, f"p{percent}", MUTED, STYLES[percent]) for percent, time in found.percentiles_s.items()]
    entries: list[Patch | Line2D] = [Patch(facecolor=SERIES[0], label=f"{len(times)} seeds")]
    for time, name, colour, style in (without, *spread):
        axes.axvline(time, color=colour, linestyle=style)
        entries.append(Line2D([], [], color=colour, linestyle=style, label=f"{name} {time:.2f} ms"))
    add_legend(figure, entries)
    add_title(figure, title, f"the mean step is {MS_PER_S * found.lost_s:.2f} ms longer")
    return figure
