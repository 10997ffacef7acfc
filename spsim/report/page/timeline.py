"""The timeline of a page: lanes of a few ranks, a bar for each kernel and communication, to zoom into."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from textwrap import wrap
from typing import Any, NamedTuple

from spsim.engine.recording import COMPUTE_LANE, Span, TaskInfo
from spsim.plots.colours import COLOURS, OTHER, WAITS
from spsim.report.page.document import Chart
from spsim.report.page.look import LINE, MARGIN, NARROW, axis, layout, plain
from spsim.report.words import size, time
from spsim.results.accounts import waits_on
from spsim.results.metrics import compute_by_class
from spsim.results.result import Result
from spsim.results.selection import Selection, distinct_ranks, lane_order, select, spread
from spsim.studies.plan_accounts import PlanAccount
from spsim.units import MS_PER_S, PS_PER_MS, PS_PER_S

MOST = 7_000
"""Bars of all plans together, about: what a browser draws in less than a second."""
RANKS = 4
"""Of one plan that are shown where they differ; of several plans it is one of each."""
LANE, HEADING, AROUND = 34, 26, 62
"""Pixels of a lane, of the name above the lanes of a rank, and of the axis."""
RECOMPUTED, ELSE = "recomputed ", "other layers and micro-batches"


HOVER = "<b>%{customdata[0]}</b><br>%{customdata[1]}<br>from %{base:.4f} ms<extra></extra>"


class Lanes(NamedTuple):
    """The lanes of one rank from top to bottom, and what of the step is shown."""

    heading: str
    rank: int
    result: Result
    selection: Selection
    names: Sequence[str]


@dataclass
class _Bars:
    """Bars of one look."""

    begins: list[float] = field(default_factory=list)
    lengths: list[float] = field(default_factory=list)
    rows: list[float] = field(default_factory=list)
    words: list[tuple[str, str]] = field(default_factory=list)
    """Name, and what else is said of it."""

    def add(self, row: float, begin_ps: int, end_ps: int, name: str, words: str) -> None:
        self.begins.append(round(begin_ps / PS_PER_MS, 6))
        self.lengths.append(round((end_ps - begin_ps) / PS_PER_MS, 6))
        self.rows.append(row)
        self.words.append((plain(name), plain(words)))


def timeline_chart(accounts: Sequence[PlanAccount]) -> tuple[Chart, str]:
    """The chart, and what of the step of each plan is shown."""
    lanes = [[*_lanes(account, len(accounts))] for account in accounts]
    looks: dict[str, _Bars] = defaultdict(_Bars)
    ticks: dict[float, str] = {}
    headings: list[dict[str, Any]] = []
    place = 0.0
    for own in chain.from_iterable(lanes):
        lines = wrap(own.heading, NARROW)
        place += (HEADING + LINE * (len(lines) - 1)) / LANE
        headings.append(_heading(place - 0.5, lines))
        rows = {name: place + index for index, name in enumerate(own.names)}
        ticks |= {row: name for name, row in rows.items()}
        _fill(looks, own, rows)
        place += len(rows)
    end = max(account.result.step_time_s for account in accounts) * MS_PER_S
    shown = layout(
        int(AROUND + LANE * place), hovermode="closest", dragmode="zoom", barmode="overlay",
        margin={**MARGIN, "t": 26}, uniformtext={"mode": "hide", "minsize": 9},
        xaxis=axis("time in the step (ms)", range=[0, end]),
        yaxis=axis(
            fixedrange=True, range=[place - 0.5, -0.5], tickvals=[*ticks], ticktext=[*map(plain, ticks.values())],
            showgrid=False, ticks="",
        ),
        annotations=headings,
    )  # fmt: skip
    data = [_trace(look, looks[look]) for look in _order(looks)]
    names = [f"{account.name}: " if len(accounts) > 1 else "" for account in accounts]
    words = [name + own[0].selection.words for name, own in zip(names, lanes, strict=True)]
    return {"data": data, "layout": shown, "windows": [*_windows(accounts, end)]}, "; ".join(words)


def _lanes(account: PlanAccount, plans: int) -> Iterator[Lanes]:
    """Of one plan those of its distinct ranks, else of the one that computes longest."""
    result, trace = account.result, account.result.trace
    if plans == 1:
        ranks = spread(distinct_ranks(trace), RANKS)
    else:
        busy = {rank: sum(compute_by_class(trace, rank).values()) for rank in trace.copies}
        ranks = [max(busy, key=busy.__getitem__)]
    own = result.scenario
    selection = select(trace, own.model.layers, own.num_micro_batches, ranks=ranks, large=MOST // plans)
    for rank in ranks:
        used = {span.lane for span, _ in _spans(selection, rank)}
        heading = account.name if plans > 1 else f"rank {rank}"
        yield Lanes(heading, rank, result, selection, [name for name in lane_order(trace) if name in used])


def _spans(selection: Selection, rank: int) -> Iterator[tuple[Span, TaskInfo]]:
    source = selection.ranks[rank]
    for piece in selection.pieces:
        if source in piece.recording.times:
            yield from zip(piece.spans_of(source), selection.trace.describe(piece), strict=False)


def _fill(looks: dict[str, _Bars], lanes: Lanes, rows: dict[str, float]) -> None:
    for begin, end in _between(lanes.selection.windows, lanes.result.step_ps):
        looks[ELSE].add(rows[COMPUTE_LANE], begin, end, ELSE, "not shown one by one")
    for span, info in _spans(lanes.selection, lanes.rank):
        row = rows[span.lane]
        if span.start_ps > span.posted_ps and info.collective:
            waits = waits_on(span.lane)
            looks[waits].add(row, span.posted_ps, span.start_ps, waits, _long(span.posted_ps, span.start_ps))
        if span.end_ps > span.start_ps:
            look = (RECOMPUTED if info.part == "recompute" else "") + info.operator_class
            looks[look].add(row, span.start_ps, span.end_ps, _name(info), _words(span, info))


def _between(windows: Sequence[tuple[int, int]], end: int) -> Iterator[tuple[int, int]]:
    """What windows leave of the step."""
    edges = [0, *(edge for window in windows for edge in window), end]
    return ((begin, end) for begin, end in zip(edges[::2], edges[1::2], strict=True) if begin < end)


def _name(info: TaskInfo) -> str:
    """What stands in the bar."""
    return info.collective.replace("_", "-") or info.name.replace("_", " ")


def _long(begin_ps: int, end_ps: int) -> str:
    return time((end_ps - begin_ps) / PS_PER_S)


def _words(span: Span, info: TaskInfo) -> str:
    """What it is, where, and how much of it."""
    where = [f"layer {info.layer}"] if info.layer is not None else []
    where += [f"micro-batch {info.micro_batch}"] if info.micro_batch is not None else []
    what = [f"{info.name.replace('_', ' ')} ({info.part})", *where, _long(span.start_ps, span.end_ps)]
    if info.collective:
        what += [f"{size(info.message_bytes)} over {info.axis}"]
    elif info.flops:
        what += [f"{info.flops / 1e9:,.1f} GFLOP"]
    return ", ".join(what)


def _order(looks: dict[str, _Bars]) -> list[str]:
    known = [ELSE, *WAITS, *(name for kind in COLOURS for name in (kind, RECOMPUTED + kind))]
    return [look for look in known if look in looks]


def _trace(look: str, bars: _Bars) -> dict[str, Any]:
    """Bars of one look as plotly.js takes them."""
    kind = look.removeprefix(RECOMPUTED)
    marker: dict[str, Any] = {"color": {**COLOURS, **WAITS, ELSE: OTHER}[kind], "line": {"width": 0}}
    recomputed = look != kind
    if recomputed:
        marker["pattern"] = {"shape": "/", "size": 6, "fgcolor": "white"}
    return {
        "type": "bar", "orientation": "h", "name": look, "base": bars.begins, "x": bars.lengths, "y": bars.rows,
        "width": 0.84, "marker": marker, "customdata": bars.words, "textposition": "inside", "textangle": 0,
        "insidetextanchor": "middle", "hovertemplate": HOVER, "showlegend": not recomputed,
    }  # fmt: skip


def _heading(height: float, lines: Sequence[str]) -> dict[str, Any]:
    return {
        "x": 0, "xref": "paper", "xanchor": "left", "y": height, "yanchor": "bottom", "showarrow": False,
        "align": "left", "text": "<br>".join(f"<b>{plain(line)}</b>" for line in lines),
    }  # fmt: skip


def _windows(accounts: Sequence[PlanAccount], end_ms: float) -> Iterator[dict[str, Any]]:
    """The whole step, and the passes of the first layer; backward passes of plans are at different times."""
    yield {"name": "whole step", "range": [0, end_ms]}
    traces = {account.name: account.result.trace for account in accounts}
    forward = [trace.window_of("forward", 0, 0) for trace in traces.values()]
    yield _window("layer 0 forward", min(begin for begin, _ in forward), max(end for _, end in forward))
    for name, trace in traces.items() if not accounts[0].result.is_served else ():
        yield _window(f"layer 0 backward{f', {name}' if len(accounts) > 1 else ''}", *trace.window_of("backward", 0, 0))


def _window(name: str, begin_ps: int, end_ps: int) -> dict[str, Any]:
    """With a little room around it."""
    room = (end_ps - begin_ps) / 20
    return {"name": name, "range": [(begin_ps - room) / PS_PER_MS, (end_ps + room) / PS_PER_MS]}
