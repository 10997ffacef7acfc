"""The event engine: in-order lanes, rendezvous, contention for the device, memory. The only clock.

It knows tasks with durations, not transformers. Each lane of a rank is one simpy process that walks its
tasks in order, as a CUDA stream does; a dependency on another lane is an event, and a communication is a
rendezvous of the ranks that take part. Time is integer picoseconds.

While a communication is posted on a rank, its computation runs at `1 - slowdown` of its rate: the
collective holds part of the device, also while it waits for its peers.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import simpy

from spsim.trace import MemoryChange, Span

PPM = 10**6


@dataclass(frozen=True, slots=True)
class Meeting:
    """A rendezvous: `parties` tasks with the same key must have been posted before any can proceed."""

    key: tuple[int, ...]
    parties: int


@dataclass(frozen=True, slots=True)
class Allocation:
    """Memory written by a task; it lives until the last of its readers ends."""

    buffer: int
    bytes: int
    category: str
    tensor: str


@dataclass(frozen=True, slots=True)
class Task:
    """One item of a lane. A task with meetings is a communication: its duration starts when all have met."""

    id: int
    lane: str
    duration_ps: int
    needs: tuple[int, ...] = ()
    """Tasks of the same rank that must have ended; those of the same lane are implied by its order."""
    meetings: tuple[Meeting, ...] = ()
    allocates: tuple[Allocation, ...] = ()
    reads: tuple[int, ...] = ()
    """Buffers read; one entry per reading."""


class DeadlockError(RuntimeError):
    """No task can proceed; the message names the ones that wait."""


class _Rank:
    """State of one rank: finished tasks, contention, memory."""

    def __init__(self, env: Any, rank: int, tasks: Sequence[Task]) -> None:
        self.env = env
        self.rank = rank
        self.lanes: dict[str, list[Task]] = {}
        self.lane_of: dict[int, str] = {}
        for task in tasks:
            self.lanes.setdefault(task.lane, []).append(task)
            self.lane_of[task.id] = task.lane
        awaited = {need for task in tasks for need in task.needs if self.lane_of[need] != task.lane}
        self.ended: dict[int, simpy.Event] = {need: env.event() for need in awaited}
        self.readers: dict[int, int] = {}
        for task in tasks:
            for buffer in task.reads:
                self.readers[buffer] = self.readers.get(buffer, 0) + 1
        self.live: dict[int, Allocation] = {}
        self.posted = 0
        self.held_since = 0
        self.held_total = 0
        self.held_until = 0

    def held(self) -> int:
        """Time so far during which a communication was posted."""
        return self.held_total + (self.env.now - self.held_since if self.posted else 0)

    def post(self) -> None:
        if not self.posted:
            self.held_since = self.env.now
        self.posted += 1

    def withdraw(self) -> None:
        self.posted -= 1
        if not self.posted:
            self.held_total += self.env.now - self.held_since


class _Run:
    """One run: the ranks, the open rendezvous, and what is recorded."""

    def __init__(self, programs: Mapping[int, Sequence[Task]], slowdown_ppm: int) -> None:
        self.env: Any = simpy.Environment()  # simpy's clock is int | float, ours is int
        self.slowdown = slowdown_ppm
        self.ranks = [_Rank(self.env, rank, tasks) for rank, tasks in programs.items()]
        self.met: dict[tuple[int, ...], simpy.Event] = {}
        self.arrived: dict[tuple[int, ...], int] = {}
        self.spans: list[Span] = []
        self.memory: list[MemoryChange] = []
        self.waiting: dict[tuple[int, str], Task] = {}

    def start(self) -> None:
        for rank in self.ranks:
            for lane, tasks in rank.lanes.items():
                self.env.process(self._lane(rank, lane, tasks))
        self.env.run()
        if self.waiting:
            names = ", ".join(
                f"task {task.id} on lane {lane} of rank {rank}" for (rank, lane), task in self.waiting.items()
            )
            raise DeadlockError(f"deadlock: {names} wait for tasks that never end")

    def _lane(self, rank: _Rank, lane: str, tasks: list[Task]) -> Generator[simpy.Event, Any, None]:
        place = (rank.rank, lane)
        for task in tasks:
            self.waiting[place] = task
            for need in task.needs:
                event = rank.ended.get(need)
                if event is not None and not event.triggered and rank.lane_of[need] != lane:
                    yield event
            posted = self.env.now
            self._allocate(rank, task)
            start = posted
            if task.meetings:
                start = yield from self._communicate(rank, task)
            else:
                yield from self._compute(rank, task)
            self.spans.append(Span(rank.rank, lane, task.id, posted, start, self.env.now))
            self._release(rank, task)
            if task.id in rank.ended:
                rank.ended[task.id].succeed()
        self.waiting.pop(place, None)

    def _compute(self, rank: _Rank, task: Task) -> Generator[simpy.Event, Any, None]:
        """Work through the duration; time lost to contention is known only as it happens, so look again."""
        env, start, held_before = self.env, self.env.now, rank.held()
        while True:
            elapsed, held = env.now - start, rank.held() - held_before
            remaining = (task.duration_ps - elapsed) * PPM + held * self.slowdown
            if remaining <= 0:
                return
            yield env.timeout(self._earliest_end(rank, remaining))

    def _earliest_end(self, rank: _Rank, remaining: int) -> int:
        """Picoseconds until `remaining` millionths of a picosecond of work can be done: never too long, since
        a communication whose peers have met holds the device until a known time, and any other may end now.
        """
        window = rank.held_until - self.env.now if rank.posted else 0
        if window <= 0:
            return _ceil(remaining, PPM)
        rate = PPM - self.slowdown
        contended = _ceil(remaining, rate)
        return contended if contended <= window else window + _ceil(remaining - window * rate, PPM)

    def _communicate(self, rank: _Rank, task: Task) -> Generator[simpy.Event, Any, int]:
        """Meet the peers; a transfer takes the duration from its meeting on, and the last one ends the task."""
        rank.post()
        for meeting in task.meetings:
            arrived = self.arrived.get(meeting.key, 0) + 1
            self.arrived[meeting.key] = arrived
            event = self.met.setdefault(meeting.key, self.env.event())
            if arrived == meeting.parties:
                event.succeed(self.env.now)
        met: list[int] = []
        for meeting in task.meetings:
            event = self.met[meeting.key]
            met.append(event.value if event.triggered else (yield event))
        end = max(met) + task.duration_ps
        rank.held_until = max(rank.held_until, end)
        yield self.env.timeout(end - self.env.now)
        rank.withdraw()
        return min(met)

    def _allocate(self, rank: _Rank, task: Task) -> None:
        for allocation in task.allocates:
            rank.live[allocation.buffer] = allocation
            self._record(rank, task, allocation, allocation.bytes)

    def _release(self, rank: _Rank, task: Task) -> None:
        """Free what nobody will read any more: buffers read for the last time, and results without readers."""
        for buffer in task.reads:
            rank.readers[buffer] -= 1
            if not rank.readers[buffer] and buffer in rank.live:
                allocation = rank.live.pop(buffer)
                self._record(rank, task, allocation, -allocation.bytes)
        for allocation in task.allocates:
            if not rank.readers.get(allocation.buffer) and allocation.buffer in rank.live:
                del rank.live[allocation.buffer]
                self._record(rank, task, allocation, -allocation.bytes)

    def _record(self, rank: _Rank, task: Task, allocation: Allocation, size: int) -> None:
        self.memory.append(MemoryChange(self.env.now, rank.rank, size, allocation.category, allocation.tensor, task.id))


def run(programs: Mapping[int, Sequence[Task]], *, slowdown: float) -> tuple[list[Span], list[MemoryChange]]:
    """Run the tasks of each rank to the end; `slowdown` is the share of its rate that compute loses.

    Raises `DeadlockError` when tasks wait for each other or for a peer that never comes.
    """
    simulation = _Run(programs, round(slowdown * PPM))
    simulation.start()
    return simulation.spans, simulation.memory


def _ceil(numerator: int, denominator: int) -> int:
    return -(-numerator // denominator)
