"""Waterfalls of plans, each from the one before it: time and memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

from matplotlib.figure import Figure

from spsim.plots.waterfall import Waterfall, plot_waterfalls
from spsim.results.accounts import is_exposed
from spsim.studies.plan_accounts import EXPOSED, Parts, PlanAccount, grouped, ordered
from spsim.units import GIB, MIB, PS_PER_MS, PS_PER_US


def plot_plans(accounts: Sequence[PlanAccount]) -> Figure:
    """Time and memory from each plan to the next."""
    scenario = accounts[0].result.scenario
    names = [account.name for account in accounts]
    parts = [f"sequence {scenario.workload.seq_len:,}", f"micro-batch {scenario.workload.micro_batch}"]
    if len(names) > 2:
        parts.append(f"percent against {names[0]}")
    return plot_waterfalls(
        [time_fall(accounts), memory_fall(accounts)], subtitle=" · ".join(parts),
        title=f"{scenario.model.name}, {scenario.hardware.name}: {' → '.join(names)}",
    )  # fmt: skip


def time_fall(accounts: Sequence[PlanAccount]) -> Waterfall:
    """Of the whole step, or of one layer where layers are all there is, exposed communication as one bar."""
    whole = accounts[0].result.scope != "layers"
    title = "Time of the step" if whole else "Time of one layer, forward and backward"
    sides = [account.step if whole else account.layer for account in accounts]
    scale, unit = _time_unit(max(sum(parts.values()) for parts in sides))
    names = dict.fromkeys(ordered({name: 1 for parts in sides for name in parts}), 0)
    parts = tuple(_scaled(grouped(names | own), scale) for own in sides)
    details = tuple({EXPOSED: _kinds(before, after, scale)} for before, after in pairwise(sides))
    return Waterfall(title, unit, tuple(account.name for account in accounts), parts, details)


def _kinds(before: Parts, after: Parts, scale: int) -> dict[str, float]:
    """What the change of exposed communication consists of."""
    kinds = ordered({name: 1 for name in (*before, *after) if is_exposed(name)})
    changes = {name.removeprefix("exposed "): after.get(name, 0) - before.get(name, 0) for name in kinds}
    return {name: change / scale for name, change in changes.items() if change}


def _time_unit(longest: int) -> tuple[int, str]:
    return (PS_PER_MS, "ms") if longest >= PS_PER_MS else (PS_PER_US, "µs")


def memory_fall(accounts: Sequence[PlanAccount]) -> Waterfall:
    """At the peak, by category."""
    most = max(sum(account.memory.values()) for account in accounts)
    scale, unit = (GIB, "GiB") if most >= GIB else (MIB, "MiB")
    parts = tuple(_scaled(account.memory, scale) for account in accounts)
    names = tuple(account.name for account in accounts)
    return Waterfall("Memory at the peak of the fullest rank", unit, names, parts)


def _scaled(parts: Mapping[str, int], unit: int) -> dict[str, float]:
    return {name: amount / unit for name, amount in parts.items()}
