"""A rank that meets nobody: when each of its tasks runs follows from those before it, and the clock has to be waited
for by none.
"""

from __future__ import annotations

from spsim.engine.contention import Held, in_turn, rate_beside, work_through
from spsim.engine.recording import Moments
from spsim.engine.tasks import Durations, Need, RankProgram, Start


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
    for lane, tasks, last, needs, _, own, meetings, _ in program.in_turn or ():
        begin = free[lane]
        for need in needs:
            if ends[need] > begin:
                begin = ends[need]
        if meetings:
            end = begin + durations[last]
            found[last] = begin, begin, end
            holds.append((begin, end, rate if own is None else own))
            fresh = True
        else:
            if fresh:
                holds, fresh = ordered([hold for hold in holds if hold[1] > begin]), False
            end = begin
            for task in tasks:
                begin, end = end, work_through(end, durations[task], holds) if holds else end + durations[task]
                found[task] = begin, begin, end
        free[lane] = ends[last] = end
    return [found[task] for task in program.ids]
