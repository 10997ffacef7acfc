"""What the ranks of a pipeline wait for between their passes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from spsim.step.pipeline.orders import Numbers
from spsim.step.pipeline.tape import RUN, WAIT
from spsim.step.pipeline.timeline import Timeline


@dataclass(frozen=True)
class Waiting:
    """Waits of some length for one message each, in the order of each rank; an entry of each array for each."""

    timeline: Timeline
    ranks: Numbers
    lanes: Numbers
    """Of the messages, places in `Graph.lanes`."""
    parts: Numbers
    """0 before the rounds of the timeline, 1 in their first run, 2 after them."""
    begins_ps: Numbers
    ends_ps: Numbers
    posted_ps: Numbers
    """When the rank has posted the message that it waits for."""
    starts_ps: Numbers
    """When that is on its way."""

    @property
    def runs(self) -> Numbers:
        """How often each comes in the whole step."""
        rounds = self.timeline.rounds
        return np.where(self.parts == 1, rounds.runs if rounds else 1, 1)

    def totals(self) -> tuple[Numbers, Numbers]:
        """By rank in the whole step: picoseconds while the message is on its way, and before."""
        transfer = self.runs * (self.ends_ps - np.maximum(self.begins_ps, self.starts_ps))
        whole = self.runs * (self.ends_ps - self.begins_ps)
        number = len(self.timeline.graph.score.passes)
        found = np.zeros((2, number), np.int64)
        np.add.at(found[0], self.ranks, transfer)
        np.add.at(found[1], self.ranks, whole - transfer)
        return found[0], found[1]

    def written_out(self) -> Iterator[tuple[int, str, int, int, int, int]]:
        """Rank, kind of the message, begin, end, and when it was posted and started, of all waits of the step."""
        rounds = self.timeline.rounds
        again = range(rounds.runs) if rounds else range(1)
        moments = np.array([self.begins_ps, self.ends_ps, self.posted_ps, self.starts_ps])
        for part, runs in ((0, range(1)), (1, again), (2, again[-1:])):
            own = np.flatnonzero(self.parts == part)
            for run in runs:
                later = run * rounds.shift_ps if rounds else 0
                for place, times in zip(own.tolist(), (moments[:, own] + later).T.tolist(), strict=True):
                    kind = self.timeline.graph.lanes[self.lanes[place]][2]
                    yield int(self.ranks[place]), kind, *times


def waiting_of(timeline: Timeline) -> Waiting:
    """From the tapes of the ranks. A rank goes on at the latest end of what it has waited for and run."""
    messages, passes = timeline.messages, timeline.passes
    offsets = np.searchsorted(messages.lanes, np.arange(len(timeline.graph.lanes)))
    rounds = timeline.rounds
    bounds = [rounds.first, rounds.stop] if rounds else []
    found: list[tuple[Numbers, ...]] = []
    for rank, tape in enumerate(timeline.graph.score.tapes):
        runs, waits = tape.operations == RUN, tape.operations == WAIT
        number = offsets[tape.lanes] + tape.messages
        ends = np.zeros(len(runs), np.int64)
        ends[runs] = passes.ends_ps[passes.ranks == rank]
        ends[waits] = messages.ends_ps[number[waits]]
        free = np.concatenate([[0], np.maximum.accumulate(ends)[:-1]])
        own = np.flatnonzero(waits & (ends > free))
        sends = np.array([timeline.graph.lanes[lane][0] == rank for lane in tape.lanes[own]], np.bool_)
        places = number[own]
        posted = np.where(sends, messages.sender_posted_ps[places], messages.receiver_posted_ps[places])
        parts = np.searchsorted(bounds, np.cumsum(runs)[own], side="right") if bounds else np.zeros_like(own)
        found.append((
            np.full_like(own, rank), tape.lanes[own], parts, free[own], ends[own], posted, messages.starts_ps[places],
        ))  # fmt: skip
    return Waiting(timeline, *(np.concatenate(column) for column in zip(*found, strict=True)))
