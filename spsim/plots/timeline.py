"""Timelines of one layer: a lane per stream and rank, a bar per kernel and collective.

The time between the passes of the layer, in which other passes run, is cut out.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from spsim.engine.recording import COMPUTE_LANE, Span, TaskInfo
from spsim.engine.trace import Trace
from spsim.plots.colours import COLOURS, GRID, MUTED, OTHER, WAITS, ink_on
from spsim.plots.figure import (
    LABEL_SIZE,
    POINTS,
    SMALL_SIZE,
    TEXT_SIZE,
    WIDTH,
    Picture,
    add_legend,
    add_title,
    axes_at,
    describe,
    describe_workload,
    fitting,
    side_by_side,
    text_size,
)
from spsim.plots.view import View, Window, busiest_view, first_layer, layer_view
from spsim.program.placement import COLLECTIVE_SHORT
from spsim.results.accounts import waits_on
from spsim.results.result import Result
from spsim.results.selection import distinct_ranks
from spsim.units import PS_PER_MS, PS_PER_US

LEFT, RIGHT, BOTTOM, TOP, HEADER = 1.35, 0.3, 0.95, 0.75, 0.55
"""Inches around the lanes: labels if they are no longer, margin, legend, title, and the lines above each panel."""
BESIDE_LABEL = 0.2
"""Inches around the longest label."""
ONE_LINE = 0.3
"""Inches above a panel without a name of its own."""
RANK_GAP = 0.3
BAR = 0.84
HATCH = "////"
SHORT = {"projection": "proj"}
"""Names of operators that narrow bars abbreviate."""


def plot_timeline(
    result: Result | Trace,
    *,
    ranks: Sequence[int] | None = None,
    layer: int = 0,
    micro_batch: int = 0,
    phases: Sequence[str] | None = None,
    title: str | None = None,
) -> Figure:
    """Lanes of the ranks of one run during one layer; of identical ranks one is drawn unless named.

    A measured trace has no layers: all of the micro-batch is drawn.
    """
    view = layer_view(_trace_of(result), layer, micro_batch, phases, ranks)
    figure = _draw([("", view)])
    settings = [describe_workload(result)] if isinstance(result, Result) else []
    described = f"{describe(result)}: layer {layer}" if isinstance(result, Result) else "measured run"
    add_title(figure, title or described, " · ".join([*settings, _who(view), _total(view), *_cut([view])]))
    return figure


def plot_timelines(
    results: Mapping[str, Result | Trace],
    *,
    layer: int = 0,
    micro_batch: int = 0,
    phases: Sequence[str] | None = None,
    title: str | None = None,
    note: str = "",
) -> Figure:
    """One rank of each run, the one with most computation, on one time axis, with the total times.

    The runs are plans, or one plan measured and then simulated; differences are against the first. The note
    ends the line below the title.
    """
    views = {name: busiest_view(_trace_of(run), layer, micro_batch, phases) for name, run in results.items()}
    reference, first = next(iter(views.items()))
    headers = [
        (f"{name}: {_time(view.length_ps)}{_difference(view, first, reference)}", view) for name, view in views.items()
    ]
    figure = _draw(headers)
    simulated = [run for run in results.values() if isinstance(run, Result)]
    settings = [describe_workload(*simulated)] if simulated else []
    add_title(
        figure,
        title or _title(simulated, len(views), layer),
        " · ".join([*settings, "one rank of each", *_cut(views.values()), *([note] if note else [])]),
    )
    return figure


def plot_before_after(before: Result, after: Result, ranks: Sequence[int], *, title: str, note: str) -> Figure:
    """The same ranks of two runs of a scenario during the first layer of theirs, on one time axis."""
    runs = {"before": before, "after": after}
    layer = first_layer(before.trace, ranks[0])
    views = {name: layer_view(run.trace, layer, 0, None, ranks, alone=True) for name, run in runs.items()}
    first = views["before"]
    headers = {name: f"{name}: layer {layer} in {_time(own.length_ps)}" for name, own in views.items()}
    figure = _draw([(headers[name] + _difference(own, first, "before"), own) for name, own in views.items()])
    add_title(figure, title, " · ".join([describe_workload(before), note, *_cut(views.values())]))
    return figure


def _trace_of(run: Result | Trace) -> Trace:
    return run.trace if isinstance(run, Result) else run


# Words


def _time(ps: int) -> str:
    return f"{ps / PS_PER_MS:.2f} ms" if ps >= PS_PER_MS else f"{ps / PS_PER_US:.1f} µs"


def _total(view: View) -> str:
    passes = " + ".join(f"{w.phase.replace('_', ' ')} {_time(w.length_ps)}" for w in view.windows)
    return f"{passes} = {_time(view.length_ps)}" if len(view.windows) > 1 else passes


def _difference(view: View, first: View, reference: str) -> str:
    """Change of the total and of each pass against the first plan."""
    if view is first:
        return ""
    passes = [
        f"{mine.phase.replace('_', ' ')} {_percent(mine, theirs)}"
        for mine, theirs in zip(view.windows, first.windows, strict=False)
        if mine.phase == theirs.phase
    ]
    details = f": {', '.join(passes)}" if len(passes) > 1 else ""
    return f"   {_percent(view, first)} against {reference}{details}"


def _percent(mine: View | Window, other: View | Window) -> str:
    return f"{100 * (mine.length_ps / other.length_ps - 1):+.1f} %".replace("-", "−")


def _title(simulated: Sequence[Result], runs: int, layer: int) -> str:
    """The title of several runs: plans on one model and machine, or one plan simulated and measured."""
    if not simulated:
        return f"{runs} measured runs"
    if len(simulated) < runs:
        return f"{describe(simulated[0])}: layer {layer}, simulated and measured"
    scenario = simulated[0].scenario
    return f"{scenario.model.name}, {scenario.hardware.name}: layer {layer} under {runs} plans"


def _who(view: View) -> str:
    """Which ranks are shown, and how many look the same."""
    trace = view.trace
    total, shown = sum(map(len, trace.copies.values())), len(view.ranks)
    if shown == total:
        return f"{total} ranks" if total > 1 else "one GPU"
    if len(distinct_ranks(trace)) == 1:
        return f"{total} identical ranks, {'one' if shown == 1 else shown} shown"
    return f"{shown} of {total} ranks shown"


def _cut(views: Iterable[View]) -> list[str]:
    """What the axis leaves out between the passes."""
    gaps = [b.start_ps - a.end_ps for view in views for a, b in zip(view.windows, view.windows[1:], strict=False)]
    return ["time between the passes cut out"] if any(gap > 0 for gap in gaps) else []


def _labels(info: TaskInfo) -> tuple[str, ...]:
    """Texts for a bar, the most telling first."""
    if info.collective:
        name = info.collective.replace("_", "-")
        return (name, name.replace("-", "-\n", 1), COLLECTIVE_SHORT.get(info.collective, name))
    name = info.name.replace("_", " ")
    names = [name, SHORT.get(name, name)] + ([info.operator_class] if info.operator_class in name else [])
    part = f" {info.part}" if info.part in ("dgrad", "wgrad") else ""
    return tuple(text for short in names for text in (short + part, (short + part).replace(" ", "\n")))


# Drawing


@dataclass(slots=True)
class _Bars:
    """Bars of one look, collected so that each look is one container with one entry in the legend."""

    rows: list[float] = field(default_factory=list)
    lefts: list[float] = field(default_factory=list)
    widths: list[float] = field(default_factory=list)


@dataclass(slots=True)
class _Panel:
    """The lanes of one view on axes of their own."""

    view: View
    axes: Axes
    scale: int
    """Picoseconds of one unit of the axis."""
    points_per_ps: float
    width: float
    """Inches."""
    row_points: float
    bars: dict[str, _Bars] = field(default_factory=dict)

    def draw(self) -> None:
        positions = _positions(self.view.rows)
        for scene in self.view.scenes:
            for rank, span, _ in scene.others:
                if (rank, span.lane) in positions:
                    self._add("other passes", positions[rank, span.lane], scene.window, span.posted_ps, span.end_ps)
            for rank, span, info in scene.own:
                self._span(positions[rank, span.lane], scene.window, span, info)
            for rank, wait in scene.waits:
                if (rank, COMPUTE_LANE) in positions:
                    self._add(wait.part, positions[rank, COMPUTE_LANE], scene.window, wait.start, wait.end)
        for look, bars in self.bars.items():
            self.axes.barh(
                bars.rows, bars.widths, BAR, bars.lefts, label=look, linewidth=0.3, **_look(look)
            )  # fmt: skip
        self._lanes(positions)
        self._phases()

    def _add(self, look: str, row: float, window: Window, start: int, end: int) -> None:
        left, right = window.place(start), window.place(end)
        bars = self.bars.setdefault(look, _Bars())
        bars.rows.append(row)
        bars.lefts.append(left / self.scale)
        bars.widths.append((right - left) / self.scale)

    def _span(self, row: float, window: Window, span: Span, info: TaskInfo) -> None:
        if span.start_ps > span.posted_ps:
            self._add(waits_on(span.lane), row, window, span.posted_ps, span.start_ps)
        look = info.operator_class + (", recomputed" if info.part == "recompute" else "")
        self._add(look, row, window, span.start_ps, span.end_ps)
        width = (span.end_ps - span.start_ps) * self.points_per_ps
        found = fitting(_labels(info), width, self.row_points * BAR, LABEL_SIZE)
        if found:
            middle = window.place((span.start_ps + span.end_ps) // 2) / self.scale
            self._text(middle, row, *found, look)

    def _text(self, x: float, row: float, text: str, rotation: int, look: str) -> None:
        style = _look(look)
        # Hatching runs through the letters unless they stand on the plain colour.
        box = {"facecolor": style["color"], "edgecolor": "none", "pad": 0.6} if "hatch" in style else None
        self.axes.text(
            x, row, text, rotation=rotation, size=LABEL_SIZE, ha="center", va="center", linespacing=1.0,
            color=ink_on(style["color"]), bbox=box, parse_math=False,
        )  # fmt: skip

    def _lanes(self, positions: dict[tuple[int, str], float]) -> None:
        self.axes.set_yticks(list(positions.values()), _lane_names(self.view), size=SMALL_SIZE, parse_math=False)
        self.axes.set_ylim(_height(self.view.rows) - 0.5, -0.5)
        self.axes.tick_params(axis="y", length=0)
        self.axes.grid(axis="x", color=GRID, linewidth=0.6)

    def _phases(self) -> None:
        """Names of the passes, and lines between them."""
        windows = self.view.windows
        names = [f"{window.phase.replace('_', ' ')} {_time(window.length_ps)}" for window in windows]
        middles = side_by_side(
            [(window.drawn_ps + window.length_ps / 2) * self.points_per_ps for window in windows],
            [text_size(name, SMALL_SIZE)[0] for name in names],
            self.width * POINTS,
        )
        for window, name, middle in zip(windows, names, middles, strict=True):
            if window.drawn_ps:
                self.axes.axvline(window.drawn_ps / self.scale, color="black", linewidth=1.2, linestyle=(0, (4, 2)))
            self.axes.annotate(
                name, (0, 1), (middle, 4), xycoords="axes fraction", textcoords="offset points", ha="center",
                size=SMALL_SIZE, color=MUTED, annotation_clip=False,
            )  # fmt: skip


def _look(look: str) -> dict[str, Any]:
    """Colour and hatch of a look."""
    plain = {"other passes": OTHER, **WAITS}
    name, _, recomputed = look.partition(", ")
    style = {"color": plain.get(name) or COLOURS[name], "edgecolor": "white"}
    return style | {"hatch": HATCH} if recomputed else style


def _lane_names(view: View) -> list[str]:
    """Labels of the rows of a view; of several ranks the first lane names its rank."""
    several = len(view.ranks) > 1
    return [f"rank {rank}  {lane}" if several and lane == COMPUTE_LANE else lane for rank, lane in view.rows]


def _positions(rows: list[tuple[int, str]]) -> dict[tuple[int, str], float]:
    """Row -> its height from the top; ranks stand apart."""
    positions: dict[tuple[int, str], float] = {}
    previous, here = None, 0.0
    for rank, lane in rows:
        here += RANK_GAP if previous is not None and rank != previous else 0.0
        positions[rank, lane] = here
        previous, here = rank, here + 1
    return positions


def _height(rows: list[tuple[int, str]]) -> float:
    return max(_positions(rows).values()) + 1


def _draw(panels: Sequence[tuple[str, View]]) -> Figure:
    """Panels from top to bottom on one time axis, the legend below."""
    row = 0.68 if sum(len(view.rows) for _, view in panels) <= 6 else 0.4
    heights = [_height(view.rows) * row for _, view in panels]
    above = HEADER if panels[0][0] else ONE_LINE
    figure = Picture(figsize=(WIDTH, BOTTOM + TOP + sum(heights) + above * len(panels)))
    limit = max(view.length_ps for _, view in panels)
    scale, unit = (PS_PER_MS, "ms") if limit >= PS_PER_MS else (PS_PER_US, "µs")
    labels = [name for _, view in panels for name in _lane_names(view)]
    left = max(LEFT, BESIDE_LABEL + max(text_size(name, SMALL_SIZE)[0] for name in labels) / POINTS)
    width = WIDTH - left - RIGHT
    top = float(figure.get_figheight()) - TOP
    for (header, view), height in zip(panels, heights, strict=True):
        top -= above + height
        axes = axes_at(figure, left, top, width, height)
        _Panel(view, axes, scale, width * POINTS / limit, width, row * POINTS).draw()
        axes.set_xlim(0, limit / scale)
        axes.annotate(
            header, (0, 1), (0, 18), xycoords="axes fraction", textcoords="offset points", size=TEXT_SIZE,
            weight="bold", parse_math=False,
        )  # fmt: skip
        axes.tick_params(axis="x", labelbottom=top < BOTTOM + 0.01)
    measured = all(view.trace.measured for _, view in panels)
    figure.axes[-1].set_xlabel(f"time in the {'passes' if measured else 'layer'} ({unit})", size=SMALL_SIZE)
    _legend(figure, {span.info.collective for _, view in panels for scene in view.scenes for span in scene.own})
    return figure


def _legend(figure: Figure, kinds: Collection[str]) -> None:
    """One entry per look, below the axes, and the collectives in full."""
    found = {str(container.get_label()) for axes in figure.axes for container in axes.containers}
    classes = [name for name in COLOURS if name in found or f"{name}, recomputed" in found]
    names = ", ".join(f"{short} {kind.replace('_', '-')}" for kind, short in COLLECTIVE_SHORT.items() if kind in kinds)
    full = {"communication": f"communication: {names}" if names else "communication"}
    entries = [Patch(facecolor=COLOURS[name], label=full.get(name, name)) for name in classes]
    if any(name.endswith("recomputed") for name in found):
        entries.append(Patch(facecolor=MUTED, edgecolor="white", hatch=HATCH, label="recomputed"))
    for name, colour in (*WAITS.items(), ("other passes", OTHER)):
        if name in found:
            entries.append(Patch(facecolor=colour, label=name))
    add_legend(figure, entries)
