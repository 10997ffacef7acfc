"""Memory over time: by category for one rank, or in total for several plans."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from spsim.errors import InputError
from spsim.plots.colours import CATEGORIES, GRID, MUTED, SERIES
from spsim.plots.figure import (
    POINTS,
    SMALL_SIZE,
    TEXT_SIZE,
    WIDTH,
    Picture,
    add_title,
    axes_at,
    describe,
    describe_workload,
    text_size,
)
from spsim.results.filling import over_time
from spsim.results.result import Result
from spsim.units import GIB, MS_PER_S, PS_PER_MS

HEIGHT = 5.6
LEFT, BOTTOM, TOP = 0.85, 0.65, 0.95
"""Inches around the axes."""
RIGHT, KEY = 2.4, 0.65
"""Inches on the right, for the capacity at least, and beside the names of the legend."""
HEADROOM = 1.25
NEAR = 1.6
"""Up to this multiple of the peak the capacity is drawn as a line, beyond it is named."""
POINTS_ACROSS = 2000
"""Pixels of the axes, and some more."""
STYLES = ("-", "--", "-.", ":")


def plot_memory(result: Result, *, rank: int | None = None, title: str | None = None) -> Figure:
    """Memory of one rank by category, the fullest unless named, with its peak and the capacity."""
    rank = result.peak.rank if rank is None else rank
    alone = _alone(result, rank)
    settled = _settled(alone)
    sizes = {name: settled[_column(name)] for name in CATEGORIES if _column(name) in settled}
    if result.is_served:
        sizes = {name: size for name, size in sizes.items() if size.any()}
    peak = int(settled["total_gib"].argmax())
    labels = [f"{name}  {size.iloc[peak]:.2f} GiB" for name, size in sizes.items()]
    figure, axes = _figure(alone.step_time_s * MS_PER_S, labels)
    areas = axes.stackplot(
        settled["time_ms"], *sizes.values(), labels=labels, colors=[CATEGORIES[name] for name in sizes], step="post",
        linewidth=0,
    )  # fmt: skip
    low = _limits(axes, alone.peak_memory_gib, _usable(alone), alone.capacity_gib)
    _mark_peak(axes, alone)
    _legend(axes, list(reversed(areas)), "at the peak", above=low)
    add_title(figure, title or f"{describe(result)}: memory of rank {rank}", _subtitle(alone))
    return figure


def plot_memory_curves(results: Mapping[str, Result], *, title: str | None = None) -> Figure:
    """Total memory of the fullest rank of each plan on one time axis, with the capacity."""
    curves = {name: _settled(_alone(result, result.peak.rank)) for name, result in results.items()}
    labels = {name: f"{name}  {result.peak_memory_gib:.2f} GiB" for name, result in results.items()}
    end = max(result.step_time_s for result in results.values()) * MS_PER_S
    figure, axes = _figure(end, list(labels.values()))
    for index, (name, settled) in enumerate(curves.items()):
        axes.step(
            settled["time_ms"], settled["total_gib"], where="post", linewidth=1.6, label=labels[name],
            color=SERIES[index % len(SERIES)], linestyle=STYLES[index // len(SERIES) % len(STYLES)],
        )  # fmt: skip
    handles = list(axes.lines)
    peak = max(result.peak_memory_gib for result in results.values())
    low = _limits(axes, peak, min(map(_usable, results.values())), min(r.capacity_gib for r in results.values()))
    _legend(axes, handles, "plan and its peak", above=low)
    first = next(iter(results.values()))
    default = f"{first.scenario.model.name}, {first.scenario.hardware.name}: memory over a step"
    add_title(figure, title or default, f"{_layers(first)} · fullest rank of each plan")
    return figure


# What is drawn


def _alone(result: Result, rank: int) -> Result:
    """The same result as if only one rank had been simulated."""
    trace = result.trace
    for simulated, copies in trace.copies.items():
        if rank in copies:
            return replace(result, trace=replace(trace, copies={simulated: (simulated,)}))
    last = max(copy for copies in trace.copies.values() for copy in copies)
    raise InputError(f"rank: {rank} is not a rank of the plan; use 0 to {last}")


def _settled(result: Result) -> pd.DataFrame:
    """Memory of the only simulated rank over the step, a row each time that it changes, or for each point that can be
    told from the next.
    """
    peak = result.peak
    times, sizes = over_time(result.trace, peak, result.statics[peak.rank].by_category(), POINTS_ACROSS)
    frame = pd.DataFrame({"time_ms": [time / PS_PER_MS for time in times]})
    for category, held in sizes.items():
        frame[_column(category)] = [size / GIB for size in held]
    return frame.assign(total_gib=frame.filter(like="_gib").sum(axis=1))


def _column(category: str) -> str:
    return f"{category.lower().replace(' ', '_')}_gib"


def _usable(result: Result) -> float:
    """What tensors may take: the capacity without context, communicators and reserve."""
    return result.capacity_gib - (result.device_memory_gib - result.peak_memory_gib)


def _layers(result: Result) -> str:
    count = result.scenario.model.layers
    return f"{count} layer{'s' if count > 1 else ''} · {describe_workload(result)}"


def _subtitle(result: Result) -> str:
    fits = "fits" if result.fits else f"does not fit: out of memory at {result.out_of_memory_at}"
    return f"{_layers(result)} · {fits}"


# Drawing


def _figure(end_ms: float, names: Sequence[str]) -> tuple[Figure, Axes]:
    """Axes over the step, with room on the right for a legend of the given names."""
    figure = Picture(figsize=(WIDTH, HEIGHT))
    right = max(RIGHT, max(text_size(name, SMALL_SIZE)[0] for name in names) / POINTS + KEY)
    axes = axes_at(figure, LEFT, BOTTOM, WIDTH - LEFT - right, HEIGHT - BOTTOM - TOP)
    axes.set_xlim(0, end_ms)
    axes.set_xlabel("time in the step (ms)", size=TEXT_SIZE)
    axes.set_ylabel("memory of tensors (GiB)", size=TEXT_SIZE)
    axes.grid(axis="y", color=GRID, linewidth=0.6)
    return figure, axes


def _limits(axes: Axes, peak: float, usable: float, capacity: float) -> bool:
    """Draw the capacity where the curve comes near it; otherwise say how far above it lies.

    True if the words about it stand in the lower half.
    """
    if usable > NEAR * peak:
        axes.set_ylim(0, HEADROOM * peak)
        words = f"↑ usable {usable:.1f} GiB, {usable / peak:.1f}× the peak\n   capacity {capacity:.1f} GiB"
        _beside(axes, words, 1, "top")
        return False
    upper = HEADROOM * max(peak, capacity)
    axes.set_ylim(0, upper)
    axes.axhline(usable, color="black", linewidth=1.2, linestyle=(0, (4, 2)))
    axes.axhline(capacity, color="black", linewidth=1.2)
    _beside(axes, f"capacity {capacity:.1f} GiB", capacity / upper, "bottom")
    _beside(axes, f"usable {usable:.1f} GiB (dashed)", usable / upper, "top")
    return usable < upper / 2


def _beside(axes: Axes, text: str, height: float, alignment: str) -> None:
    """Text on the right of the axes, at a fraction of their height."""
    axes.annotate(
        text, (1, height), (8, 0), xycoords="axes fraction", textcoords="offset points", size=SMALL_SIZE,
        va=alignment, annotation_clip=False,
    )  # fmt: skip


def _mark_peak(axes: Axes, result: Result) -> None:
    """A dot on the peak, and its operator in the free space above."""
    time, size = result.peak.time_ps / PS_PER_MS, result.peak_memory_gib
    early = time < result.step_time_s * MS_PER_S / 2
    axes.plot(time, size, "o", color="black", markersize=5, clip_on=False)
    axes.annotate(
        f"peak {size:.2f} GiB: {result.peak_operator}", (time, size), (0.02 if early else 0.98, 0.96),
        textcoords="axes fraction", ha="left" if early else "right", va="top", size=TEXT_SIZE, weight="bold",
        arrowprops={"arrowstyle": "-", "color": "black", "linewidth": 0.8, "shrinkB": 3},
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5, "alpha": 0.85},
    )  # fmt: skip


def _legend(axes: Axes, handles: Sequence[Artist], title: str, *, above: bool) -> None:
    """Entries with labels on the right of the axes, at the top or the bottom."""
    legend = axes.legend(
        handles=handles, loc="upper left" if above else "lower left",
        bbox_to_anchor=(1.005, 1.02 if above else -0.02), frameon=False, fontsize=SMALL_SIZE, title=title,
        alignment="left", handlelength=1.6,
    )  # fmt: skip
    legend.get_title().set(fontsize=SMALL_SIZE, color=MUTED)
