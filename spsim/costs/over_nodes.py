"""Collectives among ranks of several nodes: their forms, and which of them the library runs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from spsim.costs.algorithms import CHUNKED
from spsim.costs.between_nodes import RingTime, TreeTime
from spsim.costs.composed import Composed
from spsim.costs.curves import algorithm_steps
from spsim.costs.forms import Fastest, Form, Forms, Picked
from spsim.costs.seconds import larger
from spsim.errors import InputError
from spsim.units import US_PER_S

if TYPE_CHECKING:
    from spsim.costs.levels import LevelCost
    from spsim.costs.nccl import Choice, Tuner
    from spsim.inputs.kernel_coefficients import NodeCoefficients
    from spsim.program.placement import Collective


NODE_STEP_US = 0.4
"""What a step with LL inside a node takes longer where the group goes on to other nodes: the network's overhead of 1 us
instead of 0.6 (NCCL `src/graph/tuning.cc`)."""


class OverNodes:
    """What a profile knows of collectives over its nodes."""

    def __init__(self, inner: LevelCost, outer: LevelCost, chunk: float) -> None:
        """`chunk`: bytes that the channels of one adapter pass on at a time."""
        self.inner = inner
        self.outer = outer
        self._composed = Composed(inner, outer, chunk)
        self._forms: dict[tuple[Collective, int, int, str | None], Forms] = {}

    def forms(self, collective: Collective, ranks: int, nodes: int, algorithm: str | None = None) -> Forms:
        """Of one algorithm, or what the library runs; made once. Raises `InputError` where a curve is missing."""
        key = (collective, ranks, nodes, algorithm)
        if key not in self._forms:
            self._forms[key] = self._made(*key)
        return self._forms[key]

    def _made(self, collective: Collective, ranks: int, nodes: int, algorithm: str | None) -> Forms:
        """The fastest of what curves say."""
        if algorithm == "hierarchical":
            return Fastest([self._hierarchical(collective, ranks, nodes)])
        forms = [form for form in self._known(collective, ranks, nodes) if algorithm in (None, form.algorithm)]
        if forms:
            return Fastest(forms)
        level = self.inner.name
        why = f"; its level {level!r} does not reduce" if algorithm == "nvls_tree" and not self.inner.switch else ""
        raise InputError(
            f"algorithm {algorithm}: hardware {self.inner.profile.name} has no times of it for {collective} among "
            f"{ranks} GPUs on {nodes} nodes{why}; use ring"
        )

    def _known(self, collective: Collective, ranks: int, nodes: int) -> Iterator[Form]:
        """Forms of curves alone."""
        per_node = ranks // nodes
        if per_node == 1:
            for curve in self.outer.allowed(collective, nodes):
                yield Form(curve.curve.algorithm, curve.steps(nodes), partial(curve, ranks=nodes))
        elif collective == "all_to_all":
            yield Form("pairwise", ranks - 1, partial(self._composed.all_to_all, ranks=ranks, nodes=nodes))
        else:
            ring = partial(self._composed.ring, collective, ranks=ranks, nodes=nodes)
            yield Form("ring", algorithm_steps("ring", collective, ranks), ring)
            if collective == "all_reduce":
                inside = {curve.curve.algorithm for curve in self.inner.allowed(collective, per_node)}
                yield from (self._tree(ranks, nodes, one) for one in sorted(inside))

    def _tree(self, ranks: int, nodes: int, inside: str | None) -> Form:
        """A tree over the nodes, in each by its switch or along a chain, or as is faster."""
        per_node, hops = ranks // nodes, self._composed.tree_hops(nodes)
        seconds = partial(self._composed.tree, per_node=per_node, nodes=nodes, inside_by=inside)
        if inside == "nvls":
            return Form("nvls_tree", hops, seconds)
        return Form("tree", 2 * (per_node - 1) + hops, seconds)

    def _hierarchical(self, collective: Collective, ranks: int, nodes: int) -> Form:
        steps = algorithm_steps("ring", collective, ranks // nodes) + algorithm_steps("ring", collective, nodes)
        return Form("hierarchical", steps, partial(self._composed.hierarchical, collective, ranks=ranks, nodes=nodes))


class PickedOverNodes(OverNodes):
    """The same under NCCL, whose choices and protocols between nodes are known."""

    def __init__(
        self, inner: LevelCost, outer: LevelCost, chunk: float, tuner: Tuner, coefficients: NodeCoefficients
    ) -> None:
        super().__init__(inner, outer, chunk)
        self._tuner = tuner
        self._coefficients = coefficients

    def _made(self, collective: Collective, ranks: int, nodes: int, algorithm: str | None) -> Forms:
        if collective in CHUNKED:
            bounds, choices = self._tuner.picks(collective, ranks, nodes, algorithm)
            if choices:
                by_ring = algorithm == "ring"
                forms = [self._picked(choice, collective, ranks, nodes, by_ring=by_ring) for choice in choices]
                return Picked(bounds, forms)
        return super()._made(collective, ranks, nodes, algorithm)

    def _picked(self, choice: Choice, collective: Collective, ranks: int, nodes: int, *, by_ring: bool) -> Form:
        """By the laws of rings and trees of switches; trees of small messages, and one rank a node, by curves. Unless
        only rings are asked for, the smallest messages take what is faster, for NCCL's latencies are short of theirs.
        """
        per_node = ranks // nodes
        adapters = per_node * self.outer.level.share
        if choice.algorithm == "ring":
            seconds = self._ring(choice, collective, ranks, nodes, adapters, by_ring=by_ring)
            return Form("ring", algorithm_steps("ring", collective, ranks), seconds, choice.protocol)
        if choice.algorithm == "nvls_tree" and self.inner.switch:
            time = TreeTime(self._coefficients, self.inner.switch, nodes=nodes, per_node=per_node, adapters=adapters)
            return Form("nvls_tree", time.steps, time, choice.protocol)
        if per_node > 1:
            return self._chains(choice, ranks, nodes)
        hops = self._composed.tree_hops(nodes)
        steps = hops // 2 if choice.algorithm == "pat" else hops
        return Form(choice.algorithm, steps, partial(self.outer.time, collective, ranks=nodes), choice.protocol)

    def _chains(self, choice: Choice, ranks: int, nodes: int) -> Form:
        """A tree over the nodes, in each along a chain of GPUs, whose steps are longer than on one node by itself."""
        chain = self._tree(ranks, nodes, "ring")
        longer = 2 * (ranks // nodes - 1) * NODE_STEP_US / US_PER_S
        return replace(chain, seconds=lambda message: longer + chain.seconds(message), protocol=choice.protocol)

    def _ring(
        self, choice: Choice, collective: Collective, ranks: int, nodes: int, adapters: float, *, by_ring: bool
    ) -> Any:
        """By the law; of one rank a node by the curve between nodes, up to as many as it was measured on."""
        per_node = ranks // nodes
        known = [*self._known(collective, ranks, nodes)]
        curve = partial(self.outer.time, collective, ranks=nodes)
        if per_node == 1 and nodes <= max(one.curve.ranks for one in self.outer.allowed(collective, nodes)):
            return curve
        rings = self.inner.allowed(collective, per_node, "ring") if per_node > 1 else ()
        law = RingTime(
            self._coefficients, collective, choice.protocol, ranks=ranks, adapters=adapters,
            channels=self._tuner.blocks(per_node, nodes),
            inside_gb_per_s=max((one.curve.points[-1][1] for one in rings), default=None),
            latency=min(float(form.seconds(0)) for form in (known[:1] if by_ring else known)),
        )  # fmt: skip
        return law if per_node > 1 else lambda message: larger(law(message), curve(message))
