"""Steps of many seeds at once: each task of a segment for all ranks and seeds, as arrays.

In what order the times of tasks can be found is the same on every rank (`columns.order`), and ranks that meet lie along
axes of the array: a collective starts at the largest time along its axes. Visits are walked one by one, for no two are
alike; what a visit leaves undone is handed on. All in the integers of the engine, with the same result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from math import gcd
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from spsim.engine.contention import PPM, rate_beside
from spsim.engine.recording import COMPUTE_LANE
from spsim.program.mesh import Axis
from spsim.step.abreast import Turn, slowed, turns_of
from spsim.step.folding import Step
from spsim.step.ranks import Ranks
from spsim.step.segments import Call, Segment

Times = npt.NDArray[np.int64]
"""Picoseconds; the places of simulated ranks on each axis of the mesh, then seeds."""


VISITS = 2**32
"""Of a pipeline stage, at most: numbers of visits tell stages apart."""


class Plan(NamedTuple):
    """A segment, prepared for arrays."""

    segment: Segment
    turns: Sequence[Turn]
    kernels: Sequence[int]
    lengths: Times
    """Of each task without what is drawn, with one seed."""


class Hold(NamedTuple):
    """Of the device by a communication, on each rank: since when, until when, and the rate of kernels meanwhile."""

    posted: Times
    ended: Times
    rate: int


@dataclass
class Standing:
    """Where all ranks stand between two visits."""

    free: Times
    """End of their kernels."""
    lanes: dict[str, Times] = field(default_factory=dict)
    """When lanes are free that may be busy beyond that."""
    ends: dict[str, Times] = field(default_factory=dict)
    """When exports arrive."""
    holds: list[Hold] = field(default_factory=list)
    """Of communications that may be under way."""


class Moments(NamedTuple):
    """A visit as it ran, a row for each task; kernels start when they are posted."""

    posted: Times
    started: Times
    ended: Times
    lengths: Times


Draw = Callable[[int, Plan], npt.NDArray[np.float64]]
"""Number of a visit, with those of a stage from a multiple of `VISITS` on, and its segment -> factors of its kernels in
order, by rank and seed.
"""


class Lockstep:
    """A step of the simulated ranks of a mesh, for so many seeds."""

    def __init__(self, step: Step, ranks: Ranks, visits: Sequence[Segment], seeds: int) -> None:
        """`visits` are of the segments that run, in order."""
        self.step, self.ranks, self.visits, self.seeds = step, ranks, visits, seeds
        self.axes: tuple[Axis, ...] = ranks.mesh.axes
        self.shape = ranks.shape
        self.plans = {name: self._plan(segment) for name, segment in {own.name: own for own in visits}.items()}
        self.rate = rate_beside(step.slowdown)

    def _plan(self, segment: Segment) -> Plan:
        durations = [self.step.durations[segment.name][rank] for rank in self.ranks.in_rows]
        lengths = np.array(durations, dtype=np.int64).T.reshape(len(segment.tasks), *self.shape, 1)
        kernels = [task.id for task in segment.tasks if task.lane == COMPUTE_LANE]
        return Plan(segment, turns_of(segment), kernels, lengths)

    @property
    def nbytes(self) -> int:
        """About what arrays take that are kept while one seed is walked forward and back."""
        longest = max(plan.lengths.nbytes for plan in self.plans.values())
        return 8 * longest + 2 * len(self.visits) * self.start.free.nbytes // self.seeds

    @property
    def start(self) -> Standing:
        """Of all ranks at the beginning."""
        return Standing(np.zeros((*self.shape, self.seeds), dtype=np.int64))

    def run(self, draw: Draw | None = None) -> Times:
        """When each rank has ended, for each seed."""
        standing = self.start
        for number, segment in enumerate(self.visits):
            self.visit(number, self.plans[segment.name], standing, draw)
        ended: Times = np.maximum.reduce([standing.free, *standing.lanes.values()])
        return ended

    def lengths(self, number: int, plan: Plan, draw: Draw | None) -> Times:
        """Of the tasks of a visit, as drawn."""
        found: Times = np.broadcast_to(plan.lengths, (*plan.lengths.shape[:-1], self.seeds))
        if draw is not None and plan.kernels:
            found = found.copy()
            found[plan.kernels] = np.rint(found[plan.kernels] * draw(number, plan))
        return found

    def visit(self, number: int, plan: Plan, standing: Standing, draw: Draw | None) -> Moments:
        """One segment, from where all ranks stand, which is changed to where they stand then."""
        lengths = self.lengths(number, plan, draw)
        posted, started, ended = np.empty((3, *lengths.shape), dtype=np.int64)
        moments = Moments(posted, started, ended, lengths)
        begin_at = Beginnings(plan.segment, standing)
        for turn in plan.turns:
            self._task(plan.segment, turn, begin_at, standing, moments)
        self._leave(plan.segment, standing, moments)
        return moments

    def _task(self, segment: Segment, turn: Turn, begin_at: Beginnings, standing: Standing, moments: Moments) -> None:
        task, length = turn.task, moments.lengths[turn.task]
        begin = np.maximum.reduce([*begin_at.of(task), *(moments.ended[other] for other in turn.waits)])
        moments.posted[task] = begin
        call = segment.calls.get(task)
        if call is not None:
            moments.started[task] = self.met(call, begin)
            moments.ended[task] = moments.started[task] + length
            return
        moments.started[task] = begin
        holds = [*self._holds(segment, turn.holds, moments), *standing.holds]
        moments.ended[task] = worked(begin, length, holds) if holds else begin + length

    def met(self, call: Call, posted: Times) -> Times:
        """When all have come whom each rank meets in a call."""
        axes = self.along(call)
        if call.exchange:
            (axis,) = axes or (None,)
            return posted if axis is None else np.maximum.reduce([posted, *(np.roll(posted, n, axis) for n in (1, -1))])
        return np.broadcast_to(posted.max(axis=axes, keepdims=True), posted.shape) if axes else posted

    def along(self, call: Call) -> tuple[int, ...]:
        """The axes of the array along which a call goes."""
        return tuple([place for place, axis in enumerate(self.axes) if axis in call.axes])

    def _leave(self, segment: Segment, standing: Standing, moments: Moments) -> None:
        last = segment.outline.last_kernel
        if last is not None:
            standing.free = moments.ended[last]
        free = standing.free
        lanes = standing.lanes | {lane: moments.ended[task] for lane, task in segment.last_calls.items()}
        ends = standing.ends | {name: moments.ended[task] for name, task in segment.exports.items()}
        own = self._holds(segment, segment.calls, moments)
        standing.lanes = {lane: end for lane, end in lanes.items() if (end > free).any()}
        standing.ends = {name: end for name, end in ends.items() if (end > free).any()}
        standing.holds = [hold for hold in (*standing.holds, *own) if (hold.ended > free).any()]

    def _holds(self, segment: Segment, tasks: Iterable[int], moments: Moments) -> list[Hold]:
        """Of some communications, those that slow kernels: copies to the host do not."""
        own = ((task, segment.tasks[task].slowdown) for task in tasks)
        rates = ((task, self.rate if slowdown is None else rate_beside(slowdown)) for task, slowdown in own)
        return [Hold(moments.posted[task], moments.ended[task], rate) for task, rate in rates if rate < PPM]


class Beginnings:
    """Before which moments of earlier visits no task of a segment begins."""

    def __init__(self, segment: Segment, standing: Standing) -> None:
        self.free, self.lanes, self.ends = standing.free, standing.lanes, standing.ends
        self.joined = [lane for lane in sorted(segment.joins) if lane in self.lanes]
        self.time = np.maximum.reduce([self.free, *(self.lanes[lane] for lane in self.joined)])
        self._names: dict[int, list[str]] = {}
        self._first: dict[int, str] = {}
        seen: set[str] = set()
        for task in segment.tasks:
            self._names[task.id] = [need for need in task.needs if isinstance(need, str) and need in self.ends]
            if task.lane not in seen and task.lane in self.lanes:
                self._first[task.id] = task.lane
            seen.add(task.lane)

    def of(self, task: int) -> list[Times]:
        """All of them for one task."""
        return [self.time, *(times for _, times in self.named(task))]

    def joins(self) -> list[tuple[str, Times]]:
        """Lanes that the segment joins."""
        return [(lane, self.lanes[lane]) for lane in self.joined]

    def named(self, task: int) -> list[tuple[str, Times]]:
        """Those that are no ends of kernels: lanes and exports by name."""
        found = [(name, self.ends[name]) for name in self._names[task]]
        return [*found, (self._first[task], self.lanes[self._first[task]])] if task in self._first else found


def worked(begin: Times, length: Times, holds: Sequence[Hold]) -> Times:
    """When kernels end that begin then and take so long by themselves, beside what holds the device."""
    spans = [(hold.posted, hold.ended) for hold in holds]
    if len({hold.rate for hold in holds}) == 1:
        common = gcd(holds[0].rate, PPM)
        return slowed(begin, length, spans, PPM // common, holds[0].rate // common)
    now, left, end = begin, length * PPM, np.full_like(begin, -1)
    for until in np.sort(np.concatenate(spans), axis=0):
        rate = np.full_like(begin, PPM)
        for hold in holds:
            rate = np.where((hold.posted <= now) & (now < hold.ended), np.minimum(rate, hold.rate), rate)
        done = np.maximum(until - now, 0) * rate
        end = np.where((end < 0) & (left <= done), now - -left // rate, end)
        now, left = np.maximum(now, until), left - done
    return np.where(end < 0, now - -left // PPM, end)
