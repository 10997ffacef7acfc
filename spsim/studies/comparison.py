"""Two or more plans for one model, hardware and workload: where their time and their memory differ, and why.

**Time.** A window is the forward or backward pass of the first layer and micro-batch, or the whole step: from the first
task to the last end over all ranks. It is read on the rank that ends last, of several the one that computes longest.
Every picosecond of the window belongs to one part (`results.accounts`), so that parts add up to the window and their
differences to its difference.

**Memory.** The categories of the memory curve at the peak of the fullest rank.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from spsim.engine.pieces import Pass
from spsim.errors import InputError
from spsim.inputs.hardware import HardwareProfile
from spsim.inputs.model import Model
from spsim.inputs.plan import Plan, parse_options, plan_text
from spsim.inputs.scenario import Scenario
from spsim.inputs.workload import Workload
from spsim.results import accounts, bands
from spsim.results.accounts import IDLE, OTHER, PEERS, RECOMPUTATION, SLOWED, STAGES, SYNC, Account, is_exposed
from spsim.results.bands import Band
from spsim.results.held import held_at
from spsim.results.result import SCHEMA_VERSION, Result
from spsim.simulation import simulate
from spsim.units import GIB, MIB, PS_PER_MS, PS_PER_S, PS_PER_US
from spsim.work import KERNEL_CLASSES

if TYPE_CHECKING:
    from spsim.plots import Waterfall

Parts = dict[str, int]
"""Picoseconds or bytes by part, in the order in which they are shown; parts of nothing are left out."""

EXPOSED = "exposed communication"
_LAST = (SYNC, PEERS, STAGES, IDLE, OTHER)

HELD_OUT = "held-out errors of the calibration"
"""Where a band comes from that both plans share in part, so that it is wide for a difference."""

LABELLED = ("library", "tp", "sequence_parallel", "ulysses", "ring", "pp", "virtual_pp", "dp")
"""Options of a plan that its label shows."""
SHARDED = ("zero", "distributed_optimizer")
"""Those that it shows as ZeRO, of replicas."""

# ------------------------------------------------------------ parts of one result


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
    return _ordered(account.charged(result.scenario.hardware.coefficients.overlap_slowdown.value))


def _ordered(parts: Mapping[str, int]) -> Parts:
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


# ------------------------------------------------------------ plans side by side


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
        return {phase: pass_time(self.result, phase) for phase in phases}

    @cached_property
    def layer(self) -> Parts:
        """Forward and backward together."""
        return _ordered(Counter(self.passes["forward"]) + Counter(self.passes["backward"]))

    @cached_property
    def step(self) -> Parts:
        """Picoseconds of the step, by part."""
        return step_time(self.result)

    @cached_property
    def memory(self) -> Parts:
        """Bytes at the peak, by category."""
        return peak_memory(self.result)

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


@dataclass(frozen=True)
class Difference:
    """What changes from one plan to another; positive where the second takes more."""

    before: PlanAccount
    after: PlanAccount

    @property
    def names(self) -> tuple[str, str]:
        """Names of the two plans."""
        return self.before.name, self.after.name

    @cached_property
    def layer(self) -> Parts:
        """Picoseconds of one layer, by part; they add up to the difference of the layer times."""
        return _change(self.before.layer, self.after.layer)

    @cached_property
    def step(self) -> Parts:
        """The same of the step."""
        return _change(self.before.step, self.after.step)

    @cached_property
    def memory(self) -> Parts:
        """Bytes by category; they add up to the difference of the peaks."""
        return _change(self.before.memory, self.after.memory)

    @cached_property
    def band(self) -> Band:
        """Of the difference of the steps: the larger error band of a calibrated profile, else of published ratios."""
        results = (self.before.result, self.after.result)
        known = [band.step_time_percent for band in (result.error_band for result in results) if band is not None]
        percent = max((found for found in known if found is not None), default=None)
        if percent is not None:
            return Band(percent, HELD_OUT)
        one, other = (result.scenario.plan for result in results)
        return bands.of_pair(results[0].scenario.hardware, one, other)

    @property
    def step_percent(self) -> float:
        """By how much the step of the second plan is longer."""
        return 100 * sum(self.step.values()) / sum(self.before.step.values())

    @property
    def tie(self) -> bool:
        """Whether the steps differ by less than the band."""
        return bands.lead(sum(self.before.step.values()), sum(self.after.step.values())) < self.band.percent

    @property
    def faster(self) -> str | None:
        """The plan with the shorter step; None where it is a tie."""
        return None if self.tie else self.names[self.step_percent < 0]

    def to_json(self) -> dict[str, Any]:
        """Whole picoseconds and bytes; which step is shorter, unless that is within the band."""
        return {
            "from": self.before.name,
            "to": self.after.name,
            "step_difference_percent": self.step_percent,
            "band": asdict(self.band),
            "tie": self.tie,
            "faster": self.faster,
            "layer_ps": self.layer,
            "step_ps": self.step,
            "peak_memory_bytes": self.memory,
            "layer_difference_ps": sum(self.layer.values()),
            "step_difference_ps": sum(self.step.values()),
            "peak_memory_difference_bytes": sum(self.memory.values()),
        }


def _change(before: Parts, after: Parts) -> Parts:
    names = _ordered(dict.fromkeys([*before, *after], 1))
    return {name: after.get(name, 0) - before.get(name, 0) for name in names}


@dataclass(frozen=True)
class PlanComparison:
    """Plans beside each other; each of the others is compared with the first."""

    accounts: tuple[PlanAccount, ...]

    @property
    def results(self) -> dict[str, Result]:
        """Results by the name of the plan, for plots."""
        return {account.name: account.result for account in self.accounts}

    @property
    def fastest(self) -> tuple[str, ...]:
        """The plan with the shortest step, and those that tie with it."""
        first, *others = sorted(self.accounts, key=lambda account: account.result.step_ps)
        return (first.name, *(other.name for other in others if Difference(first, other).tie))

    @cached_property
    def differences(self) -> tuple[Difference, ...]:
        """From the first plan to each of the others."""
        return tuple(Difference(self.accounts[0], other) for other in self.accounts[1:])

    def to_json(self) -> dict[str, Any]:
        """The document of `compare --json`."""
        scenario = self.accounts[0].result.scenario
        return {
            "schema_version": SCHEMA_VERSION,
            "scope": self.accounts[0].result.scope,
            "hardware": scenario.hardware.name,
            "model": scenario.model.name,
            "workload": scenario.workload.model_dump(),
            "fastest": list(self.fastest),
            "plans": [account.to_json() for account in self.accounts],
            "differences": [difference.to_json() for difference in self.differences],
        }

    def plot_waterfalls(self, path: str | Path) -> None:
        """Draw time and memory from the first plan to each of the others; see `plots.plot_waterfalls`."""
        from spsim import plots

        first = self.accounts[0].result
        others = " and ".join(account.name for account in self.accounts[1:])
        title = f"{first.scenario.model.name}, {first.scenario.hardware.name}: {self.accounts[0].name} → {others}"
        falls = [fall for pair in self.differences for fall in (_time_fall(pair), _memory_fall(pair))]
        workload = first.scenario.workload
        subtitle = f"sequence {workload.seq_len:,} · micro-batch {workload.micro_batch}"
        plots.save(plots.plot_waterfalls(falls, title=title, subtitle=subtitle), path)


def compare(
    plans: Sequence[Plan | Mapping[str, Any] | str],
    *,
    hardware: HardwareProfile | str | Path,
    model: Model | Mapping[str, Any] | str | Path,
    workload: Workload | Mapping[str, Any],
    nodes: int | None = None,
    scope: Literal["step", "layers"] = "step",
) -> PlanComparison:
    """Simulate plans of one model, hardware and workload, and account for their differences; everything may be given
    as to a `Scenario`.

    Raises `InputError` for fewer than two plans, a plan given twice, and whatever breaks a rule, before any is
    simulated.
    """
    texts = [_text(plan) for plan in _listed(plans)]
    _check_plans(texts)
    common = Scenario(hardware=hardware, model=model, workload=workload, scope=scope)
    scenarios = {text: _scenario(common, text, nodes) for text in texts}
    names = _names({text: scenario.plan.label for text, scenario in scenarios.items()})
    return PlanComparison(tuple(PlanAccount(names[text], text, simulate(scenarios[text])) for text in scenarios))


def _listed(plans: Any) -> Sequence[Any]:
    if isinstance(plans, str | Plan | Mapping):
        return [plans]
    if not isinstance(plans, Iterable):
        raise InputError(f"compare: {plans!r} is no list of plans; write for instance ['tp=8', 'ulysses=8']")
    return list(plans)


def _text(plan: Plan | Mapping[str, Any] | str) -> str:
    """A plan as the command line writes it."""
    if isinstance(plan, str):
        return plan
    found = Plan(**plan) if isinstance(plan, Mapping) else plan
    if not isinstance(found, Plan):
        raise InputError(f"compare: {found!r} is not a plan; write for instance 'tp=8'")
    return found.text


def _scenario(common: Scenario, plan: str, nodes: int | None) -> Scenario:
    """Under another plan; `InputError` says which."""
    try:
        return Scenario(
            hardware=common.hardware, model=common.model, plan=plan, workload=common.workload, nodes=nodes,
            scope=common.scope,
        )  # fmt: skip
    except InputError as error:
        raise InputError(f"--plan {plan!r}: {str(error).removeprefix('plan: ')}") from None


def _options(text: str) -> dict[str, Any]:
    """Of a plan; `InputError` says of which."""
    try:
        return parse_options(text)
    except InputError as error:
        raise InputError(f"--plan {text!r}: {str(error).removeprefix('plan: ')}") from None


def _check_plans(plans: Sequence[str]) -> None:
    if len(plans) < 2:
        raise InputError(
            f"compare: at least two plans are needed, got {len(plans)}; "
            "give --plan once for each, such as --plan tp=8 --plan tp=8,sequence_parallel"
        )
    seen: list[dict[str, Any]] = []
    for text in plans:
        options = _options(text)
        if options in seen:
            raise InputError(f"compare: plan {text!r} is given twice; change one of the two or leave it out")
        seen.append(options)


def _names(labels: Mapping[str, str]) -> dict[str, str]:
    """Label and further options of each plan; where several have the same, the plan as it was given."""
    names = {}
    for text, label in labels.items():
        shown = (*LABELLED, *SHARDED) if "ZeRO" in label else LABELLED
        further = {name: value for name, value in _options(text).items() if name not in shown}
        names[text] = ", ".join([label, *filter(None, plan_text(further).split(","))])
    shared = Counter(names.values())
    return {text: text if text and shared[name] > 1 else name for text, name in names.items()}


# ------------------------------------------------------------ pictures


def _time_fall(pair: Difference) -> Waterfall:
    """Of the whole step, or of one layer where layers are all there is, exposed communication as one bar."""
    from spsim.plots import Waterfall

    whole = pair.before.result.scope == "step"
    title = "Time of the step" if whole else "Time of one layer, forward and backward"
    sides = [account.step if whole else account.layer for account in (pair.before, pair.after)]
    changes = pair.step if whole else pair.layer
    scale, unit = _time_unit(max(sum(parts.values()) for parts in sides))
    before, after = (_scaled(grouped(dict.fromkeys(changes, 0) | parts), scale) for parts in sides)
    kinds = {part.removeprefix("exposed "): change / scale for part, change in changes.items() if is_exposed(part)}
    return Waterfall(title, unit, pair.names, (before, after), {EXPOSED: kinds})


def _time_unit(longest: int) -> tuple[int, str]:
    return (PS_PER_MS, "ms") if longest >= PS_PER_MS else (PS_PER_US, "µs")


def _memory_fall(pair: Difference) -> Waterfall:
    """At the peak, by category."""
    from spsim.plots import Waterfall

    totals = [sum(account.memory.values()) for account in (pair.before, pair.after)]
    scale, unit = (GIB, "GiB") if max(totals) >= GIB else (MIB, "MiB")
    before, after = (_scaled(account.memory, scale) for account in (pair.before, pair.after))
    return Waterfall("Memory at the peak of the fullest rank", unit, pair.names, (before, after))


def _scaled(parts: Mapping[str, int], unit: int) -> dict[str, float]:
    return {name: amount / unit for name, amount in parts.items()}
