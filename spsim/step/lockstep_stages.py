"""Steps of many seeds on several pipeline stages: each stage in lockstep, until it waits for what another has not sent.

Messages travel between ranks at the same place of their stages, so that a message is an array as all times are; a lane
of messages is in order. What closes the step is in a row on each stage, and meets other stages where a collective says.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

from spsim.step.gradients import STAGE_AXES
from spsim.step.lockstep import VISITS, Beginnings, Draw, Lockstep, Plan, Standing, Times
from spsim.step.pipeline.messages import DeadlockError, Lane, Message, Post, Run
from spsim.step.ranks import Ranks
from spsim.step.segments import Call
from spsim.step.written_stages import WrittenStage

Transfers = Mapping[tuple[int, int], Times]
"""Picoseconds of a message by sender and receiver, of each rank."""


class Visited(NamedTuple):
    """A stage has run a segment."""

    stage: int
    number: int
    plan: Plan
    before: Standing


class Posted(NamedTuple):
    """A stage has posted a message."""

    stage: int
    message: Message


class Waited(NamedTuple):
    """A stage has waited for messages."""

    stage: int
    messages: Sequence[Message]
    before: Times


class Ran(NamedTuple):
    """A stage has run one task after the last micro-batch; it met others of its stage, if anybody, in a call."""

    stage: int
    number: int
    plan: Plan
    task: int
    posted: Times


class Came(NamedTuple):
    """A stage has come to a call of several stages,"""

    stage: int
    key: Key
    posted: Times


class Left(NamedTuple):
    """and all have come."""

    stage: int
    key: Key
    number: int
    plan: Plan
    task: int


Key = tuple[Call, int]
"""A call and its number."""
Event = Visited | Posted | Waited | Ran | Came | Left


@dataclass
class Between:
    """What stages know of each other, and what they have done in order."""

    events: list[Event] | None = None
    """If somebody wants to know."""
    posts: dict[Message, dict[int, Times]] = field(default_factory=dict)
    """Of messages when each side has posted it."""
    begins: dict[Message, Times] = field(default_factory=dict)
    ahead: dict[Message, Message | None] = field(default_factory=dict)
    """The message before it on its lane."""
    ends: dict[Message, Times] = field(default_factory=dict)
    lanes: dict[Lane, Message] = field(default_factory=dict)
    """The last message of each."""
    meetings: dict[Key, dict[int, Times]] = field(default_factory=dict)
    """When each stage has come to a call."""
    called: Counter[tuple[int, Call]] = field(default_factory=Counter)
    """How often each stage has come to each call."""

    @property
    def steps(self) -> int:
        """That stages have taken."""
        return sum(map(len, self.posts.values())) + self.called.total()

    def come(self, stage: int, call: Call, posted: Times) -> Key:
        """A stage comes to its next call of a communicator."""
        key = call, self.called[stage, call]
        self.meetings.setdefault(key, {})[stage] = posted
        self.called[stage, call] += 1
        return key

    def note(self, event: Event) -> None:
        """What a stage has done."""
        if self.events is not None:
            self.events.append(event)


class StagedLockstep:
    """A step of the simulated ranks of all stages, for so many seeds."""

    def __init__(self, stages: Sequence[WrittenStage], ranks: Ranks, transfers: Transfers, seeds: int) -> None:
        self.ranks, self.transfers = ranks, transfers
        self.stages = stages
        self.walks = [
            Lockstep(
                stage.step,
                ranks,
                [visit.segment for own in (*stage.passes.values(), stage.closing) for visit in own],
                seeds,
            )
            for stage in stages
        ]
        self.shape = self.walks[0].shape

    @property
    def nbytes(self) -> int:
        """About what arrays take that are kept while one seed is walked."""
        messages = sum(len(own.messages) for stage in self.stages for own in stage.row if isinstance(own, Post))
        return sum(walk.nbytes for walk in self.walks) + 4 * messages * self.walks[0].start.free.nbytes // self.seeds

    @property
    def seeds(self) -> int:
        """How many there are."""
        return self.walks[0].seeds

    @seeds.setter
    def seeds(self, seeds: int) -> None:
        for walk in self.walks:
            walk.seeds = seeds

    def run(self, draw: Draw | None = None, between: Between | None = None) -> Times:
        """When each rank of each stage has ended, for each seed."""
        between = between or Between()
        standings = [walk.start for walk in self.walks]
        waiting = {stage: self._stage(stage, standings[stage], between, draw) for stage in range(len(self.stages))}
        while waiting:
            before = between.steps, len(waiting)
            for stage in [stage for stage, steps in waiting.items() if next(steps, None) is None]:
                del waiting[stage]
            if before == (between.steps, len(waiting)):
                raise DeadlockError([*waiting])
        return np.stack([standing.free for standing in standings])

    def _stage(self, number: int, standing: Standing, between: Between, draw: Draw | None) -> Iterator[bool]:
        """All that a stage does; yields where it waits for another."""
        stage, walk, visit = self.stages[number], self.walks[number], number * VISITS
        for instruction in stage.row:
            if isinstance(instruction, Run):
                for own in stage.passes[instruction.action]:
                    plan = walk.plans[own.segment.name]
                    between.note(Visited(number, visit, plan, replace(standing)))
                    walk.visit(visit, plan, standing, draw)
                    visit += 1
            elif isinstance(instruction, Post):
                for message in instruction.messages:
                    self._post(number, message, standing.free, between)
            else:
                while any(message not in between.ends for message in instruction.messages):
                    yield True
                between.note(Waited(number, instruction.messages, standing.free))
                ended = [between.ends[message] for message in instruction.messages]
                standing.free = np.maximum.reduce([standing.free, *ended])
        for own in stage.closing:
            yield from self._close(number, visit, walk.plans[own.segment.name], standing, between, draw)
            visit += 1

    def _post(self, stage: int, message: Message, posted: Times, between: Between) -> None:
        """One side has come to it; if the other has, too, it goes when its lane is free."""
        between.note(Posted(stage, message))
        sides = between.posts.setdefault(message, {})
        sides[stage] = posted
        if len(sides) < len({message.sender, message.receiver}):
            return
        lane = (message.sender, message.receiver, message.kind)
        ahead = between.ahead[message] = between.lanes.get(lane)
        begins = [*sides.values(), *([] if ahead is None else [between.ends[ahead]])]
        between.lanes[lane], between.begins[message] = message, np.maximum.reduce(begins)
        between.ends[message] = between.begins[message] + self.transfers[message.sender, message.receiver]

    def _close(
        self, number: int, visit: int, plan: Plan, standing: Standing, between: Between, draw: Draw | None
    ) -> Iterator[bool]:
        """A segment after the last micro-batch, whose tasks run one after another."""
        walk, segment = self.walks[number], plan.segment
        lengths = walk.lengths(visit, plan, draw)
        standing.free = Beginnings(segment, standing).time
        for task in segment.tasks:
            call, posted = segment.calls.get(task.id), standing.free
            met = posted if call is None else walk.met(call, posted)
            if call is None or STAGE_AXES.isdisjoint(call.axes):
                between.note(Ran(number, visit, plan, task.id, posted))
            else:
                key = between.come(number, call, met)
                between.note(Came(number, key, posted))
                while len(between.meetings[key]) < (len(self.stages) if "pp" in call.axes else 2):
                    yield True
                met = np.maximum.reduce([*between.meetings[key].values()])
                between.note(Left(number, key, visit, plan, task.id))
            standing.free = met + lengths[task.id]
