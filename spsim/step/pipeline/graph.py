"""What waits for what in a pipeline, as arrays: ends of passes and waits, each the latest of some others plus a time.

A node is a moment of a rank: the end of a pass, or of a wait after which something is posted. A message that cannot be
held up by the one before it on its lane is no node: who waits for it waits for both posts and a transfer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from spsim.lazy import lazy
from spsim.step.pipeline.messages import DeadlockError, Lane
from spsim.step.pipeline.orders import KINDS, Kind, Numbers
from spsim.step.pipeline.tape import POST, RUN, WAIT, Score

Bools = npt.NDArray[np.bool_]
Occurrence = Literal["middle", "first", "last", "only"]
OCCURRENCES: tuple[Occurrence, ...] = ("middle", "first", "last", "only")


class PassClass(NamedTuple):
    """Passes that take one time: those of a chunk, but the first and the last that it runs are told apart."""

    rank: int
    chunk: int
    kind: Kind
    occurrence: Occurrence


@dataclass(frozen=True, eq=False)
class Classes:
    """The classes that there are, and that of each pass, those of a rank in order."""

    names: tuple[PassClass, ...]
    of_passes: Numbers

    @lazy
    def columns(self) -> tuple[Numbers, Numbers, Numbers]:
        """Rank, chunk, and 0 for forward and 1 for backward of each class."""
        rows = [(rank, chunk, int(kind != "F")) for rank, chunk, kind, _ in self.names]
        ranks, chunks, backward = np.array(rows).T
        return ranks, chunks, backward


def classes_of(score: Score) -> Classes:
    kinds, chunks, _ = score.columns
    keys = (score.ranks * score.stages.chunks + chunks) * len(KINDS) + kinds
    places = np.arange(len(keys))
    first, last = np.zeros((2, keys.max() + 1), np.int64)
    last[keys] = places
    first[keys[::-1]] = places[::-1]
    numbers = keys * len(OCCURRENCES) + (first[keys] == places) + 2 * (last[keys] == places)
    there = np.flatnonzero(np.bincount(numbers))
    names = []
    for number in there.tolist():
        key, occurrence = divmod(number, len(OCCURRENCES))
        place, kind = divmod(key, len(KINDS))
        names.append(PassClass(*divmod(place, score.stages.chunks), KINDS[kind], OCCURRENCES[occurrence]))
    return Classes(tuple(names), np.searchsorted(there, numbers))


@dataclass(frozen=True)
class Messages:
    """All messages, those of a lane in the order in which they are sent."""

    lanes: Numbers
    """Places in `Score.stages.lanes`."""
    posts: Numbers
    """Nodes at which the sender and, in a second row, the receiver posts them."""
    nodes: Numbers
    """Their ends, where the one before on the lane may hold them up; else 0."""
    posted: Numbers
    """Passes of its rank before either side posts them, in a row for each side,"""
    waited: Numbers
    """and before it has waited for them; more than there are where it never does."""


class Graph:
    """Nodes: 0 is the start of the step, then come those of each rank in the order of its tape, then messages.

    The head of an edge is reached no sooner than its tail and a time after it; a node is reached its own time after the
    last of those. Times are indices into one vector: of the pass classes, then the lanes, then 0.
    """

    def __init__(self, score: Score) -> None:
        self.score = score
        self.classes = classes_of(score)
        self.lanes: tuple[Lane, ...] = score.stages.lanes
        made = _Nodes(score, self.classes)
        self.own: Numbers = made.own
        self.tails: Numbers = made.tails
        self.heads: Numbers = made.heads
        self.times: Numbers = made.times
        self.passes: Numbers = made.passes
        """Node of each pass, those of a rank in order."""
        self.finished: Numbers = made.finished
        """The last node of each rank."""
        self.messages = Messages(made.lanes, made.posts, made.travelling, made.posted, made.waited)
        self.positions: Numbers = made.positions
        """Place in its rank's row of the pass that a node ends or follows; of a message, of the later post."""
        self.ranks: Numbers = made.ranks
        """Of nodes, −1 for messages."""


