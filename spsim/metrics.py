"""Numbers and tables from a trace: pure functions of its records.

A trace is made of pieces, many of which share a recording, so sums are over recordings and their number.
"""

from __future__ import annotations

from itertools import accumulate, islice
from typing import NamedTuple

import numpy as np
import pandas as pd

from spsim import measured
from spsim.recording import MemoryChange, Recording
from spsim.trace import Phase, Trace
from spsim.units import GIB, MIB, PS_PER_MS, PS_PER_US

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


def _whole(trace: Trace, rank: int) -> list[MemoryChange]:
    """All memory changes of a rank in order of time."""
    return sorted((c for c in trace.memory if c.rank == rank), key=lambda c: (c.time_ps, c.bytes > 0))


def _peak_of_whole(trace: Trace, rank: int, static: int) -> Peak:
    peak, total = Peak(rank, static, 0, None), static
    for change in _whole(trace, rank):
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
        totals = accumulate((change.bytes for change in _whole(trace, rank)), initial=static)
        tasks = (c.task for c, total in zip(_whole(trace, rank), islice(totals, 1, None), strict=True) if total > limit)
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


def spans_frame(trace: Trace) -> pd.DataFrame:
    """One row per span and rank, times in microseconds; every rank has its rows, simulated or identical."""
    rows = [
        {
            "rank": rank, "lane": span.lane, "name": info.name, "operator_class": info.operator_class,
            "part": info.part, "purpose": info.purpose, "layer": info.layer, "micro_batch": info.micro_batch,
            "collective": info.collective, "axis": info.axis, "message_bytes": info.message_bytes,
            "posted_us": span.posted_ps / PS_PER_US, "start_us": span.start_ps / PS_PER_US,
            "end_us": span.end_ps / PS_PER_US, "duration_us": (span.end_ps - span.start_ps) / PS_PER_US,
        }
        for span in trace.spans
        for info in (trace.tasks[span.task],)
        for rank in trace.copies.get(span.rank, (span.rank,))
    ]  # fmt: skip
    frame = pd.DataFrame(rows)
    if frame.empty:
        return frame
    frame[["layer", "micro_batch"]] = frame[["layer", "micro_batch"]].astype("Int64")
    return frame.sort_values(["rank", "posted_us", "lane", "end_us"], kind="stable", ignore_index=True)


def memory_frame(trace: Trace, static: dict[str, int]) -> pd.DataFrame:
    """The memory curve: one row per change and rank, a column of GiB per category, their total, and the
    operator whose task changed it.
    """
    frames = [_rank_memory(trace, rank, static) for rank in trace.copies]
    parts = [
        frame.assign(rank=copy) for rank, frame in zip(trace.copies, frames, strict=True) for copy in trace.copies[rank]
    ]
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()


def _rank_memory(trace: Trace, rank: int, static: dict[str, int]) -> pd.DataFrame:
    changes = _whole(trace, rank)
    frame = pd.DataFrame(
        {
            "rank": rank,
            "time_us": [0.0, *(c.time_ps / PS_PER_US for c in changes)],
            "operator": ["", *(trace.tasks[c.task].name for c in changes)],
        }
    )
    for category, size in static.items():
        frame[f"{category}_gib"] = size / GIB
    for category in ("activations", "communication buffers", "temporary"):
        sizes = [0, *(c.bytes if c.category == category else 0 for c in changes)]
        frame[f"{category.replace(' ', '_')}_gib"] = np.cumsum(sizes) / GIB
    frame["total_gib"] = frame.filter(like="_gib").sum(axis=1)
    return frame


def operators_frame(trace: Trace, rank: int = 0) -> pd.DataFrame:
    """Time, calls and FLOPs of one simulated rank by operator and part over the step, longest first."""
    totals: dict[tuple[str, str, str, str], list[int]] = {}
    for recording, infos, count in trace.described():
        for span in recording.spans:
            if span.rank != rank:
                continue
            info = infos[span.task]
            label = f"{info.collective} for {info.name}" if info.collective not in ("", info.name) else info.name
            entry = totals.setdefault((label, info.part, info.operator_class, span.lane), [0, 0, 0, 0])
            for index, value in enumerate((span.end_ps - span.start_ps, 1, info.flops, info.sent_bytes)):
                entry[index] += count * value
    rows = [
        {
            "operator": name, "part": part, "operator_class": kind, "lane": lane, "time_ms": time / PS_PER_MS,
            "calls": calls, "gflop": flops / 1e9, "sent_mib": sent / MIB,
        }
        for (name, part, kind, lane), (time, calls, flops, sent) in totals.items()
    ]  # fmt: skip
    return pd.DataFrame(rows).sort_values("time_ms", ascending=False, kind="stable", ignore_index=True)
