"""The itinerary of a step: which segment runs when, for which layer and micro-batch.

It lists the visits of all stages in one order; visits of different ranks do not wait for their place in it, so that
any order serves that keeps each stage's own and puts what stages do together where all of them have come to it. What
comes again and again stands there once, in a loop: a step of a ring, the layers of a pass, micro-batches, the steady
state of a pipeline.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from spsim.engine.pieces import Pass
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


@dataclass(frozen=True, slots=True)
class Run:
    """Equal blocks in a row."""

    block: str
    count: int = 1
    numbered: bool = True
    """Whether they are layers, which have numbers."""
    layers: int = 1
    """Of each: units of several are recomputed together."""


Chunk = Sequence[Run]
"""What a rank runs of a micro-batch from one message to the next, in forward order."""
Blocks = Mapping[str, Mapping[Pass, BlockPass]]
"""The passes of each block."""


def layers_of(block: BlockPass, layers: range, micro_batch: int = 0) -> Loop:
    """One pass of equal layers, in the order of `layers`."""
    step = layers.step if len(layers) > 1 else 1
    return Loop(_visits(block, layers[0], micro_batch), len(layers), step, brings=block.entry, drops=block.result)


def _visits(block: BlockPass, layer: int | None, micro_batch: int) -> tuple[Item, ...]:
    """One pass of one block."""
    visits = (Visit(part.segment, None if layer is None else layer + part.layer, micro_batch) for part in block.parts)
    return tuple(
        visit if part.runs == 1 else Loop((visit,), part.runs) for visit, part in zip(visits, block.parts, strict=True)
    )


def chunk_pass(blocks: Blocks, chunk: Chunk, phase: Pass, *, first: int = 0, micro_batch: int = 0) -> tuple[Loop, ...]:
    """One pass of a chunk whose layers are numbered from `first`. A block finds what the one before hands on; what it
    reads beyond that, such as the targets of the loss, comes from outside.
    """
    found: list[Loop] = []
    for run in chunk:
        block = blocks[run.block][phase]
        if run.numbered:
            numbers = range(first, first + run.count * run.layers, run.layers)
            found.append(layers_of(block, numbers if phase == "forward" else numbers[::-1], micro_batch))
            first += run.count * run.layers
        else:
            found.append(Loop(_visits(block, None, micro_batch), run.count, brings=block.entry, drops=block.result))
    if phase == "backward":
        found.reverse()
    handed_on = [0, *(len(loop.drops) for loop in found[:-1])]
    last = len(found) - 1
    return tuple(
        replace(loop, brings=loop.brings[known:], drops=loop.drops if place == last else ())
        for place, (loop, known) in enumerate(zip(found, handed_on, strict=True))
    )


def accumulation(blocks: Blocks, chunk: Chunk, micro_batches: Runs) -> Loop:
    """Each micro-batch goes up through all blocks and, if they have a second pass, down again."""
    phases: list[Pass] = ["forward", "backward"]
    own = [phase for phase in phases if all(phase in blocks[run.block] for run in chunk)]
    body = tuple(loop for phase in own for loop in chunk_pass(blocks, chunk, phase))
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
