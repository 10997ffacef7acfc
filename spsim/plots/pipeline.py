"""The schedule of a pipeline: a row for each stage, a bar for each pass of a micro-batch, and what is between them."""

from __future__ import annotations

from collections import defaultdict
from itertools import pairwise

from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from spsim.errors import InputError
from spsim.plots.colours import COLOURS, MUTED, WAITS, ink_on
from spsim.plots.figure import (
    LABEL_SIZE,
    POINTS,
    SMALL_SIZE,
    WIDTH,
    Picture,
    add_legend,
    add_title,
    axes_at,
    describe,
    describe_workload,
    fitting,
    text_size,
)
from spsim.results.accounts import STAGES, SYNC
from spsim.results.result import Result
from spsim.step.pipeline.timing import PassSpan
from spsim.step.pipelined import Pipelined
from spsim.units import PS_PER_MS, PS_PER_S

LEFT, RIGHT, BOTTOM, TOP = 1.0, 0.3, 0.95, 1.05
"""Inches around the rows: names, margin, legend, title and the names of the parts of the step."""
ROW, MOST, BAR = 0.45, 8.0, 0.86
"""Inches of a row, of all rows at most, and the share of a row that a bar takes."""
BUBBLE, TRANSFER = "bubble", "transfer that stages wait for"
LOOKS = {
    "forward": COLOURS["gemm"], "backward": COLOURS["norm"], "input gradients": COLOURS["dropout"],
    "weight gradients": COLOURS["softmax"], SYNC: COLOURS["copy"], "optimizer": COLOURS["attention"],
    TRANSFER: COLOURS["communication"], BUBBLE: WAITS[STAGES],
}  # fmt: skip
"""Of passes, of what follows them, and of what is between them."""
CLOSING = {"weight_sync": SYNC, "optimizer": "optimizer"}
LONG_PS = 10 * PS_PER_S
"""From here on times are in seconds."""
EDGED = 300
"""Bars of a row that have edges, at most."""
PALEST = 0.6
"""Share of white in the bars of the last of several chunks."""

Bar = tuple[float, float]
"""Begin and length."""
Rows = dict[int, list[Bar]]


def plot_pipeline(result: Result) -> Figure:
    """All passes of a step of several stages, numbered by micro-batch where there is space; several chunks of a stage
    are the paler, the later they stand in it. Lines join each stage's first backward pass, which ends its warm-up, and
    its last forward pass, after which it drains.

    Raises `InputError` where the passes of the stages are not known one by one, such as without stages.
    """
    if result.staged is None:
        raise InputError("plot_pipeline: the step has no stages whose passes are known one by one; use plot_timeline")
    ran = result.staged.ran
    row = min(ROW, MOST / len(ran.stages))
    figure = Picture(figsize=(WIDTH, TOP + BOTTOM + row * len(ran.stages)))
    axes = axes_at(figure, LEFT, BOTTOM, WIDTH - LEFT - RIGHT, row * len(ran.stages))
    scale, unit = (PS_PER_S, "s") if result.step_ps >= LONG_PS else (PS_PER_MS, "ms")
    axes.set_xlim(0, result.step_ps / scale)
    axes.set_ylim(len(ran.stages) - 0.5, -0.5)
    _between(axes, ran, scale)
    _passes(axes, ran, scale, row * POINTS)
    _closing(axes, ran, scale)
    _phases(axes, ran, scale)
    _names(axes, len(ran.stages), row * POINTS)
    axes.set_xlabel(f"time in the step ({unit})", size=SMALL_SIZE)
    _legend(figure, axes, max(map(len, ran.stages)))
    parts = [describe_workload(result), f"{result.scenario.num_micro_batches} micro-batches"]
    parts += [f"step {result.step_ps / scale:.2f} {unit}", f"bubble {100 * result.bubble:.1f} %"]
    add_title(figure, f"{describe(result)}: passes of the stages", " · ".join(parts))
    return figure


# What a row shows


