"""Rows of visits, each of which begins with all lanes free."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, takewhile

from spsim.engine.lives import Integers
from spsim.engine.recording import Ran, columns
from spsim.lazy import lazy
from spsim.step.itinerary import Item, Visit, segments_of
from spsim.step.lanes import end_alone
from spsim.step.levels import Filled, Levels
from spsim.step.segments import Segment
from spsim.step.sums import Sums


class Rows:
    """Rows of visits of one rank, whatever the numbers of their segments."""

    def __init__(self, items: Sequence[Sequence[Item]]) -> None:
        self.items = items
        self.segments = {segment.name: segment for own in items for segment in segments_of(own)}
        self.tails = [[*_tail(own)] for own in items]
        """Segments at the end of each whose tasks run one after another."""
        self.visits = [_visits(own[: len(own) - len(tail)]) for own, tail in zip(items, self.tails, strict=True)]
        """How often each runs other segments."""
        self.names = [*dict.fromkeys(name for own in self.visits for name in own)]
        """Of those."""

    @lazy
    def tail_tasks(self) -> int:
        """Tasks of all tails."""
        return sum(len(segment.tasks) for own in self.tails for segment in own)

    @lazy
    def levels(self) -> Levels:
        """How full memory is in each, whatever the times and sizes."""
        return Levels(self.items, self._others)

    @lazy
    def sums(self) -> Sums:
        """How often segments count in the first."""
        return Sums(self.items[0], self._others)

    @property
    def _others(self) -> list[Segment]:
        return [self.segments[name] for name in self.names]

    def ran(
        self,
        moments: Mapping[str, Ran],
        durations: Mapping[str, Mapping[int, Sequence[int]]],
        sizes: Mapping[str, Sequence[int] | Integers],
    ) -> RanApart | None:
        """As their segments ran with all lanes free; None where one did not, or leaves anything undone."""
        lengths: dict[str, int] = {}
        for name in self.names:
            end = end_alone(self.segments[name], moments[name]) if name in moments else None
            if end is None:
                return None
            lengths[name] = end
        for tail in chain.from_iterable(self.tails):
            lengths[tail.name] = sum(*durations[tail.name].values())
        return RanApart(self, lengths, moments, sizes)


def _tail(items: Sequence[Item]) -> Iterator[Segment]:
    found = takewhile(lambda item: isinstance(item, Visit) and item.segment.closes, reversed(items))
    return (segment for item in found for segment in segments_of([item]))


def _visits(items: Sequence[Item]) -> Counter[str]:
    found: Counter[str] = Counter()
    for item in items:
        if isinstance(item, Visit):
            found[item.segment.name] += 1
        else:
            for name, times in _visits(item.body).items():
                found[name] += times * int(item.runs)
    return found


@dataclass(frozen=True)
class RanApart:
    """Rows that ran, none of whose segments left anything undone."""

    rows: Rows
    lengths: Mapping[str, int]
    """Picoseconds of each segment."""
    ran: Mapping[str, Ran]
    """Of the tasks of segments that are no tails."""
    sizes: Mapping[str, Sequence[int] | Integers]

    @lazy
    def ends_ps(self) -> list[int]:
        """When each row ends."""
        lengths = self.lengths
        return [
            sum([runs * lengths[name] for name, runs in visits.items()]) + sum([lengths[own.name] for own in tail])
            for visits, tail in zip(self.rows.visits, self.rows.tails, strict=True)
        ]

    @lazy
    def moments(self) -> Integers:
        """Of the same tasks."""
        return columns([*chain.from_iterable([self.ran[name] for name in self.rows.names])])

    @lazy
    def filled(self) -> Filled:
        """How full memory is."""
        return self.rows.levels.of(self.moments, self.sizes)

    @lazy
    def kernels(self) -> dict[str, list[int]]:
        """Picoseconds of kernels by segment and its classes."""
        return self.rows.sums.of_classes(self.moments)
