"""The event engine: in-order lanes, rendezvous, contention for the device. The only clock.

It knows tasks with durations, not transformers. A rank has lanes that run their tasks in order, as CUDA streams
do; a communication is a rendezvous of the ranks that take part. Time is integer picoseconds.

While a communication is posted on a rank, its computation runs at `1 - slowdown` of its rate: the
collective holds part of the device, also while it waits for its peers.

A lane of kernels is one simpy process: how long they take depends on what is posted meanwhile, so that the clock
has to be waited for, once for a row of kernels up to one that another lane waits for. A communication needs no
process: when it is posted and when it ends follows from the ends of what it waits for and from its peers, and is
recorded as soon as those are known.

A run need not begin at the beginning: `Start` says where a rank stands, which is all that tasks that ran before can
mean to those that follow.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import simpy

from spsim.engine.recording import Moments

PPM = 10**6


Need = int | str
"""A task of the same rank, or the name of something that ended before the run."""


@dataclass(frozen=True, slots=True)
class Meeting:
    """A rendezvous: `parties` tasks with the same key must have been posted before any can proceed."""

    key: tuple[Any, ...]
    """Of which group, and its how manieth call."""
    parties: int


@dataclass(frozen=True, slots=True)
class Task:
    """One item of a lane. A task with meetings is a communication: its duration starts when all have met."""

    id: int
    lane: str
    duration_ps: int = 0
    """Unless a run gives its own durations."""
    needs: tuple[Need, ...] = ()
    """What must have ended: tasks of the same rank (those of the same lane are implied by its order), and by name what
    the start of the run knows the end of.
    """
    meetings: tuple[Meeting, ...] = ()


@dataclass(frozen=True, slots=True)
class Start:
    """Where a rank stands when a run begins; times in picoseconds."""

    time: int = 0
    """When it is free: none of its tasks begins before."""
    lanes: Mapping[str, int] = field(default_factory=dict)
    """When lanes are free that are busy beyond that."""
    holds: Sequence[tuple[int, int]] = ()
    """From when to when communications hold the device that were posted before."""
    ends: Mapping[str, int] = field(default_factory=dict)
    """When something ended, or will, that tasks name; what has no time here has ended long ago."""


class DeadlockError(RuntimeError):
    """No task can proceed; the message names the ones that wait."""


class _Run:
    """Consecutive kernels of a lane of which only the last is waited for, or one communication."""

    __slots__ = ("awaited", "lane", "last", "meetings", "needs", "parties", "releases", "tasks")

    def __init__(self, tasks: Sequence[Task], needs: Iterable[Need], awaiting: Collection[Task]) -> None:
        self.lane = tasks[0].lane
        self.tasks = tuple(task.id for task in tasks)
        self.last = self.tasks[-1]
        self.needs = tuple(needs)
        """What the first one waits for: tasks of other lanes, and what ended before the run."""
        self.awaited = bool(awaiting)
        """Whether tasks of other lanes wait for the last one."""
        self.releases = any(task.meetings for task in awaiting)
        """Whether communications are among them."""
        self.meetings = tasks[0].meetings
        self.parties = max((meeting.parties for meeting in self.meetings), default=0)


class RankProgram:
    """The tasks of one rank, sorted into lanes; made once for many runs with different durations."""

    def __init__(self, tasks: Sequence[Task]) -> None:
        self.tasks = tasks
        self.ids = tuple(task.id for task in tasks)
        self.names = frozenset(need for task in tasks for need in task.needs if isinstance(need, str))
        """What ended before the run, as far as a task waits for it."""

    @cached_property
    def kernels(self) -> list[list[_Run]]:
        """Runs of kernels of each lane, in order."""
        return [runs for runs in self._lanes if not runs[0].meetings]

    @cached_property
    def communications(self) -> list[list[_Run]]:
        """Communications of each lane, in order."""
        return [runs for runs in self._lanes if runs[0].meetings]

    @cached_property
    def _lanes(self) -> list[list[_Run]]:
        """Lanes of kernels and of communications: one that has both is two that wait for each other."""
        lane_of = {task.id: (task.lane, bool(task.meetings)) for task in self.tasks}
        needs = self._needs(lane_of)
        awaiting: dict[Need, list[Task]] = defaultdict(list)
        for task in self.tasks:
            for need in needs[task.id]:
                awaiting[need].append(task)
        lanes: dict[tuple[str, bool], list[list[Task]]] = defaultdict(list)
        for task in self.tasks:
            runs = lanes[lane_of[task.id]]
            if not runs or task.meetings or needs[task.id] or awaiting[runs[-1][-1].id]:
                runs.append([])
            runs[-1].append(task)
        return [[_Run(run, needs[run[0].id], awaiting[run[-1].id]) for run in runs] for runs in lanes.values()]

    def _needs(self, lane_of: Mapping[int, tuple[str, bool]]) -> dict[int, list[Need]]:
        """What each task waits for on other lanes, unless another of its needs implies it, and before the run."""
        place = {task.id: index for index, task in enumerate(self.tasks)}
        needs: dict[int, list[Need]] = {}
        before: dict[str, int] = {}
        ended: dict[int, dict[tuple[str, bool], int]] = {}
        """The last place of each lane that has ended when a task has."""
        for task in self.tasks:
            found: list[int] = []
            reached: dict[tuple[str, bool], int] = {}
            named = [need for need in task.needs if isinstance(need, str)]
            own = {need for need in task.needs if isinstance(need, int)} | {before.get(task.lane, task.id)}
            own.discard(task.id)
            for need in sorted(own, key=place.__getitem__, reverse=True):
                if place[need] > reached.get(lane_of[need], -1):
                    found.append(need)
                for lane, last in ended.get(need, {lane_of[need]: place[need]}).items():
                    reached[lane] = max(last, reached.get(lane, -1))
            needs[task.id] = [*(need for need in found if lane_of[need] != lane_of[task.id]), *named]
            ended[task.id] = reached | {lane_of[task.id]: place[task.id]}
            before[task.lane] = task.id
        return needs


class _Rank:
    """State of one rank: when its tasks run, as far as is known, and when communications hold the device."""

    __slots__ = (
        "communicators", "durations", "env", "holds", "program", "times", "unmet", "waiting",
    )  # fmt: skip

    def __init__(
        self, env: Any, number: int, program: RankProgram, durations: Sequence[int] | None, start: Start
    ) -> None:
        self.env = env
        self.program = program
        self.durations = {task.id: task.duration_ps for task in program.tasks} if durations is None else durations
        self.communicators = [
            _Communicator(number, runs, max(start.time, start.lanes.get(runs[0].lane, start.time)))
            for runs in program.communications
        ]
        self.times: dict[Need, Moments] = {name: (start.ends.get(name, start.time),) * 3 for name in program.names}
        self.waiting: dict[Need, simpy.Event] = {}
        """Events of tasks whose times other lanes want to know."""
        self.holds: list[tuple[int, int]] = [*start.holds]
        """When communications hold the device whose peers have met."""
        self.unmet: list[int] = []
        """Since when others hold it."""

    def known(self, needs: Iterable[Need]) -> simpy.Event:
        """The event of the times of the first of some tasks that is not known becoming known."""
        unknown = next(need for need in needs if need not in self.times)
        return self.waiting.setdefault(unknown, self.env.event())

    def tell(self, task: int) -> None:
        """The times of a task are known."""
        if task in self.waiting:
            self.waiting[task].succeed()

    def end_of(self, needs: Iterable[Need], time: int) -> int | None:
        """When the last of some tasks ends, or `time` if that is later; None if it is not known."""
        for need in needs:
            moments = self.times.get(need)
            if moments is None:
                return None
            if moments[2] > time:
                time = moments[2]
        return time

    def transfer(self, task: int, posted: int, start: int, met: int) -> int:
        """A communication whose peers have met takes its duration from then on, and holds the device until its end."""
        end = met + self.durations[task]
        self.holds.append((posted, end))
        self.times[task] = posted, start, end
        self.tell(task)
        return end

    def unmet_holds(self) -> list[tuple[int, int]]:
        """When communications have held the device that wait for their peers: they may end this moment."""
        now = self.env.now
        return [(since, now) for since in self.unmet if since < now]


class _Communicator:
    """A lane of communications of one rank, and where it stands."""

    __slots__ = ("free", "index", "posted", "rank", "runs")

    def __init__(self, rank: int, runs: Sequence[_Run], free: int) -> None:
        self.rank = rank
        """By its number: a cycle of references would outlive the run."""
        self.runs = runs
        self.index = 0
        self.free = free
        self.posted: int | None = None
        """When the communication at `index` was or will be posted, if it waits for its peers."""


class _Simulation:
    """One run: the ranks, and the open rendezvous."""

    def __init__(self, slowdown_ppm: int) -> None:
        self.env: Any = simpy.Environment()  # simpy's clock is int | float, ours is int
        self.rate = PPM - slowdown_ppm
        self.ranks: dict[int, _Rank] = {}
        self.arrived: dict[tuple[Any, ...], list[_Communicator]] = defaultdict(list)
        self.met: dict[tuple[Any, ...], int] = {}

    def add(self, number: int, rank: _Rank, start: int) -> None:
        self.ranks[number] = rank
        for runs in rank.program.kernels:
            self.env.process(self._compute(rank, runs, start))

    def finish(self) -> None:
        for rank in self.ranks.values():
            self._communicate(rank.communicators)
        if any(rank.program.kernels for rank in self.ranks.values()):
            self.env.run()
        waiting = list(self._waiting())
        if waiting:
            raise DeadlockError(f"deadlock: {', '.join(waiting)} wait for tasks that never end")

    def _waiting(self) -> Iterator[str]:
        """The first task of each lane that has not ended."""
        for number, rank in self.ranks.items():
            heads: dict[str, int] = {}
            if len(rank.times) < len(rank.program.ids) + len(rank.program.names):
                for task in rank.program.tasks:
                    if task.id not in rank.times:
                        heads.setdefault(task.lane, task.id)
            yield from (f"task {task} on lane {lane} of rank {number}" for lane, task in heads.items())

    def _compute(self, rank: _Rank, runs: Sequence[_Run], free: int) -> Generator[simpy.Event, Any, None]:
        """Walk a lane of kernels; time lost to contention is known only as it happens, so look again at their end."""
        env, index, seen = self.env, 0, 0
        holds: list[tuple[int, int]] = []
        while index < len(runs):
            if len(rank.holds) > seen:
                holds = sorted(holds + rank.holds[seen:])
                seen = len(rank.holds)
            while holds and holds[0][1] <= free:
                del holds[0]
            held = sorted([*holds, *rank.unmet_holds()]) if rank.unmet else holds
            row, end, stop = self._row(rank, runs, index, free, held)
            if stop == index:
                yield rank.known(runs[index].needs)
                continue
            remaining = end - env.now
            if remaining:
                yield env.timeout(remaining)
                if len(rank.holds) > seen or rank.unmet:
                    continue
            rank.times.update(row)
            free, index, last = end, stop, runs[stop - 1]
            if rank.waiting:
                rank.tell(last.last)
            if last.releases:
                self._communicate(rank.communicators)

    def _row(
        self, rank: _Rank, runs: Sequence[_Run], index: int, free: int, holds: Sequence[tuple[int, int]]
    ) -> tuple[dict[Need, Moments], int, int]:
        """The times of kernels in a row if nothing more is posted, never too late; the end of the last, and the run
        after it. They end with one that another lane waits for, or before one that waits for what is not known.
        """
        durations, rate = rank.durations, self.rate
        found: dict[Need, Moments] = {}
        awaited = False
        while not awaited and index < len(runs):
            run = runs[index]
            begin = rank.end_of(run.needs, free) if run.needs else free
            if begin is None:
                break
            for task in run.tasks:
                end = _work_through(begin, durations[task] * PPM, holds, rate) if holds else begin + durations[task]
                found[task] = begin, begin, end
                begin = end
            free, index, awaited = begin, index + 1, run.awaited
        return found, free, index

    def _communicate(self, communicators: Iterable[_Communicator]) -> None:
        """Advance lanes of communications as far as is known, and those that this sets free."""
        pending = [*communicators]
        while pending:
            self._advance(pending.pop(), pending)

    def _advance(self, communicator: _Communicator, pending: list[_Communicator]) -> None:
        """Post communications of a lane as long as their times are known and their peers come."""
        rank, runs = self.ranks[communicator.rank], communicator.runs
        while communicator.index < len(runs):
            run = runs[communicator.index]
            posted = rank.end_of(run.needs, communicator.free)
            if posted is None:
                return
            start = met = posted
            if run.parties > 1:
                if communicator.posted is None:
                    communicator.posted = posted
                    rank.unmet.append(posted)
                    pending += self._arrive(communicator, run.meetings)
                if not all(meeting.key in self.met for meeting in run.meetings):
                    return
                met_at = [self.met[meeting.key] for meeting in run.meetings]
                start, met = min(met_at), max(met_at)
                rank.unmet.remove(posted)
                communicator.posted = None
            communicator.index += 1
            communicator.free = rank.transfer(run.last, posted, start, met)
            if run.releases:
                pending += rank.communicators

    def _arrive(self, communicator: _Communicator, meetings: Sequence[Meeting]) -> list[_Communicator]:
        """Be at meetings from when it is posted; and all who are at those that are complete."""
        complete = []
        for meeting in meetings:
            there = self.arrived[meeting.key]
            there.append(communicator)
            if len(there) == meeting.parties:
                self.met[meeting.key] = max(other.posted or 0 for other in there)
                complete += there
        return complete


def _work_through(now: int, remaining: int, holds: Sequence[tuple[int, int]], rate: int) -> int:
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


_ORIGIN = Start()


def run(
    programs: Mapping[int, RankProgram | Sequence[Task]],
    *,
    slowdown: float,
    durations: Mapping[int, Sequence[int]] | None = None,
    starts: Mapping[int, Start] | None = None,
) -> dict[int, list[Moments]]:
    """Run the tasks of each rank to the end; `slowdown` is the share of its rate that compute loses.

    `durations` (by task, in picoseconds) and `starts` are given per rank. The times of each rank are in the order of
    its tasks. Raises `DeadlockError` when tasks wait for each other or for a peer that never comes.
    """
    simulation = _Simulation(round(slowdown * PPM))
    for number, program in programs.items():
        prepared = program if isinstance(program, RankProgram) else RankProgram(program)
        start = starts[number] if starts else _ORIGIN
        rank = _Rank(simulation.env, number, prepared, durations[number] if durations else None, start)
        simulation.add(number, rank, start.time)
    simulation.finish()
    return {number: [rank.times[task] for task in rank.program.ids] for number, rank in simulation.ranks.items()}
