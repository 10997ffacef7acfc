"""Durations of matrix products: tiles of the result on the compute units of the device, in whole waves.

A unit works through one tile at a time, so the last wave takes as long as a full one; of the tile sizes that it has the
library takes the one that is done first. Small tiles are slower: each reads its own operands. The power of the board
limits the rate, in a training step more than in a burst. Facts and held-out errors: docs/model.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from spsim.costs.seconds import Seconds, given, launch_seconds, together
from spsim.inputs.hardware import HardwareProfile
from spsim.inputs.kernel_coefficients import GemmCoefficients
from spsim.inputs.quantities import Fraction
from spsim.units import US_PER_S
from spsim.work import MAIN_GRADIENT_BYTES, OPERAND_BYTES, Gemm

ACCUMULATION_BYTES = 2 * MAIN_GRADIENT_BYTES
"""Read and write of one main gradient."""
LESS = 1e-12
"""Share by which a number of tiles is taken for less, so that rounding does not make a whole wave two."""


class _Constants(NamedTuple):
    """Of one device and precision."""

    tile_m: npt.NDArray[np.float64]
    """A row for each side."""
    tile_n: npt.NDArray[np.float64]
    """A column for each side."""
    part_of_a_wave: float
    """That one tile is."""
    per_k: npt.NDArray[np.float64]
    """Seconds of a wave of tiles and one element of K, by both sides."""
    k_pad: float
    """Elements of K for prologue and epilogue."""
    limit: float
    """FLOP/s that no product exceeds."""
    gradient_rate: float
    """Of a weight gradient, relative to forward."""
    exposed: float
    """Seconds that the accumulation into one main gradient adds to a short product."""
    half_k: float
    """K at which half of that is hidden."""
    start: float
    """Seconds beyond the start of any kernel."""
    launch: float
    """Seconds from one product of a group to the next, where they are launched one by one."""
    grouped: float
    """Rate of a kernel that multiplies a whole group, relative to a product;"""
    grouped_gradient: float
    """of one for weight gradients, relative to that."""
    unaligned: float
    """FLOP/s of products whose rows begin at no multiple of 16 bytes."""


class ProductCost:
    """Durations of products on one device in one precision, beyond the start of any kernel."""

    def __init__(self, profile: HardwareProfile, dtype: str, streaming_rate: float, *, burst: bool) -> None:
        """`streaming_rate` in bytes per second: at which operands and results pass. In a `burst` the device has not
        reached its power limit.
        """
        gemm = profile.coefficients.gemm
        self._dtype = dtype
        self._limit = "burst_limit" if burst or dtype not in gemm.sustained_limit else "sustained_limit"
        self._streaming_rate = streaming_rate
        self._constants = _constants(profile, dtype, self._limit)

    def time(self, work: Gemm) -> Seconds:
        """start + (c^4 + t^4)^(1/4) + exposed accumulation; c the time of the tiles, t that of the traffic.

        c = least over the tiles of waves x (K + pad) x seconds per element of K, with waves = ceil(ceil(m / tile_m) x
        ceil(n / tile_n) x batch / units), and no less than FLOPs over the power limit.
        Of two times of one length neither hides the other: together they take 1.19 times as long. The accumulation
        into main gradients is hidden by K / (K + half_k), at the rate of the memory. Products of a group that are
        launched one by one take no less than their launches, likewise.
        """
        gemm, flops = self._constants, work.flops
        limit: Seconds = gemm.limit
        if given(work.unaligned):
            limit = np.where(np.greater(work.unaligned, 0), gemm.unaligned, gemm.limit)
        compute = np.maximum(self._tiles(work, np.ndim(flops)), flops / limit)
        accumulated = given(work.accumulated)
        if accumulated:
            compute = compute / np.where(np.greater(work.accumulated, 0), gemm.gradient_rate, 1.0)
        if given(work.grouped):
            rate = np.where(np.greater(work.accumulated, 0), gemm.grouped * gemm.grouped_gradient, gemm.grouped)
            compute = compute / np.where(np.greater(work.grouped, 0), rate, 1.0)
        longer = together(compute, work.bytes_moved / self._streaming_rate)
        total: Seconds = gemm.start / work.pieces + longer
        if accumulated:
            total = total + gemm.exposed * work.accumulated / (1 + work.k / gemm.half_k)
        return together(total, work.launched * gemm.launch) if given(work.launched) else total

    def _tiles(self, work: Gemm, axes: int) -> Seconds:
        """Seconds of the waves of tiles, of the size that is done first; of kernels in an array of so many axes.

        Sides of tiles are the first two axes, and in place, since arrays of many kernels are large.
        """
        gemm, outer = self._constants, (..., *(axes * (np.newaxis,)))
        rows = np.ceil(work.m / gemm.tile_m[outer]) * (work.batch * work.pieces) * gemm.part_of_a_wave
        waves = rows * np.ceil(work.n / gemm.tile_n[outer])
        np.ceil(waves, out=waves)
        waves *= gemm.per_k[outer]
        least: Seconds = np.minimum.reduce(waves, axis=(0, 1)) * (work.k + gemm.k_pad)
        return least / work.pieces

    def class_of(self, work: Gemm) -> str:
        """Dotted path of the coefficients whose held-out error is that of the duration."""
        return f"gemm.fraction.{self._dtype}"

    def coefficients_of(self, work: Gemm) -> tuple[str, ...]:
        """Dotted paths of the other coefficients behind a duration."""
        names: tuple[str, ...] = ("tile_m", "tile_n", "full_rate_side", "k_pad_bytes", "start_us")
        names += ("unaligned_rate",) if np.any(work.unaligned) else ()
        by_type: tuple[str, ...] = (self._limit,)
        by_type += ("weight_gradient_rate", "accumulation_exposed", "accumulation_half_k") if work.accumulated else ()
        if work.grouped:
            by_type += ("grouped_rate", *(("grouped_weight_gradient_rate",) if work.accumulated else ()))
        names += ("group_launch_us",) if work.launched else ()
        return (
            "memory_bound.elementwise",
            *(f"gemm.{n}" for n in names),
            *(f"gemm.{n}.{self._dtype}" for n in by_type),
        )


def _constants(profile: HardwareProfile, dtype: str, limit: str) -> _Constants:
    gemm, peak = profile.coefficients.gemm, profile.peak(dtype)
    tile_m, tile_n = (np.array(sides.value, dtype=np.float64) for sides in (gemm.tile_m, gemm.tile_n))
    units = profile.datasheet.compute_units.value
    area = np.multiply.outer(tile_m, tile_n)
    # A tile of m x n reads m + n elements for every m x n multiplications; at the full rate 2 / side for each of them.
    slower = np.maximum(1.0, gemm.full_rate_side.value / 2 * np.add.outer(tile_m, tile_n) / area)
    per_k = 2 * area * units / (peak * gemm.fraction[dtype].value)
    highest = getattr(gemm, limit).get(dtype)
    most = peak * (highest.value if highest else 1.0)
    return _Constants(
        tile_m=tile_m[:, np.newaxis],
        tile_n=tile_n[np.newaxis],
        part_of_a_wave=(1 - LESS) / units,
        per_k=per_k * slower,
        k_pad=gemm.k_pad_bytes.value / OPERAND_BYTES[dtype],
        limit=most,
        gradient_rate=gemm.weight_gradient_rate[dtype].value,
        exposed=gemm.accumulation_exposed[dtype].value * ACCUMULATION_BYTES / profile.memory_bandwidth,
        half_k=_half_k(gemm, dtype),
        start=gemm.start_us.value / US_PER_S,
        launch=launch_seconds(profile),
        grouped=_rate(gemm.grouped_rate, dtype),
        grouped_gradient=_rate(gemm.grouped_weight_gradient_rate, dtype),
        unaligned=most * (gemm.unaligned_rate.value if gemm.unaligned_rate else 1.0),
    )


def _rate(rates: Mapping[str, Fraction], dtype: str) -> float:
    return rates[dtype].value if dtype in rates else 1.0


def _half_k(gemm: GemmCoefficients, dtype: str) -> float:
    half_k = gemm.accumulation_half_k.get(dtype)
    return half_k.value if half_k else np.inf
