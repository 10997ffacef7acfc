"""When the passes of a pipeline run and its messages travel, in whole picoseconds.

A rank has a cursor. A pass takes its time from the cursor on; a call posts its messages at the cursor; a wait moves the
cursor to the latest of its messages' ends. A message starts when both sides have posted it and the one before it on its
lane (sender, receiver, kind) has ended. Messages do not slow passes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from spsim.step.pipeline.messages import DeadlockError, Instruction, Lane, Message, Post, Run, Wait
from spsim.step.pipeline.orders import Action

EndOfPass = Callable[[int, Action, int], int]
"""(rank, pass, start in ps) -> its end in ps; asked in the order of each rank's passes."""
Transfer = Callable[[int, int], int]
"""(sender, receiver) -> how long one message takes, in ps."""


class PassSpan(NamedTuple):
    """A pass as it ran."""

    rank: int
    action: Action
    start_ps: int
    end_ps: int


class MessageSpan(NamedTuple):
    """A message as it travelled."""

    message: Message
    sender_posted_ps: int
    receiver_posted_ps: int
    start_ps: int
    end_ps: int


@dataclass
class Times:
    """All of a step."""

    passes: list[PassSpan] = field(default_factory=list)
    """Those of a rank in order."""
    messages: list[MessageSpan] = field(default_factory=list)
    """Those of a lane in order."""
    finished_ps: list[int] = field(default_factory=list)
    """By rank: after its last pass and wait."""


def walk(rows: Sequence[Sequence[Instruction]], end_of: EndOfPass, transfer_ps: Transfer) -> Times:
    """The step that the instructions of each rank make, whatever passes take.

    Raises:
        DeadlockError: ranks wait for messages that nobody will post.
    """
    walkers = [_Walker(rank, row) for rank, row in enumerate(rows)]
    lanes = _Lanes(transfer_ps)
    times = Times()
    ready = [*range(len(rows))]
    while ready:
        walker = walkers[ready.pop()]
        for message in walker.advance(lanes, end_of, times):
            peer = walkers[message.receiver if walker.rank == message.sender else message.sender]
            if peer.blocked_by == message:
                peer.blocked_by = None
                ready.append(peer.rank)
    stuck = [walker.rank for walker in walkers if walker.blocked_by is not None]
    if stuck:
        raise DeadlockError(stuck)
    times.passes.sort(key=lambda span: span.rank)
    times.messages = [span for _, spans in sorted(lanes.spans.items()) for span in spans]
    times.finished_ps = [walker.cursor_ps for walker in walkers]
    return times


class _Lanes:
    """Messages that one side has posted, and those that travelled."""

    def __init__(self, transfer_ps: Transfer) -> None:
        self.transfer_ps = transfer_ps
        self.posted: dict[Message, int] = {}
        self.ends: dict[Message, int] = {}
        self.spans: dict[Lane, list[MessageSpan]] = {}

    def post(self, message: Message, rank: int, at_ps: int) -> bool:
        """Whether both sides have posted it now; then it has its time."""
        other_ps = self.posted.pop(message, None)
        if other_ps is None:
            self.posted[message] = at_ps
            return False
        lane = self.spans.setdefault((message.sender, message.receiver, message.kind), [])
        sides = (at_ps, other_ps) if rank == message.sender else (other_ps, at_ps)
        start_ps = max(*sides, lane[-1].end_ps if lane else 0)
        end_ps = start_ps + self.transfer_ps(message.sender, message.receiver)
        lane.append(MessageSpan(message, *sides, start_ps, end_ps))
        self.ends[message] = end_ps
        return True


class _Walker:
    """A rank on its way through its instructions."""

    def __init__(self, rank: int, row: Sequence[Instruction]) -> None:
        self.rank = rank
        self.cursor_ps = 0
        self.blocked_by: Message | None = None
        """What it waits for, while a peer has not posted it."""
        self._row = row
        self._next = 0

    def advance(self, lanes: _Lanes, end_of: EndOfPass, times: Times) -> Iterator[Message]:
        """On to the next message that a peer has not posted; yields those that both sides have posted now."""
        while self._next < len(self._row):
            instruction = self._row[self._next]
            if isinstance(instruction, Run):
                end_ps = end_of(self.rank, instruction.action, self.cursor_ps)
                times.passes.append(PassSpan(self.rank, instruction.action, self.cursor_ps, end_ps))
                self.cursor_ps = end_ps
            elif isinstance(instruction, Post):
                for message in instruction.messages:
                    if lanes.post(message, self.rank, self.cursor_ps):
                        yield message
            elif not self._waited(instruction, lanes):
                return
            self._next += 1

    def _waited(self, wait: Wait, lanes: _Lanes) -> bool:
        for message in wait.messages:
            if message not in lanes.ends:
                self.blocked_by = message
                return False
        self.cursor_ps = max(self.cursor_ps, *(lanes.ends[message] for message in wait.messages))
        return True
