"""Segments: what the ranks of a stage run from one moment to the next at which nothing earlier is left to issue.

A step is made of segments, not of passes of equal layers: the forward pass of a block, one step of a ring inside it,
the backward pass of the last micro-batch, the synchronisation of gradients. A segment knows its tasks, what they wait
for of earlier segments, and its buffers; neither durations nor sizes, nor where in the step it stands.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

from spsim.engine.pieces import Pass
from spsim.engine.recording import COMPUTE_LANE, BufferUse, Outline, TaskInfo
from spsim.engine.tasks import Task
from spsim.lazy import lazy
from spsim.program.instructions import Instruction
from spsim.program.mesh import Axis
from spsim.step.gradients import Sync

T = TypeVar("T")


class Call(NamedTuple):
    """Whom a communication meets: the whole group along some axes, or its neighbours there."""

    axes: tuple[Axis, ...]
    exchange: bool = False


@dataclass(frozen=True)
class Segment:
    """Tasks of all ranks that run it; ranks differ in durations and peers only.

    A task that waits for no other of the segment waits for the last kernel before the segment, and for the last
    tasks before it on the lanes that the segment joins.
    """

    name: str
    """Unique in a step: the block, the pass, and which part or variant of it."""
    phase: Pass
    tasks: tuple[Task, ...]
    """Ids are places; without meetings, which depend on the rank. Names among their needs are ends that earlier
    segments export.
    """
    labels: tuple[TaskInfo, ...]
    """What each task is, without sizes and without a layer."""
    calls: Mapping[int, Call] = field(default_factory=dict)
    """Of each communication."""
    exports: Mapping[str, int] = field(default_factory=dict)
    """Name -> the communication whose end later segments wait for by it."""
    joins: frozenset[str] = frozenset()
    """Lanes whose communications before the segment must have ended."""
    buffers: tuple[BufferUse, ...] = ()
    buffer_ids: tuple[int, ...] = ()
    """Of each buffer, in the program."""
    instructions: tuple[Instruction, ...] = ()
    """What the tasks carry out, those that come from a program."""
    added: Mapping[int, Sync] = field(default_factory=dict)
    """What the other tasks carry out, whose labels have their sizes."""
    variant_of: str = ""
    """Name of the segment of a program that its other tasks are of, if it has such and is not that itself."""
    added_bytes: tuple[int, ...] = ()
    """Of the buffers after those of `buffer_ids`, which belong to them."""

    def woven(self, own: Iterable[T], added: Mapping[int, T]) -> list[T]:
        """Something of each task: of those that come from a program as given in a row, of the others by task."""
        rest = iter(own)
        return [added[task.id] if task.id in self.added else next(rest) for task in self.tasks]

    @lazy
    def outline(self) -> Outline:
        """What its recordings have in common."""
        slowdowns = [task.slowdown for task in self.tasks]
        own = slowdowns if any(slowdown is not None for slowdown in slowdowns) else ()
        return Outline([task.lane for task in self.tasks], self.labels, self.buffers, own)

    @lazy
    def closes(self) -> bool:
        """Whether its tasks, and all that was issued before on lanes, run one after another: none hides another."""
        lanes = {task.lane for task in self.tasks} - {COMPUTE_LANE}
        in_a_row = all(task.needs == ((task.id - 1,) if task.id else ()) for task in self.tasks)
        return bool(self.joins) and lanes <= self.joins and in_a_row

    @lazy
    def last_calls(self) -> Mapping[str, int]:
        """Lane -> the last communication on it."""
        return {task.lane: task.id for task in self.tasks if task.lane != COMPUTE_LANE}

    @lazy
    def names(self) -> frozenset[str]:
        """Exports of earlier segments that it waits for."""
        return frozenset(need for task in self.tasks for need in task.needs if isinstance(need, str))

    @lazy
    def awaited(self) -> frozenset[str]:
        """Lanes of communications that tasks of other lanes wait for, here or later."""
        lane = {task.id: task.lane for task in self.tasks}
        needs = ((task, need) for task in self.tasks for need in task.needs if isinstance(need, int))
        exported = (lane[task] for task in self.exports.values())
        return frozenset({lane[need] for task, need in needs if lane[need] != task.lane} | {*exported}) | self.joins


@dataclass(frozen=True, slots=True)
class Part:
    """A segment that runs a number of times in a row, as the steps of a ring do."""

    segment: Segment
    runs: int = 1
    layer: int = 0
    """Of the block, from 0, that it belongs to."""


@dataclass(frozen=True, slots=True)
class BlockPass:
    """One pass of one block: its parts in order, and the buffers that neighbouring blocks hand over."""

    parts: tuple[Part, ...]
    entry: tuple[int, ...] = ()
    """Buffers of the first part that the block before hands over; the outermost gets them from outside."""
    result: tuple[int, ...] = ()
    """Buffers of the last part that are handed on; nobody outside the outermost block keeps them."""
