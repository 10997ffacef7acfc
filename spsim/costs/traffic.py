"""Durations of kernels that take the time of their memory traffic.

At the rates of the kernel where a calibration has measured them, at its row length where that matters, else at a share
of the memory bandwidth by operator class; faster while the tensors fit the last-level cache.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import numpy as np

from spsim.costs.seconds import Seconds
from spsim.errors import InputError
from spsim.inputs.hardware import HardwareProfile
from spsim.inputs.kernel_coefficients import KernelRates
from spsim.inputs.quantities import Fraction
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


class _Segment(NamedTuple):
    """From one measured row length to the next; of a kernel for which it does not matter nothing changes."""

    shortest: Seconds
    length: Seconds
    change: _Traffic


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
        self._cache_bytes = profile.datasheet.memory.l2_mib.value * MIB
        self._cache_bandwidth = self._coefficients.l2_bandwidth_gb_per_s.value * GB
        self._known: dict[object, tuple[_Traffic, tuple[_Segment, ...]]] = {}

    def time(self, work: MemoryBound) -> Seconds:
        """Start + bytes over the kernel's own rate, or its class's share of the bandwidth; at the rate of the cache up
        to half the cache, between the two up to the whole.

        Where the row length matters, start and seconds per byte are linear between the measured lengths, constant
        beyond. Elements that are read and written one by one take the time of so many accesses at least.
        """
        total = work.bytes_moved
        (memory, cache, start), segments = self._look_up(work)
        row = _once(work.row)
        for segment in segments:
            share = np.minimum(1.0, np.maximum(0.0, (row - segment.shortest) / segment.length))
            memory = memory + share * segment.change.memory
            cache = cache + share * segment.change.cache
            start = start + share * segment.change.start
        beyond = np.minimum(1.0, np.maximum(0.0, 2 * total / self._cache_bytes - 1))
        traffic: Seconds = total * (cache + beyond * (memory - cache))
        if np.any(work.accesses):
            traffic = np.maximum(traffic, work.accesses * self._access)
        return start + traffic

    def bandwidth(self, operator_class: MemoryBoundClass) -> float:
        """Bytes per second of a class."""
        share: Fraction | None = getattr(self._coefficients.memory_bound, operator_class)
        if share is None:
            raise InputError(
                f"hardware {self._profile.name}: memory_bound has no {operator_class}, which a kernel needs; "
                "add its share of the memory bandwidth to the profile"
            )
        return self._profile.memory_bandwidth * share.value

    def _look_up(self, work: MemoryBound) -> tuple[_Traffic, tuple[_Segment, ...]]:
        """At the shortest measured row, and the changes to longer ones; arrays for many kernels."""
        key = (work.operator_class, work.kernel, work.backward, work.dtype)
        if key not in self._known:
            memory, cache, start, *rest = each(self._at, *key)
            segments = (rest[at : at + 5] for at in range(0, len(rest), 5))
            found = tuple(_Segment(shortest, length, _Traffic(*change)) for shortest, length, *change in segments)
            self._known[key] = _Traffic(memory, cache, start), found
        return self._known[key]

    def _table(self, kernel: str, dtype: str | None) -> str:
        """The type whose measured rates count; of types that operands are cast to only the casts' own."""
        own = dtype or self._dtype
        known = [
            rates[own] for rates in (self._coefficients.kernel_rates, self._coefficients.row_rates) if own in rates
        ]
        if own in CAST_TYPES:
            return own if any(kernel in rates for rates in known) else "bf16"
        return own if known else "bf16"

    def _at(
        self, operator_class: MemoryBoundClass, kernel: KernelName | None, backward: bool, dtype: str | None
    ) -> tuple[Seconds, ...]:
        """Of one kernel, as flat as arrays of many need it: `_Traffic`, and each `_Segment`, as many as any has."""
        name = rates_key(kernel, backward)
        table = self._table(name, dtype)
        rates = self._coefficients.kernel_rates.get(table, {})
        by_row = self._coefficients.row_rates.get(table, {})
        if name not in by_row:
            at_any = _traffic(rates[name]) if name in rates else self._of_class(operator_class)
            return *at_any, *(self._segments * _UNCHANGED)
        known = sorted((int(length), _traffic(rates)) for length, rates in by_row[name].items())
        found: list[Seconds] = [*known[0][1]]
        for (shorter, before), (longer, after) in pairwise(known):
            found += (shorter, longer - shorter, *(new - old for old, new in zip(before, after, strict=True)))
        missing = self._segments - (len(known) - 1)
        return *found, *(missing * _UNCHANGED)

    def _of_class(self, operator_class: MemoryBoundClass) -> _Traffic:
        """At the share of the class and at the rate of the cache."""
        memory = self.bandwidth(operator_class)
        return _Traffic(1 / memory, 1 / max(memory, self._cache_bandwidth), 0.0)

    def class_of(self, work: MemoryBound) -> str:
        """Dotted path of the coefficients whose held-out error is that of the duration."""
        kernel = rates_key(work.kernel, work.backward)
        dtype = self._table(kernel, work.dtype)
        for table in ("row_rates", "kernel_rates"):
            if kernel in getattr(self._coefficients, table).get(dtype, {}):
                return f"{table}.{dtype}.{kernel}"
        return f"memory_bound.{work.operator_class}"

    def coefficients_of(self, work: MemoryBound) -> tuple[str, ...]:
        """Dotted paths of the other coefficients behind a duration."""
        cached = ("l2_bandwidth_gb_per_s",) if self.class_of(work).startswith("memory_bound.") else ()
        return (*cached, *(("accesses_per_ns",) if work.accesses else ()))


_UNCHANGED = (0.0, 1.0, 0.0, 0.0, 0.0)
"""The segment of a kernel for which the row length does not matter."""


def _traffic(rates: KernelRates) -> _Traffic:
    start = rates.start_us.value / US_PER_S if rates.start_us else 0.0
    return _Traffic(1 / (rates.memory_gb_per_s.value * GB), 1 / (rates.cache_gb_per_s.value * GB), start)


def _once(row: Seconds) -> Seconds:
    """Row lengths of many workloads, a row each, as one row where all are alike: most are a width of the model."""
    if not isinstance(row, np.ndarray) or row.ndim < 2 or not (row == row[:1]).all():
        return row
    return row[:1]


def rates_key(kernel: KernelName | None, backward: bool) -> str:
    """The name of a kernel's pass in `kernel_rates`; of one that has none, a name that is not there."""
    return f"{kernel}_{'backward' if backward else 'forward'}"
