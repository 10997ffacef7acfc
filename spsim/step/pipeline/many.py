"""Many steps of one schedule at once, each with durations of its own: when ranks are done, and how long they wait.

The graph of a step is gone through once for all of them, a column for each. Where its second round follows the first as
all later ones follow it, a step of any number of rounds is the short one and so many times what a round adds.

A rank waits for a message between two passes only if it has posted it before the second and not waited for it before
the first. Those are few, whatever the durations, so that what is covered of a gap is a union of a few spans.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np

from spsim.lazy import lazy
from spsim.step.pipeline.graph import Bools, Graph, Part
from spsim.step.pipeline.orders import Numbers
from spsim.step.pipeline.steady import Folded

MOST_MESSAGES = 8
"""That a rank has under way at once; with more the spans of a gap are no few."""
AT_ONCE = 1 << 15
"""Gaps of all steps that are looked at at once: they stay in a cache,"""
MOMENTS = 1 << 18
"""and moments of those that are gone through at once."""


class Totals(NamedTuple):
    """Picoseconds: for each rank a row, for each step a column."""

    finished: Numbers
    """When each rank is done,"""
    transfer: Numbers
    """and how long it waits while a message of its own is on its way."""


class Short(NamedTuple):
    """Steps of as many rounds as the graph has."""

    totals: Totals
    of_round: Totals
    """What one more round adds."""
    steady: Bools
    """Of which steps that holds."""

    def longer(self, columns: Numbers, rounds: Numbers) -> Totals:
        """Some of them with so many more rounds."""
        own = zip(self.totals, self.of_round, strict=True)
        return Totals(*(short[:, columns] + rounds * more[:, columns] for short, more in own))


def _joined(every: Sequence[Totals]) -> Totals:
    return Totals(np.hstack([own.finished for own in every]), np.hstack([own.transfer for own in every]))


class Steps:
    """Those of a graph, of which a part may be a round of its steady state."""

    def __init__(self, graph: Graph, whole: Part, folded: Folded | None) -> None:
        self._graph, self._whole, self._folded = graph, whole, folded
        self._gaps = _Gaps(graph, self._rounds)

    @lazy
    def _rounds(self) -> tuple[int, int, int] | None:
        """Passes of each rank before both rounds of the graph, before the second, and before what follows."""
        if self._folded is None:
            return None
        parts = (self._folded.round, self._folded.tail)
        first, last = (int(self._graph.positions[part.nodes].min()) for part in parts)
        return first, (first + last) // 2, last

    @property
    def are_covered(self) -> bool:
        """Whether ranks have few messages under way."""
        return self._gaps.most <= MOST_MESSAGES

    def short(self, durations_ps: Numbers) -> Short:
        """Of durations by time of the graph, a column for each step."""
        size = max(1, MOMENTS // len(self._graph.own))
        parts = [self._some(durations_ps[:, at : at + size]) for at in range(0, durations_ps.shape[1], size)]
        totals, of_round = (
            _joined(own) for own in ([part.totals for part in parts], [part.of_round for part in parts])
        )
        return Short(totals, of_round, np.concatenate([part.steady for part in parts]))

    def _some(self, durations_ps: Numbers) -> Short:
        steps = durations_ps.shape[1]
        moments = self._whole.ends(np.zeros((1, steps), np.int64), durations_ps)
        covered = self._gaps.covered(moments, durations_ps)
        totals = Totals(moments[self._graph.finished], np.add.reduceat(covered, self._gaps.firsts, axis=0))
        shift, steady = self._shift(moments)
        steady &= self._gaps.done_before(moments, durations_ps)
        more = Totals(np.broadcast_to(shift, totals.finished.shape), self._of_round(covered))
        return Short(totals, more, steady)

    def _shift(self, moments: Numbers) -> tuple[Numbers, Bools]:
        """How much later a round is than the one before, and where that is known."""
        if self._folded is None:
            return np.zeros((1, moments.shape[1]), np.int64), np.ones(moments.shape[1], np.bool_)
        before, after = self._borders
        apart = moments[after] - moments[before]
        return apart[:1], (apart == apart[:1]).all(axis=0)

    @lazy
    def _borders(self) -> tuple[Numbers, Numbers]:
        """Nodes that the first round of the graph waits for, and those that the second does."""
        folded = self._folded
        assert folded is not None
        nodes = np.append(folded.round.inputs, folded.round.nodes)
        return folded.round.inputs, nodes[folded.border]

    def _of_round(self, covered: Numbers) -> Numbers:
        """What is covered in the second round of each rank."""
        found = np.zeros((len(self._gaps.firsts), covered.shape[1]), np.int64)
        if self._rounds is not None:
            _, second, last = self._rounds
            own = (self._gaps.passes >= second) & (self._gaps.passes < last)
            np.add.at(found, self._gaps.ranks[own], covered[own])
        return found


class _Gaps:
    """Times between the passes of each rank, before the first and behind the last of them, those of a rank in order."""

    def __init__(self, graph: Graph, rounds: tuple[int, int, int] | None) -> None:
        ranks = graph.ranks[graph.passes]
        number = np.arange(len(graph.finished))
        firsts, lasts = (np.searchsorted(ranks, number, side) for side in ("left", "right"))
        self.ranks = np.insert(ranks, lasts, number)
        self.passes = np.insert(graph.positions[graph.passes], lasts, lasts - firsts)
        """Of the rank before each."""
        self.firsts = firsts + number
        self._begins = np.insert(graph.passes, firsts, 0)
        self._ends = np.insert(graph.passes, lasts, graph.finished)
        self._lengths = np.insert(graph.own[graph.passes], lasts, _none(graph))
        messages = graph.messages
        self._posts, self._nodes = messages.posts, messages.nodes
        self._lanes = len(graph.classes.names) + messages.lanes
        gaps, sides = self._pairs(graph)
        early = np.zeros(len(gaps), np.bool_)
        if rounds is not None:
            early = (self.passes[gaps] >= rounds[1]) & (messages.posted.ravel()[sides] < rounds[0])
        sides %= max(1, len(messages.lanes))
        self._early = gaps[early], sides[early]
        """Gaps of the second round or later, and messages that are posted before the first: none is under way still."""
        self._under_way = [*_by_number(gaps[~early], sides[~early])]
        """Gaps, and the messages under way in each, a row for each of so many."""

    @property
    def most(self) -> int:
        """Messages that may be under way in a gap."""
        return max((len(messages) for _, messages in self._under_way), default=0)

    def _pairs(self, graph: Graph) -> tuple[Numbers, Numbers]:
        """Each gap with each side of a message of its rank that may be under way in it."""
        messages = graph.messages
        sides = np.array([lane[:2] for lane in graph.lanes], np.int64).reshape(-1, 2)[messages.lanes].T.ravel()
        last = np.append(self.firsts[1:], len(self.ranks))[sides] - 1
        begin = self.firsts[sides] + messages.posted.ravel()
        spans = np.minimum(self.firsts[sides] + messages.waited.ravel(), last) - begin + 1
        which = np.repeat(np.arange(len(sides)), spans)
        own = np.arange(len(which)) - np.repeat(np.cumsum(spans) - spans, spans)
        return begin[which] + own, which

    def done_before(self, moments: Numbers, durations_ps: Numbers) -> Bools:
        """In which steps messages of before the rounds have arrived before the second."""
        gaps, messages = self._early
        arrived = self._arrived(moments, durations_ps, messages)
        found: Bools = np.all(arrived <= moments[self._begins[gaps]], axis=0)
        return found

    def _arrived(self, moments: Numbers, durations_ps: Numbers, which: Numbers | slice) -> Numbers:
        """When some messages end."""
        sent, received = self._posts[:, which]
        found: Numbers = np.maximum(moments[sent], moments[received])
        found += durations_ps[self._lanes[which]]
        nodes = self._nodes[which]
        found[nodes > 0] = moments[nodes[nodes > 0]]
        return found

    def covered(self, moments: Numbers, durations_ps: Numbers) -> Numbers:
        """How much of each gap a message of its rank is under way."""
        begins = moments[self._begins]
        ends = moments[self._ends] - durations_ps[self._lengths]
        lengths = durations_ps[self._lanes]
        arrived = self._arrived(moments, durations_ps, slice(None))
        found = np.zeros_like(begins)
        waits: Bools = np.any(ends > begins, axis=1)
        size = max(1, AT_ONCE // begins.shape[1])
        for every, of_every in self._under_way:
            some = np.flatnonzero(waits[every])
            for part in np.split(some, range(size, len(some), size)):
                gaps, messages = every[part], of_every[:, part]
                bounds = begins[gaps], ends[gaps]
                stops = [np.clip(arrived[row], *bounds) for row in messages]
                starts = [np.clip(arrived[row] - lengths[row], *bounds) for row in messages]
                found[gaps] = _union(starts, stops)
        return found


def _by_number(gaps: Numbers, messages: Numbers) -> Iterator[tuple[Numbers, Numbers]]:
    """Gaps with as many messages, and these, a row for each."""
    order = np.argsort(gaps, kind="stable")
    gaps, messages = gaps[order], messages[order]
    own, first, counts = np.unique(gaps, return_index=True, return_counts=True)
    for count in np.unique(counts).tolist():
        which = counts == count
        yield own[which], messages[first[which] + np.arange(count)[:, None]]


def _none(graph: Graph) -> int:
    """The time of the graph that is 0."""
    return len(graph.classes.names) + len(graph.lanes)


def _union(starts: list[Numbers], stops: list[Numbers]) -> Numbers:
    """How much some spans cover together: as many have begun and not ended where starts and ends are each in order."""
    for times in (starts, stops):
        for one, other in combinations(range(len(times)), 2):
            larger = np.maximum(times[one], times[other])
            np.minimum(times[one], times[other], out=times[one])
            times[other] = larger
    found = np.zeros_like(starts[0])
    for place, (start, stop) in enumerate(zip(starts, stops, strict=True)):
        if place:
            np.maximum(start, stops[place - 1], out=start)
        np.subtract(stop, start, out=start)
        found += np.maximum(start, 0, out=start)
    return found
