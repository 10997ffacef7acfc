"""What the stages of a pipeline send each other, and what a rank does with it: post, wait, run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Literal, NamedTuple

from spsim.inputs.schedules import Schedule
from spsim.step.pipeline.orders import Action, place_of

MessageKind = Literal["activation", "gradient"]
Place = tuple[int, int]
"""(rank, chunk)."""
Lane = tuple[int, int, MessageKind]
"""(sender, receiver, what): messages of a lane travel one after the other."""


class Message(NamedTuple):
    """An activation to the next stage of the model, or a gradient to the one before."""

    kind: MessageKind
    micro_batch: int
    stage: int
    """Of the model, that sends it."""
    sender: int
    receiver: int
    """Ranks of the pipeline."""


class Run(NamedTuple):
    """The rank is busy with a pass."""

    action: Action


class Post(NamedTuple):
    """Messages of one grouped call, which the rank sends or receives; it goes on at once."""

    messages: tuple[Message, ...]


class Wait(NamedTuple):
    """The rank goes on when the messages have arrived."""

    messages: tuple[Message, ...]


Instruction = Run | Post | Wait


class DeadlockError(RuntimeError):
    """Ranks that wait for each other for ever."""

    def __init__(self, ranks: Sequence[int]) -> None:
        super().__init__(f"pipeline ranks {', '.join(map(str, ranks))} wait for messages that nobody will post")
        self.ranks = tuple(ranks)


class Stages:
    """The stages of a model on the ranks, and which pass sends what to which stage."""

    def __init__(self, schedule: Schedule, ranks: int, chunks: int) -> None:
        self.schedule = schedule
        self.ranks = ranks
        self.chunks = chunks
        self._sent: dict[tuple[str, int, int], tuple[MessageKind, int, int, int]] = {}
        self._needed: dict[tuple[str, int, int], tuple[MessageKind, int, int, int]] = {}
        places = [place_of(schedule, ranks, stage) for stage in range(ranks * chunks)]
        for stage, (lower, upper) in enumerate(pairwise(places)):
            if lower[0] != upper[0]:
                self._add("activation", stage, lower, upper)
                self._add("gradient", stage + 1, upper, lower)
        lanes = {(sender, receiver, kind) for kind, _, sender, receiver in self._sent.values()}
        self.lanes: tuple[Lane, ...] = tuple(sorted(lanes))
        self.lane_numbers = {lane: number for number, lane in enumerate(self.lanes)}

    def _add(self, kind: MessageKind, stage: int, sender: Place, receiver: Place) -> None:
        for action in "F" if kind == "activation" else "BI":
            self._sent[action, *sender] = self._needed[action, *receiver] = (kind, stage, sender[0], receiver[0])

    def senders(self) -> Iterable[tuple[tuple[str, int, int], tuple[MessageKind, int, int, int]]]:
        """(kind of pass, rank, chunk) with (what it sends, its stage, its rank, the rank that receives)."""
        return self._sent.items()

    def sent(self, rank: int, action: Action) -> Message | None:
        """By a pass, once it is done; nothing if the stage that reads it lies on the same rank."""
        return _message(self._sent.get((action.kind, rank, action.chunk)), action)

    def needed(self, rank: int, action: Action) -> Message | None:
        """By a pass, before it runs."""
        return _message(self._needed.get((action.kind, rank, action.chunk)), action)


def _message(found: tuple[MessageKind, int, int, int] | None, action: Action) -> Message | None:
    return Message(found[0], action.micro_batch, *found[1:]) if found else None


def posted(*messages: Message | None) -> tuple[Post, ...]:
    """One call, or none if there is nothing to send or receive."""
    found = tuple([message for message in messages if message is not None])
    return (Post(found),) if found else ()


def awaited(*messages: Message | None) -> tuple[Wait, ...]:
    """A wait for what there is of them."""
    found = tuple([message for message in messages if message is not None])
    return (Wait(found),) if found else ()


def exchanged(*messages: Message | None) -> tuple[Instruction, ...]:
    """One call that is waited for at once."""
    return (*posted(*messages), *awaited(*messages))
