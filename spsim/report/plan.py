"""Table and sentences of a search for a plan."""

from __future__ import annotations

from collections.abc import Iterable

from rich.table import Table

from spsim.report.comparison import reasons
from spsim.report.table import table
from spsim.report.words import figure, measured, signed, time
from spsim.results import bands
from spsim.studies.comparison import Difference
from spsim.studies.plan_accounts import grouped
from spsim.studies.search.outcome import CANNOT_FIT, CANNOT_WIN, FAILED, TOO_LARGE, PlanSearch
from spsim.units import PS_PER_MS, PS_PER_S


def best_table(search: PlanSearch) -> Table:
    """The best plans, and why each is ahead of the next."""
    scenario = search.best[0].scenario
    title = (
        f"{scenario.model.name} on {search.gpus} GPUs of {search.hardware.name}: sequence {scenario.workload.seq_len}, "
        f"{scenario.global_batch} sequences a step"
    )
    hours = ["GPU-hours"] if search.tokens is not None else []
    numbers = ["", "step time", "MFU", "memory GiB", "headroom GiB", *hours]
    made = table(title, ["", "plan", *numbers[1:], "what the next one takes more"], numbers=numbers)
    ahead = [_ahead(pair) for pair in search.differences] + [""]
    for number, (own, why) in enumerate(zip(search.best, ahead, strict=True), 1):
        cost = [figure(own.gpu_hours(search.tokens))] if search.tokens is not None else []
        made.add_row(
            str(number), own.name, time(own.step_s), f"{100 * own.row['mfu']:.1f} %", f"{own.memory_gib:.1f}",
            f"{own.headroom_gib:.1f}", *cost, why,
        )  # fmt: skip
    return made


def _ahead(pair: Difference) -> str:
    change = sum(pair.step.values())
    tie = f", a tie within ±{pair.band.percent:.1f} %" if pair.tie else ""
    if not change:
        return f"as long{tie}"
    unit = (PS_PER_S, "s") if sum(pair.before.step.values()) >= PS_PER_S else (PS_PER_MS, "ms")
    why = reasons(grouped(pair.step), change, *unit)
    return f"{signed(change / PS_PER_S, 3)} s{tie}. {why}"


def count_of(plans: int) -> str:
    """Such as `1 plan`."""
    return f"{plans} plan{'' if plans == 1 else 's'}"


def lines(search: PlanSearch) -> Iterable[str]:
    """How many plans there are, what became of them, and which of the best are no better than others."""
    count, first = search.counts, search.best[0]
    simulated = len(search.rows)
    yield (
        f"{count_of(len(search.candidates))}: {count[CANNOT_FIT]} cannot fit and {count[CANNOT_WIN]} can be neither "
        f"among the best nor on the front, by their bounds; {simulated} simulated, of which {count[TOO_LARGE]} do not "
        "fit" + (f" and {count[FAILED]} cannot be simulated" if count[FAILED] else "") + "."
    )
    if search.refused:
        rule = max(search.refused, key=lambda own: search.refused[own])
        yield f"{sum(search.refused.values())} combinations break a rule and are no plans, most often: {rule}"
    tied = search.tied
    if tied:
        band = bands.of_pair(search.hardware, first.plan, search.found[tied[0]].plan)
        yield (
            f"A tie with the first: {len(tied)} of the {len(search.found)} that were simulated and fit, whose steps "
            f"differ by less than the band, such as {measured(band)}."
        )
    least = search.front[-1]
    yield (
        f"Front of time and memory: {count_of(len(search.front))}, down to {least.memory_gib:.1f} GiB with a step of "
        f"{time(least.step_s)} under {least.name}."
    )
