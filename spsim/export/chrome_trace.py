"""Traces for Perfetto and chrome://tracing.

Format: Trace Event Format (Google, "Trace Event Format", 2016). A process is a rank, a thread a lane, a
flow joins the ranks of one collective. Identical ranks that were simulated once are written out.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from spsim.engine.recording import COMPUTE_LANE, Span, TaskInfo
from spsim.engine.trace import Trace
from spsim.files import whole_file
from spsim.results import tables
from spsim.results.result import Result
from spsim.units import PS_PER_US

Event = dict[str, Any]

LANES = (COMPUTE_LANE, "tp", "ulysses", "ring", "dp")
"""Order of the lanes in pictures and traces."""


def chrome_trace(result: Result) -> dict[str, Any]:
    """The trace as a JSON document; times in microseconds, memory in GiB."""
    trace = result.trace
    spans = _spans_by_rank(trace)
    threads = {lane: index for index, lane in enumerate(lane_order(trace))}
    events = [
        *(event for rank, own in spans.items() for event in _names(rank, own, threads)),
        *(_complete(trace.tasks[s.task], rank, s, threads) for rank, own in spans.items() for s in own),
        *_flows(trace, spans, threads),
        *_counters(result),
    ]
    return {"displayTimeUnit": "ms", "otherData": _about(result), "traceEvents": events}


def write_chrome_trace(result: Result, path: str | Path) -> None:
    """Write `chrome_trace` to a file; the same result gives the same bytes."""
    with whole_file(Path(path)) as temporary:
        temporary.write_text(json.dumps(chrome_trace(result), separators=(",", ":")) + "\n", encoding="utf-8")


def lane_order(trace: Trace) -> list[str]:
    """The lanes of a trace, compute first and lanes without a fixed place last."""
    found = {lane for recording in trace.recordings for lane in recording.outline.lanes}
    return [lane for lane in LANES if lane in found] + sorted(found - set(LANES))


def _spans_by_rank(trace: Trace) -> dict[int, list[Span]]:
    """Spans of every rank, simulated or not, in order of the program: ties in time cannot reorder them."""
    own: dict[int, list[Span]] = {rank: [] for rank in trace.copies}
    for span in sorted(trace.spans, key=lambda s: s.task):
        own[span.rank].append(span)
    simulated = {copy: rank for rank, copies in trace.copies.items() for copy in copies}
    return {rank: own[simulated[rank]] for rank in sorted(simulated)}


def _about(result: Result) -> dict[str, str]:
    scenario = result.scenario
    return {"model": scenario.model.name, "hardware": scenario.hardware.name, "plan": scenario.plan.label}


def _names(rank: int, spans: list[Span], threads: dict[str, int]) -> Iterator[Event]:
    yield _metadata("process_name", rank, 0, {"name": f"rank {rank}"})
    yield _metadata("process_sort_index", rank, 0, {"sort_index": rank})
    present = {span.lane for span in spans}
    for lane, thread in threads.items():
        if lane in present:
            yield _metadata("thread_name", rank, thread, {"name": lane})
            yield _metadata("thread_sort_index", rank, thread, {"sort_index": thread})


def _metadata(name: str, rank: int, thread: int, args: dict[str, Any]) -> Event:
    return {"name": name, "ph": "M", "pid": rank, "tid": thread, "args": args}


def _complete(info: TaskInfo, rank: int, span: Span, threads: dict[str, int]) -> Event:
    return {
        "name": f"{info.collective} for {info.name}" if info.collective else info.name,
        "cat": info.operator_class,
        "ph": "X",
        "pid": rank,
        "tid": threads[span.lane],
        "ts": span.start_ps / PS_PER_US,
        "dur": (span.end_ps - span.start_ps) / PS_PER_US,
        "args": _arguments(info, span),
    }


def _arguments(info: TaskInfo, span: Span) -> dict[str, Any]:
    """What Perfetto shows for a selected span; entries that do not apply are left out."""
    arguments: dict[str, Any] = {"part": info.part}
    if info.layer is not None:
        arguments |= {"layer": info.layer, "micro_batch": info.micro_batch}
    if info.collective:
        arguments |= {
            "purpose": info.purpose,
            "axis": info.axis,
            "message_bytes": info.message_bytes,
            "sent_bytes": info.sent_bytes,
            "wait_us": (span.start_ps - span.posted_ps) / PS_PER_US,
        }
    return arguments


# Flows


def _flows(trace: Trace, spans: dict[int, list[Span]], threads: dict[str, int]) -> Iterator[Event]:
    """Arrows between the ranks of a group, or from each sender to its receiver, one id per arrow chain."""
    at = {(rank, span.task): span for rank, own in spans.items() for span in own}
    identifier = 0
    for task, info in enumerate(trace.tasks):
        if not info.collective:
            continue
        for group in sorted(set(trace.groups[info.axis].values())):
            if (group[0], task) not in at:
                continue
            for chain in _chains(info, group):
                points = _points([at[rank, task] for rank in chain])
                if points:
                    yield from _flow(identifier, info, chain, points, threads[at[chain[0], task].lane])
                    identifier += 1


def _chains(info: TaskInfo, group: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Ranks that an arrow visits: the whole group, or each neighbour pair of a ring."""
    if info.collective != "send_receive":
        return [group]
    return [(rank, group[(place + 1) % len(group)]) for place, rank in enumerate(group)]


def _points(spans: list[Span]) -> list[int]:
    """Times of an arrow inside its spans, never backwards; none if there is no such arrow.

    On a ring a span starts when both neighbours are there, so a message may reach its receiver before the
    sender's span starts: a viewer could not draw that arrow.
    """
    points = [spans[0].start_ps]
    for span in spans[1:]:
        points.append(max(points[-1], (span.start_ps + span.end_ps) // 2))
        if points[-1] > span.end_ps:
            return []
    return points


def _flow(identifier: int, info: TaskInfo, chain: tuple[int, ...], points: list[int], thread: int) -> Iterator[Event]:
    last = len(chain) - 1
    for place, (rank, time) in enumerate(zip(chain, points, strict=True)):
        phase = "s" if place == 0 else "f" if place == last else "t"
        event = {
            "name": info.collective,
            "cat": "flow",
            "ph": phase,
            "id": identifier,
            "pid": rank,
            "tid": thread,
            "ts": time / PS_PER_US,
        }
        # Without it the arrow would end at the next span of the lane instead of the one around it.
        yield event | {"bp": "e"} if phase == "f" else event


# Memory


def _counters(result: Result) -> Iterator[Event]:
    """One event before the first allocation, then one per moment at which memory changed."""
    trace = result.trace
    alone = replace(trace, copies={rank: (rank,) for rank in trace.copies})
    frame = tables.memory_frame(alone, result.static.by_category())
    columns = {
        name: name.removesuffix("_gib").replace("_", " ") + " (GiB)"
        for name in frame.columns
        if name.endswith("_gib") and name != "total_gib"
    }
    samples: dict[int, list[tuple[float, dict[str, float]]]] = {}
    for rank, own in frame.groupby("rank"):
        settled = own[~own["time_us"].duplicated(keep="last") | (own.index == own.index[0])]
        rows = settled[list(columns)].rename(columns=columns).to_dict("records")
        samples[int(str(rank))] = list(zip(settled["time_us"].tolist(), rows, strict=True))
    simulated = {copy: rank for rank, copies in trace.copies.items() for copy in copies}
    for rank in sorted(simulated):
        for time, sizes in samples[simulated[rank]]:
            yield {"name": "memory", "ph": "C", "pid": rank, "tid": 0, "ts": time, "args": sizes}
