"""The page of one plan, or of several beside each other."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from spsim.report import comparison as of_comparison
from spsim.report import run as of_run
from spsim.report.page.assumptions import assumption_tables
from spsim.report.page.document import Page, Section, write_page
from spsim.report.page.memory import memory_charts
from spsim.report.page.stacks import memory_chart, time_chart
from spsim.report.page.timeline import timeline_chart
from spsim.report.verdict import verdict
from spsim.results.result import Result
from spsim.results.sensitivity import SHARE
from spsim.studies.comparison import PlanComparison
from spsim.studies.plan_accounts import PlanAccount


def write_result(result: Result, path: Path) -> None:
    """The page of one plan."""
    plan = result.scenario.plan
    write_comparison(PlanComparison((PlanAccount(plan.label, plan.text, result),)), path)


def write_comparison(comparison: PlanComparison, path: Path) -> None:
    """The page of plans beside each other."""
    scenario = comparison.accounts[0].result.scenario
    page = Page(
        f"{scenario.model.name} on {scenario.hardware.name}",
        _subtitle(comparison),
        verdict(comparison),
        [*_sections(comparison)],
    )
    write_page(page, path)


def _subtitle(comparison: PlanComparison) -> str:
    """The workload, as far as plans share what is said of it, and the plan or how many there are."""
    accounts = comparison.accounts
    summaries = [account.result.scenario.summary for account in accounts]
    shared = [part for part in summaries[0] if all(part in own for own in summaries)]
    return " · ".join([*shared, accounts[0].name if len(accounts) == 1 else f"{len(accounts)} plans"])


def _sections(comparison: PlanComparison) -> Iterator[Section]:
    accounts = comparison.accounts
    first = accounts[0].result
    several = len(accounts) > 1
    yield Section(
        "Where the time goes",
        "A step on the rank that ends last; parts add up to all of it. Exposed: no kernel runs meanwhile.",
        [time_chart(accounts)],
    )
    yield Section("Memory at the peak", "Of the fullest GPU, with what lies outside tensors.", [memory_chart(accounts)])
    chart, shown = timeline_chart(accounts)
    hatched = " Hatched: recomputed." if any("pattern" in own["marker"] for own in chart["data"]) else ""
    yield Section(
        "Timeline",
        "Drag across to zoom, double-click to see all again; a bar says what it is when pointed at, and has its name "
        f"once few are seen.{hatched} Shown: {shown}.",
        [chart],
    )
    yield Section("Memory over a step", "Tensors of the fullest rank by what they are.", memory_charts(accounts))
    assumed, sources = assumption_tables(accounts)
    yield Section("Assumptions", _assumed(comparison), tables=[assumed], lines=_notes(comparison))
    yield Section("Where assumed coefficients come from", tables=[sources], folded=True)
    if several:
        kinds = (of_comparison.time_table, of_comparison.memory_table)
        tables = [table(pair) for pair in comparison.differences for table in kinds]
        yield Section("Figures of the plans", tables=[of_comparison.plans_table(comparison)], folded=True)
        yield Section(
            "Differences, part by part", tables=tables, lines=of_comparison.comparison_lines(comparison), folded=True
        )
    else:
        stages = [of_run.stage_table(first)] if first.stage_peaks else []
        yield Section(
            "Figures",
            tables=[of_run.figures_table(first), of_run.waterfall_table(first), *stages, of_run.operator_table(first)],
            folded=True,
        )


def _assumed(comparison: PlanComparison) -> str:
    hardware = comparison.accounts[0].result.scenario.hardware
    return (
        f"Coefficients of {hardware.name} that nobody measured on such a machine and that the times or the memory hang "
        f"on, assumed or inherited from another card, and by how much ±{100 * SHARE:.0f} % of each change the step, or "
        "else the free memory. All others are measurements, with their sources in the profile."
    )


def _notes(comparison: PlanComparison) -> list[str]:
    """What else must be known, once where it is the same under several plans."""
    lines = {
        line: account.name
        for account in comparison.accounts
        for line in of_run.notes(account.result)
        if not line.startswith(("assumed inputs", "inherited inputs"))
    }
    return [*lines]
