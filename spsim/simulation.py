"""The one public entry, and the one assembly of a simulation."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from spsim.costs.flops import layer_flops
from spsim.costs.models import cost_models
from spsim.costs.static_memory import StaticMemory, static_memory
from spsim.engine.pieces import Piece
from spsim.engine.recording import TaskInfo
from spsim.engine.trace import Trace
from spsim.inputs.scenario import Scenario
from spsim.program.instructions import Instruction
from spsim.program.sizes import Numbers
from spsim.results.result import Amounts, Result, Simulated
from spsim.step.folding import Step, fold_step
from spsim.step.issue import task_info
from spsim.step.preparation import PreparedBlock, prepared_layer
from spsim.step.unfolded import unfold_step


def simulate(scenario: Scenario, *, fold: bool = True) -> Result:
    """Simulate a scenario. `fold` simulates identical ranks and layers once; the result is the same without.

    Raises `InputError` where the hardware profile lacks a curve that the plan needs.
    """
    plan, workload = scenario.plan, scenario.workload
    block = prepared_layer(scenario.model, plan, fold, workload.precision)
    numbers = block.template.at(workload)
    parameters = numbers.parameters * scenario.model.layers
    flops = layer_flops(scenario.model, workload)
    amounts = Amounts(
        model=flops.training(),
        causal=layer_flops(scenario.model, workload, causal=True).training(),
        executed=flops.executed(plan),
        tokens=scenario.global_batch * workload.seq_len,
    )
    return assemble(
        "layers", scenario, block, numbers, amounts, static_memory(parameters, plan, workload.element_bytes), fold=fold
    )


def assemble(
    scope: str,
    scenario: Simulated,
    block: PreparedBlock,
    numbers: Numbers,
    amounts: Amounts,
    static: StaticMemory,
    *,
    fold: bool = True,
) -> Result:
    """Simulate a step of equal blocks, of a model's or of a traced module, with the sizes of one workload."""
    hardware, layers = scenario.hardware, scenario.model.layers
    messages = block.sync_messages(numbers, layers)
    step = Step(
        block.itinerary(layers, scenario.num_micro_batches),
        block.programs,
        block.durations(
            numbers,
            *cost_models(hardware, scenario.workload.precision),
            gpus_per_node=scenario.gpus_per_node,
            sync_messages=messages,
        ),
        block.sizes(numbers),
        hardware.coefficients.overlap_slowdown.value,
    )
    walked = fold_step(step) if fold else unfold_step(step)
    copies, gpus = block.ranks.copies, scenario.plan.gpus
    trace = Trace(walked.nodes, copies, partial(_describe, scenario, block, messages), block.groups, walked.overlapping)
    return Result(
        scope=scope,
        scenario=scenario,
        block=block,
        numbers=numbers,
        amounts=amounts,
        trace=trace,
        static=static,
        events=walked.events,
        folded=len(copies) < gpus or walked.events < trace.num_spans,
        reasons=tuple(filter(None, (_rank_folding(len(copies), gpus, fold), "" if fold else SWITCHED_OFF))),
    )


SWITCHED_OFF = "layers are not folded: it was switched off"


def _rank_folding(simulated: int, ranks: int, fold: bool) -> str:
    if not fold:
        return "ranks are not folded: it was switched off"
    if simulated == ranks:
        return "" if ranks == 1 else "ranks are not folded: each does different work"
    differ = "all are identical" if simulated == 1 else "they differ by their position on the ring"
    return f"{simulated} of {ranks} ranks simulated: {differ}"


def _describe(scenario: Simulated, block: PreparedBlock, messages: Sequence[int], piece: Piece) -> list[TaskInfo]:
    """What each task of a piece is, with its sizes."""
    segment = block.by_outline[piece.recording.outline]
    if segment is block.sync:
        return [sync.info(message) for sync, message in zip(block.syncs, messages, strict=True)]
    own = _instructions(block, scenario)
    return [task_info(own[step.id], piece.layer, piece.micro_batch) for step in segment.instructions]


def _instructions(block: PreparedBlock, scenario: Simulated) -> dict[int, Instruction]:
    """The instructions of a block with the sizes of a workload, by id."""
    program = block.program_at(scenario.workload)
    sections = (*program.forward_sections, *program.backward_sections)
    return {step.id: step for section in sections for step in section.instructions}
