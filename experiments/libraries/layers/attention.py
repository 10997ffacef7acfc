"""What attention cut along the sequence is given: q, k and v of one rank, whose gradients are asked for."""

from __future__ import annotations

import torch
from cases import Case
from torch import Tensor


def local_qkv(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """Leaves [s/ranks b heads d] in bf16, with as many heads for k and v as the model has."""
    length, batch, hidden = case.shape
    heads, width = case.model["heads"], case.model.get("head_dim", hidden // case.model["heads"])
    kv_heads = case.model.get("kv_heads", heads)
    shapes = [(length // case.ranks, batch, count, width) for count in (heads, kv_heads, kv_heads)]
    q, k, v = (torch.randn(shape, dtype=torch.bfloat16, requires_grad=True) for shape in shapes)
    return q, k, v
