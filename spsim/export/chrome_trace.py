"""Traces for Perfetto and chrome://tracing.

A process is a rank, a thread a lane, a flow joins the ranks of one collective. Perfetto takes a thread whose number is
that of a process for its first one, and threads of one number in two processes for one thread: so no two numbers are
equal, and none is 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from spsim.engine.recording import TaskInfo
from spsim.export.events import Event, complete, process, thread, write_events
from spsim.export.slices import Slice, Slices, nanoseconds
from spsim.results.filling import curve
from spsim.results.result import Result
from spsim.results.selection import Selection, lane_order
from spsim.units import GIB, NS_PER_US

POINTS = 4000
"""Moments of the memory of all ranks together, about, outside the layers that are written out."""


def write_chrome_trace(result: Result, path: Path, selection: Selection) -> None:
    """Write the events of a selection, compressed if the name ends in `.gz`; the same result gives the same bytes."""
    scenario = result.scenario
    about = {"model": scenario.model.name, "hardware": scenario.hardware.name, "plan": scenario.plan.label}
    head = {"displayTimeUnit": "ms", "otherData": {**about, "selection": selection.words}}
    write_events(path, head, events(result, selection))


def events(result: Result, selection: Selection) -> Iterator[Event]:
    """Rank by rank its lanes, slices and memory; then the flows. Times in microseconds, memory in GiB."""
    numbers = _Numbers(result.scenario.plan.gpus, lane_order(result.trace))
    slices = Slices(result, selection)
    flows = _Flows(result, numbers)
    for rank in selection.ranks:
        own = list(slices.of(rank))
        yield from process(numbers.process(rank), f"rank {rank}", rank)
        present = {shown.span.lane for shown in own}
        for place, lane in enumerate(numbers.lanes):
            if lane in present:
                yield from thread(numbers.process(rank), numbers.thread(rank, lane), lane, place)
        for shown in own:
            yield _slice(shown, numbers.process(rank), numbers.thread(rank, shown.span.lane))
            flows.see(rank, shown)
        yield from _memory(result, selection, rank, numbers.process(rank))
    yield from flows.events()


@dataclass(frozen=True)
class _Numbers:
    """Numbers of processes and threads, the same whatever is selected."""

    gpus: int
    lanes: Sequence[str]

    def process(self, rank: int) -> int:
        return rank + 1

    def thread(self, rank: int, lane: str) -> int:
        return self.gpus + 1 + rank * len(self.lanes) + self.lanes.index(lane)


def _slice(shown: Slice, pid: int, tid: int) -> Event:
    info = shown.info
    name = f"{info.collective} for {info.name}" if info.collective else info.name
    event = complete(name, info.operator_class, shown.start_ns, shown.end_ns, pid, tid)
    return {**event, "args": shown.arguments}


def _memory(result: Result, selection: Selection, rank: int, pid: int) -> Iterator[Event]:
    """All that tensors take, beside the capacity of the device: a moment each time that it changes in the layers that
    are written out, and of the others the fullest.
    """
    trace = result.trace
    always = result.statics[selection.ranks[rank]].total
    resolution = trace.end_ps * len(selection.ranks) // POINTS
    moments = curve(trace, selection.ranks[rank], selection.windows, resolution)
    settled = {nanoseconds(moment.time_ps): sum(moment.sizes.values()) for moment in moments}
    for time_ns, held in settled.items():
        sizes = {"total": (always + held) / GIB, "capacity": result.capacity_gib}
        yield {"name": "memory (GiB)", "ph": "C", "pid": pid, "ts": time_ns / NS_PER_US, "args": sizes}


class _Flows:
    """Arrows between the ranks of a group, or from each sender to its receiver, one number for each."""

    def __init__(self, result: Result, numbers: _Numbers) -> None:
        self._group = cache(lambda axis, rank: result.trace.groups[axis][rank])
        self.numbers = numbers
        self.calls: dict[int, tuple[TaskInfo, dict[int, Slice]]] = {}
        """Task -> what it is, and its slice on each rank."""

    def see(self, rank: int, shown: Slice) -> None:
        """Remember a slice that is written out, if it is a communication."""
        if shown.info.collective:
            self.calls.setdefault(shown.span.task, (shown.info, {}))[1][rank] = shown

    def events(self) -> Iterator[Event]:
        """Of all that was seen, in order of tasks."""
        number = 0
        for _, (info, own) in sorted(self.calls.items()):
            for group in dict.fromkeys(self._group(info.axis, rank) for rank in own):
                for chain in _chains(info, group):
                    shown = {rank: own[rank] for rank in chain if rank in own}
                    points = _points([*shown.values()])
                    if len(points) > 1:
                        number += 1
                        yield from self._flow(number, info, shown, points)

    def _flow(self, number: int, info: TaskInfo, shown: dict[int, Slice], points: Sequence[int]) -> Iterator[Event]:
        last = len(points) - 1
        for place, (rank, time_ns) in enumerate(zip(shown, points, strict=True)):
            phase = "s" if place == 0 else "f" if place == last else "t"
            event = {
                "name": info.collective, "cat": "flow", "ph": phase, "id": number, "pid": self.numbers.process(rank),
                "tid": self.numbers.thread(rank, shown[rank].span.lane), "ts": time_ns / NS_PER_US,
            }  # fmt: skip
            # Without it the arrow would end at the next slice of the lane instead of the one around it.
            yield event | {"bp": "e"} if phase == "f" else event


def _chains(info: TaskInfo, group: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Ranks that an arrow visits: the whole group, or each neighbour pair of a ring."""
    if info.collective != "send_receive":
        return [group]
    return [(rank, group[(place + 1) % len(group)]) for place, rank in enumerate(group)]


def _points(shown: Sequence[Slice]) -> list[int]:
    """Times of an arrow inside its slices, never backwards; none if there is no such arrow.

    On a ring a slice starts when both neighbours are there, so a message may reach its receiver before the
    sender's slice starts: a viewer could not draw that arrow.
    """
    points: list[int] = []
    for own in shown:
        points.append(max(points[-1], (own.start_ns + own.end_ns) // 2) if points else own.start_ns)
        if points[-1] >= own.end_ns:
            return []
    return points
