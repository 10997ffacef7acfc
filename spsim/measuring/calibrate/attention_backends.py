"""The fused attention kernels that torch has on a device."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from spsim.measuring.calibrate.devices import Device
from spsim.work import AttentionKernel

ON_A_GPU: dict[AttentionKernel, Any] = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash_attention_2": SDPBackend.FLASH_ATTENTION,
    "memory_efficient": SDPBackend.EFFICIENT_ATTENTION,
}
"""What torch calls them; on ROCm its flash kernels are those of AOTriton or composable_kernel."""
BACKENDS: dict[AttentionKernel, Any] = {**ON_A_GPU, "torch_cpu": SDPBackend.FLASH_ATTENTION}
TOKENS, HEAD_SIZE = 256, 64
"""Of the attention that each kernel is tried with."""


def attention_kernels(device: Device) -> tuple[AttentionKernel, ...]:
    """Those that serve a causal layer, forward and backward; the one that torch picks by itself first."""
    if device.kind == "cpu":
        return ("torch_cpu",)
    q = device.random(1, 2, TOKENS, HEAD_SIZE, dtype="bf16").requires_grad_()
    found = [name for name, backend in ON_A_GPU.items() if _serves(backend, q)]
    picked: int = torch._fused_sdp_choice(q, q, q, is_causal=True)
    return tuple(sorted(found, key=lambda name: ON_A_GPU[name].value != picked))


def _serves(backend: Any, q: torch.Tensor) -> bool:
    try:
        with sdpa_kernel(backend):
            out = scaled_dot_product_attention(q, q, q, is_causal=True)
        torch.autograd.grad(out.sum(), q)
    except RuntimeError:
        return False
    return True
