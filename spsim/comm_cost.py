"""Closed forms of collectives from measured curves.

A curve is measured at some number of ranks. For another number, and between sizes, two rules carry it over:
the latency changes by a constant per step of the algorithm, and equal bytes on the wire of one rank take
equal time beyond the latency (on eight H100 an all-gather of S moves as an all-reduce of S/2 by the ring).
Between sizes the time is interpolated linearly in bytes; below the smallest it is the latency, above the
largest the last bandwidth holds. Algorithms compete, and the fastest that the number of ranks allows wins.

Steps: ring all-reduce 2(n-1), ring all-gather and reduce-scatter n-1, pairwise all-to-all n-1, in-network
reduction (NVLS) and send-receive 1 (Thakur et al. 2005; NCCL).
"""

from __future__ import annotations

from bisect import bisect_right

from spsim.errors import InputError
from spsim.hardware import CollectiveCurve, HardwareProfile
from spsim.placement import Collective, sent_bytes
from spsim.units import GB, US_PER_S


def algorithm_steps(algorithm: str, collective: Collective, ranks: int) -> int:
    """Steps of an algorithm, each of which pays the step latency."""
    if algorithm in ("nvls", "send_receive"):
        return 1
    return 2 * (ranks - 1) if collective == "all_reduce" else ranks - 1


class CurveTime:
    """Time of one collective by one algorithm, as a function of message size and ranks."""

    def __init__(self, curve: CollectiveCurve, collective: Collective) -> None:
        self.curve = curve
        self.collective = collective
        latency = curve.latency_us / US_PER_S
        self.wire = [0.0]
        self.transfer = [0.0]
        for message, bandwidth in curve.points:
            wire = sent_bytes(collective, int(message), curve.ranks)
            time = wire / (bandwidth * GB)
            self.wire.append(wire)
            self.transfer.append(max(self.transfer[-1], time - latency))

    def __call__(self, message: int, ranks: int) -> float:
        """Seconds for a message of the size that nccl-tests would name."""
        wire = sent_bytes(self.collective, message, ranks)
        return self.latency(ranks) + self._transfer(wire)

    def latency(self, ranks: int) -> float:
        """Time of the smallest messages: measured, plus or minus the steps that differ; never negative."""
        curve = self.curve
        steps = algorithm_steps(curve.algorithm, self.collective, ranks)
        measured = algorithm_steps(curve.algorithm, self.collective, curve.ranks)
        return max(0.0, curve.latency_us + (steps - measured) * curve.step_latency_us) / US_PER_S

    def _transfer(self, wire: float) -> float:
        index = bisect_right(self.wire, wire)
        if index == len(self.wire):
            bandwidth = self.curve.points[-1][1] * GB
            return self.transfer[-1] + (wire - self.wire[-1]) / bandwidth
        x0, x1 = self.wire[index - 1], self.wire[index]
        y0, y1 = self.transfer[index - 1], self.transfer[index]
        return y0 + (y1 - y0) * (wire - x0) / (x1 - x0)


class CommCost:
    """Durations of collectives on one profile."""

    def __init__(self, profile: HardwareProfile) -> None:
        self.profile = profile
        self.level = profile.datasheet.topology[0].name
        self.overhead = profile.coefficients.collective_overhead_us.value / US_PER_S
        table = profile.coefficients.collectives.get(self.level, {})
        self.curves = {name: [CurveTime(curve, name) for curve in curves] for name, curves in table.items()}

    def duration(self, collective: Collective, message: int, ranks: int) -> float:
        """Seconds of a collective among `ranks` ranks of one node, started from a framework.

        Raises `InputError` where the profile has no curve for it.
        """
        curves = [c for c in self.curves.get(collective, ()) if ranks >= c.curve.min_ranks]
        if not curves:
            raise InputError(
                f"hardware {self.profile.name}: level {self.level!r} has no {collective} curve for {ranks} ranks; "
                "add one to the profile"
            )
        return self.overhead + min(curve(message, ranks) for curve in curves)

    def coefficients_of(self, collective: Collective) -> tuple[str, ...]:
        """Dotted path of the curves behind a duration."""
        return (f"collectives.{self.level}.{collective}", "collective_overhead_us")
