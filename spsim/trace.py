"""The result of a run, simulated or measured: flat spans and memory changes, in integer picoseconds.

A trace is a sequence of pieces: one pass of one layer for one micro-batch, or the synchronisation of weight
gradients. Equal pieces share one recording and differ by a shift in time. Metrics are sums over pieces;
plots and exports read the spans and memory changes of the whole.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

Phase = Literal["forward", "backward", "weight_sync", "optimizer"]
COMPUTE_LANE = "compute"
"""The lane of kernels; a measured run may have more, whose names begin so. Every other lane is communication."""


class Span(NamedTuple):
    """One kernel or collective that ran on one lane of one rank."""

    rank: int
    lane: str
    task: int
    """Index of the task in the rank's program, the same on every rank."""
    posted_ps: int
    """When the lane reached it; a collective waits from then for its peers."""
    start_ps: int
    """When work or transfer began."""
    end_ps: int


Moments = tuple[int, int, int]
"""When a task was posted, started and ended, as of a span."""
Integers = npt.NDArray[Any]
"""64 bits each, or Python's own where that is too few."""


def columns(moments: Sequence[Moments]) -> Integers:
    """Moments as an array, a row for each task; exactly."""
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


@dataclass(frozen=True, slots=True)
class TaskInfo:
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


class BufferUse(NamedTuple):
    """A buffer in a pass: from the task that writes it, or from before, to its last reader, or beyond."""

    tensor: str
    category: str
    writer: int | None
    readers: Sequence[int]
    outlives: bool
    """Read by a later pass."""


POSTED, STARTED, ENDED = range(3)
"""Columns of an array of moments."""


class _Lives(NamedTuple):
    """What frees and what allocates each buffer of a pass: two rows, and a column for each buffer."""

    tasks: Integers
    """The last task of each lane that reads a buffer, or the one that writes it; the one that writes it."""
    moments: Integers
    """Which moment of the task it is."""
    signs: Integers
    """-1 where it is freed and 1 where it is allocated in this pass, 0 where it outlives it or was there before."""
    crossing: Integers
    """Which buffers are there before the pass or after it."""


@dataclass(frozen=True, eq=False)
class Outline:
    """What all recordings of a pass have in common: the lane of each task, what it is, and the buffers."""

    lanes: Sequence[str]
    labels: Sequence[TaskInfo]
    """What each task is, whatever its layer and sizes."""
    buffers: Sequence[BufferUse] = ()

    @cached_property
    def classes(self) -> tuple[Sequence[str], Integers]:
        """Operator classes, and for each of them 1 where a task is its kernel."""
        kernels = [
            info.operator_class if lane == COMPUTE_LANE else ""
            for lane, info in zip(self.lanes, self.labels, strict=True)
        ]
        names = sorted(set(kernels) - {""})
        return names, np.array([[int(kernel == name) for kernel in kernels] for name in names]).reshape(
            -1, len(kernels)
        )

    @cached_property
    def lives(self) -> _Lives:
        """What frees and what allocates each buffer."""
        writers = [use.writer or 0 for use in self.buffers]
        readers = [
            list({self.lanes[task]: task for task in sorted(use.readers or [writer])}.values())
            for use, writer in zip(self.buffers, writers, strict=True)
        ]
        most = max(map(len, readers), default=1)
        freed_by = [[tasks[min(turn, len(tasks) - 1)] for tasks in readers] for turn in range(most)]
        freed = [not use.outlives for use in self.buffers]
        written = [use.writer is not None for use in self.buffers]
        return _Lives(
            np.array([[tasks, writers] for tasks in freed_by], dtype=np.intp),
            np.array([[ENDED], [POSTED]]),
            np.array([[-int(goes) for goes in freed], written], dtype=int),
            ~np.array(freed, dtype=bool) | ~np.array(written, dtype=bool),
        )


class Fullest(NamedTuple):
    """The highest running sum of the memory changes of a pass on a rank, and the sum of all."""

    bytes: int
    time_ps: int
    task: int
    """Whose allocation reaches it."""
    total: int


