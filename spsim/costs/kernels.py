"""Durations of kernels from a handful of coefficients, each with a source in the profile.

Every kernel has a start; matrix products, flash attention and kernels bound by the memory have each a formula of their
own.
"""

from __future__ import annotations

from functools import cached_property

from spsim.costs.attention import AttentionCost
from spsim.costs.power import PowerLimit
from spsim.costs.products import ProductCost
from spsim.costs.seconds import Seconds
from spsim.costs.traffic import TrafficCost
from spsim.inputs.hardware import HardwareProfile
from spsim.units import US_PER_S
from spsim.work import CAST_TYPES, FlashAttention, Gemm, MemoryBound, Work


class ComputeCost:
    """Durations on one device, of kernels of one data type unless they name another: of long runs, at the power limit
    of the board, or in a `burst`, as microbenchmarks run. Steps are bursts that `power` slows down.
    """

    def __init__(
        self, profile: HardwareProfile, dtype: str, *, burst: bool = False, products: str | None = None
    ) -> None:
        """`products` is the type that most products name, whose power limit counts."""
        self.profile = profile
        self.dtype = dtype
        self.burst = burst
        self.power = PowerLimit(profile, products or dtype)
        self._by_type: dict[str, ProductCost] = {}
        self._attention_by_type: dict[str, AttentionCost] = {}
        self._overhead = profile.coefficients.kernel_overhead_us.value / US_PER_S

    @cached_property
    def _traffic(self) -> TrafficCost:
        return TrafficCost(self.profile, self.dtype)

    def _products(self, work: Gemm) -> ProductCost:
        """Of the type of a product, or of many that have one type."""
        dtype = work.dtype or self.dtype
        if dtype not in self._by_type:
            rate = self._traffic.bandwidth("elementwise")
            self._by_type[dtype] = ProductCost(self.profile, dtype, rate, burst=self.burst)
        return self._by_type[dtype]

    def _attention(self, work: FlashAttention) -> AttentionCost:
        """Of the type of its operands: beside products of 8 or 4 bits 16 bits, unless it says otherwise."""
        dtype = work.dtype or ("bf16" if self.dtype in CAST_TYPES else self.dtype)
        if dtype not in self._attention_by_type:
            rate = self._traffic.bandwidth("elementwise")
            self._attention_by_type[dtype] = AttentionCost(self.profile, dtype, rate)
        return self._attention_by_type[dtype]

    @property
    def saved_by_graph(self) -> float:
        """Seconds that any kernel starts earlier in a CUDA graph than in a stream."""
        return max(0.0, self._overhead - self.profile.graph_overhead_us / US_PER_S)

    def duration(self, work: Work) -> Seconds:
        """Seconds of a kernel, or of many at once where the numbers of `work` are arrays."""
        match work:
            case Gemm():
                return self._overhead / work.pieces + self._products(work).time(work)
            case FlashAttention():
                return self._overhead + self._attention(work).time(work)
            case MemoryBound():
                return self._overhead + self._traffic.time(work)

    def class_of(self, work: Work) -> str:
        """Dotted path of the coefficients whose held-out error is that of the duration."""
        match work:
            case Gemm():
                return self._products(work).class_of(work)
            case FlashAttention():
                return self._attention(work).class_of(work)
            case MemoryBound():
                return self._traffic.class_of(work)

    def coefficients_of(self, work: Work) -> tuple[str, ...]:
        """Dotted paths of the coefficients behind a duration, for the list of assumed inputs."""
        own_class = self.class_of(work)
        match work:
            case Gemm():
                own = self._products(work).coefficients_of(work)
            case FlashAttention():
                own = self._attention(work).coefficients_of(work)
            case MemoryBound():
                own = self._traffic.coefficients_of(work)
        limited = self.burst and self.power.slowdown and not isinstance(work, MemoryBound)
        power = (f"gemm.sustained_limit.{self.power.dtype}", "power_share") if limited else ()
        return ("kernel_overhead_us", own_class, *own, *power)
