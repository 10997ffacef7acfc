"""Documents packed into one sequence: a token sees those before it in its document."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from random import Random
from typing import Any

MOST = 2**16
"""Documents of a sequence."""


def drawn(seq_len: int, mean: float, seed: int = 0) -> tuple[int, ...]:
    """Lengths of documents that fill a sequence, in tokens: exponentially distributed, the last one cut off."""
    random, found, left = Random(seed), [], seq_len
    while left > 0:
        found.append(min(left, math.ceil(random.expovariate(1 / mean))))
        left -= found[-1]
    return tuple(found)


def lengths_of(value: Any, seq_len: Any) -> Any:
    """Lengths as given, or drawn by `mean` and `seed` of a table; `ValueError` says what is wrong with it."""
    if value is not None and not isinstance(value, Mapping | list | tuple):
        raise ValueError(f"documents = {value!r}: give lengths, or a mean and a seed")
    if not isinstance(value, Mapping) or not isinstance(seq_len, int):
        return value
    mean, seed = value.get("mean"), value.get("seed", 0)
    known = value.keys() <= {"mean", "seed"} and isinstance(seed, int)
    if not known or not isinstance(mean, int | float) or not seq_len / MOST <= mean < math.inf or mean < 1:
        raise ValueError(
            f"documents = {dict(value)}: give lengths, or a mean of at least {max(1, -(-seq_len // MOST))} and a seed"
        )
    return drawn(seq_len, mean, seed)


@dataclass(frozen=True)
class Visible:
    """What some queries see of some keys."""

    twice_pairs: int
    """Twice the pairs, the diagonal counted half, as those of a causal square are."""
    documents: int
    """That have such pairs."""
    longest: int
    """Keys of the one that has most."""


@dataclass(frozen=True)
class Documents:
    """The causal mask of documents in a row, and perhaps of a window in each."""

    lengths: tuple[int, ...]
    window: int | None = None

    @cached_property
    def tokens(self) -> int:
        """Of the sequence."""
        return sum(self.lengths)

    @cached_property
    def spans(self) -> tuple[tuple[int, int], ...]:
        """First token of each, and the one behind its last."""
        ends = [*accumulate(self.lengths)]
        return tuple(zip([0, *ends], ends, strict=False))

    def of_queries(self, *parts: range) -> Visible:
        """Queries of some parts of the sequence, of all keys."""
        seen = [
            (self._up_to(end - first) - self._up_to(begin - first), end - first)
            for part in parts
            for first, begin, end in self._within(part)
        ]
        return Visible(sum(pairs for pairs, _ in seen), len(seen), max((keys for _, keys in seen), default=0))

    def between(self, queries: tuple[range, ...], keys: tuple[range, ...]) -> Visible:
        """Queries of some parts, of the keys of some parts; each part is before another one, behind it or the same."""
        seen = [own for one in queries for other in keys for own in self._seen(one, other)]
        return Visible(sum(pairs for pairs, _ in seen), len(seen), max((held for _, held in seen), default=0))

    def _seen(self, queries: range, keys: range) -> Iterator[tuple[int, int]]:
        """Twice the pairs of each document, and its keys; without windows."""
        if keys.start > queries.start:
            return
        held = {first: end - begin for first, begin, end in self._within(keys)}
        for first, begin, end in self._within(queries):
            if first in held:
                yield ((end - begin) ** 2 if keys == queries else 2 * (end - begin) * held[first]), held[first]

    def _within(self, part: range) -> Iterator[tuple[int, int, int]]:
        """Documents that have tokens in a part: where each begins, and the part of it that is there."""
        for begin, end in self.spans:
            if begin < part.stop and end > part.start:
                yield begin, max(begin, part.start), min(end, part.stop)

    def _up_to(self, tokens: int) -> int:
        """Twice the pairs of the first tokens of a document."""
        square = tokens * tokens
        if self.window is None:
            return square
        seen = min(self.window, tokens)
        return min(square, seen * (2 * tokens - seen + 1))


def parts_of(tokens: int, degree: int, position: int, cut: str) -> tuple[range, ...]:
    """The tokens of a position on a ring: one part in a row, or of twice as many one from the front and one from the
    back (zigzag).
    """
    if cut == "contiguous":
        size = tokens // degree
        return (range(position * size, (position + 1) * size),)
    size = tokens // (2 * degree)
    return tuple(range(place * size, (place + 1) * size) for place in (position, 2 * degree - 1 - position))
