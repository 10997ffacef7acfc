"""Recipes of low precision: which products of a block run in which type, and what is cast for them.

The facts are Transformer Engine's, as Megatron-Core uses it (their sources of August 2026); `docs/model.md` lists them.
Everything that a recipe does not name stays in 16 bits: embedding, norms, and the tensors between operators; attention
and the head too, unless a plan asks for them. The router stays in the type of its scores.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Literal, cast

from spsim.inputs.workload import Precision, Workload
from spsim.work import OPERAND_BYTES

DENSE = ("fc1", "gate", "up", "fc2")
LINEARS = frozenset({
    "qkv", "q", "k", "v", "q_down", "q_up", "kv_down", "kv_up", "projection", *DENSE,
    *(f"shared_{name}" for name in DENSE), "expert_fc1", "expert_fc2",
})  # fmt: skip
SIXTEEN_BITS = "bf16"
"""The type of all else."""
HALF = 2
"""Bytes of its elements."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """How operands of products are cast.

    A product reads its operands along the dimension that it sums over, so that the gradient of a weight reads input and
    output gradient along other rows than the products before it did: along their columns.
    """

    dtype: str
    """Of the operands; peaks and coefficients of products have this name."""
    bits: int
    """Of a value."""
    columns: Literal["same", "transposed", "apart"]
    """What the products along columns read: the copy that the others read, its transpose, or a copy that is cast with
    scales of its own.
    """
    tensor_scale: bool = False
    """A scale of the whole tensor: its largest value is found before, in a kernel of its own."""
    norm: Literal["apart", "finds scale", "casts"] = "apart"
    """What a norm does of the cast of what it makes."""
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
    def of_attention(self) -> Recipe:
        """The same for queries, keys and values: along sequence and head where copies have scales of their own, else
        once, and never in 16 bits (`combine_and_quantize` of Transformer Engine).
        """
        return self if self.columns == "apart" else replace(self, columns="same")

    @property
    def forward_only(self) -> Recipe:
        """The same without a backward pass: nothing is read along columns, and weights rest in the type alone."""
        return replace(self, columns="same", weights_in_type=True, keeps_16_bits=False)

    @property
    def of_prediction(self) -> Recipe:
        """The same for the projection before the layer of multi-token prediction."""
        return replace(self, operators=frozenset({"eh_proj"}))

    @property
    def of_output_layer(self) -> Recipe:
        """The same for the output layer only (`fp8_output_proj` of Megatron-Core)."""
        return replace(self, operators=frozenset({"output_layer", "mtp_output_layer"}))

    @property
    def resident_bytes(self) -> Fraction:
        """Bytes of an element of a weight for the whole step, all its copies."""
        return self.copies * self.itemsize + (HALF if self.keeps_16_bits else 0)


_PER_TENSOR = {
    "fp8": Recipe("fp8", 8, "transposed", tensor_scale=True, norm="finds scale", weights_in_type=True),
    "fp8_delayed": Recipe(
        "fp8", 8, "transposed", norm="casts", weights_in_type=True, keeps_input=frozenset()
    ),
}  # fmt: skip
_ANY_LAYOUT = "_any_layout"
RECIPES: Mapping[str, Recipe] = {
    **_PER_TENSOR,
    **{name + _ANY_LAYOUT: replace(recipe, columns="same") for name, recipe in _PER_TENSOR.items()},
    "mxfp8": Recipe("mxfp8", 8, "apart", ordered_scales=True),
    "fp8_blockwise": Recipe("fp8_blockwise", 8, "apart", keeps_16_bits=True),
    "nvfp4": Recipe("nvfp4", 4, "apart", tensor_scale=True, ordered_scales=True, keeps_16_bits=True),
}
"""By precision: Float8CurrentScaling, DelayedScaling, MXFP8BlockScaling, Float8BlockScaling and NVFP4BlockScaling of
Transformer Engine, the first two also for devices whose 8-bit products read operands in any layout. Others cast
nothing.
"""


def program_precision(precision: Precision, *, any_layout: bool) -> Precision:
    """The precision whose recipe a device runs: 8-bit products of Hopper sum over rows of both operands only."""
    own = precision + _ANY_LAYOUT
    return cast("Precision", own) if any_layout and own in RECIPES else precision


def in_precision(workload: Workload, precision: Precision) -> Workload:
    """A workload in the precision whose recipe the device runs."""
    return workload if workload.precision == precision else workload.model_copy(update={"precision": precision})


@dataclass(frozen=True, slots=True)
class Cast:
    """What an operator casts for a product: its input, or the gradients of its outputs, in the backward pass."""

    recipe: Recipe
    of: Literal["input", "gradient"]
    of_norm: bool = False
    """A norm makes the input."""
    rows_only: bool = False
    """What products along columns read is made later, from 16 bits."""
    of_attention: bool = False
    """Of core attention, which is recomputed with its casts."""
