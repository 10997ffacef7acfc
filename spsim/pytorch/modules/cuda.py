"""The kernels that torch launches on a CUDA device, where the device changes which operators run.

Fake tensors stand on the CPU, whose kernels differ in four places: attention, dropout, RMSNorm and the
dtype of the statistics of LayerNorm. While `cuda_kernels` is active the first three are replaced.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten
FLASH_LARGEST = 256
"""Head size of the flash kernel at most."""
FLASH_MULTIPLE = 8
"""Head sizes in between are padded."""


@contextmanager
def cuda_kernels() -> Iterator[None]:
    """Replace the composite operators for tensors on the CPU, until the context ends."""
    library = torch.library.Library("aten", "IMPL")
    try:
        for name, function in (
            ("scaled_dot_product_attention", _attention), ("dropout", _dropout), ("rms_norm", _rms_norm)
        ):  # fmt: skip
            library.impl(name, function, "AutogradCPU")
        yield
    finally:
        library._destroy()


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Flash where the arguments allow it, then the memory-efficient kernel, then products and a softmax."""
    size = query.shape[-1]
    rest = -size % FLASH_MULTIPLE
    if _fits_flash(query, value) and attn_mask is None:
        padded = [torch.nn.functional.pad(x, (0, rest)) if rest else x for x in (query, key, value)]
        found = aten._scaled_dot_product_flash_attention(
            *padded, dropout_p, is_causal, scale=size**-0.5 if scale is None else scale
        )
    elif torch.backends.cuda.mem_efficient_sdp_enabled() and query.dim() == 4 and not enable_gqa:
        gradient = any(x.requires_grad for x in (query, key, value))
        bias = _additive(attn_mask, query, key)
        found = aten._scaled_dot_product_efficient_attention(
            query, key, value, bias, gradient, dropout_p, is_causal, scale=scale
        )
    else:
        found = aten._scaled_dot_product_attention_math(
            query, key, value, attn_mask, dropout_p, is_causal, None, scale=scale, enable_gqa=enable_gqa
        )
    out: Tensor = found[0]
    return out if out.shape[-1] == value.shape[-1] else out[..., :size]


def _fits_flash(query: Tensor, value: Tensor) -> bool:
    """Half precision, four dimensions, and one head size up to the largest (torch 2.13, sdp_utils.cpp)."""
    half = query.dtype in (torch.float16, torch.bfloat16)
    fits = query.dim() == 4 and query.shape[-1] == value.shape[-1] <= FLASH_LARGEST
    return bool(torch.backends.cuda.flash_sdp_enabled()) and half and fits


def _additive(mask: Tensor | None, query: Tensor, key: Tensor) -> Tensor | None:
    """The mask as the kernel takes it: numbers to add, of the shape of the scores."""
    if mask is None:
        return None
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(mask.logical_not(), float("-inf"))
    return mask.expand(*query.shape[:-1], key.shape[-2])


def _dropout(x: Tensor, p: float, train: bool) -> Tensor:
    """The fused kernel with a mask of one byte an element."""
    dropped: Tensor = aten.native_dropout(x, p, train)[0] if train and p > 0 else x
    return dropped


def _rms_norm(x: Tensor, shape: list[int], weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    out: Tensor = rms_norm(x, list(shape), weight)[0]
    return out


@torch.library.custom_op("spsim::rms_norm", mutates_args=())
def rms_norm(x: Tensor, shape: list[int], weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """The fused RMSNorm of CUDA: output and fp32 reciprocal deviation of each row."""
    raise NotImplementedError("for fake tensors only")


@rms_norm.register_fake
def _(x: Tensor, shape: list[int], weight: Tensor | None) -> tuple[Tensor, Tensor]:
    rows = [*x.shape[: x.dim() - len(shape)], *[1] * len(shape)]
    return torch.empty_like(x), x.new_empty(rows, dtype=torch.float32)


@torch.library.custom_op("spsim::rms_norm_backward", mutates_args=())
def rms_norm_backward(gradient: Tensor, x: Tensor, rstd: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """Gradients of the input and the weight."""
    raise NotImplementedError("for fake tensors only")


@rms_norm_backward.register_fake
def _(gradient: Tensor, x: Tensor, rstd: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weight) if weight is not None else x.new_empty(0)


def _keep(ctx: Any, inputs: tuple[Tensor, list[int], Tensor | None], output: tuple[Tensor, Tensor]) -> None:
    x, _, weight = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, output[1])


def _differentiate(context: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor, None, Tensor | None]:
    x, weight, rstd = context.saved_tensors
    of_input, of_weight = rms_norm_backward(gradient, x, rstd, weight)
    return of_input, None, of_weight if weight is not None else None


torch.library.register_autograd("spsim::rms_norm", _differentiate, setup_context=_keep)


def with_cuda_statistics(op: str, results: Any) -> Any:
    """LayerNorm keeps fp32 statistics on CUDA whatever the dtype of its input; GroupNorm keeps the input's, as here."""
    if op != "native_layer_norm":
        return results
    output, *statistics = results
    return (output, *(s.new_empty(s.shape, dtype=torch.float32) for s in statistics))
