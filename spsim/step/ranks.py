"""The ranks of a step: which are simulated, whom each stands for, and whom it meets."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import Literal, NamedTuple

from spsim.engine.tasks import Meeting, RankProgram, Task
from spsim.lazy import lazy
from spsim.program.mesh import Axis, Mesh
from spsim.step.segments import Call, Segment

Communicator = tuple[object, ...]
"""Axes and ranks."""


Marks = tuple[tuple[int, Hashable], ...]
"""Ranks, each with what makes it unlike others."""


class _Places(NamedTuple):
    """Places on an axis, and which of them are simulated."""

    degree: int
    told: Mapping[int, int]
    """Place that bears marks, or that meets its neighbours -> the one that is simulated for it."""
    rest: int | None
    """The one for all others, if there are any."""

    @property
    def simulated(self) -> list[int]:
        """In order."""
        return sorted({*self.told.values(), *([] if self.rest is None else [self.rest])})

    def of(self, place: int) -> int:
        """The one that is simulated for a place."""
        return self.told.get(place, self.rest or 0)

    def alike(self, stride: int) -> dict[int, list[int]]:
        """Of each that is simulated those that it stands for, as distances of ranks."""
        found: dict[int, list[int]] = defaultdict(list)
        for place in range(self.degree):
            found[self.of(place) * stride].append(place * stride)
        return found


@dataclass(frozen=True)
class Ranks:
    """Ranks of a mesh of which some are simulated: all, one for all, or one for each position on the ring.

    Where ranks are marked, one for all that stand alike towards them: places on an axis whose ranks bear the same
    marks may change places, and nobody would know, unless they meet their neighbours there.
    """

    mesh: Mesh
    simulated: Literal["each", "one", "positions"]
    marks: Marks = ()
    exchanging: frozenset[Axis] = frozenset({"ring"})
    """Axes on which ranks meet their neighbours."""

    @lazy
    def copies(self) -> Mapping[int, Sequence[int]]:
        """Simulated rank -> the ranks that it stands for, itself included."""
        ranks = self.mesh.numbers
        if self.number == 1:
            return {0: ranks}
        if self.number == len(ranks):
            return {rank: range(rank, rank + 1) for rank in ranks}
        axes = self.mesh.axes
        alike = [self._places[axis].alike(self.mesh.strides[axis]) for axis in axes]
        return {
            sum(own for own, _ in places): [*map(sum, product(*(others for _, others in places)))]
            for places in product(*(found.items() for found in alike))
        }

    def copies_on(self, stages: int) -> Mapping[int, Sequence[int]]:
        """The same on so many stages of a pipeline."""
        if stages not in self._on_stages:
            self._on_stages[stages] = {
                self.on_stage(stage, rank): self._all_on_stage(stage, copies)
                for stage in range(stages)
                for rank, copies in self.copies.items()
            }
        return self._on_stages[stages]

    def _all_on_stage(self, stage: int, ranks: Sequence[int]) -> Sequence[int]:
        """The same of many, without writing out those that follow each other."""
        if isinstance(ranks, range):
            return range(self.on_stage(stage, ranks.start), self.on_stage(stage, ranks.stop), ranks.step)
        return [self.on_stage(stage, rank) for rank in ranks]

    def on_stage(self, stage: int, rank: int) -> int:
        """The number, among the ranks of all stages, of the one that is on a stage what `rank` is on the first."""
        return stage * self.mesh.strides["pp"] + rank

    @lazy
    def _on_stages(self) -> dict[int, Mapping[int, Sequence[int]]]:
        return {}

    @lazy
    def _places(self) -> Mapping[Axis, _Places]:
        return {axis: self._places_on(axis) for axis in self.mesh.axes}

    def _places_on(self, axis: Axis) -> _Places:
        degree, stride = self.mesh.degree(axis), self.mesh.strides[axis]
        marked: dict[int, set[tuple[int, Hashable]]] = defaultdict(set)
        for rank, mark in self.marks:
            place = self.mesh.coordinate(rank, axis)
            marked[place].add((rank - place * stride, mark))
        first: dict[frozenset[tuple[int, Hashable]], int] = {}
        found = {place: first.setdefault(frozenset(marked[place]), place) for place in sorted(marked)}
        rest = next((place for place in range(degree) if place not in found), None)
        differ = len(first) + (rest is not None) > 1
        positions = axis == "ring" and self.simulated == "positions"
        if self.simulated == "each" or positions or (axis in self.exchanging and differ):
            return _Places(degree, {place: place for place in range(degree)}, None)
        return _Places(degree, found, rest)

    @lazy
    def number(self) -> int:
        """Of those that are simulated."""
        return prod(len(own.simulated) for own in self._places.values())

    @property
    def shape(self) -> tuple[int, ...]:
        """How many places on each axis are simulated: ranks that are, are all with such places."""
        return tuple([len(own.simulated) for own in self._places.values()])

    @lazy
    def in_rows(self) -> list[int]:
        """The ranks that are simulated, in order of their places on the first axis, on the second, and so on."""
        strides = self.mesh.strides
        places = ([strides[axis] * place for place in own.simulated] for axis, own in self._places.items())
        return [*map(sum, product(*places))]

    @lazy
    def positions(self) -> Mapping[int, int]:
        """Simulated rank -> its position on the ring, which says which entry of a kernel's work is its own."""
        return {rank: self.mesh.coordinate(rank, "ring") for rank in self.copies}

    def representative(self, rank: int) -> int:
        """The rank that is simulated for it."""
        mesh = self.mesh
        return sum(own.of(mesh.coordinate(rank, axis)) * mesh.strides[axis] for axis, own in self._places.items())

    def programs(self, segment: Segment) -> dict[int, RankProgram]:
        """The tasks of each simulated rank, with its meetings."""
        found: dict[int, RankProgram] = {}
        first: RankProgram | None = None
        for rank in self.copies:
            found[rank] = RankProgram([*self._tasks(segment, rank)], like=first)
            first = first or found[rank]
        return found

    def _tasks(self, segment: Segment, rank: int) -> Iterator[Task]:
        """Of a group each call is told apart by its number."""
        called: dict[Communicator, int] = defaultdict(int)
        known: dict[Call, Sequence[tuple[Communicator, int]]] = {}
        for task in segment.tasks:
            call = segment.calls.get(task.id)
            if call is None:
                yield task
                continue
            if call not in known:
                known[call] = self._communicators(call, rank)
            communicators = known[call]
            for communicator, _ in communicators:
                called[communicator] += 1
            yield task._replace(meetings=tuple([Meeting((own, called[own]), ranks) for own, ranks in communicators]))

    def _communicators(self, call: Call, rank: int) -> Sequence[tuple[Communicator, int]]:
        """What a call meets in, and how many: a collective its whole group, an exchange the next rank and the previous
        one.
        """
        group = self._group(rank, call.axes)
        if not call.exchange:
            members = sorted(set(group))
            return [((*call.axes, members[0]), len(members))]
        here = group.index(rank)
        edges = dict.fromkeys([(rank, group[(here + 1) % len(group)]), (group[here - 1], rank)])
        return [((*call.axes, *edge), len(set(edge))) for edge in edges]

    def _group(self, rank: int, axes: tuple[Axis, ...]) -> tuple[int, ...]:
        """Ranks that are simulated for the group of one that is, in order of the axis."""
        mesh = self.mesh
        own = [axis for axis in mesh.axes if axis in axes]
        places = ([mesh.strides[axis] * place for place in self._places[axis].simulated] for axis in own)
        first = mesh.first(rank, own)
        return tuple([first + sum(offsets) for offsets in product(*places)])


@dataclass(frozen=True)
class Groups(Mapping[str, Mapping[int, tuple[int, ...]]]):
    """Axes -> rank -> the ranks of its group; found when somebody asks, for there are as many as ranks."""

    mesh: Mesh
    names: Mapping[str, tuple[Axis, ...]]

    def __getitem__(self, name: str) -> Mapping[int, tuple[int, ...]]:
        axes = self.names[name]
        return {rank: self.mesh.group(rank, axes) for rank in range(self.mesh.ranks)}

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def groups_of(mesh: Mesh, segments: Iterable[Segment]) -> Groups:
    """The groups that some segments call, and stages of a pipeline, which send each other messages."""
    calls = (call for segment in segments for call in segment.calls.values())
    axes: set[tuple[Axis, ...]] = {call.axes for call in calls if call.axes}
    axes |= {(axis,) for axis in mesh.axes if axis == "pp"}
    return Groups(mesh, {" × ".join(own): own for own in sorted(axes)})
