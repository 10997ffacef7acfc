"""The times of a step on a pipeline, with what comes again written once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import NamedTuple, TypeVar

import numpy as np

from spsim.lazy import lazy
from spsim.step.pipeline.graph import Graph, Part
from spsim.step.pipeline.messages import Message
from spsim.step.pipeline.orders import KINDS, Action, Numbers
from spsim.step.pipeline.steady import Runs
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
class Section:
    """A part of a step as it ran first, at its place in the step, and how often it runs."""

    passes: PassSpans
    messages: MessageSpans
    runs: int = 1
    micro_batches: int = 0
    """From one run to the next, as the time."""
    shift_ps: int = 0

    def run(self, number: int) -> Section:
        """One of its runs."""
        return self.later(number * self.micro_batches, number * self.shift_ps)

    def later(self, micro_batches: int, shift_ps: int) -> Section:
        """One run of it, elsewhere."""
        return Section(_later(self.passes, micro_batches, shift_ps), _later(self.messages, micro_batches, shift_ps))

    def written_out(self) -> Iterator[Section]:
        """Each of its runs."""
        return map(self.run, range(self.runs))


class Piece(NamedTuple):
    """A part of the step, in all its runs."""

    part: Part
    runs: Runs
    micro_batches: int
    """Of the first run, beyond those of the graph."""


class Timeline:
    """The times of a step."""

    def __init__(
        self,
        graph: Graph,
        pieces: Callable[[], Sequence[Piece]],
        finished_ps: Numbers,
        durations_ps: Numbers,
        step: int,
    ) -> None:
        """`graph` is of a step in which each piece runs once; from one run to the next are `step` micro-batches."""
        self.graph = graph
        self.finished_ps = finished_ps
        """By rank: after its last pass and wait."""
        self._pieces = pieces
        self._durations_ps = durations_ps
        self._step = step

    @lazy
    def sections(self) -> tuple[Section, ...]:
        """The step in a row of sections, of which one may run several times.

        A message belongs where the later side posts it; the other may have posted it in a section before.
        """
        found: list[Section] = []
        behind: list[Section] = []
        for piece in self._pieces():
            runs = piece.runs
            again, rest = divmod(runs.number - runs.first, runs.period) if runs.period else (0, 0)
            behind.append(self._section(piece, np.arange(runs.number - rest if again < 2 else runs.first)))
            if again > 1:
                first = self._section(piece, runs.first + np.arange(runs.period))
                found += [joined(behind), replace(first, runs=again, micro_batches=runs.period * self._step)]
                found[-1] = replace(found[-1], shift_ps=runs.shift_ps)
                behind = []
            behind.append(self._section(piece, runs.number - rest + np.arange(rest)))
        return *found, joined(behind)

    def written_out(self) -> Times:
        """All of the step, by name."""
        whole = joined([each for section in self.sections for each in section.written_out()])
        return Times(
            [
                PassSpan(rank, Action(KINDS[kind], chunk, micro_batch), start_ps, end_ps)
                for rank, kind, chunk, micro_batch, start_ps, end_ps in _rows(whole.passes)
            ],
            [
                MessageSpan(Message(kind, micro_batch, stage, sender, receiver), *times_ps)
                for lane, stage, micro_batch, *times_ps in _rows(whole.messages)
                for sender, receiver, kind in [self.graph.lanes[lane]]
            ],
            self.finished_ps.tolist(),
        )

    def _section(self, piece: Piece, runs: Numbers) -> Section:
        """Some runs of a piece."""
        nodes_ps = piece.runs.of(runs)
        later = piece.micro_batches + runs * self._step
        return Section(self._passes(piece.part, nodes_ps, later), self._messages(piece.part, nodes_ps, later))

    def _passes(self, part: Part, nodes_ps: Numbers, later: Numbers) -> PassSpans:
        graph = self.graph
        which = np.flatnonzero(part.number[graph.passes] >= len(part.inputs))
        nodes = graph.passes[which]
        ends_ps = nodes_ps[:, part.number[nodes]]
        starts_ps = ends_ps - self._durations_ps[graph.own[nodes]]
        kinds, chunks, micro_batches = (column[which] for column in graph.score.columns)
        ranks, kinds, chunks = (np.tile(column, len(later)) for column in (graph.ranks[nodes], kinds, chunks))
        numbers = (micro_batches + later[:, None]).ravel()
        return _sorted(PassSpans(ranks, kinds, chunks, numbers, starts_ps.ravel(), ends_ps.ravel()))

    def _messages(self, part: Part, nodes_ps: Numbers, later: Numbers) -> MessageSpans:
        messages = self.graph.messages
        placed = part.number[messages.posts]
        which = np.flatnonzero((placed >= 0).all(axis=0) & (placed >= len(part.inputs)).any(axis=0))
        stages, micro_batches = (column[which] for column in self.graph.score.messages)
        sent_ps, received_ps = (nodes_ps[:, side] for side in placed[:, which])
        durations_ps = self._durations_ps[len(self.graph.classes.names) + messages.lanes[which]]
        nodes = messages.nodes[which]
        direct_ps = np.maximum(sent_ps, received_ps) + durations_ps
        ends_ps = np.where(nodes > 0, nodes_ps[:, part.number[nodes]], direct_ps)
        lanes, stages = (np.tile(column, len(later)) for column in (messages.lanes[which], stages))
        numbers = (micro_batches + later[:, None]).ravel()
        sent_ps, received_ps, starts_ps, ends_ps = (
            column.ravel() for column in (sent_ps, received_ps, ends_ps - durations_ps, ends_ps)
        )
        return _sorted(MessageSpans(lanes, stages, numbers, sent_ps, received_ps, starts_ps, ends_ps))


def _later(spans: Spans, micro_batches: int, shift_ps: int) -> Spans:
    columns = {own.name: getattr(spans, own.name) for own in fields(spans)}
    for name in columns:
        if name == "micro_batches":
            columns[name] = columns[name] + micro_batches
        elif name.endswith("_ps"):
            columns[name] = columns[name] + shift_ps
    return type(spans)(**columns)


def joined(sections: Sequence[Section]) -> Section:
    """Sections that follow each other as one."""
    return Section(_behind([own.passes for own in sections]), _behind([own.messages for own in sections]))


def _behind(spans: Sequence[Spans]) -> Spans:
    kind = type(spans[0])
    return _sorted(kind(*(np.concatenate([getattr(own, column.name) for own in spans]) for column in fields(kind))))


def _sorted(spans: Spans) -> Spans:
    """By rank or lane, whichever comes first of their columns."""
    names = [column.name for column in fields(spans)]
    order = np.argsort(getattr(spans, names[0]), kind="stable")
    return type(spans)(*(getattr(spans, name)[order] for name in names))


def _rows(spans: PassSpans | MessageSpans) -> list[tuple[int, ...]]:
    return [*zip(*(getattr(spans, own.name).tolist() for own in fields(spans)), strict=True)]
