"""Blocks in a row as an itinerary: what comes again and again is found and becomes loops."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from spsim.step.itinerary import Item, Loop, Visit
from spsim.step.segments import BlockPass


def in_loops(passes: Sequence[BlockPass], layers: Sequence[int | None], micro_batch: int = 0) -> tuple[Item, ...]:
    """One pass over some blocks, each with its layer or none. A block finds what the one before hands on; what it reads
    beyond that comes from outside, and what the last one hands on goes nowhere.
    """
    row = _Row(passes, layers, micro_batch)
    items: list[Item] = []
    at = 0
    while at < len(passes):
        period, runs = row.again(at)
        body = [item for place in range(at, at + period) for item in row.visits(place)]
        if runs > 1:
            body = [Loop(tuple(body), runs, layers=row.distance(at, at + period) or 0)]
        items += body
        at += period * runs
    items[0] = replace(items[0], brings=passes[0].entry)
    items[-1] = replace(items[-1], drops=passes[-1].result)
    return tuple(items)


class _Row:
    """Blocks in the order of a pass."""

    def __init__(self, passes: Sequence[BlockPass], layers: Sequence[int | None], micro_batch: int) -> None:
        self.passes, self.layers, self.micro_batch = passes, layers, micro_batch

    def visits(self, place: int) -> Iterator[Item]:
        """Of one block; what the first of all gets is not said here."""
        brings = self._outside(place)
        for part in self.passes[place].parts:
            layer = self.layers[place]
            visit = Visit(part.segment, None if layer is None else layer + part.layer, self.micro_batch)
            yield replace(visit if part.runs == 1 else Loop((visit,), part.runs), brings=brings)
            brings = ()

    def _outside(self, place: int) -> tuple[int, ...]:
        """Buffers that a block finds and the one before does not hand on."""
        return self.passes[place].entry[len(self.passes[place - 1].result) :] if place else ()

    def again(self, at: int) -> tuple[int, int]:
        """(blocks, runs) of the loop that takes in most of what comes again from a place on."""
        best, saved = (1, 1), 0
        for period in range(1, (len(self.passes) - at) // 2 + 1):
            runs = 1
            while self._equal(at + (runs - 1) * period, period):
                runs += 1
            if (runs - 1) * period > saved:
                best, saved = (period, runs), (runs - 1) * period
        return best

    def _equal(self, at: int, period: int) -> bool:
        """Whether the next so many blocks are those of a place again, of layers as far apart as the blocks."""
        if at + 2 * period > len(self.passes):
            return False
        step = self.distance(at, at + period)
        return step is not None and all(
            self.passes[place] is self.passes[place + period]
            and self.distance(place, place + period) == step
            and not self._outside(place + period)
            for place in range(at, at + period)
        )

    def distance(self, place: int, other: int) -> int | None:
        """Layers from one block to another, if both have numbers."""
        one, two = self.layers[place], self.layers[other]
        return None if one is None or two is None else two - one
