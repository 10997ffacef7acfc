"""Memory over time by category, a chart for each plan on the same axes."""

from __future__ import annotations

from collections.abc import Sequence

from spsim.plots.colours import CATEGORIES
from spsim.report.page.document import Chart
from spsim.report.page.look import axis, layout
from spsim.results.filling import over_time
from spsim.results.result import Result
from spsim.studies.plan_accounts import PlanAccount
from spsim.units import GIB, MS_PER_S, PS_PER_MS

POINTS = 800
"""Moments that a chart can tell apart."""
HEIGHT, TITLE = 190, 24
"""Pixels of a chart, and of the name of its axis."""
HEADROOM = 1.15


def memory_charts(accounts: Sequence[PlanAccount]) -> list[Chart]:
    """A chart for each plan, of the rank that is fullest; the last names the axis."""
    end = max(account.result.step_time_s for account in accounts) * MS_PER_S
    most = HEADROOM * max(account.result.peak_memory_gib for account in accounts)
    several = len(accounts) > 1
    return [
        _chart(account.name if several else "", account.result, end, most, last=account is accounts[-1])
        for account in accounts
    ]


def _chart(name: str, result: Result, end_ms: float, most_gib: float, *, last: bool) -> Chart:
    peak = result.peak
    times, sizes = over_time(result.trace, peak, result.statics[peak.rank].by_category(), POINTS)
    data = [
        {
            "type": "scatter", "mode": "lines", "stackgroup": "held", "name": category,
            "x": [round(time / PS_PER_MS, 6) for time in times],
            "y": [round(size / GIB, 4) for size in sizes.get(category, [0] * len(times))],
            "line": {"width": 0, "shape": "hv"}, "fillcolor": colour,
            "hovertemplate": f"{category}: %{{y:.2f}} GiB<extra></extra>",
        }
        for category, colour in CATEGORIES.items()
        if category in sizes
    ]  # fmt: skip
    limit = result.limit / GIB
    line = {
        "type": "line", "x0": 0, "x1": 1, "xref": "paper", "y0": limit, "y1": limit,
        "line": {"color": "black", "width": 1.2, "dash": "dash"},
    }  # fmt: skip
    words = f"peak {result.peak_memory_gib:.2f} GiB of {limit:.1f} usable, at {result.peak_operator}"
    shown = layout(
        HEIGHT + (TITLE if last else 0),
        hovermode="x unified",
        xaxis=axis("time in the step (ms)" if last else "", range=[0, end_ms], hoverformat=".3f"),
        yaxis=axis("GiB", fixedrange=True, range=[0, most_gib]),
        shapes=[line] if limit < most_gib else [],
    )  # fmt: skip
    return {"title": f"{name}: {words}" if name else words, "data": data, "layout": shown}
