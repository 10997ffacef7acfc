"""From an operator and its splits to the kernels it launches: `Work` for forward and backward.

FLOPs and bytes follow from the subscripts; nothing is listed per model or per strategy.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from spsim.program.mesh import Mesh
from spsim.program.operators import Operand, Operator, Splits, input_layout
from spsim.program.placement import local_bytes, local_elements
from spsim.work import Direction, FlashAttention, Gemm, MemoryBound, MemoryBoundClass, Work


class Kernels:
    """The kernels of one operator on one rank."""

    def __init__(self, operator: Operator, splits: Splits, mesh: Mesh) -> None:
        self.operator = operator
        self.splits = splits
        self.mesh = mesh
        self.sizes = operator.local_sizes([(mesh.degree(axis), dim) for axis, dim in splits])

    def bytes_of(self, operands: Iterable[Operand]) -> int:
        """Local bytes of operands, each in the layout that the operator consumes or produces."""
        return sum(local_bytes(o.tensor, input_layout(o, self.splits), self.mesh) for o in operands)

    def _elements(self, operand: Operand) -> int:
        return local_elements(operand.tensor, input_layout(operand, self.splits), self.mesh)

    def _product(self, dims: Iterable[str]) -> int:
        return math.prod(self.sizes[dim] for dim in dims)

    @property
    def matrices(self) -> tuple[Operand, ...]:
        """Weights that are multiplied, not added."""
        contracted = self.operator.contracted
        return tuple(w for w in self.operator.weights if contracted & set(w.subscript))

    @property
    def vectors(self) -> tuple[Operand, ...]:
        """Weights that are added or scaled by: biases and norm weights."""
        matrices = self.matrices
        return tuple(w for w in self.operator.weights if w not in matrices)

    def forward(self, causal: bool, ring_cut: str) -> tuple[Work, ...]:
        """The forward kernel: one entry, or one per position on the ring where ranks differ."""
        operator = self.operator
        if operator.kind == "gemm":
            return (self._linear() if self.matrices else self._product_of_activations(),)
        if operator.kind == "attention":
            return self.attention("forward", causal, ring_cut)
        return (
            MemoryBound(_memory_bound(operator), self.bytes_of(operator.inputs + operator.outputs), operator.kernel),
        )

    def _linear(self) -> Gemm:
        operator = self.operator
        k = self._product(operator.contracted)
        m = self._product(d for d in operator.activations[0].subscript if d not in operator.contracted)
        n = sum(self._elements(w) for w in self.matrices) // k
        return Gemm(m, n, k, 1, self.bytes_of(operator.inputs + operator.outputs))

    def _product_of_activations(self) -> Gemm:
        left, right = (set(operand.subscript) for operand in self.operator.activations)
        out = set(self.operator.results[0].subscript)
        return Gemm(
            m=self._product((left & out) - right),
            n=self._product((right & out) - left),
            k=self._product(self.operator.contracted),
            batch=self._product(left & right & out),
            bytes_moved=self.bytes_of(self.operator.inputs + self.operator.outputs),
        )

    def data_gradients(self) -> list[tuple[Operand, Gemm]]:
        """One product for the gradient of each activation operand of a GEMM."""
        if self.matrices:
            forward = self._linear()
            return [(self.operator.activations[0], Gemm(forward.m, forward.k, forward.n, 1, forward.bytes_moved))]
        forward = self._product_of_activations()
        m, n, k = forward.m, forward.n, forward.k
        left, right = self.operator.activations
        return [
            (left, Gemm(m, k, n, forward.batch, forward.bytes_moved)),
            (right, Gemm(k, n, m, forward.batch, forward.bytes_moved)),
        ]

    def weight_gradients(self) -> list[Work]:
        """The product for the weights, accumulated into fp32 main gradients, and one sum for the biases."""
        if not self.matrices:
            return []
        forward = self._linear()
        kernels: list[Work] = [
            Gemm(forward.k, forward.n, forward.m, 1, forward.bytes_moved, accumulated=forward.k * forward.n)
        ]
        if self.vectors:
            kernels.append(MemoryBound("elementwise", self.bytes_of(self.operator.results), "bias_gradient"))
        return kernels

    def backward(self, causal: bool, ring_cut: str) -> tuple[Work, ...]:
        """The backward kernel of an operator that is not a GEMM; empty where every gradient passes through.

        It reads the gradient of the output and what was saved, and writes the gradients of the inputs.
        Biases cost one more reading of the gradient they sum; norms sum theirs on the way.
        """
        operator = self.operator
        if operator.kind == "attention":
            return self.attention("backward", causal, ring_cut)
        written = [o for o in operator.activations if o.tensor.name not in operator.passthrough]
        summed = self.vectors if operator.kind != "norm" else ()
        if not written and not summed:
            return ()
        total = self.bytes_of(written or operator.results) if summed else 0
        if not written:
            return (MemoryBound("elementwise", total, "bias_gradient"),)
        saved = [o for o in operator.inputs + operator.outputs if o.tensor.name in operator.saves]
        total += self.bytes_of([*operator.results, *saved, *written])
        return (MemoryBound(_memory_bound(operator), total, operator.kernel, backward=True),)

    def attention(self, direction: Direction, causal: bool, ring_cut: str) -> tuple[Work, ...]:
        """Flash attention over the gathered keys; under a contiguous cut later ranks see more of the square."""
        queries, keys = self.sizes["s"], self.sizes["j"]
        degree = next((self.mesh.degree("ring") for axis, dim in self.splits if axis == "ring" and dim == "s"), 1)
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
        batch, heads, head_dim = self.sizes.get("b", 1), self._product(self._head_dims), self._head_dim
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
        keys = self._elements(self.operator.inputs[1])
        return keys // (self.sizes["j"] * self.sizes.get("b", 1) * self._head_dim)


def _memory_bound(operator: Operator) -> MemoryBoundClass:
    if operator.kind == "gemm" or operator.kind == "attention":
        raise AssertionError(f"{operator.name} takes the time of its FLOPs")
    return operator.kind
