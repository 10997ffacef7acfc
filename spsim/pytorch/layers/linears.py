"""The column-parallel linear of Megatron-LM, which owns the gather of its input.

A row-parallel linear is an ordinary one, followed by `collectives.reduce`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.autograd.function import Function
from torch.nn import functional

from spsim.pytorch.layers.collectives import (
    Group,
    Pending,
    start_all_gather,
    start_all_reduce,
    start_reduce_scatter,
)


@dataclass(frozen=True)
class TensorParallel:
    """The tp axis as the linears of a layer see it."""

    group: Group = None
    sequence_parallel: bool = False
    overlap: bool = True
    """Gradient communication behind the weight gradient, re-gather behind the data gradient."""
    keep_gathered: bool = False
    """Keep the gathered input instead of the shard, as DTensor does."""

    def gather(self, x: Tensor) -> Pending:
        """The whole input of a column-parallel linear."""
        return start_all_gather(x, self.group if self.sequence_parallel else None)

    def reduce_gradient(self, x: Tensor) -> Pending:
        """The gradient of the input from the summands of all ranks."""
        return (start_reduce_scatter if self.sequence_parallel else start_all_reduce)(x, self.group)


class _ColumnParallelLinear(Function):
    """Several weights on one input; keeps the shard of the input and gathers it again in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, tp: TensorParallel, num: int, *parameters: Any) -> Any:
        weights, biases = parameters[:num], parameters[num:]
        whole = tp.gather(x).wait()
        ctx.tp, ctx.has_bias = tp, [bias is not None for bias in biases]
        ctx.save_for_backward(whole if tp.keep_gathered else x, *weights)
        return tuple(functional.linear(whole, w, b) for w, b in zip(weights, biases, strict=True))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        tp: TensorParallel = ctx.tp
        kept, *weights = ctx.saved_tensors
        gathered = Pending(kept) if tp.keep_gathered else tp.gather(kept)
        rows = [g.flatten(0, 1) for g in gradients]
        if not tp.overlap:
            gathered.wait()
        data = rows[0] @ weights[0]
        for g, w in zip(rows[1:], weights[1:], strict=True):
            data.addmm_(g, w)
        reduced = tp.reduce_gradient(data.view(*gradients[0].shape[:2], -1))
        if not tp.overlap:
            reduced.wait()
        whole = gathered.wait().flatten(0, 1)
        of_weights = [g.T @ whole for g in rows]
        of_biases = [g.sum(0) if has else None for g, has in zip(rows, ctx.has_bias, strict=True)]
        return reduced.wait(), None, None, *of_weights, *of_biases


def column_parallel(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], tp: TensorParallel
) -> tuple[Tensor, ...]:
    """x [s b h] times each weight [n h]: outputs [s b n], n this rank's part, s the sequence of all tp ranks."""
    out: tuple[Tensor, ...] = _ColumnParallelLinear.apply(x, tp, len(weights), *weights, *biases)
    return out
