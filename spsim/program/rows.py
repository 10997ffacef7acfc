"""Copies around collectives of tensors [b s h]: NCCL cuts and joins in the first dimension only.

torch (`_functional_collectives`) gathers along another one by a `cat` of the parts behind the collective, which are in
a row already where all dimensions before have one element, and scatters from a copy whose parts are.
"""

from __future__ import annotations

from spsim.inputs.plan import Plan
from spsim.program.mesh import Mesh
from spsim.program.operators import Tensor
from spsim.program.placement import local_elements, shard
from spsim.program.region import Move


def copies_before(plan: Plan, move: Move) -> bool:
    """Whether what a move reads is copied, its parts in a row."""
    return _has_copies(plan, move) and move.collective == "reduce_scatter"


def copies_behind(plan: Plan, move: Move, tensor: Tensor, mesh: Mesh) -> bool:
    """Whether what a move gathers is copied, its parts where they belong."""
    if not _has_copies(plan, move) or move.collective != "all_gather":
        return False
    gathered = dict(move.source)[move.axis]
    in_memory = sorted(tensor.dims, key=lambda dim: dim != "b")
    before = [dim for dim in in_memory[: in_memory.index(str(gathered.dim))] if shard(dim) != gathered]
    sizes = dict(zip(tensor.dims, tensor.sizes, strict=True))
    own = Tensor(tensor.name, tuple(before), tuple([sizes[dim] for dim in before]), tensor.itemsize)
    return local_elements(own, move.target, mesh) > 1


def _has_copies(plan: Plan, move: Move) -> bool:
    return plan.batch_first and move.axis == "tp" and not plan.tp_overlap
