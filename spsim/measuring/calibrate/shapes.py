"""What each measured kernel computes and moves: rows of the raw file before they have a result.

FLOPs and bytes are counted as `spsim.program.kernels` counts them for the same operator, so that a coefficient fitted
here means there what it means here: each operand and result once, masks of one byte an element, fp32 statistics,
what the forward pass saved read again by the backward pass. Bytes of operators outside the layer are those that
no implementation avoids; each has its count beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from spsim.measuring.calibrate.records import Measurement
from spsim.work import AttentionKernel, Direction, MemoryBoundClass

ITEMSIZE = {"fp32": 4, "tf32": 4, "fp16": 2, "bf16": 2, "fp8": 1}
OUTPUT_ITEMSIZE = {**ITEMSIZE, "fp8": 2}
"""Products of fp8 operands are written in bf16."""


def linear(dtype: str, rows: int, inputs: int, outputs: int) -> Iterator[Measurement]:
    """The products of a linear layer: forward, gradients of data and of weights, the latter also accumulated."""
    x, w, y = rows * inputs, inputs * outputs, rows * outputs

    def product(name: str, m: int, n: int, k: int, result: int, accumulated: int | None = None) -> Measurement:
        moved = (x + w + y - result) * ITEMSIZE[dtype] + result * OUTPUT_ITEMSIZE[dtype]
        return Measurement(
            kind="gemm", name=name, dtype=dtype, m=m, n=n, k=k, batch=1, accumulated=accumulated, bytes_moved=moved
        )

    yield product("forward", rows, outputs, inputs, y)
    yield product("dgrad", rows, inputs, outputs, x)
    yield product("wgrad", inputs, outputs, rows, w)
    yield product("wgrad", inputs, outputs, rows, w, accumulated=w)


def score_products(dtype: str, batch: int, heads: int, head_dim: int, tokens: int) -> Iterator[Measurement]:
    """The batched products of unfused attention: QK^T, AV, and the gradient of K (that of V has its shape too).

    The gradient of Q has the shape of AV, and that of the probabilities the shape of QK^T.
    """
    side, square = batch * heads * tokens * head_dim, batch * heads * tokens * tokens
    shapes = [
        ("forward", tokens, tokens, head_dim),
        ("forward", tokens, head_dim, tokens),
        ("dgrad", head_dim, tokens, tokens),
    ]
    for name, m, n, k in shapes:
        yield Measurement(
            kind="gemm", name=name, dtype=dtype, m=m, n=n, k=k, batch=batch * heads,
            bytes_moved=(2 * side + square) * ITEMSIZE[dtype],
        )  # fmt: skip


def flash_attention(
    kernel: AttentionKernel,
    dtype: str,
    direction: Direction,
    *,
    batch: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    tokens: int,
    causal: bool,
) -> Measurement:
    """Attention in one kernel; the backward pass moves each tensor and its gradient."""
    passes = 1 if direction == "forward" else 2
    moved = passes * 2 * (heads + kv_heads) * batch * tokens * head_dim * ITEMSIZE[dtype]
    return Measurement(
        kind="attention", name=direction, dtype=dtype, batch=batch, heads=heads, kv_heads=kv_heads, head_dim=head_dim,
        queries=tokens, keys=tokens, causal=causal, kernel=kernel, bytes_moved=moved,
    )  # fmt: skip


Bytes = Callable[[int, int, int], int]


class MemoryBoundOperator(NamedTuple):
    """The class of an operator and the bytes of its passes for (rows, width, bytes of an element)."""

    operator_class: MemoryBoundClass
    forward: Bytes
    backward: Bytes | None = None


ROTATED = 128
"""Head size of rotated heads."""
VOCABULARY_SHARE = 2
"""Rows of the embedding table, in multiples of the tokens looked up."""

MEMORY_BOUND = {
    # Input, output, weight and bias; mean and reciprocal deviation. Backward: both gradients and the input.
    "layer_norm": MemoryBoundOperator(
        "norm", lambda r, w, i: 2 * r * w * i + 2 * w * i + 8 * r, lambda r, w, i: 3 * r * w * i + 8 * r
    ),
    "rms_norm": MemoryBoundOperator(
        "norm", lambda r, w, i: 2 * r * w * i + w * i + 4 * r, lambda r, w, i: 3 * r * w * i + 4 * r
    ),
    "softmax": MemoryBoundOperator("softmax", lambda r, w, i: 2 * r * w * i, lambda r, w, i: 3 * r * w * i),
    # With scale and additive mask, as unfused attention has it; the mask is one for all heads.
    "masked_softmax": MemoryBoundOperator("softmax", lambda r, w, i: 2 * r * w * i, lambda r, w, i: 3 * r * w * i),
    "dropout": MemoryBoundOperator("dropout", lambda r, w, i: r * w * (2 * i + 1), lambda r, w, i: r * w * (2 * i + 1)),
    "gelu": MemoryBoundOperator("elementwise", lambda r, w, i: 2 * r * w * i, lambda r, w, i: 3 * r * w * i),
    # The bias has the width; its gradient reads once more what it sums.
    "bias_gelu": MemoryBoundOperator(
        "elementwise", lambda r, w, i: 2 * r * w * i + w * i, lambda r, w, i: 4 * r * w * i
    ),
    # From two halves of the width each to one.
    "swiglu": MemoryBoundOperator("elementwise", lambda r, w, i: 3 * r * w * i, lambda r, w, i: 5 * r * w * i),
    # One kernel in the simulation, several in torch, as is the next.
    "bias_dropout_add": MemoryBoundOperator(
        "elementwise", lambda r, w, i: r * w * (3 * i + 1) + w * i, lambda r, w, i: r * w * (3 * i + 1)
    ),
    "bias_add": MemoryBoundOperator("elementwise", lambda r, w, i: 3 * r * w * i + w * i),
    "bias_gradient": MemoryBoundOperator("elementwise", lambda r, w, i: r * w * i),
    # Heads of one size in the width, and one table for all of them.
    "rope": MemoryBoundOperator(
        "elementwise", lambda r, w, i: (2 * w + ROTATED) * r * i, lambda r, w, i: 2 * r * w * i
    ),
    "add": MemoryBoundOperator("elementwise", lambda r, w, i: 3 * r * w * i),
    "copy": MemoryBoundOperator("elementwise", lambda r, w, i: 2 * r * w * i),
    # Rows of the table and 8-byte tokens in, rows out. Backward: the table is cleared, then each row added to it.
    "embedding": MemoryBoundOperator(
        "embedding",
        lambda r, w, i: 2 * r * w * i + 8 * r,
        lambda r, w, i: (VOCABULARY_SHARE + 3) * r * w * i + 8 * r,
    ),
    # Logits in, log-probabilities kept; backward reads these and writes the gradient.
    "cross_entropy": MemoryBoundOperator(
        "cross_entropy", lambda r, w, i: 2 * r * w * i, lambda r, w, i: 2 * r * w * i
    ),
    # Parameter, gradient and two moments read, all but the gradient written: 28 bytes a parameter in fp32.
    "adam": MemoryBoundOperator("optimizer", lambda r, w, i: 7 * r * w * i),
}  # fmt: skip


def memory_bound(operator: str, dtype: str, rows: int, width: int) -> Iterator[Measurement]:
    """Forward and, where it has one, backward of an operator that takes the time of its memory traffic."""
    described = MEMORY_BOUND[operator]
    for direction, count in (("forward", described.forward), ("backward", described.backward)):
        if count is not None:
            yield Measurement(
                kind="memory_bound", name=f"{operator}_{direction}" if described.backward else operator, dtype=dtype,
                operator_class=described.operator_class, m=rows, n=width,
                bytes_moved=count(rows, width, ITEMSIZE[dtype]),
            )  # fmt: skip
