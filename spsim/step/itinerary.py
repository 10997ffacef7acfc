"""The itinerary of a step: which segment runs when, for which layer and micro-batch.

It lists the visits of all stages in one order; visits of different ranks do not wait for their place in it, so that
any order serves that keeps each stage's own and puts what stages do together where all of them have come to it. What
comes again and again stands there once, in a loop: a step of a ring, the layers of a pass, micro-batches, the steady
state of a pipeline.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from spsim.step.segments import BlockPass, Segment

Runs = int | npt.NDArray[np.int64]
"""How often, or how often for each of many workloads."""


@dataclass(frozen=True, slots=True)
class Visit:
    """One run of a segment, in the first run of the loops around it."""

    segment: Segment
    layer: int | None = None
    micro_batch: int | None = None
    brings: tuple[int, ...] = ()
    """Buffers that come from outside the step's blocks."""
    drops: tuple[int, ...] = ()
    """Buffers that no later segment frees."""


@dataclass(frozen=True, slots=True)
class Loop:
    """Visits and loops that run a number of times."""

    body: tuple[Visit | Loop, ...]
    runs: Runs
    layers: int = 0
    """From one run to the next, as `micro_batches`."""
    micro_batches: int = 0
    brings: tuple[int, ...] = ()
    """Of the first visit of the first run, buffers that come from outside."""
    drops: tuple[int, ...] = ()
    """Of the last visit of the last run, buffers that no later segment frees."""


Item = Visit | Loop


def layers_of(block: BlockPass, layers: range, micro_batch: int = 0) -> Loop:
    """One pass of equal layers, in the order of `layers`."""
    step = layers.step if len(layers) > 1 else 1
    visits = (Visit(part.segment, layers[0], micro_batch) for part in block.parts)
    body = tuple(
        visit if part.runs == 1 else Loop((visit,), part.runs) for visit, part in zip(visits, block.parts, strict=True)
    )
    return Loop(body, len(layers), layers=step, brings=block.entry, drops=block.result)


def accumulation(passes: Sequence[BlockPass], layers: int, micro_batches: Runs) -> Loop:
    """Each micro-batch goes up through all layers and, with a second pass, down again."""
    orders = (range(layers), range(layers - 1, -1, -1))
    body = tuple(layers_of(block, order) for block, order in zip(passes, orders, strict=False))
    return Loop(body, micro_batches, micro_batches=1)


def segments_of(items: Sequence[Item]) -> Iterator[Segment]:
    """The segment of each visit, loops read once."""
    for item in items:
        if isinstance(item, Visit):
            yield item.segment
        else:
            yield from segments_of(item.body)


def visits(items: Sequence[Item]) -> Iterator[Visit]:
    """All visits in order, loops written out."""
    for item in items:
        if isinstance(item, Visit):
            yield item
            continue
        for run in range(int(item.runs)):
            yield from _run(item, run)


def _run(loop: Loop, run: int) -> Iterator[Visit]:
    """One run of a loop."""
    last = run == int(loop.runs) - 1
    own = list(visits(loop.body))
    for place, visit in enumerate(own):
        yield Visit(
            visit.segment,
            None if visit.layer is None else visit.layer + run * loop.layers,
            None if visit.micro_batch is None else visit.micro_batch + run * loop.micro_batches,
            visit.brings + (loop.brings if run == 0 and place == 0 else ()),
            visit.drops + (loop.drops if last and place == len(own) - 1 else ()),
        )
