"""What a result hangs on that nobody measured on this machine: coefficients that are assumed or inherited from another
card, their sources, and what each does.
"""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from spsim.inputs.hardware import leaves
from spsim.report.table import table
from spsim.results.sensitivity import Effect
from spsim.studies.plan_accounts import PlanAccount
from spsim.units import GIB, MIB


def assumption_tables(accounts: Sequence[PlanAccount]) -> tuple[Table, Table]:
    """A row for each coefficient: its value and what it does under each plan, what does most first; and its source."""
    hardware = accounts[0].result.scenario.hardware
    known = dict(leaves(hardware.coefficients))
    plans = [account.name for account in accounts] if len(accounts) > 1 else ["effect"]
    assumed = table("", ["coefficient", "is", "value", *plans], numbers=["value", *plans])
    sources = table("", ["coefficient", "source"])
    for path in dict.fromkeys(path for account in accounts for path in _by_effect(account)):
        leaf = known.get(path)
        one = leaf[0] if isinstance(leaf, tuple) and leaf else leaf
        value, source = getattr(one, "value", None), getattr(one, "source", "")
        kind = "inherited" if path in hardware.inherited else "assumed"
        shown = "curve" if value is None else str(value)
        assumed.add_row(path, kind, shown, *(_effect(own, path) for own in accounts))
        sources.add_row(path, hardware.sources.get(source, source))
    return assumed, sources


def _by_effect(account: PlanAccount) -> Sequence[str]:
    """Its coefficients, what does most first, where that is known."""
    effects = account.result.assumed_effects
    return _used(account) if effects is None else [*effects]


def _used(account: PlanAccount) -> Sequence[str]:
    return *account.result.assumed, *account.result.inherited


def _effect(account: PlanAccount, path: str) -> str:
    """Percent of the step, or free memory, that it changes."""
    effects = account.result.assumed_effects
    if effects is None:
        return "too long a step to say" if path in _used(account) else "–"
    effect = effects.get(path)
    return "–" if effect is None else _words(effect)


def _words(effect: Effect) -> str:
    percent, room = (max(map(abs, change)) for change in (effect.step_time_percent, effect.free_memory_gib))
    return f"±{percent:.2f} %" if percent else f"±{room * GIB / MIB:.0f} MiB"
