"""The page of a sweep: its cases, the fastest strategy of each, and its tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.table import Table

from spsim.plots.colours import COLOURS, PARTS, WAITING
from spsim.report.page.document import Chart, Page, Section, write_page
from spsim.report.page.look import LINE, MARGIN, axis, layout, plain
from spsim.report.table import table
from spsim.report.words import listed
from spsim.studies.cases import END, EXPOSED, REST, Case
from spsim.units import KIB

MOST, MOST_ROWS = 300, 2_000
"""Bars of a page, about, and rows of its table; of further cases the answer at the top alone is."""
ROW, HEADING, AROUND = 21, 30, 56
"""Pixels of a bar, of the sequence length above some, and of the axis."""
STACK = {**PARTS, EXPOSED: COLOURS["communication"], END: COLOURS["other"], REST: WAITING}
FITS, OUT = "fits", "does not fit"
MEMORY = {FITS: COLOURS["gemm"], OUT: COLOURS["communication"]}
LONGEST = 22
"""Letters of a strategy beside its bar."""


def write_sweep(title: str, cases: Sequence[Case], tables: Sequence[Any], path: Path) -> None:
    """Write the page; tables are rich tables and text."""
    drawn = [*_first(cases)]
    machines = [[*own] for _, own in groupby(drawn, key=lambda case: (case.model, case.hardware))]
    rest = "" if len(drawn) == len(cases) else f" The first {len(drawn)} of {len(cases)} cases."
    more = "" if len(cases) <= MOST_ROWS else f"The first {MOST_ROWS:,} of {len(cases):,} cases."
    best = "Of each strategy the plan that fits with the shortest step, else the one that needs least memory."
    shown = [entry for entry in tables if isinstance(entry, Table)]
    lines = [line for entry in tables if isinstance(entry, str) for line in entry.splitlines() if line]
    sections = [
        Section("Time of a step by strategy", f"{best}{rest}", [_times(own) for own in machines]),
        Section("Memory of the fullest GPU", best, [_memory(own) for own in machines]),
        Section("Case by case", more, tables=[_case_table(cases[:MOST_ROWS])]),
        Section("Tables of the experiment", tables=shown, lines=lines),
    ]
    write_page(Page(title, f"{len(cases)} cases", _verdict(cases), sections), path)


def _first(cases: Sequence[Case]) -> Iterator[Case]:
    """As many as a page has bars for."""
    bars = 0
    for case in cases:
        bars += len(case.rows)
        if bars > MOST:
            return
        yield case


# ------------------------------------------------------------ the answer


def _verdict(cases: Sequence[Case]) -> list[str]:
    """How often each strategy is the fastest that fits, how often that is a tie, and where nothing fits."""
    compared = [case for case in cases if len(case.rows) > 1]
    if not compared:
        fit = sum(case.ranking is not None for case in cases)
        return [f"{fit} of {len(cases)} configurations fit; none has another to be compared with."]
    wins = Counter(case.ranking.names[0] for case in compared if case.ranking and not case.ranking.tied)
    ties = sum(bool(case.ranking and case.ranking.tied) for case in compared)
    leads = [case.ranking.lead_percent for case in compared if case.ranking and not case.ranking.tied]
    told = [f"{name} in {count}" for name, count in wins.most_common()] + ([f"a tie in {ties}"] if ties else [])
    none = sum(case.ranking is None for case in compared)
    more = f"; the lead is up to {max(leads):.0f} %" if max(leads, default=0.0) > 0 else ""
    answer = f"Of {len(compared)} cases the fastest that fits is {listed(told)}{more}." if told else ""
    misfits = Counter(name for case in compared for name, row in case.rows.items() if not row["fits"])
    out = listed([f"{name} in {count}" for name, count in misfits.most_common()]) if misfits else ""
    return [
        *([answer] if answer else []),
        *([f"Does not fit: {out}."] if out else ["Everything fits."]),
        *([f"In {none} nothing fits."] if none else []),
    ]


def _case_table(cases: Sequence[Case]) -> Table:
    columns = ["model", "hardware", "GPUs", "tokens", "fastest that fits", "step, ms", "GPU memory, GiB"]
    more = ["ahead of the next by", "ties with", "does not fit"]
    made = table("", [*columns, *more], numbers=["GPUs", "tokens", "step, ms", "GPU memory, GiB", more[0]])
    for case in cases:
        ranking = case.ranking
        out = ", ".join(name for name, row in case.rows.items() if not row["fits"])
        if ranking is None:
            found = ["nothing", "", "", "", ""]
        else:
            first = case.rows[ranking.names[0]]
            lead = f"{ranking.lead_percent:.1f} %" if ranking.over else ""
            sizes = [f"{first['step_time_ms']:,.1f}", f"{first['device_memory_gib']:.1f}"]
            found = [ranking.names[0], *sizes, lead, ", ".join(ranking.tied)]
        made.add_row(case.model, case.hardware, str(case.gpus), f"{case.seq_len:,}", *found, out)
    return made


# ------------------------------------------------------------ charts


def _times(cases: Sequence[Case]) -> Chart:
    """Milliseconds per 1K tokens by part."""
    names = [name for name in STACK if any(name in parts for case in cases for parts in case.parts.values())]
    bars = {name: [parts.get(name, 0.0) for case in cases for parts in case.parts.values()] for name in names}
    return _chart(cases, bars, STACK, "ms per 1K tokens")


def _memory(cases: Sequence[Case]) -> Chart:
    """GiB of the fullest GPU, with the capacity."""
    rows = [row for case in cases for row in case.rows.values()]
    sizes = {
        FITS: [row["device_memory_gib"] if row["fits"] else 0.0 for row in rows],
        OUT: [0.0 if row["fits"] else row["device_memory_gib"] for row in rows],
    }
    capacity = float(rows[0]["capacity_gib"])
    chart = _chart(cases, sizes, MEMORY, "GiB, capacity dashed", until=capacity, most=2.5 * capacity)
    line = {
        "type": "line", "x0": capacity, "x1": capacity, "y0": 0, "y1": 1, "yref": "paper",
        "line": {"color": "black", "width": 1.5, "dash": "dash"},
    }  # fmt: skip
    return {**chart, "layout": {**chart["layout"], "shapes": [line]}}


def _chart(
    cases: Sequence[Case],
    bars: dict[str, list[float]],
    colours: dict[str, str],
    unit: str,
    *,
    until: float = 0.0,
    most: float = float("inf"),
) -> Chart:
    """Bars in groups by sequence length, the strategy beside each; what reaches beyond `most` is cut."""
    places: list[float] = []
    labels: list[str] = []
    headings = []
    place = 0.0
    for case in cases:
        place += HEADING / ROW
        headings.append(_heading(place - 0.5, f"{_tokens(case.seq_len)} tokens, {case.gpus} GPUs"))
        for name in case.rows:
            places.append(place)
            labels.append(name)
            place += 1
    data = [
        {
            "type": "bar", "orientation": "h", "name": name, "x": [round(size, 4) for size in sizes], "y": places,
            "width": 0.84, "marker": {"color": colours[name]}, "customdata": [plain(label) for label in labels],
            "hovertemplate": f"%{{customdata}}<br>{name}: %{{x:,.3f}} {plain(unit)}<extra></extra>",
        }
        for name, sizes in bars.items()
    ]  # fmt: skip
    longest = max(map(sum, zip(*bars.values(), strict=True)))
    short = [label if len(label) <= LONGEST else label[: LONGEST - 1] + "…" for label in labels]
    shown = layout(
        int(AROUND + ROW * place), barmode="stack", margin={**MARGIN, "t": LINE},
        xaxis=axis(unit, fixedrange=True, range=[0, 1.02 * min(max(longest, until), most)]),
        yaxis=axis(
            fixedrange=True, range=[place - 0.5, -0.5], tickvals=places, ticktext=[plain(label) for label in short],
            showgrid=False, ticks="",
        ),
        annotations=headings,
    )  # fmt: skip
    return {"title": f"{cases[0].model} on {cases[0].hardware}", "data": data, "layout": shown}


def _heading(height: float, text: str) -> dict[str, Any]:
    return {
        "x": 0, "xref": "paper", "xanchor": "left", "y": height, "yanchor": "bottom", "showarrow": False,
        "text": f"<b>{plain(text)}</b>", "font": {"size": 12},
    }  # fmt: skip


def _tokens(count: int) -> str:
    return f"{count // KIB}K" if count % KIB == 0 else f"{count:,}"
