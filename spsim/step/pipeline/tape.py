"""What a rank of a pipeline does, as arrays: the quick way to say it where there are many ranks and micro-batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from spsim.lazy import lazy
from spsim.step.pipeline.messages import Instruction, Lane, Message, Post, Run, Stages, Wait
from spsim.step.pipeline.orders import KINDS, Numbers, Passes, Row

RUN, POST, WAIT = range(3)
MessagesOfLanes = dict[Lane, list[Message]]
"""In the order in which they are sent."""


@dataclass(frozen=True)
class Tape:
    """The instructions of one rank: an entry for each pass, and for each message that is posted or waited for."""

    operations: Numbers
    """RUN, POST or WAIT."""
    lanes: Numbers
    """Number of the message's lane."""
    messages: Numbers
    """How manieth message of its lane."""
    calls: Numbers
    """Messages that one call posts follow each other and have one number."""


@dataclass(frozen=True)
class Score:
    """What all ranks of a pipeline do."""

    stages: Stages
    passes: Sequence[Passes]
    tapes: Sequence[Tape]

    @lazy
    def columns(self) -> tuple[Numbers, Numbers, Numbers]:
        """Kind, chunk and micro-batch of each pass, those of a rank in order."""
        kinds, chunks, micro_batches = (
            np.concatenate([getattr(own, name) for own in self.passes]) for name in ("kinds", "chunks", "micro_batches")
        )
        return kinds, chunks, micro_batches

    @lazy
    def ranks(self) -> Numbers:
        """Of each pass."""
        return np.repeat(np.arange(self.stages.ranks), [len(own.kinds) for own in self.passes])

    @lazy
    def messages(self) -> tuple[Numbers, Numbers]:
        """Stage of the model that sends it and micro-batch of each message, those of a lane in order."""
        stages = self.stages
        lane_of, stage_of = np.full((2, stages.ranks, stages.chunks, len(KINDS)), -1)
        for (kind, rank, chunk), (what, stage, sender, receiver) in stages.senders():
            lane_of[rank, chunk, KINDS.index(kind)] = stages.lane_numbers[sender, receiver, what]
            stage_of[rank, chunk, KINDS.index(kind)] = stage
        kinds, chunks, micro_batches = self.columns
        lanes = lane_of[self.ranks, chunks, kinds]
        order = np.argsort(lanes, kind="stable")[np.count_nonzero(lanes < 0) :]
        return stage_of[self.ranks, chunks, kinds][order], micro_batches[order]

    def rows(self) -> tuple[tuple[Instruction, ...], ...]:
        """By rank, as named instructions."""
        rows = [passes.row() for passes in self.passes]
        sent = messages_of_lanes(self.stages, rows)
        lanes = [sent[lane] for lane in self.stages.lanes]
        return tuple(tuple(_read(tape, row, lanes)) for tape, row in zip(self.tapes, rows, strict=True))


def messages_of_lanes(stages: Stages, rows: Sequence[Row]) -> MessagesOfLanes:
    """All messages of a step."""
    found: MessagesOfLanes = {lane: [] for lane in stages.lanes}
    for rank, row in enumerate(rows):
        for message in [message for action in row if (message := stages.sent(rank, action))]:
            found[message.sender, message.receiver, message.kind].append(message)
    return found


def _read(tape: Tape, row: Row, lanes: Sequence[Sequence[Message]]) -> Iterator[Instruction]:
    actions = iter(row)
    columns = (tape.operations.tolist(), tape.calls.tolist(), tape.lanes.tolist(), tape.messages.tolist())
    for (operation, _), entries in groupby(zip(*columns, strict=True), key=lambda entry: entry[:2]):
        if operation == RUN:
            yield from (Run(next(actions)) for _ in entries)
        else:
            messages = tuple([lanes[lane][message] for _, _, lane, message in entries])
            yield Post(messages) if operation == POST else Wait(messages)


def taped(stages: Stages, rows: Sequence[Row], instructions: Sequence[Sequence[Instruction]]) -> Score:
    """Named instructions as arrays."""
    places = {
        message: (stages.lane_numbers[lane], number)
        for lane, messages in messages_of_lanes(stages, rows).items()
        for number, message in enumerate(messages)
    }
    tapes = [_tape(row, places) for row in instructions]
    return Score(stages, [*map(Passes.of, rows)], tapes)


def _tape(row: Sequence[Instruction], places: dict[Message, tuple[int, int]]) -> Tape:
    entries: list[tuple[int, int, int, int]] = []
    for call, instruction in enumerate(row):
        if isinstance(instruction, Run):
            entries.append((RUN, 0, 0, call))
        else:
            operation = POST if isinstance(instruction, Post) else WAIT
            entries += [(operation, *places[message], call) for message in instruction.messages]
    return Tape(*np.array(entries).T)
