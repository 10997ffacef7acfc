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
g ranks of a node divide among their adapters what leaves the node. `docs/model.md` has the formulas.
"""

from __future__ import annotations

from bisect import bisect_right

from spsim.errors import InputError
from spsim.hardware import CollectiveCurve, HardwareProfile, Level
from spsim.placement import Collective, sent_bytes
from spsim.units import GB, US_PER_S


def algorithm_steps(algorithm: str, collective: Collective, ranks: int) -> int:
    """Steps of an algorithm, each of which pays the step latency."""
    if algorithm in ("nvls", "send_receive"):
        return 1
    return 2 * (ranks - 1) if collective == "all_reduce" else ranks - 1


class CurveTime:
    """Time of one collective by one algorithm, as a function of message size and ranks."""

    def __init__(self, curve: CollectiveCurve, collective: Collective, *, full_mesh: bool = False) -> None:
        self.curve = curve
        self.collective = collective
        self.full_mesh = full_mesh and collective != "send_receive"
        latency = curve.latency_us / US_PER_S
        self.wire = [0.0]
        self.time_on_wire = [0.0]
        for message, bandwidth in curve.points:
            wire = sent_bytes(collective, int(message), curve.ranks)
            time = wire / (bandwidth * GB)
            self.wire.append(wire)
            self.time_on_wire.append(max(self.time_on_wire[-1], time - latency))

    def __call__(self, message: int, ranks: int) -> float:
        """Seconds for a message of the size that nccl-tests would name."""
        wire = sent_bytes(self.collective, message, ranks)
        return self.latency(ranks) + self.transfer(wire, ranks)

    def allows(self, ranks: int) -> bool:
        """Whether the algorithm serves, and the measurement describes, a group of so many ranks."""
        return self.curve.min_ranks <= ranks <= (self.curve.max_ranks or ranks)

    def latency(self, ranks: int) -> float:
        """Time of the smallest messages: measured, plus or minus the steps that differ; never negative."""
        curve = self.curve
        steps = algorithm_steps(curve.algorithm, self.collective, ranks)
        measured = algorithm_steps(curve.algorithm, self.collective, curve.ranks)
        return max(0.0, curve.latency_us + (steps - measured) * curve.step_latency_us) / US_PER_S

    def transfer(self, wire: float, ranks: int) -> float:
        """Seconds beyond the latency for bytes that one rank sends."""
        if self.full_mesh:
            wire *= (self.curve.ranks - 1) / (ranks - 1)
        index = bisect_right(self.wire, wire)
        if index == len(self.wire):
            bandwidth = self.curve.points[-1][1] * GB
            return self.time_on_wire[-1] + (wire - self.wire[-1]) / bandwidth
        x0, x1 = self.wire[index - 1], self.wire[index]
        y0, y1 = self.time_on_wire[index - 1], self.time_on_wire[index]
        return y0 + (y1 - y0) * (wire - x0) / (x1 - x0)


class LevelCost:
    """The curves of one level of the topology."""

    def __init__(self, profile: HardwareProfile, level: Level) -> None:
        self.profile = profile
        self.name = level.name
        self._allowed: dict[tuple[Collective, int, str | None], list[CurveTime]] = {}
        table = profile.coefficients.collectives.get(level.name, {})
        mesh = level.kind == "full_mesh"
        self.curves = {
            name: [CurveTime(curve, name, full_mesh=mesh) for curve in curves] for name, curves in table.items()
        }

    def time(self, collective: Collective, message: int, ranks: int) -> float:
        """Seconds by the fastest algorithm that the number of ranks allows."""
        return min(curve(message, ranks) for curve in self.allowed(collective, ranks))

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
        self.inner = LevelCost(profile, inner)
        self.outer = LevelCost(profile, outer[0]) if outer else None
        self.overhead = profile.coefficients.collective_overhead_us.value / US_PER_S

    def duration(self, collective: Collective, message: int, ranks: int, nodes: int = 1) -> float:
        """Seconds of a collective among `ranks` ranks, spread evenly over `nodes`, started from a framework.

        Raises `InputError` where the profile has no curve for it.
        """
        return self.overhead + self.time(collective, message, ranks, nodes)

    def time(self, collective: Collective, message: int, ranks: int, nodes: int = 1) -> float:
        """Seconds as a benchmark of the library alone measures them."""
        if ranks % nodes or ranks // nodes > self.profile.gpus_per_node:
            raise ValueError(f"{ranks} ranks do not fit {nodes} nodes of {self.profile.gpus_per_node} evenly")
        if nodes == 1:
            return self.inner.time(collective, message, ranks)
        across = self._over_nodes(collective, message, ranks, nodes)
        if ranks > self.profile.gpus_per_node:
            return across
        # Curves between nodes begin at larger messages; below those no adapter is faster than the links inside.
        return max(across, self.inner.time(collective, message, ranks))

    def _over_nodes(self, collective: Collective, message: int, ranks: int, nodes: int) -> float:
        outer = self._outer()
        if nodes == ranks or collective == "send_receive":
            return outer.time(collective, message, nodes)
        if collective == "all_to_all":
            return self._all_to_all(outer, message, ranks, nodes)
        flat = self._flat_ring(outer, collective, message, ranks, nodes)
        if collective != "all_reduce":
            return flat
        return min(flat, self._hierarchical(outer, message, ranks // nodes, nodes))

    def _outer(self) -> LevelCost:
        if self.outer is None:
            raise InputError(
                f"hardware {self.profile.name}: the topology has no level beyond {self.inner.name!r}; "
                "use one node, or add a level with its curves to the profile"
            )
        return self.outer

    def _flat_ring(self, outer: LevelCost, collective: Collective, message: int, ranks: int, nodes: int) -> float:
        """Rings through all ranks, one per adapter: both levels move at once, and the slower one paces.

        Of the steps one less than the nodes cross between them; the start, without a step, is counted once.
        """
        per_node = ranks // nodes
        wire = sent_bytes(collective, message, ranks)
        return min(
            inside.latency(ranks - nodes + 1)
            + across.latency(nodes)
            - min(inside.latency(1), across.latency(1))
            + max(inside.transfer(wire, per_node), across.transfer(wire / per_node, nodes))
            for inside in self.inner.allowed(collective, per_node, "ring")
            for across in outer.allowed(collective, nodes, "ring")
        )

    def _hierarchical(self, outer: LevelCost, message: int, per_node: int, nodes: int) -> float:
        """All-reduce in three stages: reduce-scatter in the node, all-reduce of each part among nodes, all-gather."""
        return (
            self.inner.time("reduce_scatter", message, per_node)
            + outer.time("all_reduce", message // per_node, nodes)
            + self.inner.time("all_gather", message, per_node)
        )

    def _all_to_all(self, outer: LevelCost, message: int, ranks: int, nodes: int) -> float:
        """Parts for peers of the node and parts for other nodes at the same time, the latter by one adapter."""
        per_node = ranks // nodes
        part = message / ranks
        inside = min(
            curve.latency(per_node) + curve.transfer(part * (per_node - 1), per_node)
            for curve in self.inner.allowed("all_to_all", per_node)
        )
        remote = ranks - per_node
        across = min(
            curve.latency(remote + 1) + curve.transfer(part * remote, nodes)
            for curve in outer.allowed("all_to_all", nodes)
        )
        return max(inside, across)

    def coefficients_of(self, collective: Collective, nodes: int = 1) -> tuple[str, ...]:
        """Dotted paths of the curves behind a duration."""
        names = [f"collectives.{self.inner.name}.{collective}", "collective_overhead_us"]
        if nodes > 1 and self.outer is not None:
            names.append(f"collectives.{self.outer.name}.{collective}")
            if collective == "all_reduce":
                names += [f"collectives.{self.inner.name}.{stage}" for stage in ("reduce_scatter", "all_gather")]
        return tuple(names)
