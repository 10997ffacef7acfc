"""The cost models of a profile, made once."""

from __future__ import annotations

from functools import lru_cache

from spsim.costs.collectives import CommCost
from spsim.costs.kernels import ComputeCost
from spsim.costs.power import PowerLimit
from spsim.inputs.hardware import HardwareProfile
from spsim.program.recipes import RECIPES, SIXTEEN_BITS


def compute_cost(hardware: HardwareProfile, precision: str) -> ComputeCost:
    """Durations of kernels in a step: of bursts, where the profile knows by how much a step slows them down.

    Where a recipe casts operands of products, all else runs in 16 bits.
    """
    recipe = RECIPES.get(precision)
    products, rest = (recipe.dtype, SIXTEEN_BITS) if recipe else (precision, precision)
    return ComputeCost(hardware, rest, burst=PowerLimit(hardware, products).slowdown > 0, products=products)


@lru_cache(maxsize=64)
def cost_models(hardware: HardwareProfile, precision: str) -> tuple[ComputeCost, CommCost]:
    """Durations of kernels and collectives on a profile, made once."""
    return compute_cost(hardware, precision), CommCost(hardware)
