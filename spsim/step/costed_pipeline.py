"""A step of several pipeline stages with the times that a profile gives it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import numpy as np

from spsim.costs.collectives import CommCost
from spsim.costs.kernels import ComputeCost
from spsim.engine.pieces import Piece
from spsim.engine.recording import TaskInfo
from spsim.errors import InputError
from spsim.inputs.hardware import HardwareProfile
from spsim.inputs.plan import Plan
from spsim.inputs.schedules import HALVED
from spsim.lazy import Deferred
from spsim.program.instructions import LAYER
from spsim.program.mesh import Mesh, places_in_node
from spsim.program.sizes import Numbers
from spsim.step.closing import PARAMETER_GATHER
from spsim.step.ending import Times
from spsim.step.folding import Step
from spsim.step.lockstep_stages import StagedLockstep
from spsim.step.pipeline.clock import Clock
from spsim.step.pipeline.exchange import Exchange, score
from spsim.step.pipeline.messages import Stages as MessageStages
from spsim.step.pipeline.tape import Score
from spsim.step.pipelined import Closed, Messages, Pipelined, run_pipeline
from spsim.step.preparation import PreparedStep
from spsim.step.sharing import Sharing
from spsim.step.stages import Stages
from spsim.step.unfolded_pipeline import Unfolded, unfold_pipeline
from spsim.step.written_stages import PerturbedStages, written_stages
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
        stride = self.prepared.mesh.strides["pp"]
        return run_pipeline(
            self.prepared.chunk_passes, self.stages, self.clock, self.step, self.messages, self.closed, stride=stride
        )

    def unfolded(self, perturbed: PerturbedStages | None = None, sharing: Sharing | None = None) -> Unfolded:
        """As one program of each simulated rank of each stage, of which some may be perturbed; transfers share links,
        if their `sharing` is given.
        """
        if (self.closed.reductions or self.closed.gathers) and sharing is not None:
            raise InputError(
                "network = 'flows' with pp and dp_overlap, DDP or FSDP: collectives of replicas beside passes of "
                "several stages share no links; use network = 'closed_form', pp = 1, or leave it out"
            )
        return unfold_pipeline(
            self.prepared.chunk_passes, self.stages, self._score(), self.step, self.messages, self.closed,
            self.prepared.ranks, perturbed, sharing,
        )  # fmt: skip

    def lockstep(self, perturbed: PerturbedStages | None, seeds: int) -> StagedLockstep:
        """For so many seeds."""
        ranks, passes = self.prepared.ranks, self.prepared.chunk_passes
        written = written_stages(passes, self.stages, self._score(), self.step, self.closed, ranks, perturbed)
        own = [perturbed.transfer_ps(rank, self.messages) if perturbed else self.messages.transfer_ps
               for rank in ranks.in_rows]  # fmt: skip
        shape = (*ranks.shape, 1)
        transfers = {way: np.array([ps[way] for ps in own]).reshape(shape) for way in self.messages.transfer_ps}
        return StagedLockstep(written, ranks, transfers, seeds)

    def _score(self) -> Score:
        """What stages do, written out; `InputError` where collectives of replicas would have to be beside it."""
        if self.closed.reductions or self.closed.gathers:
            raise InputError(
                "dp_overlap, DDP or FSDP with pp: collectives of replicas beside passes are simulated with folded "
                "passes only; "
                "use fold=True and ring_cut=zigzag without perturbations, or leave it out"
            )
        clock = self.clock
        return score(clock.schedule, clock.stages, clock.chunks, clock.micro_batches, clock.group, clock.exchange)

    @property
    def timed(self) -> tuple[Step, Messages, Closed]:
        """All that takes time."""
        return self.step, self.messages, self.closed

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
            stage = self.prepared.world.coordinate(next(iter(piece.recording.times)), "pp")
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
        prepared.durations(
            numbers, compute, comm, gpus_per_node=gpus_per_node, chunk=None, micro_batches=micro_batches
        ),
        prepared.sizes(numbers),
        hardware.coefficients.overlap_slowdown.value,
        prepared.abreast,
    )
    message = boundary_bytes(prepared, numbers)
    times = prepared.closing_times_of(stages.kinds, numbers, compute, comm, gpus_per_node=gpus_per_node)
    return CostedPipeline(
        prepared,
        stages,
        Clock(plan.pp_schedule, plan.pp, plan.virtual_pp, micro_batches, plan.pp_group, exchange_of(plan)),
        step,
        Messages(message, _transfers(prepared.world, message, comm, gpus_per_node)),
        Closed(
            times,
            stages.kind_of,
            Deferred(lambda: prepared.ending(stages.kinds).messages(numbers)),
            *_overlapped(prepared, stages, times, plan),
            hardware.coefficients.overlap_slowdown.value,
        ),
    )


def _overlapped(
    prepared: PreparedStep, stages: Stages, times: Sequence[Times], plan: Plan
) -> tuple[list[tuple[int, ...]], list[list[list[int]]]]:
    """Reductions behind the last passes and gathers before the first, of each kind of stages. Schedules of torch's
    runtime, all but those of one chunk without halves, wait for all that is gathered for a chunk before its pass.
    """
    own = [prepared.of_stages[runs] for runs in stages.kinds]
    reductions = [found.reductions for found in own if found.reductions]
    gathers = [
        [*_split(_gathers(closings), found.gathers)]
        for found, closings in zip(own, times, strict=True)
        if found.gathers
    ]
    whole = plan.dp_library == "fsdp" and (plan.virtual_pp > 1 or plan.pp_schedule in HALVED)
    return reductions, [[[sum(each)] for each in chunks] for chunks in gathers] if whole else gathers


def _gathers(closings: Times) -> list[int]:
    return next(ps for made, ps in closings if made.segment.name == PARAMETER_GATHER)


def _split(times: Sequence[int], counts: Sequence[int]) -> Iterator[list[int]]:
    for stop, count in zip(accumulate(counts), counts, strict=True):
        yield [*times[stop - count : stop]]


def boundary_bytes(prepared: PreparedStep, numbers: Numbers) -> int:
    """What a stage sends of a micro-batch: [s / cp / (tp under sequence parallelism), b, h]; there is no scatter and
    gather, so that without sequence parallelism every rank of tp sends all of it (megatron-core 0.16.1).
    """
    return int(numbers.values[boundary_position(prepared)])


def boundary_position(prepared: PreparedStep) -> int:
    """Where these bytes stand among the numbers of the template."""
    (hidden,) = prepared.template.programs[LAYER].inputs
    return prepared.template.index.buffers[hidden.id]


def exchange_of(plan: Plan) -> Exchange:
    """How stages post their messages and wait for them."""
    library = plan.pp_sends or ("megatron" if plan.pp_schedule == "1f1b" else "torch")
    overlap = plan.virtual_pp > 1 if plan.pp_overlap is None else plan.pp_overlap
    if library == "torch":
        return Exchange("torch")
    return Exchange("megatron", overlap, plan.pp_warmup_flush and overlap)


def _transfers(world: Mesh, message: int, comm: CommCost, gpus_per_node: int) -> dict[tuple[int, int], int]:
    """Picoseconds of a message between any two neighbouring stages, of which the last and the first are, too."""
    nodes = nodes_between(world, gpus_per_node)
    times = {n: picoseconds(comm.duration("send_receive", message, 2, n)) for n in set(nodes.values())}
    return {way: times[number] for way, number in nodes.items()}


def nodes_between(world: Mesh, gpus_per_node: int) -> dict[tuple[int, int], int]:
    """Nodes on which each two neighbouring stages of a mesh lie: of the pair of ranks that is farthest apart."""
    lattice = tuple(world.steps(world.axes))
    return _nodes_between(world.degree("pp"), world.strides["pp"], lattice, gpus_per_node)


@lru_cache(maxsize=64)
def _nodes_between(
    stages: int, stride: int, lattice: tuple[tuple[int, int], ...], per_node: int
) -> dict[tuple[int, int], int]:
    """Of stages that lie on a lattice of (stride, count)."""
    places = places_in_node([(step, count) for step, count in lattice if step != stride], per_node)
    pairs = [(stage, (stage + 1) % stages) for stage in range(stages)]

    def nodes(one: int, other: int) -> int:
        apart = ((one * stride + n) // per_node != (other * stride + n) // per_node for n in places)
        return 2 if any(apart) else 1

    return {way: nodes(*pair) for pair in pairs for way in (pair, pair[::-1])}
