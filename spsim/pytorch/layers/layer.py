"""One transformer layer of a model under a plan, operator by operator."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from spsim.errors import InputError
from spsim.inputs.model import Model
from spsim.inputs.plan import Plan
from spsim.pytorch.layers import elementwise, flash, unfused
from spsim.pytorch.layers import ring as rings
from spsim.pytorch.layers.block import ParallelBlock
from spsim.pytorch.layers.collectives import reduce, split_heads, split_sequence, start_all_gather
from spsim.pytorch.layers.groups import Groups
from spsim.pytorch.layers.linears import column_parallel
from spsim.pytorch.layers.recording import operator, recomputation
from spsim.pytorch.layers.sequence import BETWEEN_LINEARS, INSIDE_ATTENTION
from spsim.pytorch.layers.weights import weight_shapes


class ParallelLayer(ParallelBlock):
    """A layer whose parameters are this rank's slices of a whole layer's seeded weights.

    Dropout draws from torch's default generator: ranks of a tp axis without sequence parallelism need equal
    seeds, since each of them computes the same dropouts around the blocks.
    """

    def __init__(
        self,
        model: Model,
        plan: Plan,
        groups: Groups,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        seed: int = 0,
    ) -> None:
        shapes = weight_shapes(model)
        own = sum(math.prod(shape.sizes) for shape in shapes.values())
        if own != model.layer_parameters or model.sliding_window or model.documents:
            raise InputError(
                f"model {model.name}: real layers are those of dense GPT and Llama models; use one of these"
            )
        super().__init__(model, plan, groups, shapes, dtype, device, seed)

    # The layer

    def forward(self, x: Tensor) -> Tensor:
        """x and the result are this rank's part [s b h]; tp without sequence parallelism has no parts."""
        run = _recomputed(self._layer) if self.plan.recompute == "full" else self._layer
        out: Tensor = run(x)
        return out

    def _layer(self, x: Tensor) -> Tensor:
        attended = self._residual("residual1", self._attention(self.norm("norm1", x)), x)
        normed = self.norm("norm2", x if self.model.parallel_residual else attended)
        return self._residual("residual2", self._mlp(normed), attended)

    def _attention(self, x: Tensor) -> Tensor:
        q, k, v = self._qkv(x)
        if self.model.qk_norm:
            q, k = self.norm("q_norm", q), self.norm("k_norm", k)
        if self.model.positions == "rope":
            q, k = self._rope("rope_q", q), self._rope("rope_k", k)
        recompute = self.plan.recompute == "selective"
        run = _recomputed(self._core_attention) if recompute else self._core_attention
        context: Tensor = run(q, k, v)
        with operator("projection"):
            return nn.functional.linear(context.flatten(2), self.weight("projection").flatten(1))

    def _qkv(self, x: Tensor) -> tuple[Tensor, ...]:
        with operator("qkv"):
            biases = [self.bias(name) for name in "qkv"]
            outs = column_parallel(
                x,
                [self.weight(name).flatten(0, 1) for name in "qkv"],
                [None if bias is None else bias.flatten() for bias in biases],
                self.tp,
            )
            return tuple(out.unflatten(-1, (-1, self.model.head_dim)) for out in outs)

    def _rope(self, name: str, x: Tensor) -> Tensor:
        with operator(name):
            positions = partial(self.shards.positions, x.shape[0], BETWEEN_LINEARS)
            table = self.table(
                f"rope_{x.shape[0]}_{x.dtype}",
                lambda: elementwise.rotation(positions(), self.model.head_dim, x.dtype),
            )
            return elementwise.rope(x, table)

    def _core_attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        run = self._unfused if self.model.attention == "unfused" else self._flash
        if self.plan.gathers_position_ids:
            self._gather_position_ids(q.shape[0], q.shape[1])
        return split_sequence(self.groups.group("ulysses"), run(q, k, v))

    def _gather_position_ids(self, tokens: int, batch: int) -> None:
        """As attention gets them that is called with the position of each token of each sequence."""
        positions = self.table(f"positions_{tokens}", partial(self.shards.positions, tokens, BETWEEN_LINEARS))
        start_all_gather(positions.unsqueeze(1).repeat(1, batch), self.groups.group("ulysses")).wait()

    def _flash(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with operator("attention"):
            q, k, v = split_heads(self.groups.group("ulysses"), q, k, v)
            ring = self._ring(q.shape[0])
            if ring is None:
                return flash.attention(q, k, v, self.model.causal)
            return (rings.gathered if self.plan.ring_kind == "all_gather" else rings.circulated)(q, k, v, ring)

    def _unfused(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ulysses = self.groups.group("ulysses")
        with operator("qk"):
            q, k = split_heads(ulysses, q, k)
            ring = self._ring(q.shape[0])
            scores = unfused.scores(q, k, ring)
        with operator("softmax"):
            mask = self._mask(q.shape[0], scores.shape[-1], q.dtype) if self.model.causal else None
            weights = unfused.softmax(scores, self.model.head_dim**-0.5, mask)
        with operator("attention_dropout"):
            weights = elementwise.dropout(weights, self.model.dropout)
        with operator("av"):
            (v,) = split_heads(ulysses, v)
            return unfused.context(weights, v, ring)

    def _mlp(self, x: Tensor) -> Tensor:
        with operator("fc1"):
            weight = self.weight("fc1")
            (hidden,) = column_parallel(x, [weight.flatten(0, -2)], [None], self.tp)
            hidden = hidden.unflatten(-1, weight.shape[:-1])
        with operator(self.model.activation):
            active = elementwise.activation(self.model.activation, hidden, self.bias("fc1"))
        with operator("fc2"):
            return nn.functional.linear(active, self.weight("fc2"))

    def _residual(self, name: str, x: Tensor, residual: Tensor) -> Tensor:
        with operator(name):
            if self.tp.group is not None:
                x = reduce(x, self.tp.group, scatter=self.plan.sequence_parallel)
            return elementwise.bias_dropout_residual(x, self.bias(name), residual, self.model.dropout)

    # Constants, made at the first use

    def _mask(self, queries: int, keys: int, dtype: torch.dtype) -> Tensor:
        positions = partial(self.shards.positions, queries, INSIDE_ATTENTION)
        return self.table(f"mask_{queries}_{keys}_{dtype}", lambda: unfused.causal_mask(positions(), keys, dtype))

    def _ring(self, tokens: int) -> rings.Ring | None:
        group = self.groups.group("ring")
        if group is None:
            return None
        order = self.table(f"order_{tokens}", lambda: self.shards.order(tokens * group.size()))
        places = self.table(f"places_{tokens}", order.argsort)
        return rings.Ring(
            group, self.groups.coordinate("ring"), self.shards.zigzag, self.model.causal, order, places,
            gathers=self.plan.ring_kind == "gather_permute", fp32_gradients=self.plan.sends_fp32_gradients,
            sends=2 if self.plan.ring_messages == "separate" else 1,
        )  # fmt: skip


def _recomputed(run: Callable[..., Tensor]) -> Callable[..., Any]:
    """Keeps the inputs only; the whole of it runs again in backward, as Megatron-LM's checkpoint."""

    def again(*inputs: Tensor) -> Tensor:
        with recomputation():
            return run(*inputs)

    return partial(checkpoint, again, use_reentrant=True)
