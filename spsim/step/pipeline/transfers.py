"""How long ranks wait between passes while a message of theirs is on its way, as sums of durations.

It is `waiting.gaps_of` where each moment is known as a sum of durations: whatever is compared there says for which
durations the comparison comes out alike, and there the sums are exact.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from spsim.step.pipeline.graph import Bools, Graph, Part
from spsim.step.pipeline.orders import Numbers
from spsim.step.pipeline.waiting import WRITTEN_OUT


class Moments(NamedTuple):
    """When something happens: picoseconds, and in a row for each how often each duration is in it."""

    ps: Numbers
    sums: Numbers

    def at(self, places: Numbers | Bools) -> Moments:
        """Some of them."""
        return Moments(self.ps[places], self.sums[places])

    def plus(self, other: Moments) -> Moments:
        """Later by others."""
        return Moments(self.ps + other.ps, self.sums + other.sums)

    def minus(self, other: Moments) -> Moments:
        """Earlier by others."""
        return Moments(self.ps - other.ps, self.sums - other.sums)

    def where(self, which: Bools, others: Moments) -> Moments:
        """These, or others elsewhere."""
        return Moments(np.where(which, self.ps, others.ps), np.where(which[:, None], self.sums, others.sums))


class Written(NamedTuple):
    """A part of a step in some of its runs, and for how many each stands."""

    part: Part
    runs: Sequence[tuple[Moments, int]]
    """Moments of its inputs and nodes."""


def shortened(again: int) -> tuple[int, int]:
    """Of what comes again so many times, how often it is written, and which of those stands for what is left out."""
    written = min(again, WRITTEN_OUT)
    return written, written // 2


class Transfers:
    """Of the steps of a graph, whose durations are in groups that are alike."""

    def __init__(self, graph: Graph, durations_ps: Numbers, groups: Numbers) -> None:
        self._graph = graph
        number = int(groups.max()) + 1
        self._durations = Moments(durations_ps, np.eye(number, dtype=np.int64)[groups])
        self._none = Moments(np.zeros(1, np.int64), np.zeros((1, number), np.int64))
        self.slack: list[Numbers] = []
        """Rows of multiples of the durations whose sums may not be negative, else another comparison comes out."""

    def of(self, written: Sequence[Written], finished: Moments) -> Numbers:
        """For each rank, how often each duration is in its waits; `finished` is when its last pass and wait end."""
        ranks, begins, ends, weights = self._gaps(written, finished)
        spans = self._union(*self._sides(written))
        waits = self._before(spans, ranks, ends).sums - self._before(spans, ranks, begins).sums
        found = np.zeros((len(finished.ps), waits.shape[1]), np.int64)
        np.add.at(found, ranks, weights[:, None] * waits)
        return found

    def _note(self, later: Moments, earlier: Moments) -> None:
        rows = later.sums - earlier.sums
        self.slack.append(rows[(rows < 0).any(axis=1)])

    def _later(self, one: Moments, other: Moments) -> Bools:
        """Where one is later than another, or as late."""
        found: Bools = one.ps >= other.ps
        self._note(one.where(found, other), other.where(found, one))
        return found

    # Gaps

    def _gaps(self, written: Sequence[Written], finished: Moments) -> tuple[Numbers, Moments, Moments, Numbers]:
        """Times without a pass: their ranks, begins and ends, and for how many each stands."""
        found = [*self._passes(written)]
        ranks, weights = (
            np.concatenate(own) for own in zip(*((rank, weight) for rank, _, weight in found), strict=True)
        )
        ends = _joined([moments for _, moments, _ in found])
        starts = ends.minus(_joined([*self._lengths(written)]))
        order = np.argsort(ranks, kind="stable")
        ranks, weights, starts, ends = ranks[order], weights[order], starts.at(order), ends.at(order)
        number = np.arange(len(finished.ps))
        first, last = (np.searchsorted(ranks, number, side) for side in ("left", "right"))
        begins = _inserted(ends, first, self._none.at(np.zeros(len(number), np.int64)))
        ends = _inserted(starts, last, finished)
        ranks, weights = np.insert(ranks, last, number), np.insert(weights, last, 1)
        waits = (begins.sums != ends.sums).any(axis=1)
        return ranks[waits], begins.at(waits), ends.at(waits), weights[waits]

    def _passes(self, written: Sequence[Written]) -> Iterator[tuple[Numbers, Moments, Numbers]]:
        graph = self._graph
        for part, runs in written:
            nodes = self._nodes_of_passes(part)
            for moments, weight in runs:
                yield graph.ranks[nodes], moments.at(part.number[nodes]), np.full(len(nodes), weight)

    def _lengths(self, written: Sequence[Written]) -> Iterator[Moments]:
        for part, runs in written:
            own = self._durations.at(self._graph.own[self._nodes_of_passes(part)])
            yield from [own] * len(runs)

    def _nodes_of_passes(self, part: Part) -> Numbers:
        passes = self._graph.passes
        return passes[part.number[passes] >= len(part.inputs)]

    # Messages

    def _sides(self, written: Sequence[Written]) -> tuple[Numbers, Moments, Moments]:
        """Messages on each of their two ranks: the rank, and when they start and end."""
        found = [self._messages(part, moments) for part, runs in written for moments, _ in runs]
        lanes = np.concatenate([own for own, _, _ in found])
        starts, ends = (_joined([own[place] for own in found]) for place in (1, 2))  # type: ignore[misc]
        ranks = np.array([lane[:2] for lane in self._graph.lanes], np.int64).reshape(-1, 2)[lanes].T.ravel()
        both = np.tile(np.arange(len(lanes)), 2)
        return ranks, starts.at(both), ends.at(both)

    def _messages(self, part: Part, moments: Moments) -> tuple[Numbers, Moments, Moments]:
        """Those of one run of a part, which belong where the later side posts them."""
        messages = self._graph.messages
        placed = part.number[messages.posts]
        which = np.flatnonzero((placed >= 0).all(axis=0) & (placed >= len(part.inputs)).any(axis=0))
        lanes = messages.lanes[which]
        lengths = self._durations.at(len(self._graph.classes.names) + lanes)
        sent, received = (moments.at(side) for side in placed[:, which])
        direct = messages.nodes[which] == 0
        ends = moments.at(part.number[messages.nodes[which]])
        later = sent.where(self._later_of(sent, received, direct), received).plus(lengths)
        ends = later.where(direct, ends)
        return lanes, ends.minus(lengths), ends

    def _later_of(self, one: Moments, other: Moments, which: Bools) -> Bools:
        """As `_later`, of some."""
        found: Bools = one.ps >= other.ps
        self._note(one.where(found, other).at(which), other.where(found, one).at(which))
        return found

    def _union(self, ranks: Numbers, starts: Moments, ends: Moments) -> _Spans:
        """Times of each rank with a message on its way, in order and none in another."""
        order = np.lexsort((starts.ps, ranks))
        ranks, starts, ends = ranks[order], starts.at(order), ends.at(order)
        follows = np.append(False, ranks[1:] == ranks[:-1]) if len(ranks) else np.zeros(0, np.bool_)
        before = np.flatnonzero(follows) - 1
        self._note(starts.at(before + 1), starts.at(before))
        clock = ranks * (1 + ends.ps.max(initial=0))
        latest = np.maximum.accumulate(ends.ps + clock)
        newest = np.maximum.accumulate(np.where(ends.ps + clock == latest, np.arange(len(ranks)), 0))
        until = ends.at(newest)
        self._later(ends.at(before + 1), until.at(before))
        begins = Moments(starts.ps.copy(), starts.sums.copy())
        own = starts.at(before + 1)
        free = self._later(own, until.at(before))
        moved = own.where(free, until.at(before))
        begins.ps[before + 1], begins.sums[before + 1] = moved.ps, moved.sums
        lengths = until.minus(begins)
        lengths = lengths.where(self._later(until, begins), self._none.at(np.zeros(len(ranks), np.int64)))
        done = np.cumsum(lengths.sums, axis=0) - lengths.sums
        firsts = np.searchsorted(ranks, ranks)
        return _Spans(ranks, begins, lengths, done - done[firsts] if len(ranks) else done)

    def _before(self, spans: _Spans, ranks: Numbers, moments: Moments) -> Moments:
        """How much of the spans of its rank lies before each moment; picoseconds are left out."""
        most = 1 + max(int(spans.begins.ps.max(initial=0)), int(moments.ps.max(initial=0)))
        place = np.searchsorted(spans.ranks * most + spans.begins.ps, ranks * most + moments.ps, side="right")
        last = np.maximum(place - 1, 0)
        some = (place > 0) & (spans.ranks[last] == ranks) if len(spans.ranks) else np.zeros(len(ranks), np.bool_)
        found = np.zeros_like(moments.sums)
        if len(spans.ranks):
            following = np.minimum(place, len(spans.ranks) - 1)
            more = (place < len(spans.ranks)) & (spans.ranks[following] == ranks)
            self._note(spans.begins.at(following[more]), moments.at(more))
            last, own = last[some], moments.at(some)
            begins, lengths = spans.begins.at(last), spans.lengths.at(last)
            self._note(own, begins)
            within = own.minus(begins)
            found[some] = spans.done[last] + lengths.where(self._later(within, lengths), within).sums
        return Moments(moments.ps, found)


class _Spans(NamedTuple):
    """By rank and in order."""

    ranks: Numbers
    begins: Moments
    lengths: Moments
    done: Numbers
    """Sums of those of the rank before each."""


def _joined(moments: Sequence[Moments]) -> Moments:
    return Moments(np.concatenate([own.ps for own in moments]), np.concatenate([own.sums for own in moments]))


def _inserted(moments: Moments, places: Numbers, others: Moments) -> Moments:
    return Moments(np.insert(moments.ps, places, others.ps), np.insert(moments.sums, places, others.sums, axis=0))
