"""Which slots of durations are of which kernels: those that CUDA graphs launch, and how often a layer runs each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import numpy.typing as npt

from spsim.engine.pieces import Pass
from spsim.program.assembly import EMBEDDING, HEAD
from spsim.program.instructions import Compute
from spsim.program.sizes import Index
from spsim.step.segments import BlockPass


def slots_in_graphs(
    graphs: str, blocks: Mapping[str, Mapping[Pass, BlockPass]], indices: Mapping[str, Index]
) -> npt.NDArray[np.intp]:
    """Slots of their durations, by what a plan says of `cuda_graphs`; equal kernels of other blocks share a slot."""
    if graphs == "none":
        return np.array([], dtype=np.intp)
    inside = blocks.keys() - ({EMBEDDING, HEAD} if graphs == "per_layer" else set())
    found = {
        slot
        for name in inside
        for own in blocks[name].values()
        for part in own.parts
        for step in part.segment.instructions
        if isinstance(step, Compute)
        for slot in indices[name].slots[step.id]
    }
    return np.array(sorted(found - {0}), dtype=np.intp)


def runs_of(blocks: Iterable[tuple[Mapping[Pass, BlockPass], Index, int]], num_slots: int) -> npt.NDArray[np.float64]:
    """How often a rank runs the kernel of each slot in both passes of so many of some blocks, a mean over positions on
    a ring.
    """
    runs = [0.0] * num_slots
    for part, index, count in (
        (part, index, count) for passes, index, count in blocks for own in passes.values() for part in own.parts
    ):
        for step in part.segment.instructions:
            slots = index.slots[step.id]
            for slot in slots if isinstance(step, Compute) else ():
                runs[slot] += count * part.runs / len(slots)
    return np.array([0.0, *runs[1:]])
