"""Lanes and issue order: from the program of one layer to the tasks of every rank.

Overlap is not modelled, it follows: lanes are in order, a task waits for the data it reads, and the policy
below says when communication is issued and whether the next kernel waits for it although no data says so.
Nothing is issued before the pass of the layer that it belongs to is reached.

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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from spsim.costs.static_memory import MAIN_GRADIENT_BYTES
from spsim.engine.recording import COMPUTE_LANE, BufferUse, Outline, TaskInfo
from spsim.engine.tasks import Meeting, RankProgram, Task
from spsim.engine.trace import Phase
from spsim.inputs.plan import Plan
from spsim.program.instructions import Buffer, Communication, Compute, Instruction, Program
from spsim.program.mesh import Axis, Mesh
from spsim.program.placement import Collective, sent_bytes


@dataclass(frozen=True, slots=True)
class Item:
    """A task of all ranks, by its place in a pass; ranks differ in the duration and the peers only."""

    lane: str
    axes: tuple[Axis, ...] = ()
    exchange: bool = False
    """Meets the neighbours on a ring instead of the whole group."""
    needs: tuple[int, ...] = ()


@dataclass(frozen=True)
class Pass:
    """The forward or backward pass of one layer, or the synchronisation of weight gradients."""

    phase: Phase
    steps: tuple[Instruction, ...]
    items: tuple[Item, ...]
    buffers: tuple[BufferUse, ...] = ()
    ids: tuple[int, ...] = ()
    """Of each buffer, in the program."""
    entry: int | None = None
    """Index of the buffer that the neighbouring layer hands over; the outermost gets it from outside."""
    result: int | None = None
    """Index of the buffer that is handed on; nobody outside the outermost layer keeps it."""
    labels: tuple[TaskInfo, ...] = ()
    """What each task is, without sizes and without a layer."""

    @cached_property
    def outline(self) -> Outline:
        """What its recordings have in common."""
        return Outline([item.lane for item in self.items], self.labels, self.buffers)

    @cached_property
    def last_kernel(self) -> int | None:
        """The last task of the compute lane; lanes are in order, so that it is the last to end."""
        kernels = [index for index, item in enumerate(self.items) if item.lane == COMPUTE_LANE]
        return kernels[-1] if kernels else None


@dataclass(frozen=True, slots=True)
class Sync:
    """One coalesced collective over the gradients (or updated parameters) of many weights."""

    axes: tuple[Axis, ...]
    ranks: int
    collective: Collective
    itemsize: int
    weights: tuple[int, ...]
    """Indices into `Program.weight_sync`."""

    def info(self, message: int) -> TaskInfo:
        """What its task is."""
        name = "parameters" if self.collective == "all_gather" else "weight gradients"
        return TaskInfo(
            name, "communication", "weight_sync", purpose="weight", collective=self.collective,
            axis=" × ".join(self.axes), message_bytes=message,
            sent_bytes=sent_bytes(self.collective, message, self.ranks),
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class LayerSchedule:
    """The passes of a layer and the synchronisation, with the programs of the simulated ranks."""

    forward: Pass
    backward: Pass
    sync: Pass
    syncs: tuple[Sync, ...]
    ring_positions: Mapping[int, int]
    """Simulated rank -> its position on the ring, which says which entry of a kernel's work is its own."""
    copies: Mapping[int, tuple[int, ...]]
    groups: Mapping[str, Mapping[int, tuple[int, ...]]]
    programs: Mapping[Phase, Mapping[int, RankProgram]]


def schedule_layer(program: Program, plan: Plan, mesh: Mesh, *, fold: bool, weight_bytes: int) -> LayerSchedule:
    """The passes of a layer under a plan; `fold` simulates identical ranks once."""
    roots = _roots(program)
    read_later = {roots[buffer] for step in program.backward for buffer in step.reads}
    forward = _pass("forward", program.forward, plan, roots, program.inputs, read_later, program.outputs[0])
    inherited = _inherited(program, roots)
    backward = _pass("backward", program.backward, plan, roots, inherited, set(), program.input_gradients[0])
    syncs = tuple(_syncs(program, plan, weight_bytes))
    chain = tuple(
        Item("tp" if sync.axes == ("tp",) else "dp", sync.axes, needs=(index - 1,) if index else ())
        for index, sync in enumerate(syncs)
    )
    return _place(
        forward,
        backward,
        Pass("weight_sync", (), chain, labels=tuple(sync.info(0) for sync in syncs)),
        syncs,
        mesh,
        fold,
    )


