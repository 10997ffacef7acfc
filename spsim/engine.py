"""The event engine: in-order lanes, rendezvous, contention for the device. The only clock.

It knows tasks with durations, not transformers. Each lane of a rank is one simpy process that walks its
tasks in order, as a CUDA stream does; a dependency on another lane is an event, and a communication is a
rendezvous of the ranks that take part. Time is integer picoseconds.

While a communication is posted on a rank, its computation runs at `1 - slowdown` of its rate: the
collective holds part of the device, also while it waits for its peers.

What is known ahead is not waited for: a communication ends at a known time once its peers have met, and
kernels that nothing can interrupt are advanced together, up to one that another lane waits for.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, islice
from typing import Any

import simpy

from spsim.trace import Moments

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
    """Consecutive kernels of a lane of which only the last is waited for, or one communication."""

    __slots__ = ("awaited", "last", "meetings", "needs", "parties", "tasks")

    def __init__(self, tasks: Sequence[Task], needs: tuple[int, ...], awaited: bool) -> None:
        self.tasks = tuple(task.id for task in tasks)
        self.last = self.tasks[-1]
        self.needs = needs
        """Tasks of other lanes that the first one waits for."""
        self.awaited = awaited
        """Whether another lane waits for the last one."""
        self.meetings = tasks[0].meetings
        self.parties = max((meeting.parties for meeting in self.meetings), default=0)


class RankProgram:
    """The tasks of one rank, sorted into lanes; made once for many runs with different durations."""

    def __init__(self, tasks: Sequence[Task]) -> None:
        self.tasks = tasks
        self.ids = tuple(task.id for task in tasks)

    @cached_property
    def lanes(self) -> dict[str, list[_Run]]:
        """Runs of each lane, in order."""
        lane_of = {task.id: task.lane for task in self.tasks}
        needs = {task.id: tuple(n for n in task.needs if lane_of[n] != task.lane) for task in self.tasks}
        awaited = {need for own in needs.values() for need in own}
        lanes: dict[str, list[list[Task]]] = {}
        for task in self.tasks:
            runs = lanes.setdefault(task.lane, [])
            alone = not runs or task.meetings or runs[-1][-1].meetings or needs[task.id]
            if alone or runs[-1][-1].id in awaited:
                runs.append([])
            runs[-1].append(task)
        return {
            lane: [_Run(run, needs[run[0].id], run[-1].id in awaited) for run in runs] for lane, runs in lanes.items()
        }


class _Rank:
    """State of one rank: when its tasks ran, as far as is known, and when communications hold the device."""

    __slots__ = ("durations", "env", "holds", "posts", "program", "times", "unmet", "waiting")

    def __init__(self, env: Any, program: RankProgram, durations: Sequence[int] | None) -> None:
        self.env = env
        self.program = program
        self.durations = {task.id: task.duration_ps for task in program.tasks} if durations is None else durations
        self.times: dict[int, Moments] = {}
        self.waiting: dict[int, simpy.Event] = {}
        """Events of tasks whose times other lanes want to know."""
        self.holds: list[tuple[int, int]] = []
        """When communications hold the device whose peers have met: in order, and apart from each other."""
        self.unmet: list[int] = []
        """Since when others hold it."""
        self.posts = 0
        """Communications whose peers have met."""

    def known(self, task: int) -> simpy.Event:
        """The event of the times of a task becoming known."""
        return self.waiting.setdefault(task, self.env.event())

    def transfer(self, task: int, posted: int, start: int, met: int) -> int:
        """A communication whose peers have met by now ends after its duration, and holds the device until then."""
        begin = posted
        end = stop = met + self.durations[task]
        while self.holds and self.holds[-1][1] >= begin:
            hold = self.holds.pop()
            begin, stop = min(begin, hold[0]), max(stop, hold[1])
        self.holds.append((begin, stop))
        self.posts += 1
        self.times[task] = posted, start, end
        if task in self.waiting:
            self.waiting[task].succeed()
        return end

    def record(self, tasks: Sequence[int], times: Sequence[int]) -> int:
        """Kernels in a row: the first begins at the first time, and each ends at the next one."""
        self.times.update(zip(tasks, zip(times, times, times[1:], strict=False), strict=True))
        return times[-1]

    def holds_after(self, time: int) -> list[tuple[int, int]]:
        """When the device is held from `time` on, as far as is known now: a communication that waits for its
        peers may end this moment.
        """
        index = len(self.holds)
        while index and self.holds[index - 1][1] > time:
            index -= 1
        known = self.holds[index:]
        return sorted([*known, *((since, self.env.now) for since in self.unmet)]) if self.unmet else known

    def may_run(self, run: _Run, time: int) -> bool:
        """Whether a run consists of kernels, and all that it waits for is known to have ended by some time."""
        times = self.times
        return not run.meetings and all(need in times and times[need][2] <= time for need in run.needs)


class _Simulation:
    """One run: the ranks, and the open rendezvous."""

    def __init__(self, slowdown_ppm: int) -> None:
        self.env: Any = simpy.Environment()  # simpy's clock is int | float, ours is int
        self.rate = PPM - slowdown_ppm
        self.ranks: dict[int, _Rank] = {}
        self.met: dict[tuple[int, ...], simpy.Event] = {}
        self.arrived: dict[tuple[int, ...], int] = {}

    def add(self, number: int, rank: _Rank, start: int) -> None:
        self.ranks[number] = rank
        for runs in rank.program.lanes.values():
            self.env.process(self._lane(rank, runs, start))

    def finish(self) -> None:
        self.env.run()
        waiting = list(self._waiting())
        if waiting:
            raise DeadlockError(f"deadlock: {', '.join(waiting)} wait for tasks that never end")

    def _waiting(self) -> Iterator[str]:
        for number, rank in self.ranks.items():
            if len(rank.times) < len(rank.program.ids):
                for lane, runs in rank.program.lanes.items():
                    heads = (task for run in runs for task in run.tasks if task not in rank.times)
                    yield from (f"task {task} on lane {lane} of rank {number}" for task in islice(heads, 1))

    def _lane(self, rank: _Rank, runs: Sequence[_Run], free: int) -> Generator[simpy.Event, Any, None]:
        """Walk the runs of a lane; when it is free again is known ahead."""
        env, index = self.env, 0
        while index < len(runs):
            run = runs[index]
            index += 1
            for need in run.needs:
                if need not in rank.times:
                    yield rank.known(need)
                free = max(free, rank.times[need][2])
            if run.meetings:
                if free > env.now:
                    yield env.timeout(free - env.now)
                met = (yield from self._meet(rank, run.meetings)) if run.parties > 1 else (free, free)
                free = rank.transfer(run.last, free, *met)
                continue
            tasks = run.tasks
            while not run.awaited and index < len(runs) and rank.may_run(runs[index], free):
                run = runs[index]
                index += 1
                tasks += run.tasks
            times = self._times(rank, tasks, free)
            while times[-1] > env.now:
                posts = rank.posts
                yield env.timeout(times[-1] - env.now)
                if rank.posts == posts and not rank.unmet:
                    break
                times = self._times(rank, tasks, free)
            free = rank.record(tasks, times)
            if run.last in rank.waiting:
                yield rank.waiting[run.last].succeed()

    def _times(self, rank: _Rank, tasks: Sequence[int], start: int) -> list[int]:
        """Start and ends of kernels in a row if nothing more is posted: never too late."""
        durations = [rank.durations[task] for task in tasks]
        holds = rank.holds_after(start) if self.rate < PPM else ()
        if not holds:
            return list(accumulate(durations, initial=start))
        times = [start]
        for duration in durations:
            times.append(_work_through(times[-1], duration * PPM, holds, self.rate))
        return times

    def _meet(self, rank: _Rank, meetings: Sequence[Meeting]) -> Generator[simpy.Event, Any, tuple[int, int]]:
        """Arrive at all meetings, and wait until each is complete, one of a single party at once; when the first
        and the last one was.
        """
        now = self.env.now
        rank.unmet.append(now)
        met = [now for meeting in meetings if meeting.parties == 1]
        events = [self._arrive(meeting) for meeting in meetings if meeting.parties > 1]
        for event in events:
            if not event.triggered:
                yield event
            met.append(event.value)
        rank.unmet.remove(now)
        return min(met), max(met)

    def _arrive(self, meeting: Meeting) -> simpy.Event:
        event = self.met.setdefault(meeting.key, self.env.event())
        self.arrived[meeting.key] = arrived = self.arrived.get(meeting.key, 0) + 1
        if arrived == meeting.parties:
            event.succeed(self.env.now)
        return event


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
) -> dict[int, list[Moments]]:
    """Run the tasks of each rank to the end; `slowdown` is the share of its rate that compute loses.

    `durations` (by task) and `starts` are given per rank, in picoseconds. The times of each rank are in the order
    of its tasks. Raises `DeadlockError` when tasks wait for each other or for a peer that never comes.
    """
    simulation = _Simulation(round(slowdown * PPM))
    for number, program in programs.items():
        prepared = program if isinstance(program, RankProgram) else RankProgram(program)
        rank = _Rank(simulation.env, prepared, durations[number] if durations else None)
        simulation.add(number, rank, starts[number] if starts else 0)
    simulation.finish()
    return {number: [rank.times[task] for task in rank.program.ids] for number, rank in simulation.ranks.items()}
