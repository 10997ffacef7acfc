"""An operator on a mesh: where its operands lie, and what one rank holds of them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from spsim.lazy import lazy
from spsim.program.mesh import Mesh
from spsim.program.operators import Operand, Operator, Splits, Tensor, TensorKind, arriving, leaving
from spsim.program.placement import Layout


@dataclass(frozen=True, slots=True)
class PlacedOperand:
    """An operand as an operator reads or writes it on one rank."""

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


class PlacedOperator:
    """One operator, split along a dimension or none on each axis of a mesh."""

    def __init__(self, operator: Operator, splits: Splits, mesh: Mesh) -> None:
        self.operator = operator
        self.name = operator.name
        self.splits = splits
        self.mesh = mesh
        self._parts: dict[str, int] = {}
        for axis, dim in splits:
            if dim is not None:
                self._parts[dim] = self._parts.get(dim, 1) * mesh.degree(axis)
        self.inputs = tuple([self._place(operand, read=True) for operand in operator.inputs])
        self.outputs = tuple([self._place(operand, read=False) for operand in operator.outputs])
        self.handed_over = self._of_kind(self.inputs, "activation", "token ids")
        self.activations = self._of_kind(self.inputs, "activation")
        self.weights = self._of_kind(self.inputs, "weight")
        self.results = self._of_kind(self.outputs, "activation")
        self.saved = tuple([operand for operand in self.inputs + self.outputs if operand.name in operator.saves])

    @lazy
    def sizes(self) -> dict[str, int]:
        """Size of each dimension on one rank."""
        return {dim: -(-size // self._parts.get(dim, 1)) for dim, size in self.operator.extents.items()}

    def _place(self, operand: Operand, *, read: bool) -> PlacedOperand:
        tensor, subscript = operand.tensor, operand.subscript
        parts = self._parts
        elements = math.prod([-(-n // parts.get(dim, 1)) for dim, n in zip(subscript, tensor.sizes, strict=True)])
        layouts = arriving(operand, self.splits), leaving(operand, self.splits)
        layout, gradient = layouts if read else layouts[::-1]
        return PlacedOperand(tensor.name, tensor, subscript, layout, gradient, elements, elements * tensor.itemsize)

    @staticmethod
    def _of_kind(operands: tuple[PlacedOperand, ...], *kinds: TensorKind) -> tuple[PlacedOperand, ...]:
        return tuple([operand for operand in operands if operand.tensor.kind in kinds])
