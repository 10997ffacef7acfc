"""Whose time a step took longer: what the tasks on its longest way took beyond what they take by themselves.

The way is followed from the last end back: a kernel began when what it waited for had ended, a collective when the last
of its ranks had come, from where it goes on. Of each visit only where all stood before is kept; it runs again.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from spsim.engine.recording import COMPUTE_LANE, TaskInfo
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
    """When each rank of each stage ended, for each seed."""
    beyond: Mapping[Culprit, npt.NDArray[np.int64]]
    """Picoseconds beyond the unperturbed ones on the longest ways, by simulated rank, of all seeds."""


def blame(walk: Lockstep, unperturbed: Lockstep, draw: Draw | None) -> Blame:
    """Walk a step forward and back."""
    standing, before = walk.start, list[Standing]()
    for number, segment in enumerate(walk.visits):
        before.append(replace(standing))
        walk.visit(number, walk.plans[segment.name], standing, draw)
    way = Way(walk, [standing])
    for number in reversed(range(len(walk.visits))):
        name = walk.visits[number].name
        moments = walk.visit(number, walk.plans[name], replace(before[number]), draw)
        way.visited(walk.plans[name], unperturbed.plans[name].lengths, moments, before[number])
    return Blame(way.ended, way.beyond)


class Way:
    """Where the longest way of each seed is, going back; `walk` is that of any stage."""

    def __init__(self, walk: Lockstep, standings: Sequence[Standing]) -> None:
        """Where the ranks of each stage stand at the end."""
        self.walk = walk
        names = dict.fromkeys([COMPUTE_LANE, *(lane for standing in standings for lane in standing.lanes)])
        ends = np.stack([[own.lanes.get(name, own.free) for own in standings] for name in names])
        ends = ends.reshape(len(names), len(standings), -1, walk.seeds)
        self.ended: Times = ends.max(axis=0).reshape(-1, walk.seeds)
        latest = np.unravel_index(ends.reshape(-1, walk.seeds).argmax(axis=0), ends.shape[:3])
        self.stages: Places = latest[1]
        """Of each seed the stage,"""
        self.ranks: Places = latest[2]
        """the simulated rank of it by its place,"""
        self.targets: list[object] = [[*names][place] for place in latest[0]]
        """and what ended there in what is still to be gone through: the last kernel, a lane, an export by its name."""
        total = ends.shape[1] * ends.shape[2]
        self.beyond: dict[Culprit, npt.NDArray[np.int64]] = defaultdict(lambda: np.zeros(total, np.int64))

    def on(self, stage: int, target: object = COMPUTE_LANE) -> Places:
        """The seeds whose way is at something of a stage."""
        found = [place for place, own in enumerate(self.targets) if own == target and self.stages[place] == stage]
        return np.array(found, dtype=np.intp)

    def at(self, times: Times, own: Places) -> Times:
        """Of the ranks that the ways of some seeds are on."""
        found: Times = np.broadcast_to(times, (*self.walk.shape, self.walk.seeds)).reshape(-1, self.walk.seeds)
        return found[self.ranks[own], own]

    def blame(self, label: TaskInfo, phase: str, beyond: Times, own: Places) -> None:
        """What a task took beyond what it takes by itself, on the ways of some seeds."""
        culprit = Culprit(" ".join(filter(None, [label.name, label.collective])), phase)
        np.add.at(
            self.beyond[culprit], self.stages[own] * prod(self.walk.shape) + self.ranks[own], self.at(beyond, own)
        )

    def visited(self, plan: Plan, alone: Times, moments: Moments, before: Standing, stage: int = 0) -> None:
        """Back through one visit of a stage."""
        segment, begin_at = plan.segment, Beginnings(plan.segment, before)
        ends: dict[object, int | None] = {COMPUTE_LANE: segment.outline.last_kernel}
        ends.update(segment.last_calls)
        ends.update(segment.exports)
        here = [ends.get(own) if self.stages[place] == stage else None for place, own in enumerate(self.targets)]
        current = np.array([-1 if task is None else task for task in here])
        for turn in reversed(plan.turns):
            own = np.flatnonzero(current == turn.task)
            if not own.size:
                continue
            self.blame(segment.labels[turn.task], segment.phase, (moments.lengths - alone)[turn.task], own)
            call = segment.calls.get(turn.task)
            if call is not None:
                self.come(call, moments.posted[turn.task], own)
            current[own] = self._before(turn, moments, begin_at, own)

    def _before(self, turn: Turn, moments: Moments, begin_at: Beginnings, own: Places) -> Places:
        """The tasks that some seeds' ways come from, or -1 where it is of a visit before."""
        begin = self.at(moments.posted[turn.task], own)
        found = np.full(len(own), -1)
        for seed in own:
            self.targets[seed] = COMPUTE_LANE
        for other in turn.waits:
            found[(found < 0) & (self.at(moments.ended[other], own) == begin)] = other
        known = found >= 0
        known |= self.at(begin_at.free, own) == begin
        for name, times in (*begin_at.named(turn.task), *begin_at.joins()):
            here = ~known & (self.at(times, own) == begin)
            for seed in own[here]:
                self.targets[seed] = name
            known |= here
        return found

    def come(self, call: Call, posted: Times, own: Places) -> None:
        """The ways of some seeds go on from the rank of the stage whom all waited for in a call."""
        self.ranks[own] = self._last_to_come(call, posted, own)

    def _last_to_come(self, call: Call, posted: Times, own: Places) -> Places:
        """The same rank if nobody came later."""
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