class Part:
    """Some nodes of a graph, reached once others are; a part of a graph is all that lies between two moments of it."""

    def __init__(self, graph: Graph, inputs: Numbers, nodes: Numbers) -> None:
        """`inputs` are all nodes elsewhere that `nodes` wait for."""
        self.inputs = inputs
        self.nodes = nodes
        number = np.full(len(graph.own), -1)
        number[inputs] = np.arange(len(inputs))
        number[nodes] = np.arange(len(inputs), len(inputs) + len(nodes))
        self.number: Numbers = number
        """Of nodes of the graph among the inputs and nodes of the part, −1 for others."""
        inside = number[graph.heads] >= len(inputs)
        self.edges = Edges(number[graph.tails[inside]], number[graph.heads[inside]], graph.times[inside])
        """Between numbers of the part."""
        self.own: Numbers = graph.own[nodes]
        self._ranks = graph.ranks[nodes]

    def like(self, other: Part) -> bool:
        """Whether both wait for their inputs in the same way."""
        return np.array_equal(self.own, other.own) and all(map(np.array_equal, self.edges, other.edges))

    def ends(self, inputs_ps: Numbers, times_ps: Numbers) -> Numbers:
        """When inputs and nodes are reached, for a vector of times or several as columns.

        Raises:
            DeadlockError: nodes wait for themselves.
        """
        if times_ps.ndim > 1:
            return self._ends_of_many(inputs_ps, times_ps)
        order = self._order
        along = times_ps[order.times]
        own = times_ps[order.own]
        found = np.empty(len(order.places), np.int64)
        found[: len(inputs_ps)] = inputs_ps
        nodes = found[len(inputs_ps) :]
        for start, stop, first, last in order.levels:
            values = found.take(order.tails[first:last])
            values += along[first:last]
            into = nodes[start:stop]
            np.maximum.reduceat(values, order.firsts[start:stop], out=into)
            into += own[start:stop]
        return found[order.places]

    def _ends_of_many(self, inputs_ps: Numbers, times_ps: Numbers) -> Numbers:
        """The same of columns, where rows of the edges that are the first, the second, … of their heads are quicker."""
        order = self._order
        own = times_ps[order.own]
        found = np.empty((len(order.places), times_ps.shape[1]), np.int64)
        found[: len(inputs_ps)] = inputs_ps
        nodes = found[len(inputs_ps) :]
        for (start, stop, *_), (tails, times) in zip(order.levels, self._in_rows, strict=True):
            values = found.take(tails, axis=0)
            values += times_ps.take(times, axis=0)
            into = nodes[start:stop]
            np.maximum.reduce(values, axis=0, out=into)
            into += own[start:stop]
        return found[order.places]

    @lazy
    def _in_rows(self) -> list[tuple[Numbers, Numbers]]:
        """Tails and times of the edges of each level: a column for each head, whose last edge fills it up."""
        order = self._order
        starts, stops, firsts, _ = np.array(order.levels).reshape(-1, 4).T
        nodes = stops - starts
        edges = order.firsts + np.repeat(firsts, nodes)
        counts = np.diff(np.append(edges, len(order.tails)))
        sizes = nodes * (np.maximum.reduceat(counts, starts) if len(starts) else nodes)
        level, ends = np.repeat(np.arange(len(nodes)), sizes), np.cumsum(sizes)
        row, column = np.divmod(np.arange(len(level)) - (ends - sizes)[level], nodes[level])
        column += starts[level]
        at = edges[column] + np.minimum(row, counts[column] - 1)
        tails, times = order.tails[at], order.times[at]
        parts = zip((ends - sizes).tolist(), ends.tolist(), nodes.tolist(), strict=True)
        return [(tails[at:end].reshape(-1, n), times[at:end].reshape(-1, n)) for at, end, n in parts]

    @lazy
    def _order(self) -> _Order:
        """Inputs, then nodes by level."""
        inputs, number = len(self.inputs), len(self.inputs) + len(self.nodes)
        level = _levels(number, inputs, self.edges.tails, self.edges.heads)
        if level.min(initial=0) < 0:
            ranks = self._ranks[level[inputs:] < 0]
            raise DeadlockError(np.unique(ranks[ranks >= 0]).tolist())
        order = np.argsort(level, kind="stable")
        places = np.empty_like(order)
        places[order] = np.arange(number)
        by_head = np.argsort(places[self.edges.heads], kind="stable")
        first = np.searchsorted(places[self.edges.heads[by_head]], np.arange(inputs, number + 1))
        bounds = np.append(np.flatnonzero(np.diff(level[order[inputs:]], prepend=0)), number - inputs)
        firsts = first[:-1] - np.repeat(first[bounds[:-1]], np.diff(bounds))
        of_edges = first[bounds].tolist()
        levels = [*zip(bounds.tolist(), bounds[1:].tolist(), of_edges, of_edges[1:], strict=False)]
        own = self.own[order[inputs:] - inputs]
        return _Order(places, own, places[self.edges.tails[by_head]], self.edges.times[by_head], firsts, levels)


