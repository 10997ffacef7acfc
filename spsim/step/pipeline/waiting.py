"""When the ranks of a pipeline run no pass, and what of theirs is on its way meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from spsim.step.pipeline.messages import Lane
from spsim.step.pipeline.orders import Numbers
from spsim.step.pipeline.timeline import MessageSpans, PassSpans, Timeline, joined

WRITTEN_OUT = 5
"""Runs of what comes again, of which the one in the middle stands for those that are left out: a message is posted in
a run next to that in which it travels.
"""


@dataclass(frozen=True)
class Gaps:
    """Times without a pass, in order of each rank; an entry of each array for each."""

    ranks: Numbers
    begins_ps: Numbers
    ends_ps: Numbers
    runs: Numbers
    """How often each comes in the step."""
    transfer_ps: Numbers
    """While a message of the rank is on its way,"""
    posted_ps: Numbers
    """and while none is, but one is posted that the other side has not come to."""

    def totals(self, number: int) -> tuple[list[int], list[int], list[int]]:
        """By rank in the whole step: picoseconds of transfer, of messages that are posted, and of neither."""
        rest = self.ends_ps - self.begins_ps - self.transfer_ps - self.posted_ps
        found = np.zeros((3, number), np.int64)
        for row, lengths in zip(found, (self.transfer_ps, self.posted_ps, rest), strict=True):
            np.add.at(row, self.ranks, self.runs * lengths)
        transfer, posted, neither = found.tolist()
        return transfer, posted, neither


def gaps_of(timeline: Timeline) -> Gaps:
    """Of the step, what comes again a few times only. All ranks are looked at together, each on a clock behind those
    of the ranks before it.
    """
    passes, messages, runs, left_out_ps = _shortened(timeline)
    sides = _sides(messages, timeline.graph.lanes)
    finished = timeline.finished_ps - left_out_ps
    number = np.arange(len(finished))
    clock = number * (1 + max(finished.max(), sides.ends_ps.max(initial=0)))
    first, last = (np.searchsorted(passes.ranks, number, side) for side in ("left", "right"))
    begins = np.insert(passes.ends_ps + clock[passes.ranks], first, clock)
    ends = np.insert(passes.starts_ps + clock[passes.ranks], last, finished + clock)
    ranks, often = np.insert(passes.ranks, last, number), np.insert(runs, last, 1)
    gap = ends > begins
    ranks, begins, ends, often = ranks[gap], begins[gap], ends[gap], often[gap]
    posted, starts, stops = (times + clock[sides.ranks] for times in (sides.posted_ps, sides.starts_ps, sides.ends_ps))
    transfer = _covered(starts, stops, begins, ends)
    busy = _covered(np.minimum(posted, starts), stops, begins, ends)
    return Gaps(ranks, begins - clock[ranks], ends - clock[ranks], often, transfer, busy - transfer)


@dataclass(frozen=True)
class Sides:
    """Messages on each of their two ranks."""

    ranks: Numbers
    lanes: Numbers
    posted_ps: Numbers
    starts_ps: Numbers
    ends_ps: Numbers


def _sides(messages: MessageSpans, lanes: tuple[Lane, ...]) -> Sides:
    ranks = np.array([lane[:2] for lane in lanes], np.int64).reshape(-1, 2)[messages.lanes].T
    return Sides(
        ranks.ravel(),
        np.tile(messages.lanes, 2),
        np.concatenate([messages.sender_posted_ps, messages.receiver_posted_ps]),
        np.tile(messages.starts_ps, 2),
        np.tile(messages.ends_ps, 2),
    )


def _covered(starts: Numbers, stops: Numbers, begins: Numbers, ends: Numbers) -> Numbers:
    """How much of each of some times lies in any of some spans."""
    if not len(starts):
        return np.zeros_like(begins)
    order = np.argsort(starts, kind="stable")
    starts, stops = starts[order], np.maximum.accumulate(stops[order])
    starts = np.maximum(starts, np.append(starts[0], stops[:-1]))
    sums = np.append(0, np.cumsum(np.maximum(stops - starts, 0)))

    def before(times: Numbers) -> Numbers:
        """How much of the spans lies before each moment."""
        place = np.searchsorted(starts, times, side="right")
        last = np.maximum(place - 1, 0)
        within: Numbers = sums[last] + np.clip(times - starts[last], 0, np.maximum(stops[last] - starts[last], 0))
        return np.where(place > 0, within, 0)

    found: Numbers = before(ends) - before(begins)
    return found


def _shortened(timeline: Timeline) -> tuple[PassSpans, MessageSpans, Numbers, int]:
    """Passes in order of each rank and messages, on a clock that leaves out what comes again and again; how often each
    pass comes, and how much is left out.
    """
    spans, weights, left_out_ps = [], [], 0
    for section in timeline.sections:
        written = min(section.runs, WRITTEN_OUT)
        for run in range(written):
            spans.append(section.later(run * section.micro_batches, run * section.shift_ps - left_out_ps))
            weights.append(1 + section.runs - written if run == written // 2 else 1)
        left_out_ps += (section.runs - written) * section.shift_ps
    kinds = [own.passes for own in spans]
    weight = np.concatenate([np.full(len(own.ranks), each) for own, each in zip(kinds, weights, strict=True)])
    order = np.argsort(np.concatenate([own.ranks for own in kinds]), kind="stable")
    whole = joined(spans)
    return whole.passes, whole.messages, weight[order], left_out_ps


def waits_of(timeline: Timeline) -> Iterator[tuple[int, int, int, list[tuple[str, int, int, int]]]]:
    """Rank, begin and end of each gap of the step, with the messages of the rank that are under way then: kind, and
    when each is posted, starts and ends.
    """
    whole = joined([own for section in timeline.sections for own in section.written_out()])
    sides = _sides(whole.messages, timeline.graph.lanes)
    for rank, finished in enumerate(timeline.finished_ps.tolist()):
        own, places = whole.passes.ranks == rank, np.flatnonzero(sides.ranks == rank)
        ends, begins = [*whole.passes.starts_ps[own].tolist(), finished], [0, *whole.passes.ends_ps[own].tolist()]
        for begin, end in zip(begins, ends, strict=True):
            if end > begin:
                there = places[(sides.posted_ps[places] < end) & (sides.ends_ps[places] > begin)]
                kinds = [timeline.graph.lanes[lane][2] for lane in sides.lanes[there]]
                times = (column[there].tolist() for column in (sides.posted_ps, sides.starts_ps, sides.ends_ps))
                yield rank, begin, end, [*zip(kinds, *times, strict=True)]
