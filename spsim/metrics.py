"""Numbers and tables from a trace: pure functions of its records."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from spsim.trace import MemoryChange, Span, Trace
from spsim.units import GIB, PS_PER_S, PS_PER_US

BACKWARD_PARTS = ("recompute", "dgrad", "wgrad", "backward", "accumulate")
COMPUTE_LANE = "compute"


def phase_of(part: str) -> str:
    """`forward`, `backward` (with recomputation) or `weight_sync` of a task's part."""
    return "backward" if part in BACKWARD_PARTS else part


def layer_window(trace: Trace, phase: str, *, layer: int = 0, micro_batch: int = 0) -> int:
    """Picoseconds from the first start to the last end, over ranks, of one layer's forward or backward pass."""
    spans = [s for s in trace.spans if _belongs(trace, s, phase, layer, micro_batch)]
    return max(s.end_ps for s in spans) - min(s.posted_ps for s in spans) if spans else 0


def _belongs(trace: Trace, span: Span, phase: str, layer: int, micro_batch: int) -> bool:
    info = trace.tasks[span.task]
    return info.layer == layer and info.micro_batch == micro_batch and phase_of(info.part) == phase


def _union(intervals: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    merged: list[tuple[int, int]] = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        elif end > start:
            merged.append((start, end))
    return merged


def _length(intervals: Iterable[tuple[int, int]]) -> int:
    return sum(end - start for start, end in intervals)


def exposed(spans: Sequence[Span]) -> int:
    """Picoseconds of one rank during which communication is posted and no kernel runs."""
    compute = _union((s.start_ps, s.end_ps) for s in spans if s.lane == COMPUTE_LANE)
    busy = _union([*compute, *((s.posted_ps, s.end_ps) for s in spans if s.lane != COMPUTE_LANE)])
    return _length(busy) - _length(compute)


def exposed_communication(trace: Trace, purposes: Iterable[str] | None = None) -> dict[int, int]:
    """Exposed communication of each simulated rank, weight synchronisation apart."""
    result = {}
    for rank in trace.copies:
        spans = [s for s in trace.spans if s.rank == rank and trace.tasks[s.task].part != "weight_sync"]
        if purposes is not None:
            keep = set(purposes)
            spans = [s for s in spans if s.lane == COMPUTE_LANE or trace.tasks[s.task].purpose in keep]
        result[rank] = exposed(spans)
    return result


def weight_sync(trace: Trace) -> int:
    """Picoseconds of the synchronisation of weight gradients at the end of the step."""
    spans = [s for s in trace.spans if trace.tasks[s.task].part == "weight_sync"]
    return max(s.end_ps for s in spans) - min(s.posted_ps for s in spans) if spans else 0


def compute_by_class(trace: Trace, rank: int) -> dict[str, int]:
    """Picoseconds of the compute lane of one rank by operator class."""
    totals: dict[str, int] = {}
    for span in trace.spans:
        if span.rank == rank and span.lane == COMPUTE_LANE:
            name = trace.tasks[span.task].operator_class
            totals[name] = totals.get(name, 0) + span.end_ps - span.start_ps
    return totals


@dataclass(frozen=True, slots=True)
class Peak:
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
    peaks = [_peak_of(rank, _in_order(trace.memory, rank), static) for rank in trace.copies]
    return max(peaks, key=lambda peak: peak.bytes)


def _in_order(changes: Sequence[MemoryChange], rank: int) -> list[MemoryChange]:
    return sorted((c for c in changes if c.rank == rank), key=lambda c: (c.time_ps, c.bytes > 0))


def _peak_of(rank: int, changes: list[MemoryChange], static: int) -> Peak:
    if not changes:
        return Peak(rank, static, 0, None)
    totals = np.cumsum([change.bytes for change in changes])
    index = int(np.argmax(totals))
    return Peak(rank, static + int(totals[index]), changes[index].time_ps, changes[index].task)


def first_above(trace: Trace, rank: int, static: int, limit: int) -> int | None:
    """The first task whose allocation takes a rank above `limit` bytes."""
    total = static
    for change in _in_order(trace.memory, rank):
        total += change.bytes
        if total > limit:
            return change.task
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
    changes = _in_order(trace.memory, rank)
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
    """Time, calls and FLOPs of one rank by operator and part over the step, longest first."""
    totals: dict[tuple[str, str, str, str], list[float]] = {}
    for span in trace.spans:
        if span.rank != rank:
            continue
        info = trace.tasks[span.task]
        label = f"{info.collective} for {info.name}" if info.collective else info.name
        entry = totals.setdefault((label, info.part, info.operator_class, span.lane), [0.0, 0.0, 0.0, 0.0])
        entry[0] += (span.end_ps - span.start_ps) / PS_PER_S
        entry[1] += 1
        entry[2] += info.flops
        entry[3] += info.sent_bytes
    rows = [
        {
            "operator": name, "part": part, "operator_class": kind, "lane": lane, "time_ms": values[0] * 1e3,
            "calls": int(values[1]), "gflop": values[2] / 1e9, "sent_mib": values[3] / 2**20,
        }
        for (name, part, kind, lane), values in totals.items()
    ]  # fmt: skip
    return pd.DataFrame(rows).sort_values("time_ms", ascending=False, kind="stable", ignore_index=True)
