"""From an operator and its splits to the kernels it launches: `Work` for forward and backward.

FLOPs and bytes follow from the subscripts; nothing is listed per model or per strategy.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from spsim.lazy import lazy
from spsim.program.operators import Operator
from spsim.program.placed import PlacedOperand, PlacedOperator
from spsim.work import Direction, FlashAttention, Gemm, MemoryBound, MemoryBoundClass, Work


class Kernels:
    """The kernels of one operator on one rank."""

    def __init__(self, placed: PlacedOperator) -> None:
        self.placed = placed
        self.operator = placed.operator

    def _product(self, dims: Iterable[str]) -> int:
        return math.prod([self.placed.sizes[dim] for dim in dims])

    @lazy
    def bytes_moved(self) -> int:
        """Local bytes of all operands, each in the layout that the operator consumes or produces."""
        return bytes_of(self.placed.inputs + self.placed.outputs)

    @lazy
    def matrices(self) -> tuple[PlacedOperand, ...]:
        """Weights that are multiplied, not added."""
        contracted = self.operator.contracted
        return tuple([w for w in self.placed.weights if not contracted.isdisjoint(w.subscript)])

    @lazy
    def vectors(self) -> tuple[PlacedOperand, ...]:
        """Weights that are added or scaled by: biases and norm weights."""
        return tuple([w for w in self.placed.weights if self.operator.contracted.isdisjoint(w.subscript)])

    def forward(self, causal: bool, ring_cut: str) -> tuple[Work, ...]:
        """The forward kernel: one entry, or one per position on the ring where ranks differ."""
        return self.attention("forward", causal, ring_cut) if self.operator.kind == "attention" else self._forward

    @lazy
    def _forward(self) -> tuple[Work, ...]:
        operator = self.operator
        if operator.kind == "gemm":
            return (self._gemm,)
        return (MemoryBound(_memory_bound(operator), self.bytes_moved, operator.kernel),)

    @lazy
    def _gemm(self) -> Gemm:
        return self._linear() if self.matrices else self._product_of_activations()

    def _linear(self) -> Gemm:
        operator = self.operator
        k = self._product(operator.contracted)
        m = self._product(d for d in operator.activations[0].subscript if d not in operator.contracted)
        n = sum(w.elements for w in self.matrices) // k
        return Gemm(m, n, k, 1, self.bytes_moved)

    def _product_of_activations(self) -> Gemm:
        left, right = (set(operand.subscript) for operand in self.operator.activations)
        out = set(self.operator.results[0].subscript)
        return Gemm(
            m=self._product((left & out) - right),
            n=self._product((right & out) - left),
            k=self._product(self.operator.contracted),
            batch=self._product(left & right & out),
            bytes_moved=self.bytes_moved,
        )

    @lazy
    def data_gradients(self) -> tuple[tuple[PlacedOperand, Gemm], ...]:
        """One product for the gradient of each activation operand of a GEMM."""
        m, n, k, batch, moved = (getattr(self._gemm, name) for name in ("m", "n", "k", "batch", "bytes_moved"))
        if self.matrices:
            return ((self.placed.activations[0], Gemm(m, k, n, 1, moved)),)
        left, right = self.placed.activations
        return (left, Gemm(m, k, n, batch, moved)), (right, Gemm(k, n, m, batch, moved))

    @lazy
    def weight_gradients(self) -> tuple[Work, ...]:
        """The product for the weights, accumulated into fp32 main gradients, and one sum for the biases."""
        if not self.matrices:
            return ()
        forward = self._gemm
        product = Gemm(forward.k, forward.n, forward.m, 1, forward.bytes_moved, accumulated=forward.k * forward.n)
        if not self.vectors:
            return (product,)
        return product, MemoryBound("elementwise", bytes_of(self.placed.results), "bias_gradient")

    def backward(self, causal: bool, ring_cut: str) -> tuple[Work, ...]:
        """The backward kernel of an operator that is not a GEMM; empty where every gradient passes through."""
        return self.attention("backward", causal, ring_cut) if self.operator.kind == "attention" else self._backward

    @lazy
    def _backward(self) -> tuple[Work, ...]:
        """It reads the gradient of the output and what was saved, and writes the gradients of the inputs.

        Biases cost one more reading of the gradient they sum; norms sum theirs on the way.
        """
        operator, placed = self.operator, self.placed
        written = [o for o in placed.activations if o.name not in operator.passthrough]
        summed = self.vectors if operator.kind != "norm" else ()
        if not written and not summed:
            return ()
        total = bytes_of(written or placed.results) if summed else 0
        if not written:
            return (MemoryBound("elementwise", total, "bias_gradient"),)
        total += bytes_of([*placed.results, *placed.saved, *written])
        return (MemoryBound(_memory_bound(operator), total, operator.kernel, backward=True),)

    def attention(self, direction: Direction, causal: bool, ring_cut: str) -> tuple[Work, ...]:
        """Flash attention over the gathered keys; under a contiguous cut later ranks see more of the square."""
        queries, keys = self.placed.sizes["s"], self.placed.sizes["j"]
        degree = self.placed.mesh.degree("ring") if ("ring", "s") in self.placed.splits else 1
        if not causal:
            return (self.attention_block(direction, queries, keys, 2 * queries * keys, causal=False),)
        if degree == 1 or ring_cut == "zigzag":
            return (self.attention_block(direction, queries, keys, queries * keys, causal=True),)
        return tuple(
            self.attention_block(direction, queries, keys, queries * queries * (2 * rank + 1), causal=True)
            for rank in range(degree)
        )

    def attention_block(
        self, direction: Direction, queries: int, keys: int, twice_pairs: int, *, causal: bool
    ) -> FlashAttention:
        """One flash kernel of `queries` x `keys`, of which `twice_pairs` / 2 are computed."""
        batch, heads, head_dim = self.placed.sizes.get("b", 1), self._product(self._head_dims), self._head_dim
        rows = 2 * queries * heads + 2 * keys * self._local_kv_heads()
        passes = 1 if direction == "forward" else 2
        return FlashAttention(
            direction=direction,
            batch=batch, heads=heads, head_dim=head_dim, queries=queries, keys=keys, twice_pairs=twice_pairs,
            causal=causal, bytes_moved=passes * rows * batch * head_dim * self.operator.inputs[0].tensor.itemsize,
        )  # fmt: skip

    @property
    def _head_dims(self) -> list[str]:
        """Dimensions of the queries that are neither positions, batch nor mixed."""
        queries = self.operator.inputs[0].subscript
        return [dim for dim in queries if dim not in ("s", "b") and dim not in self.operator.mixes]

    @property
    def _head_dim(self) -> int:
        return self._product(self.operator.mixes - {"j"})

    def _local_kv_heads(self) -> int:
        sizes = self.placed.sizes
        return self.placed.inputs[1].elements // (sizes["j"] * sizes.get("b", 1) * self._head_dim)


def bytes_of(operands: Iterable[PlacedOperand]) -> int:
    """Local bytes of some operands."""
    return sum([operand.bytes for operand in operands])


def _memory_bound(operator: Operator) -> MemoryBoundClass:
    if operator.kind == "gemm" or operator.kind == "attention":
        raise AssertionError(f"{operator.name} takes the time of its FLOPs")
    return operator.kind
