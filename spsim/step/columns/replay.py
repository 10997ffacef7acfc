"""When the tasks of a pass run, for many workloads at once: an array of picoseconds for each task.

What the engine does event by event is done here task by task, in the order that `Order` has found: the same integers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd

import numpy as np
import numpy.typing as npt

from spsim.engine.contention import PPM
from spsim.step.columns.order import Order

Times = npt.NDArray[np.int64]
Points = npt.NDArray[np.bool_]
"""Which workloads."""
Holds = Sequence[tuple[Times, Times]]
"""From when to when communications hold the device: one after the other, none within another."""


class Contention:
    """Of `whole` parts of its rate a kernel loses `lost` while a communication holds the device."""

    def __init__(self, slowdown: float) -> None:
        """Of the share that it loses, in the smallest numbers: they multiply picoseconds."""
        lost = round(slowdown * PPM)
        common = gcd(lost, PPM)
        self.whole, self.lost = PPM // common, lost // common
        numbers = self.whole, self.lost, self.whole - self.lost, 0
        self._arrays = [np.array(number, dtype=np.int64) for number in numbers]
        """What operations on arrays need not convert each time."""

    def slowed(self, begin: Times, duration: Times, holds: Holds, out: Times) -> None:
        """Write the first picosecond in which kernels are done, as the engine works them through.

        A kernel is slow from when it is held until the communication ends, or until the work is done that is left by
        then: in `whole - lost` parts a picosecond. What that loses it works off alone. Times and losses count down.
        """
        whole, lost, slow, zero = self._arrays
        alone = np.add(begin, duration, out=out)
        owed: Times | None = None
        for posted, ended in holds:
            slow_time = np.maximum(begin, posted)
            most = slow_time - ended
            slow_time -= alone
            slow_time *= whole
            if owed is not None:
                slow_time += owed
            slow_time //= slow
            np.maximum(slow_time, most, out=slow_time)
            np.minimum(slow_time, zero, out=slow_time)
            slow_time *= lost
            owed = slow_time if owed is None else np.add(owed, slow_time, out=owed)
        if owed is not None:
            owed //= whole
            alone -= owed


@dataclass(frozen=True, slots=True)
class Replay:
    """A pass as it ran: a row for each task, a column for each workload; the pass begins at 0 with all lanes free."""

    moments: Times
    """When each task is posted, and below that when each has ended."""

    @property
    def posted(self) -> Times:
        """When each task is posted."""
        return self.moments[: len(self.moments) // 2]

    @property
    def ended(self) -> Times:
        """When each task has ended."""
        return self.moments[len(self.moments) // 2 :]


def replay(order: Order, durations: Times, contention: Contention) -> Replay:
    """Run the tasks of a pass; durations are positive, and their sum times `contention.whole` is below 2^62."""
    tasks, points = durations.shape
    found = Replay(np.empty((2 * tasks, points), dtype=np.int64))
    posted = [np.zeros(points, dtype=np.int64)] * tasks
    ended, lengths = [*found.ended], [*durations]
    for task, waits, holds, lanes in order.program:
        for place, other in enumerate(waits):
            posted[task] = np.maximum(posted[task], ended[other]) if place else ended[other]
        if holds and contention.lost:
            held = [(posted[other], ended[other]) for other in holds]
            contention.slowed(posted[task], lengths[task], held if lanes == 1 else _merged(held), out=ended[task])
        else:
            np.add(posted[task], lengths[task], out=ended[task])
    np.concatenate(posted, out=found.posted.reshape(-1))
    return found


def _merged(holds: Holds) -> Holds:
    """Communications of several lanes one after the other: they overlap, and which is first depends."""
    begins, ends = map(np.array, zip(*holds, strict=True))
    order = begins.argsort(axis=0)
    begins, ends = np.take_along_axis(begins, order, axis=0), np.take_along_axis(ends, order, axis=0)
    np.maximum(begins[1:], np.maximum.accumulate(ends)[:-1], out=begins[1:])
    return [*zip(begins, ends, strict=True)]
