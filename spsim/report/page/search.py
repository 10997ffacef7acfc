"""The page of a search for a plan: the best plans, the front of time and memory, and where the best spend both."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from spsim.plots.colours import COLOURS
from spsim.report.page.document import Chart, Page, Section, write_page
from spsim.report.page.look import axis, layout, plain
from spsim.report.page.stacks import memory_chart, time_chart
from spsim.report.plan import best_table, lines
from spsim.report.table import table
from spsim.report.words import time
from spsim.studies.search.outcome import Found, PlanSearch

HEIGHT = 460
"""Pixels of the chart of all plans."""
OTHERS = "others that were simulated"
COLOURS_OF = {
    OTHERS: COLOURS["elementwise"],
    "front": COLOURS["communication"],
    "shortest steps": COLOURS["gemm"],
}


def write_search(search: PlanSearch, path: Path) -> None:
    """Write the page."""
    scenario = search.best[0].scenario
    sizes = f"sequence {scenario.workload.seq_len:,} · {scenario.global_batch} sequences a step"
    accounts = search.accounts
    page = Page(
        f"{scenario.model.name} on {search.gpus} GPUs of {search.hardware.name}",
        f"{sizes} · {len(search.candidates):,} plans",
        [_answer(search), *lines(search)],
        [
            Section("The best plans", tables=[best_table(search)]),
            Section(
                "Time and memory",
                "Plans that were simulated and fit. No plan is shorter and takes less memory than one of the front; a "
                "dot says which plan it is when pointed at.",
                [front_chart(search)],
            ),
            Section("Where the time goes", "A step on the rank that ends last.", [time_chart(accounts)]),
            Section("Memory at the peak", "Of the fullest GPU.", [memory_chart(accounts)]),
            Section("The front", tables=[_front_table(search.front)], folded=True),
        ],
    )
    write_page(page, path)


def _answer(search: PlanSearch) -> str:
    first, ties = search.best[0], len(search.tied)
    tie = f", a tie with {ties} others" if ties > 1 else ", a tie with one other" if ties else ""
    return (
        f"{first.name} has the shortest step that fits, {time(first.step_s)} at an MFU of "
        f"{100 * first.row['mfu']:.1f} %{tie}; it leaves {first.headroom_gib:.1f} GiB free."
    )


def front_chart(search: PlanSearch) -> Chart:
    """Seconds of a step over GiB of the fullest GPU, with the capacity."""
    best, front = search.best, search.front
    groups = {OTHERS: [own for own in search.found if own not in best and own not in front]}
    groups |= {"front": front, "shortest steps": best}
    room = float(best[0].row["capacity_gib"])
    capacity = {
        "type": "line", "x0": room, "x1": room, "y0": 0, "y1": 1, "yref": "paper",
        "line": {"color": "black", "width": 1.5, "dash": "dash"},
    }  # fmt: skip
    shown = layout(
        HEIGHT, xaxis=axis("memory of the fullest GPU (GiB), capacity dashed", range=[0, 1.02 * room]),
        yaxis=axis("time of a step (s)"), shapes=[capacity],
    )  # fmt: skip
    return {"data": [_dots(name, own) for name, own in groups.items() if own], "layout": shown}


def _dots(name: str, plans: Sequence[Found]) -> dict[str, Any]:
    colour = COLOURS_OF[name]
    return {
        "type": "scatter", "mode": "lines+markers" if name == "front" else "markers", "name": name,
        "x": [own.memory_gib for own in plans], "y": [own.step_s for own in plans],
        "marker": {"color": colour, "size": 7}, "line": {"color": colour, "shape": "vh", "width": 1.5},
        "customdata": [plain(own.name) for own in plans],
        "hovertemplate": "%{customdata}<br>%{y:,.3f} s, %{x:.1f} GiB<extra></extra>",
    }  # fmt: skip


def _front_table(front: Sequence[Found]) -> Table:
    numbers = ["step time", "memory GiB", "headroom GiB"]
    made = table("", ["plan", *numbers], numbers=numbers)
    for own in front:
        made.add_row(own.name, time(own.step_s), f"{own.memory_gib:.1f}", f"{own.headroom_gib:.1f}")
    return made
