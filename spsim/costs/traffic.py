"""Durations of kernels that take the time of their memory traffic.

At the rates of the kernel where a calibration has measured them, at its row length where that matters, else at a share
of the memory bandwidth by operator class; faster while the tensors fit the last-level cache.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from spsim.costs.seconds import Seconds, given, launch_seconds, together
from spsim.errors import InputError
from spsim.inputs.hardware import HardwareProfile
from spsim.inputs.kernel_coefficients import KernelRates
from spsim.inputs.quantities import Fraction
from spsim.lazy import lazy
from spsim.units import GB, MIB, US_PER_S
from spsim.work import CAST_TYPES, KernelName, MemoryBound, MemoryBoundClass, each


class _Traffic(NamedTuple):
    """Of one kernel, or arrays of many."""

    memory: Seconds
    """Seconds of a byte from the memory."""
    cache: Seconds
    """The same from the last-level cache."""
    start: Seconds
    """Seconds beyond the start of any kernel."""


KEPT = 128
"""Sorts of kernels whose rates are remembered."""


class TrafficCost:
    """Durations of memory-bound kernels on one device in one precision, beyond the start of any kernel."""

    def __init__(self, profile: HardwareProfile, dtype: str) -> None:
        self._profile = profile
        self._dtype = dtype
        self._coefficients = profile.coefficients
        by_row = profile.coefficients.row_rates.values()
        self._segments = max((len(lengths) - 1 for table in by_row for lengths in table.values()), default=0)
        accesses = profile.coefficients.accesses_per_ns
        self._access = 1e-9 / accesses.value if accesses else 0.0
        self._launch = launch_seconds(profile)
        self._cache_bytes = profile.datasheet.memory.l2_mib.value * MIB
        self._cache_bandwidth = self._coefficients.l2_bandwidth_gb_per_s.value * GB

    @lazy
    def _known(self) -> Callable[..., _Traffic]:
        return lru_cache(KEPT)(self._of_rows)

    @lazy
    def _one(self) -> Callable[..., tuple[float, ...]]:
        return lru_cache(KEPT)(self._at)

    def time(self, work: MemoryBound) -> Seconds:
        """Start + bytes over the kernel's own rate, or its class's share of the bandwidth; at the rate of the cache up
        to half the cache, between the two up to the whole.

        Where the row length matters, start and seconds per byte are linear between the measured lengths, constant
        beyond. Elements that are read and written one by one take the time of so many accesses at least. Kernels that
        are launched one by one take no less than their launches, as products do.
        """
        memory, cache, start = self._rates(work)
        beyond = np.minimum(1.0, np.maximum(0.0, 2 * work.bytes_moved / self._cache_bytes - 1))
        traffic: Seconds = work.bytes_moved * (cache + beyond * (memory - cache))
        if given(work.accesses):
            traffic = np.maximum(traffic, work.accesses * self._access)
        if given(work.launched):
            traffic = together(traffic, work.launched * self._launch)
        return start + traffic

    def bandwidth(self, operator_class: MemoryBoundClass) -> float:
        """Bytes per second of a class."""
        shares = self._coefficients.memory_bound
        share: Fraction | None = getattr(shares, shares.share_of(operator_class))
        if share is None:
            raise InputError(
                f"hardware {self._profile.name}: memory_bound has no {operator_class}, which a kernel needs; "
                "add its share of the memory bandwidth to the profile"
            )
        return self._profile.memory_bandwidth * share.value

    def _rates(self, work: MemoryBound) -> _Traffic:
        """Rates at the rows of kernels; remembered but for rows of many workloads, an array with a row for each."""
        sort, row = (work.operator_class, work.kernel, work.backward, work.dtype, work.eager), work.row
        if isinstance(row, np.ndarray):
            return self._of_rows(*sort, row) if row.ndim > 1 else self._known(*sort, tuple(row.tolist()))
        return self._known(*sort, row)

    def _of_rows(self, operator_class: Any, kernel: Any, backward: Any, dtype: Any, eager: Any, row: Any) -> _Traffic:
        """Of one kernel, or arrays of many."""
        row = np.array(row) if isinstance(row, tuple) else row
        memory, cache, start, *segments = each(self._one, operator_class, kernel, backward, dtype, eager)
        for at in range(0, len(segments), 5):
            shortest, length, *changes = segments[at : at + 5]
            share = np.minimum(1.0, np.maximum(0.0, (row - shortest) / length))
            memory, cache, start = (
                own + share * change for own, change in zip((memory, cache, start), changes, strict=True)
            )
        return _Traffic(memory, cache, start)

    def _key(self, kernel: KernelName | None, backward: bool, dtype: str | None) -> tuple[str, str]:
        """Name and type by which measured rates are found; of types that operands are cast to only the casts' own, and
        of gradients those of other tensors unless they are measured apart.
        """
        name, own = rates_key(kernel, backward), dtype or self._dtype
        known = [rates[own] for table in TABLES if own in (rates := getattr(self._coefficients, table))]
        if own not in CAST_TYPES:
            return name, own if known else "bf16"
        names = (name, rates_key(kernel, backward=False))
        return next(((one, own) for one in names if any(one in rates for rates in known)), (name, "bf16"))

    def _at(
        self,
        operator_class: MemoryBoundClass,
        kernel: KernelName | None,
        backward: bool,
        dtype: str | None,
        eager: bool = False,
    ) -> tuple[float, ...]:
        """Of one kernel, as flat as arrays of many need it: `_Traffic` at the shortest measured row; for each step to a
        longer one, as many as any has, where it begins, its length and the changes.
        """
        name, table = self._key(kernel, backward, dtype)
        fused = {} if eager else self._coefficients.fused_rates.get(table, {})
        rates = self._coefficients.kernel_rates.get(table, {}) | fused
        by_row = self._coefficients.row_rates.get(table, {})
        if name not in by_row or name in fused:
            at_any = _traffic(rates[name]) if name in rates else self._of_class(operator_class)
            return *at_any, *(self._segments * _UNCHANGED)
        known = sorted((int(length), _traffic(rates)) for length, rates in by_row[name].items())
        found: list[float] = [*known[0][1]]
        for (shorter, before), (longer, after) in pairwise(known):
            found += (shorter, longer - shorter, *(new - old for old, new in zip(before, after, strict=True)))
        missing = self._segments - (len(known) - 1)
        return *found, *(missing * _UNCHANGED)

    def _of_class(self, operator_class: MemoryBoundClass) -> tuple[float, float, float]:
        """At the share of the class and at the rate of the cache."""
        memory = self.bandwidth(operator_class)
        return 1 / memory, 1 / max(memory, self._cache_bandwidth), 0.0

    def class_of(self, work: MemoryBound) -> str:
        """Dotted path of the coefficients whose held-out error is that of the duration."""
        kernel, dtype = self._key(work.kernel, work.backward, work.dtype)
        for table in TABLES[1:] if work.eager else TABLES:
            if kernel in getattr(self._coefficients, table).get(dtype, {}):
                return f"{table}.{dtype}.{kernel}"
        return f"memory_bound.{self._coefficients.memory_bound.share_of(work.operator_class)}"

    def coefficients_of(self, work: MemoryBound) -> tuple[str, ...]:
        """Dotted paths of the other coefficients behind a duration."""
        cached = ("l2_bandwidth_gb_per_s",) if self.class_of(work).startswith("memory_bound.") else ()
        launched = ("gemm.group_launch_us",) if work.launched else ()
        return (*cached, *launched, *(("accesses_per_ns",) if work.accesses else ()))


TABLES = ("fused_rates", "row_rates", "kernel_rates")
"""Of a profile, with rates of single kernels; the first that knows one counts."""
_UNCHANGED = (0.0, 1.0, 0.0, 0.0, 0.0)
"""The segment of a kernel for which the row length does not matter."""


def _traffic(rates: KernelRates) -> tuple[float, float, float]:
    """Seconds of a byte from memory and cache, and of the start."""
    start = rates.start_us.value / US_PER_S if rates.start_us else 0.0
    return 1 / (rates.memory_gb_per_s.value * GB), 1 / (rates.cache_gb_per_s.value * GB), start


def rates_key(kernel: KernelName | None, backward: bool) -> str:
    """The name of a kernel's pass in `kernel_rates`; of one that has none, a name that is not there."""
    return f"{kernel}_{'backward' if backward else 'forward'}"
