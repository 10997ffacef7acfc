"""Exchanges of Megatron-Core's two schedules (`megatron.core.pipeline_parallel.schedules`, 0.16.1).

Calls are waited for one by one or as a batch; what a rank waits for and when is the same.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence

from spsim.step.pipeline.messages import Instruction, Message, Run, Stages, awaited, exchanged, posted
from spsim.step.pipeline.orders import Action


def one_f_one_b(model: Stages, rank: int, row: Sequence[Action], warm_up: int) -> Iterator[Instruction]:
    """Without interleaving, every exchange is waited for at once.

    In the steady state one exchange with the next rank follows F, one with the previous rank B; in warm-up and
    cool-down a pass is sent before the next is received.
    """
    steady = 2 * warm_up < len(row)
    yield from exchanged(model.needed(rank, row[0]))
    for action, following in zip(row, [*row[1:], None], strict=True):
        yield Run(action)
        sent = model.sent(rank, action)
        needed = model.needed(rank, following) if following else None
        if steady and following and action.kind != following.kind:
            yield from exchanged(sent, needed)
        else:
            yield from exchanged(sent)
            yield from exchanged(needed)


def interleaved(
    model: Stages, rank: int, row: Sequence[Action], warm_up: int, *, overlap: bool, flush: bool, awaits: bool
) -> Iterator[Instruction]:
    """With interleaving: each exchange is waited for at once, or runs behind the pass that follows.

    `awaits`: an activation that is sent behind a pass is waited for before it.
    """
    passes = _Interleaved(model, rank, row, warm_up)
    if not overlap:
        return passes.exposed()
    return passes.overlapped(flush, awaits)


class _Underway:
    """Of one kind of message, what a rank has posted and not waited for."""

    def __init__(self, awaits: bool = False) -> None:
        self._awaits = awaits
        self._received: deque[Message] = deque()
        self._sent: Message | None = None

    def exchange(self, sent: Message | None, received: Message | None) -> Iterator[Instruction]:
        """Both are posted, and the send before is waited for."""
        yield from posted(sent, received)
        yield from awaited(self._sent)
        self._sent = sent
        if self._awaits:
            yield from self.last_sent()
        self._received.extend([received] if received else [])

    def receive(self, message: Message | None) -> Iterator[Instruction]:
        """Posted by itself."""
        yield from posted(message)
        self._received.extend([message] if message else [])

    def next_received(self) -> Iterator[Instruction]:
        """The oldest that is received, if one is."""
        if self._received:
            yield from awaited(self._received.popleft())

    def last_sent(self) -> Iterator[Instruction]:
        yield from awaited(self._sent)
        self._sent = None


class _Interleaved:
    """The passes of one rank, forward and backward apart, with what it sends and receives after each.

    Passes are numbered in their order; "to come" is what the next pass of the same kind needs, but on the rank where a
    chunk's passes begin, what the rank where they end has just made.
    """

    def __init__(self, model: Stages, rank: int, row: Sequence[Action], warm_up: int) -> None:
        self.model = model
        self.rank = rank
        self.forwards = [action for action in row if action.kind == "F"]
        self.backwards = [action for action in row if action.kind == "B"]
        self.warm_up = warm_up
        self.passes = len(self.forwards)
        self.steady = self.passes - warm_up
        self.first = rank == 0
        self.last = rank == model.ranks - 1

    def exposed(self) -> Iterator[Instruction]:
        """One exchange after each pass of warm-up and cool-down, and after each pair of passes between."""
        yield from self._exposed_warm_up(with_gradient=True)
        for pair in range(self.steady):
            forward = self.warm_up + pair
            yield Run(self.forwards[forward])
            yield Run(self.backwards[pair])
            yield from exchanged(
                *(self._sent(self.forwards[forward]), self._sent(self.backwards[pair])),
                *(self._activation_to_come(forward), self._gradient_to_come(pair)),
            )
        yield from self._exposed_cool_down()

    def overlapped(self, flush: bool, awaits: bool) -> Iterator[Instruction]:
        """In the steady state exchanges run behind the next pass, with `flush` in warm-up and cool-down too.

        A receive is waited for just before its use, a send after the next one of its kind is posted.
        """
        activations, gradients = _Underway(awaits), _Underway()
        yield from self._flushed_warm_up(activations) if flush else self._exposed_warm_up(with_gradient=False)
        if self.steady:
            yield from gradients.receive(self._needed(self.backwards[0]))
        for pair in range(self.steady):
            forward = self.warm_up + pair
            if self._needed(self.forwards[forward]):
                yield from activations.next_received()
            yield Run(self.forwards[forward])
            yield from activations.exchange(self._sent(self.forwards[forward]), self._activation_to_come(forward))
            if self._needed(self.backwards[pair]):
                yield from gradients.next_received()
            yield Run(self.backwards[pair])
            yield from gradients.exchange(self._sent(self.backwards[pair]), self._gradient_to_come(pair))
        yield from self._flushed_cool_down(gradients) if flush else self._exposed_cool_down(gradients)
        yield from gradients.last_sent()

    def _exposed_warm_up(self, with_gradient: bool) -> Iterator[Instruction]:
        yield from exchanged(self._needed(self.forwards[0]))
        for forward, action in enumerate(self.forwards[: self.warm_up]):
            yield Run(action)
            joined = with_gradient and self.steady and forward == self.warm_up - 1
            gradient = self._needed(self.backwards[0]) if joined else None
            yield from exchanged(self._sent(action), self._activation_to_come(forward), gradient)

    def _exposed_cool_down(self, gradients: _Underway | None = None) -> Iterator[Instruction]:
        if not self.steady:
            yield from exchanged(self._needed(self.backwards[0]))
        for backward in range(self.steady, self.passes):
            action = self.backwards[backward]
            if gradients and backward and self._needed(action):
                yield from gradients.next_received()
            yield Run(action)
            yield from exchanged(self._sent(action), self._gradient_to_come(backward))

    def _flushed_warm_up(self, activations: _Underway) -> Iterator[Instruction]:
        """What comes next is received behind the pass, but on the first rank together with the send."""
        yield from exchanged(self._needed(self.forwards[0]))
        for forward, action in enumerate(self.forwards[: self.warm_up]):
            if forward and self._needed(action):
                yield from activations.next_received()
            to_come = self._activation_to_come(forward)
            if not self.first:
                yield from activations.receive(to_come)
            yield Run(action)
            yield from activations.exchange(self._sent(action), to_come if self.first else None)

    def _flushed_cool_down(self, gradients: _Underway) -> Iterator[Instruction]:
        if not self.steady:
            yield from exchanged(self._needed(self.backwards[0]))
        for backward in range(self.steady, self.passes):
            action = self.backwards[backward]
            if backward and self._needed(action):
                yield from gradients.next_received()
            to_come = self._gradient_to_come(backward)
            if not self.last:
                yield from gradients.receive(to_come)
            yield Run(action)
            yield from gradients.exchange(self._sent(action), to_come if self.last else None)

    def _sent(self, action: Action) -> Message | None:
        return self.model.sent(self.rank, action)

    def _needed(self, action: Action) -> Message | None:
        return self.model.needed(self.rank, action)

    def _activation_to_come(self, forward: int) -> Message | None:
        if forward == self.passes - 1:
            return None
        return (
            self._needed_after(self.forwards, forward, chunks=1) if self.first else self._next(self.forwards, forward)
        )

    def _gradient_to_come(self, backward: int) -> Message | None:
        if backward == self.passes - 1:
            return None
        return (
            self._needed_after(self.backwards, backward, chunks=-1)
            if self.last
            else self._next(self.backwards, backward)
        )

    def _next(self, actions: Sequence[Action], place: int) -> Message | None:
        return self._needed(actions[place + 1])

    def _needed_after(self, actions: Sequence[Action], place: int, chunks: int) -> Message | None:
        """By the chunk after the one that the rank at the other end runs, p − 1 passes behind."""
        behind = place - (self.model.ranks - 1)
        if behind < 0:
            return None
        made = actions[behind]
        chunk = made.chunk + chunks
        return self._needed(made._replace(chunk=chunk)) if 0 <= chunk < self.model.chunks else None
