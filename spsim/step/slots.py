"""Which slots of durations are of which kernels and messages: those that CUDA graphs launch, and how often a layer runs
each.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping

import numpy as np
import numpy.typing as npt

from spsim.engine.pieces import Pass
from spsim.inputs.plan import WHOLE_GRAPHS
from spsim.program.assembly import EMBEDDING, HEAD
from spsim.program.instructions import Communication, Compute
from spsim.program.sizes import Index, Template
from spsim.step.segments import BlockPass


def slots_in_graphs(
    graphs: str, blocks: Mapping[str, Mapping[Pass, BlockPass]], indices: Mapping[str, Index]
) -> npt.NDArray[np.intp]:
    """Slots of their durations, by what a plan says of `cuda_graphs`; equal kernels of other blocks share a slot."""
    if graphs == "none":
        return np.array([], dtype=np.intp)
    inside = blocks.keys() - (set() if graphs == "full_iteration" else {EMBEDDING, HEAD})
    modules = graphs.split("+")
    found = {
        slot
        for name in inside
        for own in blocks[name].values()
        for part in own.parts
        for step in part.segment.instructions
        if isinstance(step, Compute) and (graphs in WHOLE_GRAPHS or module_of(step.operator) in modules)
        for slot in indices[name].slots[step.id]
    }
    return np.array(sorted(found - {0}), dtype=np.intp)


def module_of(operator: str) -> str | None:
    """The module of Megatron-Core that an operator of a layer is in, by its name; None for experts and their tokens."""
    name = operator.partition("_")[0]
    if name in ("norm2", "router", "top", "shared"):
        return "moe_router"
    if name in ("fc1", "gate", "up", "fc2", "residual2", "swiglu", "gelu", "geglu", "squared"):
        return "mlp"
    outside = ("expert", "dispatch", "combine", "permute", "unpermute", "combined", "dispatched", "combining", "add")
    return None if name in outside else "attn"


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


def sorted_messages(
    communications: Iterable[tuple[Communication, Index]], template: Template
) -> list[tuple[Communication, int, npt.NDArray[np.intp]]]:
    """One communication of each sort, with the position of its message, and the slots of all that are alike."""
    found: dict[tuple[Hashable, ...], tuple[Communication, int, list[int]]] = {}
    for step, index in communications:
        position = template.pacing(step, index)
        kind = (step.collective, step.step_of, step.sends_before, step.dispatch, step.axis, step.ranks)
        sort = (*kind, *template.coefficients[position].tolist())
        found.setdefault(sort, (step, position, []))[2].extend(index.slots[step.id])
    return [(step, position, np.array(slots, dtype=np.intp)) for step, position, slots in found.values()]
