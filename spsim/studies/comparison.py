"""Two or more plans for one model, hardware and workload: where their time and their memory differ, and why.

Parts of time and memory are those of `plan_accounts`, so that their differences add up to the difference.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any, Literal

from spsim.errors import InputError
from spsim.inputs.hardware import HardwareProfile
from spsim.inputs.model import Model
from spsim.inputs.plan import Plan, parse_options, plan_text
from spsim.inputs.scenario import Network, Scenario
from spsim.inputs.workload import Workload
from spsim.results import bands
from spsim.results.bands import Band
from spsim.results.document import SCHEMA_VERSION
from spsim.results.result import Result
from spsim.simulation import simulate
from spsim.studies.plan_accounts import Parts, PlanAccount, ordered
from spsim.units import MS_PER_S

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HELD_OUT = "held-out errors of the calibration"
"""Where a band comes from that both plans share in part, so that it is wide for a difference."""

LONGEST_REPR = 480
"""Characters that `repr` shows of many plans."""
LABELLED = ("library", "tp", "sequence_parallel", "ulysses", "ring", "ep", "pp", "virtual_pp", "dp")
"""Options of a plan that its label shows."""
SHARDED = ("zero", "distributed_optimizer")
"""Those that it shows as ZeRO, of replicas."""


@dataclass(frozen=True)
class Difference:
    """What changes from one plan to another; positive where the second takes more."""

    before: PlanAccount
    after: PlanAccount

    def __repr__(self) -> str:
        return f"Difference({self.before.name} → {self.after.name}: step {self.step_percent:+.1f} %)"

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
    names = ordered(dict.fromkeys([*before, *after], 1))
    return {name: after.get(name, 0) - before.get(name, 0) for name in names}


@dataclass(frozen=True)
class PlanComparison:
    """Plans beside each other; each of the others is compared with the first."""

    accounts: tuple[PlanAccount, ...]

    def __repr__(self) -> str:
        steps = ", ".join(f"{own.name} {own.result.step_time_s * MS_PER_S:.3f} ms" for own in self.accounts)
        return shorten(f"PlanComparison({steps})", LONGEST_REPR, placeholder=" …)")

    def _repr_html_(self) -> str:
        from spsim.report.page import comparison_fragment

        return comparison_fragment(self)

    @property
    def results(self) -> dict[str, Result]:
        """Results by the name of the plan, for plots."""
        return {account.name: account.result for account in self.accounts}

    @property
    def fastest(self) -> tuple[str, ...]:
        """The plan with the shortest step of those that fit, or of all where none does, and those that tie with it."""
        fitting = [account for account in self.accounts if account.result.fits]
        first, *others = sorted(fitting or self.accounts, key=lambda account: account.result.step_ps)
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

    def plot_waterfalls(self, path: str | Path | None = None) -> Figure:
        """Time and memory from each plan to the next, written where a path is given; see `plots.plot_plans`."""
        from spsim import plots

        return plots.saved(plots.plot_plans(self.accounts), path)

    def plot_steps(self, path: str | Path | None = None) -> Figure:
        """From the ideal time of its FLOPs to the step of each plan, written where a path is given."""
        from spsim import plots

        return plots.saved(plots.plot_steps(self.results), path)

    def plot_timelines(self, path: str | Path | None = None, **options: Any) -> Figure:
        """One layer under each plan on one axis, written where a path is given; see `plots.plot_timelines`."""
        from spsim import plots

        return plots.saved(plots.plot_timelines(self.results, **options), path)

    def plot_memory_curves(self, path: str | Path | None = None) -> Figure:
        """Memory of each plan over time, written where a path is given."""
        from spsim import plots

        return plots.saved(plots.plot_memory_curves(self.results), path)

    def to_html(self, path: str | Path) -> None:
        """Write a page that a browser opens without a network: times, memory, timelines, assumptions."""
        from spsim.report.page import write_comparison

        write_comparison(self, Path(path))


def compare(
    plans: Sequence[Plan | Mapping[str, Any] | str],
    *,
    hardware: HardwareProfile | str | Path,
    model: Model | Mapping[str, Any] | str | Path,
    workload: Workload | Mapping[str, Any],
    nodes: int | None = None,
    scope: Literal["step", "layers"] = "step",
    network: Network = "closed_form",
    perturbations: Any = (),
) -> PlanComparison:
    """Simulate plans of one model, hardware and workload, and account for their differences; everything may be given
    as to a `Scenario`.

    Raises `InputError` for fewer than two plans, a plan given twice, and whatever breaks a rule, before any is
    simulated.
    """
    texts = [_text(plan) for plan in _listed(plans)]
    _check_plans(texts)
    common = Scenario(hardware=hardware, model=model, workload=workload, scope=scope, network=network)
    scenarios = {text: _scenario(common, text, nodes, perturbations) for text in texts}
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


def _scenario(common: Scenario, plan: str, nodes: int | None, perturbations: Any) -> Scenario:
    """Under another plan; `InputError` says which."""
    try:
        return Scenario(
            hardware=common.hardware, model=common.model, plan=plan, workload=common.workload, nodes=nodes,
            scope=common.scope, network=common.network, perturbations=perturbations,
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
