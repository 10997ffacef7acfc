"""Lanes that fall behind for ever: a loop whose runs differ only in when such lanes are free.

A lane is behind throughout a run if it is busy with earlier runs until the run ends, or until its own communications
queue, and nobody waits for it. Kernels then find the device held all the time, and the lane's own communications
follow each other from when it is free: it does not matter to the run how far behind it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from spsim.engine.lives import ENDED, POSTED
from spsim.engine.pieces import Node, Repeat
from spsim.engine.recording import Flight
from spsim.step.itinerary import Loop, segments_of
from spsim.step.lanes import Busy, State


def drift(loop: Loop, nodes: Sequence[Node], before: State, now: State, length: int) -> dict[str, int]:
    """By how much more each lane is behind after a run of a loop, from the states around it and how long it took;
    nothing unless the next run will be the same but for that.
    """
    found = [_late(own, other) for own, other in zip(before, now, strict=True)]
    lanes = found[0]
    if not lanes or any(other != lanes for other in found):
        return {}
    awaited = frozenset[str]().union(*(segment.awaited for segment in segments_of(loop.body)))
    behind = all(
        lane not in awaited and all(_is_behind(lane, nodes, rank, own[1], length) for rank, own in enumerate(before))
        for lane in lanes
    )
    return lanes if behind else {}


def runs_of(lanes: Mapping[str, int], now: State, length: int, runs: int) -> int:
    """How many of the next runs begin with all these lanes behind: fewer than all where a lane catches up."""
    for lane, more in lanes.items():
        if more < 0:
            least = min(dict(busy.lanes)[lane] for _, busy in now)
            runs = min(runs, max(0, (least - length) // -more + 1) if least >= length else 0)
    return runs


def later(busy: Busy, lanes: Mapping[str, int]) -> Busy:
    """The same after runs in which lanes have fallen behind further; of memory the whole trace knows."""
    if not lanes:
        return busy
    free = tuple((lane, time + lanes.get(lane, 0)) for lane, time in busy.lanes)
    return busy._replace(lanes=free, flights=tuple(flight.longer(lanes) for flight in busy.flights), left=())


def _late(before: tuple[int, Busy], now: tuple[int, Busy]) -> dict[str, int]:
    """By how much more lanes are behind where two states differ in nothing else."""
    (skew, busy), (skew_now, busy_now) = before, now
    free, free_now = dict(busy.lanes), dict(busy_now.lanes)
    if skew != skew_now or free.keys() != free_now.keys() or busy.ends != busy_now.ends:
        return {}
    lanes = {lane: free_now[lane] - free[lane] for lane in free if free[lane] != free_now[lane]}
    rest, rest_now = (_without(own, lanes) for own in (busy, busy_now))
    return lanes if rest == rest_now and all(_is_whole(lane, busy_now) for lane in lanes) else {}


def _is_whole(lane: str, busy: Busy) -> bool:
    """Whether one communication, or equal ones in a row, keep a lane busy from now until it is free."""
    own = [(flight.posted_ps, flight.start_ps, flight.end_ps) for flight in busy.flights if flight.lane == lane]
    return bool(own) and own == [(0, 0, free) for name, free in busy.lanes if name == lane]


def _without(busy: Busy, lanes: Mapping[str, int]) -> Sequence[Flight]:
    return [flight for flight in busy.flights if flight.lane not in lanes]


def _is_behind(lane: str, nodes: Sequence[Node], place: int, busy: Busy, length: int) -> bool:
    """Whether a lane was behind throughout a run that found it as `busy`."""
    free = dict(busy.lanes).get(lane, 0)
    if not _is_whole(lane, busy):
        return False
    return free >= length or _queues(lane, nodes, place, free)


def _queues(lane: str, nodes: Sequence[Node], place: int, free: int) -> bool:
    """Whether the communications of a run follow each other from when the lane is free, and leave it busy."""
    origin, last = nodes[0].shift_ps, free
    moments = list(_moments(lane, nodes, place))
    if not moments:
        return False
    for shift, posted, ended in moments:
        if shift - origin + posted != last:
            return False
        last = shift - origin + ended
    return True


def _moments(lane: str, nodes: Sequence[Node], place: int) -> Iterator[tuple[int, int, int]]:
    """(shift, posted, ended) of the communications of a lane, where no node repeats anything."""
    for node in nodes:
        if isinstance(node, Repeat) or node.runs > 1:
            yield 0, -1, -1
            continue
        times = list(node.recording.times.values())[place]
        for task, own in enumerate(node.recording.outline.lanes):
            if own == lane:
                yield node.shift_ps, int(times[task, POSTED]), int(times[task, ENDED])
