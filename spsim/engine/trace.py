"""The result of a run, simulated or measured: flat spans and memory changes, in integer picoseconds.

A trace is a sequence of pieces, many of which share a recording. Metrics are sums over recordings; exports read the
spans and memory changes of the whole.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from math import prod
from typing import NamedTuple

from spsim.engine.pieces import STAY, Move, Node, Pass, Piece, Repeat, Stretch, end_of, pieces_during, place_of
from spsim.engine.recording import Flight, MemoryChange, Recording, Span, TaskInfo
from spsim.lazy import lazy
from spsim.units import PS_PER_MS


class Leaf(NamedTuple):
    """A stretch, and what repeats around it from the outside in."""

    stretch: Stretch
    repeats: tuple[Repeat, ...] = ()

    @property
    def pieces(self) -> int:
        """Number of its pieces."""
        return self.stretch.runs * prod(repeat.runs for repeat in self.repeats)

    @property
    def last(self) -> Piece:
        """Its last piece."""
        moved = STAY
        for repeat in self.repeats:
            moved = moved.after(repeat.move, repeat.runs - 1)
        return self.stretch.run(self.stretch.runs - 1, moved)

    def find(self, layers: Collection[int] | None, micro_batches: Collection[int] | None) -> Iterator[Piece]:
        """Its pieces of some layers and micro-batches."""
        alone = self.stretch._replace(runs=1, move=STAY, brings=(), drops=())
        for moved in self._moves(layers, micro_batches):
            yield alone.run(0, moved)

    def windows(self, layer: int | None, micro_batch: int | None) -> list[tuple[int, int]]:
        """Those of its pieces of one layer and micro-batch; of many equal ones in it of the first and the last."""
        return [self.stretch.window(0, moved) for moved in self._moves(_one(layer), _one(micro_batch), edges=True)]

    def _moves(
        self, layers: Collection[int] | None, micro_batches: Collection[int] | None, *, edges: bool = False
    ) -> list[Move]:
        """To the pieces of some layers and micro-batches; of many equal ones to the first and the last with `edges`."""
        stretch = self.stretch
        wanted = _less(layers, stretch.layer), _less(micro_batches, stretch.micro_batch)
        nodes: tuple[Node, ...] = (*self.repeats, stretch)
        found = [STAY]
        for node in nodes:
            found = [moved.after(node.move, index) for moved in found for index in _indices(node, moved, wanted, edges)]
        return [moved for moved in found if _among(moved.layers, wanted[0]) and _among(moved.micro_batches, wanted[1])]


Wanted = tuple[Set[int] | None, Set[int] | None]
"""Layers and micro-batches that are wanted, counted from those of a stretch; None where all are."""


def _less(wanted: Collection[int] | None, have: int | None) -> Set[int] | None:
    """The differences, or None where either does not matter."""
    return None if wanted is None or have is None else {number - have for number in wanted}


def _among(have: int, wanted: Set[int] | None) -> bool:
    return wanted is None or have in wanted


def _indices(node: Node, moved: Move, wanted: Wanted, edges: bool) -> Sequence[int]:
    """Which runs of a node may be among the wanted ones: around a piece only one level changes the layer, and one the
    micro-batch. Of many with `edges` the first and the last.
    """
    found: Sequence[int] = range(node.runs)
    for step, want, have in zip(node.move[2:4], wanted, moved[2:4], strict=True):
        if step and want is not None:
            places = [divmod(number - have, step) for number in want]
            found = sorted([index for index, rest in places if rest == 0 and 0 <= index < node.runs])
            break
    return (found[0], found[-1]) if edges and len(found) > 1 else found


class Wait(NamedTuple):
    """Between two pieces of a rank nothing of its own runs: it waits for what is on its way."""

    rank: int
    start_ps: int
    end_ps: int
    flights: Sequence[Flight]
    """Communications that are posted or under way, at their place in time."""


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
    waits: Sequence[Wait] = ()
    """When simulated ranks wait between pieces."""
    measured: bool = False
    """Whether it is of a real run: kernels may run at once, and the host may keep all lanes waiting."""
    known_end_ps: int | None = None
    """Its end, if its pieces are written when they are read."""

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

    @lazy
    def layers(self) -> Mapping[Recording, int]:
        """Each recording of layers with the number of pieces that share it."""
        counts: dict[Recording, int] = {}
        for leaf in self.leaves:
            if leaf.stretch.layer is not None:
                counts[leaf.stretch.recording] = counts.get(leaf.stretch.recording, 0) + leaf.pieces
        return counts

    def described(self) -> Iterator[tuple[Recording, Sequence[TaskInfo], int]]:
        """Each recording with what its tasks are, by the first piece that shares it, and the number of pieces."""
        first = {leaf.stretch.recording: leaf.stretch for leaf in reversed(self.leaves)}
        for recording, (_, count) in self.recordings.items():
            yield recording, self.describe(first[recording].run(0)), count

    def pieces_of(self, phase: Pass, layer: int | None, micro_batch: int | None) -> Iterator[Piece]:
        """The pieces of a pass of one layer and micro-batch, in order; those of a measured run belong to no layer."""
        for leaf in self._leaves_of(phase, layer):
            yield from leaf.find(_one(layer), _one(micro_batch))

    def _leaves_of(self, phase: Pass, layer: int | None) -> Sequence[Leaf]:
        """Those of a pass. Where it has layers and one is asked for, the blocks around them are left out."""
        own = [leaf for leaf in self.leaves if leaf.stretch.phase == phase]
        layers = [leaf for leaf in own if leaf.stretch.layer is not None]
        return layers if layers and layer is not None else own

    def pieces_in(self, layers: Collection[int], micro_batches: Collection[int]) -> list[Piece]:
        """The pieces of some layers and micro-batches and those that belong to none, in order of tasks."""
        found = (piece for leaf in self.leaves for piece in leaf.find(layers, micro_batches))
        return sorted(found, key=lambda piece: piece.first_task)

    def window_of(self, phase: Pass, layer: int | None, micro_batch: int | None) -> tuple[int, int]:
        """When the first task of a pass of one layer and micro-batch is posted, and when the last ends."""
        windows = [w for leaf in self._leaves_of(phase, layer) for w in leaf.windows(layer, micro_batch)]
        return (min(windows)[0], max([end for _, end in windows])) if windows else (0, 0)

    def pieces_during(self, start: int, end: int) -> Iterator[Piece]:
        """The pieces that are under way between two moments, in order."""
        for node in self.nodes:
            yield from pieces_during(node, start, end)

    def last_of(self, rank: int) -> Piece:
        """The last piece that a simulated rank runs."""
        return next(leaf.last for leaf in reversed(self.leaves) if rank in leaf.stretch.recording.times)

    def piece_of(self, task: int) -> Piece:
        """The piece that a task belongs to."""
        return self.nodes[place_of(self.nodes, task)].piece_of(task)

    @property
    def num_spans(self) -> int:
        """Spans of all pieces."""
        return sum(n * len(made.times) * len(made.outline.labels) for made, (_, n) in self.recordings.items())

    @lazy
    def end_ps(self) -> int:
        """End of the last span."""
        return max(map(end_of, self.nodes), default=0) if self.known_end_ps is None else self.known_end_ps


def _one(number: int | None) -> tuple[int] | None:
    return None if number is None else (number,)


def _leaves(nodes: Sequence[Node], around: tuple[Repeat, ...]) -> Iterator[Leaf]:
    for node in nodes:
        if isinstance(node, Stretch):
            yield Leaf(node, around)
        else:
            yield from _leaves(node.body, (*around, node))
