"""Placements of tensors on mesh axes, and the communication that moves between them.

The vocabulary is PyTorch DTensor's: on each axis of the mesh a tensor is `Replicate`, `Shard(dim)` or
`Partial`. No model is known here. `docs/design.md` states the rules; a strategy is one line of
`strategies.split_rules`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar

import numpy.typing as npt

from spsim.program.mesh import Axis, Mesh

Collective = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send_receive"]
COLLECTIVE_SHORT: Mapping[str, str] = {
    "all_reduce": "AR", "all_gather": "AG", "reduce_scatter": "RS", "all_to_all": "A2A", "send_receive": "SR"
}  # fmt: skip
"""How tables and pictures abbreviate them."""


@dataclass(frozen=True, slots=True)
class Replicate:
    """Every rank of the axis holds the whole tensor."""


@dataclass(frozen=True, slots=True)
class Shard:
    """Every rank of the axis holds an equal part of dimension `dim`."""

    dim: str


@dataclass(frozen=True, slots=True)
class Partial:
    """Every rank of the axis holds a summand of the tensor."""

    reduction: str = "sum"


Placement = Replicate | Shard | Partial
Layout = tuple[tuple[Axis, Placement], ...]
"""One placement per axis of the mesh, outer to inner."""

REPLICATE = Replicate()
PARTIAL = Partial()


class Sized(Protocol):
    """What placement needs to know of a tensor."""

    @property
    def dims(self) -> tuple[str, ...]: ...
    @property
    def sizes(self) -> tuple[int, ...]: ...
    @property
    def itemsize(self) -> int: ...


def local_elements(tensor: Sized, layout: Layout, mesh: Mesh) -> int:
    """Elements that one rank holds; a dimension that does not divide is rounded up, so that KV heads fewer
    than the degree are replicated, one a rank.
    """
    elements = 1
    for dim, size in zip(tensor.dims, tensor.sizes, strict=True):
        parts = 1
        for axis, placement in layout:
            if isinstance(placement, Shard) and placement.dim == dim:
                parts *= mesh.degree(axis)
        elements *= -(-size // parts)
    return elements


def local_bytes(tensor: Sized, layout: Layout, mesh: Mesh) -> int:
    """Bytes that one rank holds."""
    return local_elements(tensor, layout, mesh) * tensor.itemsize


@dataclass(frozen=True, slots=True)
class Redistribution:
    """One step from one layout to the next, along one axis."""

    axis: Axis
    collective: Collective | None
    """None: a local slice, free."""
    source: Layout
    target: Layout


def _collective(source: Placement, target: Placement) -> Collective | None:
    match source, target:
        case Partial(), Replicate():
            return "all_reduce"
        case Partial(), Shard():
            return "reduce_scatter"
        case Shard(), Replicate():
            return "all_gather"
        case Shard(), Shard():
            return "all_to_all"
        case Replicate(), Shard():
            return None
    raise AssertionError(f"no redistribution from {source} to {target}: the rules never ask for it")


def redistribute(source: Layout, target: Layout, mesh: Mesh, *, backward: bool = False) -> list[Redistribution]:
    """Steps from `source` to `target`: innermost axis first, in the backward pass outermost first."""
    steps = []
    reached = list(source)
    order = range(len(source)) if backward else range(len(source) - 1, -1, -1)
    for index in order:
        axis, have = reached[index]
        want = target[index][1]
        if have == want:
            continue
        before = tuple(reached)
        reached[index] = (axis, want)
        steps.append(Redistribution(axis, _collective(have, want), before, tuple(reached)))
    return steps


def message_bytes(step: Redistribution, tensor: Sized, mesh: Mesh) -> int:
    """Size of the message in the convention of nccl-tests: the whole array of the group for all-reduce,
    all-gather and reduce-scatter, the buffer of one rank for all-to-all.
    """
    return max(local_bytes(tensor, step.source, mesh), local_bytes(tensor, step.target, mesh))


Size = TypeVar("Size", int, float, npt.NDArray[Any])
"""Bytes, or an array of them."""


def sent_bytes(collective: Collective, message: Size, ranks: int) -> Size:
    """Bytes that one rank sends for a message of the size that `message_bytes` gives (ring and pairwise
    algorithms; Thakur et al. 2005, section 4).
    """
    if collective == "send_receive":
        return message
    share = message * (ranks - 1)
    return (2 * share if collective == "all_reduce" else share) // ranks
