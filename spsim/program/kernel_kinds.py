"""Which kernels an operator launches: by its kind, or the several that it says itself."""

from __future__ import annotations

import math
from collections.abc import Set

from spsim.lazy import lazy
from spsim.program.attention import Attention
from spsim.program.cached import CachedAttention, CacheWrite, FewTokens
from spsim.program.kernels import Casting, Kernels, Lookup, Product
from spsim.program.launches import Launch, Launches
from spsim.program.placed import PlacedOperator
from spsim.work import FP32_BYTES, MemoryBound, Work


class Separate(Kernels):
    """The kernels of an operator that torch runs as several: all but the last of a pass only `lead` to that one, which
    writes what is kept and handed on.
    """

    @property
    def launches(self) -> Launches:
        """As the operator says."""
        assert self.operator.launches is not None
        return self.operator.launches

    @lazy
    def _forward(self) -> tuple[Work, ...]:
        return self._works(self.launches.forward)[-1:]

    @lazy
    def _backward(self) -> tuple[Work, ...]:
        return self._works(self.launches.backward)[-1:]

    def leading(self, *, backward: bool) -> tuple[Work, ...]:
        """Those before the last."""
        return self._works(self.launches.backward if backward else self.launches.forward)[:-1]

    def _works(self, launches: tuple[Launch, ...]) -> tuple[Work, ...]:
        return tuple([self._work(launch) for launch in launches])

    def _work(self, launch: Launch) -> MemoryBound:
        """A kernel with fp32 tensors takes the rates of fp32."""
        result, given = self.placed.outputs[0], self.placed.inputs[0]
        of_result = launch.narrow * given.tensor.itemsize + launch.wide * FP32_BYTES + launch.masks
        in_rows = result.elements // self._product(self.operator.mixes) if launch.rows else 0
        return MemoryBound(
            launch.kind,
            math.ceil(result.elements * of_result) + launch.inputs * given.bytes + launch.rows * FP32_BYTES * in_rows,
            launch.kernel,
            launch.gradient,
            self.row,
            dtype="fp32" if launch.wide or (launch.rows and not launch.narrow) else None,
            accesses=launch.accesses * result.elements,
            eager=True,
        )


class InEpilogue(Kernels):
    """What the kernel of a product does on its way: tasks that take no time, for their results need memory."""

    @lazy
    def _alone(self) -> Kernels:
        """As it would be launched apart."""
        return _KINDS.get(self.operator.kind, Kernels)(self.placed, self.gathered)

    def forward(self, causal: bool, ring_cut: str) -> tuple[Work | None, ...]:
        """No kernel where there would be one."""
        return (None,) if self._alone.forward(causal, ring_cut) else ()

    def backward(self, causal: bool, ring_cut: str) -> tuple[Work | None, ...]:
        """The same."""
        return (None,) if self._alone.backward(causal, ring_cut) else ()


def kernels_of(placed: PlacedOperator, gathered: Set[str] = frozenset()) -> Kernels:
    """The kernels of an operator."""
    if placed.outputs[0].tensor.kind == "cache":
        return CacheWrite(placed, gathered)
    if placed.operator.kind == "attention" and placed.inputs[1].tensor.kind == "cache":
        return CachedAttention(placed, gathered)
    if placed.operator.served_experts is not None:
        return FewTokens(placed, gathered)
    kind = Separate if placed.operator.launches else _KINDS.get(placed.operator.kind, Kernels)
    if placed.operator.group == "epilogue":
        kind = InEpilogue
    return kind(placed, gathered)


_KINDS: dict[str, type[Kernels]] = {"gemm": Product, "attention": Attention, "embedding": Lookup, "cast": Casting}
