"""Numbers from a trace: pure functions of its records.

A trace is made of pieces, many of which share a recording, so sums are over recordings and their number.
"""

from __future__ import annotations

from itertools import accumulate, islice
from typing import NamedTuple

from spsim.engine.recording import MemoryChange, Recording
from spsim.engine.trace import Phase, Trace
from spsim.results import measured

BACKWARD_PARTS = ("recompute", "dgrad", "wgrad", "backward", "accumulate")


def phase_of(part: str) -> str:
    """`forward`, `backward` (with recomputation) or `weight_sync` of a task's part."""
    return "backward" if part in BACKWARD_PARTS else part


def layer_window(trace: Trace, phase: Phase, *, layer: int | None = 0, micro_batch: int = 0) -> int:
    """Picoseconds from the first start to the last end, over ranks, of one layer's forward or backward pass.

    The passes of a measured run belong to no layer: `None`.
    """
    for stretch in trace.stretches:
        if stretch.phase == phase and stretch.micro_batch == micro_batch and layer in stretch.layers:
            return stretch.recording.window
    return 0


def exposed_communication(trace: Trace) -> dict[int, int]:
    """Picoseconds of each simulated rank during which communication is posted and no kernel runs, weight
    synchronisation apart: whenever no kernel runs, the next one waits for a communication.
    """
    if trace.measured:
        return measured.exposed_communication(trace)
    layers = [stretch for stretch in trace.latest if stretch.phase != "weight_sync"]
    return {
        rank: max(stretch.last_ps + stretch.recording.ends[rank] for stretch in layers)
        - sum(count * sum(recording.compute[rank]) for recording, count in _of_layers(trace))
        for rank in trace.copies
    }


def _of_layers(trace: Trace) -> list[tuple[Recording, int]]:
    """Recordings of passes of layers, and the number of pieces that share each."""
    return [(recording, count) for recording, (phase, count) in trace.recordings.items() if phase != "weight_sync"]


def weight_sync(trace: Trace) -> int:
    """Picoseconds of the synchronisation of weight gradients at the end of the step."""
    return sum(recording.window for recording, (phase, _) in trace.recordings.items() if phase == "weight_sync")


def compute_by_class(trace: Trace, rank: int) -> dict[str, int]:
    """Picoseconds of the compute lane of one rank by operator class."""
    if trace.measured:
        return measured.compute_by_class(trace, rank)
    totals: dict[str, int] = {}
    for recording, count in _of_layers(trace):
        for name, time in zip(recording.outline.classes[0], recording.compute[rank], strict=True):
            totals[name] = totals.get(name, 0) + count * time
    return totals


class Peak(NamedTuple):
    """The highest point of the memory of one rank."""

    rank: int
    bytes: int
    time_ps: int
    task: int | None
    """The task that allocated it."""


def peak_memory(trace: Trace, static: int) -> Peak:
    """The fullest rank and moment; `static` bytes are there all the time.

    At equal times memory is freed before it is allocated, so that the order of events does not matter.
    """
    peak_of = _peak_of_whole if trace.overlapping else _peak_of
    return max((peak_of(trace, rank, static) for rank in trace.copies), key=lambda peak: peak.bytes)


def memory_changes(trace: Trace, rank: int) -> list[MemoryChange]:
    """All memory changes of a rank in order of time."""
    return sorted((c for c in trace.memory if c.rank == rank), key=lambda c: (c.time_ps, c.bytes > 0))


def _peak_of_whole(trace: Trace, rank: int, static: int) -> Peak:
    peak, total = Peak(rank, static, 0, None), static
    for change in memory_changes(trace, rank):
        total += change.bytes
        if total > peak.bytes:
            peak = Peak(rank, total, change.time_ps, change.task)
    return peak


def _peak_of(trace: Trace, rank: int, static: int) -> Peak:
    """Walks the stretches. In a stretch of layers that keep something the last one is the fullest, otherwise the
    first.
    """
    peak, base = Peak(rank, static, 0, None), static
    for stretch in trace.stretches:
        recording, layers = stretch.recording, len(stretch.layers)
        most, time, task, total = recording.fullest[rank]
        base += recording.size(stretch.brings)
        fullest = layers - 1 if total > 0 else 0
        if base + fullest * total + most > peak.bytes:
            when = stretch.shift_ps + fullest * stretch.advance_ps + time
            by = stretch.first_task + fullest * len(recording.outline.labels) + task
            peak = Peak(rank, base + fullest * total + most, when, by)
        base += layers * total - recording.size(stretch.drops)
    return peak


def first_above(trace: Trace, rank: int, static: int, limit: int) -> int | None:
    """The first task whose allocation takes a rank above `limit` bytes."""
    base = static
    if trace.overlapping:
        totals = accumulate((change.bytes for change in memory_changes(trace, rank)), initial=static)
        tasks = (
            c.task
            for c, total in zip(memory_changes(trace, rank), islice(totals, 1, None), strict=True)
            if total > limit
        )
        return next(tasks, None)
    for stretch in trace.stretches:
        recording, layers = stretch.recording, len(stretch.layers)
        most, _, _, total = recording.fullest[rank]
        base += recording.size(stretch.brings)
        above = max(0, (limit - base - most) // total + 1) if total > 0 else 0
        room = limit - base - above * total
        if above < layers and most > room:
            return stretch.first_task + above * len(recording.outline.labels) + recording.first_above(rank, room)
        base += layers * total - recording.size(stretch.drops)
    return None
