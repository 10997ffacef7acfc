"""The steady state of a pipeline: a round that comes again, and how a step goes through head, rounds and tail."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from spsim.step.pipeline.graph import Graph, Part
from spsim.step.pipeline.orders import Numbers


@dataclass(frozen=True)
class Folded:
    """A graph in three: all ranks' rows are cut at the same two places, between which lies one round.

    What comes after a cut depends on what came before only through the nodes of its border. A step with more
    micro-batches has the same head and tail, and more rounds between.
    """

    head: Part
    round: Part
    tail: Part
    border: Numbers
    """Where the round's result, the next border, stands among its inputs and nodes."""


class Paced:
    """A step with some times and any number of rounds: what it is made of is gone through once."""

    def __init__(self, parts: Folded, times_ps: Numbers) -> None:
        self._parts = parts
        self._times_ps = times_ps
        self._head_ps = parts.head.ends(np.zeros(1, np.int64), times_ps)
        self._border_ps = self._head_ps[parts.head.number[parts.round.inputs]]
        """Of the next round."""
        self._borders_ps: list[Numbers] = []
        self._found: list[Numbers] = []
        self._seen: dict[bytes, int] = {}
        self._repeats: tuple[int, int] | None = None
        """Once known, the first round that comes again, and how much later the one is that is like it."""
        self._tails: dict[int, Numbers] = {}
        """By the last round, as it ran first."""

    def ends(self, rounds: int) -> tuple[Runs, Runs, Runs]:
        """When head, rounds and tail are reached in a step with a number of rounds."""
        found = self._rounds(rounds)
        place, later_ps = found.place(rounds - 1)
        if place not in self._tails:
            self._tails[place] = self._parts.tail.ends(self._found[place][self._parts.border], self._times_ps)
        return Runs.once(self._head_ps), found, Runs.once(self._tails[place] + later_ps)

    def _rounds(self, number: int) -> Runs:
        """One round after the other, until a border is that of an earlier one but for a shift."""
        while self._repeats is None and len(self._found) < number:
            border_ps, run = self._border_ps, len(self._found)
            first = self._seen.setdefault((border_ps - border_ps[0]).tobytes(), run)
            if first < run:
                self._repeats = first, int(border_ps[0] - self._borders_ps[first][0])
                break
            self._borders_ps.append(border_ps)
            self._found.append(self._parts.round.ends(border_ps, self._times_ps))
            self._border_ps = self._found[-1][self._parts.border]
        if self._repeats is None or number <= len(self._found):
            return Runs(np.array(self._found[:number]), number, 0, 0)
        first, shift_ps = self._repeats
        return Runs(np.array(self._found), number, len(self._found) - first, shift_ps)


@dataclass(frozen=True)
class Runs:
    """When inputs and nodes of a part are reached in all its runs, of which the last `period` that are written come
    again, each time later.
    """

    written_ps: Numbers
    """A row for each run."""
    number: int
    period: int
    """0 if all are written."""
    shift_ps: int

    @classmethod
    def once(cls, ends_ps: Numbers) -> Runs:
        return cls(ends_ps[None], 1, 0, 0)

    @property
    def first(self) -> int:
        """That comes again; behind the last one if none does."""
        return len(self.written_ps) - self.period

    def place(self, number: int) -> tuple[int, int]:
        """The run that is written as one of all is, and how much later that one is."""
        if not self.period or number < self.first:
            return number, 0
        again, place = divmod(number - self.first, self.period)
        return self.first + place, again * self.shift_ps

    def of(self, number: int | Numbers) -> Numbers:
        """Times of one run, or a row for each of several."""
        if not self.period:
            return self.written_ps[number]
        runs, place = np.divmod(np.maximum(number, self.first) - self.first, self.period)
        later_ps = np.asarray(runs * self.shift_ps)
        found: Numbers = self.written_ps[np.minimum(number, self.first) + place] + later_ps[..., None]
        return found


ROUNDS = 2
"""Of the steady state, in a graph that is folded: the second shows what the border of the first one hands on."""


def folded(graph: Graph, length: int) -> Folded | None:
    """A graph of two rounds, of `length` passes of each rank, cut around both and between; None if they differ."""
    start = _start(graph)
    cuts = [start, start + length, start + 2 * length]
    first, second = (_between(graph, *two) for two in pairwise(cuts))
    tail = _between(graph, cuts[-1], None)
    if first is None or second is None or tail is None or not first.like(second):
        return None
    border = first.number[second.inputs]
    if not np.array_equal(border, second.number[tail.inputs]) or (border < 0).any():
        return None
    before = np.flatnonzero((graph.positions < start) & (np.arange(len(graph.own)) > 0))
    return Folded(Part(graph, np.zeros(1, np.int64), before), first, tail, border)


def _start(graph: Graph) -> int:
    """The first place in the rows from which, up to half of them, no rank runs the first pass of a class."""
    first = np.array([name.occurrence in ("first", "only") for name in graph.classes.names])
    positions = graph.positions[graph.passes[first[graph.classes.of_passes]]]
    return int(positions[2 * positions < graph.positions.max()].max()) + 1


def _between(graph: Graph, start: int, stop: int | None) -> Part | None:
    """What lies between two places in the rows; None if some of it, or of what comes before, waits for what follows."""
    before = graph.positions < start
    behind = graph.positions >= stop if stop is not None else np.zeros(len(before), np.bool_)
    tails, heads = graph.tails, graph.heads
    if (before[heads] & ~before[tails]).any() or (behind[tails] & ~behind[heads]).any():
        return None
    waited_for = np.zeros(len(before), np.bool_)
    waited_for[tails[before[tails] & ~before[heads]]] = True
    return Part(graph, np.flatnonzero(waited_for), np.flatnonzero(~before & ~behind))
