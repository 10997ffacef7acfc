"""The ranks of a step: which are simulated, whom each stands for, and whom it meets."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from spsim.engine.tasks import Meeting, RankProgram, Task
from spsim.lazy import lazy
from spsim.program.mesh import Axis, Mesh
from spsim.step.segments import Call, Segment

Communicator = tuple[object, ...]
"""Axes and ranks."""


@dataclass(frozen=True)
class Ranks:
    """Ranks of a mesh of which some are simulated: all, one for all, or one for each position on the ring."""

    mesh: Mesh
    simulated: Literal["each", "one", "positions"]

    @lazy
    def copies(self) -> Mapping[int, Sequence[int]]:
        """Simulated rank -> the ranks that it stands for, itself included."""
        ranks = range(self.mesh.ranks)
        if self.simulated == "one":
            return {0: ranks}
        if self.simulated == "each":
            return {rank: range(rank, rank + 1) for rank in ranks}
        found: dict[int, list[int]] = defaultdict(list)
        for rank in ranks:
            found[self.mesh.coordinate(rank, "ring")].append(rank)
        return {copies[0]: tuple(copies) for copies in found.values()}

    def copies_on(self, stages: int) -> Mapping[int, Sequence[int]]:
        """The same on so many stages of a pipeline, whose ranks follow each other."""
        if stages not in self._on_stages:
            firsts = range(0, stages * self.mesh.ranks, self.mesh.ranks)
            self._on_stages[stages] = {
                first + rank: [first + copy for copy in copies]
                for first in firsts
                for rank, copies in self.copies.items()
            }
        return self._on_stages[stages]

    @lazy
    def _on_stages(self) -> dict[int, Mapping[int, Sequence[int]]]:
        return {}

    @property
    def number(self) -> int:
        """Of those that are simulated."""
        return {"one": 1, "positions": self.mesh.degree("ring"), "each": self.mesh.ranks}[self.simulated]

    @lazy
    def positions(self) -> Mapping[int, int]:
        """Simulated rank -> its position on the ring, which says which entry of a kernel's work is its own."""
        return {rank: self.mesh.coordinate(rank, "ring") for rank in self.copies}

    def representative(self, rank: int) -> int:
        """The rank that is simulated for it."""
        if self.simulated == "positions":
            return self._of_position[self.mesh.coordinate(rank, "ring")]
        return 0 if self.simulated == "one" else rank

    @lazy
    def _of_position(self) -> Mapping[int, int]:
        return {position: rank for rank, position in self.positions.items()}

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
        """Ranks of the group, each replaced by the one that is simulated for it, in order of the axis."""
        if self.simulated == "one":
            return (0,)
        return tuple(self.representative(member) for member in self.mesh.group(rank, axes))


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
