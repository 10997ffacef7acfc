"""How full memory is in rows of visits whose segments leave nothing undone: of all segments at once.

It is what `Recording.fullest` says of each segment and `results.metrics.profile` of each row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain

import numpy as np

from spsim.engine.recording import COLUMNS, Integers, Ran, columns
from spsim.step.itinerary import Item, Visit
from spsim.step.segments import Segment

Level = tuple[int, int]
"""Bytes over what is there before: at the fullest, and what is left."""


class Levels:
    """Of rows of visits of one rank, whatever the times and sizes."""

    def __init__(self, rows: Sequence[Sequence[Item]], segments: Mapping[str, Segment]) -> None:
        self._rows = rows
        self._empty = {name: (0, 0) for name, segment in segments.items() if not segment.buffers}
        own = [segment for segment in segments.values() if segment.buffers]
        self._names = [segment.name for segment in own]
        lives = [segment.outline.lives for segment in own]
        most = max(len(each.places) for each in lives)
        firsts = np.cumsum([0, *(len(segment.tasks) for segment in own)])
        padded = [each.places[np.minimum(np.arange(most), len(each.places) - 1)] for each in lives]
        shifted = [places + len(COLUMNS) * first for places, first in zip(padded, firsts, strict=False)]
        self._places = np.concatenate(shifted, axis=2)
        """Of the moments that free and that allocate each buffer."""
        self._signs = np.concatenate([each.signs for each in lives], axis=1)
        self._crossing = np.concatenate([each.crossing for each in lives])
        counts = [len(segment.buffers) for segment in own]
        self._segments = np.tile(np.repeat(np.arange(len(own)), counts), 2)
        """Of each change, which it is in."""
        self._ends = 2 * np.cumsum(counts)

    def of(self, moments: Mapping[str, Ran], sizes: Mapping[str, Sequence[int] | Integers]) -> list[Level]:
        """Of each row, whose segments ran so and have buffers of so many bytes."""
        found = dict(zip(self._names, self._of_segments(moments, sizes), strict=True)) | self._empty
        return [_level(own, found, sizes) for own in self._rows]

    def _of_segments(
        self, moments: Mapping[str, Ran], sizes: Mapping[str, Sequence[int] | Integers]
    ) -> Sequence[Level]:
        """At equal times memory is freed before it is allocated; what is written and freed at once takes none."""
        ran = columns([*chain.from_iterable(moments[name] for name in self._names)])
        times = np.maximum.reduce(ran.take(self._places))
        taken = np.concatenate([sizes[name] for name in self._names]) * (self._crossing | (times[0] != times[1]))
        changes = self._signs * taken
        order = np.lexsort((changes.ravel(), times.ravel(), self._segments))
        sums = changes.ravel()[order].cumsum()
        after = sums[self._ends - 1]
        before = np.append(0, after[:-1])
        highest = np.maximum.reduceat(sums, np.append(0, self._ends[:-1])) - before
        return [*zip(np.maximum(highest, 0).tolist(), (after - before).tolist(), strict=True)]


def _level(items: Sequence[Item], found: Mapping[str, Level], sizes: Mapping[str, Sequence[int] | Integers]) -> Level:
    """Of runs that keep something the last is the fullest, otherwise the first."""
    base, top = 0, None
    for item in items:
        runs = 1 if isinstance(item, Visit) else int(item.runs)
        highest, left = found[item.segment.name] if isinstance(item, Visit) else _level(item.body, found, sizes)
        if item.brings:
            base += _bytes(sizes[_first(item).name], item.brings)
        over = base + highest + ((runs - 1) * left if left > 0 else 0)
        top = over if top is None or over > top else top
        base += runs * left
        if item.drops:
            base -= _bytes(sizes[_last(item).name], item.drops)
    return top or 0, base


def _bytes(sizes: Sequence[int] | Integers, buffers: Sequence[int]) -> int:
    return sum([int(sizes[buffer]) for buffer in buffers])


def _first(item: Item) -> Segment:
    return item.segment if isinstance(item, Visit) else _first(item.body[0])


def _last(item: Item) -> Segment:
    return item.segment if isinstance(item, Visit) else _last(item.body[-1])
