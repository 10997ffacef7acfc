"""The cost models of a profile, made once."""

from __future__ import annotations

from functools import lru_cache

from spsim.costs.collectives import CommCost
from spsim.costs.kernels import ComputeCost
from spsim.inputs.hardware import HardwareProfile


@lru_cache(maxsize=64)
def cost_models(hardware: HardwareProfile, precision: str) -> tuple[ComputeCost, CommCost]:
    """Durations of kernels and collectives on a profile."""
    return ComputeCost(hardware, precision), CommCost(hardware)
