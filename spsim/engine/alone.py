"""A rank that meets nobody: when each of its tasks runs follows from those before it, and the clock has to be waited
for by none.
"""

from __future__ import annotations

from collections.abc import Sequence

from spsim.engine.contention import Held, in_turn, rate_beside, work_through
from spsim.engine.recording import Moments
from spsim.engine.tasks import Durations, Need, RankProgram, Run, Start


def run_alone(program: RankProgram, durations: Durations, start: Start, slowdown: float) -> list[Moments]:
    """When each task is posted, starts and ends, of a program that is `alone` and whose tasks wait for none of
    themselves.

    Communications come first of all whose turn it is, so that of a kernel all holds are known: what is posted later
    waits for it.
    """
    rate = rate_beside(slowdown)
    ends: dict[Need, int] = {name: start.ends.get(name, start.time) for name in program.names}
    free = {lane: start.free(lane) for lane in program.lanes}
    rates = {rate if own is None else own for own in program.rates}
    holds: list[Held] = [(begin, end, rate if own is None else rate_beside(own)) for begin, end, own in start.holds]
    ordered = sorted if len(rates | {own for *_, own in holds}) < 2 else in_turn
    fresh = bool(holds)
    found: dict[int, Moments] = {}
    for run in program.in_turn or ():
        begin = free[run.lane]
        for need in run.needs:
            begin = max(begin, ends[need])
        if run.meetings:
            end = begin + durations[run.last]
            found[run.last] = begin, begin, end
            holds.append((begin, end, rate if run.rate is None else run.rate))
            fresh = True
        else:
            if fresh:
                holds, fresh = ordered([hold for hold in holds if hold[1] > begin]), False
            end = _kernels(run, begin, durations, holds, found)
        free[run.lane] = ends[run.last] = end
    return [found[task] for task in program.ids]


def _kernels(
    run: Run,
    begin: int,
    durations: Durations,
    holds: Sequence[Held],
    found: dict[int, Moments],
) -> int:
    """Kernels in a row; when the last ends."""
    for task in run.tasks:
        end = work_through(begin, durations[task], holds) if holds else begin + durations[task]
        found[task] = begin, begin, end
        begin = end
    return begin
