"""One plan: its result, and where its time and memory go, in picoseconds and bytes that add up to all of it.

Time: a window is the forward or backward pass of the first layer and micro-batch, or the whole step: from the first
task to the last end over all ranks. It is read on the rank that ends last, of several the one that computes longest.
Every picosecond of the window belongs to one part (`results.accounts`).

Memory: the categories of the memory curve at the peak of the fullest rank.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from spsim.engine.pieces import Pass
from spsim.results import accounts
from spsim.results.accounts import IDLE, OTHER, PEERS, RECOMPUTATION, SLOWED, STAGES, SYNC, Account, is_exposed
from spsim.results.held import held_at
from spsim.results.result import Result
from spsim.units import PS_PER_S
from spsim.work import KERNEL_CLASSES

Parts = dict[str, int]
"""Picoseconds or bytes by part, in the order in which they are shown; parts of nothing are left out."""

EXPOSED = "exposed communication"
_LAST = (SYNC, PEERS, STAGES, IDLE, OTHER)


def pass_time(result: Result, phase: Pass, *, layer: int = 0, micro_batch: int = 0) -> Parts:
    """Picoseconds of the `forward` or `backward` pass of one layer and micro-batch, by part."""
    return _charged(result, accounts.of_pass(result.trace, phase, layer, micro_batch))


def step_time(result: Result) -> Parts:
    """Picoseconds of the step by part."""
    return _charged(result, result.account)


def peak_memory(result: Result) -> Parts:
    """Bytes of the fullest rank at its peak, by category."""
    return held_at(result.peak, result.trace, result.static.by_category())


def _charged(result: Result, account: Account) -> Parts:
    return ordered(account.charged(result.scenario.hardware.coefficients.overlap_slowdown.value))


def ordered(parts: Mapping[str, int]) -> Parts:
    """Kernels, what communication adds, and the rest; parts of nothing are left out."""
    exposed = sorted(filter(is_exposed, parts))
    known = [*KERNEL_CLASSES, RECOMPUTATION, SLOWED, *exposed, *_LAST]
    names = [*(name for name in parts if name not in known), *known]
    return {name: parts[name] for name in names if parts.get(name)}


def grouped(parts: Mapping[str, int]) -> Parts:
    """The same with the kinds of exposed communication as one part."""
    groups: Parts = {}
    for name, amount in parts.items():
        group = EXPOSED if is_exposed(name) else name
        groups[group] = groups.get(group, 0) + amount
    return groups


@dataclass(frozen=True)
class PlanAccount:
    """One plan: its result, and where its time and memory go."""

    name: str
    text: str
    """The plan as it was given."""
    result: Result

    @cached_property
    def passes(self) -> dict[str, Parts]:
        """Picoseconds of the passes of one layer, by part."""
        phases: tuple[Pass, ...] = ("forward", "backward")
        own = self.result.prepared.passes
        return {phase: pass_time(self.result, phase) if phase in own else {} for phase in phases}

    @cached_property
    def layer(self) -> Parts:
        """Forward and backward together."""
        return ordered(Counter(self.passes["forward"]) + Counter(self.passes["backward"]))

    @cached_property
    def step(self) -> Parts:
        """Picoseconds of the step, by part."""
        return step_time(self.result)

    @cached_property
    def memory(self) -> Parts:
        """Bytes at the peak, by category."""
        return peak_memory(self.result)

    def __repr__(self) -> str:
        return f"PlanAccount({self.name}: {self.result!r})"

    def to_json(self) -> dict[str, Any]:
        """Figures of `run --json`, and the parts as whole picoseconds and bytes."""
        figures = self.result.to_json()
        common = ("schema_version", "scope", "hardware", "model", "workload", "assumed", "inherited", "notes")
        return {
            "name": self.name,
            "plan_text": self.text,
            **{key: value for key, value in figures.items() if key not in common},
            "layer_time_s": sum(self.layer.values()) / PS_PER_S,
            "layer_forward_ps": self.passes["forward"],
            "layer_backward_ps": self.passes["backward"],
            "layer_ps": self.layer,
            "step_ps": self.step,
            "peak_memory_bytes": self.memory,
            "assumed": figures["assumed"],
            "inherited": figures["inherited"],
            "notes": figures["notes"],
        }
