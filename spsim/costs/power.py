"""How much a step slows its compute-bound kernels, so that the board keeps its power limit.

Products that run for seconds end at the `sustained_limit` of a profile, single ones at the `burst_limit`: the clock
falls until the mean power is that of the board. In a step kernels that are bound by the memory, which draw less, lie
between them. Up to a share of compute-bound time the mean stays below the limit; from there the slowdown grows to that
of products alone, in a straight line.
"""

from __future__ import annotations

from functools import lru_cache
from statistics import NormalDist

import numpy as np

from spsim.costs.seconds import Seconds
from spsim.inputs.hardware import HardwareProfile

PARTS = 1e9
"""Of one, to which factors are rounded."""


class PowerLimit:
    """Of one device and data type."""

    def __init__(self, profile: HardwareProfile, dtype: str) -> None:
        self.dtype = dtype
        gemm, share = profile.coefficients.gemm, profile.coefficients.power_share
        both = share is not None and dtype in gemm.burst_limit and dtype in gemm.sustained_limit
        self.share = share.value if share is not None else 1.0
        """Of compute-bound kernels in the time of all, up to which nothing slows down."""
        self.slowdown = gemm.burst_limit[dtype].value / gemm.sustained_limit[dtype].value - 1 if both else 0.0
        """Of products alone; 0 where the profile does not know both limits."""

    def factor(self, compute_bound: Seconds, all_kernels: Seconds) -> Seconds:
        """Time of compute-bound kernels over that of a burst, from the seconds of a block in bursts.

        Rounded, so that it does not depend on how the seconds were summed.
        """
        beyond = np.maximum(0.0, compute_bound / all_kernels - self.share)
        span = 1 - self.share or 1.0  # nothing lies beyond a share of one
        factor: Seconds = np.rint((1 + self.slowdown * (beyond / span)) * PARTS) / PARTS
        return factor


def straggler_factor(profile: HardwareProfile, gpus: int) -> float:
    """Time that compute-bound kernels take on the slowest of so many GPUs, over that on a mean one.

    At one power limit no two dies keep the same clock. Of n normally distributed rates the lowest is expected z(n)
    standard deviations below the mean, z(n) = quantile of (n - 3/8) / (n + 1/4) (Blom 1958): 1.4 of 8, 2.3 of 64, 3.2
    of 1,024. 1 where the profile has no `straggler`.
    """
    spread = profile.coefficients.straggler
    return 1.0 if spread is None else 1 + spread.value * _lowest(gpus)


@lru_cache
def _lowest(gpus: int) -> float:
    """Standard deviations below the mean, of so many."""
    return NormalDist().inv_cdf((gpus - 3 / 8) / (gpus + 1 / 4))
