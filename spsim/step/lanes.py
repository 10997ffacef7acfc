"""What segments leave undone on the lanes of a rank, and so how the next segment begins."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from spsim.engine.lives import ENDED, Integers
from spsim.engine.recording import Flight, Left, Ran, Recording, columns
from spsim.engine.tasks import Hold, Start
from spsim.step.segments import Segment


class Busy(NamedTuple):
    """What earlier segments left undone on a rank; times count from the end of its kernels."""

    lanes: tuple[tuple[str, int], ...] = ()
    """When lanes are free that are busy beyond it."""
    flights: tuple[Flight, ...] = ()
    """Communications that are posted or under way."""
    ends: tuple[tuple[str, int], ...] = ()
    """When exports arrive that have not."""
    left: tuple[Left, ...] = ()
    """Memory that changes later."""


IDLE = Busy()
State = tuple[tuple[int, Busy], ...]
"""Of each rank, how long after the first its kernels end, and what else is left undone."""


def start(segment: Segment, time: int, busy: Busy) -> Start:
    """How a segment begins on a rank whose kernels end at `time`."""
    if busy is IDLE:
        return Start(time)
    lanes = {lane: time + free for lane, free in busy.lanes}
    return Start(
        max([time, *(lanes[lane] for lane in segment.joins if lane in lanes)]),
        lanes,
        [Hold(time + flight.posted_ps, time + flight.end_ps, flight.slowdown) for flight in busy.flights],
        {name: time + end for name, end in busy.ends},
    )


def record(
    segment: Segment, moments: Mapping[int, Ran], sizes: Sequence[int] | Integers, found: State
) -> tuple[Recording, State]:
    """A segment as it ran on ranks that stood as `found`, and how they stand then."""
    times = {rank: columns(own) for rank, own in moments.items()}
    ends = [end_of(segment, own, time) for own, (time, _) in zip(moments.values(), found, strict=True)]
    ran = [*zip(moments.items(), found, ends, strict=True)]
    until = {rank: end for (rank, own), (_, busy), end in ran if _outlasts(segment, own, end, busy)}
    if not until and not any(time for time, _ in found):
        return Recording(segment.outline, times, sizes), tuple([(end, IDLE) for end in ends])
    recording = Recording(
        segment.outline,
        times,
        sizes,
        begins={rank: time for (rank, _), (time, _), _ in ran},
        flights={rank: [f.moved(time) for f in busy.flights] for (rank, _), (time, busy), _ in ran if busy.flights},
        left={rank: [change.moved(time) for change in busy.left] for (rank, _), (time, busy), _ in ran if busy.left},
        until=until,
    )
    return recording, tuple([
        (end, _left(segment, recording, rank, own, end, *stood) if rank in until else IDLE)
        for (rank, own), stood, end in ran
    ])  # fmt: skip


def end_of(segment: Segment, moments: Ran, time: int) -> int:
    """When the kernels of a rank end after a segment; `time` before it."""
    last = segment.outline.last_kernel
    return time if last is None else int(moments[last][ENDED])


def end_alone(segment: Segment, moments: Ran) -> int | None:
    """When its kernels end on a rank that began at 0 with all lanes free; None where it leaves anything undone."""
    end = end_of(segment, moments, 0)
    return None if _outlasts(segment, moments, end, IDLE) else end


def _outlasts(segment: Segment, moments: Ran, end: int, busy: Busy) -> bool:
    """Whether anything may be left undone when the kernels end."""
    return busy is not IDLE or any(moments[task][ENDED] > end for task in segment.last_calls.values())


def _left(segment: Segment, recording: Recording, rank: int, moments: Ran, end: int, time: int, busy: Busy) -> Busy:
    """What is left undone at the `end` of the kernels of a rank, which stood at `time` as it was."""
    lanes = {lane: time + free for lane, free in busy.lanes}
    lanes |= {lane: int(moments[task][ENDED]) for lane, task in segment.last_calls.items()}
    ends = {name: time + arrival for name, arrival in busy.ends}
    ends |= {name: int(moments[task][ENDED]) for name, task in segment.exports.items()}
    flights = [flight.moved(time) for flight in busy.flights]
    flights += flights_of(segment, moments)
    left = Busy(
        tuple(sorted((lane, free - end) for lane, free in lanes.items() if free > end)),
        _merged(flight.moved(-end) for flight in flights if flight.end_ps > end),
        tuple(sorted((name, arrival - end) for name, arrival in ends.items() if arrival > end)),
        tuple(change.moved(-end, -len(segment.tasks)) for change in recording.changes_after(rank, end)),
    )
    return IDLE if left == IDLE else left


def flights_of(segment: Segment, moments: Ran) -> list[Flight]:
    """The communications of a segment."""
    found = []
    for call in segment.calls:
        task, (posted, start, end) = segment.tasks[call], map(int, moments[call])
        found.append(Flight(task.lane, posted, start, end, segment.labels[call].kind, task.slowdown))
    return found


def _merged(flights: Iterable[Flight]) -> tuple[Flight, ...]:
    """Flights as far as they matter from now on: what is behind is left out, and those of a lane and kind that follow
    each other without waiting are one.
    """
    found: dict[str, list[Flight]] = {}
    for known in sorted(flights, key=lambda flight: flight[:4]):
        flight = known._replace(posted_ps=max(0, known.posted_ps), start_ps=max(0, known.start_ps))
        own = found.setdefault(flight.lane, [])
        if own and _continues(flight, own[-1]):
            own[-1] = own[-1]._replace(end_ps=flight.end_ps)
        else:
            own.append(flight)
    return tuple(flight for own in found.values() for flight in own)


def _continues(flight: Flight, last: Flight) -> bool:
    """Whether a flight begins as the last one of its lane ends, is of its kind, and neither waits."""
    waits = last.posted_ps < last.start_ps or flight.posted_ps < flight.start_ps
    return flight[4:] == last[4:] and flight.posted_ps == last.end_ps and not waits
