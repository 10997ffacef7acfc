"""Recipes of low precision: which products of a block run in which type, and what is cast for them.

The facts are Transformer Engine's, as Megatron-Core uses it (their sources of August 2026); `docs/model.md` lists them.
Everything that a recipe does not name stays in 16 bits: attention, embedding, head, norms, and the tensors between
operators. Dense products of a layer are the only ones here; a recipe that runs more of them in its type names them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Literal, cast

from spsim.inputs.workload import Precision
from spsim.work import OPERAND_BYTES

LINEARS = frozenset({"qkv", "projection", "fc1", "fc2"})
HALF = 2
"""Bytes of an element in 16 bits."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """How operands of products are cast.

    A product reads its operands along the dimension that it sums over, so that the gradient of a weight reads input and
    output gradient along other rows than the products before it did: along their columns.
    """

    dtype: Precision
    """Of the operands; peaks and coefficients of products have this name."""
    block: int
    """Values in a row that share a scale, or at which kernels need rows to end."""
    bits: int
    """Of a value."""
    columns: Literal["same", "transposed", "apart"]
    """What the products along columns read: the copy that the others read, its transpose, or a copy that is cast with
    scales of its own.
    """
    tensor_scale: bool = False
    """A scale of the whole tensor: its largest value is found before, in a kernel of its own."""
    norm_finds_scale: bool = False
    """A norm finds it while it writes the tensor."""
    ordered_scales: bool = False
    """Tensor cores read scales in an order of their own: after a gather a kernel puts them into it, else the cast."""
    weights_in_type: bool = False
    """Weights rest and are gathered in this type, else in 16 bits, from which they are cast once a step."""
    keeps_16_bits: bool = False
    """No 16-bit copy of a weight is dropped for those in this type."""
    operators: frozenset[str] = LINEARS
    """Products that run in it, forward and both gradients."""
    keeps_input: frozenset[str] = frozenset({"projection"})
    """Of them those that keep their input in 16 bits, since another operator does anyway, and cast it again."""

    @property
    def itemsize(self) -> Fraction:
        """Bytes of an element of one copy, its part of a scale included."""
        return Fraction(OPERAND_BYTES[self.dtype])

    @property
    def scale_bytes(self) -> Fraction:
        """The scales of it."""
        return self.itemsize - Fraction(self.bits, 8)

    @property
    def copies(self) -> int:
        """Copies of a tensor that products along rows and along columns read."""
        return 1 if self.columns == "same" else 2

    @property
    def gathered(self) -> int:
        """Copies of a gradient that a gather moves: a transpose is made afterwards."""
        return 2 if self.columns == "apart" else 1

    @property
    def weight_bytes(self) -> Fraction:
        """Bytes of an element of a weight as it rests and is gathered."""
        return self.itemsize if self.weights_in_type else Fraction(HALF)

    @property
    def resident_bytes(self) -> Fraction:
        """Bytes of an element of a weight for the whole step, all its copies."""
        return self.copies * self.itemsize + (HALF if self.keeps_16_bits else 0)


_PER_TENSOR = Recipe(
    "fp8", 16, 8, "transposed", tensor_scale=True, norm_finds_scale=True, weights_in_type=True
)  # fmt: skip
RECIPES: Mapping[str, Recipe] = {
    "fp8": _PER_TENSOR,
    "fp8_any_layout": replace(_PER_TENSOR, columns="same"),
    "mxfp8": Recipe("mxfp8", 32, 8, "apart", ordered_scales=True),
    "fp8_blockwise": Recipe("fp8_blockwise", 128, 8, "apart", keeps_16_bits=True),
    "nvfp4": Recipe("nvfp4", 16, 4, "apart", tensor_scale=True, ordered_scales=True, keeps_16_bits=True),
}  # fmt: skip
"""Float8CurrentScaling, MXFP8BlockScaling, Float8BlockScaling and NVFP4BlockScaling of Transformer Engine, by
precision; the second is that of devices whose 8-bit products read operands in any layout. Others cast nothing.
"""


def program_precision(precision: Precision, *, any_layout: bool) -> Precision:
    """The precision whose recipe a device runs: 8-bit products of Hopper sum over rows of both operands only."""
    return cast("Precision", "fp8_any_layout") if precision == "fp8" and any_layout else precision


@dataclass(frozen=True, slots=True)
class Cast:
    """What an operator casts for a product: its input, or the gradients of its outputs, in the backward pass."""

    recipe: Recipe
    of: Literal["input", "gradient"]
    scale_known: bool = False
    """The largest value has been found already."""
    rows_only: bool = False
    """What products along columns read is made later, from 16 bits."""
