"""An operator on a mesh: where its operands lie, and what one rank holds of them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from spsim.lazy import lazy
from spsim.program.mesh import Mesh
from spsim.program.operators import (
    Operand,
    Operator,
    Splits,
    Tensor,
    input_gradient_layout,
    input_layout,
    output_gradient_layout,
    output_layout,
)
from spsim.program.placement import Layout


@dataclass(frozen=True, slots=True)
class PlacedOperand:
    """An operand as an operator reads or writes it on one rank."""

    operand: Operand
    layout: Layout
    """How it must arrive, or leaves."""
    gradient: Layout
    """How its gradient leaves, or must arrive."""
    elements: int
    bytes: int

    @property
    def tensor(self) -> Tensor:
        """The tensor of the operand."""
        return self.operand.tensor

    @property
    def name(self) -> str:
        """Name of the tensor."""
        return self.operand.tensor.name


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
        self.activations = self._of_kind(self.inputs, "activation")
        self.weights = self._of_kind(self.inputs, "weight")
        self.results = self._of_kind(self.outputs, "activation")
        self.saved = tuple([operand for operand in self.inputs + self.outputs if operand.name in operator.saves])

    @lazy
    def sizes(self) -> dict[str, int]:
        """Size of each dimension on one rank."""
        return {dim: -(-size // self._parts.get(dim, 1)) for dim, size in self.operator.extents.items()}

    def _place(self, operand: Operand, *, read: bool) -> PlacedOperand:
        tensor, splits = operand.tensor, self.splits
        sizes = zip(operand.subscript, tensor.sizes, strict=True)
        elements = math.prod([-(-size // self._parts.get(dim, 1)) for dim, size in sizes])
        layout = (input_layout if read else output_layout)(operand, splits)
        gradient = (input_gradient_layout if read else output_gradient_layout)(operand, splits)
        return PlacedOperand(operand, layout, gradient, elements, elements * tensor.itemsize)

    @staticmethod
    def _of_kind(operands: tuple[PlacedOperand, ...], kind: str) -> tuple[PlacedOperand, ...]:
        return tuple([operand for operand in operands if operand.tensor.kind == kind])
