"""A collective by itself: bus bandwidth over the message, by algorithm, with what the library picks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from spsim.plots.colours import GRID, MUTED, SERIES
from spsim.plots.figure import SMALL_SIZE, TEXT_SIZE, Picture, add_title, axes_at
from spsim.studies.collectives import CollectiveTime
from spsim.units import GIB, KIB, MIB

ACROSS, UP, LEFT, RIGHT, TOP, BOTTOM = 7.0, 3.6, 0.9, 1.9, 1.4, 0.7
"""Inches of the panel and around it."""
TICKS = {KIB: "1 KiB", 32 * KIB: "32 KiB", MIB: "1 MiB", 32 * MIB: "32 MiB", GIB: "1 GiB", 16 * GIB: "16 GiB"}


def plot_collective(made: Mapping[str, Sequence[CollectiveTime]], asked: CollectiveTime) -> Figure:
    """A line an algorithm, the first broad and black below the others, one of which it follows: that of the library,
    above whose parts stands what it picks there. The message that was asked for is a dot.
    """
    figure = Picture(figsize=(LEFT + ACROSS + RIGHT, TOP + UP + BOTTOM))
    axes = axes_at(figure, LEFT, BOTTOM, ACROSS, UP)
    own, *others = made
    _line(axes, made[own], "black", own.replace("_", " "), width=4.5)
    for place, name in enumerate(others):
        _line(axes, made[name], SERIES[place % len(SERIES)], name.replace("_", " "))
    axes.plot([asked.message_bytes], [asked.bus_bandwidth_gb_per_s], "o", color="black")
    axes.set_xscale("log", base=2)
    axes.set_xticks([*TICKS], [*TICKS.values()], size=SMALL_SIZE)
    axes.set_ylim(bottom=0)
    axes.grid(axis="y", color=GRID)
    axes.set_xlabel("message", size=TEXT_SIZE)
    axes.set_ylabel("bus bandwidth, GB/s", size=TEXT_SIZE)
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), fontsize=TEXT_SIZE, frameon=False)
    _mark_choices(axes, made[own])
    nodes = f"{asked.nodes} node{'s' if asked.nodes > 1 else ''}"
    add_title(
        figure,
        f"{asked.collective}: {asked.bus_bandwidth_gb_per_s:.4g} GB/s by {asked.algorithm.replace('_', ' ')}",
        f"{asked.gpus} GPUs on {nodes} of {asked.hardware} · {asked.time_us:.4g} us · without what the framework adds",
    )
    return figure


def _line(axes: Axes, rows: Sequence[CollectiveTime], colour: str, label: str, width: float = 1.4) -> None:
    sizes, rates = [row.message_bytes for row in rows], [row.bus_bandwidth_gb_per_s for row in rows]
    axes.plot(sizes, rates, color=colour, linewidth=width, label=label)


def _mark_choices(axes: Axes, rows: Sequence[CollectiveTime]) -> None:
    """Where algorithm or protocol change, a line, and above the panel what runs from there on."""
    before = None
    for row in rows:
        choice = (row.algorithm, row.protocol)
        if choice != before:
            text = " ".join(part.replace("_", " ") for part in choice if part)
            axes.axvline(row.message_bytes, color=GRID, linewidth=1, zorder=0)
            axes.text(
                row.message_bytes, 1.02, text, transform=axes.get_xaxis_transform(), size=SMALL_SIZE, color=MUTED,
                rotation=20, ha="left", va="bottom",
            )  # fmt: skip
        before = choice
