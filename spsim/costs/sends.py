"""Time of a send and receive under NCCL, by the channels that it gives to one.

A channel is one block of an SM, which copies at a rate of its own. How many channels a send gets follows from the
*size of its communicator*, since all peers might be served at once, and grows with the message: in one node a send
among eight GPUs has 4 of 32 channels up to 64 MiB, then 8, 16 and 32. That is the plateau of its bandwidth, and the
jump after it. Between nodes the network adapters divide few channels among all peers, whatever the message.

Rules: NVIDIA/nccl v2.29.2-1, src/graph/paths.cc (channels of a pair of peers) and src/enqueue.cc (channels of one
send). Up to 2.28 a send between nodes gets 2 channels an adapter, fewer in large communicators.
"""

from __future__ import annotations

from functools import lru_cache
from math import ceil

import numpy as np
import numpy.typing as npt

from spsim.costs.seconds import Seconds
from spsim.inputs.kernel_coefficients import SendCoefficients
from spsim.units import GB, MIB, US_PER_S

Counts = npt.NDArray[np.int64]

CHANNELS = 32
"""Of all sends of a GPU within its node, and the most that one send gets there."""
PART = 64 * 1024
"""Bytes below which a channel more is not worth it: an eighth of a chunk of 512 KiB."""
FULL_SHARE = 16 * MIB
"""Bytes a channel carries before a send within a node gets twice as many: 32 chunks."""
CHANNEL_GB_PER_S_BETWEEN_NODES = 14
"""What one channel is taken to move when channels are counted for an adapter."""
CHANNELS_PER_ADAPTER, MOST_BETWEEN_NODES = 4, 16
"""Pool of all sends between nodes: so many for each GPU of the node, up to a limit."""
PEERS_PER_CHANNEL = 8
"""Peers between nodes that share a channel."""


class SendTime:
    """Seconds of a send and receive of one level as a function of the message, communicator and nodes."""

    def __init__(self, coefficients: SendCoefficients, adapter_bandwidth: float, *, share: float = 1.0) -> None:
        """`adapter_bandwidth` in bytes per second: of the adapter of a GPU, for communicators over several nodes;
        `share`: what the GPU has of it, beside others.
        """
        self._latency = coefficients.latency_us.value / US_PER_S
        self._start = coefficients.start_us.value / US_PER_S
        self._smallest = coefficients.from_mib.value * MIB
        self._adapter = adapter_bandwidth
        channel, link = coefficients.channel_gb_per_s.value * GB, share * coefficients.link_gb_per_s.value * GB
        blend = coefficients.blend.value if coefficients.blend else None
        lone = coefficients.lone_channel_gb_per_s.value * GB if coefficients.lone_channel_gb_per_s else channel
        channels = [lone, *(count * channel for count in range(2, CHANNELS + 1))]
        self._rates = np.array([_blended(moved, link, blend) for moved in channels])

    def __call__(self, message: Seconds, ranks: int, nodes: int = 1, sends: int = 1) -> Seconds:
        """start + message / bandwidth(channels); from the latency in a straight line up to the smallest message that
        the law was held against. Several `sends` of a group call to one peer start once and follow each other on the
        channels that each gets (`src/enqueue.cc`: those of a pair of peers).
        """
        if isinstance(message, np.ndarray):
            time, short = self._long(message, ranks, nodes, sends), sends * message < self._smallest
            return np.where(short, self._short(message, ranks, nodes, sends), time) if short.any() else time
        law = self._short if sends * message < self._smallest else self._long
        return float(law(message, ranks, nodes, sends))

    def _short(self, message: Seconds, ranks: int, nodes: int, sends: int) -> Seconds:
        shortest = float(self._long(self._smallest, ranks, nodes, 1))
        return self._latency + sends * message / self._smallest * (shortest - self._latency)

    def _long(self, message: Seconds, ranks: int, nodes: int, sends: int) -> Seconds:
        time: Seconds = self._start + sends * message / self._rates[self.channels(message, ranks, nodes) - 1]
        return time

    def channels(self, message: Seconds, ranks: int, nodes: int = 1) -> Counts:
        """Channels of one send of `message` bytes in a communicator of `ranks` on `nodes` nodes."""
        parts = np.maximum(1, np.ceil(np.asarray(message) / PART)).astype(np.int64)
        if nodes > 1:
            return np.minimum(self._between_nodes(ranks, nodes), parts)
        counts, full = _within_node(ranks)
        return np.minimum(counts[full.searchsorted(message)], parts)

    def remark(self, message: int, ranks: int, nodes: int = 1) -> str | None:
        """What a reader must know where one send gets fewer channels than its GPU has for sends."""
        count = int(self.channels(message, ranks, nodes))
        if message < self._smallest or count == CHANNELS:
            return None
        rate = f"{self._rates[count - 1] / GB:.0f} GB/s"
        if nodes > 1:
            return f"{count} channel{'s' if count > 1 else ''} of a network adapter, {rate}"
        more = f"{count * FULL_SHARE / MIB:.0f} MiB"
        return f"{count} of NCCL's {CHANNELS} channels, {rate} of {self._rates[-1] / GB:.0f}: more only above {more}"

    def _between_nodes(self, ranks: int, nodes: int) -> int:
        needed = ceil(self._adapter / (CHANNEL_GB_PER_S_BETWEEN_NODES * GB))
        pool = min(CHANNELS_PER_ADAPTER * (ranks // nodes), MOST_BETWEEN_NODES)
        return _halved_until(1 << (needed - 1).bit_length(), pool / ceil(ranks / PEERS_PER_CHANNEL))


@lru_cache
def _within_node(ranks: int) -> tuple[Counts, Counts]:
    """Channels that a send may get in a communicator of so many ranks, and the message up to which it gets each."""
    first = _halved_until(CHANNELS, CHANNELS / ranks)
    counts = 1 << np.arange(first.bit_length() - 1, CHANNELS.bit_length())
    return counts, counts[:-1] * FULL_SHARE


def _halved_until(count: int, limit: float) -> int:
    """A power of two, halved until it is no more than a limit; at least one."""
    while count > max(limit, 1):
        count //= 2
    return count


def _blended(channels: float, link: float, blend: float | None) -> float:
    """The lower of two bandwidths; where they are alike, less, by the `blend`-norm of their inverses."""
    if blend is None:
        return min(channels, link)
    return float((channels**-blend + link**-blend) ** (-1 / blend))
