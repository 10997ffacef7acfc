"""Durations of kernels that take the time of their memory traffic.

At the rates of the kernel where a calibration has measured them, else at a share of the memory bandwidth by operator
class; faster while the tensors fit the last-level cache.
"""

from __future__ import annotations

import numpy as np

from spsim.costs.seconds import Seconds
from spsim.inputs.hardware import HardwareProfile
from spsim.units import GB, MIB, US_PER_S
from spsim.work import KernelName, MemoryBound, MemoryBoundClass, each


class TrafficCost:
    """Durations of memory-bound kernels on one device in one precision, beyond the start of any kernel."""

    def __init__(self, profile: HardwareProfile, dtype: str) -> None:
        self._profile = profile
        self._coefficients = profile.coefficients
        self._rates_of = dtype if dtype in self._coefficients.kernel_rates else "bf16"
        self._rates = self._coefficients.kernel_rates.get(self._rates_of, {})
        self._cache_bytes = profile.datasheet.memory.l2_mib.value * MIB
        self._cache_bandwidth = self._coefficients.l2_bandwidth_gb_per_s.value * GB
        self._known: dict[object, tuple[Seconds, Seconds, Seconds]] = {}

    def time(self, work: MemoryBound) -> Seconds:
        """Bytes over the kernel's own rate, or its class's share of the bandwidth; at the rate of the cache up to
        half the cache, between the two up to the whole.
        """
        total = work.bytes_moved
        memory_rate, cache_rate, start = self._rate(work.operator_class, work.kernel, work.backward)
        memory, cache = total / memory_rate, total / cache_rate
        beyond = np.minimum(1.0, np.maximum(0.0, 2 * total / self._cache_bytes - 1))
        time: Seconds = start + cache + beyond * (memory - cache)
        return time

    def bandwidth(self, operator_class: MemoryBoundClass) -> float:
        """Bytes per second of a class."""
        share: float = getattr(self._coefficients.memory_bound, operator_class).value
        return self._profile.memory_bandwidth * share

    def _rate(
        self, operator_class: MemoryBoundClass, kernel: KernelName | None, backward: bool
    ) -> tuple[Seconds, Seconds, Seconds]:
        """Bytes per second from the memory and from the cache, and seconds to start; arrays for many kernels."""
        key = (operator_class, kernel, backward)
        if key not in self._known:
            self._known[key] = each(self._at, *key)
        return self._known[key]

    def _at(
        self, operator_class: MemoryBoundClass, kernel: KernelName | None, backward: bool
    ) -> tuple[float, float, float]:
        """Of one kernel: as measured by itself, else at the share of its class and at the rate of the cache."""
        rates = self._rates.get(rates_key(kernel, backward))
        if rates is None:
            memory = self.bandwidth(operator_class)
            return memory, max(memory, self._cache_bandwidth), 0.0
        start = rates.start_us.value / US_PER_S if rates.start_us else 0.0
        return rates.memory_gb_per_s.value * GB, rates.cache_gb_per_s.value * GB, start

    def class_of(self, work: MemoryBound) -> str:
        """Dotted path of the coefficients whose held-out error is that of the duration."""
        kernel = rates_key(work.kernel, work.backward)
        own = kernel in self._rates
        return f"kernel_rates.{self._rates_of}.{kernel}" if own else f"memory_bound.{work.operator_class}"

    def coefficients_of(self, work: MemoryBound) -> tuple[str, ...]:
        """Dotted paths of the other coefficients behind a duration."""
        return ("l2_bandwidth_gb_per_s",) if self.class_of(work).startswith("memory_bound.") else ()


def rates_key(kernel: KernelName | None, backward: bool) -> str:
    """The name of a kernel's pass in `kernel_rates`; of one that has none, a name that is not there."""
    return f"{kernel}_{'backward' if backward else 'forward'}"
