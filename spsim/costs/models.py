"""The cost models of a profile, made once."""

from __future__ import annotations

from functools import lru_cache

from spsim.costs.collectives import CommCost
from spsim.costs.kernels import ComputeCost
from spsim.costs.power import PowerLimit
from spsim.inputs.hardware import HardwareProfile


@lru_cache(maxsize=64)
def cost_models(hardware: HardwareProfile, precision: str) -> tuple[ComputeCost, CommCost]:
    """Durations of kernels and collectives on a profile: bursts, where it knows by how much a step slows them down."""
    burst = PowerLimit(hardware, precision).slowdown > 0
    return ComputeCost(hardware, precision, burst=burst), CommCost(hardware)
