"""What the stages of a pipeline send each other, and what a rank does with it: post, wait, run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from spsim.inputs.schedules import Schedule
from spsim.step.pipeline.orders import Action, global_stage, place_of


class Message(NamedTuple):
    """An activation to the next stage of the model, or a gradient to the one before."""

    kind: Literal["activation", "gradient"]
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


@dataclass(frozen=True, slots=True)
class Stages:
    """Which stage of the model lies where."""

    schedule: Schedule
    ranks: int
    chunks: int

    def sent(self, rank: int, action: Action) -> Message | None:
        """By a pass, once it is done; nothing if the stage that reads it lies on the same rank."""
        stage = global_stage(self.schedule, self.ranks, rank, action.chunk)
        if action.kind == "F":
            return self._message("activation", stage, stage + 1, action.micro_batch)
        return None if action.kind == "W" else self._message("gradient", stage, stage - 1, action.micro_batch)

    def needed(self, rank: int, action: Action) -> Message | None:
        """By a pass, before it runs."""
        stage = global_stage(self.schedule, self.ranks, rank, action.chunk)
        if action.kind == "F":
            return self._message("activation", stage - 1, stage, action.micro_batch)
        return None if action.kind == "W" else self._message("gradient", stage + 1, stage, action.micro_batch)

    def _message(
        self, kind: Literal["activation", "gradient"], sender: int, receiver: int, micro_batch: int
    ) -> Message | None:
        if min(sender, receiver) < 0 or max(sender, receiver) >= self.ranks * self.chunks:
            return None
        ranks = [place_of(self.schedule, self.ranks, stage)[0] for stage in (sender, receiver)]
        return None if ranks[0] == ranks[1] else Message(kind, micro_batch, sender, *ranks)


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
