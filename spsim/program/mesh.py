"""The grid of ranks: axes, coordinates and groups; no tensor is known here."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from spsim.inputs.plan import Plan

Axis = Literal["dp", "ring", "ulysses", "tp"]
AXES: tuple[Axis, ...] = ("dp", "ring", "ulysses", "tp")
"""Mesh axes, outer to inner: consecutive ranks differ in tp."""


@dataclass(frozen=True)
class Mesh:
    """The axes of degree above 1, outer to inner; an axis of degree 1 changes nothing and is left out."""

    degrees: Mapping[Axis, int]
    axes: tuple[Axis, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "axes", tuple(axis for axis in AXES if self.degrees.get(axis, 1) > 1))

    def degree(self, axis: Axis) -> int:
        """Ranks along an axis."""
        return self.degrees.get(axis, 1)

    @property
    def ranks(self) -> int:
        """Ranks of the mesh."""
        return math.prod(self.degrees.values())

    def coordinate(self, rank: int, axis: Axis) -> int:
        """Position of a rank along an axis."""
        inner = math.prod(self.degree(a) for a in AXES[AXES.index(axis) + 1 :])
        return rank // inner % self.degree(axis)

    def group(self, rank: int, axes: Sequence[Axis]) -> tuple[int, ...]:
        """Ranks that differ from `rank` along `axes` only, itself included, in order."""
        fixed = [axis for axis in self.axes if axis not in axes]
        here = [self.coordinate(rank, axis) for axis in fixed]
        return tuple(r for r in range(self.ranks) if [self.coordinate(r, a) for a in fixed] == here)


def nodes_of(mesh: Mesh, axes: Sequence[Axis], gpus_per_node: int, ranks: int | None = None) -> int:
    """Nodes that a group along `axes` spans, where consecutive ranks fill a node.

    Groups that lie differently may span different numbers; the largest counts, for it paces the step. Where
    only `ranks` neighbours of a group take part (replicated KV heads), their part of its nodes.
    """
    fixed = [axis for axis in mesh.axes if axis not in axes]
    nodes: dict[tuple[int, ...], set[int]] = defaultdict(set)
    for rank in range(mesh.ranks):
        nodes[tuple(mesh.coordinate(rank, axis) for axis in fixed)].add(rank // gpus_per_node)
    spanned = max(len(found) for found in nodes.values())
    size = mesh.ranks // len(nodes)
    return spanned if ranks is None else -(-spanned * ranks // size)


def mesh_of(plan: Plan) -> Mesh:
    """The mesh of a plan; pipeline stages are outside it."""
    return Mesh({"dp": plan.dp, "ring": plan.ring, "ulysses": plan.ulysses, "tp": plan.tp})
