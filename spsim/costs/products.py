"""Durations of matrix products.

A product takes its FLOPs at a share of the dense peak, or its bytes, whichever is longer; K is padded by the prologue
and epilogue of a tile, and the last wave of tiles is half empty on average.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from spsim.costs.seconds import Seconds
from spsim.inputs.hardware import HardwareProfile
from spsim.units import US_PER_S
from spsim.work import MAIN_GRADIENT_BYTES, Gemm

ACCUMULATION_BYTES = 2 * MAIN_GRADIENT_BYTES
"""Read and write of one main gradient."""


class _Constants(NamedTuple):
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


class ProductCost:
    """Durations of products on one device in one precision, beyond the start of any kernel."""

    def __init__(self, profile: HardwareProfile, dtype: str, streaming_rate: float) -> None:
        """`streaming_rate` in bytes per second: at which operands and results pass."""
        gemm = profile.coefficients.gemm
        rate = profile.peak(dtype) * gemm.fraction[dtype].value
        self._dtype = dtype
        self._streaming_rate = streaming_rate
        self._constants = _Constants(
            rate=rate,
            gradient_rate=rate * gemm.weight_gradient_rate.value,
            tile=gemm.tile_m.value * gemm.tile_n.value,
            lost_tiles=gemm.tail_waves.value * profile.datasheet.compute_units.value,
            k_pad=gemm.k_pad.value,
            exposed_bytes=gemm.accumulation_exposed.value * ACCUMULATION_BYTES,
            bandwidth=profile.memory_bandwidth,
            start=gemm.start_us.value / US_PER_S if gemm.start_us else 0.0,
            exposed_traffic=gemm.traffic_exposed.value if gemm.traffic_exposed else 0.0,
        )

    def time(self, work: Gemm) -> Seconds:
        """max(FLOP time, memory time) + the exposed parts of traffic and gradient accumulation.

        FLOP time = flops x (1 + pad / K) x (1 + tail x units / tiles) / (peak x fraction): `tail` waves of
        tiles are lost at the end, of `units` tiles each (facts and held-out errors: docs/model.md).
        """
        gemm = self._constants
        rate = np.where(np.asarray(work.accumulated) > 0, gemm.gradient_rate, gemm.rate)
        tail = gemm.lost_tiles / (work.batch * work.m * work.n / gemm.tile)
        flop_time = work.flops * (1 + gemm.k_pad / work.k) * (1 + tail) / rate
        memory_time = work.bytes_moved / self._streaming_rate
        epilogue = gemm.exposed_bytes * work.accumulated / gemm.bandwidth
        total: Seconds = gemm.start + np.maximum(flop_time, memory_time) + epilogue
        if gemm.exposed_traffic:
            total = total + gemm.exposed_traffic * np.minimum(flop_time, memory_time)
        return total

    def class_of(self, work: Gemm) -> str:
        """Dotted path of the coefficients whose held-out error is that of the duration."""
        return f"gemm.fraction.{self._dtype}"

    def coefficients_of(self, work: Gemm) -> tuple[str, ...]:
        """Dotted paths of the other coefficients behind a duration."""
        names: tuple[str, ...] = ("k_pad", "tile_m", "tile_n", "tail_waves", "traffic_exposed", "start_us")
        names += ("weight_gradient_rate", "accumulation_exposed") if work.accumulated else ()
        return ("memory_bound.elementwise", *(f"gemm.{name}" for name in names))
