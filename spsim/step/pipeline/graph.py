"""What waits for what in a pipeline, as arrays: ends of passes and waits, each the latest of some others plus a time.

A node is a moment of a rank: the end of a pass, or of a wait after which something is posted. A message that cannot be
held up by the one before it on its lane is no node: who waits for it waits for both posts and a transfer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

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


@dataclass(frozen=True)
class Classes:
    """The classes that there are, and that of each pass, those of a rank in order."""

    names: tuple[PassClass, ...]
    of_passes: Numbers


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
        self.messages = Messages(made.lanes, made.posts, made.travelling)
        self.positions: Numbers = made.positions
        """Place in its rank's row of the pass that a node ends or follows; of a message, of the later post."""
        self.ranks: Numbers = made.ranks
        """Of nodes; of a message, its lane behind all ranks."""


class _Level(NamedTuple):
    """Nodes that wait for none of each other."""

    tails: Numbers
    edges: slice
    firsts: Numbers
    """Among the edges, the first of each node."""
    nodes: slice
    own: slice
    """The same, inputs not counted."""


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
        tails, heads = number[graph.tails[inside]], number[graph.heads[inside]]
        level = _levels(len(inputs) + len(nodes), tails, heads)
        if (level < 0).any():
            ranks = graph.ranks[nodes[level[len(inputs) :] < 0]]
            raise DeadlockError(np.unique(ranks[ranks < len(graph.score.tapes)]).tolist())
        level[: len(inputs)] = 0
        order = np.argsort(level, kind="stable")
        self._place = np.empty_like(order)
        self._place[order] = np.arange(len(order))
        by_head = np.argsort(self._place[heads], kind="stable")
        self._own = np.append(np.full(len(inputs), -1), graph.own[nodes])[order][len(inputs) :]
        self._tails = self._place[tails[by_head]]
        self._times = graph.times[inside][by_head]
        first = np.searchsorted(self._place[heads[by_head]], np.arange(len(order) + 1))
        bounds = [*np.flatnonzero(np.diff(level[order], prepend=0)).tolist(), len(order)]
        self._levels: list[_Level] = []
        for start, stop in pairwise(bounds):
            edges = slice(int(first[start]), int(first[stop]))
            own = slice(start - len(inputs), stop - len(inputs))
            firsts = first[start:stop] - first[start]
            self._levels.append(_Level(self._tails[edges], edges, firsts, slice(start, stop), own))

    def ends(self, inputs_ps: Numbers, times_ps: Numbers) -> Numbers:
        """When inputs and nodes are reached, for a vector of times or several as columns."""
        along = times_ps[self._times]
        own = times_ps[self._own]
        found = np.empty((len(self._place), *times_ps.shape[1:]), np.int64)
        found[: len(inputs_ps)] = inputs_ps
        for tails, edges, firsts, nodes, places in self._levels:
            values = found.take(tails, axis=0)
            values += along[edges]
            into = found[nodes]
            np.maximum.reduceat(values, firsts, axis=0, out=into)
            into += own[places]
        return found[self._place]

    def like(self, other: Part) -> bool:
        """Whether both wait for their inputs in the same way."""
        names = ("_place", "_own", "_tails", "_times")
        return all(np.array_equal(getattr(self, name), getattr(other, name)) for name in names)


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
        self.positions: Numbers = np.append(-1, (passed - (passed - runs)[first][rank])[ends] - 1)
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
        if (self.posts == never).any():
            self._refuse(score.stages.lanes, never)
        self.held_up, self.travelling = self._travelling(waited)
        chain = _Edges(before[ends], count[ends], np.full(len(self.own) - 1, none))
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

    def _waits(self, messages: Numbers, heads: Numbers, first_lane: int, none: int) -> Iterator[_Edges]:
        """What the end of a wait, or of the pass behind it, waits for; and what messages wait for that are nodes."""
        at_node = self.travelling[messages] > 0
        yield _Edges(self.travelling[messages[at_node]], heads[at_node], np.full(at_node.sum(), none))
        own = np.flatnonzero(self.travelling)
        for side in self.posts:
            free = messages[~at_node]
            yield _Edges(side[free], heads[~at_node], first_lane + self.lanes[free])
            yield _Edges(side[own], self.travelling[own], np.full(len(own), none))
        later = np.flatnonzero(self.held_up)
        yield _Edges(self.travelling[later - 1], self.travelling[later], np.full(len(later), none))
        positions = self.positions[self.posts[:, own]].max(axis=0)
        self.positions = np.append(self.positions, positions)
        self.own = np.append(self.own, first_lane + self.lanes[own])
        self.ranks = np.append(self.ranks, self.ranks.max() + 1 + self.lanes[own])


def _last(messages: Numbers, nodes: Numbers, lanes: Numbers) -> tuple[Numbers, Numbers]:
    """What nodes wait for, but of each lane only the message that comes last."""
    order = np.lexsort((messages, lanes[messages], nodes))
    messages, nodes = messages[order], nodes[order]
    last = np.append((nodes[1:] != nodes[:-1]) | (lanes[messages[1:]] != lanes[messages[:-1]]), True)[: len(nodes)]
    return messages[last], nodes[last]


class _Edges(NamedTuple):
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


def _levels(number: int, tails: Numbers, heads: Numbers) -> Numbers:
    """Length of the longest way to each node, −1 if one waits for itself."""
    by_tail = np.argsort(tails, kind="stable")
    out = heads[by_tail]
    first = np.append(0, np.cumsum(np.bincount(tails, minlength=number)))
    missing = np.bincount(heads, minlength=number)
    level = np.full(number, -1)
    ready = np.flatnonzero(missing == 0)
    depth = 0
    while len(ready):
        level[ready] = depth
        start = first[ready]
        sizes = first[ready + 1] - start
        ends = np.cumsum(sizes)
        reached = out[np.arange(ends[-1]) + np.repeat(start - ends + sizes, sizes)]
        np.subtract.at(missing, reached, 1)
        ready = np.unique(reached[missing[reached] == 0])
        depth += 1
    return level
