"""Collectives over nodes, composed of the curves of two levels.

Curves of the outer level are of one GPU per node, and the g ranks of a node divide among their adapters what leaves the
node. Rings run through all ranks; all-reduce may take a double binary tree over the nodes (Sanders et al. 2009; NCCL
2.4). Both pass data on in chunks, each hop storing one before it sends it on, which is what short messages wait for.
A hierarchical collective runs one in each node and one over the nodes after another (Thakur et al. 2005; Horovod).
`docs/model.md` has the formulas.
"""

from __future__ import annotations

from math import ceil, log2
from typing import Any, cast

import numpy as np

from spsim.costs.curves import Number
from spsim.costs.levels import LevelCost, least
from spsim.costs.seconds import larger, smaller
from spsim.program.placement import Collective, sent_bytes

TREE_CHUNKS = 4
"""Fewest chunks that a tree cuts an adapter's part into (NCCL `src/enqueue.cc`: it halves the chunk below that)."""


class Composed:
    """Times over the nodes of one profile."""

    def __init__(self, inner: LevelCost, outer: LevelCost, chunk: float) -> None:
        """`chunk`: bytes that the channels of one adapter pass on at a time."""
        self.inner = inner
        self.outer = outer
        self.chunk = chunk

    def ring(self, collective: Collective, message: Number, ranks: int, nodes: int) -> Number:
        """Rings through all ranks, one per adapter.

        Long messages keep all hops of both levels busy, and the slower level paces. A block of a short one
        goes round hop by hop, each of which stores it, or the first chunk of it, before it sends it on; a hop
        between nodes takes no less than one inside, for the same kernels drive it.
        """
        per_node = ranks // nodes
        wire = sent_bytes(collective, message, ranks)
        block = smaller(self.chunk * per_node * self.outer.level.share, message / ranks)
        times: list[Any] = []
        for inside in self.inner.allowed(collective, per_node, "ring"):
            for across in self.outer.allowed(collective, nodes, "ring"):
                start = min(inside.start, across.start)
                latency = inside.latency(ranks - nodes + 1) + across.latency(nodes) - start
                busy = latency + larger(inside.transfer(wire, per_node), across.transfer(wire / per_node, nodes))
                hop = inside.step(block)
                between = larger(hop, across.step(block / per_node))
                hops = inside.steps(ranks - nodes + 1) * hop + across.steps(nodes) * between
                times.append(larger(busy, start + hops))
        return cast("Number", least(times))

    def tree(self, message: Number, per_node: int, nodes: int, inside_by: str | None = None) -> Number:
        """All-reduce by a double binary tree over the nodes, in each by its switch (NVLS) or along a chain.

        An adapter sends its part up and down the tree, but on two nodes, each the root of half the data, once.
        The first chunk goes up and down node by node; then both levels move at once, and the slower one paces.
        """
        part = message / per_node
        chunk = smaller(self.chunk, part / TREE_CHUNKS)
        share = chunk / part if np.all(part) else 0.0 * part
        hops = self.tree_hops(nodes)
        times: list[Any] = []
        for inside in self.inner.allowed("all_reduce", per_node, inside_by):
            # Along a chain every GPU sends the sum up and the result down.
            chain = inside.curve.algorithm == "ring"
            wire = 2 * message if chain else sent_bytes("all_reduce", message, per_node)
            for across in self.outer.allowed("all_reduce", nodes, "ring"):
                first = inside.latency(per_node) + inside.transfer(share * wire, per_node) + hops * across.step(chunk)
                sent = part if nodes == 2 else 2 * part
                times.append(first + larger(inside.transfer(wire, per_node), across.transfer(sent, nodes)))
        return cast("Number", least(times))

    @staticmethod
    def tree_hops(nodes: int) -> int:
        """From node to node, up and down."""
        return 2 * ceil(log2(nodes))

    def all_to_all(self, message: Number, ranks: int, nodes: int) -> Number:
        """Parts for peers of the node and parts for other nodes at the same time, the latter by one adapter."""
        per_node = ranks // nodes
        part = message / ranks
        remote = ranks - per_node
        inside = [
            curve.latency(per_node) + curve.transfer(part * (per_node - 1), per_node)
            for curve in self.inner.allowed("all_to_all", per_node)
        ]
        across = [
            curve.latency(remote + 1) + curve.transfer(part * remote, nodes)
            for curve in self.outer.allowed("all_to_all", nodes)
        ]
        found: Number = larger(least(inside), least(across))
        return found

    def hierarchical(self, collective: Collective, message: Number, ranks: int, nodes: int) -> Number:
        """Within each node all of the message, and between them what one of its ranks has of it, one after the other:
        an all-reduce scatters the sums in the node, reduces them over the nodes and gathers them in the node.
        """
        per_node = ranks // nodes
        inside: Any = 0.0
        for part in _in_node(collective):
            inside = inside + self.inner.time(part, message, per_node)
        return cast("Number", inside + self.outer.time(collective, message // per_node, nodes))


def _in_node(collective: Collective) -> tuple[Collective, ...]:
    """What a hierarchical collective runs within a node."""
    return ("reduce_scatter", "all_gather") if collective == "all_reduce" else (collective,)
