"""What a rank has to run: tasks in lanes, and where it stands when they begin.

Sorting tasks into lanes and into runs of kernels is done once, for many runs of the engine with other durations.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

from spsim.engine.contention import rate_beside

Need = int | str
"""A task of the same rank, or the name of something that ended before the run."""


Key = tuple[Any, ...]
"""Of a rendezvous: of which group, and its how manieth call."""


@dataclass(frozen=True, slots=True)
class Meeting:
    """A rendezvous: `parties` tasks with the same key must have been posted before any can proceed."""

    key: Key
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


class DeadlockError(RuntimeError):
    """No task can proceed; the message names the ones that wait."""


class Run:
    """Consecutive kernels of a lane of which only the last is waited for, or one communication."""

    __slots__ = ("awaited", "lane", "last", "meetings", "needs", "parties", "rate", "releases", "tasks")

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
        slowdown = tasks[0].slowdown
        self.rate = None if slowdown is None else rate_beside(slowdown)
        """Of kernels beside it, unless it is that of all."""


class RankProgram:
    """The tasks of one rank, sorted into lanes; made once for many runs with different durations."""

    def __init__(self, tasks: Sequence[Task]) -> None:
        self.tasks = tasks
        self.ids = tuple(task.id for task in tasks)
        self.names = frozenset(need for task in tasks for need in task.needs if isinstance(need, str))
        """What ended before the run, as far as a task waits for it."""

    @cached_property
    def kernels(self) -> list[list[Run]]:
        """Runs of kernels of each lane, in order."""
        return [runs for runs in self._lanes if not runs[0].meetings]

    @cached_property
    def communications(self) -> list[list[Run]]:
        """Communications of each lane, in order."""
        return [runs for runs in self._lanes if runs[0].meetings]

    @cached_property
    def alone(self) -> bool:
        """Whether no communication meets another rank, and all kernels are on one lane."""
        return len(self.kernels) < 2 and all(run.parties < 2 for runs in self.communications for run in runs)

    @cached_property
    def rates(self) -> set[int | None]:
        """Rates of kernels beside communications."""
        return {run.rate for runs in self.communications for run in runs}

    @cached_property
    def _lanes(self) -> list[list[Run]]:
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
        return [[Run(run, needs[run[0].id], awaiting[run[-1].id]) for run in runs] for runs in lanes.values()]

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
