"""When the stages of many plans have run their passes, whose schedules differ in the number of micro-batches only."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from spsim.step.columns.fill import Floats, Places
from spsim.step.pipeline.clock import Clock
from spsim.step.pipeline.many import Totals
from spsim.step.pipeline.orders import Numbers

FEW = 2
"""Steps that are looked up, or gone through, one by one."""


class Asked(NamedTuple):
    """The steps of some plans."""

    pass_ps: Floats
    """Of forward and backward passes, by sort of chunk and step."""
    chunks: Numbers
    """The sort of each chunk of each stage."""
    message_ps: Numbers
    """Of messages within a node and between two, for each step."""
    nodes: Numbers
    """By lane, and in a column for each pattern: 0 where its messages stay within a node, 1 where they do not."""
    patterns: Places
    """Which of them each step has."""
    micro_batches: Numbers

    def of(self, columns: Places) -> Asked:
        """Some of the steps."""
        return self._replace(
            pass_ps=self.pass_ps[..., columns], message_ps=self.message_ps[:, columns],
            patterns=self.patterns[columns], micro_batches=self.micro_batches[columns],
        )  # fmt: skip

    def durations(self, clock: Clock) -> tuple[Numbers, Numbers]:
        """Picoseconds by class of passes and by lane of a clock, a column for each step."""
        ranks, own, backward = clock.pass_classes.columns
        passes = self.pass_ps[backward, self.chunks[ranks, own]].astype(np.int64)
        messages = np.where(self.nodes[:, self.patterns], self.message_ps[1], self.message_ps[0])
        return passes, messages

    @property
    def different(self) -> tuple[Places, Places]:
        """Steps of which no two have the same passes and messages, and which of them each step is like."""
        every = [*self.pass_ps.reshape(-1, len(self.patterns)), *self.message_ps, self.patterns]
        rows = np.array(every, dtype=np.float64).T
        places: dict[bytes, int] = {}
        like = np.array([places.setdefault(row.tobytes(), len(places)) for row in np.ascontiguousarray(rows)])
        return np.unique(like, return_index=True)[1], like


def totals(asked: Asked, clock_of: Callable[[int], Clock]) -> Totals:
    """When the stages of each step are done, and how long they wait for transfers between passes."""
    every, which = np.unique(asked.micro_batches, return_inverse=True)
    clocks = [clock_of(number) for number in every.tolist()]
    which = which.reshape(-1)
    shape = clocks[0].stages, len(which)
    found = Totals(np.empty(shape, np.int64), np.empty(shape, np.int64))
    structures = np.array([id(clock.structure) for clock in clocks])[which]
    for structure in dict.fromkeys(structures.tolist()):
        columns = np.flatnonzero(structures == structure)
        own = _of_structure(asked.of(columns), [clocks[place] for place in which[columns]])
        found.finished[:, columns], found.transfer[:, columns] = own
    return found


def _of_structure(asked: Asked, clocks: list[Clock]) -> Totals:
    """Of steps whose clocks have one structure."""
    clock = clocks[0]
    left = np.arange(len(clocks))
    rounds = np.array([own.more_rounds for own in clocks])
    found = Totals(*np.empty((2, clock.stages, len(clocks)), np.int64))
    different, like = asked.different
    if len(different) > FEW and clock.structure.steps.are_covered:
        passes, messages = asked.of(different).durations(clock)
        short = clock.structure.steps.short(np.concatenate([passes, messages, np.zeros_like(messages[:1])]))
        found = short.longer(like, rounds)
        left = np.flatnonzero(~short.steady[like] & (rounds > 0))
    for column in left.tolist():
        passes, messages = asked.of(np.array([column])).durations(clock)
        found.finished[:, column], found.transfer[:, column] = clocks[column].totals(passes[:, 0], messages[:, 0])
    return found