class _Order(NamedTuple):
    """Inputs and nodes in an order in which all that one waits for comes before it, edges by their heads."""

    places: Numbers
    own: Numbers
    """Times of the nodes."""
    tails: Numbers
    times: Numbers
    """Of the edges."""
    firsts: Numbers
    """The first edge of each node among those of its level."""
    levels: list[tuple[int, int, int, int]]
    """First and last node (inputs not counted) and edge of nodes that wait for none of each other."""


class _Nodes:
    """What a graph is made of, read from the tapes."""

    def __init__(self, score: Score, classes: Classes) -> None:
        operations, lanes, numbers, rank = _joined(score)
        ends = _ends(operations, rank)
        count: Numbers = np.cumsum(ends)
        earlier: Numbers = count - ends
        first = np.flatnonzero(np.diff(rank, prepend=-1))
        before = np.where(earlier > earlier[first][rank], earlier, 0)
        """The last node of the rank before an entry; the next one is `earlier` + 1."""
        runs, posts, waits = operations == RUN, operations == POST, operations == WAIT
        self.ranks: Numbers = np.append(0, rank[ends])
        self.passes: Numbers = count[runs]
        self.finished: Numbers = count[np.append(first[1:], len(count)) - 1]
        passed = np.cumsum(runs)
        passed -= (passed - runs)[first][rank]
        self.positions: Numbers = np.append(-1, passed[ends] - 1)
        none = len(classes.names) + len(score.stages.lanes)
        self.own: Numbers = np.full(len(self.ranks), none)
        self.own[self.passes] = classes.of_passes

        sides = np.array([lane[0] for lane in score.stages.lanes] or [0])[lanes] != rank
        size = np.zeros(len(score.stages.lanes), np.int64)
        np.maximum.at(size, lanes[posts], numbers[posts] + 1)
        message: Numbers = np.append(0, np.cumsum(size))[lanes] + numbers
        self.lanes: Numbers = np.repeat(np.arange(len(size)), size)
        never = len(self.own)
        self.posts: Numbers = np.full((2, len(self.lanes)), never)
        self.posts[sides[posts] * 1, message[posts]] = before[posts]
        waited = np.full_like(self.posts, never)
        waited[sides[waits] * 1, message[waits]] = earlier[waits] + 1
        self.posted: Numbers = np.full_like(self.posts, never)
        self.waited: Numbers = np.full_like(self.posts, never)
        self.posted[sides[posts] * 1, message[posts]] = passed[posts]
        self.waited[sides[waits] * 1, message[waits]] = passed[waits]
        if (self.posts == never).any():
            self._refuse(score.stages.lanes, never)
        self.held_up, self.travelling = self._travelling(waited)
        chain = Edges(before[ends], count[ends], np.full(len(self.own) - 1, none))
        edges = [chain, *self._waits(*_last(message[waits], earlier[waits] + 1, self.lanes), len(classes.names), none)]
        self.tails, self.heads, self.times = (np.concatenate(column) for column in zip(*edges, strict=True))

    def _refuse(self, lanes: Sequence[Lane], never: int) -> None:
        sides, messages = np.nonzero(self.posts == never)
        posted = [lanes[self.lanes[message]][1 - side] for side, message in zip(sides, messages, strict=True)]
        raise DeadlockError(sorted({*posted}))

    def _travelling(self, waited: Numbers) -> tuple[Bools, Numbers]:
        """Whether the message before on its lane may hold one up, and the nodes of such and of those before; else 0.

        It may not where a side has waited for it before it posts.
        """
        follows = np.append(False, self.lanes[1:] == self.lanes[:-1])
        before = np.roll(waited, 1, axis=1)
        held_up: Bools = follows & (before > self.posts).all(axis=0)
        own = held_up | np.append(held_up[1:], False)
        nodes = np.where(own, len(self.own) - 1 + np.cumsum(own), 0)
        return held_up, nodes

    def _waits(self, messages: Numbers, heads: Numbers, first_lane: int, none: int) -> Iterator[Edges]:
        """What the end of a wait, or of the pass behind it, waits for; and what messages wait for that are nodes."""
        at_node = self.travelling[messages] > 0
        yield Edges(self.travelling[messages[at_node]], heads[at_node], np.full(at_node.sum(), none))
        own = np.flatnonzero(self.travelling)
        for side in self.posts:
            free = messages[~at_node]
            yield Edges(side[free], heads[~at_node], first_lane + self.lanes[free])
            yield Edges(side[own], self.travelling[own], np.full(len(own), none))
        later = np.flatnonzero(self.held_up)
        yield Edges(self.travelling[later - 1], self.travelling[later], np.full(len(later), none))
        positions = self.positions[self.posts[:, own]].max(axis=0)
        self.positions = np.append(self.positions, positions)
        self.own = np.append(self.own, first_lane + self.lanes[own])
        self.ranks = np.append(self.ranks, np.full(len(own), -1))


