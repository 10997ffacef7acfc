"""The one public entry, and the one assembly of a simulation."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache, partial

import numpy as np

from spsim.costs.models import cost_models
from spsim.costs.static_memory import StaticMemory, dummy_gradients, outside_tensors, serving_memory, static_memory
from spsim.engine.pieces import Node, Piece
from spsim.engine.recording import TaskInfo
from spsim.engine.tasks import Paces
from spsim.engine.trace import Trace, Wait
from spsim.errors import InputError
from spsim.inputs.grid import Grid
from spsim.inputs.model import Model
from spsim.inputs.perturbations import Perturbations
from spsim.inputs.plan import Plan
from spsim.inputs.rules import is_single
from spsim.inputs.scenario import Scenario
from spsim.inputs.schedules import Schedule
from spsim.inputs.serving_rules import served
from spsim.inputs.stages import Chunk as StageChunk
from spsim.inputs.stages import chunks_of
from spsim.inputs.workload import Precision
from spsim.lazy import Deferred
from spsim.program.assembly import EMBEDDING, HEAD, MTP, kinds_of_layers
from spsim.program.blocks.optimizer import shard_ranks
from spsim.program.recipes import in_precision, program_precision
from spsim.program.recompute import kinds_of
from spsim.program.sizes import Numbers, products
from spsim.results import folded
from spsim.results.added import Added
from spsim.results.amounts import amounts_of, counted, serving_amounts
from spsim.results.columns import ResultColumns
from spsim.results.derived import Amounts, Simulated
from spsim.results.result import Result
from spsim.results.staged import OfStages, Staged
from spsim.results.uncertainty import has_flags, is_calibrated
from spsim.step.columns.step import one_if_alike
from spsim.step.costed import costed_step
from spsim.step.costed_pipeline import CostedPipeline, costed_pipeline
from spsim.step.folding import Walked, fold_step
from spsim.step.gradients import Sync
from spsim.step.issue import task_info
from spsim.step.itinerary import Chunk, Run, visits
from spsim.step.lockstep import Lockstep
from spsim.step.lockstep_stages import StagedLockstep
from spsim.step.perturbed import Latencies, Perturbed, perturbed_ranks
from spsim.step.preparation import PreparedStep
from spsim.step.prepared import prepared_layer, prepared_step
from spsim.step.replicated import replicated_step
from spsim.step.serving import caches, prepared_serving, serving_chunk
from spsim.step.sharing import Sharing
from spsim.step.staged_replicas import staged_step
from spsim.step.stages import PlacedChunk, Stages
from spsim.step.unfolded import unfold_step
from spsim.step.written_stages import PerturbedStages


def simulate(scenario: Scenario, *, fold: bool = True) -> Result:
    """Simulate a scenario. `fold` simulates identical ranks and layers once; the result is the same without.

    Raises `InputError` where it is given something else, and where the profile lacks a curve that the plan needs.
    """
    if not isinstance(scenario, Scenario):
        raise InputError(f"simulate: {reprlib.repr(scenario)} is no Scenario; write simulate({Scenario.example()})")
    perturbed = perturbed_ranks(scenario.plan, scenario.perturbations, scenario.gpus_per_node)
    if scenario.plan.pp > 1:
        return _simulate_stages(scenario, fold, perturbed)
    prepared = _prepared(scenario, fold)
    if perturbed:
        prepared = prepared.marked(perturbed.marks)
    chunk = _chunk(scenario)
    numbers = prepared.template.at(scenario.workload)
    own = serving_amounts(scenario) if scenario.is_served else None
    amounts = own or amounts_of(scenario, scenario.workload, scenario.scope)
    static = static_of(scenario, prepared, chunk, numbers)
    scope = scenario.workload.phase if scenario.is_served else scenario.scope
    return assemble(scope, scenario, prepared, chunk, numbers, amounts, static, fold=fold, perturbed=perturbed)


def side_by_side(scenario: Scenario, seeds: int) -> tuple[Lockstep, Lockstep] | tuple[StagedLockstep, StagedLockstep]:
    """A step of many seeds, whose kernels are still to be drawn, and the same unperturbed. Raises `InputError` for what
    is not simulated that way.
    """
    perturbations = scenario.perturbations
    jitters, rest = perturbations.jitters, Perturbations.of(perturbations.slow_ranks + perturbations.slow_links)
    perturbed = perturbed_ranks(scenario.plan, rest, scenario.gpus_per_node, windows=False)
    if scenario.network == "flows":
        raise InputError("perturbations: jitter with network = 'flows' is not simulated; leave one of them out")
    if scenario.plan.pp > 1:
        costed, unlike = _costed_stages(scenario, not jitters, perturbed)
        return costed.lockstep(unlike(perturbed), seeds), costed.lockstep(None, seeds)
    prepared = _prepared(scenario, not jitters)
    prepared = prepared.marked(perturbed.marks) if perturbed else prepared
    costs = cost_models(scenario.hardware, scenario.workload.precision)
    priced = partial(
        costed_step, prepared, prepared.template.at(scenario.workload), scenario.hardware, chunk=_chunk(scenario),
        micro_batches=scenario.num_micro_batches, gpus_per_node=scenario.gpus_per_node,
    )  # fmt: skip
    step = alone = priced(costs)
    if perturbed:
        step = perturbed.step(step, priced((costs[0], Latencies(scenario.hardware))), prepared.segments)
    order = [visit.segment for visit in visits(step.itinerary)]
    return Lockstep(step, prepared.ranks, order, seeds), Lockstep(alone, prepared.ranks, order, seeds)


def simulate_many(grid: Grid) -> ResultColumns | None:
    """Simulate all workloads of a grid at once, where one rank stands for all; None where several do, as of pipeline
    stages. `ResultColumns.exact` says which workloads have to be simulated one by one nevertheless. Raises what
    `simulate` raises.
    """
    scenario = grid.scenario
    if scenario.plan.pp > 1 or scenario.perturbations.changes or scenario.network == "flows" or scenario.is_served:
        return None
    prepared = _prepared(scenario, True)
    if prepared.columns is None or is_calibrated(grid.hardware) or has_flags(grid.hardware):
        return None
    known = prepared.template.at(scenario.workload)
    compute, comm = cost_models(grid.hardware, grid.workload.precision)
    chunk = _chunk(scenario)
    closing = {"weight_sync": 0, "optimizer": 0}
    for made, times in prepared.closing_times(known, chunk, compute, comm, gpus_per_node=grid.gpus_per_node):
        closing[made.segment.phase] += sum(times)
    basis = prepared.template.basis(grid.workload.seq_len, grid.workload.micro_batch)
    with np.errstate(over="ignore", invalid="ignore"):
        numbers = products(prepared.columns.coefficients, basis)
        step = prepared.columns.run(
            chunk,
            one_if_alike(grid.num_micro_batches),
            prepared.durations_of_many(numbers, compute, comm, gpus_per_node=grid.gpus_per_node),
            closing["weight_sync"],
            closing["optimizer"],
            basis,
            grid.hardware.coefficients.overlap_slowdown.value,
        )
    static = static_of(scenario, prepared, chunk, known)
    number = counted(grid.model, grid.workload, grid.num_micro_batches * grid.plan.dp)
    return ResultColumns(
        scenario.scope, grid, prepared, numbers, amounts_of(grid, number, scenario.scope), step, static,
        outside_tensors(grid.hardware, prepared.mesh),
    )  # fmt: skip


def _simulate_stages(scenario: Scenario, fold: bool, perturbed: Perturbed | None) -> Result:
    """A step of several pipeline stages. Where all ranks of a stage are alike, passes are folded."""
    plan, stages = scenario.plan, _stages(scenario.model, scenario.plan)
    costed, unlike = _costed_stages(scenario, fold, perturbed)
    prepared, numbers = costed.prepared, costed.prepared.template.at(scenario.workload)
    copies = prepared.ranks.copies_on(plan.pp)
    nodes: Sequence[Node]
    waits: Sequence[Wait]
    shared = _sharing(scenario, prepared, numbers, stages.kinds, perturbed)
    of_kernels = unlike(_of_kernels(perturbed, shared))
    if len(copies) == plan.pp and fold and of_kernels is None and shared is None:
        ran = costed.folded()
        nodes, waits, events = Deferred(lambda: ran.nodes), Deferred(lambda: ran.waits), ran.events
        staged = Staged(ran, scenario.num_micro_batches)
    else:
        (nodes, waits, events), staged = costed.unfolded(of_kernels, shared), None
    describe = partial(_describe_stages, scenario, prepared, costed)
    trace = Trace(nodes, copies, describe, prepared.groups, overlapping=staged is None, waits=waits)
    static = Deferred(lambda: [static_of(scenario, prepared, own, numbers) for own in stages.kinds])
    return Result(
        scope=scenario.scope,
        scenario=scenario,
        prepared=prepared,
        chunk=stages.runs[0],
        numbers=numbers,
        amounts=amounts_of(scenario, scenario.workload, scenario.scope),
        trace=trace,
        statics=OfStages(static, stages.kind_of, copies, prepared.mesh.strides["pp"]),
        events=events,
        folded=len(copies) < plan.gpus or staged is not None,
        reasons=folded.of_stages(
            plan.pp, len(copies), plan.gpus, fold, unlike=perturbed is not None, shared=shared is not None
        ),
        staged=staged,
        sends=Deferred(lambda: costed.sends),
        perturbations=perturbed.perturbations.labels if perturbed else (),
    )


def _costed_stages(
    scenario: Scenario, fold: bool, perturbed: Perturbed | None
) -> tuple[CostedPipeline, Callable[[Perturbed | None], PerturbedStages | None]]:
    """A step of several stages with its times, and how perturbations are those of its stages."""
    stages = _stages(scenario.model, scenario.plan)
    prepared = staged_step(
        scenario.model, scenario.plan, fold, precision_of(scenario), stages, single=is_one_sequence(scenario)
    ).marked(perturbed.marks if perturbed else ())
    compute, comm = cost_models(scenario.hardware, scenario.workload.precision)
    priced = partial(
        costed_pipeline, prepared, stages, prepared.template.at(scenario.workload), scenario.hardware, scenario.plan,
        micro_batches=scenario.num_micro_batches, gpus_per_node=scenario.gpus_per_node,
    )  # fmt: skip

    def of_stages(own: Perturbed | None) -> PerturbedStages | None:
        if own is None:
            return None
        return PerturbedStages(own, prepared, priced((compute, Latencies(scenario.hardware))).timed)

    return priced((compute, comm)), of_stages


@lru_cache(maxsize=256)
def _stages(model: Model, plan: Plan) -> Stages:
    """What each stage runs, chunk by chunk."""
    return Stages([[_placed(model, plan, chunk) for chunk in stage] for stage in chunks_of(model, plan)])


@lru_cache(maxsize=256)
def stages_of(model: Model, pp: int, virtual_pp: int, schedule: Schedule, layout: str | None) -> Stages:
    """The same of plans that differ in nothing that stages know of."""
    return _stages(model, Plan(pp=pp, virtual_pp=virtual_pp, pp_schedule=schedule, pp_layout=layout))


def _layer_runs(model: Model, plan: Plan, layers: range) -> list[Run]:
    """Some layers of a chunk, by kind."""
    names = kinds_of_layers(model, plan)
    return [Run(names[kind], count, layers=kind.layers) for kind, count in kinds_of(model, plan, layers)]


@lru_cache(maxsize=256)
def _runs(model: Model, plan: Plan, layers: range, *, embedding: bool, loss: bool) -> tuple[Run, ...]:
    """Some layers with what stands before and behind them."""
    runs = [Run(EMBEDDING, numbered=False)] if embedding else []
    runs += _layer_runs(model, plan, layers)
    runs += [Run(MTP, numbered=False)] if loss and model.mtp_layers else []
    runs += [Run(HEAD, numbered=False)] if loss and model.head_rows else []
    return tuple(runs)


def _placed(model: Model, plan: Plan, chunk: StageChunk) -> PlacedChunk:
    runs = _runs(model, plan, chunk.layers, embedding=chunk.embedding, loss=chunk.loss)
    return PlacedChunk(runs, chunk.layers.start)


def _chunk(scenario: Scenario) -> Chunk:
    """What a rank runs of a micro-batch."""
    if scenario.is_served:
        return serving_chunk(scenario.model, scenario.workload)
    whole = scenario.scope == "step"
    return _runs(scenario.model, scenario.plan, range(scenario.model.layers), embedding=whole, loss=whole)


def _prepared(scenario: Scenario, fold: bool) -> PreparedStep:
    if scenario.is_served:
        own = in_precision(scenario.workload, precision_of(scenario))
        return prepared_serving(scenario.model, served(scenario.plan), fold, own)
    prepare = prepared_layer if scenario.scope == "layers" else prepared_step
    precision, single = precision_of(scenario), is_one_sequence(scenario)
    if scenario.scope == "step" and shard_ranks(scenario.plan) > 1:
        return replicated_step(scenario.model, scenario.plan, fold, precision, _chunk(scenario), single=single)
    return prepare(scenario.model, scenario.plan, fold, precision, single=single)


def is_one_sequence(scenario: Scenario) -> bool:
    """Whether its programs are those of a single sequence."""
    return bool(is_single(scenario.plan, scenario.workload.micro_batch))


def precision_of(scenario: Scenario | Grid) -> Precision:
    """Of its programs, on its hardware."""
    return program_precision(scenario.workload.precision, any_layout=scenario.hardware.fp8_any_layout)


def static_of(scenario: Scenario, prepared: PreparedStep, chunk: Chunk, numbers: Numbers) -> StaticMemory:
    plan, element_bytes = scenario.plan, scenario.workload.element_bytes
    if scenario.is_served:
        return serving_memory(prepared.weight_bytes(chunk), caches(scenario.model, prepared), plan, scenario.workload)
    parameters, spread = prepared.parameters(numbers, chunk), prepared.spread_parameters(chunk)
    found = static_memory(parameters, plan, element_bytes, prepared.weight_bytes(chunk), spread)
    if scenario.scope == "layers" or (plan.dp_library != "megatron" and plan.copies > 1):
        return found
    own = [prepared.template.programs[run.block] for run in chunk]
    return replace(found, gradients=found.gradients + dummy_gradients(own, element_bytes))


def assemble(
    scope: str,
    scenario: Simulated,
    prepared: PreparedStep,
    chunk: Chunk,
    numbers: Numbers,
    amounts: Amounts,
    static: StaticMemory,
    *,
    fold: bool = True,
    perturbed: Perturbed | None = None,
) -> Result:
    """Simulate a step of blocks, of a model's or of a traced module, with the sizes of one workload."""
    shared = _sharing(scenario, prepared, numbers, (tuple(chunk),), perturbed)
    walked = _walked(scenario, prepared, chunk, numbers, fold, _of_kernels(perturbed, shared), shared)
    copies, gpus = prepared.ranks.copies, scenario.plan.gpus
    trace = Trace(
        walked.nodes,
        copies,
        partial(_describe, scenario, prepared, lambda: prepared.closing_messages(numbers, chunk)),
        prepared.groups,
        walked.overlapping,
        known_end_ps=walked.ran.ends_ps[0] if walked.ran else None,
    )
    return Result(
        scope=scope,
        scenario=scenario,
        prepared=prepared,
        chunk=chunk,
        numbers=numbers,
        amounts=amounts,
        trace=trace,
        statics=dict.fromkeys(copies, static),
        events=walked.events,
        folded=len(copies) < gpus or walked.events < trace.num_spans,
        reasons=folded.of_step(len(copies), gpus, fold, unlike=perturbed is not None, shared=shared is not None),
        added=Added(walked.ran, *copies) if walked.ran else None,
        perturbations=perturbed.perturbations.labels if perturbed else (),
    )


