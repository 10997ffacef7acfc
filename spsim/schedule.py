"""Lanes and issue order: from the program of one layer to the tasks of every rank.

Overlap is not modelled, it follows: lanes are in order, a task waits for the data it reads, and the policy
below says when communication is issued and whether the next kernel waits for it although no data says so.

| axis, purpose | lane | issued | next kernel waits |
|---|---|---|---|
| tp, input | tp | when its tensor is ready | yes |
| tp, regather | tp | before the data gradient of its operator; only the weight gradient reads it | no |
| ring, regather of all K and V | ring | before the backward pass of core attention, which reads it | no |
| tp, gradient | tp | when its tensor is ready: behind the weight gradient of a column-parallel linear | no |
| tp, regather and gradient without `tp_backward_overlap` | tp | in program order | yes |
| ulysses, all | ulysses | when its tensor is ready | yes |
| ring, other | ring | when its tensor is ready; K and V of the next step when a step starts | no |
| weight, group of ulysses and ring | dp | end of the step, coalesced | yes |
| weight, tp | tp | end of the step, coalesced | yes |
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from spsim.engine import Allocation, Meeting, Task
from spsim.placement import Axis, Collective, Mesh, sent_bytes
from spsim.plan import Plan
from spsim.program import Buffer, Communication, Compute, Program, Step
from spsim.trace import TaskInfo
from spsim.units import picoseconds
from spsim.work import Work

COMPUTE_LANE = "compute"
GRADIENT_BYTES = 4
"""Main gradients are fp32."""
PARAMETER_BYTES = 2

ComputeDuration = Callable[[Work], float]
CommDuration = Callable[[Collective, int, int], float]


@dataclass(frozen=True, slots=True)
class Schedule:
    """Tasks of each simulated rank, what each task is, and which ranks a simulated one stands for."""

    programs: Mapping[int, Sequence[Task]]
    infos: list[TaskInfo]
    copies: dict[int, tuple[int, ...]]
    groups: dict[str, dict[int, tuple[int, ...]]]


@dataclass(slots=True)
class _Item:
    """A task of all ranks: what differs between ranks is the duration and the peers."""

    info: TaskInfo
    lane: str
    durations: tuple[int, ...]
    """One, or one per ring position."""
    axes: tuple[Axis, ...] = ()
    needs: tuple[int, ...] = ()
    allocates: tuple[Allocation, ...] = ()
    reads: tuple[int, ...] = ()


@dataclass(slots=True)
class _Stream:
    """The items so far, in issue order, with what the next kernel must wait for."""

    items: list[_Item] = field(default_factory=list)
    last_compute: int | None = None
    blocking: list[int] = field(default_factory=list)
    writer: dict[int, int] = field(default_factory=dict)
    root: dict[int, int] = field(default_factory=dict)

    def add(self, item: _Item) -> int:
        self.items.append(item)
        return len(self.items) - 1


def build_schedule(
    program: Program,
    plan: Plan,
    mesh: Mesh,
    *,
    layers: int,
    micro_batches: int,
    compute_duration: ComputeDuration,
    comm_duration: CommDuration,
    fold: bool = True,
) -> Schedule:
    """All layers and micro-batches on one pipeline stage: forward and backward of each micro-batch in turn,
    then the synchronisation of weight gradients. `fold` simulates identical ranks once.
    """
    builder = _Builder(program, plan, layers, compute_duration, comm_duration)
    for micro_batch in range(micro_batches):
        builder.add_micro_batch(micro_batch)
    builder.add_weight_sync()
    return _place(builder.stream.items, mesh, fold)


class _Builder:
    def __init__(
        self,
        program: Program,
        plan: Plan,
        layers: int,
        compute_duration: ComputeDuration,
        comm_duration: CommDuration,
    ) -> None:
        self.program = program
        self.plan = plan
        self.layers = layers
        self.compute_duration = compute_duration
        self.comm_duration = comm_duration
        self.stream = _Stream()
        buffers = [b.id for step in program.steps for b in step.writes]
        self.num_buffers = 1 + max([*buffers, program.input.id, program.output_gradient.id])
        self.durations = {step.id: self._durations(step) for step in program.steps}

    def _durations(self, step: Step) -> tuple[int, ...]:
        if isinstance(step, Compute):
            return tuple(picoseconds(self.compute_duration(work)) if work else 0 for work in step.work)
        return (picoseconds(self.comm_duration(step.collective, step.message_bytes, step.ranks)),)

    # Instances of the layer

    def add_micro_batch(self, micro_batch: int) -> None:
        for layer in range(self.layers):
            self._add_steps(self.program.forward, layer, micro_batch, self.program.input)
        for layer in reversed(range(self.layers)):
            self._add_steps(self.program.backward, layer, micro_batch, self.program.output_gradient)

    def _buffer(self, local: int, layer: int, micro_batch: int) -> int:
        """A buffer of one instance; a layer's input is the output of the layer below, and so for gradients."""
        program = self.program
        if local == program.input.id and layer > 0:
            return self._buffer(program.output.id, layer - 1, micro_batch)
        if local == program.output_gradient.id and layer < self.layers - 1:
            return self._buffer(program.input_gradient.id, layer + 1, micro_batch)
        return (micro_batch * self.layers + layer) * self.num_buffers + local

    def _add_steps(self, steps: Sequence[Step], layer: int, micro_batch: int, entry: Buffer) -> None:
        """One pass of one layer; the first step brings the buffer that the layers outside would have written."""
        outermost = self._buffer(entry.id, layer, micro_batch)
        brought = () if outermost in self.stream.root else (entry,)
        first = len(self.stream.items)
        task_of: dict[int, int] = {}
        for step in steps:
            writes = brought + step.writes if len(self.stream.items) == first else step.writes
            allocates = tuple(filter(None, (self._allocate(b, layer, micro_batch) for b in writes)))
            reads = [self._buffer(buffer, layer, micro_batch) for buffer in step.reads]
            needs = {self.stream.writer[buffer] for buffer in reads if buffer in self.stream.writer}
            item = _Item(
                info=_info(step, layer, micro_batch), lane=COMPUTE_LANE, durations=self.durations[step.id],
                allocates=allocates, reads=tuple(self.stream.root[buffer] for buffer in reads),
            )  # fmt: skip
            if isinstance(step, Communication):
                needs |= {task_of[step_id] for step_id in step.issued_after}
                task = self._issue_communication(item, step, needs)
            else:
                task = self._issue_compute(item, needs)
            task_of[step.id] = task
            for buffer in step.writes:
                self.stream.writer[self._buffer(buffer.id, layer, micro_batch)] = task

    def _allocate(self, buffer: Buffer, layer: int, micro_batch: int) -> Allocation | None:
        here = self._buffer(buffer.id, layer, micro_batch)
        if buffer.alias_of is not None:
            self.stream.root[here] = self.stream.root[self._buffer(buffer.alias_of, layer, micro_batch)]
            return None
        self.stream.root[here] = here
        return Allocation(here, buffer.bytes, buffer.category, buffer.tensor)

    # The policy table

    def _issue_compute(self, item: _Item, needs: set[int]) -> int:
        stream = self.stream
        item.needs = tuple(sorted(needs | set(stream.blocking)))
        stream.blocking.clear()
        stream.last_compute = stream.add(item)
        return stream.last_compute

    def _issue_communication(self, item: _Item, step: Communication, needs: set[int]) -> int:
        serial = step.axis == "tp" and step.purpose != "input" and not self.plan.tp_backward_overlap
        regather = step.purpose == "regather" and not step.issued_after
        if self.stream.last_compute is not None and (serial or regather):
            needs = needs | {self.stream.last_compute}
        item.lane, item.axes, item.needs = step.axis, (step.axis,), tuple(sorted(needs))
        task = self.stream.add(item)
        if serial or step.axis == "ulysses" or (step.axis == "tp" and step.purpose == "input"):
            self.stream.blocking.append(task)
        return task

    # Weight gradients

    def add_weight_sync(self) -> None:
        """One coalesced message per group at the end of the step: first the data-like axes, then tp."""
        elements: dict[tuple[tuple[Axis, ...], int], int] = defaultdict(int)
        for sync in self.program.weight_sync:
            elements[sync.axes, sync.ranks] += sync.elements * self.layers
        for (axes, ranks), total in sorted(elements.items(), key=lambda item: "tp" in item[0][0]):
            for collective, itemsize in self._sync_collectives(axes):
                self._add_sync(axes, ranks, collective, total * itemsize)

    def _sync_collectives(self, axes: tuple[Axis, ...]) -> list[tuple[Collective, int]]:
        """All-reduce; with sharded optimizer state a reduce-scatter, then the updated parameters gathered."""
        if self.plan.zero_stage and axes != ("tp",):
            return [("reduce_scatter", GRADIENT_BYTES), ("all_gather", PARAMETER_BYTES)]
        return [("all_reduce", GRADIENT_BYTES)]

    def _add_sync(self, axes: tuple[Axis, ...], ranks: int, collective: Collective, message: int) -> None:
        info = TaskInfo(
            "weight gradients" if collective != "all_gather" else "parameters", "communication", "weight_sync",
            purpose="weight", collective=collective, axis=" × ".join(axes), message_bytes=message,
            sent_bytes=sent_bytes(collective, message, ranks),
        )  # fmt: skip
        duration = picoseconds(self.comm_duration(collective, message, ranks))
        previous = len(self.stream.items) - 1
        last = {index for index in (self.stream.last_compute, previous) if index is not None and index >= 0}
        lane = "tp" if axes == ("tp",) else "dp"
        self.stream.add(_Item(info, lane, (duration,), axes, tuple(sorted(last))))


