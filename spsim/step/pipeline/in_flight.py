"""How many micro-batches of each chunk a rank holds activations of while it runs its passes: order only, no times."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np

from spsim.step.pipeline.orders import KINDS, Action, Numbers
from spsim.step.pipeline.tape import Score


def held(row: Sequence[Action], chunks: int, until: Literal["I", "W"] = "W") -> Iterator[tuple[int, ...]]:
    """For each pass, micro-batches by chunk whose activations are there while it runs, its own among them.

    They are there from the forward pass to the end of the backward one; where that is halved, to the end of W, which
    frees the graph, or of I, for what the weight gradients do not read.
    """
    count = [0] * chunks
    for action in row:
        count[action.chunk] += action.kind == "F"
        yield tuple(count)
        count[action.chunk] -= action.kind in ("B", until)


def most_held(row: Sequence[Action], chunk_bytes: Sequence[float], until: Literal["I", "W"] = "W") -> tuple[int, ...]:
    """By chunk, at the first pass at which they take most, if a micro-batch of a chunk takes so many bytes."""
    return max(
        held(row, len(chunk_bytes), until),
        key=lambda count: sum(each * size for each, size in zip(count, chunk_bytes, strict=True)),
    )


class Fullest(NamedTuple):
    """Passes before which ranks hold the most of a step of whole backward passes: a row for each."""

    ranks: Numbers
    kinds: Numbers
    """Places in `KINDS`."""
    chunks: Numbers
    held: Numbers
    """By chunk, micro-batches whose activations are there before."""


def fullest(score: Score, alike: Numbers) -> Fullest:
    """Of ranks that are `alike`, by a number each, and of passes of a chunk and kind, those before which no other holds
    as many micro-batches of every chunk or more: one of them is the fullest, whatever activations take.
    """
    kinds, chunks, _ = score.columns
    moves = np.zeros((len(kinds), score.stages.chunks), np.int64)
    moves[np.arange(len(kinds)), chunks] = np.where(kinds == KINDS.index("F"), 1, -1)
    before = moves.cumsum(axis=0) - moves  # each rank ends with none
    keys = (alike[score.ranks] * score.stages.chunks + chunks) * len(KINDS) + kinds
    order = np.argsort(keys, kind="stable")
    groups = np.split(order, np.flatnonzero(np.diff(keys[order])) + 1)
    places = np.array([place for group in groups for place in _not_less(before, group)])
    return Fullest(score.ranks[places], kinds[places], chunks[places], before[places])


def _not_less(rows: Numbers, among: Numbers) -> Iterator[int]:
    """Some rows without those that are nowhere more than another."""
    while len(among):
        own = rows[among]
        most = int(own.sum(axis=1).argmax())
        yield int(among[most])
        among = among[(own > own[most]).any(axis=1)]
