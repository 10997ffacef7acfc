"""The walk over the itinerary of a step for many workloads at once, where each segment took what is known.

It is the walk of `folding` for passes that begin with all lanes free: one run of a loop is like all others. Of memory
it finds what `metrics` finds in a trace.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from spsim.step.columns.fill import Floats, Places
from spsim.step.columns.passes import Ran
from spsim.step.columns.replay import Points
from spsim.step.itinerary import Item, Loop, Runs, Visit, segments_of
from spsim.step.segments import Segment

NO_LAYER = -(2**40)
"""Below 0, however many layers are added."""


class Leaf(NamedTuple):
    """Runs of a segment in a row."""

    number: int
    runs: Runs
    layer: int
    brings: Floats | float = 0.0
    """Bytes that come from outside, as of a visit."""
    drops: Floats | float = 0.0
    layers: int = 0


class Branch(NamedTuple):
    """What comes again and again."""

    body: Sequence[Leaf | Branch]
    runs: Runs
    layers: int
    """From one run to the next."""
    brings: Floats | float = 0.0
    drops: Floats | float = 0.0


Node = Leaf | Branch


class Level(NamedTuple):
    """The memory of some nodes over what is there before them, for each workload."""

    highest: Floats
    leaf: Places
    """The number of the leaf in which it is highest,"""
    layer: Places
    """and the layer."""
    total: Floats
    """What is there after them."""


class Spots(NamedTuple):
    """For each workload one task of a step."""

    leaf: Places
    layer: Places
    """Below 0 for none."""
    task: Places
    """Its place in its segment."""


class Walk:
    """An itinerary whose segments ran as known."""

    def __init__(
        self, itinerary: Sequence[Item], ran: Mapping[str, Sequence[Ran]], sizes: Mapping[str, Floats]
    ) -> None:
        """`ran` has the runs in a pass of each segment by its name, `sizes` the bytes of its buffers."""
        self.ran = [run for runs in ran.values() for run in runs]
        self._numbers = {id(run): number for number, run in enumerate(self.ran)}
        self._of = ran
        self._sizes = sizes
        self.nodes = self._nodes(itinerary)

    # The tree

    def _nodes(self, items: Sequence[Item]) -> list[Node]:
        return [node for item in items for node in self._node(item)]

    def _node(self, item: Item) -> list[Node]:
        visit = item.body[0] if isinstance(item, Loop) else item
        if isinstance(item, Visit) or (isinstance(visit, Visit) and len(self._of[visit.segment.name]) > 1):
            assert isinstance(visit, Visit)
            layer = NO_LAYER if visit.layer is None else visit.layer
            runs = self._of[visit.segment.name]
            nodes: list[Node] = [Leaf(self._numbers[id(run)], run.runs, layer) for run in runs]
        else:
            nodes = [Branch(self._nodes(item.body), item.runs, item.layers)]
        segments = [*segments_of([item])]
        nodes[0] = nodes[0]._replace(brings=self._size(segments[0], item.brings))
        nodes[-1] = nodes[-1]._replace(drops=self._size(segments[-1], item.drops))
        return nodes

    def _size(self, segment: Segment, buffers: Sequence[int]) -> Floats | float:
        if not buffers:
            return 0.0
        size: Floats = self._sizes[segment.name][[*buffers]].sum(axis=0)
        return size

    # Times

    def counts(self) -> Iterator[tuple[Ran, Runs]]:
        """Each run of a segment, and how many of the step are like it."""
        return self._counts(self.nodes, 1)

    def _counts(self, nodes: Sequence[Node], times: Runs) -> Iterator[tuple[Ran, Runs]]:
        for node in nodes:
            if isinstance(node, Branch):
                yield from self._counts(node.body, times * node.runs)
            else:
                yield self.ran[node.number], times * node.runs

    # Memory

    @property
    def level(self) -> Level:
        """Of the whole step."""
        return self._level(self.nodes)

    def _level(self, nodes: Sequence[Node]) -> Level:
        """Of runs that keep something the last is the fullest, otherwise the first; of equal ones the first counts."""
        base: Floats | float = 0.0
        found: Level | None = None
        for node in nodes:
            one = self._one_run(node)
            base = base + node.brings
            last = np.where(one.total > 0, node.runs - 1, 0)
            highest = base + last * one.total + one.highest
            layer = one.layer + last * node.layers if node.layers else one.layer
            if found is None:
                found = Level(highest, one.leaf, layer, one.total)
            else:
                higher = highest > found.highest
                found = Level(
                    np.where(higher, highest, found.highest),
                    np.where(higher, one.leaf, found.leaf),
                    np.where(higher, layer, found.layer),
                    one.total,
                )
            base = base + node.runs * one.total - node.drops
        assert found is not None
        return found._replace(total=np.asarray(base))

    def _one_run(self, node: Node) -> Level:
        """Of the first run of a node, without what it gets from outside."""
        if isinstance(node, Branch):
            return self._level(node.body)
        fill = self.ran[node.number].fill
        number, layer = np.array([node.number]), np.array([node.layer])
        return Level(fill.highest, number, layer, fill.total)

    def first_above(self, room: Floats, asked: Points) -> Spots:
        """Whose allocation first takes more than `room` bytes, of the workloads that are asked for."""
        found = Spots(*(np.zeros(asked.shape, dtype=np.intp) for _ in range(3)))
        self._first_above(self.nodes, room, asked, found)
        return found

    def _first_above(self, nodes: Sequence[Node], room: Floats, asked: Points, found: Spots) -> None:
        """Writes to `found` where it is asked for."""
        for node in nodes:
            one = self._one_run(node)
            room = room - node.brings
            grows = one.total > 0
            run = np.where(grows, np.maximum(0, (room - one.highest) // np.where(grows, one.total, 1.0) + 1), 0.0)
            left = room - run * one.total
            here = asked & (run < node.runs) & (one.highest > left)
            if here.any():
                self._first_of_run(node, left, here, found)
                found.layer[here] += (run * node.layers).astype(np.intp)[here]
            asked = asked & ~here
            room = room - (node.runs * one.total - node.drops)

    def _first_of_run(self, node: Node, room: Floats, asked: Points, found: Spots) -> None:
        if isinstance(node, Branch):
            self._first_above(node.body, room, asked, found)
            return
        found.leaf[asked], found.layer[asked] = node.number, node.layer
        found.task[asked] = self.ran[node.number].fill.first_above(room)[asked]
