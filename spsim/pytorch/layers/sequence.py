"""Which positions of the sequence a rank holds, and cutting and joining whole tensors accordingly."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from spsim.inputs.plan import Plan
from spsim.program.mesh import Axis
from spsim.pytorch.layers.collectives import start_all_gather
from spsim.pytorch.layers.groups import Groups

INSIDE_ATTENTION: tuple[Axis, ...] = ("ring",)
BETWEEN_LINEARS: tuple[Axis, ...] = ("ring", "ulysses")


class SequenceShards:
    """Sequences are cut along ring, ulysses and, with sequence parallelism, tp, outer to inner.

    A causal zigzag ring of P ranks gives rank r the half-chunks r and 2P - 1 - r of 2P.
    """

    def __init__(self, plan: Plan, groups: Groups, *, causal: bool) -> None:
        self.groups = groups
        self.zigzag = causal and plan.ring > 1 and plan.ring_cut == "zigzag"
        self.axes: tuple[Axis, ...] = ("ring", "ulysses", "tp") if plan.sequence_parallel else ("ring", "ulysses")

    def order(self, seq_len: int) -> Tensor:
        """The position that stands at each place when the shards of all ranks are joined."""
        positions = torch.arange(seq_len)
        if not self.zigzag:
            return positions
        halves = positions.chunk(2 * self.groups.degree("ring"))
        pairs = zip(halves[: len(halves) // 2], reversed(halves[len(halves) // 2 :]), strict=True)
        return torch.cat([half for pair in pairs for half in pair])

    def positions(self, local_len: int, axes: Sequence[Axis]) -> Tensor:
        """Global positions of this rank's tokens, where the sequence is cut along `axes`."""
        for axis in axes:
            local_len *= self.groups.degree(axis)
        return self._cut(self.order(local_len), axes)

    def _cut(self, x: Tensor, axes: Sequence[Axis]) -> Tensor:
        for axis in axes:
            x = x.chunk(self.groups.degree(axis))[self.groups.coordinate(axis)]
        return x

    def local(self, whole: Tensor) -> Tensor:
        """This rank's part of [s ...], with a storage of its own."""
        return self._cut(whole[self.order(whole.shape[0]).to(whole.device)], self.axes).clone()

    def whole(self, part: Tensor) -> Tensor:
        """[s ...] of the parts of all ranks; every rank calls it."""
        for axis in reversed(self.axes):
            part = start_all_gather(part, self.groups.group(axis)).wait()
        return part[self.order(part.shape[0]).argsort().to(part.device)]
