"""Whose time a step took longer: what the tasks on its longest way took beyond what they take by themselves.

The way is followed from the last end back: a kernel began when what it waited for had ended, a collective when the last
of its ranks had come, from where it goes on. Of each visit only where all stood before is kept; it runs again.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from spsim.engine.recording import COMPUTE_LANE
from spsim.step.abreast import Turn
from spsim.step.lockstep import Beginnings, Draw, Lockstep, Moments, Plan, Standing, Times
from spsim.step.segments import Call

Places = npt.NDArray[np.intp]


class Culprit(NamedTuple):
    """An operator in a pass."""

    operator: str
    phase: str


class Blame(NamedTuple):
    """Of some seeds."""

    ended: Times
    """When each rank ended, for each seed."""
    beyond: Mapping[Culprit, npt.NDArray[np.int64]]
    """Picoseconds beyond the unperturbed ones on the longest ways, by simulated rank, of all seeds."""


def blame(walk: Lockstep, unperturbed: Lockstep, draw: Draw | None) -> Blame:
    """Walk a step forward and back."""
    standing, before = walk.start, list[Standing]()
    for number, segment in enumerate(walk.visits):
        before.append(replace(standing))
        walk.visit(number, walk.plans[segment.name], standing, draw)
    way = _Way(walk, standing)
    for number in reversed(range(len(walk.visits))):
        name = walk.visits[number].name
        moments = walk.visit(number, walk.plans[name], replace(before[number]), draw)
        way.back(walk.plans[name], unperturbed.plans[name].lengths, moments, before[number])
    return Blame(way.ended, way.beyond)


class _Way:
    """Where the longest way of each seed is, going back."""

    def __init__(self, walk: Lockstep, standing: Standing) -> None:
        self.walk = walk
        self.seeds = np.arange(walk.seeds)
        names = [COMPUTE_LANE, *standing.lanes]
        ends = np.stack([standing.free, *standing.lanes.values()]).reshape(len(names), -1, walk.seeds)
        self.ended: Times = ends.max(axis=0).reshape(standing.free.shape)
        latest = ends.reshape(-1, walk.seeds).argmax(axis=0)
        self.ranks: Places = latest % ends.shape[1]
        """Of each seed the simulated rank by its place,"""
        self.targets: list[str] = [names[place] for place in latest // ends.shape[1]]
        """and what ended there in the visits to come: the last kernel, a lane, or an export by its name."""
        self.beyond: dict[Culprit, npt.NDArray[np.int64]] = defaultdict(lambda: np.zeros(ends.shape[1], np.int64))

    def back(self, plan: Plan, alone: Times, moments: Moments, before: Standing) -> None:
        """Through one visit."""
        segment, begin_at = plan.segment, Beginnings(plan.segment, before)
        ends = {**segment.exports, **segment.last_calls, COMPUTE_LANE: segment.outline.last_kernel}
        found = [ends.get(target) for target in self.targets]
        current = np.array([-1 if task is None else task for task in found])
        extra = (moments.lengths - alone).reshape(len(segment.tasks), -1, self.walk.seeds)
        for turn in reversed(plan.turns):
            own = np.flatnonzero(current == turn.task)
            if not own.size:
                continue
            label = segment.labels[turn.task]
            culprit = Culprit(" ".join(filter(None, [label.name, label.collective])), segment.phase)
            np.add.at(self.beyond[culprit], self.ranks[own], extra[turn.task, self.ranks[own], own])
            call = segment.calls.get(turn.task)
            if call is not None:
                self.ranks[own] = self._last_to_come(call, moments.posted[turn.task], own)
            current[own] = self._before(turn, moments, begin_at, own)

    def _before(self, turn: Turn, moments: Moments, begin_at: Beginnings, own: Places) -> Places:
        """The tasks that some seeds' ways come from, or -1 where it is of a visit before."""
        ranks = self.ranks[own]

        def at(times: Times) -> Times:
            return times.reshape(-1, self.walk.seeds)[ranks, own]

        begin = at(moments.posted[turn.task])
        found = np.full(len(own), -1)
        for seed in own:
            self.targets[seed] = COMPUTE_LANE
        for other in turn.waits:
            found[(found < 0) & (at(moments.ended[other]) == begin)] = other
        known = found >= 0
        known |= at(begin_at.free) == begin
        for name, times in (*begin_at.named(turn.task), *begin_at.joins()):
            here = ~known & (at(times) == begin)
            for seed in own[here]:
                self.targets[seed] = name
            known |= here
        return found

    def _last_to_come(self, call: Call, posted: Times, own: Places) -> Places:
        """For some seeds the rank whom all waited for, oneself if nobody came later."""
        walk, ranks, here = self.walk, self.ranks[own], np.arange(len(own))
        columns = posted[..., own]
        axes = walk.along(call)
        if not axes:
            return ranks
        places = [*np.unravel_index(ranks, walk.shape)]
        if call.exchange:
            (axis,) = axes
            degree = walk.shape[axis]
            around = [[*places[:axis], (places[axis] + n) % degree, *places[axis + 1 :]] for n in (0, 1, -1)]
            times = np.stack([columns[(*other, here)] for other in around])
            choices = np.stack([np.ravel_multi_index(tuple(other), walk.shape) for other in around])
            latest: Places = choices[times.argmax(axis=0), here]
            return latest
        others = [axis for axis in range(len(walk.shape)) if axis not in axes]
        ordered = columns.transpose(*axes, *others, len(walk.shape))
        group, rest = [walk.shape[axis] for axis in axes], [walk.shape[axis] for axis in others]
        table = ordered.reshape(int(np.prod(group)), -1, len(own))
        row = np.ravel_multi_index(tuple(places[axis] for axis in others), rest) if others else 0 * here
        last = table.argmax(axis=0)[row, here]
        later = table[last, row, here] > columns[(*places, here)]
        for axis, place in zip(axes, np.unravel_index(last, group), strict=True):
            places[axis] = np.where(later, place, places[axis])
        return np.ravel_multi_index(tuple(places), walk.shape)
