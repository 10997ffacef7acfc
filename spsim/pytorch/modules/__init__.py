"""A user's own `torch.nn.Module` as a program: traced on fake tensors, simulated on one GPU or split over many."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from spsim.errors import InputError

if TYPE_CHECKING:
    from spsim.pytorch.modules.traced import TracedModule

__all__ = ["trace_module"]


def trace_module(
    module: Any, example_inputs: Any, *, device: Literal["cuda", "cpu"] = "cuda", forward_only: bool = False
) -> TracedModule:
    """Trace a `torch.nn.Module`: the operators of one forward and backward pass, without a GPU and without memory.
    `forward_only` there is no backward pass, as under `torch.no_grad()`: inference, of which nothing is kept.

    `example_inputs` is a tensor, a tuple of positional arguments or a dictionary of keyword arguments; only
    shapes and dtypes matter, and which of them require a gradient, so that tensors and modules on the `meta`
    device do. Inside a network an input requires one: `torch.empty(..., requires_grad=True)`.
    `device` says whose kernels are traced: `cuda` needs no GPU. The module is traced in the mode that it is in:
    after `eval()` there is no dropout, and BatchNorm does not update its statistics.

    Raises `InputError` without torch, for a module whose control flow or shapes depend on values, for operands of
    products that differ in dtype, and for a module that fails on these inputs.
    """
    try:
        import torch
    except ImportError:
        raise InputError('trace_module needs torch, which is not installed; install "spsim[calibrate]"') from None
    from spsim.pytorch.modules.recording import record
    from spsim.pytorch.modules.traced import TracedModule

    if not isinstance(module, torch.nn.Module):
        raise InputError(f"trace_module: {type(module).__name__} is not a torch.nn.Module; wrap it in one")
    if device not in ("cuda", "cpu"):
        raise InputError(f"trace_module: device {device!r} is not known; use 'cuda' or 'cpu'")
    if not isinstance(example_inputs, torch.Tensor | Mapping | tuple | list):
        got = type(example_inputs).__name__
        raise InputError(f"trace_module: example_inputs must be a tensor, or a tuple or dict of them; got {got}")
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = {}
    if isinstance(example_inputs, Mapping):
        kwargs = example_inputs
    else:
        args = tuple(example_inputs) if isinstance(example_inputs, tuple | list) else (example_inputs,)
    return TracedModule(record(module, args, kwargs, cuda=device == "cuda", forward_only=forward_only))
