"""Times of NCCL's rings and trees over several nodes, each GPU with a network adapter or a part of one.

A ring through all ranks waits for two things. Its *chain*: each of its steps costs a start that the protocol decides
about, and the time of a block on the channels. Its *wire*: what leaves a node goes through its adapters, what passes
along the ring through the links inside. LL128 keeps eight slots of a buffer in flight and Simple two slices, so that a
step of Simple, which also waits for a handshake and a flush, starts twice as late; LL128 spends some of the wire on
flags. The two overlap, by the fourth powers:

    T = start + ( chain^4 + wire^4 )^(1/4),  chain = steps (step + block / channels),  wire = bytes / bandwidth

A tree of NVSwitches (NVLSTree) sums in the switches of each node and over the nodes by a double binary tree: a hop for
each level of it, up and down, and the part of one GPU through its switch and its adapter.

Source: NVIDIA/nccl v2.29.2-1 (slots: `src/include/collectives.h`, `src/device/prims_simple.h`); constants are fitted to
rows of nccl-tests, as the profile says. Messages are numbers, or arrays of them.
"""

from __future__ import annotations

from math import ceil, log2

import numpy as np

from spsim.costs.curves import CurveTime, Number
from spsim.costs.nccl import Protocol
from spsim.costs.seconds import power, root
from spsim.inputs.kernel_coefficients import NodeCoefficients
from spsim.program.placement import Collective
from spsim.units import GB, MIB, US_PER_S


class RingTime:
    """A ring of one protocol through `ranks` on `nodes`."""

    def __init__(
        self,
        coefficients: NodeCoefficients,
        collective: Collective,
        protocol: Protocol,
        *,
        ranks: int,
        adapters: float,
        channels: int,
        inside_gb_per_s: float | None,
        latency: float,
    ) -> None:
        """`adapters` of a node that its ranks use; `inside_gb_per_s` of the ring within a node, None with one rank
        there; `latency` in seconds of the smallest messages.
        """
        passes = 2 if collective == "all_reduce" else 1
        simple = protocol == "Simple"
        self.steps = passes * (ranks - 1)
        rates = coefficients.adapter_gb_per_s
        across = adapters * (rates.simple if simple else rates.ll128).value * GB
        inside = inside_gb_per_s * GB if inside_gb_per_s else None
        step = (coefficients.step_us.simple if simple else coefficients.step_us.ll128).value / US_PER_S
        self._start = coefficients.start_us.value / US_PER_S
        self._chain = self.steps * step
        self._chain_per_byte = self.steps / ranks / (channels * coefficients.channel_gb_per_s.value * GB)
        self._wire_per_byte = self.steps / ranks / _blended(across, inside, coefficients.blend.value)
        self._smallest = coefficients.from_mib.value * MIB
        self._latency = latency
        self._rise = max(0.0, self._law(self._smallest) - latency) / self._smallest

    def __call__(self, message: Number) -> Number:
        """Seconds for the whole array of `message` bytes."""
        if isinstance(message, np.ndarray):
            return np.where(message < self._smallest, self._latency + message * self._rise, self._law(message))
        return self._latency + message * self._rise if message < self._smallest else self._law(message)

    def _law(self, message: Number) -> Number:
        chain, wire = self._chain + message * self._chain_per_byte, message * self._wire_per_byte
        chain, wire = chain * chain, wire * wire
        time: Number = self._start + root(root(chain * chain + wire * wire))
        return time


class TreeTime:
    """NVLSTree: all-reduce in the switch of each of several nodes, and between them by a double binary tree."""

    def __init__(
        self, coefficients: NodeCoefficients, switch: CurveTime, *, nodes: int, per_node: int, adapters: float
    ) -> None:
        """`switch`: the curve of NVLS on one node."""
        self.steps = 2 * ceil(log2(nodes))
        self._switch = switch
        # A switch serves its GPUs alike: one that has to sum a part of message / n takes as long for any n.
        self._of_switch = switch.curve.ranks / per_node
        self._hops = self.steps * coefficients.tree_hop_us.value / US_PER_S
        # Every node is inside one of two trees and a leaf of the other; on two nodes each is the root of one.
        crossings = 1 if nodes == 2 else 2
        self._per_byte = crossings / (adapters * coefficients.adapter_gb_per_s.simple.value * GB)
        self._blend = coefficients.blend.value

    def __call__(self, message: Number) -> Number:
        """Seconds for an array of `message` bytes."""
        switch = self._switch(message * self._of_switch // 1, self._switch.curve.ranks)
        across = message * self._per_byte
        both = power(switch, self._blend) + power(across, self._blend)
        time: Number = self._hops + power(both, 1 / self._blend)
        return time


def _blended(one: float, other: float | None, blend: float) -> float:
    """The lower of two bandwidths; less where they are alike, by the `blend`-norm of their inverses."""
    return one if other is None else float((one**-blend + other**-blend) ** (-1 / blend))