@dataclass(frozen=True, eq=False)
class Recording:
    """When the tasks of one pass ran; times and tasks count from its own beginning."""

    outline: Outline
    times: Mapping[int, Integers]
    """Rank -> the moments of its tasks, a row for each."""
    sizes: Sequence[int] | Integers
    """Bytes of each buffer."""

    @cached_property
    def spans(self) -> Sequence[Span]:
        """Spans by rank and task."""
        return [
            Span(rank, lane, task, *moments)
            for rank, times in self.times.items()
            for task, (lane, moments) in enumerate(zip(self.outline.lanes, times.tolist(), strict=True))
        ]

    @cached_property
    def ends(self) -> dict[int, int]:
        """When the last task of each rank ends."""
        return {rank: max(times[:, ENDED].tolist()) for rank, times in self.times.items()}

    @cached_property
    def compute(self) -> dict[int, list[int]]:
        """Picoseconds of the kernels of each rank, by the classes of the outline."""
        _, kernels = self.outline.classes
        return {rank: (kernels @ (times[:, ENDED] - times[:, STARTED])).tolist() for rank, times in self.times.items()}

    @property
    def window(self) -> int:
        """Picoseconds from the first start to the last end, over ranks."""
        begin: int = min(min(times[:, POSTED].tolist()) for times in self.times.values())
        return max(self.ends.values()) - begin

    @cached_property
    def memory(self) -> Sequence[MemoryChange]:
        """Memory changes of all ranks: a buffer is allocated when its writer is reached, and freed when the
        last of its readers ends.
        """
        found = []
        for rank in self.times:
            for time, size, buffer in zip(*map(np.ndarray.tolist, self.changes(rank)), strict=True):
                use = self.outline.buffers[buffer]
                task = use.writer if size > 0 else self.end_of(rank, buffer)[1]
                found.append(MemoryChange(time, rank, size, use.category, use.tensor, task or 0))
        return [change for change in found if change.bytes]

    def changes(self, rank: int) -> tuple[Integers, Integers, Integers]:
        """Times, bytes and buffers of the memory changes of one rank, in order of time, what is freed before what
        is allocated. No bytes for a buffer that a rank without work writes and frees in the same moment, and for
        what comes before the pass or goes after it.
        """
        lives = self.outline.lives
        times = np.maximum.reduce(self.times[rank][lives.tasks, lives.moments])
        sizes = np.asarray(self.sizes) * (lives.crossing | (times[0] != times[1]))
        times, changes = times.ravel(), (lives.signs * sizes).ravel()
        order = np.lexsort((changes, times))
        return times[order], changes[order], order % len(sizes)

    @cached_property
    def fullest(self) -> dict[int, Fullest]:
        """The fullest moment of each rank.

        What an outermost pass brings is there from its first task on; what it drops goes with its last.
        """
        return {rank: self._fullest(rank) if self.outline.buffers else Fullest(0, 0, 0, 0) for rank in self.times}

    def _fullest(self, rank: int) -> Fullest:
        times, changes, buffers = self.changes(rank)
        sums = changes.cumsum()
        at = sums.argmax()
        highest, total = int(sums[at]), int(sums[-1])
        if highest <= 0:
            return Fullest(0, 0, 0, total)
        return Fullest(highest, int(times[at]), self.outline.buffers[buffers[at]].writer or 0, total)

    def first_above(self, rank: int, room: int) -> int:
        """The first task whose allocation needs more than `room`, which is exceeded."""
        _, changes, buffers = self.changes(rank)
        at = (changes.cumsum() > room).argmax()
        return self.outline.buffers[buffers[at]].writer or 0

    def size(self, buffer: int | None) -> int:
        """Bytes of a buffer, none if there is none."""
        return 0 if buffer is None else int(self.sizes[buffer])

    def end_of(self, rank: int, buffer: int) -> tuple[int, int]:
        """When the last reader of a buffer ends, and which task that is."""
        use, times = self.outline.buffers[buffer], self.times[rank]
        return max((int(times[task, ENDED]), task) for task in use.readers or (use.writer or 0,))


class Piece(NamedTuple):
    """One pass of one layer for one micro-batch, or the synchronisation at the end."""

    recording: Recording
    phase: Phase
    layer: int | None
    micro_batch: int | None
    shift_ps: int
    first_task: int
    brings: int | None = None
    """Buffer that the outermost layer gets from outside, there from the first task on."""
    drops: int | None = None
    """Buffer that the outermost layer hands to nobody, freed in this pass."""

    def spans(self) -> Iterator[Span]:
        """Spans at their place in time."""
        shift, first = self.shift_ps, self.first_task
        for rank, lane, task, posted, start, end in self.recording.spans:
            yield Span(rank, lane, task + first, posted + shift, start + shift, end + shift)

    def memory(self) -> Iterator[MemoryChange]:
        """Memory changes at their place in time."""
        for change in self._changes():
            yield change._replace(time_ps=change.time_ps + self.shift_ps, task=change.task + self.first_task)

    def _changes(self) -> Iterator[MemoryChange]:
        recording = self.recording
        yield from recording.memory
        for rank, times in recording.times.items():
            if self.brings is not None:
                yield self._change(rank, self.brings, int(times[0, 0]), 1, 0)
            if self.drops is not None:
                end, task = recording.end_of(rank, self.drops)
                yield self._change(rank, self.drops, end, -1, task)

    def _change(self, rank: int, buffer: int, time: int, sign: int, task: int) -> MemoryChange:
        use = self.recording.outline.buffers[buffer]
        return MemoryChange(time, rank, sign * int(self.recording.sizes[buffer]), use.category, use.tensor, task)


