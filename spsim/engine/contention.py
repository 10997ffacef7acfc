"""What kernels lose while communications hold part of the device.

Rates are millionths of the rate of kernels that are alone, so that all is integers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

PPM = 10**6

Held = tuple[int, int, int]
"""From when to when the device is held, in picoseconds, and the rate of kernels meanwhile."""


def rate_beside(slowdown: float) -> int:
    """The rate of kernels that lose a share of it."""
    return PPM - round(slowdown * PPM)


def in_turn(holds: Iterable[Held]) -> list[Held]:
    """Holds in order of time, none beside another: while several hold the device, the largest loss counts.

    Collectives side by side do take more SMs than one of them, up to the sum. But profiles say what kernels lose beside
    one collective, and part of that, bandwidth and power, does not add up: the largest is what is known.
    """
    ordered = sorted(holds)
    if len(ordered) < 2:
        return ordered
    edges = sorted((time, ends, rate) for begin, end, rate in ordered for time, ends in ((begin, False), (end, True)))
    found: list[Held] = []
    rates: list[int] = []
    since = 0
    for time, ends, rate in edges:
        if rates and since < time:
            found.append((since, time, min(rates)))
        since = time
        if ends:
            rates.remove(rate)
        else:
            rates.append(rate)
    return found


def together(holds: Sequence[Held], paces: Sequence[Held]) -> list[Held]:
    """Holds, and the paces of a rank that is slow by itself for some time: both lose their share."""
    edges = sorted({time for begin, end, _ in (*holds, *paces) for time in (begin, end)})
    found: list[Held] = []
    for begin, end in pairwise(edges):
        rate = min([rate for since, until, rate in holds if since <= begin < until], default=PPM)
        for since, until, pace in paces:
            if since <= begin < until:
                rate = rate * pace // PPM
        if rate != PPM:
            found.append((begin, end, rate))
    return found


def work_through(now: int, duration: int, holds: Sequence[Held]) -> int:
    """The first picosecond in which a kernel is done that begins `now`: at full rate outside holds, at theirs inside.
    Holds are in order of time, and of one rate where they overlap.
    """
    remaining = duration * PPM
    for begin, end, rate in holds:
        if end <= now:
            continue
        if begin > now:
            if remaining <= (begin - now) * PPM:
                break
            remaining -= (begin - now) * PPM
            now = begin
        if remaining <= (end - now) * rate:
            return now - (-remaining // rate) if remaining else now
        remaining -= (end - now) * rate
        now = end
    return now - (-remaining // PPM)
