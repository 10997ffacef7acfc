"""Which algorithm and protocol NCCL picks for a collective, and over how many channels.

NCCL predicts the time of each algorithm and protocol as latency + bytes / bandwidth and takes the shortest. Its
constants are of what a channel, a step and a protocol cost on a generation of GPUs; below some tens of MiB its times
are a third to two thirds short of measured ones, so that they serve the choice alone. Protocols: LL sends a flag with
every 4 bytes and waits for nothing else, LL128 one with every 120 bytes, Simple whole slices with a handshake.

Source: NVIDIA/nccl v2.29.2-1, `src/graph/tuning.cc` (times), `search.cc` and `connect.cc` (channels), `src/enqueue.cc`
(channels of small messages). Of the host an Intel processor is assumed, of nodes one network adapter for each GPU or
fewer, no SHARP.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import inf, log2
from typing import TYPE_CHECKING, Literal, NamedTuple

from spsim.program.placement import Collective
from spsim.units import GB, KIB

if TYPE_CHECKING:
    from spsim.inputs.hardware import HardwareProfile

Algorithm = Literal["ring", "tree", "nvls", "nvls_tree", "pat"]
Protocol = Literal["LL", "LL128", "Simple"]
PROTOCOLS: tuple[Protocol, ...] = ("LL", "LL128", "Simple")

BASE_US = {"tree": (6.8, 14.0, 8.4), "ring": (6.6, 14.0, 8.4)}
NVLINK_US = {"tree": (0.6, 1.25, 4.0), "ring": (0.6, 1.9, 3.4)}
NETWORK_US = {"tree": (5.0, 8.5, 14.0), "ring": (2.7, 4.0, 14.0)}
"""Start, and a step inside a node and between nodes, by protocol."""
OVERHEAD_US = (1.0, 1.0, 3.0)
"""Least time of a step inside a node where the ring goes on to others."""
NVLS_US, NVLS_TREE_HOP_US, PAT_US = 25.0, 20.9, (8.0, 14.0 / 3.5, 2.8)
PLATEAU = 1.4
"""Times the latency of a Simple ring all-reduce over nodes, unless its blocks are tiny."""
LL128_SHARE, TREE_SHARE, PAT_SHARE = 0.92, 0.92, 0.75
TREE_LL, TREE_LL128 = 3.8, (7 / 9, 120 / 128)


@dataclass(frozen=True, slots=True)
class Generation:
    """What NCCL knows of GPUs from a compute capability on; limits in GB/s on one, two and more nodes."""

    nvlink_gb_per_s: float
    """That one link is taken to move."""
    speeds: tuple[float, ...]
    """Tried for a channel inside a node, in this order."""
    ll: float
    """All channels of a ring with LL, on one node."""
    ring_ll128: tuple[float, float, float]
    """Of one channel, as all below."""
    tree_ll128: tuple[float, float, float]
    tree: tuple[float, float, float]
    nvls_tree: tuple[float, float, float] = (0.0, 0.0, 0.0)
    nvls_efficiency: float = 0.0
    nvls_channels: tuple[int, int] = (0, 0)
    """On one node, and on several."""
    corrects_nvls_tree: bool = False


GENERATIONS = {
    8.0: Generation(
        20.0, (40.0, 30.0, 20.0, 18.0, 15.0, 12.0, 10.0, 9.0, 7.0, 6.0, 5.0, 4.0, 3.0), 87.7,
        ring_ll128=(20.0, 20.0, 20.0), tree_ll128=(20.0, 20.0, 20.0), tree=(24.0, 23.6, 17.8),
    ),
    9.0: Generation(
        20.6, (60.0, 50.0, 40.0, 30.0, 24.0, 20.0, 15.0, 12.0, 11.0, 6.0, 3.0), 141.0,
        ring_ll128=(36.7, 36.7, 36.7), tree_ll128=(36.7, 36.7, 29.0), tree=(38.7, 41.4, 36.0),
        nvls_tree=(0.0, 57.7, 45.5), nvls_efficiency=0.85, nvls_channels=(16, 16),
    ),
    10.0: Generation(
        40.1, (90.0, 80.0, 70.0, 60.0, 50.0, 45.0, 40.0, 30.0, 24.0, 20.0, 19.0, 18.0), 282.0,
        ring_ll128=(34.5, 34.6, 34.5), tree_ll128=(55.6, 31.67, 20.0), tree=(70.0, 42.8, 24.0),
        nvls_tree=(0.0, 96.0, 43.8), nvls_efficiency=0.74, nvls_channels=(24, 32), corrects_nvls_tree=True,
    ),
}  # fmt: skip
"""By the compute capability from which on they hold."""
LL_OVER_NODES = (39.0, 39.0, 20.4)
NETWORK_SPEEDS = (96.0, 48.0, 45.0, 42.0, 40.0, 30.0, 24.0, 22.0, 20.0, 17.5, 15.0, 12.0, 6.0, 3.0, 2.4, 1.2, 0.24)
"""Tried for a channel between nodes."""
SIMILAR = 0.49
"""The search goes on to slower channels down to this share of the best found so far."""
MOST_CHANNELS = 32
CORRECTION = {
    "LL": (*[1.0] * 4, 0.9, 0.8, *[0.7] * 4, 0.6, 0.5, 0.4, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, *[1.0] * 5),
    "LL128": (*[1.0] * 5, 0.9, 0.8, 0.8, 0.8, 0.7, *[0.6] * 6, 0.8, *[0.9] * 4, *[1.0] * 3),
    "Simple": (*[0.9] * 7, 0.8, 0.7, 0.6, 0.6, *[0.5] * 4, 0.6, 0.7, 0.8, 0.7, 0.7, 0.8, *[0.9] * 3),
}  # fmt: skip
"""Share of a tree's bandwidth by the size of the message, in powers of two from 64 bytes on."""
SMALLEST = 64
THREADS, THRESHOLD = {"LL": 512, "LL128": 640, "Simple": 512}, {"LL": 8, "LL128": 8, "Simple": 64}
"""Threads of a block, and bytes for each below which there are fewer blocks."""

