"""What all blocks are written with: tensors whose sizes follow from their dimensions, and operators in order."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction

from spsim.program.operators import Operand, Operator, Tensor, TensorKind, parse
from spsim.program.placement import Extent, factors
from spsim.work import AttentionKernel, Framework, KernelClass, KernelName


class Sizes(dict[str, Extent]):
    """Sizes of dimensions; those of products follow: s times b times k over e, of `s*b*k/e`."""

    def __missing__(self, dim: str) -> Extent:
        over = math.prod([self[own] for own in dim.split("/")[1:]])
        self[dim] = Fraction(math.prod([self[own] for own in factors(dim)])) / over
        return self[dim]


class Block:
    """Collects the operators of one block."""

    def __init__(self, sizes: Mapping[str, int], element_bytes: int) -> None:
        self.sizes = Sizes(sizes)
        self.element_bytes = element_bytes
        self.operators: list[Operator] = []

    def tensor(
        self,
        name: str,
        dims: str,
        kind: TensorKind = "activation",
        itemsize: int | None = None,
        heads: Extent = 0,
    ) -> Tensor:
        """A tensor whose sizes follow from its dimensions; `heads` overrides the number of heads (K and V),
        `itemsize` the bytes of an element.
        """
        names = tuple(dims.split())
        sizes = tuple(heads if dim == "a" and heads else self.sizes[dim] for dim in names)
        return Tensor(name, names, sizes, itemsize or self.element_bytes, kind)

    def weight(self, name: str, dims: str, heads: Extent = 0) -> Tensor:
        """A weight, likewise."""
        return self.tensor(name, dims, "weight", heads=heads)

    def add(
        self,
        name: str,
        kind: KernelClass,
        signature: str,
        inputs: Sequence[Tensor],
        outputs: Sequence[Tensor],
        *,
        mixes: str = "",
        saves: Sequence[Tensor] = (),
        owns_gather: Sequence[Tensor] = (),
        passthrough: Sequence[Tensor] = (),
        kernel: KernelName | None = None,
        attention_kernel: AttentionKernel | Framework = "transformer_engine",
        rules: str = "",
    ) -> None:
        """Append an operator; auxiliary outputs (masks, statistics) are read in their own dimensions."""
        left, right = parse(signature)
        right += tuple(tensor.dims for tensor in outputs[len(right) :])
        self.operators.append(
            Operator(
                name=name,
                kind=kind,
                inputs=tuple(Operand(t, s) for t, s in zip(inputs, left, strict=True)),
                outputs=tuple(Operand(t, s) for t, s in zip(outputs, right, strict=True)),
                mixes=frozenset(mixes.split()),
                saves=tuple(tensor.name for tensor in saves),
                owns_gather=frozenset(tensor.name for tensor in owns_gather),
                passthrough=frozenset(tensor.name for tensor in passthrough),
                kernel=kernel,
                attention_kernel=attention_kernel,
                rules=rules,
            )
        )
