"""A pipeline on the clock: made once for a schedule, asked for the times of a step with any durations."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from spsim.inputs.schedules import V_SHAPED, Schedule, torch_group
from spsim.lazy import Cache, lazy
from spsim.step.pipeline.exchange import Exchange, score
from spsim.step.pipeline.graph import Graph, Part, PassClass
from spsim.step.pipeline.messages import Lane
from spsim.step.pipeline.orders import Numbers
from spsim.step.pipeline.steady import Folded, Runs, folded
from spsim.step.pipeline.timeline import Piece, Timeline


class Structure:
    """What waits for what with some number of micro-batches."""

    def __init__(self, graph: Graph, round_passes: int) -> None:
        """`round_passes`: of one rank, in a round of the steady state."""
        self.graph = graph
        self.round_passes = round_passes

    @lazy
    def whole(self) -> Part:
        nodes = np.arange(len(self.graph.own))
        return Part(self.graph, nodes[:1], nodes[1:])

    @lazy
    def folded(self) -> Folded | None:
        return folded(self.graph, self.round_passes)


_KEPT: Cache[Structure] = Cache(1 << 28, lambda made: 16 * made.graph.tails.nbytes)


class Clock:
    """Times of a pipeline's steps. Its parameters are those of `orders`, and who exchanges messages how.

    A step of many micro-batches is evaluated as a short one, whose one round of the steady state comes again.
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
        self._rounds = 1 + (micro_batches - short) // self._step if short else 1
        if short and self._folded is None:
            self._structure = self._made(micro_batches)

    @property
    def classes(self) -> tuple[PassClass, ...]:
        """Passes that take one time."""
        return self._structure.graph.classes.names

    @property
    def lanes(self) -> tuple[Lane, ...]:
        """Where messages travel."""
        return self._structure.graph.lanes

    def times(self, pass_ps: npt.ArrayLike, message_ps: npt.ArrayLike) -> Timeline:
        """A step whose passes take a time by class and whose messages take one by lane, whole picoseconds."""
        durations_ps = np.concatenate([pass_ps, message_ps, [0]]).astype(np.int64)
        return Timeline(self._structure.graph, self._pieces(durations_ps), durations_ps, self._step)

    def _pieces(self, durations_ps: Numbers) -> tuple[Piece, ...]:
        folded = self._folded
        if folded is None:
            whole = self._structure.whole
            return (Piece(whole, Runs.once(whole.ends(np.zeros(1, np.int64), durations_ps)), 0),)
        head, rounds, tail = folded.ends(durations_ps, self._rounds)
        behind = (self._rounds - 1) * self._step
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
        step = self._step
        if step == 1:
            found = 3 * self.stages + 4 if self.schedule in V_SHAPED else self.stages + 5
        else:
            found = (3 + (self.stages - 1) * 2 // step + 2) * step + self.micro_batches % step
        return found if 4 * found <= 3 * self.micro_batches else None