def _between(axes: Axes, ran: Pipelined, scale: int) -> None:
    """What passes do not cover: the bubble, and in it the transfers that a stage waits for."""
    last = max(ran.timeline.finished_ps.tolist())
    _draw(axes, BUBBLE, LOOKS[BUBBLE], {stage: [(0, last / scale)] for stage in range(len(ran.stages))})
    found: Rows = defaultdict(list)
    for wait in ran.waits:
        for flight in wait.flights:
            begin, end = max(wait.start_ps, flight.start_ps), min(wait.end_ps, flight.end_ps)
            if end > begin:
                found[wait.rank // ran.stride].append((begin / scale, (end - begin) / scale))
    _draw(axes, TRANSFER, LOOKS[TRANSFER], found)


def _passes(axes: Axes, ran: Pipelined, scale: int, height: float) -> None:
    chunks = max(map(len, ran.stages))
    looks: dict[tuple[str, int], Rows] = defaultdict(lambda: defaultdict(list))
    low, high = axes.get_xlim()
    points = (WIDTH - LEFT - RIGHT) * POINTS / (high - low)
    for span in ran.times.passes:
        work, chunk = ran.work_of(span.rank, span.action), span.action.chunk
        if work == "nothing":
            continue
        begin, length = span.start_ps / scale, (span.end_ps - span.start_ps) / scale
        looks[work, chunk][span.rank].append((begin, length))
        found = fitting([str(span.action.micro_batch)], length * points, height * BAR, LABEL_SIZE)
        if found and found[1] == 0:
            axes.text(
                begin + length / 2, span.rank, found[0], size=LABEL_SIZE, ha="center", va="center",
                color=ink_on(_shade(LOOKS[work], chunk, chunks)),
            )  # fmt: skip
    for (look, chunk), rows in looks.items():
        _draw(axes, look, _shade(LOOKS[look], chunk, chunks), rows)


def _closing(axes: Axes, ran: Pipelined, scale: int) -> None:
    """What follows the passes: gradients and weights in common, and the optimizer."""
    looks: dict[str, Rows] = defaultdict(lambda: defaultdict(list))
    for stage, closing in enumerate(ran.closing):
        for made, moments in closing:
            for _, start, end in moments:
                looks[CLOSING[made.segment.phase]][stage].append((start / scale, (end - start) / scale))
    for phase, rows in looks.items():
        _draw(axes, phase, LOOKS[phase], rows)


def _draw(axes: Axes, label: str, colour: str, rows: Rows) -> None:
    """Bars of one look, without edges where these would cover them."""
    for stage, bars in rows.items():
        edge = 0.3 if len(bars) <= EDGED else 0.0
        axes.broken_barh(
            bars, (stage - BAR / 2, BAR), facecolors=colour, edgecolors="white", linewidths=edge, label=label
        )  # fmt: skip


def _shade(colour: str, chunk: int, chunks: int) -> str:
    white = PALEST * chunk / max(1, chunks - 1)
    red, green, blue = (own + (1 - own) * white for own in to_rgb(colour))
    return to_hex((red, green, blue))


# Around the rows


def _phases(axes: Axes, ran: Pipelined, scale: int) -> None:
    """Where warm-up ends and where the drain begins, stage by stage, and their names over the first."""
    passes: dict[int, list[PassSpan]] = defaultdict(list)
    for span in ran.times.passes:
        passes[span.rank].append(span)
    warm = [min(s.start_ps for s in own if s.action.kind != "F") / scale for _, own in sorted(passes.items())]
    drain = [max(s.end_ps for s in own if s.action.kind == "F") / scale for _, own in sorted(passes.items())]
    for moments in (warm, drain):
        places = [place for stage in range(len(moments)) for place in (stage - 0.5, stage + 0.5)]
        axes.plot([moment for moment in moments for _ in range(2)], places, color="black", linewidth=1.4)
    last = ran.timeline.finished_ps[0] / scale
    edges = [0.0, min(warm[0], drain[0]), max(warm[0], drain[0]), float(last)]
    middle = "steady state" if warm[0] < drain[0] else ""
    scale_points = (WIDTH - LEFT - RIGHT) * POINTS / axes.get_xlim()[1]
    for name, (begin, end) in zip(("warm-up", middle, "drain"), pairwise(edges), strict=True):
        if name and (end - begin) * scale_points > text_size(name, SMALL_SIZE)[0]:
            axes.annotate(
                name, ((begin + end) / 2, 1), (0, 4), xycoords=("data", "axes fraction"), textcoords="offset points",
                ha="center", size=SMALL_SIZE, color=MUTED, annotation_clip=False,
            )  # fmt: skip


def _names(axes: Axes, stages: int, height: float) -> None:
    """Of as many stages as there is space for."""
    step = next(step for step in range(1, stages + 1) if step * height >= SMALL_SIZE * 1.3 or step == stages)
    shown = range(0, stages, step)
    axes.set_yticks(shown, [f"stage {stage}" for stage in shown], size=SMALL_SIZE)
    axes.tick_params(axis="y", length=0)


def _legend(figure: Figure, axes: Axes, chunks: int) -> None:
    found = {str(collection.get_label()) for collection in axes.collections}
    entries: list[Patch | Line2D] = [Patch(facecolor=LOOKS[look], label=look) for look in LOOKS if look in found]
    if chunks > 1:
        entries.append(Patch(facecolor=_shade(LOOKS["forward"], 1, 2), label="paler: later chunks of a stage"))
    entries.append(Line2D([], [], color="black", linewidth=1.4, label="end of warm-up, begin of drain"))
    add_legend(figure, entries)
