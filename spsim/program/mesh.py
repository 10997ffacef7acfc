"""The grid of ranks: axes, coordinates and groups; no tensor is known here."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import product
from typing import Literal, cast, get_args

from spsim.inputs.plan import Plan
from spsim.lazy import lazy

Axis = Literal["pp", "dp", "shard", "ep", "ring", "ulysses", "tp", "embedding", "experts", "model"]
EXPERT_AXES: tuple[Axis, ...] = ("ep", "experts")
"""Between the ranks that experts are spread over."""
AXES: tuple[Axis, ...] = get_args(Axis)[:-3]
"""Mesh axes, outer to inner unless a plan orders them otherwise: consecutive ranks differ in tp, and stages of a
pipeline follow each other. Inside dp have axes of their own, where they are not all replicas: those that share one copy
of what is sharded (shard), and those over which experts are spread (ep). The last three are no axes of the grid:
`embedding` are the two ends of pp, which hold tied embeddings, `experts` all ranks over which experts are spread, and
`model` those that share weights in a decode, where these lie along several axes.
"""
MODEL: tuple[Axis, ...] = ("ring", "tp")
"""Along which weights are cut in a decode."""


@dataclass(frozen=True)
class Mesh:
    """The axes of degree above 1, in the order of `AXES`; an axis of degree 1 changes nothing and is left out.

    Ranks are numbered row by row, so that a group lies on a lattice: its first rank, and a stride and a count for
    each of its axes. Nothing here costs more for more ranks than it returns.
    """

    degrees: Mapping[Axis, int]
    order: tuple[Axis, ...] = AXES
    """Axes from the outermost to the innermost: how ranks are numbered."""
    within: Mesh | None = None
    """The mesh of which it has some axes and whose ranks it numbers: those at the first place of all other axes."""
    expert_axes: tuple[Axis, ...] = ()
    """Along which experts are spread, beside ep."""
    axes: tuple[Axis, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "axes", tuple(axis for axis in AXES if self.degrees.get(axis, 1) > 1))

    def degree(self, axis: Axis) -> int:
        """Ranks along an axis."""
        if axis in ("experts", "model"):
            return self.size(self.own([axis]))
        return min(2, self.degree("pp")) if axis == "embedding" else self.degrees.get(axis, 1)

    @lazy
    def of_experts(self) -> tuple[Axis, ...]:
        """The axes of the group `experts`."""
        return tuple([axis for axis in self.axes if axis == "ep" or axis in self.expert_axes])

    def own(self, axes: Sequence[Axis]) -> list[Axis]:
        """Axes of the grid that some axes stand for."""
        several: dict[Axis, tuple[Axis, ...]] = {"experts": self.of_experts, "model": MODEL}
        found = [own for axis in axes for own in several.get(axis, (axis,))]
        return ["pp" if axis == "embedding" else axis for axis in found]

    @lazy
    def strides(self) -> dict[Axis, int]:
        """Distance of neighbours along each axis."""
        if self.within is not None:
            return self.within.strides
        degrees = [self.degree(axis) for axis in self.order]
        return {axis: math.prod(degrees[place + 1 :]) for place, axis in enumerate(self.order)}

    def without(self, axis: Axis) -> Mesh:
        """The ranks at the first place of an axis, under the same numbers."""
        return Mesh(
            {own: degree for own, degree in self.degrees.items() if own != axis}, self.order, self, self.expert_axes
        )

    @property
    def numbers(self) -> Sequence[int]:
        """Of all its ranks."""
        ranks = range(self.ranks)
        last = sum((count - 1) * stride for stride, count in self.steps(self.axes))
        return ranks if last < self.ranks else [*self._lattice(self.axes)]

    @property
    def ranks(self) -> int:
        """Ranks of the mesh."""
        return self.size(self.axes)

    def size(self, axes: Sequence[Axis]) -> int:
        """Ranks of a group along some axes."""
        return math.prod(self.degree(axis) for axis in axes)

    def coordinate(self, rank: int, axis: Axis) -> int:
        """Position of a rank along an axis."""
        return rank // self.strides[axis] % self.degree(axis)

    def first(self, rank: int, axes: Sequence[Axis]) -> int:
        """The first rank of the group of `rank` along `axes`, which tells it from the other groups."""
        return rank - sum(self.coordinate(rank, axis) * self.strides[axis] for axis in self.own(axes))

    def neighbours(self, rank: int, axis: Axis) -> tuple[int, int]:
        """The previous and the next rank along an axis, which is a ring."""
        stride, degree, here = self.strides[axis], self.degree(axis), self.coordinate(rank, axis)
        origin = rank - here * stride
        return origin + (here - 1) % degree * stride, origin + (here + 1) % degree * stride

    def group(self, rank: int, axes: Sequence[Axis]) -> tuple[int, ...]:
        """Ranks that differ from `rank` along `axes` only, itself included, in order."""
        first = self.first(rank, axes)
        return tuple([first + offset for offset in self._lattice(axes)])

    def groups(self, axes: Sequence[Axis]) -> Iterator[tuple[int, ...]]:
        """Every group along some axes, by first rank; there may be many."""
        own = self.own(axes)
        others = tuple(axis for axis in self.axes if axis not in own)
        return (self.group(first, axes) for first in self._lattice(others))

    def _lattice(self, axes: Sequence[Axis]) -> Iterator[int]:
        """Ranks of the group of rank 0, in order."""
        return map(sum, product(*([stride * place for place in range(count)] for stride, count in self.steps(axes))))

    def steps(self, axes: Sequence[Axis]) -> list[tuple[int, int]]:
        """Distance and number of the ranks of a group along each of some axes, outer to inner."""
        names = {*axes, *self.own([axis for axis in axes if axis in ("experts", "model")])}
        own = [(self.strides[axis], self.degree(axis)) for axis in self.axes if axis in names]
        if "embedding" in axes:
            own.append((self.strides["pp"] * (self.degree("pp") - 1), self.degree("embedding")))
        return sorted(own, reverse=True)


def nodes_of(mesh: Mesh, axes: Sequence[Axis], gpus_per_node: int, ranks: int | None = None) -> int:
    """Nodes that a group along `axes` spans, where consecutive ranks fill a node.

    Groups that lie differently may span different numbers; the largest counts, for it paces the step. Where
    only `ranks` neighbours of a group take part (replicated KV heads), their part of its nodes.
    """
    # Where a group lies in its first node is all that tells one from another.
    along = set(mesh.own(axes))
    starts = places_in_node([(mesh.strides[a], mesh.degree(a)) for a in mesh.axes if a not in along], gpus_per_node)
    spanned = max(_nodes(start, tuple(mesh.steps(axes)), gpus_per_node) for start in starts)
    return spanned if ranks is None else -(-spanned * ranks // mesh.size(axes))


def places_in_node(lattice: Collection[tuple[int, int]], gpus_per_node: int) -> set[int]:
    """Where in their node the ranks of a lattice of (stride, count) are."""
    starts = {0}
    for stride, count in lattice:
        places = range(min(count, gpus_per_node))
        starts = {(start + place * stride) % gpus_per_node for start in starts for place in places}
    return starts


def _nodes(start: int, lattice: tuple[tuple[int, int], ...], per_node: int) -> int:
    """Nodes of the ranks from `start` on a lattice of (stride, count), outer to inner.

    Blocks along the outermost axis add up, less a node that two in a row share: the last rank of one and the first of
    the next are on it. What a block adds depends on where in a node it begins, which repeats.
    """
    if not lattice:
        return 1
    (stride, count), *inner = lattice
    extent = sum((n - 1) * step for step, n in inner)

    def shares(first: int) -> bool:
        """Whether a block begins on the node on which the one before ends."""
        return (first - stride + extent) // per_node == first // per_node

    firsts = [start + place * stride for place in range(min(count, per_node // math.gcd(stride, per_node)))]
    added = [_nodes(first % per_node, tuple(inner), per_node) - shares(first) for first in firsts]
    rounds, rest = divmod(count, len(added))
    return rounds * sum(added) + sum(added[:rest]) + shares(start)


def mesh_of(plan: Plan) -> Mesh:
    """The mesh of one pipeline stage of a plan: of the first, where ranks are numbered over all stages."""
    return world_of(plan).without("pp")


def world_of(plan: Plan) -> Mesh:
    """All ranks of a plan, in the order that it gives its axes; what is sharded is so over neighbours along dp, and so
    are experts spread.
    """
    shard = plan.shard_group if plan.shard_group and plan.shard_group < plan.dp else 1
    spread = plan.expert_replicas
    degrees: dict[Axis, int] = {
        "pp": plan.pp, "dp": plan.dp // shard // spread, "shard": shard, "ep": spread, "ring": plan.ring,
        "ulysses": plan.ulysses, "tp": plan.tp,
    }  # fmt: skip
    return Mesh(degrees, _order_of(plan.mesh_order), expert_axes=plan.expert_axes)


@lru_cache
def _order_of(words: str) -> tuple[Axis, ...]:
    """Mesh axes from the outermost to the innermost; what divides dp stays inside it."""
    parts: dict[str, tuple[Axis, ...]] = {"dp": ("dp", "shard", "ep")}
    return tuple(axis for word in reversed(words.split("-")) for axis in parts.get(word, (cast("Axis", word),)))