def _pass(
    phase: Phase,
    steps: tuple[Instruction, ...],
    plan: Plan,
    roots: dict[int, int],
    inherited: Sequence[Buffer],
    read_later: set[int],
    result: Buffer,
) -> Pass:
    """A pass whose first inherited buffer is its entry."""
    handed_on = roots[result.id]
    uses = _buffer_uses(steps, roots, inherited, read_later | {handed_on})
    place = list(uses).index(handed_on)
    return Pass(
        phase, steps, _items(steps, plan), tuple(uses.values()), tuple(uses), 0, place, tuple(map(_label, steps))
    )  # fmt: skip


# Issue order


def _items(steps: Sequence[Instruction], plan: Plan) -> tuple[Item, ...]:
    """The policy table: each step with its lane and what it waits for."""
    items: list[Item] = []
    place = {step.id: index for index, step in enumerate(steps)}
    writer: dict[int, int] = {}
    last_kernel: int | None = None
    blocking: set[int] = set()
    for index, step in enumerate(steps):
        needs = {writer[buffer] for buffer in step.reads if buffer in writer}
        if isinstance(step, Compute):
            items.append(Item(COMPUTE_LANE, needs=tuple(sorted(needs | blocking))))
            blocking, last_kernel = set(), index
        else:
            needs |= {place[other] for other in step.issued_after}
            if last_kernel is not None and _in_program_order(step, plan):
                needs.add(last_kernel)
            exchange = step.collective == "send_receive"
            items.append(Item(step.axis, (step.axis,), exchange, tuple(sorted(needs))))
            if _blocks(step, plan):
                blocking.add(index)
        writer |= {buffer.id: index for buffer in step.writes}
    assert not blocking, "a pass ends with a kernel, so that the next one finds its lanes free"
    return tuple(items)


def _serial(step: Communication, plan: Plan) -> bool:
    return step.axis == "tp" and step.purpose != "input" and not plan.tp_backward_overlap


def _in_program_order(step: Communication, plan: Plan) -> bool:
    """Issued after the kernel before it, whatever it reads."""
    return _serial(step, plan) or (step.purpose == "regather" and not step.issued_after)


def _blocks(step: Communication, plan: Plan) -> bool:
    return _serial(step, plan) or step.axis == "ulysses" or (step.axis == "tp" and step.purpose == "input")


# Buffers


def _roots(program: Program) -> dict[int, int]:
    """Buffer -> the buffer whose memory it is."""
    roots = {buffer.id: buffer.id for buffer in (*program.inputs, *program.output_gradients)}
    for step in program.instructions:
        for buffer in step.writes:
            roots[buffer.id] = buffer.id if buffer.alias_of is None else roots[buffer.alias_of]
    return roots


def _inherited(program: Program, roots: dict[int, int]) -> tuple[Buffer, ...]:
    """What the backward pass finds: its gradient, and what it reads of the forward pass."""
    own = {b.id for step in program.backward for b in step.writes} | {b.id for b in program.output_gradients}
    wanted = {roots[buffer] for step in program.backward for buffer in step.reads} - own
    known = {b.id: b for b in (*program.inputs, *(b for step in program.forward for b in step.writes))}
    return (*program.output_gradients, *(known[buffer] for buffer in sorted(wanted)))


def _buffer_uses(
    steps: Sequence[Instruction], roots: dict[int, int], inherited: Sequence[Buffer], outlives: set[int]
) -> dict[int, BufferUse]:
    """Buffers of a pass by their number in the program, the inherited ones first."""
    readers: dict[int, list[int]] = defaultdict(list)
    for index, step in enumerate(steps):
        for buffer in step.reads:
            readers[roots[buffer]].append(index)
    written = [(b, i) for i, step in enumerate(steps) for b in step.writes if b.alias_of is None]
    found: list[tuple[Buffer, int | None]] = [*((buffer, None) for buffer in inherited), *written]
    return {
        b.id: BufferUse(b.tensor, b.category, writer, tuple(readers[b.id]), b.id in outlives) for b, writer in found
    }


# Weight gradients


