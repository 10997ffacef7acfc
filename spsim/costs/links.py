"""Which links a group of ranks shares with others, and how long each is busy with what it sends.

In a node each GPU has a port to its switch, in and out; on a full mesh a link to each peer. Between nodes it has a
network adapter, or a part of one. Where switches of a level join only some of its GPUs or nodes, what they send each
other goes by uplinks. Rings pass bytes on from rank to rank, and between nodes from each adapter to one of the next
node, so that all ranks of a group send alike; pairwise exchanges go everywhere.

A link is busy for the bytes on it over the highest rate that curves of its level reach, protocol and all: that is what
two transfers on it can share.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

from spsim.costs.collectives import CommCost
from spsim.engine.flows import Use
from spsim.inputs.hardware import HardwareProfile, Level
from spsim.lazy import lazy
from spsim.program.mesh import Axis, Mesh
from spsim.program.placement import Collective, sent_bytes
from spsim.units import GB, PS_PER_S


class Port(NamedTuple):
    """One direction of a link."""

    level: str
    out: bool
    """From the GPU, or up."""
    place: Hashable
    """Which of its kind: the rank whose port it is; of an adapter, the first rank that uses it."""
    uplink: bool = False


class Sent(NamedTuple):
    """Bytes that each rank of a group sends over a level, and how."""

    inside: float
    """In its node."""
    across: float
    """Between nodes."""
    pairwise: bool = False
    """To all others alike, not around."""


Amount = int | Fraction


class Part(NamedTuple):
    """Of a link, in bytes that one rank sends over its level."""

    own: Amount
    """Of one group."""
    total: Amount
    """Of all groups that do the same."""


NOTHING = Part(0, 0)
Parts = dict[Port, Amount]
Ports = Mapping[Port, Part]
Edge = tuple[int, int]
"""From one rank to another."""


def sent(comm: CommCost, collective: Collective, message: float, ranks: int, nodes: int) -> Sent:
    """What each rank of a group sends of a message, by the algorithm that its library takes.

    Rings: the parts that leave a node are divided among its adapters. Trees: each node sends what it has up and down,
    on two nodes once. In-network reductions: a rank sends all of its data and its share of the result, once.
    """
    per_node = ranks // nodes
    if collective == "send_receive":
        return Sent(message, 0.0) if nodes == 1 else Sent(0.0, message)
    wire = float(sent_bytes(collective, message, ranks))
    if collective == "all_to_all":
        return Sent(message / ranks * (per_node - 1), message / ranks * (ranks - per_node), pairwise=True)
    algorithm = comm.algorithm(collective, int(message), ranks, nodes)
    if nodes == 1:
        return Sent(message * (1 + 1 / ranks) if algorithm == "nvls" else wire, 0.0)
    if collective != "all_reduce" or algorithm == "ring":
        return Sent(wire * (per_node - 1) / per_node, wire / per_node)
    inside = message * (1 + 1 / per_node) if algorithm == "nvls_tree" else 2 * message * (per_node - 1) / per_node
    return Sent(inside if per_node > 1 else 0.0, (1 if nodes == 2 else 2) * message / per_node)


@dataclass(frozen=True)
class Wiring:
    """The links of the ranks of a mesh, consecutive ranks on a node."""

    profile: HardwareProfile
    gpus_per_node: int
    """That are used."""

    @property
    def inner(self) -> Level:
        """The level of a node."""
        return self.profile.datasheet.topology[0]

    @lazy
    def outer(self) -> Level | None:
        """The level between nodes."""
        levels = self.profile.datasheet.topology
        return levels[1] if len(levels) > 1 else None

    def node(self, rank: int) -> int:
        """That a rank is on."""
        return rank // self.gpus_per_node

    def adapter(self, rank: int) -> int:
        """The first rank that uses the adapter of a rank."""
        sharing = self._sharing
        return rank - rank % self.gpus_per_node % sharing

    @lazy
    def _sharing(self) -> int:
        """GPUs that have one adapter together."""
        links = self.outer.links_per_gpu.value if self.outer else 1.0
        return max(1, round(1 / links))

    def leaf(self, level: Level, rank: int) -> Hashable:
        """Of the switches of a level the one that a rank is joined to."""
        joins = level.uplinks
        if joins is None:
            return None
        if level is self.inner:
            return self.node(rank), rank % self.gpus_per_node // joins.joins
        block = self.node(rank) // joins.joins
        return (block, self.adapter(rank) % self.gpus_per_node) if joins.rails else block

    def edge(self, source: int, target: int) -> Iterator[Port]:
        """Links from one rank to another."""
        inside = self.node(source) == self.node(target)
        level = self.inner if inside else self.outer
        if level is None:
            return
        if inside and level.kind == "full_mesh":
            yield Port(level.name, True, (source, target))
            return
        ends = (source, target) if inside else (self.adapter(source), self.adapter(target))
        yield Port(level.name, True, ends[0])
        yield Port(level.name, False, ends[1])
        leaves = self.leaf(level, source), self.leaf(level, target)
        if leaves[0] != leaves[1]:
            yield Port(level.name, True, leaves[0], uplink=True)
            yield Port(level.name, False, leaves[1], uplink=True)

    def around(self, group: Sequence[int]) -> Parts:
        """Of bytes that each rank sends over a level, those on each link: around the ranks of a node, and from each
        adapter to one of the next node; on a full mesh by all links of a node alike.
        """
        found: Parts = defaultdict(int)
        nodes = self._by_node(group)
        for own in nodes:
            if self.inner.kind == "full_mesh":
                self._everywhere(found, own, own)
            elif len(own) > 1:
                for place, rank in enumerate(own):
                    self._send(found, rank, own[(place + 1) % len(own)])
        for place, own in enumerate(nodes if len(nodes) > 1 else ()):
            for pair in zip(own, nodes[(place + 1) % len(nodes)], strict=True):
                self._send(found, *pair)
        return found

    def pairwise(self, group: Sequence[int]) -> Parts:
        """The same where each rank sends to all others alike."""
        found: Parts = defaultdict(int)
        for own in self._by_node(group):
            self._everywhere(found, own, own)
            self._everywhere(found, own, [rank for rank in group if self.node(rank) != self.node(own[0])])
        return found

    def one_way(self, source: int, target: int) -> Parts:
        """Of bytes that go from one rank to another, those on each link."""
        found: Parts = defaultdict(int)
        self._send(found, source, target)
        return found

    def _send(self, found: Parts, source: int, target: int, part: Amount = 1) -> None:
        for port in self.edge(source, target):
            found[port] += part

    def _everywhere(self, found: Parts, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Each source sends each other target an equal part."""
        for source in sources:
            others = [target for target in targets if target != source]
            for target in others:
                self._send(found, source, target, Fraction(1, len(others)))

    def _by_node(self, group: Sequence[int]) -> list[list[int]]:
        found: dict[int, list[int]] = defaultdict(list)
        for rank in sorted(group):
            found[self.node(rank)].append(rank)
        return [*found.values()]

    def busy_ps(self, port: Port, size: float) -> int:
        """Picoseconds for which a link is busy with some bytes."""
        level = self.inner if port.level == self.inner.name else self.outer
        assert level is not None
        return round(size / self._rates[level.name, port.uplink] * PS_PER_S)

    @lazy
    def _rates(self) -> dict[tuple[str, bool], float]:
        """Bytes a second of links of each level, and of its uplinks."""
        found = {}
        for level in self.profile.datasheet.topology:
            rate = _reached(self.profile, level)
            found[level.name, False] = rate / level.links_per_gpu.value if level.kind == "full_mesh" else rate
            if level.uplinks is not None:
                inside = level is self.inner
                below = 1.0 if inside or level.uplinks.rails else self.profile.gpus_per_node / self._sharing
                found[level.name, True] = rate * level.uplinks.joins * below / level.uplinks.oversubscription.value
        return found


