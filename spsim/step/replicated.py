"""The blocks of a rank whose weights other ranks hold, too: all micro-batches of a step, with what they send."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby, pairwise

import numpy as np

from spsim.costs.collectives import CommCost
from spsim.costs.kernels import ComputeCost
from spsim.engine.lives import Integers
from spsim.inputs.model import Model
from spsim.inputs.plan import Plan
from spsim.inputs.rules import sequence_unit
from spsim.inputs.workload import ELEMENT_BYTES, Precision
from spsim.lazy import Cache, lazy
from spsim.program.assembly import HEAD, ProgramsAt, one_replica, programs_at, step_key
from spsim.program.blocks.head import OUTPUT
from spsim.program.blocks.optimizer import parameter_state
from spsim.program.instructions import Program
from spsim.program.sizes import Numbers, Template
from spsim.program.templates import step_template
from spsim.step.closing import Optimizer, replica_closings
from spsim.step.columns.step import BlockColumns
from spsim.step.ending import syncs_of
from spsim.step.gradients import Sync, sums_beside
from spsim.step.groups import Groups, replica_groups
from spsim.step.hidden import hidden_by
from spsim.step.itinerary import Blocks, Chunk, Item, Loop, Runs, Visit
from spsim.step.messages import Synchronisation
from spsim.step.patterns import in_loops
from spsim.step.preparation import PreparedStep
from spsim.step.replicas import parameters_of, synchronisation
from spsim.step.segments import Segment
from spsim.step.variants import ReplicaPasses, StagePass
from spsim.units import MIB, picoseconds

KEPT = 64
"""Numbers of micro-batches whose itinerary a chunk keeps."""


class ReplicatedChunk:
    """What a rank runs of a micro-batch, under a plan of synchronisation."""

    def __init__(
        self, sync: Synchronisation, blocks: Blocks, chunk: Chunk, groups: Groups, *, first: int = 0, name: str = ""
    ) -> None:
        """Layers are numbered from `first`; `name` tells the chunk from others of the step."""
        own = [run for run in chunk for _ in range(run.count)]
        self.layers: list[int | None] = []
        for run in own:
            self.layers.append(first if run.numbered else None)
            first += run.layers if run.numbered else 0
        self._passes = ReplicaPasses(sync, [blocks[run.block] for run in own], groups, name)
        self._items: Cache[tuple[Item, ...]] = Cache(KEPT, lambda _: 1)
        """By micro-batches: to find what is alike takes longer than to run it."""

    @lazy
    def segments(self) -> Sequence[Segment]:
        """All that it may run."""
        found = (self._pair(first, last) for first in (True, False) for last in (True, False))
        passes = {id(own): own for pair in found for own in pair}
        every = {id(s): s for own in passes.values() for s in _segments(own)}
        return tuple(every.values())

    def items(self, micro_batches: int) -> tuple[Item, ...]:
        """Up through all blocks and down again, so many times; those that are alike are a loop."""
        return self._items.get(micro_batches, lambda: self._found(micro_batches))

    def _found(self, micro_batches: int) -> tuple[Item, ...]:
        last = micro_batches - 1
        starts = sorted({0, min(1, last), last})
        rows = [(start, stop - start) for start, stop in pairwise([*starts, micro_batches])]
        found: list[Item] = []
        alike = groupby(rows, key=lambda row: [*map(id, self._pair(row[0] == 0, row[0] == last))])
        for _, same in alike:
            own = list(same)
            (start, _), runs = own[0], sum(runs for _, runs in own)
            forward, backward = self._pair(start == 0, start == last)
            body = (*self._visits(forward, start, 1), *self._visits(backward, start, -1))
            found += body if runs == 1 else [Loop(body, runs, micro_batches=1)]
        return tuple(found)

    def _pair(self, first: bool, last: bool) -> tuple[StagePass, StagePass]:
        return self._passes.forward(first=first), self._passes.backward(last=last)

    def _visits(self, found: StagePass, micro_batch: int, order: int) -> Iterator[Item]:
        if found.before is not None:
            yield Visit(found.before, None, micro_batch)
        yield from in_loops(found.blocks, self.layers[::order], micro_batch)


def _segments(found: StagePass) -> Iterator[Segment]:
    if found.before is not None:
        yield found.before
    for block in found.blocks:
        yield from (part.segment for part in block.parts)


def root_of(chunk: Chunk) -> frozenset[int]:
    """Places of the blocks that are no layers, which FSDP does not shard by themselves."""
    own = [run for run in chunk for _ in range(run.count)]
    return frozenset(place for place, run in enumerate(own) if not run.numbered)


def has_tied_head(chunk: Chunk, programs: Mapping[str, Program]) -> bool:
    """Whether the output layer multiplies by the table of the embedding, which is a weight of that block then."""
    return any(run.block == HEAD for run in chunk) and all(own.name != OUTPUT for own in programs[HEAD].weights)


class ReplicatedStep(PreparedStep):
    """The step of the only stage of a plan, its weights synchronised as a library does."""

    def __init__(self, template: Template, plan: Plan, programs_at: ProgramsAt, optimizer: Optimizer, chunk: Chunk,
                 *, fold: bool) -> None:  # fmt: skip
        state = parameter_state(plan, ELEMENT_BYTES[optimizer.precision])
        super().__init__(template, plan, programs_at, fold=fold, gradient_bytes=state.gradient, optimizer=optimizer)
        programs, groups = template.programs, replica_groups(plan)
        parameters = parameters_of(programs[run.block] for run in chunk for _ in range(run.count))
        tied = has_tied_head(chunk, programs)
        sync = synchronisation(parameters, plan, optimizer.precision, root=root_of(chunk), tied=tied)
        self.replicated = ReplicatedChunk(sync, self.blocks, chunk, groups)
        others = sums_beside(syncs_of(self.closings), sync.summed_over_tp, programs)
        passes = self.segments[: -len(self.closings)]
        self.closings = replica_closings(sync, groups, programs, others, optimizer)
        known = {*map(id, passes)}
        variants = [segment for segment in self.replicated.segments if id(segment) not in known]
        self.segments = (*passes, *variants, *(made.segment for made in self.closings))
        self.owners |= {s.name: self.owners[s.variant_of] for s in variants if s.variant_of}

    @lazy
    def columns(self) -> BlockColumns | None:
        """None where messages are between the kernels of a pass."""
        return None if any(segment.added for segment in self.segments) else super().columns

    def itinerary(self, chunk: Chunk, micro_batches: Runs) -> tuple[Item, ...]:
        """A step of its own chunk."""
        closing = [Visit(made.segment) for made in self.closings]
        return *self.replicated.items(int(micro_batches)), *closing

    def sizes(self, numbers: Numbers) -> dict[str, Integers]:
        """Bytes of the buffers of each segment, of those of its messages too."""
        found = super().sizes(numbers)
        return found | {
            s.name: np.concatenate([found[s.name], np.array(s.added_bytes, dtype=found[s.name].dtype)])
            for s in self.segments
            if s.added_bytes
        }

    def durations(
        self,
        numbers: Numbers,
        compute: ComputeCost,
        comm: CommCost,
        *,
        gpus_per_node: int,
        chunk: Chunk | None,
        micro_batches: int = 1,
    ) -> dict[str, Mapping[int, list[int]]]:
        """Picoseconds of each task, by segment and simulated rank."""
        given = {"gpus_per_node": gpus_per_node, "micro_batches": micro_batches}
        found = super().durations(numbers, compute, comm, chunk=chunk, **given)
        for segment in self.segments:
            if not segment.added:
                continue
            own = {task: self._time(sync, comm, gpus_per_node) for task, sync in segment.added.items()}
            times = found.get(segment.name) or {rank: [] for rank in self.ranks.copies}
            found[segment.name] = {rank: segment.woven(of_rank, own) for rank, of_rank in times.items()}
        return found

    def _time(self, sync: Sync, comm: CommCost, gpus_per_node: int) -> int:
        nodes = self.nodes(sync.axes, sync.ranks, gpus_per_node)
        return picoseconds(comm.duration(sync.collective, sync.message_bytes, sync.ranks, nodes))

    def issued(self, micro_batches: int) -> Counter[Sync]:
        """Collectives over weights in the passes of a step, and how often each."""
        return _issued(self.replicated.items(micro_batches))


def _issued(items: Sequence[Item]) -> Counter[Sync]:
    found: Counter[Sync] = Counter()
    for item in items:
        if isinstance(item, Visit):
            found.update(item.segment.added.values())
        else:
            for sync, times in _issued(item.body).items():
                found[sync] += times * int(item.runs)
    return found


_steps: Cache[ReplicatedStep] = Cache(64 * MIB, lambda step: step.nbytes)


def replicated_step(
    model: Model, plan: Plan, fold: bool, precision: Precision, chunk: Chunk, *, single: bool = False
) -> ReplicatedStep:
    """The whole of a model, of which a rank runs a `chunk`, under a plan without pipeline stages."""
    options = (
        plan.dp_library, plan.zero, plan.zero_stage, plan.bucket_elements, plan.dp_overlap, plan.grad_dtype,
        plan.moment_dtype, plan.precision_aware_optimizer, plan.tp_backward_overlap, plan.cuda_graphs,
        plan.norm_gradients, plan.fsdp_ends, plan.mesh_order, *hidden_by(plan),
    )  # fmt: skip
    key = (*step_key(model, plan), sequence_unit(model, plan), precision, single, fold, tuple(chunk), options)
    return _steps.get(
        key,
        lambda: ReplicatedStep(
            step_template(model, one_replica(plan), precision, single=single),
            plan,
            programs_at(model, plan, precision),
            Optimizer(plan, precision),
            chunk,
            fold=fold,
        ),
    )
