"""How full memory is in rows of visits whose segments leave nothing undone: of all segments at once.

It is what `Recording.fullest` says of each segment and `results.metrics.profile` of each row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from spsim.engine.lives import COLUMNS, Integers
from spsim.lazy import lazy
from spsim.step.itinerary import Item, Visit, segments_of
from spsim.step.segments import Segment


class Place(NamedTuple):
    """A task of a segment."""

    segment: str
    layer: int | None
    task: int = 0


class Level(NamedTuple):
    """How full memory is in a row of visits, in bytes over what is there before."""

    highest: int
    left: int
    where: Place
    """In which segment it is highest."""


class Levels:
    """Of rows of visits of one rank, whatever the times and sizes."""

    def __init__(self, rows: Sequence[Sequence[Item]], segments: Sequence[Segment]) -> None:
        """`segments` are those of the rows, but for some that have no buffers, in the order of their moments."""
        self.rows = rows
        visited = {segment.name: segment for own in rows for segment in segments_of(own)}
        self.empty = {name: (0, 0) for name, segment in visited.items() if not segment.buffers}
        firsts = np.cumsum([0, *(len(segment.tasks) for segment in segments)])
        own = [(segment, first) for segment, first in zip(segments, firsts, strict=False) if segment.buffers]
        self.names = [segment.name for segment, _ in own]
        lives = [segment.outline.lives for segment, _ in own]
        most = max(len(each.places) for each in lives)
        padded = [each.places[np.minimum(np.arange(most), len(each.places) - 1)] for each in lives]
        shifted = [places + len(COLUMNS) * first for places, (_, first) in zip(padded, own, strict=True)]
        self._places = np.concatenate(shifted, axis=2)
        """Of the moments that free and that allocate each buffer."""
        self._signs = np.concatenate([each.signs for each in lives], axis=1)
        self._crossing = np.concatenate([each.crossing for each in lives])
        self.writers = np.concatenate([each.writers for each in lives])
        """Of each buffer, which task of its segment."""
        counts = [len(segment.buffers) for segment, _ in own]
        self._segments = np.tile(np.repeat(np.arange(len(own)), counts), 2)
        """Of each change, which it is in."""
        self.ends = 2 * np.cumsum(counts)
        self.firsts = np.append(0, self.ends[:-1])

    def of(self, moments: Integers, sizes: Mapping[str, Sequence[int] | Integers]) -> Filled:
        """When tasks ran so and buffers have so many bytes. At equal times memory is freed before it is allocated; what
        is written and freed at once takes none.
        """
        times = np.maximum.reduce(moments.take(self._places))
        taken = np.concatenate([sizes[name] for name in self.names]) * (self._crossing | (times[0] != times[1]))
        changes = (self._signs * taken).ravel()
        order = np.lexsort((changes, times.ravel(), self._segments))
        return Filled(self, order, changes[order].cumsum(), sizes)


@dataclass(frozen=True)
class Filled:
    """Rows of visits that ran."""

    of: Levels
    order: Integers
    """Of the changes of memory of each segment in turn."""
    sums: Integers
    """Of all changes so far."""
    sizes: Mapping[str, Sequence[int] | Integers]

    @lazy
    def levels(self) -> list[Level]:
        """Of each row."""
        return [_level(items, self._of_segments, self.sizes) for items in self.of.rows]

    @lazy
    def _of_segments(self) -> Mapping[str, tuple[int, int]]:
        """At the fullest of each, and what is left of it."""
        after = self.sums[self.of.ends - 1]
        before = np.append(0, after[:-1])
        highest = np.maximum.reduceat(self.sums, self.of.firsts) - before
        found = zip(np.maximum(highest, 0).tolist(), (after - before).tolist(), strict=True)
        return dict(zip(self.of.names, found, strict=True)) | self.of.empty

    def fullest(self, row: int) -> Place | None:
        """Where a row is; None where it is never fuller than before."""
        level = self.levels[row]
        if level.highest <= 0:
            return None
        name, layer, _ = level.where
        highest, _ = self._of_segments[name]
        return Place(name, layer, self._first_above(name, highest - 1) if highest > 0 else 0)

    def first_above(self, row: int, room: int) -> Place | None:
        """Whose allocation first takes a row above so much."""
        found, _ = self._above(self.of.rows[row], room)
        return found

    def _above(self, items: Sequence[Item], room: int) -> tuple[Place | None, int]:
        """The same of some items, and how much room there is behind them."""
        for item in items:
            runs, highest, left, _ = _of_run(item, self._of_segments, self.sizes)
            if item.brings:
                room -= _bytes(self.sizes[_first(item).name], item.brings)
            run = max(0, (room - highest) // left + 1) if left > 0 else 0
            if run < runs and highest > room - run * left:
                if isinstance(item, Visit):
                    name = item.segment.name
                    return Place(name, item.layer, self._first_above(name, room)), room
                place, _ = self._above(item.body, room - run * left)
                return place and _in_run(place, item, run), room
            room -= runs * left
            if item.drops:
                room += _bytes(self.sizes[_last(item).name], item.drops)
        return None, room

    def _first_above(self, name: str, room: int) -> int:
        """The first task of a segment whose allocation needs more than there is room for."""
        if name in self.of.empty:
            return 0
        at = self.of.names.index(name)
        first, end = self.of.firsts[at], self.of.ends[at]
        own = self.sums[first:end] - (self.sums[first - 1] if first else 0)
        return int(self.of.writers[self.order[first + (own > room).argmax()] % len(self.of.writers)])


def _level(
    items: Sequence[Item],
    found: Mapping[str, tuple[int, int]],
    sizes: Mapping[str, Sequence[int] | Integers],
) -> Level:
    """Of runs that keep something the last is the fullest, otherwise the first."""
    if not items:
        return Level(0, 0, Place("", None))
    base, top, where, inside, run = 0, None, items[0], None, 0
    for item in items:
        runs, highest, left, inner = _of_run(item, found, sizes)
        if item.brings:
            base += _bytes(sizes[_first(item).name], item.brings)
        last = runs - 1 if left > 0 else 0
        over = base + highest + last * left
        if top is None or over > top:
            top, where, inside, run = over, item, inner, last
        base += runs * left
        if item.drops:
            base -= _bytes(sizes[_last(item).name], item.drops)
    return Level(top or 0, base, _in_run(inside, where, run))


def _of_run(
    item: Item,
    found: Mapping[str, tuple[int, int]],
    sizes: Mapping[str, Sequence[int] | Integers],
) -> tuple[int, int, int, Place | None]:
    """How often an item runs, and how full memory is in the first run, where of a loop."""
    if isinstance(item, Visit):
        return 1, *found[item.segment.name], None
    return int(item.runs), *_level(item.body, found, sizes)


def _in_run(place: Place | None, item: Item, run: int) -> Place:
    """A place of the first run of a loop in another; a visit is one itself."""
    if isinstance(item, Visit):
        return Place(item.segment.name, item.layer)
    assert place is not None
    return place if place.layer is None or not run else place._replace(layer=place.layer + run * item.layers)


def _bytes(sizes: Sequence[int] | Integers, buffers: Sequence[int]) -> int:
    return sum([int(sizes[buffer]) for buffer in buffers])


def _first(item: Item) -> Segment:
    return item.segment if isinstance(item, Visit) else _first(item.body[0])


def _last(item: Item) -> Segment:
    return item.segment if isinstance(item, Visit) else _last(item.body[-1])
