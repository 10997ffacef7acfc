"""Numbers from a trace: pure functions of its records.

A trace is made of pieces, many of which share a recording, so sums are over recordings and their number.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from itertools import accumulate, islice
from typing import NamedTuple

from spsim.engine.pieces import Node, Pass, Repeat, Stretch
from spsim.engine.recording import MemoryChange, Recording
from spsim.engine.trace import Trace, Wait
from spsim.results import accounts, measured


def layer_window(trace: Trace, phase: Pass, *, layer: int | None = 0, micro_batch: int = 0) -> int:
    """Picoseconds from the first start to the last end, over ranks, of one layer's forward or backward pass.

    The passes of a measured run belong to no layer: `None`.
    """
    begin, end = trace.window_of(phase, layer, micro_batch)
    return end - begin


class Idle(NamedTuple):
    """Picoseconds in which no kernel runs on a rank that is not at its end, by what it waits for."""

    communication: int = 0
    """A transfer is under way."""
    peer: int = 0
    """A communication is posted that a rank of the same stage has not come to."""
    stage: int = 0
    """A message is posted that another stage has not come to."""
    dependency: int = 0
    """Nothing is posted: what was issued before is waited for otherwise."""

    def plus(self, other: Idle, times: int) -> Idle:
        """The sum with so many of another."""
        return Idle(
            self.communication + times * other.communication,
            self.peer + times * other.peer,
            self.stage + times * other.stage,
            self.dependency + times * other.dependency,
        )


def idle(trace: Trace) -> dict[int, Idle]:
    """What the kernels of each simulated rank wait for in passes: weight synchronisation apart, and the optimizer."""
    found = dict.fromkeys(trace.copies, Idle())
    for recording, (phase, count) in trace.recordings.items():
        if phase in ("forward", "backward"):
            for rank, own in _idle(recording).items():
                found[rank] = found[rank].plus(own, count)
    for wait in trace.waits:
        found[wait.rank] = found[wait.rank].plus(_waiting(wait), 1)
    return found


def exposed_communication(trace: Trace) -> dict[int, int]:
    """Picoseconds of each simulated rank during which communication is transferred and no kernel runs, weight
    synchronisation apart. Waiting for a rank that comes later is not communication.
    """
    if trace.measured:
        return measured.exposed_communication(trace)
    return {rank: own.communication for rank, own in idle(trace).items()}


def _idle(recording: Recording) -> dict[int, Idle]:
    """Of the ranks of one piece. Where nothing waits for a peer and nothing was under way before, a kernel that waits
    does so for a transfer: it was posted when what it reads was there, or when the transfer before it ended.
    """
    found = {
        rank: Idle(recording.kernels_end(rank) - recording.begins.get(rank, 0) - sum(kernels))
        for rank, kernels in recording.compute.items()
    }
    late = [rank for rank in (recording.times if recording.begins else recording.late) if found[rank].communication]
    for rank, (_, transfer, peer, stage) in accounts.levels(recording, late).items():
        length = found[rank].communication
        found[rank] = Idle(transfer, peer, stage, length - transfer - peer - stage)
    return found


def _waiting(wait: Wait) -> Idle:
    """Between two passes of a pipeline stage."""
    parts = accounts.of_wait(wait).parts
    transfer = sum(length for part, length in parts.items() if accounts.is_exposed(part))
    return Idle(transfer, parts[accounts.PEERS], parts[accounts.STAGES], parts[accounts.IDLE])


def weight_sync(trace: Trace) -> int:
    """Picoseconds of the synchronisation of weight gradients at the end of the step, on the pipeline stage with most
    of it.
    """
    found = Counter[tuple[int, ...]]()
    for recording, (phase, _) in trace.recordings.items():
        begin, end = recording.window
        found[tuple(recording.times)] += end - begin if phase == "weight_sync" else 0
    return max(found.values(), default=0)


def pass_ends(trace: Trace) -> dict[int, int]:
    """When each simulated rank has run its last pass, and waited for what it sends of it."""
    ends = dict.fromkeys(trace.copies, 0)
    for piece in (leaf.last for leaf in trace.leaves if leaf.stretch.phase in ("forward", "backward")):
        if piece.recording.outline.last_kernel is not None:
            for rank in piece.recording.times:
                ends[rank] = max(ends[rank], piece.shift_ps + piece.recording.kernels_end(rank))
    for wait in trace.waits:
        ends[wait.rank] = max(ends[wait.rank], wait.end_ps)
    return ends


def optimizer(trace: Trace) -> int:
    """Picoseconds of the optimizer's kernels and of what its ranks agree on between them, on the pipeline stage that
    comes to them last.
    """
    windows: dict[tuple[int, ...], list[tuple[int, int]]] = defaultdict(list)
    for stretch in (leaf.stretch for leaf in trace.leaves if leaf.stretch.phase == "optimizer"):
        windows[tuple(stretch.recording.times)].append(stretch.window(0))
    return sum(end - begin for begin, end in max(windows.values(), key=min, default=[]))


def compute_by_class(trace: Trace, rank: int) -> dict[str, int]:
    """Picoseconds of the compute lane of one rank by operator class, in the layers of a step."""
    if trace.measured:
        return measured.compute_by_class(trace, rank)
    totals: dict[str, int] = {}
    for recording, count in trace.layers.items():
        for name, time in zip(recording.outline.classes[0], recording.compute.get(rank, ()), strict=False):
            totals[name] = totals.get(name, 0) + count * time
    return totals


class Peak(NamedTuple):
    """The highest point of the memory of one rank."""

    rank: int
    bytes: int
    time_ps: int
    task: int | None
    """The task that allocated it."""


def peak_memory(trace: Trace, static: Mapping[int, int]) -> Peak:
    """The fullest rank and moment; `static` bytes of each simulated rank are there all the time.

    At equal times memory is freed before it is allocated, so that the order of events does not matter.
    """
    return max([peak_of(trace, rank, static[rank]) for rank in trace.copies], key=lambda peak: peak.bytes)


def peak_of(trace: Trace, rank: int, static: int) -> Peak:
    """The same of one simulated rank."""
    return _peak_of_whole(trace, rank, static) if trace.overlapping else _peak(trace, rank, static)


def memory_changes(trace: Trace, rank: int) -> list[MemoryChange]:
    """All memory changes of a rank in order of time, what is freed before what is allocated."""
    return sorted((c for c in trace.memory if c.rank == rank), key=lambda c: (c.time_ps, c.bytes > 0))


def _by_size(trace: Trace, rank: int) -> list[MemoryChange]:
    """The same, at equal times the smaller first, as recordings have them."""
    return sorted(memory_changes(trace, rank), key=lambda c: (c.time_ps, c.bytes))


def _peak_of_whole(trace: Trace, rank: int, static: int) -> Peak:
    peak, total = Peak(rank, static, 0, None), static
    for change in _by_size(trace, rank):
        total += change.bytes
        if total > peak.bytes:
            peak = Peak(rank, total, change.time_ps, change.task)
    return peak


class Profile(NamedTuple):
    """The memory of one rank over some nodes, from what is there before them."""

    highest: int
    time_ps: int
    task: int
    """Whose allocation reaches the highest point."""
    total: int
    """What is there after them."""


def _peak(trace: Trace, rank: int, static: int) -> Peak:
    found = profile(trace.nodes, rank)
    if found is None or found.highest <= 0:
        return Peak(rank, static, 0, None)
    return Peak(rank, static + found.highest, found.time_ps, found.task)


def profile(nodes: Sequence[Node], rank: int) -> Profile | None:
    """Walks the nodes that the rank takes part in. Of runs that keep something the last is the fullest, otherwise
    the first.
    """
    found: Profile | None = None
    base = 0
    for node in nodes:
        one = profile_of_run(node, rank)
        if one is None:
            continue
        base += _size(node.ends[0], node.brings)
        fullest = node.runs - 1 if one.total > 0 else 0
        highest = base + fullest * one.total + one.highest
        base += node.runs * one.total - _size(node.ends[1], node.drops)
        if found is None or highest > found.highest:
            move = node.move
            found = Profile(highest, one.time_ps + fullest * move.shift_ps, one.task + fullest * move.tasks, base)
        else:
            found = found._replace(total=base)
    return found


def profile_of_run(node: Node, rank: int) -> Profile | None:
    """Of the first run of a node, without what it gets from outside."""
    if isinstance(node, Repeat):
        return profile(node.body, rank)
    if rank not in node.recording.times:
        return None
    fullest = node.recording.fullest[rank]
    return Profile(fullest.bytes, node.shift_ps + fullest.time_ps, node.first_task + fullest.task, fullest.total)


def _size(stretch: Stretch, buffers: Sequence[int]) -> int:
    return stretch.recording.size(buffers)


def first_above(trace: Trace, rank: int, static: int, limit: int) -> int | None:
    """The first task whose allocation takes a rank above `limit` bytes."""
    if not trace.overlapping:
        return _first_above(trace.nodes, rank, limit - static)
    changes = _by_size(trace, rank)
    totals = islice(accumulate((change.bytes for change in changes), initial=static), 1, None)
    return next((change.task for change, total in zip(changes, totals, strict=True) if total > limit), None)


def _first_above(nodes: Sequence[Node], rank: int, room: int) -> int | None:
    for node in nodes:
        one = profile_of_run(node, rank)
        if one is None:
            continue
        room -= _size(node.ends[0], node.brings)
        run = max(0, (room - one.highest) // one.total + 1) if one.total > 0 else 0
        left = room - run * one.total
        if run < node.runs and one.highest > left:
            return _first_of_run(node, rank, left) + run * node.move.tasks
        room -= node.runs * one.total - _size(node.ends[1], node.drops)
    return None


def _first_of_run(node: Node, rank: int, room: int) -> int:
    """In the first run of a node, which needs more than `room`."""
    if isinstance(node, Repeat):
        task = _first_above(node.body, rank, room)
        assert task is not None
        return task
    return node.first_task + node.recording.first_above(rank, room)
