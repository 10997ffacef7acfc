"""Flash attention on blocks of queries and keys, and the merge of blocks by online softmax.

Tensors are [s b a d], K and V with their own number of heads; the log-sum-exp is [b a s].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

_aten: Any = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Block:
    """Queries that meet keys; causal: query i sees the keys up to i."""

    queries: slice
    keys: slice
    causal: bool


def _heads_first(x: Tensor) -> Tensor:
    return x.permute(1, 2, 0, 3)


def _sequence_first(x: Tensor) -> Tensor:
    return x.permute(2, 0, 1, 3)


def attention(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """Torch's own, differentiable: keeps q, k, v, its output and the log-sum-exp."""
    grouped = q.shape[2] != k.shape[2]
    q, k, v = (_heads_first(x) for x in (q, k, v))
    return _sequence_first(functional.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped))


def block_forward(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of one block."""
    kernel = (
        _aten._scaled_dot_product_flash_attention if q.is_cuda else _aten._scaled_dot_product_flash_attention_for_cpu
    )
    out, log_sum_exp, *_ = kernel(*(_heads_first(x) for x in (q, k, v)), 0.0, causal)
    return _sequence_first(out), log_sum_exp


def block_backward(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sum_exp: Tensor, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v of one block, given output and log-sum-exp over all keys."""
    operands = [*(_heads_first(x) for x in (gradient, q, k, v, out)), log_sum_exp.contiguous()]
    if q.is_cuda:
        none = torch.empty(0, device=q.device, dtype=torch.int64)
        found = _aten._scaled_dot_product_flash_attention_backward(
            *operands, None, None, q.shape[0], k.shape[0], 0.0, causal, none, none
        )
    else:
        found = _aten._scaled_dot_product_flash_attention_for_cpu_backward(*operands, 0.0, causal)
    of_q, of_k, of_v = (_sequence_first(g) for g in found)
    return of_q, of_k, of_v


class OnlineSoftmax:
    """The output over all blocks so far, in fp32 at least, with the log-sum-exp of each row."""

    def __init__(self, q: Tensor) -> None:
        s, b, a, _ = q.shape
        exact = torch.promote_types(q.dtype, torch.float32)
        self.dtype = q.dtype
        self.out = torch.zeros_like(q, dtype=exact, memory_format=torch.contiguous_format)
        self.log_sum_exp = q.new_full((b, a, s), -torch.inf, dtype=exact)

    def merge(self, rows: slice, out: Tensor, log_sum_exp: Tensor) -> None:
        """Add a block of some queries; each part weighs what its keys weigh in the sum."""
        before = self.log_sum_exp[:, :, rows]
        total = torch.logaddexp(before, log_sum_exp)
        mine, theirs = ((x - total).exp().permute(2, 0, 1).unsqueeze(-1) for x in (before, log_sum_exp))
        self.out[rows] = self.out[rows] * mine + out * theirs
        self.log_sum_exp[:, :, rows] = total

    def result(self) -> tuple[Tensor, Tensor]:
        """Output in the type of the queries, and log-sum-exp."""
        return self.out.to(self.dtype), self.log_sum_exp
