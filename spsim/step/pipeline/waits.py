"""How long ranks wait between passes while a message of theirs is on its way: the first total of `waiting.Gaps`.

Where each moment stands among those of a graph is known before any of them is; what comes again is looked at three
times, of which the second stands for what is left out, since a message travels in the run in which it is posted, or the
next.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from spsim.step.pipeline.graph import Graph, Part
from spsim.step.pipeline.orders import Numbers
from spsim.step.pipeline.steady import Runs

WRITTEN_OUT = 3
"""Runs of what comes again."""


class Layout(NamedTuple):
    """Where moments stand among those of some runs of the parts of a step, which are written one after another."""

    passes: Numbers
    """End of each pass, those of a rank in order,"""
    own: Numbers
    """its time among the durations,"""
    firsts: Numbers
    """and the first pass of each rank."""
    finished: Numbers
    sides: Numbers
    """When each message is posted, in a row for each side,"""
    lengths: Numbers
    """its time among the durations,"""
    nodes: Numbers
    """its end, where that stands by itself, else -1,"""
    ranks: Numbers
    """and its two ranks."""
    runs: Numbers
    """Which run each gap belongs to: those before each pass, and a last one, of each rank."""


def layout_of(graph: Graph, parts: Sequence[tuple[Part, int]], finished: Numbers) -> Layout:
    """Of parts with the number of their runs; `finished` are places in the last part."""
    found: list[tuple[Numbers, ...]] = []
    messages: list[tuple[Numbers, ...]] = []
    begin = last = number_of_runs = 0
    for part, runs in parts:
        nodes = graph.passes[part.number[graph.passes] >= len(part.inputs)]
        placed = part.number[graph.messages.posts]
        which = np.flatnonzero((placed >= 0).all(axis=0) & (placed >= len(part.inputs)).any(axis=0))
        own = graph.messages.nodes[which]
        size = len(part.inputs) + len(part.nodes)
        for _ in range(runs):
            found.append(
                (begin + part.number[nodes], graph.own[nodes], graph.ranks[nodes], np.full(len(nodes), number_of_runs))
            )
            ends = np.where(own > 0, begin + part.number[own], -1)
            messages.append((begin + placed[0, which], begin + placed[1, which], graph.messages.lanes[which], ends))
            last, begin, number_of_runs = begin, begin + size, number_of_runs + 1
    passes, own, ranks, runs_of = (np.concatenate(column) for column in zip(*found, strict=True))
    order = np.argsort(ranks, kind="stable")
    sent, received, lanes, ends = (np.concatenate(column) for column in zip(*messages, strict=True))
    number = np.arange(len(finished))
    firsts, lasts = (np.searchsorted(ranks[order], number, side) for side in ("left", "right"))
    return Layout(
        passes[order], own[order], firsts, last + finished, np.stack([sent, received]),
        len(graph.classes.names) + lanes, ends, np.array([lane[:2] for lane in graph.lanes]).reshape(-1, 2)[lanes].T,
        np.insert(runs_of[order], lasts, number_of_runs - 1),
    )  # fmt: skip


class Covered(NamedTuple):
    """Gaps between passes, and how long a message of their rank is on its way in each."""

    gaps: Numbers
    ranks: Numbers
    lengths_ps: Numbers

    def totals(self, weights: Numbers, number: int) -> Numbers:
        """Of each of so many ranks, where each gap stands for so many."""
        found = np.zeros(number, np.int64)
        np.add.at(found, self.ranks, self.lengths_ps * weights[self.gaps])
        return found


def covered(layout: Layout, moments_ps: Numbers, durations_ps: Numbers) -> Covered:
    """Of a step as it is written."""
    starts, stops, most = _messages(layout, moments_ps, durations_ps)
    ends = moments_ps[layout.passes]
    counts = np.diff(np.append(layout.firsts, len(ends)))
    begins_of_gaps = np.insert(ends, layout.firsts, 0)
    ends_of_gaps = np.insert(ends - durations_ps[layout.own], layout.firsts + counts, moments_ps[layout.finished])
    gaps = np.flatnonzero(ends_of_gaps > begins_of_gaps)
    ranks = np.repeat(np.arange(len(counts)), counts + 1)[gaps]
    clock = ranks * most
    return Covered(gaps, ranks, _covered(starts, stops, begins_of_gaps[gaps] + clock, ends_of_gaps[gaps] + clock))


def _messages(layout: Layout, moments_ps: Numbers, durations_ps: Numbers) -> tuple[Numbers, Numbers, int]:
    """When those of each rank start and end, on clocks of which each rank's is behind that of the rank before by a
    length.
    """
    lengths = durations_ps[layout.lengths]
    posted = moments_ps[layout.sides]
    ends = np.where(layout.nodes < 0, np.maximum(posted[0], posted[1]) + lengths, moments_ps[layout.nodes])
    most = 1 + int(max(moments_ps.max(), ends.max(initial=0)))
    stops = (ends + layout.ranks * most).ravel()
    starts = stops - np.tile(lengths, 2)
    order = np.argsort(starts, kind="stable")
    return starts[order], stops[order], most


def _covered(starts: Numbers, stops: Numbers, begins: Numbers, ends: Numbers) -> Numbers:
    """How much of each of some times lies in any of some spans, which are in the order of their starts."""
    if not len(starts):
        return np.zeros_like(begins)
    stops = np.maximum.accumulate(stops)
    np.maximum(starts[1:], stops[:-1], out=starts[1:])
    lengths = np.maximum(stops - starts, 0)
    sums = np.cumsum(lengths) - lengths

    def before(times: Numbers) -> Numbers:
        """How much of the spans lies before each moment."""
        place = np.searchsorted(starts, times, side="right")
        last = np.maximum(place - 1, 0)
        within: Numbers = sums[last] + np.minimum(np.maximum(times - starts[last], 0), lengths[last])
        return np.where(place > 0, within, 0)

    found: Numbers = before(ends) - before(begins)
    return found


def written(rounds: Runs) -> tuple[int, list[int]]:
    """How many periods of a steady state are left out, and for how many each round that is written stands."""
    if not rounds.period:
        return 0, [1] * rounds.number
    again = (rounds.number - rounds.first) // rounds.period
    kept = min(again, WRITTEN_OUT)
    weights = [1] * (rounds.number - (again - kept) * rounds.period)
    middle = rounds.first + kept // 2 * rounds.period
    weights[middle : middle + rounds.period] = [1 + again - kept] * rounds.period
    return again - kept, weights
