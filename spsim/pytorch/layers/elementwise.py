"""Norms, activations, rotary positions, and bias-dropout-residual."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function
from torch.nn import functional

from spsim.inputs.model import Activation

EPSILON = 1e-5


class _RmsNorm(Function):
    """Keeps its input and the reciprocal deviation, as the fused kernels of CUDA do; torch's own is a
    composition of kernels on CPU, which keeps more.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        exact = x.to(torch.promote_types(x.dtype, torch.float32))
        rstd = torch.rsqrt(exact.square().mean(-1, keepdim=True) + EPSILON)
        ctx.save_for_backward(x, weight, rstd)
        return (exact * rstd).to(x.dtype) * weight

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x, weight, rstd = ctx.saved_tensors
        g = gradients[0].to(rstd.dtype)
        normed = x * rstd
        of_weight = (g * normed).flatten(0, -2).sum(0).to(weight.dtype)
        g = g * weight
        of_input = rstd * (g - normed * (g * normed).mean(-1, keepdim=True))
        return of_input.to(x.dtype), of_weight


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """x over the root of its mean square along the last dimension, scaled."""
    out: Tensor = _RmsNorm.apply(x, weight)
    return out


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Over the last dimension."""
    return functional.layer_norm(x, weight.shape, weight, bias, EPSILON)


class _Fused(Function):
    """A fused kernel: keeps its inputs and computes what its gradient needs of them again."""

    @staticmethod
    def forward(ctx: Any, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        ctx.function = function
        ctx.save_for_backward(*inputs)
        return function(*inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        with torch.enable_grad():
            inputs = [x.detach().requires_grad_() for x in ctx.saved_tensors]
            return None, *torch.autograd.grad(ctx.function(*inputs), inputs, gradients[0])


def _gated(function: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    def run(x: Tensor, bias: Tensor | None = None) -> Tensor:
        gate, up = (x if bias is None else x + bias).unbind(-2)
        product: Tensor = function(gate) * up
        return product

    return run


_GATED = {"swiglu": _gated(functional.silu), "geglu": _gated(functional.gelu)}


def activation(name: Activation, x: Tensor, bias: Tensor | None) -> Tensor:
    """The activation of the MLP with the bias of fc1: [s b f], or [s b g f] -> [s b f] where it is gated."""
    if name in _GATED:
        fused: Tensor = _Fused.apply(_GATED[name], *((x,) if bias is None else (x, bias)))
        return fused
    x = x if bias is None else x + bias
    return functional.gelu(x) if name == "gelu" else torch.square(functional.relu(x))


def rotation(positions: Tensor, head_dim: int, dtype: torch.dtype) -> Tensor:
    """Cosines and sines [2 s d] of global positions (Su et al. 2021, arXiv:2104.09864)."""
    inverse = 10000.0 ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angles = torch.outer(positions.double(), inverse.to(positions.device)).repeat(1, 2)
    return torch.stack((angles.cos(), angles.sin())).to(dtype)


def rope(x: Tensor, table: Tensor) -> Tensor:
    """Rotate each head of x [s b a d] by the angles of its position; keeps nothing but the table."""
    cos, sin = table[:, :, None, None, :].unbind()
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


def dropout(x: Tensor, p: float) -> Tensor:
    """Dropout with a mask of one byte an element (`F.dropout` on CPU keeps scaled noise of x's type)."""
    return torch.native_dropout(x, p, train=True)[0] if p else x


def bias_dropout_residual(x: Tensor, bias: Tensor | None, residual: Tensor, p: float) -> Tensor:
    """The end of attention and of the MLP."""
    return residual + dropout(x if bias is None else x + bias, p)