def _reached(profile: HardwareProfile, level: Level) -> float:
    """The highest rate of a GPU's links that a curve of the level reaches; of the links, where it has none."""
    curves = profile.coefficients.collectives.get(level.name, {})
    rates = [rate for own in curves.values() for c in own if c.algorithm != "nvls" for _, rate in c.points]
    return max(rates) * GB if rates else level.bandwidth


class Routes:
    """The links of all groups of a mesh, by the ranks that are simulated for them.

    Links on which the same of these meet are one: all groups do the same at the same time, so that each of such links
    is as busy as the others. A group is on all links on which one that it stands for is.
    """

    def __init__(self, wiring: Wiring, world: Mesh, representative: Callable[[int], int] | None = None) -> None:
        """`representative` is the rank that is simulated for one; each by itself unless given."""
        self.wiring, self.world = wiring, world
        self.each = representative is None
        self.representative = representative or (lambda rank: rank)
        self._groups: dict[tuple[tuple[Axis, ...], bool], Mapping[Hashable, Ports]] = {}
        self._edges: dict[Hashable, Mapping[Hashable, Ports]] = {}
        self._ports: dict[Port, Port] = {}

    def group(self, axes: tuple[Axis, ...], simulated: frozenset[int], *, pairwise: bool) -> Ports:
        """Of the group along some axes of ranks that are simulated."""
        if (axes, pairwise) not in self._groups:
            lay = self.wiring.pairwise if pairwise else self.wiring.around
            groups = dict.fromkeys(self.world.groups(axes))
            every = ((frozenset(map(self.representative, own)), lay(own)) for own in groups)
            self._groups[axes, pairwise] = self._merged(every)
        return self._groups[axes, pairwise][simulated]

    def edge(self, kind: Hashable, edges: Callable[[], Iterable[Edge]], simulated: Edge) -> Ports:
        """Of an edge between ranks that are simulated; all of its kind are asked for once."""
        if kind not in self._edges:
            every = (
                ((self.representative(one), self.representative(other)), self.wiring.one_way(one, other))
                for one, other in edges()
            )
            self._edges[kind] = self._merged(every)
        return self._edges[kind][simulated]

    def links_of(self, ranks: Iterable[int], *, inside: bool) -> set[Port]:
        """Ports of some ranks in their node, or to and from their adapters, in both directions."""
        wiring = self.wiring
        level = wiring.inner if inside else wiring.outer
        if level is None:
            return set()
        if level.kind == "full_mesh":
            nodes = {rank: wiring.node(rank) * wiring.gpus_per_node for rank in ranks}
            pairs = ((one, first + n) for one, first in nodes.items() for n in range(wiring.gpus_per_node))
            both = (edge for one, other in pairs if one != other for edge in ((one, other), (other, one)))
            return {self._alike(port) for edge in both for port in wiring.edge(*edge)}
        places = {rank if inside else wiring.adapter(rank) for rank in ranks}
        return {self._alike(Port(level.name, out, place)) for place in places for out in (True, False)}

    def use(self, ports: Ports, sent: Sent) -> Use:
        """What a group that sends so much puts on links. Where GPUs share an adapter closed forms are those of all of
        them sending: alone a transfer has its part of it.
        """
        inner, outer = self.wiring.inner.name, self.wiring.outer
        share = outer.share if outer is not None else 1.0
        loads: dict[Hashable, int] = {}
        wire = 0
        for port, part in ports.items():
            size = sent.inside if port.level == inner else sent.across
            if size:
                own = self.wiring.busy_ps(port, size * float(part.own))
                loads[port] = round(own * Fraction(part.total) / part.own)
                alone = 0 if port.level == inner or port.uplink else round(self.wiring.busy_ps(port, size) / share)
                wire = max(wire, own, alone)
        return Use(wire, loads)

    def _merged(self, every: Iterable[tuple[Hashable, Parts]]) -> Mapping[Hashable, Ports]:
        """By what is simulated: what one group puts on its links, and all that it stands for."""
        whole: dict[Hashable, dict[Port, Part]] = defaultdict(dict)
        for name, parts in every:
            for port, part in parts.items():
                most, total = whole[name].get(port, NOTHING)
                whole[name][port] = Part(max(most, part), total + part)
        found: dict[Hashable, dict[Port, Part]] = defaultdict(dict)
        for name, ports in whole.items():
            for port, own in ports.items():
                alike = self._alike(port)
                known = found[name].get(alike, NOTHING)
                if known != own:
                    found[name][alike] = Part(max(own.own, known.own), max(own.total, known.total))
        return found

    def _alike(self, port: Port) -> Port:
        """The one that stands for all links on which the same simulated ranks meet."""
        if self.each:
            return port
        if port not in self._ports:
            self._ports[port] = port._replace(place=self._signature(port))
        return self._ports[port]

    def _signature(self, port: Port) -> Hashable:
        if isinstance(port.place, tuple) and not port.uplink:
            source, target = port.place
            apart = [a for a in self.world.axes if self.world.coordinate(source, a) != self.world.coordinate(target, a)]
            return self.representative(source), self.representative(target), tuple(apart)
        return self._ranks_on[port.level, port.uplink, port.place]

    @lazy
    def _ranks_on(self) -> dict[tuple[str, bool, Hashable], Hashable]:
        """Simulated ranks that each port, adapter and uplink stands for, and how many of each."""
        found: dict[tuple[str, bool, Hashable], Counter[int]] = defaultdict(Counter)
        for rank in range(self.world.ranks):
            own = self.representative(rank)
            for level in (self.wiring.inner, self.wiring.outer):
                if level is None:
                    continue
                place = rank if level is self.wiring.inner else self.wiring.adapter(rank)
                found[level.name, False, place][own] += 1
                if level.uplinks is not None:
                    found[level.name, True, self.wiring.leaf(level, rank)][own] += 1
        return {port: tuple(sorted(ranks.items())) for port, ranks in found.items()}
