"""The blocks of a rank whose weights other ranks hold, too: all micro-batches of a step, with what they send."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby, pairwise

from spsim.lazy import lazy
from spsim.step.groups import Groups
from spsim.step.itinerary import Blocks, Chunk, Item, Loop, Visit
from spsim.step.patterns import in_loops
from spsim.step.replicas import Synchronisation
from spsim.step.segments import Segment
from spsim.step.variants import ReplicaPasses, StagePass


class ReplicatedChunk:
    """What a rank runs of a micro-batch, under a plan of synchronisation."""

    def __init__(
        self, sync: Synchronisation, blocks: Blocks, chunk: Chunk, groups: Groups, *, first: int = 0, name: str = ""
    ) -> None:
        """Layers are numbered from `first`; `name` tells the chunk from others of the step."""
        own = [run for run in chunk for _ in range(run.count)]
        self.layers: list[int | None] = []
        for run in own:
            self.layers.append(first if run.numbered else None)
            first += run.layers if run.numbered else 0
        self._passes = ReplicaPasses(sync, [blocks[run.block] for run in own], groups, name)

    @lazy
    def segments(self) -> Sequence[Segment]:
        """All that it may run."""
        found = (self._pair(first, last) for first in (True, False) for last in (True, False))
        passes = {id(own): own for pair in found for own in pair}
        every = {id(s): s for own in passes.values() for s in _segments(own)}
        return tuple(every.values())

    def items(self, micro_batches: int) -> tuple[Item, ...]:
        """Up through all blocks and down again, so many times; those that are alike are a loop."""
        last = micro_batches - 1
        starts = sorted({0, min(1, last), last})
        rows = [(start, stop - start) for start, stop in pairwise([*starts, micro_batches])]
        found: list[Item] = []
        alike = groupby(rows, key=lambda row: [*map(id, self._pair(row[0] == 0, row[0] == last))])
        for _, same in alike:
            own = list(same)
            (start, _), runs = own[0], sum(runs for _, runs in own)
            forward, backward = self._pair(start == 0, start == last)
            body = (*self._items(forward, start, 1), *self._items(backward, start, -1))
            found += body if runs == 1 else [Loop(body, runs, micro_batches=1)]
        return tuple(found)

    def _pair(self, first: bool, last: bool) -> tuple[StagePass, StagePass]:
        return self._passes.forward(first=first), self._passes.backward(last=last)

    def _items(self, found: StagePass, micro_batch: int, order: int) -> Iterator[Item]:
        if found.before is not None:
            yield Visit(found.before, None, micro_batch)
        yield from in_loops(found.blocks, self.layers[::order], micro_batch)


def _segments(found: StagePass) -> Iterator[Segment]:
    if found.before is not None:
        yield found.before
    for block in found.blocks:
        yield from (part.segment for part in block.parts)


def root_of(chunk: Chunk) -> frozenset[int]:
    """Places of the blocks that are no layers, which FSDP does not shard by themselves."""
    own = [run for run in chunk for _ in range(run.count)]
    return frozenset(place for place, run in enumerate(own) if not run.numbered)
