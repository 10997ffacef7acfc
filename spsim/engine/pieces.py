"""What a trace is made of: pieces, and what comes again and again written once.

A piece is one segment of one layer for one micro-batch on the ranks that run it. Equal pieces share one recording and
differ by a shift in time: a `Stretch` is equal pieces in a row, a `Repeat` anything that comes again and again.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple

from spsim.engine.recording import ON_TIME, Late, MemoryChange, Recording, Span

Pass = Literal["forward", "backward", "weight_sync", "optimizer"]
"""What a piece is a part of."""


class Move(NamedTuple):
    """From the first run of something that repeats to one of the next."""

    shift_ps: int = 0
    tasks: int = 0
    layers: int = 0
    micro_batches: int = 0
    late: Late = ON_TIME

    def after(self, other: Move, times: int = 1) -> Move:
        """This one, and then another so many times."""
        if not times:
            return self
        late = self.late
        if other.late:
            late = {lane: late.get(lane, 0) + times * other.late.get(lane, 0) for lane in {*late, *other.late}}
        return Move(
            self.shift_ps + times * other.shift_ps,
            self.tasks + times * other.tasks,
            self.layers + times * other.layers,
            self.micro_batches + times * other.micro_batches,
            late,
        )


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

    @property
    def window(self) -> tuple[int, int]:
        """When its first task is posted, and when its last ends."""
        return _window(self.recording, self.shift_ps, self.late)

    def spans(self) -> Iterator[Span]:
        """Spans at their place in time."""
        shift, first = self.shift_ps, self.first_task
        for rank, lane, task, posted, start, end in self.recording.delayed(self.late).spans:
            yield Span(rank, lane, task + first, posted + shift, start + shift, end + shift)

    def spans_of(self, rank: int) -> Iterator[Span]:
        """The spans of one rank at their place in time."""
        recording, shift, first = self.recording.delayed(self.late), self.shift_ps, self.first_task
        times = recording.times[rank].tolist() if rank in recording.times else []
        for task, (lane, (posted, start, end)) in enumerate(zip(recording.outline.lanes, times, strict=False)):
            yield Span(rank, lane, task + first, posted + shift, start + shift, end + shift)

    def memory(self) -> Iterator[MemoryChange]:
        """Memory changes at their place in time."""
        for rank in self.recording.times:
            yield from self.memory_of(rank)

    def memory_of(self, rank: int) -> Iterator[MemoryChange]:
        """The memory changes of one rank at their place in time."""
        recording, shift, first = self.recording.delayed(self.late), self.shift_ps, self.first_task
        if rank in recording.times:
            for time, _, size, category, tensor, task in self._changes(recording, rank):
                yield MemoryChange(time + shift, rank, size, category, tensor, task + first)

    def _changes(self, recording: Recording, rank: int) -> Iterator[MemoryChange]:
        yield from recording.memory_by_rank[rank]
        for buffer in self.brings:
            yield self._change(rank, buffer, int(recording.times[rank][0, 0]), 1, 0)
        for buffer in self.drops:
            end, task = recording.end_of(rank, buffer)
            yield self._change(rank, buffer, end, -1, task)

    def _change(self, rank: int, buffer: int, time: int, sign: int, task: int) -> MemoryChange:
        use = self.recording.outline.buffers[buffer]
        return MemoryChange(time, rank, sign * int(self.recording.sizes[buffer]), use.category, use.tensor, task)


def _window(recording: Recording, shift_ps: int, late: Late) -> tuple[int, int]:
    """When the first task of a piece is posted, and when its last ends."""
    begin, end = recording.delayed(late).window
    return begin + shift_ps, end + shift_ps


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
    def ends(self) -> tuple[Stretch, Stretch]:
        """The first and the last stretch in it."""
        return self, self

    @property
    def tasks(self) -> int:
        """Tasks of all pieces."""
        return self.runs * len(self.recording.outline.labels)

    def window(self, index: int, moved: Move = STAY) -> tuple[int, int]:
        """When the first task of one of the pieces is posted, and when its last ends."""
        moved = moved.after(self.move, index)
        return _window(self.recording, self.shift_ps + moved.shift_ps, moved.late)

    def run(self, index: int, moved: Move = STAY) -> Piece:
        """One of the pieces, where the stretch itself is moved."""
        moved = moved.after(self.move, index)
        return Piece(
            self.recording,
            self.phase,
            None if self.layer is None else self.layer + moved.layers,
            None if self.micro_batch is None else self.micro_batch + moved.micro_batches,
            self.shift_ps + moved.shift_ps,
            self.first_task + moved.tasks,
            self.brings if index == 0 else (),
            self.drops if index == self.runs - 1 else (),
            moved.late,
        )

    def pieces(self, moved: Move = STAY) -> Iterator[Piece]:
        """All pieces in order."""
        for index in range(self.runs):
            yield self.run(index, moved)

    def piece_of(self, task: int, moved: Move = STAY) -> Piece:
        """The piece that has a task."""
        index = (task - self.first_task - moved.tasks) // len(self.recording.outline.labels)
        return self.run(index, moved)


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
    def ends(self) -> tuple[Stretch, Stretch]:
        """The first and the last stretch in it."""
        return self.body[0].ends[0], self.body[-1].ends[1]

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

    def window(self, index: int, moved: Move = STAY) -> tuple[int, int]:
        """When the first task of one of the runs is posted, and when its last ends."""
        moved = moved.after(self.move, index)
        begin = min(node.window(0, moved)[0] for node in self.body)
        return begin, max(node.window(node.runs - 1, moved)[1] for node in self.body)

    def pieces(self, moved: Move = STAY) -> Iterator[Piece]:
        """All pieces in order."""
        for index in range(self.runs):
            for node in self.run(index):
                yield from node.pieces(moved.after(self.move, index))

    def run(self, index: int) -> Iterator[Stretch | Repeat]:
        """The nodes of one of the runs, not moved."""
        return (self._node(place, index) for place in range(len(self.body)))

    def _node(self, place: int, index: int) -> Stretch | Repeat:
        """What stands at a place of a run, with what the first brings and the last drops."""
        node = self.body[place]
        if index == 0 and place == 0 and self.brings:
            node = node._replace(brings=self.brings)
        if index == self.runs - 1 and place == len(self.body) - 1 and self.drops:
            node = node._replace(drops=self.drops)
        return node

    def piece_of(self, task: int, moved: Move = STAY) -> Piece:
        """The piece that has a task."""
        index = (task - self.first_task - moved.tasks) // self.move.tasks
        moved = moved.after(self.move, index)
        place = place_of(self.body, task - moved.tasks)
        return self._node(place, index).piece_of(task, moved)


Node = Stretch | Repeat


def placed(node: Node, move: Move, on: Callable[[Recording], Recording]) -> Node:
    """A node of a run of its own at its place in a step; `on` puts a recording on the ranks that ran it."""
    if isinstance(node, Repeat):
        return node._replace(body=tuple([placed(inner, move, on) for inner in node.body]))
    return node._replace(
        recording=on(node.recording),
        layer=None if node.layer is None else node.layer + move.layers,
        micro_batch=None if node.micro_batch is None else node.micro_batch + move.micro_batches,
        shift_ps=node.shift_ps + move.shift_ps,
        first_task=node.first_task + move.tasks,
    )


def end_of(node: Node) -> int:
    """End of its last task."""
    return node.window(node.runs - 1)[1]


def place_of(nodes: Sequence[Node], task: int) -> int:
    """Which of some nodes has a task."""
    return bisect_right(nodes, task, key=lambda node: node.first_task) - 1


def runs_during(node: Node, start: int, end: int, moved: Move = STAY) -> range:
    """Which runs of a node are under way between two moments: they begin in order, and end in order."""
    begin, until = node.window(0, moved)
    runs, shift = range(node.runs), node.move.shift_ps

    def window(index: int) -> tuple[int, int]:
        """That of the first run, moved, unless lanes are late by more and more."""
        return node.window(index, moved) if node.move.late else (begin + index * shift, until + index * shift)

    ended = bisect_right(runs, start, key=lambda index: window(index)[1])
    return range(ended, bisect_left(runs, end, key=lambda index: window(index)[0]))


def pieces_during(node: Node, start: int, end: int, moved: Move = STAY) -> Iterator[Piece]:
    """Its pieces that are under way between two moments, in order."""
    for index in runs_during(node, start, end, moved):
        if isinstance(node, Stretch):
            yield node.run(index, moved)
        else:
            for inner in node.run(index):
                yield from pieces_during(inner, start, end, moved.after(node.move, index))
