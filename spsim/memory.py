"""Memory that is there for the whole step, and the capacity it is judged by.

Mixed-precision Adam keeps 18 bytes a parameter: 2 for the weight, 4 for the fp32 main gradient and 12 for
the fp32 copy and two moments (Korthikanti et al. 2022; Rajbhandari et al. 2020, section 3.1). A distributed
optimizer shards the last over dp x ulysses x ring. Of the layers only, while the scope is "layers".
"""

from __future__ import annotations

from dataclasses import dataclass

from spsim.hardware import HardwareProfile
from spsim.placement import Mesh
from spsim.plan import Plan
from spsim.units import MIB

WEIGHT_BYTES = 2
MAIN_GRADIENT_BYTES = 4
"""Gradients are accumulated and reduced in fp32."""
OPTIMIZER_BYTES = 12


@dataclass(frozen=True, slots=True)
class StaticMemory:
    """Bytes of one rank that do not change during a step."""

    weights: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.gradients + self.optimizer

    def by_category(self) -> dict[str, int]:
        """Bytes by the category names of the memory curve."""
        return {"weights": self.weights, "gradients": self.gradients, "optimizer": self.optimizer}


def static_memory(parameters: int, plan: Plan) -> StaticMemory:
    """Weights, gradients and optimizer state of `parameters` on one rank."""
    shards = plan.dp * plan.ulysses * plan.ring if plan.zero_stage else 1
    return StaticMemory(
        WEIGHT_BYTES * parameters,
        MAIN_GRADIENT_BYTES * parameters,
        -(-OPTIMIZER_BYTES * parameters // shards),
    )


def outside_tensors(profile: HardwareProfile, mesh: Mesh) -> int:
    """Bytes that the framework takes beside tensors: context, communicator buffers, reserve."""
    memory = profile.coefficients.memory
    communicators = len(mesh.axes)
    mib = memory.context_mib.value + communicators * memory.communicator_mib.value + memory.reserve_mib.value
    return round(mib * MIB)


def capacity(profile: HardwareProfile) -> int:
    """Bytes that the driver reports."""
    return round(profile.datasheet.memory.reported_mib.value * MIB)
