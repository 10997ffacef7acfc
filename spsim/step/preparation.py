"""A block under a plan, prepared: all that depends neither on the workload nor on the hardware.

Made once per (model, plan, precision); a simulation then evaluates sizes and durations as arrays and walks the
itinerary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from spsim.costs.collectives import CommCost
from spsim.costs.kernels import ComputeCost
from spsim.engine.recording import Integers, Outline
from spsim.engine.tasks import RankProgram
from spsim.inputs.model import Model
from spsim.inputs.plan import Plan
from spsim.inputs.workload import ELEMENT_BYTES, Precision, Workload
from spsim.lazy import Cache, lazy
from spsim.program.assembly import compiled_by, layer_program
from spsim.program.blocks.transformer import layer_traits
from spsim.program.instructions import Communication, Compute, Instruction, Program
from spsim.program.mesh import Axis, mesh_of, nodes_of
from spsim.program.placement import Collective
from spsim.program.sizes import Numbers, Template
from spsim.program.templates import layer_template
from spsim.step.abreast import Abreast
from spsim.step.columns.fill import Floats
from spsim.step.columns.order import covered
from spsim.step.columns.step import BlockColumns
from spsim.step.gradients import gradient_syncs, sync_segment
from spsim.step.issue import block_passes
from spsim.step.itinerary import Item, Loop, Runs, Visit, accumulation
from spsim.step.ranks import Groups, Ranks, groups_of
from spsim.step.segments import Segment
from spsim.units import KIB, MIB, PS_PER_S, picoseconds
from spsim.work import MAIN_GRADIENT_BYTES, MemoryBound

_blocks: Cache[PreparedBlock] = Cache(64 * MIB, lambda block: block.nbytes)


def prepared_layer(model: Model, plan: Plan, fold: bool, precision: Precision = "bf16") -> PreparedBlock:
    """The layer of a model under a plan; `fold` simulates identical ranks once."""
    issued_by = plan.tp_backward_overlap, plan.zero_stage > 0
    return _blocks.get(
        (layer_traits(model), compiled_by(plan), precision, issued_by, fold),
        lambda: PreparedBlock(
            layer_template(model, plan, precision),
            plan,
            lambda workload: layer_program(model, plan, workload),
            fold=fold,
            weight_bytes=ELEMENT_BYTES[precision],
        ),
    )


class PreparedBlock:
    """Template, segments and ranks, and where the sizes and durations of each task stand."""

    def __init__(
        self,
        template: Template,
        plan: Plan,
        program_at: Callable[[Workload], Program],
        *,
        fold: bool,
        weight_bytes: int,
        gradient_bytes: int = MAIN_GRADIENT_BYTES,
    ) -> None:
        """`program_at` compiles the block for a workload; bytes are of one element, of gradients as they are summed."""
        program = template.program
        self.template = template
        self.program_at = program_at
        self.mesh = mesh_of(plan)
        self.passes = block_passes(program, plan, "layer")
        self.syncs = tuple(gradient_syncs(program, plan, weight_bytes, gradient_bytes))
        self.sync = sync_segment(self.syncs) if self.syncs else None
        own = tuple(part.segment for found in self.passes.values() for part in found.parts)
        self.segments: tuple[Segment, ...] = (*own, self.sync) if self.sync else own
        works = (step.work for segment in own for step in segment.instructions if isinstance(step, Compute))
        differ = any(len(work) > 1 for work in works)
        self.ranks = Ranks(self.mesh, ("positions" if differ else "one") if fold else "each")
        self._nodes: dict[tuple[tuple[Axis, ...], int, int], int] = {}
        self._layers: dict[int, Loop] = {}

    @property
    def nbytes(self) -> int:
        """About the memory that it takes, and will take once it has been simulated."""
        return KIB * sum(len(segment.tasks) for segment in self.segments) * (24 + self.ranks.number) // 4

    @lazy
    def programs(self) -> dict[str, Mapping[int, RankProgram]]:
        """Segment -> simulated rank -> its tasks."""
        return {segment.name: self.ranks.programs(segment) for segment in self.segments}

    @lazy
    def abreast(self) -> dict[str, Abreast]:
        """Segments prepared for all ranks at once, where they are folded."""
        if self.ranks.simulated != "positions":
            return {}
        return {segment.name: Abreast(segment, self.programs[segment.name]) for segment in self.segments}

    @lazy
    def columns(self) -> BlockColumns | None:
        """Prepared for many workloads at once, if one rank stands for all, `covered` covers its passes and no size is
        rounded.
        """
        if self.ranks.simulated != "one" or self.template.divisor > 1 or not all(map(covered, self.passes.values())):
            return None
        slots = {name: own for name, by_rank in self._slots.items() for own in by_rank.values()}
        coefficients = self.template.coefficients.astype(np.float64)
        return BlockColumns(self.passes, slots, self._buffer_positions, coefficients)

    @lazy
    def groups(self) -> Groups:
        """The groups that are called."""
        return groups_of(self.mesh, self.segments)

    @lazy
    def by_outline(self) -> Mapping[Outline, Segment]:
        """The segment that a recording is of, by its outline."""
        return {segment.outline: segment for segment in self.segments}

    def itinerary(self, layers: int, micro_batches: Runs) -> tuple[Item, ...]:
        """A step of equal layers, and the synchronisation of the gradients after it."""
        if layers not in self._layers:
            self._layers[layers] = accumulation(list(self.passes.values()), layers, 1)
        steps = replace(self._layers[layers], runs=micro_batches)
        return (steps, Visit(self.sync)) if self.sync else (steps,)

    @lazy
    def _slots(self) -> dict[str, dict[int, npt.NDArray[np.intp]]]:
        """Segment -> simulated rank -> slot of the duration of each task."""
        slots = self.template.index.slots

        def of_rank(steps: Sequence[Instruction], position: int) -> npt.NDArray[np.intp]:
            own = (slots[step.id] for step in steps)
            return np.array([s[position] if len(s) > 1 else s[0] for s in own], dtype=np.intp)

        return {
            segment.name: {rank: of_rank(segment.instructions, place) for rank, place in self.ranks.positions.items()}
            for segment in self.segments
            if segment.instructions
        }

    @lazy
    def _buffer_positions(self) -> dict[str, npt.NDArray[np.intp]]:
        where = self.template.index.buffers
        return {s.name: np.array([where[b] for b in s.buffer_ids], dtype=np.intp) for s in self.segments}

    @property
    def communications(self) -> Iterator[Communication]:
        """Of the segments, each once."""
        steps = (step for segment in self.segments for step in segment.instructions)
        return (step for step in steps if isinstance(step, Communication))

    @lazy
    def _messages(self) -> list[tuple[Communication, int, npt.NDArray[np.intp]]]:
        """One communication of each sort, with the position of its message, and the slots of all that are alike."""
        index = self.template.index
        found: dict[tuple[Collective | Axis | int, ...], tuple[Communication, int, list[int]]] = {}
        for step in self.communications:
            position = index.messages[step.id]
            sort = (step.collective, step.axis, step.ranks, *self.template.coefficients[position].tolist())
            found.setdefault(sort, (step, position, []))[2].extend(index.slots[step.id])
        return [(step, position, np.array(slots, dtype=np.intp)) for step, position, slots in found.values()]

    def sizes(self, numbers: Numbers) -> dict[str, Integers]:
        """Bytes of the buffers of each segment."""
        return {name: numbers.values[where] for name, where in self._buffer_positions.items()}

    def sync_messages(self, numbers: Numbers, layers: int) -> list[int]:
        """Bytes of the messages that synchronise the weight gradients of all layers."""
        elements = numbers.weight_sync
        return [layers * s.itemsize * sum(elements[w] for w in s.weights) for s in self.syncs]

    def nodes(self, axes: tuple[Axis, ...], ranks: int, gpus_per_node: int) -> int:
        """Nodes that `ranks` neighbours along some axes span."""
        key = (axes, ranks, gpus_per_node)
        if key not in self._nodes:
            self._nodes[key] = nodes_of(self.mesh, axes, gpus_per_node, ranks)
        return self._nodes[key]

    def durations(
        self,
        numbers: Numbers,
        compute: ComputeCost,
        comm: CommCost,
        *,
        gpus_per_node: int,
        sync_messages: Sequence[int],
    ) -> dict[str, Mapping[int, list[int]]]:
        """Picoseconds of each task, by segment and simulated rank."""
        ps = np.rint(self._seconds(numbers.values, compute, comm, gpus_per_node) * PS_PER_S)
        ps = (
            ps.astype(np.int64) if np.maximum.reduce(ps) < 2**62 else np.array([int(time) for time in ps], dtype=object)
        )
        found: dict[str, Mapping[int, list[int]]] = {
            name: {rank: ps[slots].tolist() for rank, slots in by_rank.items()} for name, by_rank in self._slots.items()
        }
        if self.sync:
            syncs = self.sync_durations(comm, gpus_per_node, sync_messages)
            found[self.sync.name] = dict.fromkeys(self.ranks.copies, syncs)
        return found

    def durations_of_many(
        self, numbers: Floats, compute: ComputeCost, comm: CommCost, *, gpus_per_node: int
    ) -> npt.NDArray[np.int64]:
        """Picoseconds by slot, for many workloads whose numbers are columns: a column for each."""
        return np.rint(self._seconds(numbers, compute, comm, gpus_per_node) * PS_PER_S).astype(np.int64)

    def _seconds(self, numbers: Integers | Floats, compute: ComputeCost, comm: CommCost, gpus_per_node: int) -> Floats:
        """By slot; of many workloads, whose numbers are columns, in columns."""
        seconds = np.zeros((self.template.index.num_slots, *numbers.shape[1:]))
        by_workload, every = seconds.T, (numbers.ndim - 1) * (slice(None),)
        floats = numbers.astype(np.float64, copy=False)
        for group in self.template.groups:
            kernels: Any = (*every, group.slots)
            by_workload[kernels] = compute.duration(group.work(floats))
        if compute.burst and compute.power.slowdown and self._compute_bound.size:
            own, runs = self._compute_bound, self._runs
            seconds[own] *= compute.power.factor(runs[own] @ seconds[own], runs @ seconds)
        for step, position, slots in self._messages:
            nodes = self.nodes((step.axis,), step.ranks, gpus_per_node)
            message = numbers[position]
            message = int(message) if numbers.ndim == 1 else message.astype(np.int64)
            seconds[slots] = comm.duration(step.collective, message, step.ranks, nodes)
        return seconds

    @lazy
    def _compute_bound(self) -> npt.NDArray[np.intp]:
        """Slots of products and attention."""
        own = [group.slots for group in self.template.groups if group.kind is not MemoryBound]
        return np.concatenate(own) if own else np.array([], dtype=np.intp)

    @lazy
    def _runs(self) -> Floats:
        """How often a rank runs the kernel of each slot in both passes of a block, a mean over positions on a ring."""
        runs = [0.0] * self.template.index.num_slots
        for part in (part for found in self.passes.values() for part in found.parts):
            for step in part.segment.instructions:
                slots = self.template.index.slots[step.id]
                for slot in slots if isinstance(step, Compute) else ():
                    runs[slot] += part.runs / len(slots)
        return np.array([0.0, *runs[1:]])

    def sync_durations(self, comm: CommCost, gpus_per_node: int, messages: Sequence[int]) -> list[int]:
        """Picoseconds of each task of the synchronisation."""
        return [
            picoseconds(comm.duration(s.collective, message, s.ranks, self.nodes(s.axes, s.ranks, gpus_per_node)))
            for s, message in zip(self.syncs, messages, strict=True)
        ]
