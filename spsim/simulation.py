"""The one public entry, and the one assembly of a simulation."""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import numpy.typing as npt

from spsim.costs.flops import layer_flops
from spsim.costs.models import cost_models
from spsim.costs.static_memory import StaticMemory, static_memory
from spsim.engine.pieces import Piece
from spsim.engine.recording import TaskInfo
from spsim.engine.trace import Trace
from spsim.errors import InputError
from spsim.inputs.grid import Grid
from spsim.inputs.scenario import Scenario
from spsim.inputs.workload import Workload, Workloads
from spsim.program.instructions import Instruction
from spsim.program.sizes import Numbers, products
from spsim.results.columns import ResultColumns
from spsim.results.derived import Amounts, Simulated
from spsim.results.result import Result
from spsim.results.uncertainty import has_flags, is_calibrated
from spsim.step.costed import costed_step
from spsim.step.folding import fold_step
from spsim.step.issue import task_info
from spsim.step.preparation import PreparedBlock, prepared_layer
from spsim.step.unfolded import unfold_step


def simulate(scenario: Scenario, *, fold: bool = True) -> Result:
    """Simulate a scenario. `fold` simulates identical ranks and layers once; the result is the same without.

    Raises `InputError` where it is given something else, and where the profile lacks a curve that the plan needs.
    """
    if not isinstance(scenario, Scenario):
        raise InputError(f"simulate: {reprlib.repr(scenario)} is no Scenario; write simulate({Scenario.example()})")
    block = _block(scenario, fold)
    numbers = block.template.at(scenario.workload)
    amounts = _amounts(scenario, scenario.workload)
    return assemble("layers", scenario, block, numbers, amounts, _static(scenario, numbers), fold=fold)


def simulate_many(grid: Grid) -> ResultColumns | None:
    """Simulate all workloads of a grid at once, where one rank stands for all; `ResultColumns.exact` says which
    workloads have to be simulated one by one nevertheless. Raises what `simulate` raises.
    """
    scenario = grid.scenario
    block = _block(scenario, True)
    if block.columns is None or is_calibrated(grid.hardware) or has_flags(grid.hardware):
        return None
    known = block.template.at(scenario.workload)
    compute, comm = cost_models(grid.hardware, grid.workload.precision)
    messages = block.sync_messages(known, grid.model.layers)
    basis = block.template.basis(grid.workload.seq_len, grid.workload.micro_batch)
    with np.errstate(over="ignore", invalid="ignore"):
        numbers = products(block.columns.coefficients, basis)
        step = block.columns.run(
            grid.model.layers,
            _one_if_alike(grid.num_micro_batches),
            block.durations_of_many(numbers, compute, comm, gpus_per_node=grid.gpus_per_node),
            sum(block.sync_durations(comm, grid.gpus_per_node, messages)),
            basis,
            grid.hardware.coefficients.overlap_slowdown.value,
        )
    return ResultColumns("layers", grid, block, numbers, _amounts(grid, _counted(grid)), step, _static(scenario, known))


def _one_if_alike(numbers: npt.NDArray[np.int64]) -> int | npt.NDArray[np.int64]:
    """The micro-batches of all workloads, as most grids have them."""
    return int(numbers[0]) if (numbers == numbers[0]).all() else numbers


def _block(scenario: Scenario, fold: bool) -> PreparedBlock:
    return prepared_layer(scenario.model, scenario.plan, fold, scenario.workload.precision)


def _static(scenario: Scenario, numbers: Numbers) -> StaticMemory:
    parameters = numbers.parameters * scenario.model.layers
    return static_memory(parameters, scenario.plan, scenario.workload.element_bytes)


def _amounts(scenario: Scenario | Grid, workload: Workload | Workloads) -> Amounts:
    """FLOPs of a workload, or of many as arrays of integers that hold them; tokens."""
    flops = layer_flops(scenario.model, workload)
    return Amounts(
        model=flops.training(),
        causal=layer_flops(scenario.model, workload, causal=True).training(),
        executed=flops.executed(scenario.plan),
        tokens=scenario.global_batch * scenario.workload.seq_len,
    )


def _counted(grid: Grid) -> Workloads:
    """The workloads of a grid, in Python's integers where 64 bits do not hold the FLOPs of a step."""
    found = grid.workload
    largest = Workloads(int(found.seq_len.max()), int(found.micro_batch.max()), found.precision)
    flops = layer_flops(grid.model, largest).training() * grid.model.layers * int(grid.num_micro_batches.max())
    return found if flops < 2**62 else replace(found, seq_len=found.seq_len.astype(object))


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
    step = costed_step(
        block,
        numbers,
        hardware,
        cost_models(hardware, scenario.workload.precision),
        layers=layers,
        micro_batches=scenario.num_micro_batches,
        gpus_per_node=scenario.gpus_per_node,
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
