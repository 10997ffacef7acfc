"""How long buffers live in a pass, and how full that makes memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Integers = npt.NDArray[Any]
"""64 bits each, or Python's own where that is too few."""
POSTED, STARTED, ENDED = COLUMNS = range(3)
"""Columns of an array of moments."""
MANY = 4
"""Ranks that are faster worked out together."""


class Lives(NamedTuple):
    """What frees and what allocates each buffer of a pass: two rows, and a column for each buffer."""

    places: Integers
    """Where it is in a flat array of moments: the end of the last task of each lane that reads a buffer, or of the one
    that writes it; when the one that writes it is posted.
    """
    buffers: Integers
    """Which buffer it is, of both rows in turn."""
    signs: Integers
    """-1 where it is freed and 1 where it is allocated in this pass, 0 where it outlives it or was there before."""
    crossing: Integers
    """Which buffers are there before the segment or after it."""
    writers: Integers
    """Task that writes each buffer."""


class Fullest(NamedTuple):
    """The highest running sum of the memory changes of a pass on a rank, and the sum of all."""

    bytes: int
    time_ps: int
    task: int
    """Whose allocation reaches it."""
    total: int


def fullest_of(moments: Integers, lives: Lives, sizes: Sequence[int] | Integers) -> Iterator[Fullest]:
    """Of ranks whose tasks ran so, a row for each, where nothing else changes their memory."""
    times = np.maximum.reduce(moments.reshape(len(moments), -1).take(lives.places, axis=1), axis=1)
    taken = np.asarray(sizes) * (lives.crossing | (times[:, 0] != times[:, 1]))
    times, changes = (own.reshape(len(own), -1) for own in (times, lives.signs * taken[:, None]))
    order = np.lexsort((changes, times))
    sums = np.take_along_axis(changes, order, axis=1).cumsum(axis=1)
    for own, when, place in zip(sums, times, order, strict=True):
        at = own.argmax()
        change, highest, total = place.item(at), own.item(at), own.item(-1)
        task = lives.writers.item(lives.buffers.item(change))
        yield Fullest(highest, when.item(change), task, total) if highest > 0 else Fullest(0, 0, 0, total)
