"""Segments in a row as one program of a rank: tasks numbered through, each joined to what was before its segment."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from spsim.engine.recording import COMPUTE_LANE
from spsim.engine.tasks import Need, Task
from spsim.step.segments import Segment


class Chain:
    """The tasks so far; ids are places."""

    def __init__(self) -> None:
        self.tasks: list[Task] = []
        self.last: dict[str, int] = {}
        """Last task of each lane before the next segment."""
        self.exports: dict[str, int] = {}
        self.awaited: set[int] = set()
        """What the rank has waited for since its last kernel."""

    def append(self, segment: Segment, tasks: Sequence[Task]) -> None:
        """One more run of a segment, as the rank runs it."""
        first = len(self.tasks)
        joined = self._joined({COMPUTE_LANE, *segment.joins})
        for task in tasks:
            own: list[Need] = [need + first for need in task.needs if isinstance(need, int)]
            named = [self.exports[need] for need in task.needs if isinstance(need, str) and need in self.exports]
            needs = (*(own or joined), *named)
            same = not first and needs == task.needs
            self.tasks.append(task if same else task._replace(id=task.id + first, needs=needs))
        self.exports |= {name: task + first for name, task in segment.exports.items()}
        self.last |= {task.lane: task.id for task in self.tasks[first:]}
        if any(task.lane == COMPUTE_LANE for task in tasks):
            self.awaited.clear()

    def post(self, task: Task) -> int:
        """One task that belongs to no segment, and that is posted when all so far is done that the rank waits for."""
        self.tasks.append(task._replace(id=len(self.tasks), needs=tuple(self._joined({COMPUTE_LANE}))))
        return self.tasks[-1].id

    def wait(self, tasks: Iterable[int]) -> None:
        """The rank goes on when some tasks have ended."""
        self.awaited |= {*tasks}

    def _joined(self, lanes: set[str]) -> list[int]:
        """The last tasks of some lanes, and what the rank has waited for."""
        return sorted({self.last[lane] for lane in lanes if lane in self.last} | self.awaited)
