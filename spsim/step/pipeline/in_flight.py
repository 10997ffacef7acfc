"""How many micro-batches of each chunk a rank holds activations of while it runs its passes: order only, no times."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

from spsim.step.pipeline.orders import Action


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
