"""A step under a plan, prepared: all that depends neither on the workload nor on the hardware.

Made once per (model, plan, precision); a simulation then evaluates sizes and durations as arrays and walks the
itinerary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from copy import copy
from dataclasses import replace
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from spsim.costs.collectives import CommCost
from spsim.costs.kernels import ComputeCost
from spsim.costs.power import straggler_factor
from spsim.engine.lives import Integers
from spsim.engine.pieces import Pass
from spsim.engine.recording import Outline
from spsim.engine.tasks import RankProgram
from spsim.inputs.plan import Plan
from spsim.inputs.schedules import HALVED
from spsim.lazy import Cache, lazy
from spsim.program.assembly import ProgramsAt
from spsim.program.instructions import LAYER, Communication, Compute, HostCopy
from spsim.program.mesh import Axis, mesh_of, nodes_of, world_of
from spsim.program.sizes import Index, Numbers, Template
from spsim.step.abreast import FEWEST, Abreast
from spsim.step.closing import Closing, StageClosings, Update, closings
from spsim.step.columns.fill import Floats
from spsim.step.columns.order import covered
from spsim.step.columns.step import BlockColumns
from spsim.step.ending import Ending, Times, spread_parameters
from spsim.step.gradients import Sync
from spsim.step.halves import Halves
from spsim.step.hidden import hidden
from spsim.step.issue import block_passes, halved_passes
from spsim.step.itinerary import Blocks, Chunk, Item, Loop, Run, Runs, Visit, accumulation
from spsim.step.ranks import Groups, Marks, Ranks, groups_of
from spsim.step.rows import Rows
from spsim.step.segments import BlockPass, Segment
from spsim.step.slots import runs_of, slots_in_graphs, sorted_messages
from spsim.step.stages import Passes
from spsim.units import KIB, PS_PER_S
from spsim.work import MAIN_GRADIENT_BYTES, FlashAttention, MemoryBound

FEW = 4
"""Attention kernels."""
KEPT_ITINERARIES = 16
"""Of different chunks and numbers of micro-batches."""


def has_halves(plan: Plan) -> bool:
    """Whether backward passes run in halves."""
    return plan.pp > 1 and plan.pp_schedule in HALVED


class PreparedStep:
    """Template, segments and ranks, and where the sizes and durations of each task stand."""

    def __init__(
        self,
        template: Template,
        plan: Plan,
        programs_at: ProgramsAt,
        *,
        fold: bool,
        gradient_bytes: int = MAIN_GRADIENT_BYTES,
        optimizer: Update | None = None,
    ) -> None:
        """`programs_at` compiles the blocks for a workload. Bytes are of an element of a gradient."""
        self.template = template
        self.programs_at = programs_at
        self.mesh, self.world = mesh_of(plan), world_of(plan)
        self.blocks = {name: block_passes(program, plan, name) for name, program in template.programs.items()}
        self.optimizer = optimizer
        self._hidden = hidden(plan, self.blocks, template.indices)
        self._in_graphs = slots_in_graphs(plan.cuda_graphs, self.blocks, template.indices)
        self.closings = closings(template.programs, plan, self.world, gradient_bytes, optimizer)
        programs = template.programs.items() if has_halves(plan) else ()
        halves = {name: found for name, program in programs if (found := halved_passes(program, plan, name))}
        self.halves: Halves[Blocks] = Halves(
            {name: {"backward": own.inputs} for name, own in halves.items()},
            {name: {"backward": own.weights} for name, own in halves.items()},
        )
        """Of backward passes, where they run in halves; blocks of products only."""
        self.chunk_passes = Passes(self.blocks, self.halves)
        every = [(name, own) for found in (self.blocks, *self.halves) for name, own in found.items()]
        self.owners = {
            part.segment.name: block for block, passes in every for own in passes.values() for part in own.parts
        }
        """Segment -> the block that it is of."""
        own = tuple(part.segment for _, passes in every for found in passes.values() for part in found.parts)
        self.segments: tuple[Segment, ...] = (*own, *(made.segment for made in self.closings))
        works = (step.work for segment in own for step in segment.instructions if isinstance(step, Compute))
        differ = any(len(work) > 1 for work in works)
        self.ranks = Ranks(self.mesh, ("positions" if differ else "one") if fold else "each")
        self._nodes: dict[tuple[tuple[Axis, ...], int, int], int] = {}
        self._steps: dict[tuple[Run, ...], Loop] = {}
        self._itineraries: Cache[Rows] = Cache(KEPT_ITINERARIES, lambda _: 1)
        self._endings: dict[tuple[Chunk, ...], Ending] = {}
        self.of_stages: dict[Chunk, StageClosings] = {}
        """By the blocks of a stage, where there are several."""

    @property
    def whole_step(self) -> bool:
        """Whether it is all that its ranks run, not layers alone."""
        return self.optimizer is not None

    @property
    def _passes(self) -> list[BlockPass]:
        """Those of all blocks."""
        return [own for found in self.blocks.values() for own in found.values()]

    @property
    def passes(self) -> Mapping[Pass, BlockPass]:
        """Those of a layer."""
        return self.blocks[LAYER]

    @property
    def nbytes(self) -> int:
        """About the memory that it takes, and will take once it has been simulated."""
        return KIB * sum(len(segment.tasks) for segment in self.segments) * (24 + self.ranks.number) // 4

    def marked(self, marks: Marks) -> Self:
        """The same where some ranks are unlike others, if there are any."""
        if not marks:
            return self
        found = copy(self)
        calls = (call for segment in self.segments for call in segment.calls.values() if call.exchange)
        found.ranks = replace(
            self.ranks, marks=marks, exchanging=frozenset(axis for call in calls for axis in call.axes)
        )
        for name in ("programs", "abreast", "columns", "_slots"):
            found.__dict__.pop(name, None)
        return found

    @lazy
    def programs(self) -> dict[str, Mapping[int, RankProgram]]:
        """Segment -> simulated rank -> its tasks."""
        return {segment.name: self.ranks.programs(segment) for segment in self.segments}

    @lazy
    def abreast(self) -> dict[str, Abreast]:
        """Segments prepared for all ranks at once, where they are folded."""
        if self.ranks.simulated == "each" or self.ranks.number < FEWEST:
            return {}
        return {segment.name: Abreast(segment, self.programs[segment.name]) for segment in self.segments}

    @lazy
    def columns(self) -> BlockColumns | None:
        """Prepared for many workloads at once whose sizes are not rounded, if one rank stands for all and `covered`
        covers its passes.
        """
        apart = self.ranks.simulated != "one" or self._hidden is not None
        if apart or not all(map(covered, self._passes)):
            return None
        slots = {name: own for name, by_rank in self._slots.items() for own in by_rank.values()}
        coefficients = self.template.compiled.astype(np.float64)
        return BlockColumns(self.blocks, slots, self._buffer_positions, coefficients)

    @lazy
    def groups(self) -> Groups:
        """The groups that are called."""
        return groups_of(self.world, self.segments)

    @lazy
    def by_outline(self) -> Mapping[Outline, Segment]:
        """The segment that a recording is of, by its outline."""
        return {segment.outline: segment for segment in self.segments}

    def closing_of(self, outline: Outline) -> Closing | None:
        """What a segment after the last micro-batch is made of, by its outline; None for others."""
        return next((made for made in self.every_closing if made.segment.outline is outline), None)

    @property
    def every_closing(self) -> Iterator[Closing]:
        """The segments after the last micro-batch, of each stage."""
        stages = (own.closings for own in self.of_stages.values())
        return (made for own in (self.closings, *stages) for made in own)

    def itinerary(self, chunk: Chunk, micro_batches: Runs) -> tuple[Item, ...]:
        """A step of a chunk's blocks, and what follows the last micro-batch."""
        chunk = tuple(chunk)
        if chunk not in self._steps:
            self._steps[chunk] = accumulation(self.blocks, chunk, 1)
        return replace(self._steps[chunk], runs=micro_batches), *(Visit(made.segment) for made in self.closings)

    def rows(self, chunk: Chunk, micro_batches: int) -> Rows:
        """The same, with what is known of it whatever the numbers."""
        key = (tuple(chunk), micro_batches)
        return self._itineraries.get(key, lambda: Rows([self.itinerary(chunk, micro_batches)]))

    @lazy
    def _slots(self) -> dict[str, dict[int, npt.NDArray[np.intp]]]:
        """Segment -> simulated rank -> slot of the duration of each task."""

        def of_rank(segment: Segment, position: int) -> npt.NDArray[np.intp]:
            own = (self.index_of(segment).slots[step.id] for step in segment.instructions)
            return np.array([s[position] if len(s) > 1 else s[0] for s in own], dtype=np.intp)

        return {
            segment.name: {rank: of_rank(segment, place) for rank, place in self.ranks.positions.items()}
            for segment in self.segments
            if segment.instructions
        }

    def index_of(self, segment: Segment) -> Index:
        """Where the numbers of the block of a segment stand."""
        return self.template.indices[self.owners.get(segment.name, LAYER)]

    @lazy
    def _buffer_positions(self) -> dict[str, npt.NDArray[np.intp]]:
        return {
            s.name: np.array([self.index_of(s).buffers[b] for b in s.buffer_ids], dtype=np.intp) for s in self.segments
        }

    @property
    def communications(self) -> Iterator[tuple[Communication, Index]]:
        """Of the segments, each once, with where the numbers of its block stand."""
        for segment in self.segments:
            index = self.index_of(segment)
            for step in segment.instructions:
                if isinstance(step, Communication):
                    yield step, index

    @lazy
    def _messages(self) -> list[tuple[Communication, int, npt.NDArray[np.intp]]]:
        return sorted_messages(self.communications, self.template)

    @lazy
    def _host_copies(self) -> list[tuple[int, npt.NDArray[np.intp]]]:
        """Positions of the bytes that are copied to or from the host, each with its slots."""
        found: dict[int, list[int]] = {}
        for segment in self.segments:
            index = self.index_of(segment)
            for step in segment.instructions:
                if isinstance(step, HostCopy):
                    found.setdefault(index.messages[step.id], []).extend(index.slots[step.id])
        return [(position, np.array(slots, dtype=np.intp)) for position, slots in found.items()]

    def sizes(self, numbers: Numbers) -> dict[str, Integers]:
        """Bytes of the buffers of each segment."""
        return {name: numbers.values[where] for name, where in self._buffer_positions.items()}

    def issued(self, micro_batches: int) -> Mapping[Sync, int]:
        """Collectives over weights in the passes of a step, and how often each: none but of replicas that overlap."""
        return {}

    def nodes(self, axes: tuple[Axis, ...], ranks: int, gpus_per_node: int) -> int:
        """Nodes that `ranks` neighbours along some axes span."""
        key = (axes, ranks, gpus_per_node)
        if key not in self._nodes:
            self._nodes[key] = nodes_of(self.world, axes, gpus_per_node, ranks)
        return self._nodes[key]

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
        """Picoseconds of each task, by segment and simulated rank; of what follows the last micro-batch too, where a
        rank runs a `chunk`. Exchanges that passes of other micro-batches hide are as long as what is left of them.
        """
        seconds = self._seconds(numbers.values, compute, comm, gpus_per_node)
        if self._hidden:
            self._hidden.leave(seconds, compute.profile.coefficients.overlap_slowdown.value, micro_batches)
        ps = np.rint(seconds * PS_PER_S)
        ps = (
            ps.astype(np.int64) if np.maximum.reduce(ps) < 2**62 else np.array([int(time) for time in ps], dtype=object)
        )
        found: dict[str, Mapping[int, list[int]]] = {
            name: {rank: ps[slots].tolist() for rank, slots in by_rank.items()} for name, by_rank in self._slots.items()
        }
        own = self.closing_times(numbers, chunk, compute, comm, gpus_per_node=gpus_per_node) if chunk else ()
        for made, times in own:
            found[made.segment.name] = dict.fromkeys(self.ranks.copies, times)
        return found

    def durations_of_many(
        self, numbers: Floats, compute: ComputeCost, comm: CommCost, *, gpus_per_node: int
    ) -> npt.NDArray[np.int64]:
        """Picoseconds by slot, for many workloads whose numbers are columns: a column for each."""
        return np.rint(self._seconds(numbers, compute, comm, gpus_per_node) * PS_PER_S).astype(np.int64)

    def _seconds(self, numbers: Integers | Floats, compute: ComputeCost, comm: CommCost, gpus_per_node: int) -> Floats:
        """By slot; of many workloads, whose numbers are columns, in columns."""
        seconds = np.zeros((self.template.num_slots, *numbers.shape[1:]))
        by_workload, every = seconds.T, (numbers.ndim - 1) * (slice(None),)
        floats = numbers.astype(np.float64, copy=False)
        for group in self.template.groups:
            if group.kind is FlashAttention and len(group.slots) <= FEW and numbers.ndim == 1:
                # Many operations on few numbers: each as an array takes longer than all of them in plain Python.
                seconds[group.slots] = [compute.duration(kernel) for kernel in group.each(floats)]
                continue
            kernels: Any = (*every, group.slots)
            by_workload[kernels] = compute.duration(group.work(floats))
        if self._in_graphs.size:
            seconds[self._in_graphs] -= compute.saved_by_graph
        if compute.burst and compute.power.slowdown and self._compute_bound.size:
            own, runs = self._compute_bound, self._runs
            seconds[own] *= compute.power.factor(runs[own] @ seconds[own], runs @ seconds)
        if self.whole_step:
            # The ranks of a step wait for the slowest of them; layers alone are timed on a mean GPU.
            seconds[self._compute_bound] *= straggler_factor(compute.profile, self.world.ranks)
        for step, position, slots in self._messages:
            nodes = self.nodes((step.axis,), step.ranks, gpus_per_node)
            message = numbers[position]
            message = int(message) if numbers.ndim == 1 else message.astype(np.int64)
            if step.sends_before:
                seconds[slots] = comm.batched_duration(message, step.ranks, nodes, before=step.sends_before)
            elif step.dispatch:
                seconds[slots] = comm.dispatched(step.dispatch, message, step.ranks, nodes)
            else:
                duration = comm.step_duration if step.step_of else comm.duration
                seconds[slots] = duration(step.timed_as, message, step.ranks, nodes)
        for position, slots in self._host_copies:
            seconds[slots] = comm.host_copy(numbers[position])
        return seconds

    @lazy
    def _compute_bound(self) -> npt.NDArray[np.intp]:
        """Slots of products and attention."""
        own = [group.slots for group in self.template.groups if group.kind is not MemoryBound]
        return np.concatenate(own) if own else np.array([], dtype=np.intp)

    @lazy
    def _runs(self) -> Floats:
        """Of layers, of each type as often as there are such layers."""
        template = self.template
        layers = ((self.blocks[name], template.indices[name], count) for name, count in template.layers.items())
        return runs_of(layers, template.num_slots)

    def parameters(self, numbers: Numbers, chunk: Chunk) -> int:
        """Of all blocks of a rank."""
        return sum(run.count * numbers.parameters(run.block) for run in chunk)

    def spread_parameters(self, chunk: Chunk) -> int:
        """Of these, those of experts that are spread over ranks."""
        return sum(run.count * self._spread[run.block] for run in chunk)

    @lazy
    def _spread(self) -> dict[str, int]:
        return {block: spread_parameters(program) for block, program in self.template.programs.items()}

    def weight_bytes(self, chunk: Chunk) -> int:
        """Of these, with all copies that products read cast."""
        return sum(run.count * self.template.programs[run.block].weight_bytes for run in chunk)

    def ending(self, chunks: tuple[Chunk, ...]) -> Ending:
        """What follows the last micro-batch on ranks that run some chunks."""
        if chunks not in self._endings:
            stages = self.of_stages
            ends = [(own, stages[own].closings if stages else self.closings) for own in chunks]
            self._endings[chunks] = Ending(self.template, self.optimizer, ends)
        return self._endings[chunks]

    def closing_times(
        self, numbers: Numbers, chunk: Chunk, compute: ComputeCost, comm: CommCost, *, gpus_per_node: int
    ) -> Times:
        """Picoseconds of each task after the last micro-batch."""
        return self.closing_times_of((tuple(chunk),), numbers, compute, comm, gpus_per_node=gpus_per_node)[0]

    def closing_times_of(
        self,
        chunks: tuple[Chunk, ...],
        numbers: Numbers,
        compute: ComputeCost,
        comm: CommCost,
        *,
        gpus_per_node: int,
    ) -> list[Times]:
        """The same on ranks that run different chunks."""
        return self.ending(chunks).times(numbers, compute, comm, self.nodes, gpus_per_node)

    def closing_calls(self, numbers: Numbers, chunk: Chunk) -> dict[Sync, tuple[int, int]]:
        """Bytes of a message of each collective after the last micro-batch, and how many messages it is."""
        return self.ending((tuple(chunk),)).calls(numbers)[0]

    def closing_messages(self, numbers: Numbers, chunk: Chunk) -> dict[Sync, int]:
        """Bytes of each collective after the last micro-batch, of all its messages."""
        return self.ending((tuple(chunk),)).messages(numbers)[0]

    def closing_syncs(self, chunk: Chunk) -> tuple[Sync, ...]:
        """The collectives after the last micro-batch, of which several may be alike."""
        return self.ending((tuple(chunk),)).syncs[0]
