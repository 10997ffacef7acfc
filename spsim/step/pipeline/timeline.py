"""The times of a step on a pipeline, with what comes again written once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TypeVar

import numpy as np

from spsim.lazy import lazy
from spsim.step.pipeline.graph import Bools, Graph
from spsim.step.pipeline.messages import Message
from spsim.step.pipeline.orders import KINDS, Action, Numbers
from spsim.step.pipeline.tape import names_of_messages
from spsim.step.pipeline.timing import MessageSpan, PassSpan, Times


@dataclass(frozen=True)
class PassSpans:
    """Passes as they ran, those of a rank in order; an entry of each array for each."""

    ranks: Numbers
    kinds: Numbers
    """Places in `KINDS`."""
    chunks: Numbers
    micro_batches: Numbers
    starts_ps: Numbers
    ends_ps: Numbers


@dataclass(frozen=True)
class MessageSpans:
    """Messages as they travelled, those of a lane in order."""

    lanes: Numbers
    """Places in `Graph.lanes`."""
    stages: Numbers
    """Of the model, that send them."""
    micro_batches: Numbers
    sender_posted_ps: Numbers
    receiver_posted_ps: Numbers
    starts_ps: Numbers
    ends_ps: Numbers


Spans = TypeVar("Spans", PassSpans, MessageSpans)


@dataclass(frozen=True)
class Rounds:
    """What comes again: passes between two places of all ranks' rows, and messages that both sides post by then."""

    first: int
    """Place in each rank's row."""
    stop: int
    """Of the first pass behind."""
    runs: int
    """The first included."""
    micro_batches: int
    """From one run to the next, as the time."""
    shift_ps: int


@dataclass(frozen=True)
class Timeline:
    """A step with fewer micro-batches, of which `rounds` run several times; without rounds, the step itself."""

    graph: Graph
    durations_ps: Numbers
    """By time of the graph: of pass classes, lanes, and 0."""
    nodes: Callable[[], Numbers]
    """When each node of the graph is reached, in ps."""
    rounds: Rounds | None

    @lazy
    def nodes_ps(self) -> Numbers:
        return self.nodes()

    @lazy
    def finished_ps(self) -> Numbers:
        """By rank: after its last pass and wait, of the whole step."""
        return self.nodes_ps[self.graph.finished] + self._after[1]

    @property
    def _after(self) -> tuple[int, int]:
        """How much later what follows the rounds is in the whole step: micro-batches, picoseconds."""
        if self.rounds is None:
            return 0, 0
        return (self.rounds.runs - 1) * self.rounds.micro_batches, (self.rounds.runs - 1) * self.rounds.shift_ps

    @lazy
    def passes(self) -> PassSpans:
        """Of the shorter step."""
        own = self.graph.score.passes
        ends_ps = self.nodes_ps[self.graph.passes]
        return PassSpans(
            np.repeat(np.arange(len(own)), [len(passes.kinds) for passes in own]),
            *(
                np.concatenate([getattr(passes, name) for passes in own])
                for name in ("kinds", "chunks", "micro_batches")
            ),
            ends_ps - self.durations_ps[self.graph.own[self.graph.passes]],
            ends_ps,
        )

    @lazy
    def messages(self) -> MessageSpans:
        """Of the shorter step."""
        messages, nodes_ps = self.graph.messages, self.nodes_ps
        posted_ps = nodes_ps[messages.posts]
        durations_ps = self.durations_ps[len(self.graph.classes.names) + messages.lanes]
        ends_ps = np.where(messages.nodes > 0, nodes_ps[messages.nodes], posted_ps.max(axis=0) + durations_ps)
        stages, micro_batches = names_of_messages(self.graph.score)
        return MessageSpans(messages.lanes, stages, micro_batches, *posted_ps, ends_ps - durations_ps, ends_ps)

    def part(self, number: int) -> tuple[PassSpans, MessageSpans]:
        """0: before the rounds; 1: their first run; 2: after them, at its place in the whole step.

        Without rounds all of the step comes before them.
        """
        later = self._after if number == 2 else (0, 0)
        passes, messages = (places == number for places in self._parts())
        return _picked(self.passes, passes, *later), _picked(self.messages, messages, *later)

    def written_out(self) -> Times:
        """All of the step, by name."""
        passes, messages = self.all_passes(), self.all_messages()
        return Times(
            [
                PassSpan(rank, Action(KINDS[kind], chunk, micro_batch), start_ps, end_ps)  # type: ignore[arg-type]
                for rank, kind, chunk, micro_batch, start_ps, end_ps in _rows(passes)
            ],
            [
                MessageSpan(Message(kind, micro_batch, stage, sender, receiver), *times_ps)
                for lane, stage, micro_batch, *times_ps in _rows(messages)
                for sender, receiver, kind in [self.graph.lanes[lane]]
            ],
            self.finished_ps.tolist(),
        )

    def all_passes(self) -> PassSpans:
        """Of the whole step."""
        return self._repeated(self.passes, self._parts()[0], self.passes.ranks)

    def all_messages(self) -> MessageSpans:
        return self._repeated(self.messages, self._parts()[1], self.messages.lanes)

    def _parts(self) -> tuple[Numbers, Numbers]:
        """Of each pass and message, whether it is before the rounds (0), in them (1) or after them (2)."""
        positions = self.graph.positions
        bounds = [self.rounds.first, self.rounds.stop] if self.rounds else [len(positions)]
        posted = positions[self.graph.messages.posts].max(axis=0)
        return tuple(np.searchsorted(bounds, own, side="right") for own in (positions[self.graph.passes], posted))  # type: ignore[return-value]

    def _repeated(self, spans: Spans, parts: Numbers, groups: Numbers) -> Spans:
        if self.rounds is None:
            return spans
        first, again, rest = (np.flatnonzero(parts == part) for part in range(3))
        runs = self.rounds.runs
        places = np.concatenate([first, np.tile(again, runs), rest])
        later = np.concatenate(
            [np.zeros(len(first), np.int64), np.repeat(np.arange(runs), len(again)), np.full(len(rest), runs - 1)]
        )
        order = np.argsort(groups[places], kind="stable")
        later = later[order]
        return _picked(spans, places[order], later * self.rounds.micro_batches, later * self.rounds.shift_ps)


def _picked(spans: Spans, which: Numbers | Bools, micro_batches: int | Numbers, shift_ps: int | Numbers) -> Spans:
    """Some of them, later by so much."""
    columns = {own.name: getattr(spans, own.name)[which] for own in fields(spans)}
    for name in columns:
        if name == "micro_batches":
            columns[name] = columns[name] + micro_batches
        elif name.endswith("_ps"):
            columns[name] = columns[name] + shift_ps
    return type(spans)(**columns)


def _rows(spans: PassSpans | MessageSpans) -> list[tuple[int, ...]]:
    return [*zip(*(getattr(spans, own.name).tolist() for own in fields(spans)), strict=True)]
