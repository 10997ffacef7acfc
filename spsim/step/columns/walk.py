"""The walk over the itinerary of a step for many workloads at once, where each segment took what is known.

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
    layer: int = NO_LAYER
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


def nodes_of(
    items: Sequence[Item],
    leaves: Mapping[str, Sequence[Leaf]],
    size: Callable[[Segment, Sequence[int]], Floats | float],
) -> list[Node]:
    """The nodes of an itinerary, with the runs of each segment and the bytes of some of its buffers."""
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


def counts(nodes: Sequence[Node], times: Runs = 1) -> dict[int, Runs]:
    """How often each leaf runs in the step."""
    found: dict[int, Runs] = {}
    for node in nodes:
        if isinstance(node, Branch):
            found |= counts(node.body, times * node.runs)
        else:
            found[node.number] = times * node.runs
    return found


class Level(NamedTuple):
    """The memory of some nodes over what is there before them, for each workload."""

    highest: Floats
    leaf: Places | int
    """The number of the leaf in which it is highest,"""
    layer: Places | int
    """and the layer."""
    total: Floats
    """What is there after them."""


class Spots(NamedTuple):
    """For each workload one task of a step."""

    leaf: Places
    layer: Places
    """Below 0 for none."""
    task: Places
    """Its place in its pass."""


class Memory:
    """The memory of a step whose leaves are filled as known; those that are not do not change it."""

    def __init__(self, nodes: Sequence[Node], fills: Mapping[int, Fill]) -> None:
        self.fills = fills
        self.nodes = self._filled(nodes)

    def _filled(self, nodes: Sequence[Node]) -> list[Node]:
        return [node for node in nodes if isinstance(node, Branch) or node.number in self.fills]

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
            highest, layer = one.highest + base, one.layer
            if not (isinstance(node.runs, int) and node.runs == 1):
                last = (one.total > 0) * (node.runs - 1)
                highest = highest + last * one.total
                layer = layer + last * node.layers if node.layers else layer
            if found is None:
                found = Level(highest, one.leaf, layer, one.total)
            else:
                higher = highest > found.highest
                found = Level(
                    np.maximum(highest, found.highest),
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
            return self._level(self._filled(node.body))
        fill = self.fills[node.number]
        return Level(fill.highest, node.number, node.layer, fill.total)

    def fullest(self, level: Level) -> Spots:
        """Whose allocation makes memory highest."""
        shape = level.highest.shape
        leaf, layer = np.broadcast_to(level.leaf, shape), np.broadcast_to(level.layer, shape)
        task = np.zeros(shape, dtype=np.intp)
        for number, fill in self.fills.items():
            here = leaf == number
            if here.any():
                task[here] = fill.fullest[here]
        return Spots(leaf, layer, task)

    def first_above(self, room: Floats, asked: Points) -> Spots:
        """Whose allocation first takes more than `room` bytes, of the workloads that are asked for."""
        found = Spots(*(np.zeros(asked.shape, dtype=np.intp) for _ in range(3)))
        if asked.any():
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
            self._first_above(self._filled(node.body), room, asked, found)
            return
        found.leaf[asked], found.layer[asked] = node.number, node.layer
        found.task[asked] = self.fills[node.number].first_above(room)[asked]
