"""The page of steps under perturbations: what they cost, how that spreads over seeds, and who is to blame."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from spsim.plots.colours import COLOURS
from spsim.report import perturbation as of_perturbed
from spsim.report import run as of_run
from spsim.report.page.document import Chart, Page, Section, write_page
from spsim.report.page.look import LINE, MARGIN, axis, layout, plain
from spsim.report.page.stacks import time_chart
from spsim.report.page.timeline import timeline_chart
from spsim.report.words import listed, time
from spsim.studies.perturbation import PerturbedSteps, Share
from spsim.studies.plan_accounts import PlanAccount
from spsim.units import MS_PER_S

HEIGHT, ROW, AROUND = 320, 24, 50
"""Pixels of the chart of seeds, of a bar of blame, and of its axis."""
FEWEST_BINS = 8
STEPS, WITHOUT, BLAME = "seeds", "without perturbations", "lost time"


def write_perturbed(found: PerturbedSteps, path: Path) -> None:
    """Write the page."""
    scenario = found.scenario
    page = Page(
        f"{scenario.model.name} on {scenario.hardware.name}",
        " · ".join([*scenario.summary, scenario.plan.label, *scenario.perturbations.labels]),
        [_answer(found), *_culprits(found)],
        [*_sections(found)],
    )
    write_page(page, path)


def _answer(found: PerturbedSteps) -> str:
    before, what = found.before.step_time_s, listed(found.scenario.perturbations.labels)
    more = f"{100 * found.lost_s / before:+.1f} %"
    if not found.scenario.perturbations.jitters:
        return f"With {what} a step takes {time(found.step_s[0])} instead of {time(before)}: {more}."
    count = len(found.step_s)
    mean = f"With {what} a step takes {time(before + found.lost_s)} on average instead of {time(before)}: {more}."
    if count == 1:
        return f"{mean} That is one seed; --seeds draws more."
    spread = listed([f"p{percent} is {time(own)}" for percent, own in found.percentiles_s.items()])
    return f"{mean} Of {count:,} seeds {spread}."


def _culprits(found: PerturbedSteps) -> Iterator[str]:
    """Which rank and operator explain most of what is lost."""
    if found.beyond:
        rank, operator = found.by_rank[0], found.by_operator[0]
        yield (
            f"Most of what is lost is of rank {of_perturbed.named(rank)}, {100 * rank.share:.0f} %, and of "
            f"{_operator(operator)}, {100 * operator.share:.0f} %."
        )
    yield from of_perturbed.notes(found)


def _sections(found: PerturbedSteps) -> Iterator[Section]:
    seeds = [_seeds_chart(found)] if len(found.step_s) > 1 else []
    yield Section("The step before and after", charts=seeds, tables=[of_perturbed.summary(found)])
    if found.beyond:
        charts = [
            _blame_chart("by rank", [f"rank {of_perturbed.named(own)}" for own in found.by_rank], found.by_rank),
            _blame_chart("by operator", [_operator(own) for own in found.by_operator], found.by_operator),
        ]
        lead = "What each explains of the time by which the mean step is longer, on its longest way."
        yield Section("Who is to blame", lead, charts)
        yield Section("Blame in figures", tables=[*of_perturbed.blame_tables(found)], folded=True)
    results = {"before": found.before, **({"after": found.after} if found.after else {})}
    accounts = [PlanAccount(name, found.scenario.plan.text, result) for name, result in results.items()]
    yield Section(
        "Where the time goes", "A step on the rank that ends last; parts add up to all of it.", [time_chart(accounts)]
    )
    chart, shown = timeline_chart(accounts)
    yield Section("Timeline", f"Drag across to zoom, double-click to see all again. Shown: {shown}.", [chart])
    figures = [of_run.figures_table(found.before), of_run.operator_table(found.before)]
    yield Section("Figures of the step before", tables=figures, folded=True)


def _operator(share: Share) -> str:
    return f"{share.operator} ({share.phase})" if share.phase else str(share.operator)


def _seeds_chart(found: PerturbedSteps) -> Chart:
    """How many seeds take how long, with percentiles and the step without perturbations as lines."""
    times = np.array(found.step_s) * MS_PER_S
    counts, edges = np.histogram(times, bins=max(FEWEST_BINS, round(len(times) ** 0.5)))
    middles, width = (edges[1:] + edges[:-1]) / 2, float(edges[1] - edges[0])
    bars = {
        "type": "bar", "name": STEPS, "x": middles.round(4).tolist(), "y": counts.tolist(), "width": width,
        "marker": {"color": COLOURS["gemm"]}, "hovertemplate": "%{y} seeds at %{x:,.3f} ms<extra></extra>",
    }  # fmt: skip
    moments = {WITHOUT: found.before.step_time_s, **{f"p{n}": own for n, own in found.percentiles_s.items()}}
    lines = [_line(name, MS_PER_S * at) for name, at in moments.items()]
    names = [_name(name, MS_PER_S * at, place) for place, (name, at) in enumerate(moments.items())]
    shown = layout(
        HEIGHT, xaxis=axis("step (ms)"), yaxis=axis("seeds"), shapes=lines, annotations=names, bargap=0,
        margin={**MARGIN, "r": 60, "t": LINE * (1 + len(names))},
    )  # fmt: skip
    return {"data": [bars], "layout": shown}


def _line(name: str, at: float) -> dict[str, Any]:
    dash = "solid" if name == WITHOUT else "dash"
    return {
        "type": "line", "x0": at, "x1": at, "y0": 0, "y1": 1, "yref": "paper",
        "line": {"color": "black", "width": 1.5, "dash": dash},
    }  # fmt: skip


def _name(text: str, at: float, place: int) -> dict[str, Any]:
    """Above a line, each higher than the one before."""
    return {
        "x": at, "xanchor": "left", "y": 1, "yref": "paper", "yanchor": "bottom", "yshift": LINE * place,
        "text": plain(text), "showarrow": False, "font": {"size": 11},
    }  # fmt: skip


def _blame_chart(title: str, names: Sequence[str], shares: Sequence[Share]) -> Chart:
    """The first of them, the most first."""
    names, shares = names[: of_perturbed.MOST_ROWS], shares[: of_perturbed.MOST_ROWS]
    bars = {
        "type": "bar", "orientation": "h", "name": BLAME, "y": [*range(len(shares))],
        "x": [round(MS_PER_S * own.lost_s, 6) for own in shares], "marker": {"color": COLOURS["communication"]},
        "customdata": [f"{plain(name)}, {100 * own.share:.1f} %" for name, own in zip(names, shares, strict=True)],
        "hovertemplate": "%{customdata}<br>%{x:,.3f} ms<extra></extra>",
    }  # fmt: skip
    shown = layout(
        AROUND + ROW * len(shares), xaxis=axis("ms", fixedrange=True),
        yaxis=axis(
            fixedrange=True, range=[len(shares) - 0.5, -0.5], tickvals=[*range(len(shares))],
            ticktext=[plain(name) for name in names], showgrid=False, ticks="",
        ),
    )  # fmt: skip
    return {"title": title, "data": [bars], "layout": shown}
