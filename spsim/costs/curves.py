"""Time of a collective from a measured curve.

A curve is measured at some number of ranks. For another number, and between sizes, two rules carry it over:
the latency changes by a constant per step of the algorithm, and equal bytes on the wire of one rank take
equal time beyond the latency (on eight H100 an all-gather of S moves as an all-reduce of S/2 by the ring).
On a full mesh, where n ranks use n-1 links each, it is equal bytes per link. Between sizes the time is
interpolated linearly in bytes; below the smallest it is the latency, above the largest the last bandwidth
holds.

In-network reduction moves data in chunks, twice as large ones from some sizes of the message on
(`spsim.costs.nccl.chunk_steps`): up to such a size the time goes on as below it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from spsim.inputs.collective_curves import CollectiveCurve
from spsim.program.placement import Collective, sent_bytes
from spsim.units import GB, US_PER_S

Floats = npt.NDArray[np.float64]
Number = TypeVar("Number", float, npt.NDArray[Any])
"""Bytes or seconds, or an array of them."""


def algorithm_steps(algorithm: str, collective: Collective, ranks: int) -> int:
    """Steps of an algorithm of one level, each of which pays the step latency: ring all-reduce 2(n-1), all-gather and
    reduce-scatter n-1, pairwise all-to-all n-1, in-network reduction (NVLS) and send-receive 1 (Thakur et al. 2005).
    """
    if algorithm in ("nvls", "send_receive"):
        return 1
    return 2 * (ranks - 1) if collective == "all_reduce" else ranks - 1


class CurveTime:
    """Time of one collective by one algorithm, as a function of message size and ranks."""

    def __init__(
        self,
        curve: CollectiveCurve,
        collective: Collective,
        *,
        full_mesh: bool = False,
        share: float = 1.0,
        chunk_steps: Sequence[float] = (),
    ) -> None:
        """`share` of the adapter that it was measured with that a rank has, beside others; `chunk_steps`: messages from
        which on the algorithm moves larger chunks.
        """
        self.curve = curve
        self.collective = collective
        self.full_mesh = full_mesh and collective != "send_receive"
        self._share = share
        self._latencies: dict[int, float] = {}
        self._wire: list[float] = [0.0]
        """Where the lines begin that its time follows: bytes on the wire."""
        self._lines: list[tuple[float, float, float, float]] = []
        """Of each, bytes and seconds where it begins, and seconds by how many bytes it rises."""
        latency, before, rate = curve.latency_us / US_PER_S, 0.0, 0.0
        smaller = 0.0
        for message, bandwidth in curve.points:
            wire = sent_bytes(collective, int(message), curve.ranks)
            time = max(before, wire / (bandwidth * GB) - latency)
            if rate and bisect_right(chunk_steps, smaller) < bisect_right(chunk_steps, message):
                self._goes_on(before, rate, wire, time)
            else:
                self._lines.append((self._wire[-1], before, time - before, wire - self._wire[-1]))
            rate = (time - before) / (wire - self._wire[-1]) if wire > self._wire[-1] else rate
            self._wire.append(wire)
            before, smaller = time, message
        self._lines.append((self._wire[-1], before, 1.0, curve.points[-1][1] * GB))

    def _goes_on(self, before: float, rate: float, wire: float, time: float) -> None:
        """To a point with larger chunks as up to the last one; where that is reached sooner, level."""
        begin = self._wire[-1]
        reached = begin + (time - before) / rate
        if reached >= wire:
            self._lines.append((begin, before, time - before, wire - begin))
            return
        self._lines.append((begin, before, time - before, reached - begin))
        self._wire.append(reached)
        self._lines.append((reached, time, 0.0, 1.0))

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
        if self._share < 1:
            wire = wire / self._share
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
