"""yunchang's long-context attention (USP): all-to-alls over one axis, a ring over the other."""

from __future__ import annotations

import torch.distributed as dist
from cases import Case
from subject import Subject
from yunchang import LongContextAttention, set_seq_parallel_pg
from yunchang.kernels import AttnType

from layers.attention import local_qkv


def build(case: Case) -> Subject:
    """Attention of one shard."""
    plan = case.degrees
    set_seq_parallel_pg(plan.get("ulysses", 1), plan.get("ring", 1), dist.get_rank(), case.ranks)
    attention = LongContextAttention(ring_impl_type=case.options["ring_impl_type"], attn_type=AttnType.FA)
    q, k, v = (x.detach().transpose(0, 1).contiguous().requires_grad_() for x in local_qkv(case))
    return Subject(attention, lambda: attention(q, k, v, causal=True))
