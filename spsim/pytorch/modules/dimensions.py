"""Names of dimensions, found by following them through the operators of a module.

Every extent starts as a `Dim` of its own. An operator that reads two tensors elementwise, or contracts them,
says that two are the same; a view that cuts an extent in two says that it is a product. What is left apart at
the end are the dimensions of the module.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence


class Dim:
    """An extent; the same as another one, or a product of others, once an operator says so."""

    __slots__ = ("key", "parent", "parts", "size")

    def __init__(self, size: int) -> None:
        self.size = size
        self.parent: Dim | None = None
        self.parts: tuple[Dim, Dim] | None = None
        self.key: Dim | None = None
        """The same positions, as the keys of attention read them."""

    @property
    def root(self) -> Dim:
        """The extent that stands for all that are the same."""
        found = self
        while found.parent is not None:
            found = found.parent
        return found

    def cut(self, outer: int) -> tuple[Dim, Dim]:
        """This extent as the product of two; `outer` divides it."""
        self.parts = (Dim(outer), Dim(self.size // outer))
        if self.key is not None:
            self.key.root.parts = (Dim(outer), Dim(self.size // outer))
        return self.parts

    @property
    def as_key(self) -> Dim:
        """The extent of the keys at these positions."""
        root = self.root
        if root.key is None:
            root.key = Dim(root.size)
        return root.key.root


Dims = tuple[Dim, ...]
"""The factors of one dimension of a tensor, outer to inner; none where its size is 1."""


class UnrelatedDimensionsError(Exception):
    """Two extents cannot be the same, or a view does not respect them."""


def fresh(size: int) -> Dims:
    """A dimension that nothing is known of."""
    return (Dim(size),) if size != 1 else ()


def leaves(dims: Iterable[Dim]) -> Dims:
    """The extents that dimensions are products of, as far as is known now."""
    found: list[Dim] = []
    for dim in dims:
        root = dim.root
        found += leaves(root.parts) if root.parts else (root,)
    return tuple(found)


def size_of(dims: Iterable[Dim]) -> int:
    """Product of the sizes."""
    return math.prod(dim.size for dim in dims)


def unify(left: Iterable[Dim], right: Iterable[Dim]) -> None:
    """The two dimensions are the same, factor by factor."""
    one, other = list(leaves(left)), list(leaves(right))
    while one and other:
        a, b = one.pop(0).root, other.pop(0).root
        if a is b:
            continue
        if a.size == b.size:
            _merge(a, b)
        elif b.size % a.size == 0:
            other[:0] = _aligned(b, a)
        elif a.size % b.size == 0:
            one[:0] = _aligned(a, b)
        else:
            raise UnrelatedDimensionsError(f"sizes {a.size} and {b.size}")
    if one or other:
        raise UnrelatedDimensionsError(f"sizes {size_of(leaves(left))} and {size_of(leaves(right))}")


def _aligned(large: Dim, small: Dim) -> Dims:
    """Cut the larger of two outermost factors so that the smaller one has a partner; returns what is left of it."""
    outer, inner = large.cut(small.size)
    _merge(small, outer)
    return (inner,)


def _merge(one: Dim, other: Dim) -> None:
    keys = [dim.key.root for dim in (one, other) if dim.key is not None]
    other.parent = one
    if keys:
        one.key = keys[0]
    if len(keys) == 2 and keys[0] is not keys[1]:
        _merge(keys[0], keys[1])


def regroup(dims: Sequence[Dims], shape: Sequence[int]) -> list[Dims]:
    """The dimensions of a tensor as a view of another shape sees them, cut where the view cuts them."""
    rest = list(leaves(dim for group in dims for dim in group))
    found = []
    for size in shape:
        group: list[Dim] = []
        room = size
        while room > 1 and rest:
            leaf = rest.pop(0)
            if room % leaf.size == 0:
                group.append(leaf)
                room //= leaf.size
            elif leaf.size % room == 0:
                outer, inner = leaf.cut(room)
                group.append(outer)
                rest.insert(0, inner)
                room = 1
            else:
                raise UnrelatedDimensionsError(f"a view cuts {leaf.size} into parts of {room}")
        if room > 1:
            raise UnrelatedDimensionsError(f"a view of shape {list(shape)}")
        found.append(tuple(group))
    return found
