"""Core attention with its scores in memory: QK^T, scaled and masked softmax, AV.

q is [s b a d]; k and v are [j b kv d], or this rank's part of them on a ring, gathered here and again in backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function

from spsim.pytorch.layers.ring import Ring


def _queries(q: Tensor, kv_heads: int) -> Tensor:
    """[s b a d] -> [b kv group*s d]: the queries that share keys; a view where each head has its own."""
    s, b, a, d = q.shape
    return q.view(s, b, kv_heads, a // kv_heads, d).permute(1, 2, 3, 0, 4).reshape(b, kv_heads, -1, d)


def _sequence_first(x: Tensor, heads: int) -> Tensor:
    """[b kv group*s d] -> [s b a d]."""
    b, kv_heads, _, d = x.shape
    return x.view(b, kv_heads, heads // kv_heads, -1, d).permute(3, 0, 1, 2, 4).flatten(2, 3)


def _keys(k: Tensor) -> Tensor:
    """[j b kv d] -> [b kv j d]."""
    return k.permute(1, 2, 0, 3)


def _scores(q: Tensor, k: Tensor) -> Tensor:
    """[b a s j]."""
    b, a, s = q.shape[1], q.shape[2], q.shape[0]
    return (_queries(q, k.shape[2]) @ _keys(k).transpose(-1, -2)).view(b, a, s, -1)


def _grouped(weights: Tensor, kv_heads: int) -> Tensor:
    """[b a s j] -> [b kv group*s j]."""
    b, _, _, j = weights.shape
    return weights.reshape(b, kv_heads, -1, j)


def _context(weights: Tensor, v: Tensor) -> Tensor:
    """[s b a d]."""
    return _sequence_first(_grouped(weights, v.shape[2]) @ _keys(v), weights.shape[1])


class _GatheredScores(Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, ring: Ring) -> Tensor:
        ctx.ring = ring
        ctx.save_for_backward(q, k)
        return _scores(q, ring.gather(k))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        q, k = ctx.saved_tensors
        keys = ctx.ring.gather(k)
        g = _grouped(gradients[0], k.shape[2])
        of_q = _sequence_first(g @ _keys(keys), q.shape[2])
        of_keys = (g.transpose(-1, -2) @ _queries(q, k.shape[2])).permute(2, 0, 1, 3)
        return of_q, ctx.ring.scatter(of_keys), None


class _GatheredContext(Function):
    @staticmethod
    def forward(ctx: Any, weights: Tensor, v: Tensor, ring: Ring) -> Tensor:
        ctx.ring = ring
        ctx.save_for_backward(weights, v)
        return _context(weights, ring.gather(v))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        weights, v = ctx.saved_tensors
        values = ctx.ring.gather(v)
        g = _queries(gradients[0], v.shape[2])
        of_weights = (g @ _keys(values).transpose(-1, -2)).view(weights.shape)
        of_values = (_grouped(weights, v.shape[2]).transpose(-1, -2) @ g).permute(2, 0, 1, 3)
        return of_weights, ctx.ring.scatter(of_values), None


def scores(q: Tensor, k: Tensor, ring: Ring | None) -> Tensor:
    """QK^T [b a s j], j the whole sequence."""
    out: Tensor = _scores(q, k) if ring is None else _GatheredScores.apply(q, k, ring)
    return out


def softmax(x: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    """Over the keys, after scale and additive mask [s j]; keeps its output only."""
    x = x * scale
    return torch.softmax(x if mask is None else x + mask, -1)


def context(weights: Tensor, v: Tensor, ring: Ring | None) -> Tensor:
    """AV [s b a d]."""
    out: Tensor = _context(weights, v) if ring is None else _GatheredContext.apply(weights, v, ring)
    return out


def causal_mask(positions: Tensor, keys: int, dtype: torch.dtype) -> Tensor:
    """0 where a key is not after its query, else minus infinity; [s j], for queries at some positions."""
    later = torch.arange(keys, device=positions.device) > positions[:, None]
    return torch.zeros(later.shape, dtype=dtype, device=positions.device).masked_fill_(later, -torch.inf)
