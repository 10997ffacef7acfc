"""A segment as it ran: when each task was posted, started and ended, and what that makes of its memory.

Times are integer picoseconds, from the beginning of the segment.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import NamedTuple, TypeVar

import numpy as np

from spsim.engine.lives import COLUMNS, ENDED, MANY, POSTED, STARTED, Fullest, Integers, Lives, fullest_of
from spsim.lazy import lazy

T = TypeVar("T")

COMPUTE_LANE = "compute"
"""The lane of kernels; a measured run may have more, whose names begin so. Every other lane is communication."""


class Span(NamedTuple):
    """One kernel or collective that ran on one lane of one rank."""

    rank: int
    lane: str
    task: int
    """Number of the task: in its segment, or in the trace. A task belongs to one segment, whose ranks all run it."""
    posted_ps: int
    """When the lane reached it; a collective waits from then for its peers."""
    start_ps: int
    """When work or transfer began."""
    end_ps: int


Moments = tuple[int, int, int]
"""When a task was posted, started and ended, as of a span."""
Ran = Sequence[Moments] | Integers
"""Moments of tasks in order, as an array a row for each."""
_NOTHING: Integers = np.zeros(0, dtype=np.int64)


def columns(moments: Ran) -> Integers:
    """Moments as an array, a row for each task; exactly."""
    if isinstance(moments, np.ndarray):
        return moments
    flat = chain.from_iterable(moments)
    try:
        return np.fromiter(flat, np.int64, 3 * len(moments)).reshape(-1, 3)
    except OverflowError:
        return np.array(moments, dtype=object)


class MemoryChange(NamedTuple):
    """Bytes allocated (positive) or freed (negative) on a rank."""

    time_ps: int
    rank: int
    bytes: int
    category: str
    tensor: str
    task: int


class TaskInfo(NamedTuple):
    """What a task is, for tables and plots."""

    name: str
    operator_class: str
    """gemm, attention, norm, softmax, dropout, elementwise, or communication."""
    part: str
    purpose: str = ""
    layer: int | None = None
    micro_batch: int | None = None
    collective: str = ""
    axis: str = ""
    message_bytes: int = 0
    sent_bytes: int = 0
    flops: int = 0

    @property
    def kind(self) -> str:
        """What a communication is for, in accounts: `weight_sync`, its name in the optimizer, collective or purpose."""
        return {"weight_sync": self.part, "optimizer": self.name}.get(self.part, self.collective or self.purpose)


class Flight(NamedTuple):
    """A communication that is under way when a segment begins, or is still to be posted."""

    lane: str
    posted_ps: int
    start_ps: int
    end_ps: int
    kind: str
    """As of its task."""
    slowdown: float | None = None
    """What kernels lose beside it, if not what the run says."""

    def moved(self, by_ps: int) -> Flight:
        """The same, seen from another moment."""
        posted, start, end = self.posted_ps + by_ps, self.start_ps + by_ps, self.end_ps + by_ps
        return Flight(self.lane, posted, start, end, self.kind, self.slowdown)

    def longer(self, late: Late) -> Flight:
        """The same where its lane is busy for longer."""
        return self._replace(end_ps=self.end_ps + late.get(self.lane, 0))


class Left(NamedTuple):
    """A change of memory by an earlier segment that is still to come."""

    time_ps: int
    bytes: int
    task: int
    """Whose allocation it is, counted from the first task of the segment: below 0."""

    def moved(self, by_ps: int, by_tasks: int = 0) -> Left:
        """The same, seen from another moment or segment."""
        return Left(self.time_ps + by_ps, self.bytes, self.task + by_tasks)


Late = Mapping[str, int]
"""Lane -> picoseconds by which its tasks are behind those of a recording that is else the same."""
ON_TIME: Late = {}


class BufferUse(NamedTuple):
    """A buffer in a segment: from the task that writes it, or from before, to its last reader, or beyond."""

    tensor: str
    category: str
    writer: int | None
    readers: Sequence[int]
    outlives: bool
    """Read by a later pass."""


@dataclass(frozen=True, eq=False)
class Outline:
    """What all recordings of a pass have in common: the lane of each task, what it is, and the buffers."""

    lanes: Sequence[str]
    labels: Sequence[TaskInfo]
    """What each task is, whatever its layer and sizes."""
    buffers: Sequence[BufferUse] = ()
    slowdowns: Sequence[float | None] = ()
    """What kernels lose beside each task, if any loses another share than the run says."""

    @lazy
    def classes(self) -> tuple[Sequence[str], Integers]:
        """Operator classes, and for each of them 1 where a task is its kernel."""
        kernels = [
            (info.operator_class, task)
            for task, (lane, info) in enumerate(zip(self.lanes, self.labels, strict=True))
            if lane == COMPUTE_LANE and info.operator_class
        ]
        names = sorted({name for name, _ in kernels})
        found = np.zeros((len(names), len(self.lanes)), dtype=np.int64)
        for name, task in kernels:
            found[names.index(name), task] = 1
        return names, found

    @lazy
    def last_kernel(self) -> int | None:
        """The last task of the compute lane; lanes are in order, so that it is the last to end."""
        return next((task for task in reversed(range(len(self.lanes))) if self.lanes[task] == COMPUTE_LANE), None)

    @lazy
    def lives(self) -> Lives:
        """What frees and what allocates each buffer."""
        count = len(self.buffers)
        writers = [use.writer or 0 for use in self.buffers]
        readers = [self._last_of_lanes(use.readers or (use.writer or 0,)) for use in self.buffers]
        most = max(map(len, readers), default=1)
        freed_by = [[tasks[turn] if turn < len(tasks) else tasks[-1] for tasks in readers] for turn in range(most)]
        freed = np.array([not use.outlives for use in self.buffers], dtype=bool)
        written = np.array([use.writer is not None for use in self.buffers], dtype=bool)
        return Lives(
            len(COLUMNS) * np.array([[tasks, writers] for tasks in freed_by], dtype=np.intp)
            + np.array([[ENDED], [POSTED]]),
            np.arange(2 * count) % max(count, 1),
            np.array([-freed.astype(int), written.astype(int)]),
            ~freed | ~written,
            np.array(writers, dtype=np.intp),
        )

    def _last_of_lanes(self, tasks: Sequence[int]) -> Sequence[int]:
        """Of some tasks the last of each lane."""
        return tasks if len(tasks) == 1 else [*{self.lanes[task]: task for task in sorted(tasks)}.values()]


@dataclass(frozen=True, eq=False)
class Recording:
    """When the tasks of one segment ran; times and tasks count from its own beginning."""

    outline: Outline
    times: Mapping[int, Integers]
    """Rank -> the moments of its tasks, a row for each."""
    sizes: Sequence[int] | Integers
    """Bytes of each buffer."""
    begins: Mapping[int, int] = field(default_factory=dict)
    """Rank -> when its kernels before have ended, if not at 0."""
    flights: Mapping[int, Sequence[Flight]] = field(default_factory=dict)
    """Rank -> communications of earlier segments that are under way then."""
    left: Mapping[int, Sequence[Left]] = field(default_factory=dict)
    """Rank -> changes of memory by earlier segments that come later than that."""
    until: Mapping[int, int] = field(default_factory=dict)
    """Rank -> when the next segment takes over what is still to come, where something is."""

    def on(self, ranks: Mapping[int, int]) -> Recording:
        """The same run by other ranks: `ranks` says which in whose place."""

        def renamed(by_rank: Mapping[int, T]) -> dict[int, T]:
            return {ranks[rank]: value for rank, value in by_rank.items()}

        times, begins, flights = renamed(self.times), renamed(self.begins), renamed(self.flights)
        return Recording(self.outline, times, self.sizes, begins, flights, renamed(self.left), renamed(self.until))

    def delayed(self, late: Late) -> Recording:
        """The same with the tasks of some lanes later."""
        if not late:
            return self
        shifts = np.array([[late.get(lane, 0)] for lane in self.outline.lanes])
        return replace(
            self,
            times={rank: times + shifts for rank, times in self.times.items()},
            flights={rank: [flight.longer(late) for flight in own] for rank, own in self.flights.items()},
        )

    @lazy
    def spans(self) -> Sequence[Span]:
        """Spans by rank and task."""
        return [
            Span(rank, lane, task, *moments)
            for rank, times in self.times.items()
            for task, (lane, moments) in enumerate(zip(self.outline.lanes, times.tolist(), strict=True))
        ]

    @lazy
    def ends(self) -> dict[int, int]:
        """When the last task of each rank ends."""
        return dict(zip(self.times, self.together[..., ENDED].max(axis=1).tolist(), strict=True))

    def kernels_end(self, rank: int) -> int:
        """When the kernels of a rank have ended, those before it included."""
        last = self.outline.last_kernel
        return self.begins.get(rank, 0) if last is None else int(self.times[rank][last, ENDED])

    def busy_until(self, rank: int) -> int:
        """When the last task of a rank has ended, those before it included."""
        return max([self.ends[rank], *(flight.end_ps for flight in self.flights.get(rank, ()))])

    @lazy
    def together(self) -> Integers:
        """The moments of all ranks, one after another."""
        return np.stack([*self.times.values()])

    @lazy
    def compute(self) -> dict[int, list[int]]:
        """Picoseconds of the kernels of each rank, by the classes of the outline."""
        _, kernels = self.outline.classes
        times = self.together
        return dict(zip(self.times, ((times[..., ENDED] - times[..., STARTED]) @ kernels.T).tolist(), strict=True))

    @lazy
    def late(self) -> list[int]:
        """Ranks of which a communication waits for a peer."""
        waits = (self.together[..., STARTED] != self.together[..., POSTED]).any(axis=1)
        return [rank for rank, own in zip(self.times, waits.tolist(), strict=True) if own]

    @lazy
    def window(self) -> tuple[int, int]:
        """When the first task is posted and when the last ends, over ranks."""
        return int(self.together[..., POSTED].min()), max(self.ends.values())

    @property
    def memory(self) -> Sequence[MemoryChange]:
        """Memory changes of all ranks."""
        return [change for own in self.memory_by_rank.values() for change in own]

    @lazy
    def memory_by_rank(self) -> Mapping[int, Sequence[MemoryChange]]:
        """Memory changes of each rank: a buffer is allocated when its writer is reached, and freed when the last of its
        readers ends.
        """
        return {rank: [change for change in self._memory(rank) if change.bytes] for rank in self.times}

    def _memory(self, rank: int) -> Iterator[MemoryChange]:
        for time, size, buffer in zip(*map(np.ndarray.tolist, self.changes(rank)), strict=True):
            use = self.outline.buffers[buffer]
            task = use.writer if size > 0 else self.end_of(rank, buffer)[1]
            yield MemoryChange(time, rank, size, use.category, use.tensor, task or 0)

    def changes(self, rank: int) -> tuple[Integers, Integers, Integers]:
        """Times, bytes and buffers of the memory changes of one rank, in order of time, what is freed before what
        is allocated. No bytes for a buffer that a rank without work writes and frees in the same moment, and for
        what comes before the pass or goes after it.
        """
        lives = self.outline.lives
        times = np.maximum.reduce(self.times[rank].take(lives.places))
        sizes = np.asarray(self.sizes) * (lives.crossing | (times[0] != times[1]))
        times, changes = times.ravel(), (lives.signs * sizes).ravel()
        order = np.lexsort((changes, times))
        return times[order], changes[order], lives.buffers[order]

    @lazy
    def left_behind(self) -> dict[int, Mapping[str, int]]:
        """Bytes by category that are there after it and were not before, of each rank."""
        categories = [use.category for use in self.outline.buffers]
        found: dict[int, Mapping[str, int]] = {}
        for rank in self.times:
            own = found[rank] = dict.fromkeys(categories, 0)
            _, sizes, buffers = self.changes(rank)
            for size, buffer in zip(sizes.tolist(), buffers.tolist(), strict=True):
                own[categories[buffer]] += size
        return found

    def changes_after(self, rank: int, time: int) -> list[Left]:
        """Changes of memory that are still to come, its own and those of earlier segments."""
        if not self.outline.buffers and rank not in self.left:
            return []
        own = zip(*map(np.ndarray.tolist, self.changes(rank)), strict=True)
        found = [Left(when, size, self.outline.buffers[buffer].writer or 0) for when, size, buffer in own if size]
        return sorted(change for change in (*found, *self.left.get(rank, ())) if change.time_ps > time)

    @lazy
    def fullest(self) -> dict[int, Fullest]:
        """The fullest moment of each rank, until the next segment takes over.

        What an outermost layer brings is there from its first task on; what it drops goes with its last.
        """
        if len(self.times) >= MANY and not self.left and not self.until and self.outline.buffers:
            found = fullest_of(self.together, self.outline.lives, self.sizes)
            return dict(zip(self.times, found, strict=True))
        return {rank: self._fullest(rank) for rank in self.times}

    def _fullest(self, rank: int) -> Fullest:
        times, changes, tasks = self.changes_here(rank)
        if not len(changes):
            return Fullest(0, 0, 0, 0)
        sums = changes.cumsum()
        at = sums.argmax()
        highest, total = sums.item(at), sums.item(-1)
        return Fullest(highest, times.item(at), tasks.item(at), total) if highest > 0 else Fullest(0, 0, 0, total)

    def changes_here(self, rank: int) -> tuple[Integers, Integers, Integers]:
        """Times, bytes and tasks of the changes of memory until the next segment takes over, in order of time; tasks
        of those that are allocated.
        """
        if not self.outline.buffers and rank not in self.left:
            return (_NOTHING,) * 3
        times, changes, buffers = self.changes(rank)
        tasks = self.outline.lives.writers[buffers]
        left = self.left.get(rank, ())
        if left:
            times, changes, tasks = (
                np.append(own, other)
                for own, other in zip((times, changes, tasks), zip(*left, strict=True), strict=True)
            )
            order = np.lexsort((changes, times))
            times, changes, tasks = times[order], changes[order], tasks[order]
        if rank in self.until:
            here = times <= self.until[rank]
            times, changes, tasks = times[here], changes[here], tasks[here]
        return times, changes, tasks

    def first_above(self, rank: int, room: int) -> int:
        """The first task whose allocation needs more than `room`, which is exceeded."""
        _, changes, tasks = self.changes_here(rank)
        return int(tasks[(changes.cumsum() > room).argmax()])

    def size(self, buffers: Sequence[int]) -> int:
        """Bytes of some buffers."""
        return sum(int(self.sizes[buffer]) for buffer in buffers)

    def end_of(self, rank: int, buffer: int) -> tuple[int, int]:
        """When the last reader of a buffer ends, and which task that is."""
        use, times = self.outline.buffers[buffer], self.times[rank]
        return max((int(times[task, ENDED]), task) for task in use.readers or (use.writer or 0,))
