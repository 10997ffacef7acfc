"""The walk over a step for many workloads at once, where each segment took what is known.

It is the walk of `folding` for passes that begin with all lanes free: one run of a loop is like all others. Of memory
it finds what `metrics` finds in a trace.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from spsim.step.columns.fill import Fill, Floats, Places
from spsim.step.columns.replay import Points
from spsim.step.itinerary import Item, Loop, Runs, Visit, segments_of
from spsim.step.segments import Segment

NO_LAYER = -(2**40)
"""Below 0, however many layers are added."""


class Leaf(NamedTuple):
    """Runs of a segment in a row, as they were written out."""

    number: int
    runs: Runs
    layer: int | Places = NO_LAYER
    brings: int | None = None
    """Which sum of bytes comes from outside, as of a visit,"""
    drops: int | None = None
    """and which is freed by none."""
    layers: int = 0


class Branch(NamedTuple):
    """What comes again and again."""

    body: Sequence[Leaf | Branch]
    runs: Runs
    layers: int = 0
    """From one run to the next."""
    brings: int | None = None
    drops: int | None = None


Node = Leaf | Branch


def nodes_of(
    items: Sequence[Item],
    leaves: Mapping[str, Sequence[Leaf]],
    size: Callable[[Segment, Sequence[int]], int],
) -> list[Node]:
    """The nodes of an itinerary, with the runs of each segment; `size` notes some of its buffers as a sum of bytes."""
    nodes: list[Node] = []
    for item in items:
        visit = item.body[0] if isinstance(item, Loop) else item
        if isinstance(visit, Visit) and (visit is item or len(leaves[visit.segment.name]) > 1):
            layer = NO_LAYER if visit.layer is None else visit.layer
            own: list[Node] = [leaf._replace(layer=layer) for leaf in leaves[visit.segment.name]]
        else:
            assert isinstance(item, Loop)
            own = [Branch(nodes_of(item.body, leaves, size), item.runs, item.layers)]
        if item.brings:
            own[0] = own[0]._replace(brings=size(next(segments_of([item])), item.brings))
        if item.drops:
            own[-1] = own[-1]._replace(drops=size([*segments_of([item])][-1], item.drops))
        nodes += own
    return nodes


class Level(NamedTuple):
    """How full memory is at its fullest in the runs of a leaf, for each workload."""

    leaf: int
    highest: Floats
    """Over what is there before: of runs that keep something that is in the last, otherwise in the first."""
    layer: Places | int


class Spots(NamedTuple):
    """For each workload one task of a step."""

    leaf: Places
    layer: Places
    """Below 0 for none."""
    task: Places
    """Its place in its pass."""


class Memory:
    """The memory of a step whose leaves are filled as known."""

    def __init__(self, nodes: Sequence[Node], fills: Sequence[Fill], sums: Floats) -> None:
        """`sums` of bytes that come from outside or are freed by none."""
        self.nodes = nodes
        self.fills = fills
        self.sums = sums
        self._levels, self.total = self._of(nodes)
        self._by_level: Floats = np.array(np.broadcast_arrays(*[level.highest for level in self._levels]))
        self.highest: Floats = self._by_level.max(axis=0)
        """The fullest level over what is there all the time; `total` is what is there after all."""

    def _of(self, nodes: Sequence[Node]) -> tuple[list[Level], Floats]:
        """Of some nodes over what is there before them, and what is there after them."""
        base: Floats | float = 0.0
        found: list[Level] = []
        for node in nodes:
            levels, total = self._one_run(node)
            over = base = base if node.brings is None else base + self.sums[node.brings]
            later: Places | int = 0
            if not (isinstance(node.runs, int) and node.runs == 1):
                more = node.runs - 1
                over = base + more * np.maximum(total, 0.0)
                later = (total > 0) * (more * node.layers) if node.layers else 0
                total = total * node.runs
            found += [Level(leaf, highest + over, layer + later) for leaf, highest, layer in levels]
            base = base + total if node.drops is None else base + total - self.sums[node.drops]
        return found, np.asarray(base)

    def _one_run(self, node: Node) -> tuple[list[Level], Floats]:
        """Of the first run of a node, without what it gets from outside."""
        if isinstance(node, Branch):
            return self._of(node.body)
        fill = self.fills[node.number]
        return [Level(node.number, fill.highest, node.layer)], fill.total

    def fullest(self) -> Spots:
        """Whose allocation makes memory highest: of equal levels the first counts."""
        shape = self.highest.shape
        found = Spots(*(np.zeros(shape, dtype=np.intp) for _ in range(3)))
        first = self._by_level.argmax(axis=0)
        for place in set(first.ravel().tolist()):
            leaf, _, layer = self._levels[place]
            here = first == place
            found.leaf[here] = leaf
            found.layer[here] = np.broadcast_to(layer, shape)[here]
            found.task[here] = np.broadcast_to(self.fills[leaf].fullest, shape)[here]
        return found

    def first_above(self, room: Floats, asked: Points) -> Spots:
        """Whose allocation first takes more than `room` bytes, of the workloads that are asked for."""
        found = Spots(*(np.zeros(asked.shape, dtype=np.intp) for _ in range(3)))
        if asked.any():
            self._first_above(self.nodes, room, asked, found)
        return found

    def _first_above(self, nodes: Sequence[Node], room: Floats, asked: Points, found: Spots) -> None:
        """Writes to `found` where it is asked for."""
        for node in nodes:
            levels, total = self._one_run(node)
            highest = np.maximum.reduce([level.highest for level in levels])
            room = room if node.brings is None else room - self.sums[node.brings]
            grows = total > 0
            run = np.where(grows, np.maximum(0, (room - highest) // np.where(grows, total, 1.0) + 1), 0.0)
            left = room - run * total
            here = asked & (run < node.runs) & (highest > left)
            if here.any():
                self._first_of_run(node, left, here, found)
                found.layer[here] += (run * node.layers).astype(np.intp)[here]
            asked = asked & ~here
            room = room - node.runs * total
            room = room if node.drops is None else room + self.sums[node.drops]

    def _first_of_run(self, node: Node, room: Floats, asked: Points, found: Spots) -> None:
        if isinstance(node, Branch):
            self._first_above(node.body, room, asked, found)
            return
        found.leaf[asked] = node.number
        found.layer[asked] = np.broadcast_to(node.layer, asked.shape)[asked]
        found.task[asked] = self.fills[node.number].first_above(room)[asked]
