"""All ranks of a segment at once, as an axis of arrays: they run the same tasks with other durations and peers.

In what order the times of tasks can be found, and which communications may hold the device beside a kernel, follows
from what waits for what, and is the same on every rank. A communication ends its duration after the last of its peers
has posted it. So a segment that finds all lanes free is worked through task by task, in the integers of the engine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from math import gcd
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from spsim.engine.contention import PPM, rate_beside
from spsim.engine.lives import Integers
from spsim.engine.recording import COMPUTE_LANE
from spsim.engine.tasks import Key, RankProgram
from spsim.step.columns.order import MOST_TASKS, Order
from spsim.step.segments import Segment

FEWEST = 4
"""Ranks from which on arrays are faster than events."""
Times = npt.NDArray[np.int64]


class Turn(NamedTuple):
    """A task, what it waits for, and the communications that may be posted while a kernel runs."""

    task: int
    waits: tuple[int, ...]
    holds: tuple[int, ...]


def turns_of(segment: Segment) -> list[Turn]:
    """The tasks of a segment in an order in which the times of all that each waits for are known, and of all that slows
    it.
    """
    order = Order([(segment, 1)])
    kernels = sum(1 << task for task in order.kernels)
    turns = [((b & kernels).bit_count(), kernels >> task & 1, task) for task, b in enumerate(order.before)]
    found: list[Turn] = []
    posted: list[int] = []
    for _, is_kernel, task in sorted(turns):
        if not is_kernel:
            posted.append(task)
        holds = [other for other in posted if not order.before[task] >> other & 1] if is_kernel else []
        found.append(Turn(task, order.waits[task], tuple(holds)))
    return found


class Abreast:
    """A segment prepared for all ranks at once."""

    def __init__(self, segment: Segment, programs: Mapping[int, RankProgram]) -> None:
        self.turns: list[Turn] = []
        """None where the segment has to go through the engine."""
        self.peers = _peers(segment, programs) if _covered(segment, programs) else None
        """Of a communication: a column for each rank, with the places of those that it meets."""
        if self.peers is not None:
            self.turns = turns_of(segment)

    def run(
        self, durations: Mapping[int, Sequence[int]], starts: Sequence[int], slowdown: float
    ) -> dict[int, Integers] | None:
        """The times of the tasks of each rank, which is free from its start on; None where the engine has to find them,
        also for integers that 64 bits might not hold.
        """
        common = gcd(rate_beside(slowdown), PPM)
        whole, slow = PPM // common, rate_beside(slowdown) // common
        longest = max(starts) + sum(map(max, zip(*durations.values(), strict=True)))
        if self.peers is None or longest * whole * whole >= slow * 2**62:
            return None
        lengths = np.array([*durations.values()], dtype=np.int64).T.copy()
        posted, started, ended = moments = np.empty((3, *lengths.shape), dtype=np.int64)
        free = np.array(starts, dtype=np.int64)
        for task, waits, holds in self.turns:
            peers = self.peers.get(task)
            begin = free
            for other in waits:
                begin = np.maximum(begin, ended[other])
            posted[task] = begin
            started[task] = begin if peers is None else begin[peers].max(axis=0)
            if holds and slow < whole:
                ended[task] = slowed(begin, lengths[task], [(posted[h], ended[h]) for h in holds], whole, slow)
            else:
                ended[task] = started[task] + lengths[task]
        return dict(zip(durations, moments.transpose(2, 1, 0).copy(), strict=True))


def slowed(begin: Times, length: Times, holds: Sequence[tuple[Times, Times]], whole: int, slow: int) -> Times:
    """The first picosecond in which kernels are done that do `whole` parts of their work in each, `slow` ones while a
    communication holds the device.
    """
    alone = end = begin + length
    owed = np.zeros_like(begin)
    """Parts that were lost."""
    reached = begin
    for since, until in _in_order(holds):
        held = np.maximum(reached, since)
        left = (alone - held) * whole + owed
        owed = owed + np.maximum(until - held, 0) * (whole - slow)
        end = np.maximum(end, np.minimum(held - -left // slow, alone - -owed // whole))
        reached = np.maximum(reached, until)
    return end


def _in_order(holds: Sequence[tuple[Times, Times]]) -> Sequence[tuple[Times, Times]]:
    """On each rank in the order in which they begin."""
    if all((one <= other).all() for (one, _), (other, _) in pairwise(holds)):
        return holds
    posted, ended = np.array([since for since, _ in holds]), np.array([until for _, until in holds])
    order = posted.argsort(axis=0)
    pairs = (np.take_along_axis(own, order, axis=0) for own in (posted, ended))
    return [*zip(*pairs, strict=True)]


def _covered(segment: Segment, programs: Mapping[int, RankProgram]) -> bool:
    """Whether ranks are many, kernels are on one lane, and all communications slow them alike."""
    tasks = segment.tasks
    return len(programs) >= FEWEST and len(tasks) <= MOST_TASKS and all(
        task.slowdown is None and (task.lane == COMPUTE_LANE) != (task.id in segment.calls) for task in tasks
    )  # fmt: skip


def _peers(segment: Segment, programs: Mapping[int, RankProgram]) -> dict[int, npt.NDArray[np.intp]] | None:
    """Of each communication the places of those that each rank meets; None where one is met that does not come, or
    comes to it by another task.
    """
    there: dict[Key, list[tuple[int, int]]] = {}
    parties: dict[Key, int] = {}
    for place, program in enumerate(programs.values()):
        for task in program.tasks:
            for meeting in task.meetings:
                there.setdefault(meeting.key, []).append((place, task.id))
                parties[meeting.key] = meeting.parties
    if any(len(own) != parties[key] or len({task for _, task in own}) > 1 for key, own in there.items()):
        return None
    found: dict[int, npt.NDArray[np.intp]] = {}
    for call in segment.calls:
        meetings = [program.tasks[call].meetings for program in programs.values()]
        met = [sorted({place for one in own for place, _ in there[one.key]}) for own in meetings]
        most = max(map(len, met))
        found[call] = np.array([own + own[:1] * (most - len(own)) for own in met], dtype=np.intp).T
    return found
