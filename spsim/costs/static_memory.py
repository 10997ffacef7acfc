"""Memory that is there for the whole step, and the capacity it is judged by.

Mixed-precision Adam keeps 18 bytes a parameter: 2 for the weight, 4 for the fp32 main gradient and 12 for
the fp32 copy and two moments (Korthikanti et al. 2022; Rajbhandari et al. 2020, section 3.1). In fp32 the weight
needs no copy: 16 bytes. A distributed optimizer shards the optimizer state over dp x ulysses x ring. Of the layers
only, while the scope is "layers".
"""

from __future__ import annotations

from dataclasses import dataclass

from spsim.inputs.hardware import HardwareProfile
from spsim.inputs.plan import Plan
from spsim.program.mesh import Mesh
from spsim.units import MIB
from spsim.work import MAIN_GRADIENT_BYTES

MOMENT_BYTES = 8
MASTER_BYTES = 4
"""The fp32 copy of a weight of lower precision."""


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


def static_memory(parameters: int, plan: Plan, weight_bytes: int) -> StaticMemory:
    """Weights, gradients and optimizer state of `parameters` on one rank, `weight_bytes` per element."""
    shards = plan.dp * plan.ulysses * plan.ring if plan.zero_stage else 1
    optimizer_bytes = MOMENT_BYTES + (MASTER_BYTES if weight_bytes < MASTER_BYTES else 0)
    return StaticMemory(
        weight_bytes * parameters,
        MAIN_GRADIENT_BYTES * parameters,
        -(-optimizer_bytes * parameters // shards),
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
