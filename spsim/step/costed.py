"""A step of equal blocks with the durations that a profile gives it: what is walked."""

from __future__ import annotations

from spsim.costs.collectives import CommCost
from spsim.costs.kernels import ComputeCost
from spsim.inputs.hardware import HardwareProfile
from spsim.program.sizes import Numbers
from spsim.step.folding import Step
from spsim.step.preparation import PreparedBlock


def costed_step(
    block: PreparedBlock,
    numbers: Numbers,
    hardware: HardwareProfile,
    costs: tuple[ComputeCost, CommCost],
    *,
    layers: int,
    micro_batches: int,
    gpus_per_node: int,
) -> Step:
    """All layers and micro-batches of one workload, and the synchronisation of weight gradients."""
    return Step(
        block.itinerary(layers, micro_batches),
        block.programs,
        block.durations(
            numbers,
            *costs,
            gpus_per_node=gpus_per_node,
            sync_messages=block.sync_messages(numbers, layers),
        ),
        block.sizes(numbers),
        hardware.coefficients.overlap_slowdown.value,
        block.abreast,
    )
