"""What a rank has to run: tasks in lanes, and where it stands when they begin.

Sorting tasks into lanes and into runs of kernels is done once, for many runs of the engine with other durations.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from spsim.engine.contention import Held, rate_beside
from spsim.lazy import lazy

Need = int | str
"""A task of the same rank, or the name of something that ended before the run."""


Durations = Mapping[int, int] | Sequence[int]
"""Picoseconds by task."""
Key = tuple[Any, ...]
"""Of a rendezvous: of which group, and its how manieth call."""


class Meeting(NamedTuple):
    """A rendezvous: `parties` tasks with the same key must have been posted before any can proceed."""

    key: Key
    parties: int


class Task(NamedTuple):
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
    slowdown: float | None = None
    """The share of their rate, below 1, that kernels lose while a communication is posted; None for that of the run."""


class Hold(NamedTuple):
    """From when to when a communication holds the device, and what kernels lose meanwhile, as of its task."""

    begin: int
    end: int
    slowdown: float | None = None


@dataclass(frozen=True, slots=True)
class Start:
    """Where a rank stands when a run begins; times in picoseconds."""

    time: int = 0
    """When it is free: none of its tasks begins before."""
    lanes: Mapping[str, int] = field(default_factory=dict)
    """When lanes are free that are busy beyond that."""
    holds: Sequence[Hold] = ()
    """Of communications that were posted before."""
    ends: Mapping[str, int] = field(default_factory=dict)
    """When something ended, or will, that tasks name; what has no time here has ended long ago."""

    def free(self, lane: str) -> int:
        """When a lane is."""
        return max(self.time, self.lanes.get(lane, self.time))


class Paces(NamedTuple):
    """When a rank is slower, or faster, than its durations say: rates of its work from when to when."""

    kernels: Sequence[Held] = ()
    transfers: Mapping[int, Sequence[Held]] = {}
    """By task."""


class DeadlockError(RuntimeError):
    """No task can proceed; the message names the ones that wait."""


class Run(NamedTuple):
    """Consecutive kernels of a lane of which only the last is waited for, or one communication."""

    lane: str
    tasks: tuple[int, ...]
    last: int
    needs: tuple[Need, ...]
    """What the first one waits for: tasks of other lanes, and what ended before the run."""
    awaited: bool
    """Whether tasks of other lanes wait for the last one."""
    rate: int | None
    """Of kernels beside it, unless it is that of all."""
    meetings: tuple[Meeting, ...] = ()
    parties: int = 0

    def meeting(self, meetings: tuple[Meeting, ...]) -> Run:
        """The same on another rank."""
        return self._replace(meetings=meetings, parties=max(meeting.parties for meeting in meetings))


def _run(tasks: Sequence[Task], needs: Iterable[Need], *, awaited: bool) -> Run:
    first, last = tasks[0], tasks[-1].id
    rate = None if first.slowdown is None else rate_beside(first.slowdown)
    run = Run(first.lane, tuple([task.id for task in tasks]), last, tuple(needs), awaited, rate)
    return run.meeting(first.meetings) if first.meetings else run


class RankProgram:
    """The tasks of one rank, sorted into lanes; made once for many runs with different durations."""

    def __init__(self, tasks: Sequence[Task], like: RankProgram | None = None) -> None:
        """`like` is the program of another rank whose tasks are the same but for whom they meet."""
        self.tasks = tasks
        self.ids: tuple[int, ...]
        self.names: frozenset[str]
        """What ended before the run, as far as a task waits for it."""
        if like is None:
            self.ids = tuple([task.id for task in tasks])
            self.names = frozenset([need for task in tasks for need in task.needs if isinstance(need, str)])
        else:
            self.ids, self.names = like.ids, like.names
        self._like = like

    @lazy
    def kernels(self) -> list[list[Run]]:
        """Runs of kernels of each lane, in order."""
        return [runs for runs in self._lanes if not runs[0].meetings]

    @lazy
    def communications(self) -> list[list[Run]]:
        """Communications of each lane, in order."""
        return [runs for runs in self._lanes if runs[0].meetings]

    @lazy
    def alone(self) -> bool:
        """Whether no communication meets another rank, and all kernels are on one lane."""
        return len(self.kernels) < 2 and all(run.parties < 2 for runs in self.communications for run in runs)

    @lazy
    def lanes(self) -> tuple[str, ...]:
        """Of kernels and communications."""
        return tuple(runs[0].lane for runs in self._lanes)

    @lazy
    def in_turn(self) -> list[Run] | None:
        """All runs in an order in which each comes behind what it waits for, communications as soon as they can; None
        where they wait for each other.
        """
        known: set[Need] = {*self.names}
        lanes = [*self.communications, *self.kernels]
        places = [0] * len(lanes)
        found: list[Run] = []
        lane = 0
        while lane < len(lanes):
            if places[lane] < len(lanes[lane]) and known.issuperset(lanes[lane][places[lane]].needs):
                found.append(lanes[lane][places[lane]])
                known.add(found[-1].last)
                places[lane] += 1
                lane = 0
            else:
                lane += 1
        return found if len(found) == sum(map(len, lanes)) else None

    @lazy
    def rates(self) -> set[int | None]:
        """Rates of kernels beside communications."""
        return {run.rate for runs in self.communications for run in runs}

    @lazy
    def _lanes(self) -> list[list[Run]]:
        """Lanes of kernels and of communications: one that has both is two that wait for each other."""
        if self._like is not None:
            meetings = {task.id: task.meetings for task in self.tasks}
            lanes_of = self._like._lanes
            return [[run.meeting(meetings[run.last]) if run.meetings else run for run in runs] for runs in lanes_of]
        needs = self._needs()
        awaited = {need for own in needs for need in own}
        lanes: dict[tuple[str, bool], list[tuple[list[Task], list[Need]]]] = {}
        for task, own in zip(self.tasks, needs, strict=True):
            runs = lanes.setdefault((task.lane, bool(task.meetings)), [])
            if not runs or task.meetings or own or runs[-1][0][-1].id in awaited:
                runs.append(([task], own))
            else:
                runs[-1][0].append(task)
        return [[_run(run, own, awaited=run[-1].id in awaited) for run, own in runs] for runs in lanes.values()]

    def _needs(self) -> list[list[Need]]:
        """What each task waits for on other lanes, unless another of its needs implies it, and before the run."""
        place = {number: index for index, number in enumerate(self.ids)}
        lanes: dict[tuple[str, bool], int] = {}
        lane_of = [lanes.setdefault((task.lane, bool(task.meetings)), len(lanes)) for task in self.tasks]
        found: list[list[Need]] = []
        before: dict[str, int] = {}
        ended: list[list[int]] = []
        """Of each task so far, the last place of each lane that has ended when it has."""
        for here, task in enumerate(self.tasks):
            lane, last = lane_of[here], before.get(task.lane, -1)
            before[task.lane] = here
            if not task.needs and last >= 0 and lane_of[last] == lane:
                found.append([])
                ended.append([*ended[last]])
                ended[here][lane] = here
                continue
            own = {place[need] for need in task.needs if not isinstance(need, str)} if task.needs else set()
            if last >= 0:
                own.add(last)
            reached = [-1] * len(lanes)
            needs: list[Need] = []
            for need in sorted(own, reverse=True):
                if need <= reached[lane_of[need]]:
                    continue  # so is all that it waited for
                if lane_of[need] != lane:
                    needs.append(self.ids[need])
                reached = [*map(max, reached, ended[need])] if need < here else reached
                reached[lane_of[need]] = max(need, reached[lane_of[need]])
            found.append([*needs, *(need for need in task.needs if isinstance(need, str))] if self.names else needs)
            reached[lane] = here
            ended.append(reached)
        return found
