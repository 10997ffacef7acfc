"""What follows the last micro-batch on the stages of a pipeline, for many workloads at once.

It is `Pipelined.closing` where nothing is summed or gathered behind passes: what meets both ends, and what meets all
stages, begins when the last of them has come to it.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from spsim.step.columns.replay import Times
from spsim.step.ending import Times as ClosingTimes

Number = int | Times
"""Picoseconds, of all workloads or of each."""


class Ends(NamedTuple):
    """Picoseconds for each workload."""

    end: Times
    """When the last stage has ended."""
    weight_sync: Times
    """Of the stage with most of it."""
    optimizer: Times
    """Of the stage that comes to it last."""


def ends_of(kinds: Sequence[Sequence[Part]], kind_of: Sequence[int], finished_ps: Times) -> Ends:
    """Of stages of some kinds, with what closes each, which have run their passes by then: a row for each stage, a
    column for each workload.
    """
    own = np.array(kind_of)
    rows = [_Row(parts, np.flatnonzero(own == kind), finished_ps) for kind, parts in enumerate(kinds)]
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
    """Of the stage that comes to it last; of several the one that takes longer, or the first."""
    begins, ends = np.full((2, *shape), -1)
    lengths = np.zeros(shape, np.int64)
    for row in rows:
        if row.optimizer is not None:
            begins[row.stages], ends[row.stages] = row.optimizer
            lengths[row.stages] = row.lengths["optimizer"]
    last = np.where(begins == begins.max(axis=0), ends, -2).argmax(axis=0)
    found: Times = lengths[last, np.arange(shape[1])]
    return found


class _Row:
    """The stages of one kind on their way through what closes a step."""

    def __init__(self, parts: Sequence[Part], stages: npt.NDArray[np.intp], finished_ps: Times) -> None:
        self.stages = stages
        self.cursor = finished_ps[stages]
        self.lengths = {phase: np.zeros_like(self.cursor) for phase in ("weight_sync", "optimizer")}
        self.optimizer: tuple[Times, Times] | None = None
        """When it begins, and when its first segment ends."""
        self._parts = parts
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
            if part.phase == "optimizer" and self.optimizer is None:
                self.optimizer = begin, self.cursor


class Part(NamedTuple):
    """Tasks of a segment one after another."""

    phase: str
    meets: str | None
    ends: bool
    """Whether it is the last of its segment."""
    ps: Number


Closings = Sequence[Sequence[Part]]
"""What closes the step on stages of each kind."""


def parts_of(times: ClosingTimes) -> list[Part]:
    """Tasks between meetings as one."""
    found: list[Part] = []
    for made, own in times:
        done = 0
        phase = made.segment.phase
        for place, axis in made.meetings:
            if place > done:
                found.append(Part(phase, None, ends=False, ps=sum(own[done:place])))
            found.append(Part(phase, axis, ends=place + 1 == len(own), ps=own[place]))
            done = place + 1
        if done < len(own):
            found.append(Part(phase, None, ends=True, ps=sum(own[done:])))
    return found


def order_of(closings: Closings) -> Hashable:
    """Equal of plans that close a step by the same tasks, whatever they take."""
    return tuple([tuple([part[:-1] for part in own]) for own in closings])


def joined(every: Sequence[Closings], lengths: Sequence[int]) -> Closings:
    """Those of several plans of one order, each of so many workloads."""
    return [
        [parts[0]._replace(ps=np.repeat([part.ps for part in parts], lengths)) for parts in zip(*kinds, strict=True)]
        for kinds in zip(*every, strict=True)
    ]
