"""A step of several pipeline stages with the times that a profile gives it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, lru_cache
from typing import NamedTuple

from spsim.costs.collectives import CommCost
from spsim.costs.kernels import ComputeCost
from spsim.engine.pieces import Piece
from spsim.engine.recording import TaskInfo
from spsim.errors import InputError
from spsim.inputs.hardware import HardwareProfile
from spsim.inputs.plan import Plan
from spsim.lazy import Deferred
from spsim.program.blocks.optimizer import shard_ranks
from spsim.program.instructions import LAYER
from spsim.program.sizes import Numbers
from spsim.step.buckets import megatron_bucket_elements
from spsim.step.folding import Step
from spsim.step.gradients import GRADIENTS, PARAMETERS
from spsim.step.itinerary import Run
from spsim.step.pipeline.clock import Clock
from spsim.step.pipeline.exchange import Exchange, score
from spsim.step.pipeline.messages import Stages as MessageStages
from spsim.step.pipelined import Closed, Messages, Pipelined, Reduction, run_pipeline
from spsim.step.preparation import PreparedStep
from spsim.step.stages import Stages
from spsim.step.unfolded_pipeline import Unfolded, unfold_pipeline
from spsim.units import picoseconds


class CostedPipeline(NamedTuple):
    """All stages and micro-batches of one workload, gradients summed and the optimizer stepped: what is run."""

    prepared: PreparedStep
    stages: Stages
    clock: Clock
    step: Step
    messages: Messages
    closed: Closed

    def folded(self) -> Pipelined:
        """Passes run once; ranks of a stage have to be alike."""
        stride = self.prepared.mesh.ranks
        return run_pipeline(
            self.prepared.chunk_passes, self.stages, self.clock, self.step, self.messages, self.closed, stride=stride
        )

    def unfolded(self) -> Unfolded:
        """As one program of each simulated rank of each stage."""
        if self.closed.reductions or self.closed.gathers:
            raise InputError(
                "dp_overlap with pp: collectives of replicas behind passes are simulated with folded passes only; "
                "use fold=True and ring_cut=zigzag, or leave it out"
            )
        clock, ranks = self.clock, self.prepared.ranks
        whole = score(clock.schedule, clock.stages, clock.chunks, clock.micro_batches, clock.group, clock.exchange)
        return unfold_pipeline(
            self.prepared.chunk_passes, self.stages, whole, self.step, self.messages, self.closed, ranks
        )

    @property
    def sends(self) -> tuple[int, int]:
        """Messages that the first stage sends in a step, and bytes of each."""
        clock = self.clock
        senders = MessageStages(clock.schedule, clock.stages, clock.chunks).senders()
        passes = [kind for (kind, stage, _), _ in senders if stage == 0 and kind != "I"]  # halves send as the whole
        return len(passes) * clock.micro_batches, self.messages.bytes

    def infos(self, piece: Piece) -> Sequence[TaskInfo]:
        """What the tasks are of a message, or of a segment that closes the step, with their sizes."""
        outline = piece.recording.outline
        made = self.prepared.closing_of(outline)
        if made is not None:
            stage = next(iter(piece.recording.times)) // self.prepared.mesh.ranks
            return made.infos(self.closed.messages[self.closed.kind_of[stage]])
        return [info._replace(micro_batch=piece.micro_batch) for info in outline.labels]


def costed_pipeline(
    prepared: PreparedStep,
    stages: Stages,
    numbers: Numbers,
    hardware: HardwareProfile,
    plan: Plan,
    costs: tuple[ComputeCost, CommCost],
    *,
    micro_batches: int,
    gpus_per_node: int,
) -> CostedPipeline:
    """A step of one workload with the times that a profile gives it."""
    compute, comm = costs
    step = Step(
        (),
        prepared.programs,
        prepared.durations(numbers, compute, comm, gpus_per_node=gpus_per_node, chunk=None),
        prepared.sizes(numbers),
        hardware.coefficients.overlap_slowdown.value,
        prepared.abreast,
    )
    message = boundary_bytes(prepared, numbers)
    return CostedPipeline(
        prepared,
        stages,
        Clock(plan.pp_schedule, plan.pp, plan.virtual_pp, micro_batches, plan.pp_group, exchange_of(plan)),
        step,
        Messages(message, _transfers(plan, message, comm, prepared.mesh.ranks, gpus_per_node)),
        Closed(
            prepared.closing_times_of(stages.kinds, numbers, compute, comm, gpus_per_node=gpus_per_node),
            stages.kind_of,
            Deferred(lambda: prepared.ending(stages.kinds).messages(numbers)),
            *_overlapped(prepared, stages, numbers, plan, comm, gpus_per_node),
            hardware.coefficients.overlap_slowdown.value,
        ),
    )


def _overlapped(
    prepared: PreparedStep, stages: Stages, numbers: Numbers, plan: Plan, comm: CommCost, gpus_per_node: int
) -> tuple[list[list[Reduction]], list[list[int]]]:
    """Reductions behind the last passes and gathers before the first, of each stage and chunk, as Megatron-Core has
    them: a chunk has one bucket but for the first of the first stage.
    """
    behind = plan.dp_overlap in (True, "gradients")
    ahead = plan.dp_overlap in (True, "parameters") and bool(plan.zero_stage)

    @cache
    def chunk_ps(runs: tuple[Run, ...], name: str) -> int:
        syncs = [sync for sync in prepared.stage_syncs(runs) if sync.name == name and sync.lane != "tp"]
        sizes = prepared.sync_messages(numbers, runs, syncs)
        own = (
            comm.duration(sync.collective, size, sync.ranks, prepared.nodes(sync.axes, sync.ranks, gpus_per_node))
            for sync, size in zip(syncs, sizes, strict=True)
        )
        return sum(map(picoseconds, own))

    def buckets(stage: int, chunk: int) -> int:
        if stage or chunk:
            return 1
        limit = plan.bucket_elements or megatron_bucket_elements(shard_ranks(plan))
        return max(1, round(prepared.parameters(numbers, stages[0][0].runs) / limit))

    reductions = [
        [Reduction(chunk_ps(tuple(own.runs), GRADIENTS), buckets(stage, chunk)) for chunk, own in enumerate(chunks)]
        for stage, chunks in enumerate(stages if behind else ())
    ]
    gathers = [[chunk_ps(tuple(own.runs), PARAMETERS) for own in chunks] for chunks in (stages if ahead else ())]
    return reductions, gathers


def boundary_bytes(prepared: PreparedStep, numbers: Numbers) -> int:
    """What a stage sends of a micro-batch: [s / cp / (tp under sequence parallelism), b, h]; there is no scatter and
    gather, so that without sequence parallelism every rank of tp sends all of it (megatron-core 0.16.1).
    """
    (hidden,) = prepared.template.programs[LAYER].inputs
    return int(numbers.values[prepared.template.index.buffers[hidden.id]])


def exchange_of(plan: Plan) -> Exchange:
    """How stages post their messages and wait for them."""
    library = plan.pp_sends or ("megatron" if plan.pp_schedule == "1f1b" else "torch")
    overlap = plan.virtual_pp > 1 if plan.pp_overlap is None else plan.pp_overlap
    if library == "torch":
        return Exchange("torch")
    return Exchange("megatron", overlap, plan.pp_warmup_flush and overlap)


def _transfers(plan: Plan, message: int, comm: CommCost, stride: int, gpus_per_node: int) -> dict[tuple[int, int], int]:
    """Picoseconds of a message between any two neighbouring stages, of which the last and the first are, too."""
    nodes = _nodes_between(plan.pp, stride, gpus_per_node)
    times = {n: picoseconds(comm.duration("send_receive", message, 2, n)) for n in set(nodes.values())}
    return {way: times[number] for way, number in nodes.items()}


@lru_cache(maxsize=64)
def _nodes_between(stages: int, stride: int, gpus_per_node: int) -> dict[tuple[int, int], int]:
    """Nodes on which each two neighbouring stages lie, of so many ranks."""
    pairs = [(stage, (stage + 1) % stages) for stage in range(stages)]
    return {way: _nodes(*pair, stride, gpus_per_node) for pair in pairs for way in (pair, pair[::-1])}


def _nodes(stage: int, other: int, stride: int, gpus_per_node: int) -> int:
    """Nodes on which a rank of a stage and its counterpart on another lie: of the pair that is farthest apart."""
    ranks = range(min(stride, gpus_per_node))
    apart = ((stage * stride + n) // gpus_per_node != (other * stride + n) // gpus_per_node for n in ranks)
    return 2 if any(apart) else 1
