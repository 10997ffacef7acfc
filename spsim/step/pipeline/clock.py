"""A pipeline on the clock: made once for a schedule, asked for the times of a step with any durations."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from spsim.inputs.schedules import V_SHAPED, Schedule, torch_group
from spsim.lazy import Cache, lazy
from spsim.step.pipeline.exchange import Exchange, score
from spsim.step.pipeline.graph import Classes, Graph, Part, PassClass
from spsim.step.pipeline.in_flight import Fullest, fullest
from spsim.step.pipeline.many import Steps
from spsim.step.pipeline.messages import Lane
from spsim.step.pipeline.orders import Numbers, Passes
from spsim.step.pipeline.regions import MOST_DURATIONS, Learner, Region, Regions, alike
from spsim.step.pipeline.steady import ROUNDS, Folded, Paced, Runs, folded
from spsim.step.pipeline.timeline import Piece, Timeline
from spsim.step.pipeline.waits import Covered, Layout, covered, layout_of, written

KEPT_GROUPINGS = 16
"""For each structure."""
KEPT_TOTALS = 64
KEPT_PACED = 4
PATIENCE = 24
"""Steps after which it pays to learn how long ranks wait for transfers."""


class Structure:
    """What waits for what with some number of micro-batches."""

    def __init__(self, graph: Graph, round_passes: int) -> None:
        """`round_passes`: of one rank, in a round of the steady state."""
        self.graph = graph
        self.round_passes = round_passes
        self.regions: Cache[Regions] = Cache(KEPT_GROUPINGS, lambda _: 1)
        """By number of rounds, and which durations are alike."""
        self.transfers: Cache[Regions] = Cache(KEPT_GROUPINGS, lambda _: 1)
        """The same, where it is known too how long ranks wait for transfers."""
        self.totals: Cache[tuple[Numbers, Numbers]] = Cache(KEPT_TOTALS, lambda _: 1)
        """Of steps: plans whose optimizers differ have the same passes."""
        self.layouts: Cache[Layout] = Cache(KEPT_GROUPINGS, lambda _: 1)
        """By the number of runs of each part that are written."""
        self.covered: Cache[Covered] = Cache(KEPT_PACED, lambda _: 1)
        """By the same, and durations: steps of more micro-batches leave more out."""
        self.paced: Cache[Paced] = Cache(KEPT_PACED, lambda _: 1)
        """By durations."""
        self.fullest: dict[tuple[int, ...], Fullest] = {}
        """By which ranks are alike."""
        self._alike: tuple[Numbers, Numbers] | None = None

    def alike(self, durations_ps: Numbers) -> tuple[Numbers, Numbers]:
        """As `regions.alike`, or as of the step before, if its durations were alike where these are."""
        known = self._alike
        if known is None or not np.array_equal(durations_ps[known[0]][known[1]], durations_ps):
            known = self._alike = alike(durations_ps)
        return known

    @lazy
    def whole(self) -> Part:
        nodes = np.arange(len(self.graph.own))
        return Part(self.graph, nodes[:1], nodes[1:])

    @lazy
    def folded(self) -> Folded | None:
        return folded(self.graph, self.round_passes)

    @lazy
    def steps(self) -> Steps:
        """Many at once, of two rounds of its steady state, if it has one."""
        return Steps(self.graph, self.whole, self.folded)


_KEPT: Cache[Structure] = Cache(1 << 28, lambda made: 16 * made.graph.tails.nbytes)


class Clock:
    """Times of a pipeline's steps. Its parameters are those of `orders`, and who exchanges messages how.

    A step of many micro-batches is evaluated as a short one, of which the rounds of the steady state come again. What
    is made for a schedule, and learnt from steps, is kept for the next clock of it.

    Raises:
        ValueError: the library has no such schedule.
        DeadlockError: ranks wait for what nobody sends, as with groups of fewer micro-batches than stages.
    """

    def __init__(
        self,
        schedule: Schedule,
        stages: int,
        chunks: int,
        micro_batches: int,
        group: int | None = None,
        exchange: Exchange = Exchange(),  # noqa: B008  # it is frozen
    ) -> None:
        self.schedule: Schedule = schedule
        self.stages = stages
        self.chunks = chunks
        self.micro_batches = micro_batches
        self.group = group or (torch_group(stages, micro_batches) if schedule == "interleaved_zero_bubble" else stages)
        self.exchange = exchange
        short = self._short()
        self._structure = self._made(short or micro_batches)
        self._folded = self._structure.folded if short else None
        self._rounds = ROUNDS + (micro_batches - short) // self._step if short else 1
        if short and self._folded is None:
            self._structure = self._made(micro_batches)

    @property
    def _graph(self) -> Graph:
        return self._structure.graph

    @property
    def structure(self) -> Structure:
        """The same object for all numbers of micro-batches whose rounds alone differ."""
        return self._structure

    @property
    def more_rounds(self) -> int:
        """Rounds of the steady state that its graph does not have."""
        return self._rounds - ROUNDS if self._folded else 0

    @property
    def classes(self) -> tuple[PassClass, ...]:
        """Passes that take one time."""
        return self._graph.classes.names

    @property
    def pass_classes(self) -> Classes:
        """The same, and that of each pass."""
        return self._graph.classes

    @property
    def lanes(self) -> tuple[Lane, ...]:
        """Where messages travel."""
        return self._graph.lanes

    def times(self, pass_ps: npt.ArrayLike, message_ps: npt.ArrayLike) -> Timeline:
        """A step whose passes take a time by class and whose messages take one by lane, whole picoseconds.

        Raises:
            ValueError: a time is negative.
            DeadlockError: ranks wait for each other.
        """
        durations_ps = _durations(pass_ps, message_ps, np.zeros(1, np.int64))
        places, groups = self._structure.alike(durations_ps)
        region = self._region(durations_ps[places], groups)
        if region is not None:
            finished_ps = region.finished @ durations_ps[places]
            return Timeline(self._graph, lambda: self._pieces(durations_ps), finished_ps, durations_ps, self._step)
        pieces, finished_ps = self._evaluated(durations_ps, groups)
        return Timeline(self._graph, lambda: pieces, finished_ps, durations_ps, self._step)

    def finished_ps(self, pass_ps: npt.ArrayLike, message_ps: npt.ArrayLike) -> Numbers:
        """When each rank is done, in a column for each of many steps, whose durations are columns too."""
        columns = np.shape(pass_ps)[1]
        durations_ps = _durations(pass_ps, message_ps, np.zeros((1, columns), np.int64))
        places, groups = alike(durations_ps)
        values_ps = durations_ps[places]
        found = np.empty((self.stages, columns), np.int64)
        left = np.arange(columns)
        while len(left):
            region = self._region(values_ps[:, left[0]], groups)
            if region is None:
                _, found[:, left[0]] = self._evaluated(durations_ps[:, left[0]], groups)
                left = left[1:]
            else:
                fits = region.holds(values_ps[:, left])
                found[:, left[fits]] = region.finished @ values_ps[:, left[fits]]
                left = left[~fits]
        return found

    def totals(self, pass_ps: Numbers, message_ps: Numbers) -> tuple[Numbers, Numbers]:
        """When each rank is done, and how long it waits in a step while a message of its own is on its way."""
        durations_ps = _durations(pass_ps, message_ps, np.zeros(1, np.int64))
        key = self._rounds, durations_ps.tobytes()
        return self._structure.totals.get(key, lambda: self._totals(durations_ps))

    def _totals(self, durations_ps: Numbers) -> tuple[Numbers, Numbers]:
        places, groups = self._structure.alike(durations_ps)
        values_ps = durations_ps[places]
        regions = self._structure.transfers.get((self._rounds, groups.tobytes()), lambda: Regions(PATIENCE))
        region = regions.of(values_ps) if len(values_ps) <= MOST_DURATIONS else None
        if region is not None and region.transfer is not None:
            return region.finished @ values_ps, region.transfer @ values_ps
        pieces, finished_ps = self._evaluated(durations_ps, groups)
        regions.learn = lambda: self._learn(durations_ps, groups, pieces, transfers=True)
        return finished_ps, self._transfers(pieces, durations_ps)

    def _transfers(self, pieces: Sequence[Piece], durations_ps: Numbers) -> Numbers:
        """How long each rank waits while a message of its own is on its way."""
        rounds = pieces[len(pieces) // 2].runs
        left_out, weights = written(rounds)
        every = np.array([1, *weights, 1] if len(pieces) > 1 else weights)
        counts = (1, len(weights), 1) if len(pieces) > 1 else (len(weights),)
        layout = self._structure.layouts.get(counts, lambda: self._layout(pieces, counts))

        def found() -> Covered:
            moments = [own.runs.of(np.arange(count)).ravel() for own, count in zip(pieces, counts, strict=True)]
            moments[-1] = moments[-1] - left_out * rounds.shift_ps
            return covered(layout, np.concatenate(moments), durations_ps)

        known = self._structure.covered.get((counts, durations_ps.tobytes()), found)
        return known.totals(every[layout.runs], self.stages)

    def _layout(self, pieces: Sequence[Piece], counts: Sequence[int]) -> Layout:
        own = [(piece.part, count) for piece, count in zip(pieces, counts, strict=True)]
        return layout_of(self._graph, own, own[-1][0].number[self._graph.finished])

    def fullest(self, alike: tuple[int, ...]) -> Fullest:
        """Passes of which one is the fullest, of ranks that are `alike`, by a number each; see `in_flight`."""
        known = self._structure.fullest
        if alike not in known:
            known[alike] = fullest(self._graph.score, np.array(alike))
        return known[alike]

    def passes_of(self, rank: int) -> Passes:
        """Of one rank in order, what comes again and again at least once."""
        return self._graph.score.passes[rank]

    def _region(self, values_ps: Numbers, groups: Numbers) -> Region | None:
        if len(values_ps) > MOST_DURATIONS:
            return None
        return self._structure.regions.get((self._rounds, groups.tobytes()), Regions).of(values_ps)

    def _evaluated(self, durations_ps: Numbers, groups: Numbers) -> tuple[tuple[Piece, ...], Numbers]:
        """The pieces of a step, and when each rank is done."""
        pieces = self._pieces(durations_ps)
        self._structure.regions.get((self._rounds, groups.tobytes()), Regions).learn = lambda: self._learn(
            durations_ps, groups, pieces
        )
        part, runs, _ = pieces[-1]
        return pieces, runs.of(runs.number - 1)[part.number[self._graph.finished]]

    def _learn(
        self, durations_ps: Numbers, groups: Numbers, pieces: Sequence[Piece], *, transfers: bool = False
    ) -> Region:
        learner = Learner(durations_ps, groups)
        if self._folded is None:
            found = learner.whole(pieces[0].part, pieces[0].runs, self._graph.finished)
        else:
            head, rounds, tail = (piece.runs for piece in pieces)
            found = learner.folded(self._folded, head, rounds, tail, self._graph.finished)
        return learner.with_transfers(found, self._graph) if transfers else found

    def _pieces(self, durations_ps: Numbers) -> tuple[Piece, ...]:
        folded = self._folded
        if folded is None:
            whole = self._structure.whole
            return (Piece(whole, Runs.once(whole.ends(np.zeros(1, np.int64), durations_ps)), 0),)
        paced = self._structure.paced.get(durations_ps.tobytes(), lambda: Paced(folded, durations_ps))
        head, rounds, tail = paced.ends(self._rounds)
        behind = (self._rounds - ROUNDS) * self._step
        return Piece(folded.head, head, 0), Piece(folded.round, rounds, 0), Piece(folded.tail, tail, behind)

    def _made(self, micro_batches: int) -> Structure:
        parameters = (self.schedule, self.stages, self.chunks, micro_batches, self.group, self.exchange)
        halves = self.schedule in ("interleaved_zero_bubble", "zbv")
        passes = (3 if halves else 2) * self.chunks * self._step
        return _KEPT.get(parameters, lambda: Structure(Graph(score(*parameters)), passes))

    @property
    def _step(self) -> int:
        """Micro-batches by which a round of the steady state moves on."""
        return 1 if self.schedule in V_SHAPED or (self.schedule == "1f1b" and self.chunks == 1) else self.group

    def _short(self) -> int | None:
        """Micro-batches of a step with little more than two rounds of the steady state; None if the whole step has
        hardly more, or no steady state.
        """
        if self.schedule in ("gpipe", "looped_bfs"):
            return None
        step, chunks = self._step, self.chunks
        if step == 1:
            found = 3 * self.stages + 4 if self.schedule in V_SHAPED else self.stages + 5
        else:
            # Warm-up is (v − 1) g + 2 (p − 1); the first passes of all chunks, and the last ones, take (v − 1) g each.
            passes = (2 * chunks + 3 * (chunks - 1)) * step + 2 * self.stages
            found = -(-passes // (chunks * step)) * step + self.micro_batches % step
        return found if 4 * found <= 3 * self.micro_batches else None


def _durations(pass_ps: npt.ArrayLike, message_ps: npt.ArrayLike, none: Numbers) -> Numbers:
    """By time of the graph. Longest ways are found and kept on the assumption that none is negative."""
    found = np.concatenate([np.asarray(pass_ps, np.int64), np.asarray(message_ps, np.int64), none])
    if found.min() < 0:
        raise ValueError(f"a pass or message of {found.min()} ps: times are 0 or more")
    return found
