"""A step of equal blocks with the durations that a profile gives it: what is walked."""

from __future__ import annotations

from spsim.costs.collectives import CommCost
from spsim.costs.kernels import ComputeCost
from spsim.inputs.hardware import HardwareProfile
from spsim.program.sizes import Numbers
from spsim.step.folding import Step
from spsim.step.itinerary import Chunk
from spsim.step.preparation import PreparedStep


def costed_step(
    prepared: PreparedStep,
    numbers: Numbers,
    hardware: HardwareProfile,
    costs: tuple[ComputeCost, CommCost],
    *,
    chunk: Chunk,
    micro_batches: int,
    gpus_per_node: int,
) -> Step:
    """All blocks and micro-batches of one workload, and the synchronisation of weight gradients."""
    rows = prepared.rows(chunk, micro_batches)
    return Step(
        rows.items[0],
        prepared.programs,
        prepared.durations(
            numbers,
            *costs,
            gpus_per_node=gpus_per_node,
            chunk=chunk,
            micro_batches=micro_batches,
        ),
        prepared.sizes(numbers),
        hardware.coefficients.overlap_slowdown.value,
        prepared.abreast,
        rows,
    )