def _walked(
    scenario: Simulated,
    prepared: PreparedStep,
    chunk: Chunk,
    numbers: Numbers,
    fold: bool,
    perturbed: Perturbed | None,
    shared: Sharing | None,
) -> Walked:
    """The step as it runs."""
    hardware = scenario.hardware
    costs = cost_models(hardware, scenario.workload.precision)
    priced = partial(
        costed_step, prepared, numbers, hardware, chunk=chunk, micro_batches=scenario.num_micro_batches,
        gpus_per_node=scenario.gpus_per_node,
    )  # fmt: skip
    step = priced(costs)
    paces: Mapping[int, Paces] = {}
    if perturbed:
        step = perturbed.step(step, priced((costs[0], Latencies(hardware))), prepared.segments)
        order = [visit.segment for visit in visits(step.itinerary)]
        paces = perturbed.all_paces(dict.fromkeys(prepared.ranks.copies, order))
    return fold_step(step) if fold and not paces and shared is None else unfold_step(step, paces, shared)


def _sharing(
    scenario: Simulated,
    prepared: PreparedStep,
    numbers: Numbers,
    chunks: tuple[Chunk, ...],
    perturbed: Perturbed | None,
) -> Sharing | None:
    """What the transfers of a step put on links, where they share them, with those that are slow."""
    if scenario.network == "closed_form":
        return None
    comm = cost_models(scenario.hardware, scenario.workload.precision)[1]
    sharing = Sharing(prepared, numbers, comm, chunks, gpus_per_node=scenario.gpus_per_node)
    for slow, users in perturbed.slow_links if perturbed else ():
        sharing.slow(slow, users)
    return sharing


