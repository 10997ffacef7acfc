"""The one public entry: a scenario in, a result out."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from spsim.costs.models import cost_models
from spsim.costs.static_memory import static_memory
from spsim.engine.recording import TaskInfo
from spsim.engine.trace import Piece, Trace
from spsim.inputs.scenario import Scenario
from spsim.program.assembly import layer_program
from spsim.results.result import Result
from spsim.step.folding import OUTLASTS, Step, run_step
from spsim.step.preparation import PreparedLayer, prepared_layer
from spsim.step.schedule import task_info


def simulate(scenario: Scenario, *, fold: bool = True) -> Result:
    """Simulate a scenario. `fold` simulates identical ranks and layers once; the result is the same without.

    Raises `InputError` where the hardware profile lacks a curve that the plan needs.
    """
    plan, hardware = scenario.plan, scenario.hardware
    layer = prepared_layer(scenario.model, plan, fold, scenario.workload.precision)
    numbers = layer.template.at(scenario.workload)
    messages = layer.sync_messages(numbers, scenario.model.layers)
    step = Step(
        layer.schedule,
        layer.durations(
            numbers,
            *cost_models(hardware, scenario.workload.precision),
            gpus_per_node=scenario.gpus_per_node,
            sync_messages=messages,
        ),
        layer.sizes(numbers),
        scenario.model.layers,
        scenario.num_micro_batches,
        hardware.coefficients.overlap_slowdown.value,
    )
    stretches, events, reason = run_step(step, fold=fold)
    copies = layer.schedule.copies
    trace = Trace(
        stretches, copies, partial(_describe, scenario, layer, messages), layer.schedule.groups, reason == OUTLASTS
    )
    return Result(
        scenario=scenario,
        numbers=numbers,
        trace=trace,
        static=static_memory(numbers.parameters * scenario.model.layers, plan, scenario.workload.element_bytes),
        events=events,
        folded=len(copies) < plan.gpus or events < trace.num_spans,
        reasons=tuple(filter(None, (_rank_folding(len(copies), plan.gpus, fold), reason))),
    )


def _rank_folding(simulated: int, ranks: int, fold: bool) -> str:
    if not fold:
        return "ranks are not folded: it was switched off"
    if simulated == ranks:
        return "" if ranks == 1 else "ranks are not folded: each does different work"
    differ = "all are identical" if simulated == 1 else "they differ by their position on the ring"
    return f"{simulated} of {ranks} ranks simulated: {differ}"


def _describe(scenario: Scenario, layer: PreparedLayer, messages: Sequence[int], piece: Piece) -> list[TaskInfo]:
    """What each task of a piece is, with its sizes."""
    if piece.phase == "weight_sync":
        return [sync.info(message) for sync, message in zip(layer.schedule.syncs, messages, strict=True)]
    program = layer_program(scenario.model, scenario.plan, scenario.workload)
    steps = program.forward if piece.phase == "forward" else program.backward
    return [task_info(step, piece.layer, piece.micro_batch) for step in steps]
