"""An operator on a mesh: where its operands lie, and what one rank holds of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from spsim.lazy import lazy
from spsim.program.mesh import Axis, Mesh
from spsim.program.operators import HANDED_OVER, Operand, Operator, Splits, Tensor, TensorKind, layouts
from spsim.program.placement import FLAT, REPLICATE, Extent, Layout, elements, local_elements, part, shard


@dataclass(slots=True, eq=False)
class PlacedOperand:
    """An operand as an operator reads or writes it on one rank. Nobody changes it; it is not frozen because compilation
    makes many, and a frozen one takes three times as long to make.
    """

    name: str
    """Of its tensor."""
    tensor: Tensor
    subscript: tuple[str, ...]
    layout: Layout
    """How it must arrive, or leaves."""
    gradient: Layout
    """How its gradient leaves, or must arrive."""
    elements: int
    bytes: int

    @property
    def gradient_bytes(self) -> int:
        """Bytes of its gradient before that moves."""
        return math.ceil(self.elements * self.tensor.gradient.itemsize)


class PlacedOperator:
    """One operator, split along a dimension or none on each axis of a mesh."""

    def __init__(self, operator: Operator, splits: Splits, mesh: Mesh, sharding: Sequence[Axis] = ()) -> None:
        """Weights that it uses whole rest sharded on the axes of `sharding`."""
        self.operator = operator
        self.name = operator.name
        self.splits = splits
        self.mesh = mesh
        self._parts: dict[str, int] = {}
        for axis, dim in splits:
            for cut in operator.along[dim] if dim is not None else ():
                self._parts[cut] = self._parts.get(cut, 1) * mesh.degree(axis)
        self.inputs = tuple([self._place(operand, read=True) for operand in operator.inputs])
        self.outputs = tuple([self._place(operand, read=False) for operand in operator.outputs])
        self.handed_over = self._of_kind(self.inputs, *HANDED_OVER)
        self.activations = self._of_kind(self.inputs, "activation")
        self.weights = self._of_kind(self.inputs, "weight")
        self.results = self._of_kind(self.outputs, "activation")
        self.resting = tuple(self._at_rest(sharding)) if sharding else ()
        """Weights that rest in another layout than it uses them in, as they rest."""
        moved = {weight.name for weight in self.resting}
        self.gathered = tuple([weight for weight in self.weights if weight.name in moved]) if moved else ()
        """The same weights as it uses them."""
        self.differentiated = self.activations + self.gathered if operator.has_backward else ()
        """Inputs whose gradients move to where the inputs come from."""
        self.originals = tuple([self._place(operand, read=True) for operand in operator.originals])
        known = self.inputs + self.outputs + self.originals
        self.saved = tuple([operand for operand in known if operand.name in operator.saves])

    @lazy
    def sizes(self) -> dict[str, Extent]:
        """Size of each dimension on one rank."""
        parts = self._parts
        extents = self.operator.extents.items()
        return {dim: part(size, parts[dim]) if dim in parts else size for dim, size in extents}

    def _place(self, operand: Operand, *, read: bool) -> PlacedOperand:
        tensor, subscript = operand.tensor, operand.subscript
        held = elements(subscript, tensor.sizes, self._parts)
        arriving, leaving = layouts(tensor.dims, subscript, self.splits)
        layout, gradient = (arriving, leaving) if read else (leaving, arriving)
        return PlacedOperand(tensor.name, tensor, subscript, layout, gradient, held, math.ceil(held * tensor.itemsize))

    def _at_rest(self, sharding: Sequence[Axis]) -> Iterator[PlacedOperand]:
        """Sharded where they are used whole, and so must the gradient arrive; it may stay a partial sum elsewhere."""
        for weight in self.weights:
            axes = [axis for axis, used in weight.layout if used == REPLICATE and axis in sharding]
            layout, gradient = (
                tuple([(axis, shard(FLAT) if axis in axes else placement) for axis, placement in own])
                for own in (weight.layout, weight.gradient)
            )
            if axes:
                held = local_elements(weight.tensor, layout, self.mesh)
                size = math.ceil(held * weight.tensor.itemsize)
                yield replace(weight, layout=layout, gradient=gradient, elements=held, bytes=size)

    @staticmethod
    def _of_kind(operands: tuple[PlacedOperand, ...], *kinds: TensorKind) -> tuple[PlacedOperand, ...]:
        return tuple([operand for operand in operands if operand.tensor.kind in kinds])
