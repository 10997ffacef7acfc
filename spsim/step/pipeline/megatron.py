"""Exchanges of Megatron-Core's two schedules (`megatron.core.pipeline_parallel.schedules`, 0.16.1).

Calls are waited for one by one or as a batch; what a rank waits for and when is the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from spsim.step.pipeline.messages import MessageKind, Stages
from spsim.step.pipeline.orders import Numbers, Passes
from spsim.step.pipeline.tape import POST, RUN, WAIT, Tape

Mask = npt.NDArray[np.bool_]


class _Flow(NamedTuple):
    """Messages of one lane on one side of it: at which of the rank's forward (or backward) passes there is one, and
    which of the lane it is.
    """

    lane: int
    there: Mask
    number: Numbers

    def at(self, places: slice) -> _Flow:
        return _Flow(self.lane, self.there[places], self.number[places])

    def only(self, mask: Mask) -> _Flow:
        return self._replace(there=self.there & mask)

    def before(self) -> _Flow:
        """That of the pass before."""
        return _Flow(self.lane, np.append(False, self.there[:-1]), np.append(0, self.number[:-1]))


_Column = tuple[int, *tuple[_Flow, ...]]
"""RUN, POST or WAIT, with the messages of one call or wait."""
RUNS = (RUN,)


class _Writer:
    """A tape in blocks of rows that are alike but for messages that are not there."""

    def __init__(self) -> None:
        self._blocks: list[npt.NDArray[np.int64]] = []
        self._calls = 0

    def rows(self, number: int, *columns: _Column) -> None:
        """Each row is what the columns say: passes, or one call with all its messages, or a wait for them."""
        alone = _Flow(0, np.ones(number, np.bool_), np.zeros(number, np.int64))
        kinds = [
            (operation, flow.lane, call)
            for call, (operation, *flows) in enumerate(columns)
            for flow in flows or [alone]
        ]
        flows = [flow for _, *own in columns for flow in own or [alone]]
        places = np.flatnonzero(np.array([flow.there for flow in flows]).T)
        row, column = np.divmod(places, len(flows))
        block = np.empty((4, len(places)), np.int64)
        block[[0, 1, 3]] = np.array(kinds).T[:, column]
        block[2] = np.array([flow.number for flow in flows]).T.ravel()[places]
        block[3] += self._calls + row * len(columns)
        self._calls += number * len(columns)
        self._blocks.append(block)

    def exchange(self, *flows: _Flow) -> None:
        """One call that is waited for at once."""
        self.rows(len(flows[0].there), (POST, *flows), (WAIT, *flows))

    def tape(self) -> Tape:
        return Tape(*np.concatenate(self._blocks, axis=1))


def one_f_one_b(stages: Stages, passes: Sequence[Passes], warm_ups: Sequence[int]) -> Iterator[Tape]:
    """Without interleaving, every exchange is waited for at once: all ranks together, by row.

    In the steady state, one exchange with the next rank follows F and one with the previous rank B; in warm-up and
    cool-down, a pass is sent before what the next one needs is received.
    """
    kinds, numbers = np.array([(own.kinds, own.micro_batches) for own in passes]).transpose(1, 0, 2)
    lanes = [_lanes(stages, rank) for rank in range(stages.ranks)]
    sends, needs = (
        np.array([(own["activation"][side], own["gradient"][side]) for own in lanes])[
            np.arange(len(lanes))[:, None], kinds
        ]
        for side in range(2)
    )
    before = np.full((len(passes), 1), -1)
    """What is sent before the first pass, needed and numbered after the last one."""
    sends, needs = np.append(before, sends, axis=1), np.append(needs, before, axis=1)
    sent, needed = np.append(before, numbers, axis=1), np.append(numbers, before, axis=1)
    kinds = np.append(before, kinds, axis=1)
    joined = (np.diff(kinds, append=-1, axis=1) != 0) & (2 * np.array(warm_ups)[:, None] < numbers.shape[1])
    joined[:, 0] = False
    with_sent, alone = np.where(joined, needs, -1), np.where(joined, -1, needs)
    columns = [
        (RUN, 0, np.minimum(kinds, 0), sent),
        *((POST, 1, sends, sent), (POST, 1, with_sent, needed), (WAIT, 2, sends, sent), (WAIT, 2, with_sent, needed)),
        *((POST, 3, alone, needed), (WAIT, 4, alone, needed)),
    ]
    operations, calls = (np.array([column[place] for column in columns]) for place in range(2))
    lane, message = (np.stack([column[place] for column in columns], axis=-1) for place in (2, 3))
    for own, number in zip(lane, message, strict=True):
        row, column = np.nonzero(own >= 0)
        yield Tape(operations[column], own[row, column], number[row, column], row * len(columns) + calls[column])


def _lanes(stages: Stages, rank: int) -> dict[MessageKind, tuple[int, int]]:
    """Numbers of the lanes on which the rank sends and receives, −1 where it has none."""
    number = stages.lane_numbers
    after, before = (rank + 1) % stages.ranks, (rank - 1) % stages.ranks
    return {
        "activation": (number.get((rank, after, "activation"), -1), number.get((before, rank, "activation"), -1)),
        "gradient": (number.get((rank, before, "gradient"), -1), number.get((after, rank, "gradient"), -1)),
    }


@dataclass(frozen=True)
class Overlap:
    """Options of interleaved exchanges; none are hidden by default."""

    steady: bool = False
    """Behind the pass that follows."""
    flush: bool = False
    """In warm-up and cool-down too."""
    awaits: bool = False
    """An activation that is sent is waited for before the pass that should hide it."""


def interleaved(stages: Stages, rank: int, chunks: Numbers, warm_up: int, overlap: Overlap) -> Tape:
    """With interleaving: each exchange is waited for at once, or runs behind the pass that follows.

    `chunks`: of the forward passes.
    """
    passes = _Interleaved(stages, rank, chunks, warm_up)
    return passes.overlapped(overlap) if overlap.steady else passes.exposed()


class _Interleaved:
    """The passes of one rank, forward and backward apart, with what it sends and receives after each."""

    def __init__(self, stages: Stages, rank: int, chunks: Numbers, warm_up: int) -> None:
        self.passes = len(chunks)
        self.warm_up = warm_up
        self.steady = self.passes - warm_up
        self.first, self.last = rank == 0, rank == stages.ranks - 1
        self.up, self.forward = slice(warm_up), slice(warm_up, None)
        self.backward, self.down = slice(self.steady), slice(self.steady, None)
        lanes = _lanes(stages, rank)
        end = chunks == stages.chunks - 1
        start = chunks == 0
        self.needs_activation = ~start | (not self.first)
        self.needs_gradient = ~start | (not self.last)
        """Backward passes begin with the last chunk, where forward ones begin with the first."""
        self.sent = _flow(lanes["activation"][0], ~end | (not self.last))
        self.returned = _flow(lanes["gradient"][0], ~end | (not self.first))
        self.first_activation = _flow(lanes["activation"][1], self.needs_activation[:1])
        self.first_gradient = _flow(lanes["gradient"][1], self.needs_gradient[:1])
        self.activation = self._to_come(self.first_activation, ~end, self.first, stages.ranks)
        self.gradient = self._to_come(self.first_gradient, ~end, self.last, stages.ranks)

    def _to_come(self, first: _Flow, goes_on: Mask, leading: bool, ranks: int) -> _Flow:
        """What a rank receives after each pass: what the next one needs, but on the rank where the passes of a chunk
        begin, what the rank where they end has just made, p − 1 passes behind.
        """
        there = np.ones(self.passes, np.bool_)
        if leading:
            behind = min(ranks - 1, self.passes)
            there = np.concatenate([np.zeros(behind, np.bool_), goes_on[: self.passes - behind]])
        there[-1] = False
        return _flow(first.lane, there, int(first.there.sum()))

    def exposed(self) -> Tape:
        """One exchange after each pass of warm-up and cool-down, and after each pair of passes between."""
        writer = _Writer()
        joined = _Flow(
            self.first_gradient.lane,
            (np.arange(self.warm_up) == self.warm_up - 1) & bool(self.steady) & self.first_gradient.there,
            np.zeros(self.warm_up, np.int64),
        )
        self._exposed_warm_up(writer, joined)
        both = (
            *(self.sent.at(self.forward), self.returned.at(self.backward)),
            *(self.activation.at(self.forward), self.gradient.at(self.backward)),
        )
        writer.rows(self.steady, RUNS, RUNS, (POST, *both), (WAIT, *both))
        self._exposed_cool_down(writer)
        return writer.tape()

    def overlapped(self, overlap: Overlap) -> Tape:
        """In the steady state exchanges run behind the next pass, with `flush` in warm-up and cool-down too.

        A receive is waited for just before its use, a send after the next one of its kind is posted.
        """
        writer = _Writer()
        waits = self._waits_for_activations(overlap.flush)
        waits_for_sent = self.sent if overlap.awaits else self._sent_before(overlap.flush)
        if overlap.flush:
            self._flushed_warm_up(writer, waits, waits_for_sent)
        else:
            self._exposed_warm_up(writer)
        gradient_waits = self._waits_for_gradients(overlap.flush)
        if self.steady:
            writer.rows(1, (POST, self.first_gradient))
        returned_before = self.returned.before()
        ahead, behind = self.forward, self.backward
        writer.rows(
            self.steady,
            *((WAIT, waits.at(ahead)), RUNS, (POST, self.sent.at(ahead), self.activation.at(ahead))),
            *((WAIT, waits_for_sent.at(ahead)), (WAIT, gradient_waits.at(behind)), RUNS),
            *((POST, self.returned.at(behind), self.gradient.at(behind)), (WAIT, returned_before.at(behind))),
        )
        if overlap.flush:
            self._flushed_cool_down(writer, gradient_waits)
        else:
            self._exposed_cool_down(writer, gradient_waits)
        last = self.passes if overlap.flush else self.steady
        if last:
            writer.rows(1, (WAIT, self.returned.at(slice(last - 1, last))))
        return writer.tape()

    def _exposed_warm_up(self, writer: _Writer, *more: _Flow) -> None:
        writer.exchange(self.first_activation)
        exchange = (self.sent.at(self.up), self.activation.at(self.up), *more)
        writer.rows(self.warm_up, RUNS, (POST, *exchange), (WAIT, *exchange))

    def _exposed_cool_down(self, writer: _Writer, *waits: _Flow) -> None:
        if not self.steady:
            writer.exchange(self.first_gradient)
        exchange = (self.returned.at(self.down), self.gradient.at(self.down))
        before = [(WAIT, flow.at(self.down)) for flow in waits]
        writer.rows(self.warm_up, *before, RUNS, (POST, *exchange), (WAIT, *exchange))

    def _flushed_warm_up(self, writer: _Writer, waits: _Flow, waits_for_sent: _Flow) -> None:
        """What comes next is received behind the pass, but on the first rank together with the send."""
        writer.exchange(self.first_activation)
        sent, to_come = self.sent.at(self.up), self.activation.at(self.up)
        calls: list[_Column] = [RUNS, (POST, sent, to_come)] if self.first else [(POST, to_come), RUNS, (POST, sent)]
        writer.rows(self.warm_up, (WAIT, waits.at(self.up)), *calls, (WAIT, waits_for_sent.at(self.up)))

    def _flushed_cool_down(self, writer: _Writer, waits: _Flow) -> None:
        if not self.steady:
            writer.exchange(self.first_gradient)
        sent, to_come = self.returned.at(self.down), self.gradient.at(self.down)
        calls: list[_Column] = [RUNS, (POST, sent, to_come)] if self.last else [(POST, to_come), RUNS, (POST, sent)]
        writer.rows(self.warm_up, (WAIT, waits.at(self.down)), *calls, (WAIT, self.returned.before().at(self.down)))

    def _sent_before(self, flush: bool) -> _Flow:
        """What was sent the pass before and is not waited for yet."""
        before = self.sent.before()
        return before if flush else before.only(np.arange(self.passes) > self.warm_up)

    def _waits_for_activations(self, flush: bool) -> _Flow:
        """Before each forward pass that needs one: for the oldest that is under way."""
        place = np.arange(self.passes)
        hidden = place >= (0 if flush else self.warm_up)
        needs = self.needs_activation & hidden & ((place > 0) | (not flush))
        return _oldest(self.activation.only(hidden), needs, waiting=0)

    def _waits_for_gradients(self, flush: bool) -> _Flow:
        place = np.arange(self.passes)
        hidden = place < (self.passes if flush else self.steady)
        needs = self.needs_gradient & ((place > 0) | bool(self.steady))
        posted = int(self.first_gradient.there.sum()) if self.steady else 0
        return _oldest(self.gradient.only(hidden), needs, waiting=posted)


def _flow(lane: int, there: Mask, first: int = 0) -> _Flow:
    """The lane's messages in order, the first of them with a number."""
    return _Flow(lane, there, first + np.cumsum(there) - 1)


def _oldest(posted: _Flow, needs: Mask, waiting: int) -> _Flow:
    """Before each pass that needs a message and finds one under way, the oldest; `posted` are those after each pass,
    `waiting` how many there are at first. A need that finds none is lost, and nothing comes later for it.
    """
    needed = np.cumsum(needs)
    available = waiting + np.append(0, np.cumsum(posted.there)[:-1])
    found: Numbers = needed - np.maximum(0, np.maximum.accumulate(needed - available))
    taken: Mask = np.diff(found, prepend=0).astype(np.bool_)
    first = posted.number[np.argmax(posted.there)] - waiting if posted.there.any() else 0
    return _Flow(posted.lane, taken, first + found - 1)