class Stretch(NamedTuple):
    """Equal pieces in a row: the same pass of consecutive layers, each begun when the one before has ended."""

    recording: Recording
    phase: Phase
    layers: Sequence[int | None]
    micro_batch: int | None
    shift_ps: int
    advance_ps: int
    """From one piece to the next."""
    first_task: int
    brings: int | None = None
    """As of a piece, of the first one."""
    drops: int | None = None
    """As of a piece, of the last one."""

    @property
    def last_ps(self) -> int:
        """Where the last piece stands in time."""
        return self.shift_ps + (len(self.layers) - 1) * self.advance_ps

    def piece(self, index: int) -> Piece:
        """One of the pieces."""
        last = len(self.layers) - 1
        return Piece(
            self.recording, self.phase, self.layers[index], self.micro_batch, self.shift_ps + index * self.advance_ps,
            self.first_task + index * len(self.recording.outline.labels),
            self.brings if index == 0 else None, self.drops if index == last else None,
        )  # fmt: skip


@dataclass(frozen=True)
class Trace:
    """All pieces in order of tasks; `copies` says which ranks each simulated one stands for."""

    stretches: Sequence[Stretch]
    copies: Mapping[int, tuple[int, ...]]
    """Simulated rank -> the identical ranks that it stands for, itself included."""
    describe: Callable[[Piece], Sequence[TaskInfo]]
    """What each task of a piece is, when somebody asks."""
    groups: Mapping[str, Mapping[int, tuple[int, ...]]] = field(default_factory=dict)
    """Axis -> rank -> the ranks of its group."""
    overlapping: bool = False
    """Whether pieces overlap on a rank, so that memory must be looked at as a whole."""
    measured: bool = False
    """Whether it is of a real run: kernels may run at once, and the host may keep all lanes waiting."""

    def __repr__(self) -> str:
        ranks = sum(map(len, self.copies.values()))
        return f"Trace({ranks} ranks, {self.num_spans:,} spans, {self.end_ps / 1e9:.3f} ms)"

    @cached_property
    def pieces(self) -> Sequence[Piece]:
        """Every pass of every layer and micro-batch."""
        return [stretch.piece(index) for stretch in self.stretches for index in range(len(stretch.layers))]

    @cached_property
    def tasks(self) -> Sequence[TaskInfo]:
        """What each task is."""
        return [info for piece in self.pieces for info in self.describe(piece)]

    @cached_property
    def spans(self) -> Sequence[Span]:
        """All spans, at their place in time."""
        return [span for piece in self.pieces for span in piece.spans()]

    @cached_property
    def memory(self) -> Sequence[MemoryChange]:
        """All memory changes, at their place in time."""
        return [change for piece in self.pieces for change in piece.memory()]

    @cached_property
    def recordings(self) -> Mapping[Recording, tuple[Phase, int]]:
        """Each recording with its phase and the number of pieces that share it."""
        counts: dict[Recording, tuple[Phase, int]] = {}
        for stretch in self.stretches:
            known = counts.get(stretch.recording, (stretch.phase, 0))[1]
            counts[stretch.recording] = (stretch.phase, known + len(stretch.layers))
        return counts

    def described(self) -> Iterator[tuple[Recording, Sequence[TaskInfo], int]]:
        """Each recording with what its tasks are, by the first piece that shares it, and the number of pieces."""
        first = {stretch.recording: stretch for stretch in reversed(self.stretches)}
        for recording, (_, count) in self.recordings.items():
            yield recording, self.describe(first[recording].piece(0)), count

    def piece_of(self, task: int) -> Piece:
        """The piece that a task belongs to."""
        stretch = self.stretches[bisect_right([s.first_task for s in self.stretches], task) - 1]
        return stretch.piece((task - stretch.first_task) // len(stretch.recording.outline.labels))

    @property
    def num_spans(self) -> int:
        """Spans of all pieces."""
        return sum(n * len(made.times) * len(made.outline.labels) for made, (_, n) in self.recordings.items())

    @property
    def latest(self) -> Sequence[Stretch]:
        """The stretches among which the last spans are, of the layers and of the synchronisation."""
        return self.stretches if self.overlapping else self.stretches[-2:]

    @cached_property
    def end_ps(self) -> int:
        """End of the last span."""
        return max((stretch.last_ps + max(stretch.recording.ends.values()) for stretch in self.latest), default=0)
