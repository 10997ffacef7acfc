"""Closed forms of collectives from measured curves, over one or two levels of the topology.

A curve is measured at some number of ranks. For another number, and between sizes, two rules carry it over:
the latency changes by a constant per step of the algorithm, and equal bytes on the wire of one rank take
equal time beyond the latency (on eight H100 an all-gather of S moves as an all-reduce of S/2 by the ring).
On a full mesh, where n ranks use n-1 links each, it is equal bytes per link. Between sizes the time is
interpolated linearly in bytes; below the smallest it is the latency, above the largest the last bandwidth
holds. Algorithms compete, and the fastest that the number of ranks allows wins.

Steps: ring all-reduce 2(n-1), ring all-gather and reduce-scatter n-1, pairwise all-to-all n-1, in-network
reduction (NVLS) and send-receive 1 (Thakur et al. 2005; NCCL).

Across nodes each GPU has its own network adapter: curves of the outer level are of one GPU per node, and the
g ranks of a node divide among their adapters what leaves the node. Rings run through all ranks; all-reduce may
take a double binary tree over the nodes (Sanders et al. 2009; NCCL 2.4). Both pass data on in chunks, each hop
storing one before it sends it on, which is what short messages wait for. `docs/model.md` has the formulas.

Messages are numbers, or arrays of them for many workloads at once.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from functools import cached_property
from math import ceil, log2
from typing import Any, TypeVar, cast

import numpy as np
import numpy.typing as npt

from spsim.costs.sends import SendTime
from spsim.errors import InputError
from spsim.inputs.hardware import CollectiveCurve, HardwareProfile, Level
from spsim.program.placement import Collective, sent_bytes
from spsim.units import GB, MIB, US_PER_S

Floats = npt.NDArray[np.float64]
Number = TypeVar("Number", float, npt.NDArray[Any])
"""Bytes or seconds, or an array of them."""

CHUNKED = ("all_reduce", "all_gather", "reduce_scatter")
"""Collectives that pass data on from rank to rank, chunk by chunk."""

TREE_CHUNKS = 4
"""Fewest chunks that a tree cuts an adapter's part into (NCCL `src/enqueue.cc`: it halves the chunk below that)."""


def algorithm_steps(algorithm: str, collective: Collective, ranks: int) -> int:
    """Steps of an algorithm, each of which pays the step latency."""
    if algorithm in ("nvls", "send_receive"):
        return 1
    return 2 * (ranks - 1) if collective == "all_reduce" else ranks - 1


def _least(times: Sequence[Number]) -> Number:
    """The smallest, place by place of arrays."""
    least: Number = np.minimum.reduce(times) if isinstance(times[0], np.ndarray) else min(times)
    return least


def _at_most(limit: float, size: Number) -> Number:
    least: Number = np.minimum(limit, size) if isinstance(size, np.ndarray) else min(limit, size)
    return least


def _longer(one: Number, other: Number) -> Number:
    longer: Number = np.maximum(one, other) if isinstance(one, np.ndarray) else max(one, other)
    return longer


