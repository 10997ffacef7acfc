"""The rounds of a pipeline's steady state, and when the times of one come again in the next."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from spsim.step.pipeline.graph import Bools, Graph
from spsim.step.pipeline.orders import Numbers


@dataclass(frozen=True)
class Steady:
    """Rounds of equal passes and waits, cut at the same place of all ranks' rows.

    What comes after a cut depends on what came before only through the nodes of its border; if their times are those of
    an earlier border but for a shift, all that lies between comes again.
    """

    first: int
    """Passes of a rank before the first cut."""
    length: int
    """Passes of a rank in a round."""
    borders: Numbers
    """A row for each cut: what is waited for across it, in one order."""

    def cut(self, number: int) -> int:
        """Passes of a rank before it."""
        return self.first + number * self.length

    def comes_again(self, ends_ps: Numbers) -> int | None:
        """Which cut the last one repeats, the latest if there are several; None if it repeats none."""
        times = ends_ps[self.borders]
        same = (times - times[:, :1] == times[-1] - times[-1, 0]).all(axis=1)
        found = np.flatnonzero(same[:-1])
        return int(found[-1]) if len(found) else None


def steady_state(graph: Graph, length: int) -> Steady | None:
    """The longest row of equal rounds of a length, if there are two or more."""
    start = _start(graph)
    rounds = _Rounds(graph, np.maximum(-1, (graph.positions[graph.by_rank] - start) // length))
    first, last = _longest(rounds.equal())
    borders = [rounds.border(start + number * length) for number in range(first, last + 1)]
    while len(borders) > 1 and not all(rounds.same(*two) for two in pairwise(borders)):
        borders.pop(0)
        first += 1
    return Steady(start + first * length, length, np.array(borders)) if len(borders) > 1 else None


def _start(graph: Graph) -> int:
    """The first place in the rows from which, up to half of them, no rank runs the first pass of a class."""
    first = np.array([name.occurrence in ("first", "only") for name in graph.classes.names])
    positions = graph.positions[graph.passes[first[graph.classes.of_passes]]]
    return int(positions[2 * positions < graph.positions.max()].max()) + 1


class _Rounds:
    """Nodes by round, and for each the one in its place in the next round, −1 if the rounds differ."""

    def __init__(self, graph: Graph, rounds: Numbers) -> None:
        self._graph = graph
        self._number = int(rounds.max()) + 1
        order = graph.by_rank[np.argsort(rounds, kind="stable")]
        sizes = np.bincount(rounds + 1)[1:]
        bounds = np.append(0, np.cumsum(sizes)) + (rounds < 0).sum()
        self.later: Numbers = np.full(len(order), -1)
        self._round = np.empty_like(order)
        self._round[graph.by_rank] = rounds
        for number in range(self._number - 1):
            own, after = (order[bounds[place] : bounds[place + 1]] for place in (number, number + 1))
            if len(own) == len(after) and (graph.own[own] == graph.own[after]).all():
                self.later[own] = after

    def equal(self) -> Bools:
        """Of each round but the last, whether the next waits for the same, a round later."""
        graph = self._graph
        by_rank = np.empty_like(graph.by_rank)
        by_rank[graph.by_rank] = np.arange(len(by_rank))
        order = np.argsort(by_rank[graph.heads], kind="stable")
        of_round = self._round[graph.heads[order]]
        order = order[np.argsort(of_round, kind="stable")]
        bounds = np.searchsorted(np.sort(of_round), np.arange(self._number + 1))
        found = np.zeros(self._number - 1, np.bool_)
        for number in range(self._number - 1):
            own, after = (order[bounds[place] : bounds[place + 1]] for place in (number, number + 1))
            found[number] = len(own) == len(after) and (
                np.array_equal(self.later[graph.tails[own]], graph.tails[after])
                and np.array_equal(self.later[graph.heads[own]], graph.heads[after])
                and np.array_equal(graph.times[own], graph.times[after])
            )
        return found

    def border(self, position: int) -> Numbers | None:
        """Nodes before a cut that are waited for behind it; None if something before it waits for what is behind."""
        graph = self._graph
        tails, heads = graph.positions[graph.tails] < position, graph.positions[graph.heads] < position
        if (heads & ~tails).any():
            return None
        across = tails & ~heads
        there = np.zeros(len(graph.own), np.bool_)
        there[graph.tails[across]] = True
        return graph.by_rank[there[graph.by_rank]]

    def same(self, border: Numbers | None, following: Numbers | None) -> bool:
        """Whether the border of a cut is that of the cut before, a round later."""
        return border is not None and following is not None and np.array_equal(self.later[border], following)


def _longest(equal: Bools) -> tuple[int, int]:
    """First and last of the longest row of rounds, each equal to the next; a row of one if none is."""
    best = start = 0, 0
    for number, same in enumerate(equal.tolist()):
        start = (start[0], number + 1) if same else (number + 1, number + 1)
        best = max(best, start, key=lambda row: row[1] - row[0])
    return best
