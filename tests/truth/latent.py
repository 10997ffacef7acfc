"""A layer with multi-head latent attention on real ranks, as Megatron-Core's `MLASelfAttention` runs it: products down
on the tokens of a rank, products up by heads, and the rotated part of k, one for all heads, gathered for them.

What comes out of one product down and is split, two here, is two products: views would keep each other's storage.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function
from torch.nn import functional

from spsim.inputs.model import Model
from spsim.inputs.plan import Plan
from spsim.pytorch.layers import Groups, ParallelLayer, elementwise, operator
from spsim.pytorch.layers.collectives import split_heads, start_all_gather, start_reduce_scatter
from spsim.pytorch.layers.linears import column_parallel
from spsim.pytorch.layers.sequence import BETWEEN_LINEARS
from spsim.pytorch.layers.weights import WeightShape, weight_shapes


def latent_shapes(model: Model) -> dict[str, WeightShape]:
    """Of all weights of a layer."""
    h, a, c, d = model.hidden, model.heads, model.head_dim, model.v_head_dim
    q, kv, r = model.q_lora_rank, model.kv_lora_rank, model.qk_rope_head_dim
    shapes = {name: shape for name, shape in weight_shapes(model).items() if name[0] not in "qkv"}
    if q:
        shapes["q_down_weight"] = WeightShape((q, h), None, h**-0.5)
        shapes["q_norm_weight"] = WeightShape((q,), mean=1.0)
    return shapes | {
        "q_up_weight": WeightShape((a, c, q or h), 0, (q or h) ** -0.5),
        "kv_down_weight": WeightShape((kv, h), None, h**-0.5),
        "k_rope_weight": WeightShape((r, h), None, h**-0.5),
        "kv_norm_weight": WeightShape((kv,), mean=1.0),
        "k_up_weight": WeightShape((a, model.qk_nope_head_dim, kv), 0, kv**-0.5),
        "v_up_weight": WeightShape((a, d, kv), 0, kv**-0.5),
        "projection_weight": WeightShape((h, a, d), 1, (a * d) ** -0.5),
    }


class LatentLayer(ParallelLayer):
    """The layer of this rank."""

    def __init__(self, model: Model, plan: Plan, groups: Groups, dtype: torch.dtype = torch.float32) -> None:
        super(ParallelLayer, self).__init__(model, plan, groups, latent_shapes(model), dtype)

    def _qkv(self, x: Tensor) -> tuple[Tensor, ...]:
        """Rotated."""
        nope, rope = self.model.qk_nope_head_dim, self.model.qk_rope_head_dim
        latent = self._down("q_down", "q_norm", x) if self.model.q_lora_rank else x
        with operator("kv_down"):
            of_k = functional.linear(x, self.weight("k_rope"))
            if self.tp.group is not None:
                of_k = _Whole.apply(of_k, self.tp.group)
        kv_latent = self._down("kv_down", "kv_norm", x)
        with operator("q_up"):
            (q,) = column_parallel(latent, [self.weight("q_up").flatten(0, 1)], [None], self.tp)
            q = q.unflatten(-1, (-1, nope + rope))
        with operator("kv_up"):
            weights = [self.weight(name).flatten(0, 1) for name in ("k_up", "v_up")]
            k, v = column_parallel(kv_latent, weights, [None, None], self.tp)
        with operator("rope"):
            table = self._rotations(q.shape[0], x.dtype)
            q = torch.cat((q[..., :nope], elementwise.rope(q[..., nope:], table)), -1)
            k = k.unflatten(-1, (-1, nope))
            shared = elementwise.rope(of_k.unsqueeze(2), table).expand(-1, -1, k.shape[2], -1)
            return q, torch.cat((k, shared), -1), v.unflatten(-1, (-1, self.model.v_head_dim)) * 1

    def _rope(self, name: str, x: Tensor) -> Tensor:
        return x

    def _down(self, name: str, norm: str, x: Tensor) -> Tensor:
        with operator(name):
            latent = functional.linear(x, self.weight(name))
        return self.norm(norm, latent)

    def _rotations(self, tokens: int, dtype: torch.dtype) -> Tensor:
        positions = self.shards.positions(tokens, BETWEEN_LINEARS)
        width = self.model.qk_rope_head_dim
        return self.table(f"rope_{tokens}_{dtype}", lambda: elementwise.rotation(positions, width, dtype))

    def _flash(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with operator("attention"):
            q, k, v = split_heads(self.groups.group("ulysses"), q, k, v)
            return _Attention.apply(q, k, v)


class _Whole(Function):
    """The sequence of all ranks of tp."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return start_all_gather(x, group).wait()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return start_reduce_scatter(gradients[0], ctx.group).wait(), None


def _attended(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Causal attention of [s b a c] with values [s b a d], and the log-sum-exp [b a s]."""
    q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k, v))
    exact = torch.promote_types(q.dtype, torch.float32)
    scores = (q.to(exact) @ k.to(exact).mT) * q.shape[-1] ** -0.5
    ahead = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    scores = scores.masked_fill(ahead, -torch.inf)
    out = scores.softmax(-1) @ v.to(exact)
    return out.to(q.dtype).permute(2, 0, 1, 3).contiguous(), scores.logsumexp(-1)


class _Attention(Function):
    """Keeps what flash attention keeps, for values narrower than keys."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, log_sum_exp = _attended(q, k, v)
        ctx.save_for_backward(q, k, v, out, log_sum_exp)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        with torch.enable_grad():
            inputs = [x.detach().requires_grad_() for x in ctx.saved_tensors[:3]]
            return torch.autograd.grad(_attended(*inputs)[0], inputs, gradients[0])