class CurveTime:
    """Time of one collective by one algorithm, as a function of message size and ranks."""

    def __init__(self, curve: CollectiveCurve, collective: Collective, *, full_mesh: bool = False) -> None:
        self.curve = curve
        self.collective = collective
        self.full_mesh = full_mesh and collective != "send_receive"
        self._latencies: dict[int, float] = {}
        self._wire: list[float] = [0.0]
        """Where the lines begin that its time follows: bytes on the wire."""
        self._lines: list[tuple[float, float, float, float]] = []
        """Of each, bytes and seconds where it begins, and seconds by how many bytes it rises."""
        latency, before = curve.latency_us / US_PER_S, 0.0
        for message, bandwidth in curve.points:
            wire = sent_bytes(collective, int(message), curve.ranks)
            time = max(before, wire / (bandwidth * GB) - latency)
            self._lines.append((self._wire[-1], before, time - before, wire - self._wire[-1]))
            self._wire.append(wire)
            before = time
        self._lines.append((self._wire[-1], before, 1.0, curve.points[-1][1] * GB))

    def __call__(self, message: Number, ranks: int) -> Number:
        """Seconds for a message of the size that nccl-tests would name."""
        wire = sent_bytes(self.collective, message, ranks)
        return self.latency(ranks) + self.transfer(wire, ranks)

    def allows(self, ranks: int) -> bool:
        """Whether the algorithm serves, and the measurement describes, a group of so many ranks."""
        return self.curve.min_ranks <= ranks <= (self.curve.max_ranks or ranks)

    def latency(self, ranks: int) -> float:
        """Time of the smallest messages: measured, plus or minus the steps that differ; never negative."""
        if ranks not in self._latencies:
            curve = self.curve
            steps = self.steps(ranks) - self.steps(curve.ranks)
            self._latencies[ranks] = max(0.0, curve.latency_us + steps * curve.step_latency_us) / US_PER_S
        return self._latencies[ranks]

    @property
    def start(self) -> float:
        """Seconds of the latency that no step accounts for."""
        return self.latency(1)

    def steps(self, ranks: int) -> int:
        """Steps that the algorithm takes among so many ranks."""
        return algorithm_steps(self.curve.algorithm, self.collective, ranks)

    def step(self, block: Number) -> Number:
        """Seconds of one step of a ring that sends `block` bytes: the share of a step in the measured time."""
        ranks = self.curve.ranks
        whole = block * ranks // 1
        return (self(whole, ranks) - self.start) / self.steps(ranks)

    def transfer(self, wire: Number, ranks: int) -> Number:
        """Seconds beyond the latency for bytes that one rank sends."""
        if self.full_mesh:
            wire = wire * ((self.curve.ranks - 1) / (ranks - 1))
        if isinstance(wire, np.ndarray):
            begins, lines = self._arrays
            wire = wire.astype(np.float64, copy=False)
            begin, start, seconds, size = lines.take(begins.searchsorted(wire, side="right") - 1, axis=1)
        else:
            begin, start, seconds, size = self._lines[bisect_right(self._wire, wire) - 1]
        time: Number = start + seconds * (wire - begin) / size
        return time

    @cached_property
    def _arrays(self) -> tuple[Floats, Floats]:
        return np.array(self._wire), np.array(self._lines).T.copy()


class LevelCost:
    """The curves of one level of the topology."""

    def __init__(self, profile: HardwareProfile, level: Level) -> None:
        self.profile = profile
        self.name = level.name
        self._allowed: dict[tuple[Collective, int, str | None], list[CurveTime]] = {}
        table = profile.coefficients.collectives.get(level.name, {})
        mesh = level.kind == "full_mesh"
        sends = profile.coefficients.sends.get(level.name)
        self.sends = SendTime(sends, level.bandwidth) if sends else None
        self.curves = {
            name: [CurveTime(curve, name, full_mesh=mesh) for curve in curves] for name, curves in table.items()
        }

    def time(self, collective: Collective, message: Number, ranks: int, sends: int = 1) -> Number:
        """Seconds by the fastest algorithm that the number of ranks allows, of so many sends in one group call: a curve
        knows their bytes only.
        """
        if collective == "send_receive" and self.sends:
            return cast("Number", self.sends(message, ranks, sends=sends))
        return _least([curve(sends * message, ranks) for curve in self.allowed(collective, ranks)])

    def path(self, collective: Collective) -> str:
        """Dotted path of the coefficients of one collective."""
        if collective == "send_receive" and self.sends:
            return f"sends.{self.name}"
        return f"collectives.{self.name}.{collective}"

    def fastest(self, collective: Collective, message: float, ranks: int) -> CurveTime:
        """The curve that `time` is of."""
        return min(self.allowed(collective, ranks), key=lambda curve: curve(message, ranks))

    def allowed(self, collective: Collective, ranks: int, algorithm: str | None = None) -> list[CurveTime]:
        """Curves, of one algorithm or all, that so many ranks may use; `InputError` where there is none."""
        key = (collective, ranks, algorithm)
        if key not in self._allowed:
            self._allowed[key] = [
                curve
                for curve in self.curves.get(collective, ())
                if curve.allows(ranks) and algorithm in (None, curve.curve.algorithm)
            ]
        curves = self._allowed[key]
        if not curves:
            raise InputError(
                f"hardware {self.profile.name}: level {self.name!r} has no {collective} curve for {ranks} ranks; "
                "add one to the profile"
            )
        return curves


