"""ring-flash-attn: ring, zigzag ring, and the form of Llama 3, which gathers keys and values."""

from __future__ import annotations

import torch
import torch.distributed as dist
from cases import Case
from ring_flash_attn import (
    llama3_flash_attn_prepare_cu_seqlens,
    llama3_flash_attn_varlen_func,
    ring_flash_attn_func,
    zigzag_ring_flash_attn_func,
)
from subject import Subject
from torch import Tensor, nn

from layers.attention import local_qkv


def build(case: Case) -> Subject:
    """Attention of one shard."""
    if case.options["form"] == "llama3":
        return _gathered(case)
    attend = {"ring": ring_flash_attn_func, "zigzag": zigzag_ring_flash_attn_func}[case.options["form"]]
    q, k, v = (x.detach().transpose(0, 1).contiguous().requires_grad_() for x in local_qkv(case))
    return Subject(nn.Module(), lambda: attend(q, k, v, causal=True))


def _gathered(case: Case) -> Subject:
    """Sequences of a batch packed one after another, and cut into equal parts."""
    length, batch, _ = case.shape
    ends = torch.arange(0, (batch + 1) * length, length, dtype=torch.int32)
    *lengths, keys = llama3_flash_attn_prepare_cu_seqlens(ends, True, dist.get_rank(), case.ranks)
    q, k, v = (x.detach().flatten(0, 1).requires_grad_() for x in local_qkv(case))
    stride = case.options["heads_k_stride"]

    def attend() -> Tensor:
        return llama3_flash_attn_varlen_func(q, k, v, *lengths, stride, keys, causal=True)

    return Subject(nn.Module(), attend)
