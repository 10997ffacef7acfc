"""Stacked bars of plans on one axis: where time goes, and memory at its peak with the capacity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from textwrap import wrap
from typing import Any

from spsim.plots.colours import CATEGORIES, COLOURS, PARTS
from spsim.report.page.document import Chart
from spsim.report.page.look import LINE, MARGIN, NARROW, axis, layout, plain
from spsim.report.words import time
from spsim.studies.plan_accounts import EXPOSED, PlanAccount, grouped
from spsim.units import GIB, PS_PER_MS

OUTSIDE = "context, communicators, reserve"
ROW, THICK, AROUND = 62, 31, 62
"""Pixels of a bar with its name above it, of the bar itself, and of the axis."""


@dataclass(frozen=True)
class Bar:
    """One bar: its name, its parts, and what stands at its end."""

    name: str
    parts: Mapping[str, float]
    total: str


def time_chart(accounts: Sequence[PlanAccount]) -> Chart:
    """Milliseconds of the step by part, a bar for each plan."""
    bars = []
    for account in accounts:
        parts = {name: ps / PS_PER_MS for name, ps in grouped(account.step).items()}
        bars.append(Bar(account.name, parts, time(account.result.step_time_s)))
    return stacked(bars, {**PARTS, EXPOSED: COLOURS["communication"]}, "ms", "time of a step (ms)")


def memory_chart(accounts: Sequence[PlanAccount]) -> Chart:
    """GiB of the fullest GPU at its peak by category, a bar for each plan, with the capacity."""
    bars = []
    for account in accounts:
        result = account.result
        parts = {name: size / GIB for name, size in account.memory.items()}
        parts[OUTSIDE] = result.device_memory_gib - result.peak_memory_gib
        fits = "" if result.fits else ", does not fit"
        bars.append(Bar(account.name, parts, f"{result.device_memory_gib:.1f} GiB{fits}"))
    capacity = accounts[0].result.capacity_gib
    chart = stacked(bars, {**CATEGORIES, OUTSIDE: "#777777"}, "GiB", "memory of the fullest GPU (GiB)", until=capacity)
    side = "right" if capacity > chart["layout"]["xaxis"]["range"][1] / 2 else "left"
    line = {
        "type": "line", "x0": capacity, "x1": capacity, "y0": 0, "y1": 1, "yref": "paper",
        "line": {"color": "black", "width": 1.5, "dash": "dash"},
    }  # fmt: skip
    words = {
        "x": capacity, "y": 1, "yref": "paper", "text": f"capacity {capacity:.1f} GiB", "showarrow": False,
        "xanchor": side, "yanchor": "bottom", "font": {"size": 12},
    }  # fmt: skip
    shown = chart["layout"]
    return {**chart, "layout": {**shown, "shapes": [line], "annotations": [*shown["annotations"], words]}}


def stacked(bars: Sequence[Bar], colours: Mapping[str, str], unit: str, title: str, *, until: float = 0.0) -> Chart:
    """Bars from top to bottom, the name of each above it; the axis reaches `until` at least."""
    names = dict.fromkeys(name for bar in bars for name in bar.parts)
    lines = max(len(_lines(bar)) for bar in bars)
    row = ROW + LINE * (lines - 1)
    thick = THICK / row
    data = [
        {
            "type": "bar", "orientation": "h", "name": plain(name), "width": thick,
            "x": [round(bar.parts.get(name, 0.0), 6) for bar in bars], "y": [*range(len(bars))],
            "marker": {"color": colours.get(name, COLOURS["other"]), "line": {"color": "white", "width": 0.5}},
            "customdata": [plain(bar.name) for bar in bars],
            "hovertemplate": f"%{{customdata}}<br>{plain(name)}: %{{x:,.3f}} {unit}<extra></extra>",
        }
        for name in names
    ]  # fmt: skip
    totals = [sum(bar.parts.values()) for bar in bars]
    shown = layout(
        AROUND + row * len(bars) + (24 if until else 0),
        barmode="stack",
        margin={**MARGIN, "t": 34 if until else 10},
        xaxis=axis(title, fixedrange=True, range=[0, 1.02 * max(*totals, until)]),
        yaxis=axis(fixedrange=True, showticklabels=False, showgrid=False, range=[len(bars) - 1 + thick, thick / 2 - 1]),
        annotations=[_note(place - 0.55 * thick, bar) for place, bar in enumerate(bars)],
    )
    return {"data": data, "layout": shown}


def _lines(bar: Bar) -> list[str]:
    """Its name, in lines that a narrow window holds, and its total."""
    names = [f"<b>{plain(line)}</b>" for line in wrap(bar.name, NARROW)]
    if len(bar.name) + len(bar.total) > NARROW:
        return [*names, plain(bar.total)]
    return [f"{names[0]}&nbsp; {plain(bar.total)}"]


def _note(height: float, bar: Bar) -> dict[str, Any]:
    """The name above a bar, and its total."""
    return {
        "xref": "paper", "x": 0, "xanchor": "left", "y": height, "yanchor": "bottom", "align": "left",
        "showarrow": False, "text": "<br>".join(_lines(bar)),
    }  # fmt: skip
