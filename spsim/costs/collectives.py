"""Times of collectives on one profile: by NCCL's choice of algorithm, or by the one that is asked for.

Of one node measured curves say how long an algorithm takes (`costs.curves`), of sends a law of channels
(`costs.sends`). Over nodes rings and trees take what NCCL's protocols do, where a profile has `between_nodes`
(`costs.between_nodes`); else both are composed of curves of the two levels (`costs.composed`), and the fastest counts.
`docs/model.md` has the formulas.

Messages are numbers, or arrays of them for many workloads at once.
"""

from __future__ import annotations

from bisect import bisect_right
from functools import partial
from typing import cast

from spsim.costs.algorithms import CHUNKED, check_algorithm
from spsim.costs.curves import Number
from spsim.costs.dispatch import coefficients_of, dispatch_seconds
from spsim.costs.forms import Fastest, Form, Forms
from spsim.costs.levels import LevelCost
from spsim.costs.nccl import Tuner
from spsim.costs.over_nodes import OverNodes, PickedOverNodes
from spsim.costs.seconds import larger
from spsim.errors import InputError
from spsim.inputs.hardware import HardwareProfile
from spsim.program.placement import Collective
from spsim.program.routing import Dispatch
from spsim.units import GB, MIB, US_PER_S


class CommCost:
    """Durations of collectives on one profile."""

    def __init__(self, profile: HardwareProfile) -> None:
        inner, *outer = profile.datasheet.topology
        capability = profile.datasheet.compute_capability
        self.profile = profile
        self.gpus_per_node = profile.gpus_per_node
        self.tuner = Tuner(profile, capability.value) if capability else None
        self.inner = LevelCost(profile, inner, self.tuner)
        self.outer = LevelCost(profile, outer[0]) if outer else None
        self.overhead = profile.coefficients.collective_overhead_us.value / US_PER_S
        self._nodes = self._over()

    def _over(self) -> OverNodes | None:
        """What the profile knows of several nodes."""
        if self.outer is None:
            return None
        coefficients = self.profile.coefficients
        chunk = coefficients.adapter_chunk_mib.value * MIB if coefficients.adapter_chunk_mib else 0.0
        law = coefficients.between_nodes.get(self.outer.name)
        if self.tuner and law:
            return PickedOverNodes(self.inner, self.outer, chunk, self.tuner, law)
        return OverNodes(self.inner, self.outer, chunk)

    def duration(self, collective: Collective, message: Number, ranks: int, nodes: int = 1) -> Number:
        """Seconds of a collective among `ranks` ranks, spread evenly over `nodes`, started from a framework.

        Raises `InputError` where the profile has no curve for it.
        """
        return self.overhead + self.time(collective, message, ranks, nodes)

    def dispatched(self, dispatch: Dispatch, message: Number, ranks: int, nodes: int = 1) -> Number:
        """Seconds of a message of tokens to experts, or back, by a library; `InputError` where the profile lacks it."""
        return dispatch_seconds(self.profile, dispatch, message, ranks, nodes)

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
        self._check_fits(ranks, nodes)
        if nodes == 1:
            return self.inner.time(collective, message, ranks, sends)
        across = self._over_nodes(collective, message, ranks, nodes, sends)
        if ranks > self.gpus_per_node:
            return across
        # Curves between nodes begin at larger messages; below those no adapter is faster than the links inside.
        found: Number = larger(across, self.inner.time(collective, message, ranks, sends))
        return found

    def _check_fits(self, ranks: int, nodes: int) -> None:
        if ranks % nodes or ranks // nodes > self.gpus_per_node:
            raise ValueError(f"{ranks} ranks do not fit {nodes} nodes of {self.gpus_per_node} evenly")

    def _over_nodes(self, collective: Collective, message: Number, ranks: int, nodes: int, sends: int) -> Number:
        over = self._levels()
        if collective != "send_receive":
            return over.forms(collective, ranks, nodes)(message)
        if over.outer.sends:
            return cast("Number", over.outer.sends(message, ranks, nodes, sends))
        return over.outer.time(collective, message, nodes, sends)

    def _levels(self) -> OverNodes:
        if self._nodes is None:
            raise InputError(
                f"hardware {self.profile.name}: the topology has no level beyond {self.inner.name!r}; "
                "use one node, or add a level with its curves to the profile"
            )
        return self._nodes

    def forms(self, collective: Collective, ranks: int, nodes: int = 1, algorithm: str | None = None) -> Forms:
        """How a group may run a collective, by one algorithm or as the library does; `InputError` where it cannot."""
        self._check_fits(ranks, nodes)
        if algorithm is not None:
            check_algorithm(algorithm, collective, ranks, nodes)
        level = self.inner if nodes == 1 else self._levels().outer
        if collective == "send_receive":
            seconds = partial(self.time, collective, ranks=ranks, nodes=nodes)
            return Fastest([Form(collective, 1, seconds)])
        if nodes > 1:
            return self._levels().forms(collective, ranks, nodes, algorithm)
        curves = level.allowed(collective, ranks)
        forms = [Form(one.curve.algorithm, one.steps(ranks), partial(one, ranks=ranks)) for one in curves]
        if own := [form for form in forms if algorithm in (None, form.algorithm)]:
            return Fastest(own)
        why = f"takes it from {self.inner.switch.curve.min_ranks} GPUs on" if self.inner.switch else "does not reduce"
        have = " or ".join({form.algorithm: None for form in forms})
        raise InputError(f"algorithm {algorithm}: level {self.inner.name!r} of {self.profile.name} {why}; use {have}")

    def algorithm(self, collective: Collective, message: int, ranks: int, nodes: int = 1) -> str:
        """What the library runs in that time; over several nodes, what it runs between them."""
        return self.choice(collective, message, ranks, nodes)[0]

    def choice(self, collective: Collective, message: int, ranks: int, nodes: int = 1) -> tuple[str, str | None]:
        """Algorithm and protocol that the library runs; no protocol where none is known."""
        if collective == "send_receive":
            return collective, None
        if nodes > 1 or self.tuner is None or collective == "all_to_all":
            form = self.forms(collective, ranks, nodes).at(message)
            return form.algorithm, form.protocol
        bounds, choices = self.tuner.picks(collective, ranks, 1)
        return choices[bisect_right(bounds, message)]

    def channels(self, collective: Collective, message: int, ranks: int, nodes: int = 1) -> int | None:
        """Channels of NCCL, an SM each, that a collective or a send and receive gets; None where they are not known."""
        level = self.inner if nodes == 1 else self._levels().outer
        if collective == "send_receive":
            return int(level.sends.channels(message, ranks, nodes)) if level.sends else None
        if collective == "all_to_all":
            return self.tuner.pool(ranks // nodes, nodes) if self.tuner else None
        algorithm, protocol = self.choice(collective, message, ranks, nodes)
        if self.tuner is None or protocol is None:
            return None
        return self.tuner.channels(algorithm, protocol, message, ranks, nodes)

    def remark(self, collective: Collective, message: int, ranks: int, nodes: int = 1) -> str | None:
        """What the time of a collective hangs on beyond its bytes, for the reader of a result."""
        level = self.inner if nodes == 1 else self._levels().outer
        if collective != "send_receive" or not level.sends:
            return None
        found = level.sends.remark(message, ranks, nodes)
        return f"each send of {message / MIB:.4g} MiB among {ranks} ranks has {found}" if found else None

    def coefficients_of(
        self, collective: Collective, nodes: int = 1, dispatch: Dispatch | None = None
    ) -> tuple[str, ...]:
        """Dotted paths of the coefficients behind a duration."""
        if dispatch:
            return coefficients_of(self.profile, dispatch, nodes)
        names = [self.inner.path(collective), "collective_overhead_us"]
        if nodes > 1 and self.outer is not None:
            names.append(self.outer.path(collective))
            names += ["adapter_chunk_mib"] if collective in CHUNKED else []
            if collective in CHUNKED and isinstance(self._nodes, PickedOverNodes):
                names.append(f"between_nodes.{self.outer.name}")
        return tuple(names)
