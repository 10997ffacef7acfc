"""The median time of a call, over rotating buffers and after a warm-up."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import cycle
from typing import NamedTuple

import numpy as np

from spsim.measuring.calibrate.records import Clock, Measurement
from spsim.units import US_PER_S

Sampler = Callable[[Iterator[Callable[[], object]], int, int], list[float]]
WARM_UP = 3
MIN_SAMPLE = 100e-6
"""Seconds of one sample: calls that are shorter are timed several at once."""
MAX_REPEATS = 200


class Effort(NamedTuple):
    """How long one measurement takes, beside its warm-up."""

    seconds: float
    min_repeats: int
    min_rounds: int
    """Of interference, where one round is many calls."""


QUICK = Effort(0.04, 5, 7)
FULL = Effort(0.2, 7, 15)


class Repeats(NamedTuple):
    """Calls of one sample, and samples."""

    per_sample: int
    samples: int


def choose_repeats(seconds: float, effort: Effort) -> Repeats:
    """How often to repeat a call that takes so long."""
    per_sample = max(1, min(1000, math.ceil(MIN_SAMPLE / max(seconds, 1e-9))))
    samples = int(effort.seconds / max(seconds * per_sample, 1e-9))
    return Repeats(per_sample, max(effort.min_repeats, min(MAX_REPEATS, samples)))


def sample_times(calls: Sequence[Callable[[], object]], sampler: Sampler, effort: Effort) -> list[float]:
    """Samples of the seconds of one call; the calls do the same on buffers of their own, in turn."""
    turn = cycle(calls)
    for _ in range(WARM_UP):
        next(turn)()
    pilot = min(sampler(turn, 1, 2))
    return sampler(turn, *choose_repeats(pilot, effort))


def timed(row: Measurement, samples: Sequence[float], clock: Clock) -> Measurement:
    """The row with its result."""
    p10, p50, p90 = np.percentile(samples, (10, 50, 90)) * US_PER_S
    return row.model_copy(
        update={
            "clock": clock, "repeats": len(samples), "time_us": round(float(p50), 4),
            "p10_us": round(float(p10), 4), "p90_us": round(float(p90), 4),
        }
    )  # fmt: skip
