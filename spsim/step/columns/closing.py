"""What follows the last micro-batch on the stages of a pipeline, for many workloads at once.

It is `Pipelined.closing` where nothing is summed or gathered behind passes: what meets both ends, and what meets all
stages, begins when the last of them has come to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from spsim.step.columns.replay import Times
from spsim.step.ending import Times as ClosingTimes


class Ends(NamedTuple):
    """Picoseconds for each workload."""

    end: Times
    """When the last stage has ended."""
    weight_sync: Times
    """Of the stage with most of it."""
    optimizer: Times
    """Of the stage that comes to it last."""


def ends_of(kinds: Sequence[ClosingTimes], kind_of: Sequence[int], finished_ps: Times) -> Ends:
    """Of stages of some kinds, with the times of what closes each, which have run their passes by then: a row for each
    stage, a column for each workload.
    """
    own = np.array(kind_of)
    rows = [_Row(times, np.flatnonzero(own == kind), finished_ps) for kind, times in enumerate(kinds)]
    while any(row.left for row in rows):
        for row in rows:
            row.go_on()
        waiting = [row for row in rows if row.left]
        together = [row for row in waiting if row.meets == "embedding"] or waiting
        start = np.max([row.cursor.max(axis=0) for row in together], axis=0) if together else None
        for row in together:
            row.meet(start)
    end = np.max([row.cursor.max(axis=0) for row in rows], axis=0)
    sync = np.max([row.lengths["weight_sync"].max(axis=0) for row in rows], axis=0)
    return Ends(end, sync, _optimizer(rows, np.shape(finished_ps)))


def _optimizer(rows: Sequence[_Row], shape: tuple[int, ...]) -> Times:
    """Of the first of the stages that come to it last."""
    begins, lengths = np.full(shape, -1), np.zeros(shape, np.int64)
    for row in rows:
        if row.optimizer_begins is not None:
            begins[row.stages], lengths[row.stages] = row.optimizer_begins, row.lengths["optimizer"]
    found: Times = lengths[begins.argmax(axis=0), np.arange(shape[1])]
    return found


class _Row:
    """The stages of one kind on their way through what closes a step."""

    def __init__(self, times: ClosingTimes, stages: npt.NDArray[np.intp], finished_ps: Times) -> None:
        self.stages = stages
        self.cursor = finished_ps[stages]
        self.lengths = {phase: np.zeros_like(self.cursor) for phase in ("weight_sync", "optimizer")}
        self.optimizer_begins: Times | None = None
        self._parts = [*_parts(times)]
        self._place = 0
        self._begin: Times | None = None
        """Of the segment that is under way."""

    @property
    def left(self) -> bool:
        """Whether anything is to come."""
        return self._place < len(self._parts)

    @property
    def meets(self) -> str | None:
        """Along what the next part meets other stages."""
        return self._parts[self._place].meets

    def go_on(self) -> None:
        """Up to what waits for others."""
        while self.left and self.meets is None:
            self._run(self.cursor)

    def meet(self, start: Times | None) -> None:
        """What waits for others, which have come to it by then."""
        self._run(np.broadcast_to(start, self.cursor.shape))  # type: ignore[arg-type]

    def _run(self, start: Times) -> None:
        part = self._parts[self._place]
        self._place += 1
        begin = self.cursor if self._begin is None else self._begin
        self.cursor = start + part.ps
        self._begin = None if part.ends else begin
        if part.ends:
            self.lengths[part.phase] += self.cursor - begin
            if part.phase == "optimizer" and self.optimizer_begins is None:
                self.optimizer_begins = begin


class _Part(NamedTuple):
    """Tasks of a segment one after another."""

    phase: str
    ps: int
    meets: str | None
    ends: bool
    """Whether it is the last of its segment."""


def _parts(times: ClosingTimes) -> list[_Part]:
    """Tasks between meetings as one."""
    found: list[_Part] = []
    for made, own in times:
        done = 0
        phase = made.segment.phase
        for place, axis in made.meetings:
            if place > done:
                found.append(_Part(phase, sum(own[done:place]), None, ends=False))
            found.append(_Part(phase, own[place], axis, ends=place + 1 == len(own)))
            done = place + 1
        if done < len(own):
            found.append(_Part(phase, sum(own[done:]), None, ends=True))
    return found
