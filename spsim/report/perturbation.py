"""Tables and sentences of steps under perturbations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from rich.table import Table

from spsim.report.run import WAITS
from spsim.report.table import table
from spsim.report.words import gpus, time
from spsim.studies.perturbation import PerturbedSteps, Share

MOST_ROWS = 8
"""Of a table of blame."""


def summary(found: PerturbedSteps) -> Table:
    """The step with and without perturbations."""
    scenario = found.scenario
    what = ", ".join(scenario.perturbations.labels)
    title = f"{scenario.model.name} on {scenario.hardware.name}: {scenario.plan.label}, {gpus(found.before)}; {what}"
    made = table(title, ["quantity", "value", "of"], numbers=["value"])
    for row in _rows(found):
        made.add_row(*row)
    return made


def _rows(found: PerturbedSteps) -> Iterator[tuple[str, str, str]]:
    before = found.before.step_time_s
    yield "step before", time(before), "without perturbations"
    if found.scenario.perturbations.jitters:
        count = f"{len(found.step_s):,} seed{'s' * (len(found.step_s) > 1)}"
        yield "mean step", time(float(np.mean(found.step_s))), f"{_percent(found.lost_s / before)}; {count}"
        for percent, own in found.percentiles_s.items():
            yield f"p{percent} of the step", time(own), _percent(own / before - 1)
        return
    yield "step after", time(found.step_s[0]), _percent(found.lost_s / before)
    after = found.after if found.scenario.plan.pp == 1 else None
    for reason, seconds in (after.idle_s if after else {}).items():
        if seconds:
            name, why = WAITS[reason]
            yield f"{name}, at most", time(seconds), f"of the step after, {why}"


def _percent(share: float) -> str:
    return f"{100 * share:+.1f} % against before"


def blame_tables(found: PerturbedSteps) -> Iterator[Table]:
    """Who explains how much of what is lost, where that can be told."""
    if not found.beyond:
        return
    made = table(f"lost time by rank{_cut(found.by_rank)}", ["rank", "of it", "time"], numbers=["of it", "time"])
    for own in found.by_rank[:MOST_ROWS]:
        made.add_row(named(own), f"{100 * own.share:.1f} %", time(own.lost_s))
    yield made
    made = table(
        f"lost time by operator{_cut(found.by_operator)}",
        ["operator", "pass", "of it", "time"],
        numbers=["of it", "time"],
    )
    for own in found.by_operator[:MOST_ROWS]:
        made.add_row(own.operator or "", own.phase or "", f"{100 * own.share:.1f} %", time(own.lost_s))
    yield made


def _cut(shares: Sequence[Share]) -> str:
    return f", {MOST_ROWS} of {len(shares)}" if len(shares) > MOST_ROWS else ""


def named(share: Share) -> str:
    """Which rank it is, and how many are alike."""
    return f"{share.rank}" if share.ranks == 1 else f"{share.rank} and {(share.ranks or 1) - 1} alike"


def notes(found: PerturbedSteps) -> Iterator[str]:
    """What to know of the tables."""
    if found.beyond:
        yield "blame: what kernels and transfers on the longest way take beyond what they take unperturbed"
    elif found.lost_s:
        yield "blame: not told with from_s and to_s, nor with network = flows"
