"""Pictures of a sweep: time of a step by operator class, and peak memory, over sequence length.

The columns are those of `rows.measures`; a panel is one model on one hardware.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, NullFormatter

from spsim.plots.colours import COLOURS, GRID, MUTED, SERIES, WAITING
from spsim.plots.figure import (
    LABEL_SIZE,
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
from spsim.program.blocks.transformer import LAYER_CLASSES
from spsim.studies.cases import END, EXPOSED, REST, step_parts
from spsim.units import KIB

STACK = {name: COLOURS[name] for name in LAYER_CLASSES} | {
    EXPOSED: COLOURS["communication"],
    END: COLOURS["other"],
    REST: WAITING,
}
"""Part of a bar -> colour, from the bottom up."""
MARKERS = "osD^vPX*"
LEFT, RIGHT, TOP, BOTTOM, GAP = 0.8, 0.25, 0.65, 0.6, 0.55
PANEL = 2.4
"""Inches of a panel of bars."""
BAR_INCHES, BETWEEN = 0.27, 0.7
"""Inches of a bar, and the space between groups in bars."""
SQUARE = 3.7
HOLLOW = "hollow: does not fit"


def plot_step_times(frame: pd.DataFrame, *, note: str = "") -> Figure:
    """Time of a step per 1K tokens of its global batch: a bar per strategy, grouped by sequence length.

    Kernels are those of the first rank, and so of the first stage; exposed communication that of the rank with most.
    """
    panels = list(_panels(frame))
    strategies = list(dict.fromkeys(frame["strategy"]))
    longest = max(text_size(name, LABEL_SIZE, bold=True)[0] for name in strategies) / POINTS
    groups = max(group["seq_len"].nunique() for _, group in panels)
    bars = groups * (len(strategies) + BETWEEN)
    width = max(WIDTH, LEFT + RIGHT + BAR_INCHES * bars)
    upright = longest + MARGIN / POINTS <= (width - LEFT - RIGHT) / (bars + 1)
    under = (LABEL_SIZE / POINTS if upright else longest) + 0.3
    figure = Picture(figsize=(width, TOP + BOTTOM + len(panels) * (PANEL + under + GAP)))
    top = float(figure.get_figheight()) - TOP
    for name, group in panels:
        top -= GAP + PANEL
        axes = axes_at(figure, LEFT, top, width - LEFT - RIGHT, PANEL)
        _bars(axes, group, [name for name in strategies if name in set(group["strategy"])], under)
        axes.tick_params(axis="x", rotation=0 if upright else 90)
        axes.set_title(name, loc="left", size=TEXT_SIZE, weight="bold")
        top -= under
    _bar_legend(figure, out=not frame["fits"].astype(bool).all())
    subtitle = "ms per 1K tokens · bold: shortest step that fits"
    add_title(figure, "Time of a step by strategy", _with(note, subtitle))
    return figure


def plot_peak_memory(frame: pd.DataFrame, *, note: str = "") -> Figure:
    """Peak device memory over sequence length, a line per strategy, with the capacity."""
    panels = list(_panels(frame))
    strategies = list(dict.fromkeys(frame["strategy"]))
    columns = min(2, len(panels))
    legend = max(text_size(name, SMALL_SIZE)[0] for name in [*strategies, HOLLOW]) / POINTS + 0.75
    across, down = (WIDTH - legend) / columns, SQUARE + GAP
    figure = Picture(figsize=(WIDTH, TOP + -(-len(panels) // columns) * down + 0.1))
    for index, (name, group) in enumerate(panels):
        bottom = float(figure.get_figheight()) - TOP - (index // columns + 1) * down + GAP
        axes = axes_at(figure, LEFT + index % columns * across, bottom, across - LEFT, SQUARE - GAP)
        _lines(axes, group, strategies)
        axes.set_title(name, loc="left", size=TEXT_SIZE, weight="bold")
    low, high = zip(*(axes.get_ylim() for axes in figure.axes), strict=True)
    for axes in figure.axes:
        axes.set_ylim(min(low), max(high))
    _line_legend(figure, strategies, WIDTH - legend + 0.05, out=not frame["fits"].astype(bool).all())
    subtitle = "fullest GPU, with context, communicators and reserve"
    add_title(figure, "Peak memory by strategy", _with(note, subtitle))
    return figure


def _with(note: str, text: str) -> str:
    return f"{note} · {text}" if note else text


def _panels(frame: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """Title and rows of each model on each hardware, in order of appearance."""
    for key, group in frame.groupby(["model", "hardware"], sort=False):
        yield " on ".join(map(str, key)), group


def _sequence(tokens: float) -> str:
    return f"{tokens / KIB:g}K" if tokens >= KIB else f"{tokens:g}"


# Step times


def _bars(axes: Axes, group: pd.DataFrame, strategies: list[str], under: float) -> None:
    """Stacked bars with the strategy under each and the sequence length under each group."""
    lengths = sorted(group["seq_len"].unique())
    pitch = len(strategies) + BETWEEN
    bars = group.assign(
        x=group["seq_len"].map(lengths.index) * pitch + group["strategy"].map(strategies.index),
    )
    bottom = np.zeros(len(bars))
    for name, sizes in step_parts(bars).items():
        heights = sizes.to_numpy()
        axes.bar(bars["x"], heights, 0.86, bottom, color=STACK[name], label=name, edgecolor="white", linewidth=0.3)
        bottom += heights
    out = ~bars["fits"].astype(bool).to_numpy()
    axes.plot(bars["x"][out], bottom[out], "x", color="black", markersize=5, clip_on=False)
    axes.set_ylim(0, 1.08 * np.nanmax(bottom))
    axes.set_xlim(-0.9, len(lengths) * pitch - BETWEEN - 0.1)
    axes.set_ylabel("ms per 1K tokens", size=SMALL_SIZE)
    axes.grid(axis="y", color=GRID, linewidth=0.6)
    _name_bars(axes, bars)
    for index, length in enumerate(lengths):
        axes.annotate(
            _sequence(length), (index * pitch + (len(strategies) - 1) / 2, 0), (0, -POINTS * under + 2),
            xycoords=("data", "axes fraction"), textcoords="offset points", ha="center", size=SMALL_SIZE, weight="bold",
            annotation_clip=False,
        )  # fmt: skip


def _name_bars(axes: Axes, bars: pd.DataFrame) -> None:
    """Strategies under their bars; the one that fits with the shortest step of each length in bold."""
    fitting = bars[bars["fits"].astype(bool)]
    fastest = set(fitting.loc[fitting.groupby("seq_len")["step_time_ms"].idxmin(), "x"])
    axes.set_xticks(list(bars["x"]), list(bars["strategy"]), size=LABEL_SIZE)
    axes.tick_params(axis="x", length=0)
    for x, label in zip(bars["x"], axes.get_xticklabels(), strict=True):
        label.set_fontweight("bold" if x in fastest else "normal")


def _bar_legend(figure: Figure, out: bool) -> None:
    """One entry per part of a bar, and the cross if any configuration has one."""
    found = {str(container.get_label()) for axes in figure.axes for container in axes.containers}
    entries: list[Artist] = [Patch(facecolor=STACK[name], label=name) for name in STACK if name in found]
    if out:
        entries.append(
            Line2D([], [], color="black", marker="x", linestyle="none", markersize=5, label="does not fit in memory")
        )
    add_legend(figure, entries)


# Peak memory


def _lines(axes: Axes, group: pd.DataFrame, strategies: list[str]) -> None:
    """Lines on doubly logarithmic axes; markers of configurations that do not fit are hollow."""
    for strategy, rows in group.groupby("strategy", sort=False):
        style = _style(strategies.index(str(strategy)))
        rows = rows.sort_values("seq_len")
        axes.plot(rows["seq_len"], rows["device_memory_gib"], color=style["color"], linewidth=1.4)
        for fits in (True, False):
            points = rows[rows["fits"].astype(bool) == fits]
            fill = style["color"] if fits else "white"
            axes.plot(points["seq_len"], points["device_memory_gib"], linestyle="none", markerfacecolor=fill, **style)
    capacity = group["capacity_gib"].max()
    axes.axhline(capacity, color="black", linewidth=1.2, linestyle=(0, (4, 2)))
    axes.annotate(
        f"capacity {capacity:.1f} GiB", (0, capacity), (4, 3), xycoords=("axes fraction", "data"),
        textcoords="offset points", size=SMALL_SIZE,
    )  # fmt: skip
    _scales(axes, sorted(group["seq_len"].unique()))


def _scales(axes: Axes, lengths: list[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xticks(lengths, [_sequence(length) for length in lengths])
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("sequence length", size=SMALL_SIZE)
    axes.set_ylabel("device memory (GiB)", size=SMALL_SIZE)
    axes.grid(color=GRID, linewidth=0.6)


def _style(index: int) -> dict[str, Any]:
    return {"color": SERIES[index % len(SERIES)], "marker": MARKERS[index % len(MARKERS)]}


def _line_legend(figure: Figure, strategies: list[str], left: float, out: bool) -> None:
    handles = [Line2D([], [], label=name, **_style(index)) for index, name in enumerate(strategies)]
    if out:
        hollow: dict[str, Any] = {"marker": "o", "markerfacecolor": "white", "color": MUTED, "linestyle": "none"}
        handles.append(Line2D([], [], label=HOLLOW, **hollow))
    across, up = figure.get_size_inches()
    figure.legend(
        handles=handles, loc="upper left", bbox_to_anchor=(left / across, 1 - (TOP + 0.5) / up), frameon=False,
        fontsize=SMALL_SIZE,
    )  # fmt: skip
