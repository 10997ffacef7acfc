"""A layer whose attention looks back at a window, with or without sinks, on real ranks: heads of all positions under tp
and Ulysses, and on a ring keys and values of all ranks, gathered before attention and again for its gradient.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function

from spsim.inputs.model import Model
from spsim.inputs.plan import Plan
from spsim.pytorch.layers import Groups, ParallelLayer, operator
from spsim.pytorch.layers.collectives import split_heads, start_all_gather, start_reduce_scatter
from spsim.pytorch.layers.sequence import INSIDE_ATTENTION
from spsim.pytorch.layers.weights import WeightShape, weight_shapes


class WindowLayer(ParallelLayer):
    """The layer of this rank."""

    def __init__(self, model: Model, plan: Plan, groups: Groups, dtype: torch.dtype = torch.float32) -> None:
        sinks = {"sinks": WeightShape((model.heads,), 0, 1.0)} if model.attention_sinks else {}
        super(ParallelLayer, self).__init__(model, plan, groups, weight_shapes(model) | sinks, dtype)

    def local_weight(self, name: str, whole: Tensor) -> Tensor:
        """Of sinks those of the heads that are here in attention."""
        part = super().local_weight(name, whole)
        ulysses = self.groups.degree("ulysses") if name == "sinks" else 1
        return part.chunk(ulysses)[self.groups.coordinate("ulysses")] if ulysses > 1 else part

    def _flash(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with operator("attention"):
            q, k, v = split_heads(self.groups.group("ulysses"), q, k, v)
            order = self.table(f"order_{len(q)}", lambda: self.shards.order(len(q) * self.groups.degree("ring")))
            here = self.table(f"here_{len(q)}", lambda: self.shards.positions(len(q), INSIDE_ATTENTION))
            seen = _seen(here, order, self.model.sliding_window)
            return _Attention.apply(q, k, v, self._parameters.get("sinks"), seen, self.groups.group("ring"))


def _seen(queries: Tensor, keys: Tensor, window: int | None) -> Tensor:
    """Whether a query sees a key, by their positions."""
    back = queries.unsqueeze(1) - keys
    return (back >= 0) & (back < window) if window else back >= 0


def _attended(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, seen: Tensor) -> tuple[Tensor, Tensor]:
    """Attention of [s b a d] to [j b kv d], and the log-sum-exp [b a s], of the sinks too."""
    shared = q.shape[2] // k.shape[2]
    q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k.repeat_interleave(shared, 2), v.repeat_interleave(shared, 2)))
    exact = torch.promote_types(q.dtype, torch.float32)
    scores = (q.to(exact) @ k.to(exact).mT) * q.shape[-1] ** -0.5
    scores = scores.masked_fill(~seen, -torch.inf)
    total = scores.logsumexp(-1)
    if sinks is not None:
        total = torch.logaddexp(total, sinks.to(exact).view(1, -1, 1))
    out = (scores - total.unsqueeze(-1)).exp() @ v.to(exact)
    return out.to(q.dtype).permute(2, 0, 1, 3).contiguous(), total


class _Attention(Function):
    """Keeps what flash attention keeps, of k and v the part of this rank."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, seen: Tensor, group: Any) -> Tensor:
        out, log_sum_exp = _attended(q, *(start_all_gather(x, group).wait() for x in (k, v)), sinks, seen)
        ctx.save_for_backward(q, k, v, out, log_sum_exp, sinks)
        ctx.seen, ctx.group = seen, group
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        q, k, v, _, _, sinks = ctx.saved_tensors
        k, v = (start_all_gather(x, ctx.group).wait() for x in (k, v))
        with torch.enable_grad():
            inputs = [x.detach().requires_grad_() for x in (q, k, v, sinks) if x is not None]
            of_sinks = inputs[3] if sinks is not None else None
            out, _ = _attended(*inputs[:3], of_sinks, ctx.seen)
            of_q, of_k, of_v, *rest = torch.autograd.grad(out, inputs, gradients[0])
        of_k, of_v = (start_reduce_scatter(x, ctx.group).wait() for x in (of_k, of_v))
        return of_q, of_k, of_v, *(rest or [None]), None, None