NVLS_CHUNKS = ((2, 32), (8, 64), (64, 128))
"""Chunks of how many KiB each channel and head must have for NVLS to take them, else it takes the next smaller ones."""


class Choice(NamedTuple):
    """What NCCL runs."""

    algorithm: Algorithm
    protocol: Protocol


@dataclass(frozen=True, slots=True)
class Candidate:
    """The time that NCCL expects of one choice: latency + bytes / bandwidth."""

    choice: Choice
    latency_us: float
    gb_per_s: float
    """Of the message, not of the bus."""
    correction: tuple[float, ...] = ()
    plateau_from: float = inf
    """Bytes from which on the latency is `PLATEAU` times as long."""

    def line(self, size: float) -> tuple[float, float]:
        """Latency in us and us a byte, at messages of this size and up to twice as large."""
        place = (int(size) // SMALLEST).bit_length() - 1
        share = self.correction[place] if 0 <= place < len(self.correction) else 1.0
        latency = self.latency_us * (PLATEAU if size >= self.plateau_from else 1.0)
        return latency, 1e6 / (self.gb_per_s * share * GB)


@dataclass(frozen=True, slots=True)
class Channels:
    """That the search finds, and what each moves in GB/s."""

    count: int
    gb_per_s: float

    @property
    def total(self) -> float:
        """GB/s of all."""
        return self.count * self.gb_per_s


class Tuner:
    """NCCL's choices on a profile's machine."""

    def __init__(self, profile: HardwareProfile, capability: float) -> None:
        inner, *outer = profile.datasheet.topology
        self._generation = GENERATIONS[max(least for least in GENERATIONS if least <= capability)]
        self._multicast = "all_reduce" in inner.in_network_reduction
        self._nvlink = inner.links_per_gpu.value * self._generation.nvlink_gb_per_s
        self._network = outer[0] if outer else None
        self._found: dict[tuple[Collective, int, int, str | None], tuple[list[float], list[Choice]]] = {}

    def picks(
        self, collective: Collective, ranks: int, nodes: int, algorithm: str | None = None
    ) -> tuple[list[float], list[Choice]]:
        """The sizes (in bytes of the whole array) at which the next choice begins, and the choices by rising message,
        of one algorithm or all; both empty where there is none.
        """
        key = (collective, ranks, nodes, algorithm)
        if key not in self._found:
            found = self._candidates(collective, ranks // nodes, nodes)
            own = [one for one in found if algorithm in (None, one.choice.algorithm)]
            self._found[key] = _envelope(own) if own else ([], [])
        return self._found[key]

    def channels(self, algorithm: str, protocol: str, message: float, ranks: int, nodes: int) -> int:
        """Blocks, one of an SM each, that run a collective."""
        if algorithm in ("nvls", "nvls_tree"):
            return self._generation.nvls_channels[nodes > 1]
        count = self.blocks(ranks // nodes, nodes)
        threshold = THREADS[protocol] * THRESHOLD[protocol]
        if (algorithm, protocol) == ("ring", "LL"):
            threshold *= ranks
        return max(1, min(count, int(message // threshold)))

    def blocks(self, per_node: int, nodes: int) -> int:
        """Channels of long messages on rings and trees."""
        return min(MOST_CHANNELS, 2 * self.search(per_node, nodes).count)

    def pool(self, per_node: int, nodes: int) -> int:
        """Channels of all sends of a GPU, as all-to-all uses them: a power of two."""
        return 1 << (self.blocks(per_node, nodes) - 1).bit_length()

    def chunk_steps(self, heads: int) -> tuple[float, ...]:
        """Messages from which on NVLS on one node moves chunks of 32, 64 and 128 KiB a head instead of half of it."""
        each = self._generation.nvls_channels[0] * heads
        return tuple(each * chunks * size * KIB for chunks, size in NVLS_CHUNKS)

    def search(self, per_node: int, nodes: int) -> Channels:
        """Channels of rings and trees before NCCL doubles them."""
        if nodes == 1:
            return self._doubled(_searched(self._nvlink, self._generation.speeds))
        return self._doubled(Channels(*self._adapters(per_node)))

    def _adapters(self, per_node: int) -> tuple[int, float]:
        if self._network is None:
            raise ValueError("a machine without adapters has no collectives over nodes")
        count = max(1, int(per_node * min(1.0, self._network.links_per_gpu.value)))
        speed = self._network.link_gb_per_s.value * max(1.0, self._network.links_per_gpu.value)
        return count, next((one for one in NETWORK_SPEEDS if one <= speed), speed)

    def _doubled(self, found: Channels) -> Channels:
        """Fast channels are halved and doubled, for one block would not keep up."""
        newer = self._generation.nvls_efficiency > 0
        if found.gb_per_s < 25 or (newer and found.gb_per_s < 50 and found.count > 4):
            return found
        return Channels(2 * found.count, found.gb_per_s / 2)

    def _candidates(self, collective: Collective, per_node: int, nodes: int) -> Iterator[Candidate]:
        channels = self.search(per_node, nodes)
        reduces = collective == "all_reduce"
        for place, protocol in enumerate(PROTOCOLS):
            yield self._ring(channels, place, protocol, per_node, nodes, reduces=reduces)
            if reduces:
                yield self._tree(channels, place, protocol, per_node, nodes)
        if reduces and self._multicast and per_node > 1 and self._generation.nvls_efficiency:
            yield self._in_network(per_node, nodes)
        if not reduces and per_node == 1:
            start, hop, rank = PAT_US
            latency = start + int(log2(nodes)) * hop + rank * nodes
            yield Candidate(Choice("pat", "Simple"), latency, PAT_SHARE * channels.total)

    def _ring(
        self, channels: Channels, place: int, protocol: Protocol, per_node: int, nodes: int, *, reduces: bool
    ) -> Candidate:
        generation, ranks = self._generation, per_node * nodes
        passes = 2 if reduces else 1
        steps, crossings = passes * (ranks - 1), passes * (nodes - 1)
        bus = channels.total
        if protocol == "LL":
            bus = min(generation.ll if nodes == 1 else LL_OVER_NODES[_by(nodes)], bus / 2)
        elif protocol == "LL128":
            bus = min(LL128_SHARE * bus, channels.count * generation.ring_ll128[_by(nodes)])
        inside = max(NVLINK_US["ring"][place], OVERHEAD_US[place] if nodes > 1 else 0.0)
        between = NETWORK_US["tree" if per_node == 1 else "ring"][place]
        latency = BASE_US["ring"][place] + (steps - crossings) * inside + crossings * between
        plateau = SMALLEST * 2 * channels.count * ranks if reduces and nodes > 1 and protocol == "Simple" else inf
        return Candidate(Choice("ring", protocol), latency, bus * ranks / steps, plateau_from=plateau)

    def _tree(self, channels: Channels, place: int, protocol: Protocol, per_node: int, nodes: int) -> Candidate:
        generation, by = self._generation, _by(nodes)
        bus = min(TREE_SHARE * channels.total, channels.count * generation.tree[by])
        if protocol == "LL":
            bus = min(bus / TREE_LL, generation.ll if nodes == 1 else LL_OVER_NODES[by])
        elif protocol == "LL128":
            bus = min(bus * TREE_LL128[nodes > 1], channels.count * generation.tree_ll128[by])
        hops = (per_node - 1) * NVLINK_US["tree"][place] + int(log2(nodes)) * NETWORK_US["tree"][place]
        # The table of corrections ends one power of two earlier for trees.
        correction = CORRECTION[protocol][:-1]
        return Candidate(Choice("tree", protocol), BASE_US["tree"][place] + 2 * hops, bus / 2, correction)

    def _in_network(self, heads: int, nodes: int) -> Candidate:
        """NVLS, one head a GPU; over nodes a tree of them (NVLSTree)."""
        generation, ranks = self._generation, heads * nodes
        speed = _searched(self._nvlink, generation.speeds).gb_per_s if nodes == 1 else self._adapters(heads)[1]
        inside = 2 * speed * generation.nvls_efficiency * (heads - 1) / heads
        each = min(inside, speed if nodes != 2 else 2 * speed)
        if nodes > 1:
            each = min(each, generation.nvls_tree[_by(nodes)])
        bandwidth = heads * each * ranks / (2 * (ranks - 1))
        if nodes == 1:
            return Candidate(Choice("nvls", "Simple"), NVLS_US, bandwidth)
        latency = NVLS_US + 2 * int(log2(nodes)) * NVLS_TREE_HOP_US
        correction = CORRECTION["Simple"] if generation.corrects_nvls_tree else ()
        return Candidate(Choice("nvls_tree", "Simple"), latency, bandwidth, correction)


def _by(nodes: int) -> int:
    """Place of a limit that NCCL has for one node, two, and more."""
    return min(nodes, 3) - 1


def _searched(total: float, speeds: tuple[float, ...]) -> Channels:
    """The channels that move most, the fastest of those alike; far slower ones are not tried."""
    best = Channels(0, 0.0)
    for speed in speeds:
        if best.count and speed / best.gb_per_s <= SIMILAR:
            break
        found = Channels(int(total // speed), speed)
        if found.total > best.total:
            best = found
    return best


def _envelope(candidates: list[Candidate]) -> tuple[list[float], list[Choice]]:
    """The shortest by rising message. From one power of two, or begin of a plateau, to the next all times are lines."""
    edges = {0.0, *(one.plateau_from for one in candidates if one.plateau_from < inf)}
    if any(one.correction for one in candidates):
        edges |= {float(SMALLEST << place) for place in range(len(CORRECTION["LL"]) + 1)}
    ordered = sorted(edges)
    bent = [one for one in candidates if one.correction or one.plateau_from < inf]
    straight = [(*one.line(0), one.choice) for one in candidates if one not in bent]
    bounds: list[float] = []
    choices: list[Choice] = []
    for begin, end in zip(ordered, [*ordered[1:], inf], strict=True):
        for start, choice in _lowest([*straight, *((*one.line(begin), one.choice) for one in bent)], begin, end):
            if not choices or choices[-1] != choice:
                bounds += [start] if choices else []
                choices.append(choice)
    return bounds, choices


def _lowest(lines: list[tuple[float, float, Choice]], begin: float, end: float) -> Iterator[tuple[float, Choice]]:
    """Where each of some lines becomes the lowest, from one size to another."""
    size = begin
    latency, slope, choice = min(lines, key=lambda line: (line[0] + line[1] * begin, line[1]))
    while True:
        yield size, choice
        flatter = [line for line in lines if line[1] < slope]
        if not flatter or min(line[0] + line[1] * end for line in flatter) >= latency + slope * end < inf:
            return
        crossings = [(line[0] - latency) / (slope - line[1]) for line in flatter]
        size = min(crossings)
        latency, slope, choice = flatter[crossings.index(size)]
        if size >= end:
            return