class CommCost:
    """Durations of collectives on one profile."""

    def __init__(self, profile: HardwareProfile) -> None:
        inner, *outer = profile.datasheet.topology
        self.profile = profile
        self.gpus_per_node = profile.gpus_per_node
        self.inner = LevelCost(profile, inner)
        self.outer = LevelCost(profile, outer[0]) if outer else None
        self.overhead = profile.coefficients.collective_overhead_us.value / US_PER_S
        chunk = profile.coefficients.adapter_chunk_mib
        self.chunk = chunk.value * MIB if chunk else 0.0

    def duration(self, collective: Collective, message: Number, ranks: int, nodes: int = 1) -> Number:
        """Seconds of a collective among `ranks` ranks, spread evenly over `nodes`, started from a framework.

        Raises `InputError` where the profile has no curve for it.
        """
        return self.overhead + self.time(collective, message, ranks, nodes)

    def batched_duration(self, message: Number, ranks: int, nodes: int = 1, *, before: int) -> Number:
        """Seconds by which one more send lengthens a group call of `before` sends of its size to the same peer."""
        shorter = self.time("send_receive", message, ranks, nodes, before)
        longer: Number = self.time("send_receive", message, ranks, nodes, before + 1)
        added: Number = longer - shorter
        return added

    def step_duration(self, collective: Collective, part: Number, ranks: int, nodes: int = 1) -> Number:
        """Seconds of one of the equal steps of a collective that are run one by one, in each of which a rank sends its
        `part` of the message: so many in a row take as long as the collective, but for what each takes to start.
        """
        return self.overhead + self.time(collective, part * ranks, ranks, nodes) / (ranks - 1)

    def host_copy(self, size: Number) -> Number:
        """Seconds of a copy between the device and its host; `InputError` where the profile has no link of them."""
        link = self.profile.datasheet.host_link_gb_per_s
        if link is None:
            raise InputError(
                f"hardware {self.profile.name}: no host_link_gb_per_s, which cpu_offload_layers needs; add it"
            )
        seconds: Number = size / (link.value * GB)
        return seconds

    def time(self, collective: Collective, message: Number, ranks: int, nodes: int = 1, sends: int = 1) -> Number:
        """Seconds as a benchmark of the library alone measures them, of a message or of `sends` in one group call."""
        if ranks % nodes or ranks // nodes > self.gpus_per_node:
            raise ValueError(f"{ranks} ranks do not fit {nodes} nodes of {self.gpus_per_node} evenly")
        if nodes == 1:
            return self.inner.time(collective, message, ranks, sends)
        across = self._over_nodes(collective, message, ranks, nodes, sends)
        if ranks > self.gpus_per_node:
            return across
        # Curves between nodes begin at larger messages; below those no adapter is faster than the links inside.
        return _longer(across, self.inner.time(collective, message, ranks, sends))

    def algorithm(self, collective: Collective, message: int, ranks: int, nodes: int = 1) -> str:
        """What the library runs in that time; over several nodes, what it runs between them."""
        if collective == "send_receive":
            return collective
        if nodes == 1:
            return self.inner.fastest(collective, message, ranks).curve.algorithm
        outer = self._outer()
        if nodes == ranks or collective not in CHUNKED:
            return outer.fastest(collective, message, nodes).curve.algorithm
        if collective != "all_reduce":
            return "ring"
        ring = self._ring(outer, collective, message, ranks, nodes)
        return "ring" if ring <= self._tree(outer, message, ranks // nodes, nodes) else "tree"

    def channels(self, collective: Collective, message: int, ranks: int, nodes: int = 1) -> int | None:
        """Channels that a send and receive gets, where its time follows from them."""
        level = self.inner if nodes == 1 else self._outer()
        if collective != "send_receive" or not level.sends:
            return None
        return int(level.sends.channels(message, ranks, nodes))

    def _over_nodes(self, collective: Collective, message: Number, ranks: int, nodes: int, sends: int) -> Number:
        outer = self._outer()
        if collective == "send_receive" and outer.sends:
            return cast("Number", outer.sends(message, ranks, nodes, sends))
        if nodes == ranks or collective == "send_receive":
            return outer.time(collective, message, nodes, sends)
        if collective == "all_to_all":
            return self._all_to_all(outer, message, ranks, nodes)
        ring = self._ring(outer, collective, message, ranks, nodes)
        if collective != "all_reduce":
            return ring
        return _least([ring, self._tree(outer, message, ranks // nodes, nodes)])

    def _outer(self) -> LevelCost:
        if self.outer is None:
            raise InputError(
                f"hardware {self.profile.name}: the topology has no level beyond {self.inner.name!r}; "
                "use one node, or add a level with its curves to the profile"
            )
        return self.outer

    def _ring(self, outer: LevelCost, collective: Collective, message: Number, ranks: int, nodes: int) -> Number:
        """Rings through all ranks, one per adapter.

        Long messages keep all hops of both levels busy, and the slower level paces. A block of a short one
        goes round hop by hop, each of which stores it, or the first chunk of it, before it sends it on; a hop
        between nodes takes no less than one inside, for the same kernels drive it.
        """
        per_node = ranks // nodes
        wire = sent_bytes(collective, message, ranks)
        block = _at_most(self.chunk * per_node, message / ranks)
        times = []
        for inside in self.inner.allowed(collective, per_node, "ring"):
            for across in outer.allowed(collective, nodes, "ring"):
                start = min(inside.start, across.start)
                latency = inside.latency(ranks - nodes + 1) + across.latency(nodes) - start
                busy = latency + _longer(inside.transfer(wire, per_node), across.transfer(wire / per_node, nodes))
                hop = inside.step(block)
                between = _longer(hop, across.step(block / per_node))
                hops = inside.steps(ranks - nodes + 1) * hop + across.steps(nodes) * between
                times.append(_longer(busy, start + hops))
        return _least(times)

    def _tree(self, outer: LevelCost, message: Number, per_node: int, nodes: int) -> Number:
        """All-reduce by a double binary tree over the nodes, in each by its switch (NVLS) or along a chain.

        An adapter sends its part up and down the tree, but on two nodes, each the root of half the data, once.
        The first chunk goes up and down node by node; then both levels move at once, and the slower one paces.
        """
        part = message / per_node
        chunk = _at_most(self.chunk, part / TREE_CHUNKS)
        share = chunk / part if np.all(part) else 0.0 * part
        hops = 2 * ceil(log2(nodes))
        times = []
        for inside in self.inner.allowed("all_reduce", per_node):
            # Along a chain every GPU sends the sum up and the result down.
            chain = inside.curve.algorithm == "ring"
            wire = 2 * message if chain else sent_bytes("all_reduce", message, per_node)
            for across in outer.allowed("all_reduce", nodes, "ring"):
                first = inside.latency(per_node) + inside.transfer(share * wire, per_node) + hops * across.step(chunk)
                sent = part if nodes == 2 else 2 * part
                times.append(first + _longer(inside.transfer(wire, per_node), across.transfer(sent, nodes)))
        return _least(times)

    def _all_to_all(self, outer: LevelCost, message: Number, ranks: int, nodes: int) -> Number:
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
            for curve in outer.allowed("all_to_all", nodes)
        ]
        return _longer(_least(inside), _least(across))

    def remark(self, collective: Collective, message: int, ranks: int, nodes: int = 1) -> str | None:
        """What the time of a collective hangs on beyond its bytes, for the reader of a result."""
        level = self.inner if nodes == 1 else self._outer()
        if collective != "send_receive" or not level.sends:
            return None
        found = level.sends.remark(message, ranks, nodes)
        return f"each send of {message / MIB:.4g} MiB among {ranks} ranks has {found}" if found else None

    def coefficients_of(self, collective: Collective, nodes: int = 1) -> tuple[str, ...]:
        """Dotted paths of the curves behind a duration."""
        names = [self.inner.path(collective), "collective_overhead_us"]
        if nodes > 1 and self.outer is not None:
            names.append(self.outer.path(collective))
            names += ["adapter_chunk_mib"] if collective in CHUNKED else []
        return tuple(names)
