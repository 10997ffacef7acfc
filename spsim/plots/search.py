"""The picture of a search for a plan: step time against memory, the front of both, and the best plans by number."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from spsim.plots.colours import COLOURS, GRID, MUTED
from spsim.plots.figure import (
    LABEL_SIZE,
    POINTS,
    SMALL_SIZE,
    WIDTH,
    Picture,
    add_legend,
    add_title,
    axes_at,
    side_by_side,
    text_size,
)

if TYPE_CHECKING:
    from spsim.studies.search.outcome import Found, PlanSearch

LEFT, TOP, BOTTOM, HEIGHT = 0.8, 0.75, 0.95, 5.0
GAP = 0.35
ROW = 0.1
"""Of the height of the axes, for a line of numbers."""
BEYOND = 1.02
"""Of the memory of a GPU, where the axis ends."""
LINE = 0.21
"""Inches of a line of the list."""
BEST, FRONT, OTHERS = COLOURS["gemm"], COLOURS["communication"], COLOURS["elementwise"]


def plot_front(search: PlanSearch) -> Figure:
    """Plans that were simulated and fit, by the memory of the fullest GPU and the time of a step. No plan is shorter
    and takes less memory than one of the front; the best are numbered and named.
    """
    names = [f"{number}  {own.name}" for number, own in enumerate(search.best, 1)]
    listed = max(text_size(name, LABEL_SIZE)[0] for name in names) / POINTS + GAP
    figure = Picture(figsize=(WIDTH, TOP + HEIGHT + BOTTOM))
    axes = axes_at(figure, LEFT, BOTTOM, WIDTH - LEFT - GAP - listed, HEIGHT)
    _scatter(axes, search)
    across, up = figure.get_size_inches()
    for place, name in enumerate(names):
        down = TOP + LINE * place
        figure.text((across - listed) / across, 1 - down / up, name, size=LABEL_SIZE, va="top")
    scenario = search.best[0].scenario
    title = f"{scenario.model.name} on {search.gpus} GPUs of {search.hardware.name}: time and memory of plans"
    sizes = f"sequence {scenario.workload.seq_len:,} · {scenario.global_batch} sequences a step"
    add_title(figure, title, f"{sizes} · {len(search.candidates):,} plans, {len(search.rows):,} simulated")
    add_legend(figure, _entries())
    return figure


def _scatter(axes: Axes, search: PlanSearch) -> None:
    best, front = search.best, search.front
    rest = [own for own in search.found if own not in best and own not in front]
    axes.plot(*_places(rest), "o", color=OTHERS, markersize=4, zorder=2)
    axes.plot(*_places(front), "-o", color=FRONT, markersize=4, linewidth=1.4, drawstyle="steps-pre", zorder=3)
    axes.plot(*_places(best), "o", color=BEST, markersize=5, zorder=4)
    _number(axes, best)
    room = float(best[0].row["capacity_gib"])
    axes.axvline(room, color="black", linewidth=1.2, linestyle=(0, (4, 2)))
    axes.annotate(
        f"capacity {room:.1f} GiB", (room, 1), (-4, -2), xycoords=("data", "axes fraction"), textcoords="offset points",
        size=SMALL_SIZE, ha="right", va="top",
    )  # fmt: skip
    axes.set_xlim(0, BEYOND * room)
    axes.set_xlabel("memory of the fullest GPU (GiB)", size=SMALL_SIZE)
    axes.set_ylabel("time of a step (s)", size=SMALL_SIZE)
    axes.grid(color=GRID, linewidth=0.6)


def _number(axes: Axes, best: Sequence[Found]) -> None:
    """Numbers of the best plans in a line below all points, with a line to each."""
    low, high = axes.get_ylim()
    axes.set_ylim(low - ROW * (high - low), high)
    order = sorted(range(len(best)), key=lambda place: best[place].memory_gib)
    room = float(best[0].row["capacity_gib"])
    width = float(axes.get_position().width * axes.get_figure().get_figwidth()) * POINTS  # type: ignore[union-attr]
    wanted = [best[place].memory_gib / (BEYOND * room) * width for place in order]
    texts = [str(place + 1) for place in order]
    middles = side_by_side(wanted, [text_size(text, LABEL_SIZE)[0] for text in texts], width / BEYOND)
    for place, text, middle in zip(order, texts, middles, strict=True):
        axes.annotate(
            text, (best[place].memory_gib, best[place].step_s), (middle / width, 0.02), textcoords="axes fraction",
            size=LABEL_SIZE, color=BEST, ha="center", arrowprops={"arrowstyle": "-", "color": BEST, "linewidth": 0.5},
        )  # fmt: skip


def _places(plans: list[Found]) -> tuple[list[float], list[float]]:
    return [own.memory_gib for own in plans], [own.step_s for own in plans]


def _entries() -> list[Line2D]:
    dot: dict[str, Any] = {"marker": "o", "markersize": 5}
    return [
        Line2D([], [], color=BEST, linestyle="none", label="shortest steps", **dot),
        Line2D([], [], color=FRONT, label="front: nothing is shorter and takes less", **dot),
        Line2D([], [], color=OTHERS, linestyle="none", label="others that were simulated", **dot),
        Line2D([], [], color=MUTED, linestyle=(0, (4, 2)), label="memory of the GPU"),
    ]
