"""Durations of kernels from a handful of coefficients, each with a source in the profile.

A GEMM takes its FLOPs at a share of the dense peak, or its bytes, whichever is longer; K is padded by the
prologue and epilogue of a tile, and the last wave of tiles is half empty on average. Flash attention takes
its FLOPs at a share that falls for short sequences. All else takes its memory traffic at a share of the
memory bandwidth by operator class, faster while the tensors fit the last-level cache.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np
import numpy.typing as npt

from spsim.hardware import Fraction, HardwareProfile
from spsim.memory import MAIN_GRADIENT_BYTES
from spsim.units import GB, MIB, US_PER_S
from spsim.work import Direction, FlashAttention, Gemm, MemoryBound, MemoryBoundClass, Work

Seconds = float | npt.NDArray[np.float64]

ACCUMULATION_BYTES = 2 * MAIN_GRADIENT_BYTES
"""Read and write of one main gradient."""


class ComputeCost:
    """Durations on one device in one precision."""

    def __init__(self, profile: HardwareProfile, dtype: str) -> None:
        self.profile = profile
        self.dtype = dtype
        self.coefficients = profile.coefficients
        self.peak = profile.peak(dtype)
        self.attention = self.coefficients.attention_by_dtype.get(dtype, self.coefficients.attention)
        self._rates_of = dtype if dtype in self.coefficients.kernel_rates else "bf16"
        self._rates = self.coefficients.kernel_rates.get(self._rates_of, {})
        self._attention_curves: dict[tuple[Direction, bool, int], tuple[float, float]] = {}

    @cached_property
    def _overhead(self) -> float:
        return self.coefficients.kernel_overhead_us.value / US_PER_S

    @cached_property
    def _cache_bytes(self) -> float:
        return self.profile.datasheet.memory.l2_mib.value * MIB

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
        gemm = self.coefficients.gemm
        slower = np.where(np.asarray(work.accumulated) > 0, gemm.weight_gradient_rate.value, 1.0)
        rate = self.peak * gemm.fraction[self.dtype].value * slower
        tiles = work.batch * work.m * work.n / (gemm.tile_m.value * gemm.tile_n.value)
        tail = gemm.tail_waves.value * self.profile.datasheet.compute_units.value / tiles
        flop_time = work.flops * (1 + gemm.k_pad.value / work.k) * (1 + tail) / rate
        memory_time = work.bytes_moved / self._bandwidth("elementwise")
        epilogue = (
            gemm.accumulation_exposed.value * ACCUMULATION_BYTES * work.accumulated / self.profile.memory_bandwidth
        )
        start = gemm.start_us.value / US_PER_S if gemm.start_us else 0.0
        total: Seconds = self._overhead + start + np.maximum(flop_time, memory_time) + epilogue
        if gemm.traffic_exposed:
            total = total + gemm.traffic_exposed.value * np.minimum(flop_time, memory_time)
        return total

    def attention_time(self, work: FlashAttention) -> Seconds:
        """overhead + max(flops / (peak x fraction x n / (n + half_tokens)), memory time), n the shorter side.

        Where blocks of keys are known, a masked kernel computes half a block more for each query.
        """
        fraction, half_tokens = self._attention_curve(work.direction, work.causal, work.head_dim)
        tokens = np.minimum(work.queries, work.keys)
        rate = self.peak * fraction * tokens / (tokens + half_tokens)
        memory_time = work.bytes_moved / self._bandwidth("elementwise")
        total: Seconds = self._overhead + np.maximum(work.flops * self._in_blocks(work) / rate, memory_time)
        return total

    def _in_blocks(self, work: FlashAttention) -> Seconds:
        """Pairs that are computed over those that the mask leaves."""
        block = getattr(self.attention, work.direction).block_tokens
        if block is None or not work.causal:
            return 1.0
        whole = np.minimum(2 * work.queries * work.keys, work.twice_pairs + work.queries * block.value)
        ratio: Seconds = whole / work.twice_pairs
        return ratio

    def _attention_curve(self, direction: Direction, causal: bool, head_dim: int) -> tuple[float, float]:
        """Fraction and half-length at a head size: linear between the measured sizes, constant beyond."""
        key = (direction, causal, head_dim)
        if key not in self._attention_curves:
            masks = getattr(self.attention, direction)
            curves = masks.causal if causal else masks.full
            known = sorted((int(size), curve.fraction.value, curve.half_tokens.value) for size, curve in curves.items())
            sizes, fractions, lengths = zip(*known, strict=True)
            found = (float(np.interp(head_dim, sizes, column)) for column in (fractions, lengths))
            self._attention_curves[key] = (next(found), next(found))
        return self._attention_curves[key]

    def memory_time(self, work: MemoryBound) -> Seconds:
        """Bytes over the class's share of the bandwidth; at the cache's rate up to half the cache, between
        the two up to the whole.
        """
        total = work.bytes_moved
        memory, cache = self._traffic_times(work)
        beyond = np.minimum(1.0, np.maximum(0.0, 2 * total / self._cache_bytes - 1))
        time: Seconds = cache + beyond * (memory - cache)
        return time

    def _traffic_times(self, work: MemoryBound) -> tuple[Seconds, Seconds]:
        """Seconds of the traffic at the rate of the memory and of the cache."""
        if not self._rates:
            return self._shared_times(work)
        forward, backward = (self._own_times(work, direction) for direction in ("forward", "backward"))
        return np.where(work.backward, backward[0], forward[0]), np.where(work.backward, backward[1], forward[1])

    def _shared_times(self, work: MemoryBound) -> tuple[Seconds, Seconds]:
        total = work.bytes_moved
        memory = total / self._bandwidth(work.operator_class)
        return memory, np.minimum(memory, total / (self.coefficients.l2_bandwidth_gb_per_s.value * GB))

    def _own_times(self, work: MemoryBound, direction: Direction) -> tuple[Seconds, Seconds]:
        """The same at the rates of a kernel, with its start, where it has been measured by itself."""
        rates = self._rates.get(f"{work.operator_class}_{direction}")
        if rates is None:
            return self._shared_times(work)
        start = rates.start_us.value / US_PER_S if rates.start_us else 0.0
        total = work.bytes_moved
        return start + total / (rates.memory_gb_per_s.value * GB), start + total / (rates.cache_gb_per_s.value * GB)

    def _bandwidth(self, operator_class: MemoryBoundClass) -> float:
        fraction: Fraction = getattr(self.coefficients.memory_bound, operator_class)
        return self.profile.memory_bandwidth * fraction.value

    def coefficients_of(self, work: Work) -> tuple[str, ...]:
        """Dotted paths of the coefficients behind a duration, for the list of assumed inputs."""
        paths: tuple[str, ...] = ("kernel_overhead_us",)
        match work:
            case Gemm():
                names = (
                    f"fraction.{self.dtype}", "k_pad", "tile_m", "tile_n", "tail_waves", "traffic_exposed", "start_us"
                )  # fmt: skip
                gradient = ("weight_gradient_rate", "accumulation_exposed") if work.accumulated else ()
                paths += ("memory_bound.elementwise", *(f"gemm.{name}" for name in names + gradient))
            case FlashAttention():
                mask = "causal" if work.causal else "full"
                own = self.dtype in self.coefficients.attention_by_dtype
                curves = f"attention_by_dtype.{self.dtype}" if own else "attention"
                blocks = (f"{curves}.{work.direction}.block_tokens",) if work.causal else ()
                paths += (f"{curves}.{work.direction}.{mask}", *blocks, "memory_bound.elementwise")
            case MemoryBound():
                kernel = f"{work.operator_class}_{'backward' if work.backward else 'forward'}"
                if kernel in self._rates:
                    return (*paths, f"kernel_rates.{self._rates_of}.{kernel}")
                paths += (f"memory_bound.{work.operator_class}", "l2_bandwidth_gb_per_s")
        return paths
