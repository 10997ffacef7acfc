"""What stands around the layers, as Megatron-Core runs it: embedding and head of a vocabulary that tp cuts."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import Function
from torch.nn import functional

from spsim.inputs.model import Model
from spsim.inputs.plan import Plan
from spsim.program.blocks.embedding import padded_vocab
from spsim.program.blocks.head import is_tied
from spsim.pytorch.layers import elementwise
from spsim.pytorch.layers.block import ParallelBlock
from spsim.pytorch.layers.collectives import Group, reduce, scatter, start_all_reduce
from spsim.pytorch.layers.groups import Groups
from spsim.pytorch.layers.linears import column_parallel
from spsim.pytorch.layers.recording import operator
from spsim.pytorch.layers.sequence import BETWEEN_LINEARS
from spsim.pytorch.layers.weights import embedding_shapes, head_shapes


class ParallelEmbedding(ParallelBlock):
    """From token ids [s b], of this rank's part of the sequence over ring and ulysses, to hidden states."""

    def __init__(
        self, model: Model, plan: Plan, groups: Groups, dtype: torch.dtype = torch.float32, seed: int = 0
    ) -> None:
        rows = padded_vocab(model.vocab, plan.tp)
        super().__init__(model, plan, groups, embedding_shapes(model, rows), dtype, seed=seed)

    def local_tokens(self, whole: Tensor) -> Tensor:
        """Of [s b] what this rank looks up: tp does not cut it, with sequence parallelism neither."""
        size = whole.shape[0] // (self.groups.degree("ring") * self.groups.degree("ulysses"))
        return whole[self.shards.positions(size, BETWEEN_LINEARS)]

    def forward(self, tokens: Tensor) -> Tensor:
        """[s b] to this rank's part of [s b h]."""
        learned, scattered = self.model.positions == "learned", self.plan.sequence_parallel and self.plan.tp > 1
        with operator("embedding"):
            x = _lookup(tokens, self.weight("embedding"), self.tp.group)
            if self.tp.group is not None:
                x = reduce(x, self.tp.group, scatter=scattered and not learned)
        if learned:
            x = self._add_positions(x, tokens)
            if scattered and self.tp.group is not None:
                x = scatter(x, self.tp.group)
        with operator("embedding_copy"):
            x = x.clone()
        with operator("embedding_dropout"):
            return elementwise.dropout(x, self.model.dropout)

    def _add_positions(self, x: Tensor, tokens: Tensor) -> Tensor:
        with operator("position_embedding"):
            own = self.shards.positions(tokens.shape[0], BETWEEN_LINEARS)
            ids = own[:, None].expand_as(tokens).contiguous()
            return x + functional.embedding(ids, self.weight("position_embedding"))


def _lookup(tokens: Tensor, table: Tensor, group: Group) -> Tensor:
    """Rows of this rank's part of a table; zeros for the tokens of other ranks."""
    if group is None:
        return functional.embedding(tokens, table)
    elsewhere, own = _of_part(tokens, table.shape[0], group)
    out = functional.embedding(own, table)
    out[elsewhere] = 0.0
    return out


def _of_part(tokens: Tensor, rows: int, group: Group) -> tuple[Tensor, Tensor]:
    """Which tokens are of other ranks, and the row of each in this rank's part, 0 for those."""
    first = rows * (group.rank() if group is not None else 0)
    elsewhere = (tokens < first) | (tokens >= first + rows)
    return elsewhere, (tokens - first).masked_fill_(elsewhere, 0)


class ParallelHead(ParallelBlock):
    """From this rank's part of the output of the last layer to the loss of each token."""

    def __init__(
        self, model: Model, plan: Plan, groups: Groups, dtype: torch.dtype = torch.float32, seed: int = 0
    ) -> None:
        rows = padded_vocab(model.head_rows, plan.tp)
        super().__init__(model, plan, groups, head_shapes(model, rows), dtype, seed=seed)

    def forward(self, x: Tensor, targets: Tensor) -> Tensor:
        """[s b h] and ids [s b], which tp does not cut, to losses [s b]."""
        x = self.norm("final_norm", x)
        with operator("output_layer"):
            weight = self.weight("embedding" if is_tied(self.model) else "output_layer")
            (logits,) = column_parallel(x, [weight], [self.bias("output_layer")], self.tp)
        with operator("cross_entropy"):
            loss: Tensor = _CrossEntropy.apply(logits, targets, self.tp.group)
            return loss


class _CrossEntropy(Function):
    """Of logits [s b v] whose vocabulary is cut: softmax in place of their fp32 copy, and its gradient over that."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, group: Group) -> Tensor:
        x = logits.detach().to(torch.promote_types(logits.dtype, torch.float32))
        largest = start_all_reduce(x.max(-1)[0], group, dist.ReduceOp.MAX).wait()
        x -= largest.unsqueeze(-1)
        elsewhere, own = _of_part(targets, x.shape[-1], group)
        own = own.flatten()
        found = x.flatten(0, 1).gather(1, own[:, None]).view(targets.shape).masked_fill_(elsewhere, 0.0)
        total = x.exp_().sum(-1)
        for part in (found, total):
            start_all_reduce(part, group).wait()
        x /= total.unsqueeze(-1)
        ctx.dtype = logits.dtype
        ctx.save_for_backward(x, elsewhere, own)
        return total.log_() - found

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x, elsewhere, own = ctx.saved_tensors
        here = (~elsewhere).to(x.dtype).view(-1, 1)
        x.flatten(0, 1).scatter_add_(1, own[:, None], -here)
        x *= gradients[0].unsqueeze(-1)
        return x.to(ctx.dtype), None, None