def _syncs(program: Program, plan: Plan, weight_bytes: int) -> Iterator[Sync]:
    """One coalesced message per group: first the data-like axes, then tp. With sharded optimizer state a
    reduce-scatter, then the updated parameters gathered.
    """
    members: dict[tuple[tuple[Axis, ...], int], list[int]] = defaultdict(list)
    for index, sync in enumerate(program.weight_sync):
        members[sync.axes, sync.ranks].append(index)
    for (axes, ranks), weights in sorted(members.items(), key=lambda item: "tp" in item[0][0]):
        all_reduce = Sync(axes, ranks, "all_reduce", MAIN_GRADIENT_BYTES, tuple(weights))
        if plan.zero_stage and axes != ("tp",):
            yield replace(all_reduce, collective="reduce_scatter")
            yield replace(all_reduce, collective="all_gather", itemsize=weight_bytes)
        else:
            yield all_reduce


# Ranks


def _place(forward: Pass, backward: Pass, sync: Pass, syncs: tuple[Sync, ...], mesh: Mesh, fold: bool) -> LayerSchedule:
    """Ranks whose kernels differ by the position on the ring are one class per position, others one in all."""
    kernels = [step for p in (forward, backward) for step in p.steps if isinstance(step, Compute)]
    differ = any(len(step.work) > 1 for step in kernels)
    ring = [mesh.coordinate(rank, "ring") for rank in range(mesh.ranks)]
    representative = list(range(mesh.ranks))
    if fold:
        first: dict[int, int] = {}
        representative = [first.setdefault(ring[rank] if differ else 0, rank) for rank in range(mesh.ranks)]
    copies: dict[int, list[int]] = defaultdict(list)
    for rank, simulated in enumerate(representative):
        copies[simulated].append(rank)
    peers = _Peers(mesh, representative)
    programs = {p.phase: {rank: peers.program(p.items, rank) for rank in copies} for p in (forward, backward, sync)}
    axes = {item.axes for p in (forward, backward, sync) for item in p.items if item.axes}
    return LayerSchedule(
        forward, backward, sync, syncs,
        ring_positions={rank: ring[rank] for rank in copies},
        copies={rank: tuple(ranks) for rank, ranks in copies.items()},
        groups={" × ".join(a): {rank: mesh.group(rank, a) for rank in range(mesh.ranks)} for a in sorted(axes)},
        programs=programs,
    )  # fmt: skip


class _Peers:
    """Who meets whom, among the simulated ranks."""

    def __init__(self, mesh: Mesh, representative: list[int]) -> None:
        self.mesh = mesh
        self.representative = representative
        self.groups: dict[tuple[int, tuple[Axis, ...]], tuple[int, ...]] = {}

    def program(self, items: Sequence[Item], rank: int) -> RankProgram:
        """The tasks of one rank in one pass."""
        return RankProgram(
            [
                Task(index, item.lane, needs=item.needs, meetings=self._meetings(index, rank, item))
                for index, item in enumerate(items)
            ]
        )

    def _group(self, rank: int, axes: tuple[Axis, ...]) -> tuple[int, ...]:
        """Ranks of the group, each replaced by the one that is simulated for it, in order of the axis."""
        if (rank, axes) not in self.groups:
            members = self.mesh.group(rank, axes)
            self.groups[rank, axes] = tuple(self.representative[member] for member in members)
        return self.groups[rank, axes]

    def _meetings(self, task: int, rank: int, item: Item) -> tuple[Meeting, ...]:
        """A collective meets its whole group; an exchange meets the next rank and the previous one."""
        if not item.axes:
            return ()
        group = self._group(rank, item.axes)
        if not item.exchange:
            members = sorted(set(group))
            return (Meeting((task, members[0]), len(members)),)
        here = group.index(rank)
        edges = [(rank, group[(here + 1) % len(group)]), (group[here - 1], rank)]
        return tuple(Meeting((task, *edge), len(set(edge))) for edge in dict.fromkeys(edges))


def _label(step: Instruction) -> TaskInfo:
    return replace(task_info(step), message_bytes=0, sent_bytes=0, flops=0)


def task_info(step: Instruction, layer: int | None = None, micro_batch: int | None = None) -> TaskInfo:
    """What the task of a step is."""
    if isinstance(step, Compute):
        flops = sum(work.flops for work in step.work if work) // len(step.work)
        return TaskInfo(step.operator, step.kind, step.part, layer=layer, micro_batch=micro_batch, flops=flops)
    return TaskInfo(
        step.operator, "communication", step.part, step.purpose, layer, micro_batch, step.collective, step.axis,
        step.message_bytes, step.sent_bytes,
    )  # fmt: skip
