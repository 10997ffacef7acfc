"""The result of a run, simulated or measured: flat spans and memory changes, in integer picoseconds.

A trace is a sequence of pieces: one pass of one layer for one micro-batch, or the synchronisation of weight
gradients. Equal pieces share one recording and differ by a shift in time. Metrics are sums over pieces;
plots and exports read the spans and memory changes of the whole.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from spsim.engine.recording import MemoryChange, Recording, Span, TaskInfo
from spsim.lazy import lazy
from spsim.units import PS_PER_MS

Phase = Literal["forward", "backward", "weight_sync", "optimizer"]


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
        return f"Trace({ranks} ranks, {self.num_spans:,} spans, {self.end_ps / PS_PER_MS:.3f} ms)"

    @lazy
    def pieces(self) -> Sequence[Piece]:
        """Every pass of every layer and micro-batch."""
        return [stretch.piece(index) for stretch in self.stretches for index in range(len(stretch.layers))]

    @lazy
    def tasks(self) -> Sequence[TaskInfo]:
        """What each task is."""
        return [info for piece in self.pieces for info in self.describe(piece)]

    @lazy
    def spans(self) -> Sequence[Span]:
        """All spans, at their place in time."""
        return [span for piece in self.pieces for span in piece.spans()]

    @lazy
    def memory(self) -> Sequence[MemoryChange]:
        """All memory changes, at their place in time."""
        return [change for piece in self.pieces for change in piece.memory()]

    @lazy
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

    @lazy
    def end_ps(self) -> int:
        """End of the last span."""
        return max((stretch.last_ps + max(stretch.recording.ends.values()) for stretch in self.latest), default=0)
