"""Collectives on dimension 0, and those that have a gradient.

Every one is a single message of the group; a group of None is one rank and sends nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import Function

Group = dist.ProcessGroup | None
P = ParamSpec("P")
T = TypeVar("T")


class HostTime:
    """Seconds of this thread's CPU clock inside collectives: to start them and to wait for them."""

    seconds = 0.0


def _on_the_clock(call: Callable[P, T]) -> Callable[P, T]:
    """The same call, its CPU time counted."""

    @wraps(call)
    def counted(*args: P.args, **options: P.kwargs) -> T:
        began = time.thread_time()
        try:
            return call(*args, **options)
        finally:
            HostTime.seconds += time.thread_time() - began

    return counted


# torch 2.13 renamed two collectives and warns of the former names.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@dataclass
class Pending:
    """A tensor on its way."""

    tensor: Tensor
    works: list[Any] = field(default_factory=list)

    @_on_the_clock
    def wait(self) -> Tensor:
        """The tensor, once it has arrived."""
        while self.works:
            self.works.pop().wait()
        return self.tensor


@_on_the_clock
def start_all_reduce(x: Tensor, group: Group, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Pending:
    """The sum over all ranks, or what else `op` says, in place."""
    return Pending(x, [dist.all_reduce(x, op, group=group, async_op=True)] if group else [])


@_on_the_clock
def start_all_gather(x: Tensor, group: Group) -> Pending:
    """The parts of all ranks, in their order."""
    if group is None:
        return Pending(x)
    whole = x.new_empty(x.shape[0] * group.size(), *x.shape[1:])
    return Pending(whole, [_all_gather(whole, x.contiguous(), group=group, async_op=True)])


@_on_the_clock
def start_reduce_scatter(x: Tensor, group: Group) -> Pending:
    """This rank's part of the sum over all ranks."""
    if group is None:
        return Pending(x)
    part = x.new_empty(x.shape[0] // group.size(), *x.shape[1:])
    return Pending(part, [_reduce_scatter(part, x.contiguous(), group=group, async_op=True)])


@_on_the_clock
def start_exchange(x: Tensor, group: dist.ProcessGroup, sends: int = 1) -> Pending:
    """Send to the next rank of a ring and receive from the previous one, in one batch of so many messages."""
    ranks = dist.get_process_group_ranks(group)
    here = dist.get_rank(group)
    received = torch.empty_like(x)
    ahead, behind = ranks[(here + 1) % len(ranks)], ranks[here - 1]
    messages = [
        message
        for own, other in zip(x.chunk(sends), received.chunk(sends), strict=True)
        for message in (dist.P2POp(dist.isend, own, ahead, group), dist.P2POp(dist.irecv, other, behind, group))
    ]
    return Pending(received, list(dist.batch_isend_irecv(messages)))


@_on_the_clock
def all_to_all(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Part i goes to rank i, and part i of the result is from rank i."""
    result = torch.empty_like(x)
    dist.all_to_all_single(result, x, group=group)
    return result


class _Reduce(Function):
    """The end of a row-parallel linear: partial sums become whole (tp) or a sequence shard (with SP)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, scatter: bool) -> Tensor:
        ctx.gathered_backward = group if scatter else None
        if scatter:
            return start_reduce_scatter(x, group).wait()
        ctx.mark_dirty(x)
        return start_all_reduce(x, group).wait()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return start_all_gather(gradients[0], ctx.gathered_backward).wait(), None, None


def reduce(x: Tensor, group: Group, *, scatter: bool) -> Tensor:
    """All-reduce, whose gradient needs nothing, or reduce-scatter, whose gradient is gathered."""
    out: Tensor = _Reduce.apply(x, group, scatter)
    return out


class _Scatter(Function):
    """From a whole sequence to the part of a rank: a view, whose gradient is gathered."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.chunk(group.size())[group.rank()]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return start_all_gather(gradients[0], ctx.group).wait(), None


def scatter(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """This rank's part of [s ...], which all ranks have."""
    out: Tensor = _Scatter.apply(x, group)
    return out


def _to_heads(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[s/P b a d] -> [s b a/P d]."""
    s, b, a, d = x.shape
    parts = x.view(s, b, group.size(), a // group.size(), d).permute(2, 0, 1, 3, 4).contiguous()
    return all_to_all(parts, group).flatten(0, 1)


def _to_sequence(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[s b a/P d] -> [s/P b a d]."""
    parts = all_to_all(x.contiguous().unflatten(0, (group.size(), -1)), group)
    return parts.permute(1, 2, 0, 3, 4).contiguous().flatten(2, 3)


class _AllToAll(Function):
    """One all-to-all a tensor, in order, forward and backward alike (as Transformer Engine's)."""

    @staticmethod
    def forward(ctx: Any, group: dist.ProcessGroup, to_heads: bool, *tensors: Tensor) -> Any:
        ctx.group, ctx.to_heads = group, to_heads
        return tuple(_moves(to_heads)(x, group) for x in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return None, None, *(_moves(not ctx.to_heads)(g, ctx.group) for g in gradients)


def _moves(to_heads: bool) -> Callable[[Tensor, dist.ProcessGroup], Tensor]:
    return _to_heads if to_heads else _to_sequence


def split_heads(group: Group, *tensors: Tensor) -> tuple[Tensor, ...]:
    """From sequence shards [s/P b a d] to shards of heads [s b a/P d]; heads fewer than ranks are repeated."""
    if group is None:
        return tensors
    out: tuple[Tensor, ...] = _AllToAll.apply(group, True, *(_repeated(x, group.size()) for x in tensors))
    return out


def _repeated(x: Tensor, ranks: int) -> Tensor:
    copies = max(1, ranks // x.shape[2])
    return x.unsqueeze(3).expand(-1, -1, -1, copies, -1).flatten(2, 3) if copies > 1 else x


def split_sequence(group: Group, x: Tensor) -> Tensor:
    """From shards of heads [s b a/P d] to sequence shards [s/P b a d]."""
    if group is None:
        return x
    out: tuple[Tensor] = _AllToAll.apply(group, False, x)
    return out[0]
