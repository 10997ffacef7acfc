"""Segments in a row as one program of a rank: tasks numbered through, each joined to what was before its segment."""

from __future__ import annotations

from collections.abc import Sequence

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

    def append(self, segment: Segment, tasks: Sequence[Task]) -> None:
        """One more run of a segment, as the rank runs it."""
        first = len(self.tasks)
        joined = sorted(self.last[lane] for lane in {COMPUTE_LANE, *segment.joins} if lane in self.last)
        for task in tasks:
            own: list[Need] = [need + first for need in task.needs if isinstance(need, int)]
            named = [self.exports[need] for need in task.needs if isinstance(need, str) and need in self.exports]
            needs = (*(own or joined), *named)
            same = not first and needs == task.needs
            self.tasks.append(task if same else task._replace(id=task.id + first, needs=needs))
        self.exports |= {name: task + first for name, task in segment.exports.items()}
        self.last |= {task.lane: task.id for task in self.tasks[first:]}
