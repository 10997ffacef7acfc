"""What a rank holds at the peak of its memory, by category: all that runs which have ended leave behind, and what those
under way have allocated so far.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate

from spsim.engine.pieces import STAY, Move, Node, Piece, Stretch, end_of, pieces_during, runs_during
from spsim.engine.trace import Trace
from spsim.results.metrics import Peak

CATEGORIES = ("activations", "communication buffers", "temporary", "gradients")
"""Of what tasks allocate."""


def held_at(peak: Peak, trace: Trace, static: Mapping[str, int]) -> dict[str, int]:
    """Bytes by category, with the `static` ones; categories of nothing are left out."""
    found = Counter[str]() if peak.task is None else Holding(trace, peak.rank).before(peak.time_ps + 1)
    sizes = {**static, **{category: static.get(category, 0) + found[category] for category in CATEGORIES}}
    return {category: size for category, size in sizes.items() if size}


class Holding:
    """What one rank holds at any moment of a step. What nodes that have ended leave behind is added up once: a step of
    many stages has a node for each pass of each.
    """

    def __init__(self, trace: Trace, rank: int) -> None:
        self.rank = rank
        self.nodes = [node for node in trace.nodes if _runs_on(node, rank)]
        self._ended = list(accumulate((end_of(node) for node in self.nodes), max))
        """When a node and all before it have ended."""
        begins = [node.window(0)[0] for node in self.nodes]
        self._begins = [*accumulate(reversed(begins), min)][::-1]
        """When a node or one behind it begins."""
        self._left = [Counter[str]()]
        for node in self.nodes:
            self._left.append(_sum(self._left[-1], _left(node, rank, node.runs)))

    def before(self, time_ps: int) -> Counter[str]:
        """Bytes by category of what tasks have allocated before a moment."""
        time = time_ps - 1
        ended = bisect_right(self._ended, time)
        found = self._left[ended].copy()
        for node in self.nodes[ended : bisect_right(self._begins, time)]:
            found.update(_held(node, self.rank, time, STAY))
        return found

    def pieces_during(self, start: int, end: int) -> Iterator[Piece]:
        """The pieces of the rank that are under way between two moments, in order."""
        for node in self.nodes[bisect_right(self._ended, start) : bisect_left(self._begins, end)]:
            yield from pieces_during(node, start, end)


def _runs_on(node: Node, rank: int) -> bool:
    if isinstance(node, Stretch):
        return rank in node.recording.times
    return any(_runs_on(inner, rank) for inner in node.body)


def _sum(one: Counter[str], other: Counter[str]) -> Counter[str]:
    """Of sizes that may be negative, which `+` leaves out."""
    found = one.copy()
    found.update(other)
    return found


def _held(node: Node, rank: int, time: int, moved: Move) -> Counter[str]:
    """Of what a node allocates, all that is there when everything has happened that happens at a time."""
    under_way = runs_during(node, time, time + 1, moved)
    found = _left(node, rank, under_way.start)
    for index in under_way:
        if isinstance(node, Stretch):
            for change in node.run(index, moved).memory_of(rank):
                if change.time_ps <= time:
                    found[change.category] += change.bytes
        else:
            for inner in node.run(index):
                found.update(_held(inner, rank, time, moved.after(node.move, index)))
    return found


def _left(node: Node, rank: int, runs: int) -> Counter[str]:
    """What the first runs of a node leave behind, so many of them."""
    found = Counter[str]()
    for category, size in left_by_run(node, rank).items():
        found[category] = runs * size
    first, last = node.ends
    if runs:
        found.update(_sizes(first, rank, node.brings))
    if runs == node.runs:
        found.subtract(_sizes(last, rank, node.drops))
    return found


def left_by_run(node: Node, rank: int) -> Counter[str]:
    """What one run of a node leaves behind, without what it gets from outside."""
    found = Counter[str]()
    if not isinstance(node, Stretch):
        for inner in node.body:
            found.update(_left(inner, rank, inner.runs))
    else:
        found.update(node.recording.left_behind.get(rank, {}))
    return found


def _sizes(stretch: Stretch, rank: int, buffers: Sequence[int]) -> Counter[str]:
    """Bytes of some buffers of a stretch, if the rank runs it."""
    found = Counter[str]()
    recording = stretch.recording
    for buffer in buffers if rank in recording.times else ():
        found[recording.outline.buffers[buffer].category] += int(recording.sizes[buffer])
    return found
