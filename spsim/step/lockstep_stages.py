"""Steps of many seeds on several pipeline stages: each stage in lockstep, until it waits for what another has not sent.

Messages travel between ranks at the same place of their stages, so that a message is an array as all times are; a lane
of messages is in order. What closes the step is in a row on each stage, and meets other stages where a collective says.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from spsim.step.gradients import STAGE_AXES
from spsim.step.lockstep import VISITS, Beginnings, Draw, Lockstep, Plan, Standing, Times
from spsim.step.pipeline.messages import DeadlockError, Lane, Message, Post, Run
from spsim.step.ranks import Ranks
from spsim.step.segments import Call
from spsim.step.written_stages import WrittenStage

Transfers = Mapping[tuple[int, int], Times]
"""Picoseconds of a message by sender and receiver, of each rank."""


@dataclass
class _Between:
    """What stages know of each other."""

    posts: dict[Message, Times] = field(default_factory=dict)
    """Of messages that one side has posted, when."""
    ends: dict[Message, Times] = field(default_factory=dict)
    lanes: dict[Lane, Times] = field(default_factory=dict)
    """When they are free."""
    meetings: dict[tuple[Call, int], list[Times]] = field(default_factory=dict)
    """Call and its number -> when each stage has come to it."""
    called: Counter[tuple[int, Call]] = field(default_factory=Counter)
    """How often each stage has come to each call."""

    @property
    def steps(self) -> int:
        """That stages have taken."""
        return len(self.posts) + len(self.ends) + self.called.total()

    def come(self, stage: int, call: Call, posted: Times) -> list[Times]:
        """A stage comes to its next call of a communicator; those who have, now and later."""
        there = self.meetings.setdefault((call, self.called[stage, call]), [])
        self.called[stage, call] += 1
        there.append(posted)
        return there


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
        most = max(plan.lengths.nbytes for walk in self.walks for plan in walk.plans.values())
        return 8 * most + messages * self.walks[0].start.free.nbytes // self.seeds

    @property
    def seeds(self) -> int:
        """How many there are."""
        return self.walks[0].seeds

    @seeds.setter
    def seeds(self, seeds: int) -> None:
        for walk in self.walks:
            walk.seeds = seeds

    def run(self, draw: Draw | None = None) -> Times:
        """When each rank of each stage has ended, for each seed."""
        between = _Between()
        standings = [walk.start for walk in self.walks]
        waiting = {stage: self._stage(stage, standings[stage], between, draw) for stage in range(len(self.stages))}
        while waiting:
            before = between.steps, len(waiting)
            for stage in [stage for stage, steps in waiting.items() if next(steps, None) is None]:
                del waiting[stage]
            if before == (between.steps, len(waiting)):
                raise DeadlockError([*waiting])
        return np.stack([standing.free for standing in standings])

    def _stage(self, number: int, standing: Standing, between: _Between, draw: Draw | None) -> Iterator[bool]:
        """All that a stage does; yields where it waits for another."""
        stage, walk, visit = self.stages[number], self.walks[number], number * VISITS
        for instruction in stage.row:
            if isinstance(instruction, Run):
                for own in stage.passes[instruction.action]:
                    walk.visit(visit, walk.plans[own.segment.name], standing, draw)
                    visit += 1
            elif isinstance(instruction, Post):
                for message in instruction.messages:
                    self._post(message, standing.free, between)
            else:
                while any(message not in between.ends for message in instruction.messages):
                    yield True
                ended = [between.ends[message] for message in instruction.messages]
                standing.free = np.maximum.reduce([standing.free, *ended])
        for own in stage.closing:
            yield from self._close(number, visit, walk.plans[own.segment.name], standing, between, draw)
            visit += 1

    def _post(self, message: Message, posted: Times, between: _Between) -> None:
        """One side has come to it; if the other has, too, it goes when its lane is free."""
        if message not in between.posts:
            between.posts[message] = posted
            return
        lane = (message.sender, message.receiver, message.kind)
        begins = [posted, between.posts[message], *([between.lanes[lane]] if lane in between.lanes else [])]
        ended = np.maximum.reduce(begins) + self.transfers[message.sender, message.receiver]
        between.ends[message] = between.lanes[lane] = ended

    def _close(
        self, number: int, visit: int, plan: Plan, standing: Standing, between: _Between, draw: Draw | None
    ) -> Iterator[bool]:
        """A segment after the last micro-batch, whose tasks run one after another."""
        walk, segment = self.walks[number], plan.segment
        lengths = walk.lengths(visit, plan, draw)
        standing.free = Beginnings(segment, standing).time
        for task in segment.tasks:
            call = segment.calls.get(task.id)
            if call is not None:
                standing.free = walk.met(call, standing.free)
                if not STAGE_AXES.isdisjoint(call.axes):
                    there = between.come(number, call, standing.free)
                    while len(there) < (len(self.stages) if "pp" in call.axes else 2):
                        yield True
                    standing.free = np.maximum.reduce(there)
            standing.free = standing.free + lengths[task.id]
