"""Memory of one rank over time: change by change while something is looked at, else as high as it gets.

A step of many layers and micro-batches changes its memory millions of times. Of runs that are shorter than what can be
seen the fullest moment says all; it is known from one of them, as the peak of the step is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from spsim.engine.pieces import STAY, Move, Node, Repeat
from spsim.engine.recording import MemoryChange
from spsim.engine.trace import Trace
from spsim.results.held import CATEGORIES, Holding, left_by_run
from spsim.results.metrics import Peak, profile_of_run

SEEN = 8
"""Multiples of the resolution that a run must last to be seen change by change."""
Window = tuple[int, int]
"""From one moment to another, in picoseconds."""


class Moment(NamedTuple):
    """What is held from one moment on."""

    time_ps: int
    sizes: Counter[str]
    """Bytes by category of what tasks allocate."""


def curve(trace: Trace, rank: int, windows: Sequence[Window], resolution_ps: int) -> list[Moment]:
    """What a rank holds, a moment each time that it changes, in some windows; beyond them runs that are shorter than
    the resolution are as high as the fullest of them.
    """
    holding = Holding(trace, rank)
    exact = [moment for window in (*windows, (trace.end_ps, trace.end_ps)) for moment in settled(holding, window)]
    whole = any(start <= 0 and trace.end_ps <= end for start, end in windows)
    seen = () if whole else _moments(holding, holding.nodes, resolution_ps, STAY)
    coarse = [moment for moment in seen if not any(start <= moment.time_ps <= end for start, end in windows)]
    return sorted(exact + coarse, key=lambda moment: moment.time_ps)


def over_time(
    trace: Trace, peak: Peak, static: Mapping[str, int], points: int
) -> tuple[list[int], dict[str, list[int]]]:
    """Moments in picoseconds, about so many as can be told apart and that of the peak among them, and from each on the
    bytes that the rank of the peak holds by category, with the `static` ones.
    """
    moments = curve(trace, peak.rank, [(peak.time_ps, peak.time_ps)], trace.end_ps // points)
    sizes = {
        category: [static.get(category, 0) + moment.sizes[category] for moment in moments]
        for category in dict.fromkeys((*static, *CATEGORIES))
    }
    return [moment.time_ps for moment in moments], sizes


def settled(holding: Holding, window: Window) -> Iterator[Moment]:
    """What a rank holds when the changes of each moment of a window have all happened."""
    start, _ = window
    held = holding.before(start)
    time = start
    for change, _ in changes_during(holding, window):
        if change.time_ps > time:
            yield Moment(time, held.copy())
            time = change.time_ps
        held[change.category] += change.bytes
    yield Moment(time, held)


def changes_during(holding: Holding, window: Window) -> list[tuple[MemoryChange, str]]:
    """Memory changes of a rank from the first to the last moment of a window, in order of time, what is freed before
    what is allocated; with the name of the operator.
    """
    start, end = window
    found = [
        (change, piece.recording.outline.labels[change.task - piece.first_task].name)
        for piece in holding.pieces_during(start - 1, end + 1)
        for change in piece.memory_of(holding.rank)
        if start <= change.time_ps <= end
    ]
    return sorted(found, key=lambda entry: (entry[0].time_ps, entry[0].bytes > 0))


def _moments(holding: Holding, nodes: Sequence[Node], resolution_ps: int, moved: Move) -> Iterator[Moment]:
    """Of runs that are long enough to be looked at each change, of the others the fullest moment."""
    for node in nodes:
        begin, end = node.window(0, moved)
        length = max(1, node.move.shift_ps, end - begin)
        if isinstance(node, Repeat) and length > resolution_ps:
            for index in range(node.runs):
                later = moved.after(node.move, index)
                yield from _moments(holding, [*node.run(index)], resolution_ps, later)
        elif length > SEEN * resolution_ps:
            for index in range(node.runs):
                yield from settled(holding, node.window(index, moved))
        else:
            yield from _fullest(holding, node, moved, max(1, resolution_ps // length))


def _fullest(holding: Holding, node: Node, moved: Move, together: int) -> Iterator[Moment]:
    """The fullest moment of every so many runs of a node. Runs differ by what one leaves behind; but for the first and
    the last what is held is counted from the second.
    """
    profile = profile_of_run(node, holding.rank)
    if profile is None:
        return
    left = left_by_run(node, holding.rank)
    firsts = range(0, node.runs, together)
    for place, first in enumerate(firsts):
        run = min(first + together, node.runs) - 1 if profile.total > 0 else first
        time = profile.time_ps + moved.after(node.move, run).shift_ps
        if place in (0, 1, len(firsts) - 1):
            known, held = run, holding.before(time + 1)
        yield Moment(time, Counter({name: held[name] + (run - known) * left[name] for name in CATEGORIES}))
