"""Simulates plans in the order of their least step, until none that is left can be among the best or on the front.

A plan is left out where its bounds show that it does not fit, or that it is neither one of the best nor on the front of
time and memory: so many that were simulated have a shorter step than it can have, and one of these takes no more memory
than it must. What is found is what simulating every plan would find.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from itertools import islice
from typing import Any

from spsim.studies.search.candidates import Candidate, Given
from spsim.studies.sweeps import sweep
from spsim.units import MS_PER_S

ROUND = 32
"""Plans that are simulated before what is left is looked at again."""
Row = dict[str, Any]


class Standing:
    """What has been found so far: the best steps, and the front of time and memory."""

    def __init__(self, best: int) -> None:
        """Of so many best."""
        self.best = best
        self._steps: list[float] = []
        """Of what fits, seconds in order."""
        self._front: list[tuple[float, float]] = []
        """(step, memory) of which none is beaten in both, in order of the step: memory falls."""

    def add(self, step_s: float, memory_gib: float) -> None:
        """A plan that fits."""
        insort(self._steps, step_s)
        if self._least_memory(step_s) > memory_gib:
            kept = [(step, memory) for step, memory in self._front if step < step_s or memory < memory_gib]
            self._front = sorted([*kept, (step_s, memory_gib)])

    def excludes(self, candidate: Candidate) -> bool:
        """Whether a plan is neither one of the best nor on the front, whatever it comes to."""
        full = len(self._steps) >= self.best and self._steps[self.best - 1] < candidate.step_s
        return full and self._least_memory(candidate.step_s) <= candidate.memory_gib

    def _least_memory(self, step_s: float) -> float:
        """Of all with at most that step."""
        place = bisect_right(self._front, (step_s, float("inf")))
        return self._front[place - 1][1] if place else float("inf")


def simulated(
    every: Sequence[Candidate], room_gib: float, hardware: Given, best: int, executor: Executor | None
) -> dict[int, Row]:
    """Rows of those plans that had to be simulated, by place."""
    left = sorted(
        (place for place, own in enumerate(every) if own.memory_gib <= room_gib),
        key=lambda place: (every[place].step_s, every[place].memory_gib, place),
    )
    standing = Standing(best)
    rows: dict[int, Row] = {}
    while places := [*islice(_open(left, every, standing), ROUND)]:
        for place, row in zip(places, rows_of([every[place] for place in places], hardware, executor), strict=True):
            rows[place] = row
            if fits(row):
                standing.add(row["step_time_ms"] / MS_PER_S, row["device_memory_gib"])
        left = [place for place in left if place not in rows]
    return rows


def _open(left: Sequence[int], every: Sequence[Candidate], standing: Standing) -> Iterator[int]:
    """Those that are not excluded."""
    return (place for place in left if not standing.excludes(every[place]))


def fits(row: Row) -> bool:
    """Whether a plan was simulated, and fits."""
    return row["error"] == "" and bool(row["fits"])


def rows_of(plans: Sequence[Candidate], hardware: Given, executor: Executor | None) -> list[Row]:
    """Rows of a sweep of some plans."""
    frame = sweep([plan.point(hardware) for plan in plans], executor)
    return [{str(name): value for name, value in row.items()} for row in frame.to_dict("records")]
