"""Placements of tensors on mesh axes, and the communication that moves between them.

The vocabulary is PyTorch DTensor's: on each axis of the mesh a tensor is replicated, a shard of a dimension or
partial. No model is known here. `docs/design.md` states the rules; a strategy is one line of
`strategies.split_rules`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, TypeVar

from spsim.program.mesh import Axis, Mesh

if TYPE_CHECKING:
    import numpy.typing as npt

Collective = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send_receive"]
COLLECTIVE_SHORT: Mapping[str, str] = {
    "all_reduce": "AR", "all_gather": "AG", "reduce_scatter": "RS", "all_to_all": "A2A", "send_receive": "SR"
}  # fmt: skip
"""How tables and pictures abbreviate them."""


class Placement(NamedTuple):
    """How a tensor lies on one axis. A tuple, for layouts are keys that compilation looks up all the time."""

    kind: Literal["replicate", "shard", "partial"]
    dim: str | None = None


REPLICATE = Placement("replicate")
"""Every rank of the axis holds the whole tensor."""
PARTIAL = Placement("partial")
"""Every rank of the axis holds a summand of the tensor."""


def shard(dim: str) -> Placement:
    """Every rank of the axis holds an equal part of dimension `dim`."""
    return Placement("shard", dim)


FLAT = "flat"
"""In place of a dimension: all elements in a row, as weights are sharded that rest."""

Layout = tuple[tuple[Axis, Placement], ...]
"""One placement per axis of the mesh, outer to inner."""

Extent = int | Fraction
"""Size of a dimension; of a product a fraction, for it may be a mean: the tokens of one of many experts."""


class Heads(int):
    """Heads of queries, of which `groups` share one of K and V each. Where there are more groups than ranks, and no
    multiple, whole groups are dealt out, to the first ranks one more (DeepSpeed's `uneven_heads_all2all`).
    """

    groups: int

    def __new__(cls, heads: int, groups: int = 1) -> Heads:
        """So many heads."""
        found = super().__new__(cls, heads)
        found.groups = groups
        return found

    def most(self, parts: int) -> int:
        """On the rank that has the most."""
        if self.groups % parts and self.groups > parts:
            return int(self) // self.groups * -(-self.groups // parts)
        return -(-int(self) // parts)


@lru_cache(maxsize=1024)
def factors(dim: str) -> tuple[str, ...]:
    """The dimensions that a dimension is a product of: s, b and k of `s*b*k/e`. It is cut where one of them is."""
    return tuple(dim.partition("/")[0].split("*"))


def part(size: Extent, parts: int) -> Extent:
    """Of a dimension on one rank: rounded up, so that KV heads fewer than the degree are replicated, one a rank, and
    of heads that are dealt out unevenly it is the rank that has the most. Fractions are divided.
    """
    if isinstance(size, Heads):
        return size.most(parts)
    return -(-size // parts) if isinstance(size, int) else size / parts


class Sized(Protocol):
    """What placement needs to know of a tensor."""

    @property
    def dims(self) -> tuple[str, ...]: ...
    @property
    def sizes(self) -> tuple[Extent, ...]: ...
    @property
    def itemsize(self) -> Extent: ...


def local_elements(tensor: Sized, layout: Layout, mesh: Mesh) -> int:
    """Elements that one rank holds."""
    parts: dict[str, int] = {}
    for axis, placement in layout:
        if placement.dim is not None:
            parts[placement.dim] = parts.get(placement.dim, 1) * mesh.degree(axis)
    held = elements(tensor.dims, tensor.sizes, parts)
    return -(-held // parts[FLAT]) if FLAT in parts else held


def elements(dims: Sequence[str], sizes: Sequence[Extent], parts: Mapping[str, int]) -> int:
    """Of a tensor whose dimensions are cut in so many parts."""
    if parts:
        sizes = [part(size, parts[dim]) if dim in parts else size for dim, size in zip(dims, sizes, strict=True)]
    return math.ceil(math.prod(sizes))


def local_bytes(tensor: Sized, layout: Layout, mesh: Mesh) -> int:
    """Bytes that one rank holds."""
    return math.ceil(local_elements(tensor, layout, mesh) * tensor.itemsize)


@dataclass(slots=True, unsafe_hash=True)
class Redistribution:
    """One step from one layout to the next, along one axis."""

    axis: Axis
    collective: Collective | None
    """None: a local slice, free."""
    source: Layout
    target: Layout


_COLLECTIVES: Mapping[tuple[str, str], Collective | None] = {
    ("partial", "replicate"): "all_reduce",
    ("partial", "shard"): "reduce_scatter",
    ("shard", "replicate"): "all_gather",
    ("shard", "shard"): "all_to_all",
    ("replicate", "shard"): None,
}
"""Between kinds of placements; None is a slice."""
_GROWTH = {("partial", "shard"): -1, ("replicate", "shard"): -1, ("shard", "replicate"): 1}
"""Where a rank holds less afterwards, and where more."""


@lru_cache(maxsize=1024)
def redistribute(source: Layout, target: Layout, *, backward: bool = False) -> tuple[Redistribution, ...]:
    """Steps from `source` to `target`, so that no step moves more than it must: what makes the tensor smaller first,
    what makes it larger last. Of equal ones the innermost axis first, in the backward pass the outermost.
    """
    order = range(len(source)) if backward else range(len(source) - 1, -1, -1)
    changed = [index for index in order if source[index] != target[index]]
    kinds = {index: (source[index][1].kind, target[index][1].kind) for index in changed}
    steps = []
    reached = list(source)
    for index in sorted(changed, key=lambda index: _GROWTH.get(kinds[index], 0)):
        assert target[index][1] != PARTIAL, "the rules never ask for a sum to be taken apart"
        before = tuple(reached)
        reached[index] = target[index]
        steps.append(Redistribution(source[index][0], _COLLECTIVES[kinds[index]], before, tuple(reached)))
    return tuple(steps)


def message_bytes(step: Redistribution, tensor: Sized, mesh: Mesh) -> int:
    """Size of the message in the convention of nccl-tests: the whole array of the group for all-reduce,
    all-gather and reduce-scatter, the buffer of one rank for all-to-all. Where that has heads dealt out unevenly, it
    gives another number of bytes than it gets.
    """
    given, got = (local_bytes(tensor, layout, mesh) for layout in (step.source, step.target))
    return given if step.collective == "all_to_all" and _dealt_unevenly(step, tensor, mesh) else max(given, got)


def _dealt_unevenly(step: Redistribution, tensor: Sized, mesh: Mesh) -> bool:
    """Whether ranks have different numbers of what is cut before or after; fewer than ranks, all have one."""
    for layout in (step.source, step.target):
        for dim, size in zip(tensor.dims, tensor.sizes, strict=True):
            parts = math.prod(mesh.degree(axis) for axis, placement in layout if placement.dim == dim)
            dealt = size.groups if isinstance(size, Heads) else size
            if isinstance(size, int) and dealt > parts and dealt % parts:
                return True
    return False


Size = TypeVar("Size", int, float, "npt.NDArray[Any]")
"""Bytes, or an array of them."""


def sent_bytes(collective: Collective, message: Size, ranks: int) -> Size:
    """Bytes that one rank sends for a message of the size that `message_bytes` gives (ring and pairwise
    algorithms; Thakur et al. 2005, section 4).
    """
    if collective == "send_receive":
        return message
    share = message * (ranks - 1)
    return (2 * share if collective == "all_reduce" else share) // ranks
