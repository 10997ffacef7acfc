"""Kernels that cast operands of products to 8 or 4 bits, in the vocabulary of Transformer Engine.

All take the time of their traffic: elements are read in 16 bits, and each copy is written with its scales. One that
also writes the copy that products along columns read (`quantize_both`) reads only once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

from spsim.program.recipes import HALF, Cast, Recipe
from spsim.work import KernelName, MemoryBound

SCALE_BYTES = 4
"""Of a tensor's largest value."""
Reading = Literal["forward", "dgrad", "wgrad"]
"""A product by what it is for; the last reads its operands along columns."""


def casting(cast: Cast, elements: int, *, gathered: bool) -> Iterator[MemoryBound]:
    """Kernels that cast a tensor of so many elements, which is `gathered` then: a transpose is made after that."""
    recipe = cast.recipe
    if recipe.tensor_scale and not (cast.of_norm and recipe.norm == "finds scale"):
        yield _kernel("amax", recipe, HALF * elements)
    one = cast.rows_only or recipe.columns == "same" or (gathered and recipe.columns == "transposed")
    yield _quantize("quantize" if one else "quantize_both", recipe, elements, gradient=cast.of == "gradient")


def casting_again(recipe: Recipe, elements: int) -> Iterator[MemoryBound]:
    """Kernels that make the copy for products along columns from 16 bits, later than the other."""
    if recipe.tensor_scale:
        yield _kernel("amax", recipe, HALF * elements)
    yield _quantize(_COLUMNS[recipe.columns], recipe, elements)


def arriving(recipe: Recipe, elements: int, product: Reading) -> Iterator[MemoryBound]:
    """Kernels that a gathered copy needs before a product reads it."""
    if recipe.ordered_scales:
        yield _kernel("swizzle_scales", recipe, math.ceil(2 * recipe.scale_bytes * elements))
    if product == "wgrad" and recipe.columns == "transposed":
        yield _kernel("transpose", recipe, 2 * elements)


def casting_weights(recipe: Recipe, elements: int) -> Iterator[MemoryBound]:
    """Kernels that make the copies of a weight, once a step; scales are of squares or found by the optimizer."""
    if not recipe.weights_in_type:
        yield from casting(Cast(recipe, "input"), elements, gathered=False)
    elif recipe.columns == "transposed":
        yield _kernel("transpose", recipe, 2 * elements)


_COLUMNS: dict[str, KernelName] = {
    "same": "quantize", "transposed": "quantize_both", "apart": "quantize_columnwise"
}  # fmt: skip
"""What makes the copy for products along columns."""


def _quantize(kernel: KernelName, recipe: Recipe, elements: int, *, gradient: bool = False) -> MemoryBound:
    """Of a gradient it may take longer: 4 bits are rounded stochastically then."""
    copies = 2 if kernel == "quantize_both" else 1
    moved = math.ceil((HALF + copies * recipe.itemsize) * elements)
    return replace(_kernel(kernel, recipe, moved), backward=gradient)


def _kernel(kernel: KernelName, recipe: Recipe, moved: int) -> MemoryBound:
    return MemoryBound("cast", moved, kernel, dtype=recipe.dtype)
