"""What an assumed or inherited coefficient does to a result: the same programs with it a fifth lower and higher.

A measured curve is one coefficient: all its times. Only the durations are worked out again, and the step walked; sizes
and programs stay.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from spsim.costs.collectives import CommCost
from spsim.costs.kernels import ComputeCost
from spsim.costs.models import compute_cost, cost_models
from spsim.costs.static_memory import capacity, outside_tensors
from spsim.engine.pieces import end_of
from spsim.inputs.collective_curves import CollectiveCurve
from spsim.inputs.hardware import HardwareProfile
from spsim.program.instructions import Communication, Compute
from spsim.program.mesh import nodes_of
from spsim.step.costed import costed_step
from spsim.step.costed_pipeline import CostedPipeline, costed_pipeline
from spsim.step.folding import Step, fold_step
from spsim.units import GIB

if TYPE_CHECKING:
    from spsim.results.result import Result

Costs = tuple[ComputeCost, CommCost]
Costed = Step | CostedPipeline
COMMUNICATION = ("collective", "sends", "between_nodes", "adapter_chunk", "dispatchers")
"""How coefficients of collectives begin."""
SHARE = 0.2
"""By which coefficients are changed, down and up."""
MOST_TASKS = 4_000
"""Through the engine for a step, up to which it is walked again for each coefficient: some hundredths of a second."""


@dataclass(frozen=True, slots=True)
class Effect:
    """What changes when a coefficient does, by -20 % and by +20 %."""

    step_time_percent: tuple[float, float]
    free_memory_gib: tuple[float, float]
    """Of the device, beside tensors."""

    def __bool__(self) -> bool:
        return any((*self.step_time_percent, *self.free_memory_gib))


def known_effects(result: Result) -> dict[str, Effect | None] | None:
    """What each assumed or inherited coefficient does to a result, largest first, without those that do nothing, and
    None for those that are no number; None for all where the step is not walked again for each: it is long, or not
    folded, as on a network and with ranks of stages that differ.
    """
    own = result.scenario
    folded = own.network == "closed_form" and (own.plan.pp == 1 or result.staged is not None)
    if result.perturbations or result.events > MOST_TASKS or not folded:
        return None
    return effects(result, unmeasured_inputs(result))


def effects(result: Result, paths: tuple[str, ...]) -> dict[str, Effect | None]:
    """Effect of each coefficient that has one, largest first; then those that are no number, such as the name of a
    kernel, with None.
    """
    hardware = result.scenario.hardware
    choices = [path for path in paths if not _is_number(_at(hardware.coefficients, path.split(".")))]
    costs = cost_models(hardware, result.scenario.workload.precision)
    base = _step(result, hardware, costs)
    found = {path: _effect(result, path, base, costs) for path in paths if path not in choices}
    ranked = sorted(found.items(), key=lambda item: -max(map(abs, item[1].step_time_percent)))
    return {**{path: effect for path, effect in ranked if effect}, **dict.fromkeys(choices)}


def _at(table: Any, path: list[str]) -> Any:
    for name in path:
        table = table[name] if isinstance(table, dict) else getattr(table, name)
    return table


def _is_number(leaf: Any) -> bool:
    return isinstance(leaf, tuple) or isinstance(getattr(leaf, "value", None), float | int)


def _effect(result: Result, path: str, base: Costed, costs: Costs) -> Effect:
    down, up = (scaled(result.scenario.hardware, path, 1 + way * SHARE) for way in (-1, 1))
    step = _step(result, up, _costs(result, up, path, costs))
    if _times(step) == _times(base):
        percent = (0.0, 0.0)
    else:
        steps = (_step(result, down, _costs(result, down, path, costs)), step)
        less, more = (100 * (_step_ps(one) / result.step_ps - 1) for one in steps)
        percent = (less, more)
    room = _room(result, result.scenario.hardware)
    low, high = ((_room(result, hardware) - room) / GIB for hardware in (down, up))
    return Effect(percent, (low, high))


def _costs(result: Result, hardware: HardwareProfile, path: str, costs: Costs) -> Costs:
    """Of the changed profile, where the coefficient is one of kernels or of communication."""
    compute, comm = costs
    if path.startswith(COMMUNICATION):
        return compute, CommCost(hardware)
    return compute_cost(hardware, result.scenario.workload.precision), comm


def _step(result: Result, hardware: HardwareProfile, costs: Costs) -> Costed:
    scenario = result.scenario
    if result.staged:
        return costed_pipeline(
            result.prepared, result.staged.ran.stages, result.numbers, hardware, scenario.plan, costs,
            micro_batches=scenario.num_micro_batches, gpus_per_node=scenario.gpus_per_node,
        )  # fmt: skip
    return costed_step(
        result.prepared,
        result.numbers,
        hardware,
        costs,
        chunk=result.chunk,
        micro_batches=scenario.num_micro_batches,
        gpus_per_node=scenario.gpus_per_node,
    )


def _times(step: Costed) -> tuple[object, ...]:
    """All that says how long a step takes."""
    if isinstance(step, CostedPipeline):
        return *_times(step.step), step.messages.transfer_ps, step.closed.segments
    return step.durations, step.slowdown


def _step_ps(step: Costed) -> int:
    if isinstance(step, CostedPipeline):
        return max(step.folded().ends_ps)
    return max(map(end_of, fold_step(step).nodes))


def _room(result: Result, hardware: HardwareProfile) -> int:
    """Bytes that tensors may take."""
    return capacity(hardware) - outside_tensors(hardware, result.prepared.mesh)


def effects_document(found: Mapping[str, Effect | None] | None) -> dict[str, Any] | None:
    """For documents."""
    return None if found is None else {path: effect and asdict(effect) for path, effect in found.items()}


def unmeasured_inputs(result: Result) -> tuple[str, ...]:
    """Assumed and inherited coefficients behind the durations of a result, and its memory."""
    scenario, prepared = result.scenario, result.prepared
    hardware = scenario.hardware
    compute, comm = cost_models(hardware, scenario.workload.precision)
    used = {"memory", *(["graph_overhead_us"] if scenario.plan.cuda_graphs != "none" else [])}
    for segment in prepared.segments:
        for step in segment.instructions:
            if isinstance(step, Compute):
                used |= {path for work in step.work if work for path in compute.coefficients_of(work)}
            elif isinstance(step, Communication):
                nodes = nodes_of(prepared.mesh, (step.axis,), scenario.gpus_per_node, step.ranks)
                used |= {*comm.coefficients_of(step.timed_as, nodes, step.dispatch), "overlap_slowdown"}
        for sync in segment.added.values():
            nodes = nodes_of(prepared.mesh, sync.axes, scenario.gpus_per_node, sync.ranks)
            used |= {*comm.coefficients_of(sync.collective, nodes), "overlap_slowdown"}
    unmeasured = hardware.assumed | hardware.inherited
    above = {path: {*accumulate(path.split("."), _below)} for path in unmeasured}
    return tuple(sorted(path for path, tables in above.items() if not used.isdisjoint(tables)))


def _below(table: str, name: str) -> str:
    """The dotted path of what has a name in a table."""
    return f"{table}.{name}"


def unmeasured_in_use(result: Result, *, inherited: bool) -> tuple[str, ...]:
    """Those of them that change the result, as far as that is known: the inherited ones, or the assumed ones."""
    known = result.assumed_effects
    paths = sorted(unmeasured_inputs(result) if known is None else known)
    return tuple(path for path in paths if (path in result.scenario.hardware.inherited) == inherited)


def scaled(hardware: HardwareProfile, path: str, factor: float) -> HardwareProfile:
    """The profile with one coefficient times a factor; of curves, all times."""
    coefficients = _replaced(hardware.coefficients, path.split("."), factor)
    return hardware.model_copy(update={"coefficients": coefficients})


def _replaced(table: Any, path: list[str], factor: float) -> Any:
    if not path:
        return tuple(_slower(curve, factor) for curve in table) if isinstance(table, tuple) else _scaled(table, factor)
    name, *rest = path
    if isinstance(table, dict):
        return {**table, name: _replaced(table[name], rest, factor)}
    return table.model_copy(update={name: _replaced(getattr(table, name), rest, factor)})


def _scaled(quantity: Any, factor: float) -> Any:
    return quantity.model_copy(update={"value": quantity.value * factor})


def _slower(curve: CollectiveCurve, factor: float) -> CollectiveCurve:
    return curve.model_copy(
        update={
            "latency_us": curve.latency_us * factor,
            "step_latency_us": curve.step_latency_us * factor,
            "points": tuple((size, bandwidth / factor) for size, bandwidth in curve.points),
        }
    )
