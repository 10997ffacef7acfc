"""The blame on several pipeline stages: the longest way goes on from who posted a message, or came to a call, last."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from spsim.engine.recording import COMPUTE_LANE, TaskInfo
from spsim.step.blame import Blame, Places, Way
from spsim.step.lockstep import Draw, Plan, Standing, Times
from spsim.step.lockstep_stages import Between, Came, Event, Left, Posted, Ran, StagedLockstep, Visited, Waited
from spsim.step.pipeline.messages import Message
from spsim.step.pipelined import SENT


def blame_stages(walk: StagedLockstep, unperturbed: StagedLockstep, draw: Draw | None) -> Blame:
    """Walk a step forward and back."""
    between = Between(events=[])
    ended = walk.run(draw, between)
    back = _Back(walk, unperturbed, draw, between, Way(walk.walks[0], [Standing(own) for own in ended]))
    for event in reversed(between.events or ()):
        back.through(event)
    return Blame(back.way.ended, back.way.beyond)


class _Back:
    """Goes back through what stages have done."""

    def __init__(
        self, walk: StagedLockstep, unperturbed: StagedLockstep, draw: Draw | None, between: Between, way: Way
    ) -> None:
        self.walk, self.unperturbed, self.draw, self.between, self.way = walk, unperturbed, draw, between, way

    def through(self, event: Event) -> None:
        """One thing that a stage has done."""
        if isinstance(event, Visited):
            walk, alone = self.walk.walks[event.stage], self._alone(event.stage, event.plan)
            moments = walk.visit(event.number, event.plan, replace(event.before), self.draw)
            self.way.visited(event.plan, alone, moments, event.before, event.stage)
        elif isinstance(event, Waited):
            self._waited(event)
        elif isinstance(event, Posted):
            self._go_on(self.way.on(event.stage, event.message))
        elif isinstance(event, Ran):
            own = self.way.on(event.stage)
            self._blame(event, own)
            self._come(event.stage, event.plan, event.task, event.posted, own)
        elif isinstance(event, Left):
            self._left(event)
        else:
            self._came(event)

    def _alone(self, stage: int, plan: Plan) -> Times:
        return self.unperturbed.walks[stage].plans[plan.segment.name].lengths

    def _blame(self, event: Ran | Left, own: Places) -> None:
        """A task after the last micro-batch."""
        segment = event.plan.segment
        lengths = self.walk.walks[event.stage].lengths(event.number, event.plan, self.draw)
        beyond = (lengths - self._alone(event.stage, event.plan))[event.task]
        self.way.blame(segment.labels[event.task], segment.phase, beyond, own)

    def _go_on(self, own: Places) -> None:
        """The ways of some seeds go on from the last kernel."""
        for seed in own:
            self.way.targets[seed] = COMPUTE_LANE

    def _come(self, stage: int, plan: Plan, task: int, posted: Times, own: Places) -> None:
        """They go on from the last rank of the stage that came to a call, if it is one."""
        call = plan.segment.calls.get(task)
        if call is not None and own.size:
            self.way.come(call, posted, own)

    def _left(self, event: Left) -> None:
        """From the stage that came last, oneself if none came later."""
        own, there = self.way.on(event.stage), self.between.meetings[event.key]
        self._blame(event, own)
        order = [event.stage, *(stage for stage in there if stage != event.stage)]
        last = np.array([self.way.at(there[stage], own) for stage in order]).argmax(axis=0)
        for seed, place in zip(own, last, strict=True):
            self.way.stages[seed], self.way.targets[seed] = order[place], event.key

    def _came(self, event: Came) -> None:
        own = self.way.on(event.stage, event.key)
        if own.size:
            self.way.come(event.key[0], event.posted, own)
            self._go_on(own)

    # Messages

    def _waited(self, event: Waited) -> None:
        """Where the last message came later than the kernels, the ways of seeds go on from it."""
        own = self.way.on(event.stage)
        if not own.size:
            return
        ends = np.array([self.way.at(self.between.ends[message], own) for message in event.messages])
        last, before = ends.argmax(axis=0), self.way.at(event.before, own)
        for place in np.flatnonzero(ends.max(axis=0) > before):
            self._sent(event.messages[last[place]], own[place : place + 1])

    def _sent(self, message: Message | None, own: Places) -> None:
        """From who posted it last, or from the message before it on its lane."""
        while message is not None:
            way = message.sender, message.receiver
            phase, _ = SENT[message.kind]
            label = TaskInfo(message.kind, "communication", phase, collective="send_receive")
            self.way.blame(label, phase, self.walk.transfers[way] - self.unperturbed.transfers[way], own)
            begun = self.way.at(self.between.begins[message], own)
            sides = self.between.posts[message]
            stage = next((side for side, posted in sides.items() if self.way.at(posted, own) == begun), None)
            if stage is not None:
                self.way.stages[own] = stage
                self.way.targets[own[0]] = message
                return
            message = self.between.ahead[message]
