"""A pipeline on the clock: made once for a schedule, asked for the times of a step with any durations."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from spsim.inputs.schedules import V_SHAPED, Schedule, torch_group
from spsim.lazy import Cache, lazy
from spsim.step.pipeline.exchange import Exchange, score
from spsim.step.pipeline.graph import Graph, PassClass
from spsim.step.pipeline.messages import Lane
from spsim.step.pipeline.orders import Numbers
from spsim.step.pipeline.steady import Steady, steady_state
from spsim.step.pipeline.timeline import Rounds, Timeline


@dataclass(frozen=True)
class Structure:
    """What waits for what with some number of micro-batches."""

    graph: Graph
    round_passes: int
    """Of one rank, in a round of the steady state."""

    @lazy
    def steady(self) -> Steady | None:
        return steady_state(self.graph, self.round_passes)


_KEPT: Cache[Structure] = Cache(1 << 28, lambda made: 16 * made.graph.tails.nbytes)
FEW_ROUNDS = 4
"""Of the steady state, within which it mostly repeats itself."""


class Clock:
    """Times of a pipeline's steps. Its parameters are those of `orders`, and who exchanges messages how.

    The steady state repeats the state of an earlier round, sooner or later; a step of many micro-batches is a short one
    of which the rounds from one to the other come again.
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
        self.group = group or (
            torch_group(stages, micro_batches) if schedule == "interleaved_zero_bubble" else min(stages, micro_batches)
        )
        self.exchange = exchange

    @property
    def classes(self) -> tuple[PassClass, ...]:
        """Passes that take one time."""
        return self._structure(self._short(0) or self.micro_batches).graph.classes.names

    @property
    def lanes(self) -> tuple[Lane, ...]:
        """Where messages travel."""
        return self._structure(self._short(0) or self.micro_batches).graph.lanes

    def times(self, pass_ps: npt.ArrayLike, message_ps: npt.ArrayLike) -> Timeline:
        """A step whose passes take a time by class and whose messages take one by lane, whole picoseconds."""
        durations_ps = np.concatenate([pass_ps, message_ps, [0]]).astype(np.int64)
        rounds = 0
        while (micro_batches := self._short(rounds)) is not None:
            structure = self._structure(micro_batches)
            nodes_ps = structure.graph.ends(durations_ps)
            found = self._rounds(structure, nodes_ps, micro_batches)
            if isinstance(found, Rounds):
                return Timeline(structure.graph, durations_ps, lambda nodes_ps=nodes_ps: nodes_ps, found)
            rounds += found or 2 * (rounds + FEW_ROUNDS)
        graph = self._structure(self.micro_batches).graph
        return Timeline(graph, durations_ps, lambda: graph.ends(durations_ps), None)

    def _structure(self, micro_batches: int) -> Structure:
        parameters = (self.schedule, self.stages, self.chunks, micro_batches, self.group, self.exchange)
        return _KEPT.get(parameters, lambda: self._made(micro_batches))

    def _made(self, micro_batches: int) -> Structure:
        graph = Graph(score(self.schedule, self.stages, self.chunks, micro_batches, self.group, self.exchange))
        halves = self.schedule in ("interleaved_zero_bubble", "zbv")
        return Structure(graph, (3 if halves else 2) * self.chunks * self._round_micro_batches)

    @property
    def _round_micro_batches(self) -> int:
        """How many a round of the steady state moves on."""
        return 1 if self.schedule in V_SHAPED or (self.schedule == "1f1b" and self.chunks == 1) else self.group

    def _short(self, rounds: int) -> int | None:
        """Micro-batches of a step with some rounds more than a few of the steady state; None if the whole step has not
        many more, or no steady state.
        """
        step = self._round_micro_batches
        if self.schedule in ("gpipe", "looped_bfs"):
            return None
        if step == 1:
            before = 3 * self.stages if self.schedule in V_SHAPED else self.stages + 2
        else:
            before = 4 * step + self.micro_batches % step
        found = before + (FEW_ROUNDS + rounds) * step
        return found if 3 * found <= 2 * self.micro_batches else None

    def _rounds(self, structure: Structure, nodes_ps: Numbers, micro_batches: int) -> Rounds | int | None:
        """What of a step with fewer micro-batches comes again; or how many rounds it lacks to end as the whole step
        does; None if nothing comes again yet.
        """
        steady = structure.steady
        first = steady.comes_again(nodes_ps) if steady else None
        if steady is None or first is None:
            return None
        last = len(steady.borders) - 1
        period = last - first
        step = self._round_micro_batches
        runs, lacking = divmod((self.micro_batches - micro_batches) // step, period)
        if lacking:
            return lacking
        shift_ps = nodes_ps[steady.borders[last, 0]] - nodes_ps[steady.borders[first, 0]]
        return Rounds(steady.cut(first), steady.cut(last), 1 + runs, period * step, int(shift_ps))