def _info(step: Step, layer: int, micro_batch: int) -> TaskInfo:
    if isinstance(step, Compute):
        flops = sum(work.flops for work in step.work if work) // len(step.work)
        return TaskInfo(step.operator, step.kind, step.part, layer=layer, micro_batch=micro_batch, flops=flops)
    return TaskInfo(
        step.operator, "communication", step.part, step.purpose, layer, micro_batch, step.collective, step.axis,
        step.message_bytes, step.sent_bytes,
    )  # fmt: skip


# Ranks


def _place(items: list[_Item], mesh: Mesh, fold: bool) -> Schedule:
    """The tasks of each rank; ranks with the same durations are one class, simulated once."""
    differ = any(len(item.durations) > 1 for item in items)
    ring = [mesh.coordinate(rank, "ring") for rank in range(mesh.ranks)]
    representative = list(range(mesh.ranks))
    if fold:
        first: dict[int, int] = {}
        representative = [first.setdefault(ring[rank] if differ else 0, rank) for rank in range(mesh.ranks)]
    copies: dict[int, list[int]] = defaultdict(list)
    for rank, simulated in enumerate(representative):
        copies[simulated].append(rank)
    peers = _Peers(mesh, representative)
    programs = {
        rank: [
            Task(
                id=index, lane=item.lane, duration_ps=item.durations[ring[rank] if len(item.durations) > 1 else 0],
                needs=item.needs, meetings=peers.meetings(index, rank, item), allocates=item.allocates,
                reads=item.reads,
            )
            for index, item in enumerate(items)
        ]
        for rank in copies
    }  # fmt: skip
    axes = {item.axes for item in items if item.axes}
    groups = {" × ".join(a): {rank: mesh.group(rank, a) for rank in range(mesh.ranks)} for a in sorted(axes)}
    return Schedule(programs, [item.info for item in items], {r: tuple(c) for r, c in copies.items()}, groups)


class _Peers:
    """Who meets whom, among the simulated ranks."""

    def __init__(self, mesh: Mesh, representative: list[int]) -> None:
        self.mesh = mesh
        self.representative = representative
        self.cache: dict[tuple[int, tuple[Axis, ...]], tuple[int, ...]] = {}

    def group(self, rank: int, axes: tuple[Axis, ...]) -> tuple[int, ...]:
        """Ranks of the group, each replaced by the one that is simulated for it, in order of the axis."""
        if (rank, axes) not in self.cache:
            members = self.mesh.group(rank, axes)
            self.cache[rank, axes] = tuple(self.representative[member] for member in members)
        return self.cache[rank, axes]

    def meetings(self, task: int, rank: int, item: _Item) -> tuple[Meeting, ...]:
        """A collective meets its whole group; an exchange meets the next rank and the previous one."""
        if not item.axes:
            return ()
        group = self.group(rank, item.axes)
        if item.info.collective != "send_receive":
            members = sorted(set(group))
            return (Meeting((task, members[0]), len(members)),)
        here = group.index(rank)
        edges = [(rank, group[(here + 1) % len(group)]), (group[here - 1], rank)]
        return tuple(Meeting((task, *edge), len(set(edge))) for edge in dict.fromkeys(edges))
