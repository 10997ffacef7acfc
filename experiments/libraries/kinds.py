"""What a kept tensor is: an activation, or something that `README.md` names apart."""

from __future__ import annotations

import math

from cases import Case
from recorder import Kept

TORCH_RMS_NORM = ("RMSNorm", "FSDPRMSNorm")
"""torch's, which has a kernel on CUDA and is made of several on the CPU."""

BROADCAST = {"SelfAttention": slice(1, 3), "LlamaAttention": slice(0, 2)}
"""Class of attention -> which dimensions of its rotary tables are 1: b and a, of [s b a d] and of [b a s d]."""


def kind_of(kept: Kept, case: Case) -> str:
    """Word for the column `collective` of a row of what is kept."""
    if math.prod(kept.shape) == 1:
        return "scalar"
    if kept.dtype == "bool" or kept.dtype.startswith("int"):
        return "mask" if kept.dtype == "bool" else "indices"
    if "norm" in kept.module and kept.shape[-1] == 1:
        return "norm statistics"
    if kept.layer in TORCH_RMS_NORM:
        return "norm in fp32 (CPU)"
    if kept.layer in BROADCAST and kept.shape[BROADCAST[kept.layer]] == (1, 1):
        return "rotary tables"
    if kept.dtype == "fp32" and "norm" not in kept.module:
        return _in_fp32(kept, case)
    return "activations"


def _in_fp32(kept: Kept, case: Case) -> str:
    if kept.layer == "Softmax":
        return "softmax in fp32 (CPU)"
    in_attention = case.part == "attention" or "att" in (kept.module + kept.layer).lower()
    return "log-sum-exp" if in_attention and len(kept.shape) <= 3 else "loss"
