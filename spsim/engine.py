"""The event engine: in-order lanes, rendezvous, contention for the device. The only clock.

It knows tasks with durations, not transformers. Each lane of a rank is one simpy process that walks its
tasks in order, as a CUDA stream does; a dependency on another lane is an event, and a communication is a
rendezvous of the ranks that take part. Time is integer picoseconds.

While a communication is posted on a rank, its computation runs at `1 - slowdown` of its rate: the
collective holds part of the device, also while it waits for its peers.

Kernels that nothing can interrupt are advanced together: a run ends with a kernel that another lane waits
for, and begins anew with one that waits for another lane.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

import simpy

from spsim.trace import Span

PPM = 10**6


@dataclass(frozen=True, slots=True)
class Meeting:
    """A rendezvous: `parties` tasks with the same key must have been posted before any can proceed."""

    key: tuple[int, ...]
    parties: int


@dataclass(frozen=True, slots=True)
class Task:
    """One item of a lane. A task with meetings is a communication: its duration starts when all have met."""

    id: int
    lane: str
    duration_ps: int = 0
    """Unless a run gives its own durations."""
    needs: tuple[int, ...] = ()
    """Tasks of the same rank that must have ended; those of the same lane are implied by its order."""
    meetings: tuple[Meeting, ...] = ()


class DeadlockError(RuntimeError):
    """No task can proceed; the message names the ones that wait."""


class _Run:
    """Consecutive kernels of a lane that are advanced together, or one communication."""

    __slots__ = ("last", "meetings", "needs", "parties", "tasks")

    def __init__(self, tasks: Sequence[Task], needs: tuple[int, ...]) -> None:
        self.tasks = tuple(tasks)
        self.needs = needs
        """Tasks of other lanes that the first one waits for."""
        self.last = tasks[-1].id
        self.meetings = tasks[0].meetings
        self.parties = max((meeting.parties for meeting in self.meetings), default=0)


class RankProgram:
    """The tasks of one rank, sorted into lanes; made once for many runs with different durations."""

    def __init__(self, tasks: Sequence[Task]) -> None:
        self.tasks = tasks
        self.lane_of = {task.id: task.lane for task in tasks}
        self.awaited = frozenset(n for task in tasks for n in task.needs if self.lane_of[n] != task.lane)

    @cached_property
    def lanes(self) -> dict[str, list[_Run]]:
        """Runs of each lane, in order."""
        lanes: dict[str, list[list[Task]]] = {}
        for task in self.tasks:
            runs = lanes.setdefault(task.lane, [])
            alone = not runs or task.meetings or runs[-1][-1].meetings or self._foreign(task)
            if alone or runs[-1][-1].id in self.awaited:
                runs.append([])
            runs[-1].append(task)
        return {lane: [_Run(run, self._foreign(run[0])) for run in runs] for lane, runs in lanes.items()}

    def _foreign(self, task: Task) -> tuple[int, ...]:
        return tuple(need for need in task.needs if self.lane_of[need] != task.lane)


class _Rank:
    """State of one rank: what has ended, and when communications held the device."""

    __slots__ = (
        "durations", "ended", "env", "held_last", "held_since", "held_until", "holds", "num_posts", "posted",
        "program", "rank",
    )  # fmt: skip

    def __init__(self, env: Any, rank: int, program: RankProgram, durations: Sequence[int] | None) -> None:
        self.env = env
        self.rank = rank
        self.program = program
        self.ended: dict[int, simpy.Event] = {need: env.event() for need in program.awaited}
        self.durations = {task.id: task.duration_ps for task in program.tasks} if durations is None else durations
        self.posted = 0
        self.num_posts = 0
        self.held_since = 0
        self.held_until = 0
        self.held_last = 0
        self.holds: list[tuple[int, int]] = []

    def post(self, now: int) -> None:
        """A communication takes hold of the device."""
        if not self.posted:
            self.held_since = now
        self.posted += 1
        self.num_posts += 1

    def withdraw(self, now: int) -> None:
        """A communication ends; the device is free when none is left."""
        self.posted -= 1
        if not self.posted:
            self.holds.append((self.held_since, now))
            self.held_last = now

    def known_holds(self, since: int) -> list[tuple[int, int]]:
        """When the device has been held from `since` on, and will be as far as is known now: a communication
        whose peers have met holds until a known time, and any other may end this moment.
        """
        known = [hold for hold in self.holds if hold[1] > since]
        if self.posted:
            known.append((self.held_since, max(self.held_until, self.env.now)))
        return known


class _Simulation:
    """One run: the ranks, the open rendezvous, and what is recorded."""

    def __init__(self, slowdown_ppm: int) -> None:
        self.env: Any = simpy.Environment()  # simpy's clock is int | float, ours is int
        self.slowdown = slowdown_ppm
        self.met: dict[tuple[int, ...], simpy.Event] = {}
        self.arrived: dict[tuple[int, ...], int] = {}
        self.spans: list[Span] = []
        self.waiting: dict[tuple[int, str], Task] = {}

    def add(self, rank: _Rank, start: int) -> None:
        for lane, runs in rank.program.lanes.items():
            self.env.process(self._lane(rank, lane, runs, start))

    def finish(self) -> None:
        self.env.run()
        if self.waiting:
            places = (f"task {task.id} on lane {lane} of rank {rank}" for (rank, lane), task in self.waiting.items())
            raise DeadlockError(f"deadlock: {', '.join(places)} wait for tasks that never end")

    def _lane(self, rank: _Rank, lane: str, runs: list[_Run], start: int) -> Generator[simpy.Event, Any, None]:
        place, ended = (rank.rank, lane), rank.ended
        if start:
            yield self.env.timeout(start)
        for run in runs:
            for need in run.needs:
                if not ended[need].triggered:
                    self.waiting[place] = run.tasks[0]
                    yield ended[need]
            if run.meetings:
                yield from self._communicate(rank, run)
            else:
                yield from self._compute(rank, run)
            if run.last in ended:
                ended[run.last].succeed()
        self.waiting.pop(place, None)

    def _compute(self, rank: _Rank, run: _Run) -> Generator[simpy.Event, Any, None]:
        """Work through a run; time lost to contention is known only as it happens, so look again at its end."""
        env, start = self.env, self.env.now
        durations = [rank.durations[task.id] for task in run.tasks]
        undisturbed = False
        while not undisturbed:
            ends = self._ends(rank, start, durations)
            now, free, posts = env.now, not rank.posted, rank.num_posts
            if ends[-1] <= now:
                break
            yield env.timeout(ends[-1] - now)
            undisturbed = free and rank.num_posts == posts
        begin = start
        for task, end in zip(run.tasks, ends, strict=True):
            self.spans.append(Span(rank.rank, task.lane, task.id, begin, begin, end))
            begin = end

    def _ends(self, rank: _Rank, start: int, durations: list[int]) -> list[int]:
        """When each kernel of a run ends if nothing more is posted: never too late."""
        if self.slowdown and (rank.posted or rank.held_last > start):
            holds, rate, ends = rank.known_holds(start), PPM - self.slowdown, []
            for duration in durations:
                start = _work_through(start, duration * PPM, holds, rate)
                ends.append(start)
            return ends
        return [start + elapsed for elapsed in accumulate(durations)]

    def _communicate(self, rank: _Rank, run: _Run) -> Generator[simpy.Event, Any, None]:
        """Meet the peers; a transfer takes the duration from its meeting on, and the last one ends the task."""
        env, task, posted = self.env, run.tasks[0], self.env.now
        rank.post(posted)
        met = [posted]
        if run.parties > 1:
            for meeting in run.meetings:
                self._arrive(meeting)
            met = []
            for meeting in run.meetings:
                event = self.met.get(meeting.key)
                if event is not None and not event.triggered:
                    self.waiting[rank.rank, task.lane] = task
                    yield event
                met.append(posted if event is None else event.value)
        end = max(met) + rank.durations[task.id]
        rank.held_until = max(rank.held_until, end)
        yield env.timeout(end - env.now)
        rank.withdraw(end)
        self.spans.append(Span(rank.rank, task.lane, task.id, posted, min(met), end))

    def _arrive(self, meeting: Meeting) -> None:
        """Count an arrival; a meeting of one needs no event."""
        if meeting.parties == 1:
            return
        arrived = self.arrived.get(meeting.key, 0) + 1
        self.arrived[meeting.key] = arrived
        event = self.met.setdefault(meeting.key, self.env.event())
        if arrived == meeting.parties:
            event.succeed(self.env.now)


def _work_through(now: int, remaining: int, holds: list[tuple[int, int]], rate: int) -> int:
    """The first picosecond in which `remaining` millionths of a picosecond of work, begun at `now`, are done,
    at full rate outside the holds and at `rate` millionths inside them.
    """
    for begin, end in holds:
        if end <= now:
            continue
        if begin > now:
            if remaining <= (begin - now) * PPM:
                break
            remaining -= (begin - now) * PPM
            now = begin
        if remaining <= (end - now) * rate:
            return now - (-remaining // rate)
        remaining -= (end - now) * rate
        now = end
    return now - (-remaining // PPM)


def run(
    programs: Mapping[int, RankProgram | Sequence[Task]],
    *,
    slowdown: float,
    durations: Mapping[int, Sequence[int]] | None = None,
    starts: Mapping[int, int] | None = None,
) -> list[Span]:
    """Run the tasks of each rank to the end; `slowdown` is the share of its rate that compute loses.

    `durations` (by task) and `starts` are given per rank, in picoseconds. Raises `DeadlockError` when tasks
    wait for each other or for a peer that never comes.
    """
    simulation = _Simulation(round(slowdown * PPM))
    for number, program in programs.items():
        prepared = program if isinstance(program, RankProgram) else RankProgram(program)
        rank = _Rank(simulation.env, number, prepared, durations[number] if durations else None)
        simulation.add(rank, starts[number] if starts else 0)
    simulation.finish()
    return simulation.spans
