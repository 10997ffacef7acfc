"""Folding: a segment is run through the engine once for each state in which it finds the lanes of its ranks.

All that earlier segments mean to a segment is where they leave its ranks: when their kernels end, which lanes are busy
beyond that, which communications hold the device, and when what is waited for arrives. So a segment is a function of
that state, and equal states are run once. Where the state before a run of a loop is that before an earlier run, all
that follows comes again: it is written as a `Repeat` and skipped. The same fixpoint folds the steps of a ring, equal
layers, equal micro-batches and the steady state of a pipeline.

A lane may fall behind for ever: when a communication takes longer than all kernels of a run and nobody waits for it,
its lane is busier before each run. If it has been busy with earlier runs during a whole run, that run would be the
same however long the lane is busy, but for its own communications, which begin when it is free. Such a loop is folded,
too: the lane is late by so much more in each run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

from spsim.engine.engine import run
from spsim.engine.lives import Integers
from spsim.engine.pieces import Move, Node, Repeat, Stretch
from spsim.engine.recording import Ran, Recording
from spsim.engine.tasks import RankProgram
from spsim.lazy import Deferred, lazy
from spsim.step.abreast import Abreast
from spsim.step.drift import drift, later, runs_of
from spsim.step.itinerary import Item, Loop, Visit, segments_of
from spsim.step.lanes import IDLE, Busy, State, record, start
from spsim.step.levels import Level
from spsim.step.meeting import meeting
from spsim.step.rows import RanApart, Rows
from spsim.step.segments import Segment


@dataclass(frozen=True, slots=True)
class Step:
    """What is run: an itinerary, and the programs and numbers of its segments by their names."""

    itinerary: Sequence[Item]
    programs: Mapping[str, Mapping[int, RankProgram]]
    """The tasks of each simulated rank that runs the segment."""
    durations: Mapping[str, Mapping[int, Sequence[int]]]
    """Picoseconds of each task, by simulated rank."""
    sizes: Mapping[str, Sequence[int] | Integers]
    """Bytes of each buffer."""
    slowdown: float
    abreast: Mapping[str, Abreast] = field(default_factory=dict)
    """Segments that are prepared for all ranks at once."""
    rows: Rows | None = None
    """The itinerary, where what is known of it whatever the numbers is kept."""
    apart: bool = False
    """Whether ranks that do not meet in an item of the itinerary may come to its end far apart, as slow ranks do."""


class Walked(NamedTuple):
    """A step as it ran."""

    nodes: Sequence[Node]
    events: int
    """Tasks that were run, not written again."""
    overlapping: bool
    """Whether memory has to be read from the whole: pieces overlap, and their own records do not know how."""
    ran: RanApart | None = None
    """If its nodes are written when they are read: its figures."""


def fold_step(step: Step) -> Walked:
    """Run a step, what comes again once.

    Where no segment leaves anything undone, its time is the sum of theirs, and it is written when it is read.
    """
    rows = step.rows or Rows([step.itinerary])
    walk = _Walk(step, rows.segments)
    ran = walk.ran_apart(rows)
    if ran is None:
        nodes = walk.apart(step.itinerary) if step.apart else walk.items(step.itinerary)
        return Walked(nodes, walk.events, walk.overlapping)
    return Walked(Deferred(partial(walk.row, step.itinerary)), walk.events + rows.tail_tasks, False, ran)


@dataclass(frozen=True)
class Alone:
    """A row of visits as it runs by itself."""

    at_ps: int
    """When the first of its ranks ends."""
    ends: State
    """How they stand then."""
    write: Callable[[], list[Node]]

    @lazy
    def nodes(self) -> list[Node]:
        """All of it."""
        return self.write()


class Apart(NamedTuple):
    """Rows of visits as each runs by itself."""

    rows: list[Alone]
    events: int
    """Tasks that were run."""
    levels: Callable[[], list[Level]] | None = None
    """How full memory is in each, where no segment leaves anything undone."""


def fold_each(step: Step, rows: Rows) -> Apart:
    """Run several rows of visits, each from the beginning, what is alike once.

    Where no segment leaves anything undone, the time of a row is the sum of theirs, and it is written when it is read.
    """
    walk = _Walk(step, rows.segments)
    ran = walk.ran_apart(rows)
    if ran is None:
        return Apart([walk.alone(own) for own in rows.items], walk.events)
    found = [Alone(at, CLEAN, partial(walk.row, own)) for at, own in zip(ran.ends_ps, rows.items, strict=True)]
    return Apart(found, walk.events + rows.tail_tasks, lambda: ran.filled.levels)


CLEAN: State = ((0, IDLE),)
"""Of one rank that has nothing before it."""


@dataclass(slots=True)
class _Rank:
    """Where a rank stands."""

    time: int = 0
    """End of its last kernel."""
    busy: Busy = IDLE


class _Before(NamedTuple):
    """Where a walk stood before a run of a loop."""

    done: int
    nodes: int
    time: int
    task: int
    state: State


class _Walk:
    """Walks an itinerary, remembering what was run."""

    def __init__(self, step: Step, segments: Mapping[str, Segment]) -> None:
        self.step = step
        self.ranks = {rank: _Rank() for programs in step.programs.values() for rank in programs}
        self.events = 0
        self.first_task = 0
        self.layers = self.micro_batches = 0
        """What the loops around the current visit add to its own."""
        self.known: dict[tuple[str, Sequence[int], State], tuple[Recording, State]] = {}
        self.drifted = False
        self.ran = self._run_side_by_side(segments) if len(self.ranks) == 1 else {}
        """Of segments that begin with all lanes free."""

    @property
    def overlapping(self) -> bool:
        """Whether a lane fell behind, or memory is still to be allocated when the last segment has been issued."""
        left = (change for rank in self.ranks.values() for change in rank.busy.left)
        return self.drifted or any(change.bytes > 0 for change in left)

    def items(self, items: Sequence[Item]) -> list[Node]:
        """The nodes of some items."""
        nodes: list[Node] = []
        for item in items:
            nodes += [self._visit(item)] if isinstance(item, Visit) else self._loop(item)
        return nodes

    def apart(self, items: Sequence[Item]) -> list[Node]:
        """The nodes of some items; passes are walked by those who meet in them, whatever others do meanwhile."""
        every, nodes = self.ranks, list[Node]()
        for item in items:
            segments = [*segments_of([item])]
            passes = all(segment.phase in ("forward", "backward") for segment in segments)
            for own in meeting(self.step.programs[segment.name] for segment in segments) if passes else [[*every]]:
                self.ranks = {rank: every[rank] for rank in own}
                nodes += self.items([item])
        self.ranks = every
        return nodes

    def alone(self, items: Sequence[Item]) -> Alone:
        """Some items by themselves."""
        nodes = self.row(items)
        time, state = self._state(self.ranks.values())
        return Alone(time, state, lambda: nodes)

    def row(self, items: Sequence[Item]) -> list[Node]:
        """The nodes of some items by themselves."""
        for rank in self.ranks.values():
            rank.time, rank.busy = 0, IDLE
        self.first_task = 0
        return self.items(items)

    def ran_apart(self, rows: Rows) -> RanApart | None:
        """Some rows, where one rank runs them and no segment leaves anything undone."""
        return rows.ran(self.ran, self.step.durations, self.step.sizes) if len(self.ranks) == 1 else None

    def _state(self, ranks: Iterable[_Rank]) -> tuple[int, State]:
        """When the first of some ranks is free, and how they stand then."""
        ranks = tuple(ranks)
        time = min([rank.time for rank in ranks])
        return time, tuple([(rank.time - time, rank.busy) for rank in ranks])

    # Segments

    def _visit(self, visit: Visit) -> Stretch:
        segment = visit.segment
        numbers = tuple([number for number in self.step.programs[segment.name] if number in self.ranks])
        ranks = [self.ranks[number] for number in numbers]
        shift, state = self._state(ranks)
        key = segment.name, numbers, state
        found = self.known.get(key)
        if found is None:
            found = self.known[key] = self._run(segment, numbers, state)
        recording, left = found
        for rank, (time, busy) in zip(ranks, left, strict=True):
            rank.time, rank.busy = shift + time, busy
        first_task, self.first_task = self.first_task, self.first_task + len(segment.tasks)
        return Stretch(
            recording,
            segment.phase,
            None if visit.layer is None else visit.layer + self.layers,
            None if visit.micro_batch is None else visit.micro_batch + self.micro_batches,
            shift,
            first_task,
            brings=visit.brings,
            drops=visit.drops,
        )

    def _run(self, segment: Segment, ranks: Sequence[int], state: State) -> tuple[Recording, State]:
        programs = {rank: self.step.programs[segment.name][rank] for rank in ranks}
        known = self.ran.get(segment.name) if state == CLEAN else None
        if known is not None:
            (rank,) = programs
            return record(segment, {rank: known}, self.step.sizes[segment.name], state)
        moments: Mapping[int, Ran] = self._run_abreast(segment, ranks, state) or run(
            programs,
            slowdown=self.step.slowdown,
            durations=self.step.durations[segment.name],
            starts={rank: start(segment, *own) for rank, own in zip(programs, state, strict=True)},
        )
        self.events += sum(map(len, moments.values()))
        return record(segment, moments, self.step.sizes[segment.name], state)

    def _run_abreast(self, segment: Segment, ranks: Sequence[int], state: State) -> Mapping[int, Ran] | None:
        """All ranks at once, where that is covered and nothing is under way."""
        abreast = self.step.abreast.get(segment.name)
        some = len(ranks) < len(self.step.programs[segment.name])
        if abreast is None or some or any(busy is not IDLE for _, busy in state):
            return None
        return abreast.run(self.step.durations[segment.name], [time for time, _ in state], self.step.slowdown)

    def _run_side_by_side(self, segments: Mapping[str, Segment]) -> dict[str, Ran]:
        """A rank that stands for all meets no other: segments that nothing may precede run in one environment."""
        (rank,) = self.ranks
        names = [name for name, segment in segments.items() if not segment.names and not segment.joins]
        moments = run(
            {number: self.step.programs[name][rank] for number, name in enumerate(names)},
            slowdown=self.step.slowdown,
            durations={number: self.step.durations[name][rank] for number, name in enumerate(names)},
        )
        self.events += sum(map(len, moments.values()))
        return dict(zip(names, moments.values(), strict=True))

    # Loops

    def _loop(self, loop: Loop) -> list[Node]:
        """Walks the runs of a loop until one begins as an earlier one did."""
        runs = int(loop.runs)
        if runs == 1:
            return _edged(self._one(loop, 0), loop)
        nodes: list[Node] = []
        seen: dict[State, _Before] = {}
        last: _Before | None = None
        done = 0
        while done < runs:
            time, state = self._state(self.ranks.values())
            now = _Before(done, len(nodes), time, self.first_task, state)
            folded = self._fold(loop, nodes, seen.get(state), last, now) if last else 0
            if folded:
                done, last, seen = done + folded, None, {}
                continue
            seen[state] = last = now
            nodes += self._one(loop, done)
            done += 1
        return _edged(nodes, loop)

    def _one(self, loop: Loop, index: int) -> list[Node]:
        """One run of a loop."""
        layers, micro_batches = index * loop.layers, index * loop.micro_batches
        self.layers, self.micro_batches = self.layers + layers, self.micro_batches + micro_batches
        nodes = self.items(loop.body)
        self.layers, self.micro_batches = self.layers - layers, self.micro_batches - micro_batches
        return nodes

    def _fold(self, loop: Loop, nodes: list[Node], equal: _Before | None, last: _Before, now: _Before) -> int:
        """Fold the runs since an equal state, or the last one if lanes fall behind by it; how many runs to come that
        takes in.
        """
        drifts: dict[str, int] = {}
        since = equal
        rest = int(loop.runs) - now.done
        if since is None:
            drifts = drift(loop, nodes[last.nodes :], last.state, now.state, now.time - last.time)
            rest, since = runs_of(drifts, now.state, now.time - last.time, rest), last
            self.drifted |= bool(drifts and rest)
        period = now.done - since.done
        more = rest // period if equal or drifts else 0
        if more:
            move = Move(
                now.time - since.time, now.task - since.task, period * loop.layers, period * loop.micro_batches, drifts
            )
            nodes[since.nodes :] = [_repeated(nodes[since.nodes :], 1 + more, move)]
            self.first_task += more * move.tasks
            for rank in self.ranks.values():
                rank.time += more * move.shift_ps
                rank.busy = later(rank.busy, {lane: more * late for lane, late in drifts.items()})
        return more * period


def _repeated(body: Sequence[Node], runs: int, move: Move) -> Node:
    """Some nodes, run after run."""
    node = body[0]
    if len(body) == 1 and isinstance(node, Stretch) and node.runs == 1:
        return node._replace(runs=runs, move=move)
    return Repeat(tuple(body), runs, move)


def _edged(nodes: list[Node], loop: Loop) -> list[Node]:
    """The nodes of a loop, with what its first run gets from outside and its last hands to nobody."""
    if len(nodes) == 1 and loop.brings and loop.drops:
        return [nodes[0]._replace(brings=loop.brings, drops=loop.drops)]
    if loop.brings:
        nodes[0] = nodes[0]._replace(brings=loop.brings)
    if loop.drops:
        nodes[-1] = nodes[-1]._replace(drops=loop.drops)
    return nodes