def _of_kernels(perturbed: Perturbed | None, shared: Sharing | None) -> Perturbed | None:
    """What perturbs the tasks of ranks: on a network slow links are its own."""
    return perturbed.without_links if perturbed and shared else perturbed


def _describe_stages(
    scenario: Simulated, prepared: PreparedStep, costed: CostedPipeline, piece: Piece
) -> Sequence[TaskInfo]:
    """What each task of a piece of several stages is, with its sizes."""
    if piece.recording.outline in prepared.by_outline:
        return _describe(scenario, prepared, dict, piece)
    return costed.infos(piece)


def _describe(
    scenario: Simulated, prepared: PreparedStep, messages: Callable[[], Mapping[Sync, int]], piece: Piece
) -> list[TaskInfo]:
    """What each task of a piece is, with its sizes and those of `messages` after the last micro-batch."""
    made = prepared.closing_of(piece.recording.outline)
    if made is not None:
        return made.infos(messages())
    segment = prepared.by_outline[piece.recording.outline]
    infos: list[TaskInfo] = []
    if segment.instructions:
        program = prepared.programs_at(scenario.workload)[prepared.owners[segment.name]]
        own = {step.id: step for section in program.sections for step in section.instructions}
        infos = [task_info(own[step.id], piece.layer, piece.micro_batch) for step in segment.instructions]
    labels = {task: segment.labels[task] for task in segment.added}
    added = {task: label._replace(layer=piece.layer, micro_batch=piece.micro_batch) for task, label in labels.items()}
    return segment.woven(infos, added)
