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
from itertools import groupby
from operator import itemgetter
from typing import Literal, NamedTuple

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


@dataclass(frozen=True, eq=False)
class Recording:
    """Spans of one pass, by rank and task; times and tasks count from its own beginning."""

    spans: Sequence[Span]
    labels: Sequence[TaskInfo]
    """What each task is, whatever its layer and sizes."""
    buffers: Sequence[BufferUse] = ()
    sizes: Sequence[int] = ()
    """Bytes of each buffer."""

    @cached_property
    def by_rank(self) -> dict[int, Sequence[Span]]:
        """Spans of each rank, in order of tasks."""
        return {rank: list(own) for rank, own in groupby(self.spans, key=itemgetter(0))}

    @cached_property
    def memory(self) -> Sequence[MemoryChange]:
        """Memory changes of all ranks: a buffer is allocated when its writer is reached, and freed when the
        last of its readers ends.
        """
        return [
            MemoryChange(time, rank, size, self.buffers[buffer].category, self.buffers[buffer].tensor, task)
            for rank in self.by_rank
            for time, _, size, task, buffer in self.changes(rank)
        ]

    def changes(self, rank: int) -> list[tuple[int, bool, int, int, int]]:
        """(time, whether it allocates, bytes, task, buffer) of the memory changes of one rank, by buffer; none
        for a buffer that a rank without work writes and frees in the same moment. Sorted they are in order of
        time, what is freed before what is allocated.
        """
        spans = self.by_rank[rank]
        found = []
        for buffer, (use, size) in enumerate(zip(self.buffers, self.sizes, strict=True)):
            begin = None if use.writer is None else spans[use.writer].posted_ps
            end, task = (None, 0) if use.outlives else self.end_of(rank, buffer)
            if begin is not None and begin != end:
                found.append((begin, True, size, use.writer or 0, buffer))
            if end is not None and begin != end:
                found.append((end, False, -size, task, buffer))
        return found

    def end_of(self, rank: int, buffer: int) -> tuple[int, int]:
        """When the last reader of a buffer ends, and which task that is."""
        spans, use = self.by_rank[rank], self.buffers[buffer]
        tasks = use.readers or (use.writer or 0,)
        return (
            max((spans[task].end_ps, task) for task in tasks) if len(tasks) > 1 else (spans[tasks[0]].end_ps, tasks[0])
        )


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
        for rank, spans in recording.by_rank.items():
            if self.brings is not None:
                yield self._change(rank, self.brings, spans[0].posted_ps, 1, 0)
            if self.drops is not None:
                end, task = recording.end_of(rank, self.drops)
                yield self._change(rank, self.drops, end, -1, task)

    def _change(self, rank: int, buffer: int, time: int, sign: int, task: int) -> MemoryChange:
        use = self.recording.buffers[buffer]
        return MemoryChange(time, rank, sign * self.recording.sizes[buffer], use.category, use.tensor, task)


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

    def piece(self, index: int) -> Piece:
        """One of the pieces."""
        last = len(self.layers) - 1
        return Piece(
            self.recording, self.phase, self.layers[index], self.micro_batch, self.shift_ps + index * self.advance_ps,
            self.first_task + index * len(self.recording.labels),
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
        return stretch.piece((task - stretch.first_task) // len(stretch.recording.labels))

    @property
    def num_spans(self) -> int:
        """Spans of all pieces."""
        return sum(count * len(recording.spans) for recording, (_, count) in self.recordings.items())

    @cached_property
    def end_ps(self) -> int:
        """End of the last span."""
        last = self.stretches if self.overlapping else self.stretches[-2:]
        return max((_end(stretch) for stretch in last), default=0)


def _end(stretch: Stretch) -> int:
    last = stretch.shift_ps + (len(stretch.layers) - 1) * stretch.advance_ps
    return last + max((span.end_ps for span in stretch.recording.spans), default=0)