def _last(messages: Numbers, nodes: Numbers, lanes: Numbers) -> tuple[Numbers, Numbers]:
    """What nodes wait for, but of each lane only the message that comes last."""
    keys = nodes * (lanes.max(initial=0) + 1) + lanes[messages]
    order = np.argsort(keys, kind="stable")
    first = np.flatnonzero(np.diff(keys[order], prepend=-1))
    return np.maximum.reduceat(messages[order], first) if len(first) else messages, nodes[order[first]]


class Edges(NamedTuple):
    """Heads are reached no sooner than tails and a time after them."""

    tails: Numbers
    heads: Numbers
    times: Numbers


def _joined(score: Score) -> tuple[Numbers, Numbers, Numbers, Numbers]:
    """Operations, lanes and messages of all tapes behind each other, and the rank of each entry."""
    columns = zip(*[(tape.operations, tape.lanes, tape.messages) for tape in score.tapes], strict=True)
    ranks = np.repeat(np.arange(len(score.tapes)), [len(tape.operations) for tape in score.tapes])
    operations, lanes, messages = (np.concatenate(column) for column in columns)
    return operations, lanes, messages, ranks


def _ends(operations: Numbers, rank: Numbers) -> Bools:
    """Entries that a node stands for: passes, and waits that neither a pass nor another wait of the rank follows."""
    follows = np.append(rank[1:] == rank[:-1], False)
    next_one = np.where(follows, np.append(operations[1:], POST), POST)
    found: Bools = (operations == RUN) | ((operations == WAIT) & (next_one == POST))
    return found


def _levels(number: int, inputs: int, tails: Numbers, heads: Numbers) -> Numbers:
    """Length of the longest way to each node from the inputs, which come first; −1 if one waits for itself."""
    later = tails >= inputs
    missing = np.bincount(heads[later], minlength=number + 1)
    missing[number] = np.iinfo(missing.dtype).max
    level, mark = np.full((2, number + 1), -1)
    level[:inputs] = 0
    out = _out(number, tails[later], heads[later])
    ready = inputs + np.flatnonzero(missing[inputs:] == 0)
    depth = 1
    while len(ready):
        level[ready] = depth
        reached = out[ready].ravel()
        np.subtract.at(missing, reached, 1)
        reached = reached[missing[reached] == 0]
        which = np.arange(len(reached))
        mark[reached] = which
        ready = reached[mark[reached] == which]
        depth += 1
    return level[:number]


def _out(number: int, tails: Numbers, heads: Numbers) -> Numbers:
    """The heads of the edges of each node, a row for each, filled up with `number`."""
    by_tail = np.argsort(tails, kind="stable")
    tails = tails[by_tail]
    place = np.arange(len(tails)) - np.searchsorted(tails, tails)
    out = np.full((number, place.max(initial=0) + 1), number)
    out[tails, place] = heads[by_tail]
    return out
