"""PyTorch's `context_parallel`, whose kernels of attention are CUDA's: here the CPU's under their names."""

from __future__ import annotations

import torch
from cases import Case
from subject import Subject
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.experimental import context_parallel
from torch.distributed.tensor.experimental._attention import set_rotate_method

from layers.attention import local_qkv

aten = torch.ops.aten


@torch.library.impl("aten::_scaled_dot_product_flash_attention", "CPU")
def _forward(q, k, v, dropout_p=0.0, is_causal=False, return_debug_mask=False, *, scale=None):
    out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, dropout_p, is_causal, scale=scale)
    number = torch.tensor(0)
    return out, lse, None, None, q.shape[2], k.shape[2], number, number, number


@torch.library.impl("aten::_scaled_dot_product_flash_attention_backward", "CPU")
def _backward(
    dout, q, k, v, out, lse, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, seed, offset, *, scale=None
):
    backward = aten._scaled_dot_product_flash_attention_for_cpu_backward
    return backward(dout, q, k, v, out, lse, dropout_p, is_causal, scale=scale)


def build(case: Case) -> Subject:
    """Attention of one shard inside of `context_parallel`, which patches the dispatch of DTensor."""
    mesh = init_device_mesh("cpu", (case.ranks,))
    set_rotate_method(case.options["rotate_method"])
    length = case.shape[0]
    sharded = context_parallel(mesh, buffers=[torch.arange(length)], buffer_seq_dims=[0])
    shards = [x.detach().permute(1, 2, 0, 3).contiguous().requires_grad_() for x in local_qkv(case)]

    def attend() -> Tensor:
        q, k, v = (DTensor.from_local(shard, mesh, [Shard(2)]) for shard in shards)
        out, *_ = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True)
        return out.to_local()

    return Subject(nn.Module(), attend, within=sharded)
