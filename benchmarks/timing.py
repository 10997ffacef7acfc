"""CPU time, as all benchmarks take it."""

from __future__ import annotations

from collections.abc import Callable
from time import process_time
from typing import Any

REPETITIONS = 5


def cpu_seconds(work: Callable[[], Any]) -> float:
    """Best CPU time of several repetitions; the machine may be shared, and the best is disturbed least."""
    times = []
    for _ in range(REPETITIONS):
        start = process_time()
        work()
        times.append(process_time() - start)
    return min(times)
