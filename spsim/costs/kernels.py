"""Durations of kernels from a handful of coefficients, each with a source in the profile.

A GEMM takes its FLOPs at a share of the dense peak, or its bytes, whichever is longer; K is padded by the
prologue and epilogue of a tile, and the last wave of tiles is half empty on average. Flash attention takes
its FLOPs at a share that falls for short sequences. All else takes its memory traffic at the rates of its kernel
where a calibration has measured them, else at a share of the memory bandwidth by operator class, faster while
the tensors fit the last-level cache.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from spsim.costs.static_memory import MAIN_GRADIENT_BYTES
from spsim.inputs.hardware import HardwareProfile
from spsim.units import GB, MIB, US_PER_S
from spsim.work import (
    Direction,
    FlashAttention,
    Gemm,
    KernelName,
    MemoryBound,
    MemoryBoundClass,
    Work,
    each,
)

Seconds = float | npt.NDArray[np.float64]

ACCUMULATION_BYTES = 2 * MAIN_GRADIENT_BYTES
"""Read and write of one main gradient."""


class _GemmConstants(NamedTuple):
    """Of one device and precision."""

    rate: float
    """FLOP/s of a long product."""
    gradient_rate: float
    """The same of a product that is accumulated into main gradients."""
    tile: float
    """Elements of a tile of the result."""
    lost_tiles: float
    k_pad: float
    exposed_bytes: float
    """Of the accumulation, per element."""
    bandwidth: float
    """Bytes per second of the memory."""
    start: float
    """Seconds beyond the start of any kernel."""
    exposed_traffic: float
    """Share of the shorter of FLOP time and memory time."""


class ComputeCost:
    """Durations on one device in one precision."""

    def __init__(self, profile: HardwareProfile, dtype: str) -> None:
        self.profile = profile
        self.dtype = dtype
        self.coefficients = profile.coefficients
        self.peak = profile.peak(dtype)
        # Where fp8 attention has no curves, products alone are in fp8, as Transformer Engine runs a layer.
        own = dtype != "fp8" or dtype in self.coefficients.attention_by_dtype
        self.attention_dtype = dtype if own else "bf16"
        self.attention = self.coefficients.attention_by_dtype.get(self.attention_dtype, self.coefficients.attention)
        self._rates_of = dtype if dtype in self.coefficients.kernel_rates else "bf16"
        self._rates = self.coefficients.kernel_rates.get(self._rates_of, {})
        self._attention_curves: dict[object, tuple[Seconds, Seconds, Seconds]] = {}
        self._traffic: dict[object, tuple[Seconds, Seconds, Seconds]] = {}

    @cached_property
    def _overhead(self) -> float:
        return self.coefficients.kernel_overhead_us.value / US_PER_S

    @cached_property
    def _streaming_rate(self) -> float:
        """Bytes per second that products and attention read and write their tensors at."""
        return self._bandwidth("elementwise")

    def duration(self, work: Work) -> Seconds:
        """Seconds of a kernel, or of many at once where the numbers of `work` are arrays."""
        match work:
            case Gemm():
                return self.gemm_time(work)
            case FlashAttention():
                return self.attention_time(work)
            case MemoryBound():
                return self._overhead + self.memory_time(work)

    def gemm_time(self, work: Gemm) -> Seconds:
        """overhead + max(FLOP time, memory time) + the exposed parts of traffic and gradient accumulation.

        FLOP time = flops x (1 + pad / K) x (1 + tail x units / tiles) / (peak x fraction): `tail` waves of
        tiles are lost at the end, of `units` tiles each (facts and held-out errors: docs/model.md).
        """
        gemm = self._gemm
        rate = np.where(np.asarray(work.accumulated) > 0, gemm.gradient_rate, gemm.rate)
        tail = gemm.lost_tiles / (work.batch * work.m * work.n / gemm.tile)
        flop_time = work.flops * (1 + gemm.k_pad / work.k) * (1 + tail) / rate
        memory_time = work.bytes_moved / self._streaming_rate
        epilogue = gemm.exposed_bytes * work.accumulated / gemm.bandwidth
        total: Seconds = self._overhead + gemm.start + np.maximum(flop_time, memory_time) + epilogue
        if gemm.exposed_traffic:
            total = total + gemm.exposed_traffic * np.minimum(flop_time, memory_time)
        return total

    @cached_property
    def _gemm(self) -> _GemmConstants:
        gemm = self.coefficients.gemm
        rate = self.peak * gemm.fraction[self.dtype].value
        return _GemmConstants(
            rate=rate,
            gradient_rate=rate * gemm.weight_gradient_rate.value,
            tile=gemm.tile_m.value * gemm.tile_n.value,
            lost_tiles=gemm.tail_waves.value * self.profile.datasheet.compute_units.value,
            k_pad=gemm.k_pad.value,
            exposed_bytes=gemm.accumulation_exposed.value * ACCUMULATION_BYTES,
            bandwidth=self.profile.memory_bandwidth,
            start=gemm.start_us.value / US_PER_S if gemm.start_us else 0.0,
            exposed_traffic=gemm.traffic_exposed.value if gemm.traffic_exposed else 0.0,
        )

    def attention_time(self, work: FlashAttention) -> Seconds:
        """overhead + max(flops / (peak x fraction x n / (n + half_tokens)), memory time), n the shorter side.

        Where blocks of keys are known, a masked kernel computes half a block more for each query.
        """
        fraction, half_tokens, block = self._attention_curve(work.direction, work.causal, work.head_dim)
        tokens = np.minimum(work.queries, work.keys)
        rate = self._attention_peak * fraction * tokens / (tokens + half_tokens)
        memory_time = work.bytes_moved / self._streaming_rate
        total: Seconds = self._overhead + np.maximum(work.flops * self._in_blocks(work, block) / rate, memory_time)
        return total

    def _in_blocks(self, work: FlashAttention, block: Seconds) -> Seconds:
        """Pairs that are computed over those that the mask leaves; without a mask all are, and none is added."""
        if not any(self._blocks.values()):
            return 1.0
        whole = np.minimum(2 * work.queries * work.keys, work.twice_pairs + work.queries * block)
        ratio: Seconds = whole / work.twice_pairs
        return ratio

    @cached_property
    def _attention_peak(self) -> float:
        return self.profile.peak(self.attention_dtype)

    @cached_property
    def _blocks(self) -> dict[str, float]:
        masks = {"forward": self.attention.forward, "backward": self.attention.backward}
        return {name: own.block_tokens.value if own.block_tokens else 0.0 for name, own in masks.items()}

    def _attention_curve(self, direction: Direction, causal: bool, head_dim: Any) -> tuple[Seconds, Seconds, Seconds]:
        """Fraction and half-length at a head size, linear between the measured sizes, constant beyond; and the block
        of keys. Sizes of many kernels are looked up one by one, as names and flags are.
        """
        key = (direction, causal, tuple(head_dim.tolist()) if isinstance(head_dim, np.ndarray) else head_dim)
        if key not in self._attention_curves:
            self._attention_curves[key] = each(self._at, *key)
        return self._attention_curves[key]

    def _at(self, direction: Direction, causal: bool, head_dim: int) -> tuple[float, float, float]:
        masks = getattr(self.attention, direction)
        curves = masks.causal if causal else masks.full
        known = sorted((int(size), curve.fraction.value, curve.half_tokens.value) for size, curve in curves.items())
        sizes, fractions, lengths = zip(*known, strict=True)
        fraction, half_tokens = (float(np.interp(head_dim, sizes, values)) for values in (fractions, lengths))
        return fraction, half_tokens, self._blocks[direction]

    def memory_time(self, work: MemoryBound) -> Seconds:
        """Bytes over the kernel's own rate, or its class's share of the bandwidth; at the rate of the cache up to
        half the cache, between the two up to the whole.
        """
        total = work.bytes_moved
        memory_rate, cache_rate, start = self._traffic_of(work.operator_class, work.kernel, work.backward)
        memory, cache = total / memory_rate, total / cache_rate
        beyond = np.minimum(1.0, np.maximum(0.0, 2 * total / self._cache_bytes - 1))
        time: Seconds = start + cache + beyond * (memory - cache)
        return time

    @cached_property
    def _cache_bytes(self) -> float:
        return self.profile.datasheet.memory.l2_mib.value * MIB

    @cached_property
    def _cache_bandwidth(self) -> float:
        return self.coefficients.l2_bandwidth_gb_per_s.value * GB

    def _traffic_of(
        self, operator_class: MemoryBoundClass, kernel: KernelName | None, backward: bool
    ) -> tuple[Seconds, Seconds, Seconds]:
        """Bytes per second from the memory and from the cache, and seconds to start; arrays for many kernels."""
        key = (operator_class, kernel, backward)
        if key not in self._traffic:
            self._traffic[key] = each(self._traffic_at, *key)
        return self._traffic[key]

    def _traffic_at(
        self, operator_class: MemoryBoundClass, kernel: KernelName | None, backward: bool
    ) -> tuple[float, float, float]:
        """Of one kernel: as measured by itself, else at the share of its class and at the rate of the cache."""
        rates = self._rates.get(rates_key(kernel, backward))
        if rates is None:
            memory = self._bandwidth(operator_class)
            return memory, max(memory, self._cache_bandwidth), 0.0
        start = rates.start_us.value / US_PER_S if rates.start_us else 0.0
        return rates.memory_gb_per_s.value * GB, rates.cache_gb_per_s.value * GB, start

    def _bandwidth(self, operator_class: MemoryBoundClass) -> float:
        share: float = getattr(self.coefficients.memory_bound, operator_class).value
        return self.profile.memory_bandwidth * share

    def class_of(self, work: Work) -> str:
        """Dotted path of the coefficients whose held-out error is that of the duration."""
        match work:
            case Gemm():
                return f"gemm.fraction.{self.dtype}"
            case FlashAttention():
                return f"{self._attention_path}.{work.direction}.{'causal' if work.causal else 'full'}"
        kernel = rates_key(work.kernel, work.backward)
        own = kernel in self._rates
        return f"kernel_rates.{self._rates_of}.{kernel}" if own else f"memory_bound.{work.operator_class}"

    @property
    def _attention_path(self) -> str:
        own = self.attention_dtype in self.coefficients.attention_by_dtype
        return f"attention_by_dtype.{self.attention_dtype}" if own else "attention"

    def coefficients_of(self, work: Work) -> tuple[str, ...]:
        """Dotted paths of the coefficients behind a duration, for the list of assumed inputs."""
        own_class = self.class_of(work)
        paths: tuple[str, ...] = ("kernel_overhead_us", own_class)
        match work:
            case Gemm():
                names = ("k_pad", "tile_m", "tile_n", "tail_waves", "traffic_exposed", "start_us")
                gradient = ("weight_gradient_rate", "accumulation_exposed") if work.accumulated else ()
                paths += ("memory_bound.elementwise", *(f"gemm.{name}" for name in names + gradient))
            case FlashAttention():
                blocks = (f"{self._attention_path}.{work.direction}.block_tokens",) if work.causal else ()
                paths += (*blocks, "memory_bound.elementwise")
            case MemoryBound():
                paths += ("l2_bandwidth_gb_per_s",) if own_class.startswith("memory_bound.") else ()
        return paths


def rates_key(kernel: KernelName | None, backward: bool) -> str:
    """The name of a kernel's pass in `kernel_rates`; of one that has none, a name that is not there."""
    return f"{kernel}_{'backward' if backward else 'forward'}"
