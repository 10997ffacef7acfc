"""The result of a run, simulated or measured: flat spans and memory changes, in integer picoseconds.

A trace is a sequence of pieces: one segment of one layer for one micro-batch on the ranks that run it. Equal pieces
share one recording and differ by a shift in time: a `Stretch` is equal pieces in a row, a `Repeat` anything that comes
again and again. Metrics are sums over recordings; plots and exports read the spans and memory changes of the whole.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Literal, NamedTuple

from spsim.engine.recording import ON_TIME, Late, MemoryChange, Recording, Span, TaskInfo
from spsim.lazy import lazy
from spsim.units import PS_PER_MS

Pass = Literal["forward", "backward", "weight_sync", "optimizer"]
"""What a piece is a part of."""


class Move(NamedTuple):
    """From the first run of something that repeats to one of the next."""

    shift_ps: int = 0
    tasks: int = 0
    layers: int = 0
    micro_batches: int = 0
    late: Late = ON_TIME

    def after(self, other: Move) -> Move:
        """Both, one after the other."""
        late = {lane: self.late.get(lane, 0) + other.late.get(lane, 0) for lane in {*self.late, *other.late}}
        return Move(
            self.shift_ps + other.shift_ps,
            self.tasks + other.tasks,
            self.layers + other.layers,
            self.micro_batches + other.micro_batches,
            late,
        )

    def times(self, count: int) -> Move:
        """The same, `count` times."""
        late = {lane: count * late for lane, late in self.late.items()}
        return Move(count * self.shift_ps, count * self.tasks, count * self.layers, count * self.micro_batches, late)


STAY = Move()


class Piece(NamedTuple):
    """One segment of one layer for one micro-batch."""

    recording: Recording
    phase: Pass
    layer: int | None
    micro_batch: int | None
    shift_ps: int
    first_task: int
    brings: Sequence[int] = ()
    """Buffers that the outermost layer gets from outside, there from the first task on."""
    drops: Sequence[int] = ()
    """Buffers that the outermost layer hands to nobody, freed in this piece."""
    late: Late = ON_TIME

    def spans(self) -> Iterator[Span]:
        """Spans at their place in time."""
        shift, first = self.shift_ps, self.first_task
        for rank, lane, task, posted, start, end in self.recording.delayed(self.late).spans:
            yield Span(rank, lane, task + first, posted + shift, start + shift, end + shift)

    def memory(self) -> Iterator[MemoryChange]:
        """Memory changes at their place in time."""
        for change in self._changes(self.recording.delayed(self.late)):
            yield change._replace(time_ps=change.time_ps + self.shift_ps, task=change.task + self.first_task)

    def _changes(self, recording: Recording) -> Iterator[MemoryChange]:
        yield from recording.memory
        for rank, times in recording.times.items():
            for buffer in self.brings:
                yield self._change(rank, buffer, int(times[0, 0]), 1, 0)
            for buffer in self.drops:
                end, task = recording.end_of(rank, buffer)
                yield self._change(rank, buffer, end, -1, task)

    def _change(self, rank: int, buffer: int, time: int, sign: int, task: int) -> MemoryChange:
        use = self.recording.outline.buffers[buffer]
        return MemoryChange(time, rank, sign * int(self.recording.sizes[buffer]), use.category, use.tensor, task)


class Stretch(NamedTuple):
    """Equal pieces in a row: of consecutive layers, or equal steps of a ring."""

    recording: Recording
    phase: Pass
    layer: int | None
    """Of the first piece, as all that follows."""
    micro_batch: int | None
    shift_ps: int
    first_task: int
    runs: int = 1
    move: Move = STAY
    """From one piece to the next."""
    brings: Sequence[int] = ()
    """As of a piece, of the first one."""
    drops: Sequence[int] = ()
    """As of a piece, of the last one."""

    @property
    def tasks(self) -> int:
        """Tasks of all pieces."""
        return self.runs * len(self.recording.outline.labels)

    @property
    def end_ps(self) -> int:
        """End of the last task."""
        last = self.move.times(self.runs - 1)
        return self.shift_ps + last.shift_ps + max(self.recording.delayed(last.late).ends.values())

    def run(self, index: int, moved: Move = STAY, *, first: bool = True, last: bool = True) -> Piece:
        """One of the pieces, where the stretch itself is moved."""
        moved = moved.after(self.move.times(index)) if index else moved
        return Piece(
            self.recording,
            self.phase,
            None if self.layer is None else self.layer + moved.layers,
            None if self.micro_batch is None else self.micro_batch + moved.micro_batches,
            self.shift_ps + moved.shift_ps,
            self.first_task + moved.tasks,
            self.brings if first and index == 0 else (),
            self.drops if last and index == self.runs - 1 else (),
            moved.late,
        )

    def pieces(self, moved: Move = STAY, *, first: bool = True, last: bool = True) -> Iterator[Piece]:
        """All pieces in order; `first` and `last` say whether this is where what surrounds it begins and ends."""
        for index in range(self.runs):
            yield self.run(index, moved, first=first, last=last)

    def piece_of(self, task: int, moved: Move = STAY, *, first: bool = True, last: bool = True) -> Piece:
        """The piece that has a task."""
        index = (task - self.first_task - moved.tasks) // len(self.recording.outline.labels)
        return self.run(index, moved, first=first, last=last)


class Repeat(NamedTuple):
    """Anything that comes again and again: the passes of a micro-batch, the steady state of a pipeline."""

    body: Sequence[Stretch | Repeat]
    """The first run."""
    runs: int
    move: Move
    """From one run to the next."""
    brings: Sequence[int] = ()
    """As of a stretch: of the first piece of the first run."""
    drops: Sequence[int] = ()
    """As of a stretch: of the last piece of the last run."""

    @property
    def shift_ps(self) -> int:
        """When the first run begins."""
        return self.body[0].shift_ps

    @property
    def first_task(self) -> int:
        """Number of the first task of the first run."""
        return self.body[0].first_task

    @property
    def tasks(self) -> int:
        """Tasks of all runs."""
        return self.runs * self.move.tasks

    @property
    def end_ps(self) -> int:
        """End of the last task."""
        last = self.move.times(self.runs - 1)
        if last.late:
            return max(_end(piece) for piece in self._run(self.runs - 1, STAY, first=True, last=True))
        return last.shift_ps + max(node.end_ps for node in self.body)

    def pieces(self, moved: Move = STAY, *, first: bool = True, last: bool = True) -> Iterator[Piece]:
        """All pieces in order; `first` and `last` say whether this is where what surrounds it begins and ends."""
        for index in range(self.runs):
            yield from self._run(index, moved, first=first, last=last)

    def _run(self, index: int, moved: Move, *, first: bool, last: bool) -> Iterator[Piece]:
        moved = moved.after(self.move.times(index))
        for place in range(len(self.body)):
            yield from self._node(place, index).pieces(moved, first=first, last=last)

    def _node(self, place: int, index: int) -> Stretch | Repeat:
        """What stands at a place of a run, with what the first brings and the last drops."""
        node = self.body[place]
        if index == 0 and place == 0 and self.brings:
            node = node._replace(brings=self.brings)
        if index == self.runs - 1 and place == len(self.body) - 1 and self.drops:
            node = node._replace(drops=self.drops)
        return node

    def piece_of(self, task: int, moved: Move = STAY, *, first: bool = True, last: bool = True) -> Piece:
        """The piece that has a task."""
        index = (task - self.first_task - moved.tasks) // self.move.tasks
        moved = moved.after(self.move.times(index))
        place = _place_of(self.body, task - moved.tasks)
        return self._node(place, index).piece_of(task, moved, first=first, last=last)


Node = Stretch | Repeat


def _place_of(nodes: Sequence[Node], task: int) -> int:
    return bisect_right(nodes, task, key=lambda node: node.first_task) - 1


def _end(piece: Piece) -> int:
    return piece.shift_ps + max(piece.recording.delayed(piece.late).ends.values())


class Leaf(NamedTuple):
    """A stretch, and what repeats around it from the outside in."""

    stretch: Stretch
    repeats: tuple[Repeat, ...] = ()

    @property
    def pieces(self) -> int:
        """Number of its pieces."""
        return self.stretch.runs * prod(repeat.runs for repeat in self.repeats)

    def find(self, layer: int | None, micro_batch: int | None, *, edges: bool = False) -> Iterator[Piece]:
        """Its pieces of one layer and micro-batch; of many equal ones in it the first and the last with `edges`."""
        stretch = self.stretch
        levels = [(repeat.move, repeat.runs) for repeat in self.repeats] + [(stretch.move, stretch.runs)]
        wanted = _less(layer, stretch.layer), _less(micro_batch, stretch.micro_batch)
        alone = stretch._replace(runs=1, move=STAY, brings=(), drops=())
        for moved in _moves(levels, STAY, wanted, edges=edges):
            yield alone.run(0, moved)


def _less(wanted: int | None, have: int | None) -> int | None:
    """The difference, or None where either does not matter."""
    return None if wanted is None or have is None else wanted - have


def _moves(
    levels: Sequence[tuple[Move, int]], moved: Move, wanted: tuple[int | None, int | None], *, edges: bool
) -> Iterator[Move]:
    """All ways to run the levels that move by the wanted layers and micro-batches."""
    if not levels:
        if all(want is None or want == have for want, have in zip(wanted, moved[2:4], strict=True)):
            yield moved
        return
    (move, runs), *inner = levels
    found = _indices(move, runs, moved, wanted)
    for index in sorted({*found[:1], *found[-1:]}) if edges else found:
        yield from _moves(inner, moved.after(move.times(index)), wanted, edges=edges)


def _indices(move: Move, runs: int, moved: Move, wanted: tuple[int | None, int | None]) -> Sequence[int]:
    """Which runs may be among them: around a piece only one level changes the layer, and one the micro-batch."""
    for step, want, have in zip(move[2:4], wanted, moved[2:4], strict=True):
        if step and want is not None:
            index, rest = divmod(want - have, step)
            return (index,) if rest == 0 and 0 <= index < runs else ()
    return range(runs)


@dataclass(frozen=True)
class Trace:
    """All pieces in order of tasks; `copies` says which ranks each simulated one stands for."""

    nodes: Sequence[Node]
    copies: Mapping[int, Sequence[int]]
    """Simulated rank -> the identical ranks that it stands for, itself included."""
    describe: Callable[[Piece], Sequence[TaskInfo]]
    """What each task of a piece is, when somebody asks."""
    groups: Mapping[str, Mapping[int, tuple[int, ...]]] = field(default_factory=dict)
    """Axis -> rank -> the ranks of its group."""
    overlapping: bool = False
    """Whether pieces overlap on a rank and their records do not know how, so that memory is read from the whole."""
    measured: bool = False
    """Whether it is of a real run: kernels may run at once, and the host may keep all lanes waiting."""

    def __repr__(self) -> str:
        ranks = sum(map(len, self.copies.values()))
        return f"Trace({ranks} ranks, {self.num_spans:,} spans, {self.end_ps / PS_PER_MS:.3f} ms)"

    @lazy
    def leaves(self) -> Sequence[Leaf]:
        """Every stretch, with what repeats around it."""
        return list(_leaves(self.nodes, ()))

    @lazy
    def pieces(self) -> Sequence[Piece]:
        """Every segment of every layer and micro-batch."""
        return [piece for node in self.nodes for piece in node.pieces()]

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
    def recordings(self) -> Mapping[Recording, tuple[Pass, int]]:
        """Each recording with its pass and the number of pieces that share it."""
        counts: dict[Recording, tuple[Pass, int]] = {}
        for leaf in self.leaves:
            recording = leaf.stretch.recording
            known = counts.get(recording, (leaf.stretch.phase, 0))[1]
            counts[recording] = (leaf.stretch.phase, known + leaf.pieces)
        return counts

    def described(self) -> Iterator[tuple[Recording, Sequence[TaskInfo], int]]:
        """Each recording with what its tasks are, by the first piece that shares it, and the number of pieces."""
        first = {leaf.stretch.recording: leaf.stretch for leaf in reversed(self.leaves)}
        for recording, (_, count) in self.recordings.items():
            yield recording, self.describe(first[recording].run(0)), count

    def pieces_of(self, phase: Pass, layer: int | None, micro_batch: int | None) -> Iterator[Piece]:
        """The pieces of a pass of one layer and micro-batch, in order; those of a measured run belong to no layer."""
        for leaf in self.leaves:
            if leaf.stretch.phase == phase:
                yield from leaf.find(layer, micro_batch)

    def window_of(self, phase: Pass, layer: int | None, micro_batch: int | None) -> tuple[int, int]:
        """When the first task of a pass of one layer and micro-batch is posted, and when the last ends."""
        pieces = [
            piece
            for leaf in self.leaves
            if leaf.stretch.phase == phase
            for piece in leaf.find(layer, micro_batch, edges=True)
        ]
        windows = [(piece.shift_ps, piece.recording.delayed(piece.late).window) for piece in pieces]
        first = min((shift + begin for shift, (begin, _) in windows), default=0)
        return first, max((shift + end for shift, (_, end) in windows), default=0)

    def piece_of(self, task: int) -> Piece:
        """The piece that a task belongs to."""
        return self.nodes[_place_of(self.nodes, task)].piece_of(task)

    @property
    def num_spans(self) -> int:
        """Spans of all pieces."""
        return sum(n * len(made.times) * len(made.outline.labels) for made, (_, n) in self.recordings.items())

    @lazy
    def end_ps(self) -> int:
        """End of the last span."""
        return max((node.end_ps for node in self.nodes), default=0)


def _leaves(nodes: Sequence[Node], around: tuple[Repeat, ...]) -> Iterator[Leaf]:
    for node in nodes:
        if isinstance(node, Stretch):
            yield Leaf(node, around)
        else:
            yield from _leaves(node.body, (*around, node))
