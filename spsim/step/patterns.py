"""Blocks in a row as an itinerary: what comes again and again is found and becomes loops."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from spsim.step.itinerary import Item, Loop, Visit
from spsim.step.segments import BlockPass


def in_loops(
    passes: Sequence[BlockPass],
    layers: Sequence[int | None],
    micro_batch: int = 0,
    *,
    brings: tuple[int, ...] = (),
    drops: tuple[int, ...] = (),
) -> tuple[Item, ...]:
    """One pass over some blocks, each with its layer or none; `brings` are buffers that the first of them gets from
    outside, `drops` those that the last of them hands to nobody.
    """
    items: list[Item] = []
    at = 0
    while at < len(passes):
        period, runs = _again(passes, layers, at)
        body = [item for place in range(at, at + period) for item in _visits(passes[place], layers[place], micro_batch)]
        if runs > 1:
            body = [Loop(tuple(body), runs, layers=(layers[at + period] or 0) - (layers[at] or 0))]
        items += body
        at += period * runs
    items[0] = replace(items[0], brings=brings)
    items[-1] = replace(items[-1], drops=drops)
    return tuple(items)


def _visits(block: BlockPass, layer: int | None, micro_batch: int) -> Iterator[Item]:
    for part in block.parts:
        visit = Visit(part.segment, layer, micro_batch)
        yield visit if part.runs == 1 else Loop((visit,), part.runs)


def _again(passes: Sequence[BlockPass], layers: Sequence[int | None], at: int) -> tuple[int, int]:
    """(blocks, runs) of the loop that takes in most of what comes again from a place on."""
    best, saved = (1, 1), 0
    for period in range(1, (len(passes) - at) // 2 + 1):
        runs = 1
        while _equal(passes, layers, at + (runs - 1) * period, period):
            runs += 1
        if (runs - 1) * period > saved:
            best, saved = (period, runs), (runs - 1) * period
    return best


def _equal(passes: Sequence[BlockPass], layers: Sequence[int | None], at: int, period: int) -> bool:
    """Whether the next so many blocks are those of a place again, of layers as far apart as the blocks."""
    if at + 2 * period > len(passes):
        return False
    step = _distance(layers[at], layers[at + period])
    return step is not None and all(
        passes[place] is passes[place + period] and _distance(layers[place], layers[place + period]) == step
        for place in range(at, at + period)
    )


def _distance(one: int | None, other: int | None) -> int | None:
    return None if one is None or other is None else other - one
