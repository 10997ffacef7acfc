"""For which durations the longest ways through a pipeline stay where they are: there its times are sums, not searched.

A moment of a step is the sum of the durations on the longest way to it. For other durations the same ways are the
longest as long as no edge of the graph would lead to a later one; where that holds, the sums are exact.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from spsim.step.pipeline.graph import Bools, Graph, Part
from spsim.step.pipeline.orders import Numbers
from spsim.step.pipeline.steady import Folded, Runs
from spsim.step.pipeline.transfers import Moments, Transfers, Written, shortened

MOST_DURATIONS = 32
"""Of different lengths; with more, few steps share their longest ways."""
MOST_REGIONS = 8
"""That are kept of one grouping of durations."""
FOUND = 2
"""Steps in known regions after which one more is learnt: that takes longer than to go through a step."""


@dataclass(frozen=True)
class Region:
    """Steps whose longest ways are the same."""

    finished: Numbers
    """For each rank, how often each duration lies on the longest way to its end."""
    slack: Numbers
    """Rows of multiples of the durations whose sums may not be negative, else another way is longer."""
    equal: Numbers
    """And those that must be 0, else the steady state does not repeat itself in the same way."""
    transfer: Numbers | None = None
    """For each rank, how often each duration is in its waits while a message of its own is on its way; None where
    nobody asked.
    """

    def holds(self, values_ps: Numbers) -> Bools:
        """Of durations, or of each column of many."""
        found: Bools = (self.slack @ values_ps >= 0).all(axis=0) & (self.equal @ values_ps == 0).all(axis=0)
        return found


class Learner:
    """Sums along the longest ways of one step, part by part."""

    def __init__(self, durations_ps: Numbers, groups: Numbers) -> None:
        """`groups`: to which of the different durations each time of the graph belongs; the last one is 0."""
        self._durations_ps = durations_ps
        self._groups = groups
        self._number = int(groups.max()) + 1
        self._slack = [np.zeros((0, self._number), np.int64)]
        self._equal = [np.zeros((0, self._number), np.int64)]
        self._written: Sequence[Written] = ()
        self._finished = Moments(np.zeros(0, np.int64), np.zeros((0, self._number), np.int64))
        """Of the shortened step that is written."""

    def whole(self, part: Part, runs: Runs, finished: Numbers) -> Region:
        """Of a step in one part; `finished` are the nodes of the graph at which ranks end."""
        sums = self._sums(part, np.zeros((1, self._number), np.int64), runs.written_ps[0])
        self._written = [Written(part, [(Moments(runs.written_ps[0], sums), 1)])]
        return self._region(Moments(runs.written_ps[0], sums).at(part.number[finished]))

    def folded(self, parts: Folded, head: Runs, rounds: Runs, tail: Runs, finished: Numbers) -> Region:
        """Of a step with a steady state."""
        first = self._sums(parts.head, np.zeros((1, self._number), np.int64), head.written_ps[0])
        border = first[parts.head.number[parts.round.inputs]]
        borders, found = [], []
        for written_ps in rounds.written_ps:
            borders.append(border)
            found.append(self._sums(parts.round, border, written_ps))
            border = found[-1][parts.border]
        shift = np.zeros(self._number, np.int64)
        if rounds.period:
            shifts = border - borders[rounds.first]
            shift = shifts[0]
            self._equal.append(shifts - shift)
            again, place = divmod(rounds.number - 1 - rounds.first, rounds.period)
            border = found[rounds.first + place][parts.border] + again * shift
        last = self._sums(parts.tail, border, tail.written_ps[0])
        rows, left_out = self._shortened(found, rounds, shift)
        end = Moments(tail.written_ps[0], last)
        self._written = [
            Written(parts.head, [(Moments(head.written_ps[0], first), 1)]),
            Written(parts.round, rows),
            Written(parts.tail, [(Moments(end.ps - left_out * rounds.shift_ps, end.sums - left_out * shift), 1)]),
        ]
        return self._region(end.at(parts.tail.number[finished]), left_out * rounds.shift_ps, left_out * shift)

    @staticmethod
    def _shortened(found: Sequence[Numbers], rounds: Runs, shift: Numbers) -> tuple[list[tuple[Moments, int]], int]:
        """The rounds of a step in which fewer come again, for how many each stands, and how many periods it leaves
        out.
        """
        if not rounds.period:
            return [(Moments(*own), 1) for own in zip(rounds.written_ps, found, strict=True)], 0
        again = (rounds.number - rounds.first) // rounds.period
        written, middle = shortened(again)
        number = rounds.number - (again - written) * rounds.period
        rows = []
        for run, ps in enumerate(rounds.of(np.arange(number))):
            later, place = divmod(max(run - rounds.first, 0), rounds.period)
            sums = found[min(run, rounds.first) + place] + later * shift
            rows.append((Moments(ps, sums), 1 + again - written if run >= rounds.first and later == middle else 1))
        return rows, again - written

    def with_transfers(self, region: Region, graph: Graph) -> Region:
        """The region that was learnt last, or the part of it in which ranks wait for transfers in the same way."""
        transfers = Transfers(graph, self._durations_ps, self._groups)
        found = transfers.of(self._written, self._finished)
        slack = np.concatenate([region.slack, *transfers.slack])
        slack[:, self._groups[-1]] = 0
        return replace(region, slack=_distinct(slack[(slack < 0).any(axis=1)]), transfer=found)

    def _sums(self, part: Part, inputs: Numbers, ends_ps: Numbers) -> Numbers:
        """For inputs and nodes of a part, how often each duration lies on the longest way."""
        first, edges = len(part.inputs), part.edges
        own = self._groups[part.own]
        along = self._groups[edges.times]
        due_ps = ends_ps[edges.heads] - self._durations_ps[part.own[edges.heads - first]]
        on_the_way = np.flatnonzero(ends_ps[edges.tails] + self._durations_ps[edges.times] == due_ps)
        way = np.empty(len(own), np.int64)
        way[edges.heads[on_the_way] - first] = on_the_way
        before = np.append(np.arange(first), edges.tails[way])
        sums = np.zeros((first + len(own), self._number), np.int64)
        nodes = np.arange(first, len(sums))
        sums[nodes, own] += 1
        sums[nodes, along[way]] += 1
        while (before >= first).any():
            sums += sums[before]
            before = before[before]
        sums += inputs[before]
        self._slack.append(self._of_edges(edges.tails, edges.heads, sums, own[edges.heads - first], along))
        return sums

    def _of_edges(self, tails: Numbers, heads: Numbers, sums: Numbers, own: Numbers, along: Numbers) -> Numbers:
        """How much sooner than its head each edge would have it, where that may be later at all."""
        slack = sums[heads] - sums[tails]
        every = np.arange(len(slack))
        slack[every, own] -= 1
        slack[every, along] -= 1
        slack[:, self._groups[-1]] = 0
        return _distinct(slack[(slack < 0).any(axis=1)])

    def _region(self, finished: Moments, left_out_ps: int = 0, left_out: Numbers | int = 0) -> Region:
        self._finished = Moments(finished.ps - left_out_ps, finished.sums - left_out)
        equal = np.concatenate(self._equal)
        equal[:, self._groups[-1]] = 0
        slack = _distinct(np.concatenate(self._slack))
        return Region(finished.sums, slack, _distinct(equal[equal.any(axis=1)]))


def alike(durations_ps: Numbers) -> tuple[Numbers, Numbers]:
    """Where each different duration (or row of many) stands first, and to which of those each belongs."""
    own = durations_ps if durations_ps.ndim == 1 else durations_ps @ _multiples(durations_ps.shape[1])
    _, first, groups = np.unique(own, return_index=True, return_inverse=True)
    order = np.argsort(first)
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    first, groups = first[order], rank[groups]
    if durations_ps.ndim > 1 and not np.array_equal(durations_ps[first][groups], durations_ps):
        every = np.arange(len(durations_ps))
        return every, every
    return first, groups


def _multiples(number: int) -> Numbers:
    return np.random.default_rng(0).integers(1, 1 << 62, number)


def _distinct(rows: Numbers) -> Numbers:
    """Rows without those that come again, told apart by a sum of random multiples, and to be sure by themselves."""
    if len(rows) < 2:
        return rows
    _, first, which = np.unique(rows @ _multiples(rows.shape[1]), return_index=True, return_inverse=True)
    found: Numbers = rows[first]
    return found if np.array_equal(found[which], rows) else np.unique(rows, axis=0)


class Regions:
    """Of steps of which the same durations are alike."""

    def __init__(self, patience: int = 0) -> None:
        """`patience`: steps that are gone through before one is learnt from."""
        self._patience = patience
        self.learn: Callable[[], Region] | None = None
        """The region of the last step that was in none."""
        self._known: list[Region] = []
        self._found = 0
        """Steps that were in one."""

    def of(self, values_ps: Numbers) -> Region | None:
        """One that holds for some durations; what a step teaches is learnt when there is another."""
        for region in self._known:
            if region.holds(values_ps):
                self._found += 1
                return region
        self._patience -= 1
        if self.learn is None or self._patience >= 0 or len(self._known) > min(MOST_REGIONS - 1, self._found // FOUND):
            return None
        region = self.learn()
        self.learn = None
        self._known.append(region)
        return region if region.holds(values_ps) else None
