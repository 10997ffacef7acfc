"""The answer in a sentence or two: which plan is faster, by how much, whether that is a tie, and whether it fits."""

from __future__ import annotations

from collections.abc import Sequence

from spsim.report.words import listed, time
from spsim.results.derived import FITS_SCOPE
from spsim.results.result import Result
from spsim.studies.comparison import Difference, PlanComparison
from spsim.studies.plan_accounts import PlanAccount


def verdict(comparison: PlanComparison) -> list[str]:
    """Of plans the order of their steps, of those that fit if any does; of one plan its step. Then what fits."""
    accounts = comparison.accounts
    if len(accounts) == 1:
        return [_alone(accounts[0]), *_scope(accounts)]
    fitting = [account for account in accounts if account.result.fits]
    ranked = sorted(fitting or accounts, key=lambda account: account.result.step_ps)
    gpus = {account.result.scenario.plan.gpus for account in accounts}
    more = ["The plans use different numbers of GPUs: compare the throughput of a GPU, too."] if len(gpus) > 1 else []
    return [_fastest(ranked, len(accounts)), _fitting(accounts), *more, *_scope(accounts)]


def _alone(account: PlanAccount) -> str:
    result = account.result
    known = result.error_band.step_time_percent if result.error_band else None
    percent = known if known is not None else result.prior_band.percent if result.prior_band else None
    sure = "" if percent is None else f" (±{percent:.1f} %)"
    where = "On one GPU" if result.scenario.plan.gpus == 1 else f"Under {account.name}"
    return f"{where} a step takes {time(result.step_time_s)}{sure} and {_room(result)}."


def _room(result: Result) -> str:
    """Whether it fits, and by how much."""
    free = result.capacity_gib - result.device_memory_gib
    needs = f"{result.device_memory_gib:.1f} of {result.capacity_gib:.1f} GiB of a GPU"
    if result.fits:
        return f"fits: {needs}, {free:.1f} GiB are free"
    return f"does not fit: it needs {needs}, {-free:.1f} GiB too much, from {result.out_of_memory_at} on"


def _fastest(ranked: Sequence[PlanAccount], plans: int) -> str:
    """The order of the first of them, shortest step first."""
    first, others = ranked[0], ranked[1:]
    if not others:
        return f"Only {first.name} fits: its step takes {time(first.result.step_time_s)}."
    tied = [other for other in others if Difference(first, other).tie]
    of_all = f", the fastest of {plans} plans" if plans > 2 else ""
    if tied:
        percent = max(Difference(first, other).band.percent for other in tied)
        steps = listed([time(account.result.step_time_s) for account in (first, *tied)])
        return (
            f"{listed([account.name for account in (first, *tied)])} are a tie{of_all}: their steps take {steps}, a "
            f"difference within the error band of ±{percent:.1f} %.{_behind(first, others)}"
        )
    second = others[0]
    pair = Difference(second, first)
    of_all = f" and is the fastest of {plans} plans" if plans > 2 else ""
    return (
        f"{first.name} is {-pair.step_percent:.1f} % faster than {second.name}{of_all}: its step takes "
        f"{time(first.result.step_time_s)} instead of {time(second.result.step_time_s)}. This is no tie, for the error "
        f"band of such a difference is ±{pair.band.percent:.1f} %."
    )


def _behind(first: PlanAccount, others: Sequence[PlanAccount]) -> str:
    """The next one that does not tie."""
    pair = next((pair for pair in (Difference(first, other) for other in others) if not pair.tie), None)
    return "" if pair is None else f" That of {pair.after.name} takes {pair.step_percent:.1f} % more than {first.name}."


def _fitting(accounts: Sequence[PlanAccount]) -> str:
    """Which plans fit, and what they need."""
    out = [account for account in accounts if not account.result.fits]
    if not out:
        every = "Both" if len(accounts) == 2 else "All"
        return f"{every} fit in the memory of a GPU: {_needs(accounts)}."
    if len(out) == len(accounts):
        neither = "Neither" if len(accounts) == 2 else "None"
        return f"{neither} of the plans fits in the memory of a GPU: they need {_needs(accounts)}."
    verb = "do" if len(out) > 1 else "does"
    return f"{listed([account.name for account in out])} {verb} not fit in the memory of a GPU: {_needs(out)}."


def _needs(accounts: Sequence[PlanAccount]) -> str:
    """Device memory of each, of the capacity."""
    sizes = listed([f"{account.result.device_memory_gib:.1f}" for account in accounts])
    return f"{sizes} of {accounts[0].result.capacity_gib:.1f} GiB"


def _scope(accounts: Sequence[PlanAccount]) -> list[str]:
    """What memory is of, where it is not that of the whole step."""
    scope = accounts[0].result.scope
    return [] if scope == "step" else [f"Memory is of {FITS_SCOPE[scope]}."]
