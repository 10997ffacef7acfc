"""From a row of the catalogue to calls of torch that do what it says, each on buffers of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch.nn import functional
from torch.nn.attention import sdpa_kernel

from spsim.measuring.calibrate.attention_backends import BACKENDS
from spsim.measuring.calibrate.devices import Call, Cuda, Device
from spsim.measuring.calibrate.records import Measurement
from spsim.measuring.calibrate.shapes import ROTATED, VOCABULARY_SHARE
from spsim.measuring.calibrate.timing import Effort, sample_times, timed
from spsim.pytorch.layers.elementwise import rope
from spsim.pytorch.layers.unfused import softmax

ROTATION = 2
"""Bytes of all buffers over those of the cache: every call finds its operands in memory."""
INSIDE = 0.5
"""The same of buffers that stay in the last-level cache, and not in those before it."""
MAX_SETS = 512
DROPOUT = 0.1
MASKED_HEADS = 8
"""That share one mask."""
SMALL = 8
"""Side of the tensors of a kernel that does nothing but start."""
GRAPH_KERNELS = 100

Builder = Callable[[Device, Measurement], Call]


def measure_kernel(device: Device, row: Measurement, effort: Effort) -> Measurement:
    """Time a GEMM, attention or memory-bound row."""
    # The setting outlives the call, but every GEMM sets it.
    torch.set_float32_matmul_precision("high" if row.dtype == "tf32" else "highest")
    build = {"gemm": _gemm, "attention": _attention, "memory_bound": _memory_bound}[row.kind]
    # One kernel for attention: where it cannot serve, the row is skipped and says so.
    with sdpa_kernel(BACKENDS[row.kernel or "flash_attention_2"]):
        calls = [_keeping(build(device, row)) for _ in range(_sets(device, row))]
        return timed(row, sample_times(calls, device.kernel_samples, effort), device.clock)


def _keeping(call: Call) -> Call:
    """The call, whose result stays until the next time: as in a layer, results do not all take the same memory."""
    kept: list[object] = []

    def run() -> None:
        kept[:] = [call()]

    return run


def _sets(device: Device, row: Measurement) -> int:
    """How many sets of buffers: enough to exceed the cache.

    Memory-bound operators whose tensors fit this rank's share of the cache are measured there, as in a layer, where
    the kernel before has just written what they read, and as there not always on the same few bytes.
    """
    moved = row.bytes_moved or 1
    if row.kind == "memory_bound" and moved <= device.cache_share:
        return max(1, min(MAX_SETS, int(INSIDE * device.cache_share) // moved))
    return max(2, min(MAX_SETS, -(-ROTATION * device.cache_bytes // moved)))


def _sizes(*sizes: int | None) -> tuple[int, ...]:
    return tuple(size or 1 for size in sizes)


def _gemm(device: Device, row: Measurement) -> Call:
    m, n, k, batch = _sizes(row.m, row.n, row.k, row.batch)
    if row.dtype == "fp8":
        return _fp8_gemm(device, row)
    random = partial(device.random, dtype=row.dtype)
    if batch > 1:
        return partial(torch.bmm, *_batch_operands(device, row))
    if row.name == "forward":
        return partial(functional.linear, random(m, k), random(n, k))
    if row.name == "dgrad":
        return partial(torch.mm, random(m, k), random(k, n))
    x, gradient = random(k, m), random(k, n)
    if row.accumulated is None:
        return partial(torch.mm, gradient.t(), x)
    return _accumulate(device, gradient, x, device.random(n, m))


def _batch_operands(device: Device, row: Measurement) -> tuple[torch.Tensor, torch.Tensor]:
    """Q and transposed K, probabilities and V, or the gradient of the scores and Q, laid out as a layer has them."""
    m, n, k, batch = _sizes(row.m, row.n, row.k, row.batch)
    random = partial(device.random, dtype=row.dtype)
    if row.name == "dgrad":
        return random(batch, k, m).transpose(1, 2), random(batch, k, n)
    if n == m and k < m:
        return random(batch, m, k), random(batch, n, k).transpose(1, 2)
    return random(batch, m, k), random(batch, k, n)


def _accumulate(device: Device, gradient: torch.Tensor, x: torch.Tensor, main: torch.Tensor) -> Call:
    """The weight gradient added to an fp32 main gradient: by the product itself where torch has that."""
    if x.dtype == torch.float32:
        return lambda: main.addmm_(gradient.t(), x)
    try:
        torch.addmm(main, gradient.t(), x, out_dtype=torch.float32, out=main)
    except (TypeError, RuntimeError):
        return lambda: main.add_(torch.mm(gradient.t(), x))
    return lambda: torch.addmm(main, gradient.t(), x, out_dtype=torch.float32, out=main)


def _fp8_gemm(device: Device, row: Measurement) -> Call:
    """Both operands with the contracted dimension innermost, as the hardware wants them; the result in bf16.

    The forward product alone sums with less precision, as Transformer Engine and torchao have it by default.
    """
    m, n, k = _sizes(row.m, row.n, row.k)
    a, b = device.random(m, k).to(device.type_of("fp8")), device.random(n, k).to(device.type_of("fp8"))
    one = torch.ones((), device=device.torch_device)
    product = partial(
        torch._scaled_mm, a, b.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16,
        use_fast_accum=row.name == "forward",
    )  # fmt: skip
    if row.accumulated is None:
        return product
    main = device.random(m, n)
    return lambda: main.add_(product())


def _attention(device: Device, row: Measurement) -> Call:
    batch, tokens, heads, kv_heads, head_dim = _sizes(row.batch, row.queries, row.heads, row.kv_heads, row.head_dim)
    q, k, v = (
        device.random(batch, tokens, count, head_dim, dtype=row.dtype).transpose(1, 2).requires_grad_()
        for count in (heads, kv_heads, kv_heads)
    )
    grouped: dict[str, Any] = {"enable_gqa": True} if kv_heads < heads else {}
    forward = partial(functional.scaled_dot_product_attention, q, k, v, is_causal=bool(row.causal), **grouped)
    return forward if row.name == "forward" else _backward(device, forward(), (q, k, v))


def _backward(device: Device, out: torch.Tensor, inputs: Sequence[torch.Tensor]) -> Call:
    """The gradient has the layout of what it belongs to, as in a layer."""
    gradient = torch.empty_like(out).copy_(device.random(*out.shape))
    return partial(torch.autograd.grad, out, inputs, gradient, retain_graph=True)


def _memory_bound(device: Device, row: Measurement) -> Call:
    operator, _, direction = row.name.rpartition("_")
    if direction not in ("forward", "backward"):
        return _SINGLE_PASS[row.name](device, row)
    forward, inputs = _OPERATORS[operator](device, row)
    return forward if direction == "forward" else _backward(device, forward(), inputs)


Prepared = tuple[Callable[[], torch.Tensor], tuple[torch.Tensor, ...]]
"""The forward pass, and what has a gradient."""


def _parameter(device: Device, row: Measurement, *shape: int) -> torch.Tensor:
    return device.random(*shape, dtype=row.dtype).requires_grad_()


def _input(device: Device, row: Measurement, halves: int = 1) -> torch.Tensor:
    rows, width = _sizes(row.m, row.n)
    return _parameter(device, row, rows, halves * width)


def _layer_norm(device: Device, row: Measurement) -> Prepared:
    x, weight, bias = _input(device, row), *(_parameter(device, row, row.n or 1) for _ in range(2))
    return partial(functional.layer_norm, x, weight.shape, weight, bias), (x, weight, bias)


def _rms_norm(device: Device, row: Measurement) -> Prepared:
    x, weight = _input(device, row), _parameter(device, row, row.n or 1)
    return partial(functional.rms_norm, x, weight.shape, weight, 1e-5), (x, weight)


def _softmax(device: Device, row: Measurement) -> Prepared:
    x = _input(device, row)
    return partial(functional.softmax, x, -1), (x,)


def _masked_softmax(device: Device, row: Measurement) -> Prepared:
    x, rows = _input(device, row), (row.m or MASKED_HEADS) // MASKED_HEADS
    scores, mask = x.view(MASKED_HEADS, rows, -1), device.random(rows, row.n or 1, dtype=row.dtype)
    return partial(softmax, scores, 0.125, mask), (x,)


def _dropout(device: Device, row: Measurement) -> Prepared:
    x = _input(device, row)
    return lambda: torch.native_dropout(x, DROPOUT, True)[0], (x,)


def _gelu(device: Device, row: Measurement) -> Prepared:
    x = _input(device, row)
    return partial(functional.gelu, x), (x,)


def _bias_gelu(device: Device, row: Measurement) -> Prepared:
    x, bias = _input(device, row), _parameter(device, row, row.n or 1)
    return lambda: functional.gelu(x + bias), (x, bias)


def _swiglu(device: Device, row: Measurement) -> Prepared:
    x = _input(device, row, halves=2)

    def forward() -> torch.Tensor:
        gate, up = x.chunk(2, dim=-1)
        return functional.silu(gate) * up

    return forward, (x,)


def _bias_dropout_add(device: Device, row: Measurement) -> Prepared:
    x, residual, bias = _input(device, row), _input(device, row).detach(), _parameter(device, row, row.n or 1)
    return lambda: residual + torch.native_dropout(x + bias, DROPOUT, True)[0], (x, bias)


def _rope(device: Device, row: Measurement) -> Prepared:
    x = _input(device, row)
    heads, table = x.view(row.m or 1, 1, -1, ROTATED), device.random(2, row.m or 1, ROTATED, dtype=row.dtype)
    return partial(rope, heads, table), (x,)


def _embedding(device: Device, row: Measurement) -> Prepared:
    rows, width = _sizes(row.m, row.n)
    table = _parameter(device, row, VOCABULARY_SHARE * rows, width)
    tokens = torch.randint(VOCABULARY_SHARE * rows, (rows,), device=device.torch_device)
    return partial(functional.embedding, tokens, table), (table,)


def _cross_entropy(device: Device, row: Measurement) -> Prepared:
    logits = _input(device, row)
    target = torch.randint(row.n or 1, (row.m or 1,), device=device.torch_device)
    return partial(functional.cross_entropy, logits, target), (logits,)


_OPERATORS: dict[str, Callable[[Device, Measurement], Prepared]] = {
    "layer_norm": _layer_norm, "rms_norm": _rms_norm, "softmax": _softmax,
    "masked_softmax": _masked_softmax, "dropout": _dropout, "gelu": _gelu,
    "bias_gelu": _bias_gelu,
    "swiglu": _swiglu, "bias_dropout_add": _bias_dropout_add, "rope": _rope, "embedding": _embedding,
    "cross_entropy": _cross_entropy,
}  # fmt: skip


def _add(device: Device, row: Measurement) -> Call:
    return partial(torch.add, _input(device, row).detach(), _input(device, row).detach())


def _bias_add(device: Device, row: Measurement) -> Call:
    x, residual = _input(device, row).detach(), _input(device, row).detach()
    bias = device.random(row.n or 1, dtype=row.dtype)
    return lambda: residual + (x + bias)


def _bias_gradient(device: Device, row: Measurement) -> Call:
    return partial(torch.sum, _input(device, row).detach(), 0)


def _copy(device: Device, row: Measurement) -> Call:
    target = _input(device, row).detach()
    return partial(target.copy_, _input(device, row).detach())


def _adam(device: Device, row: Measurement) -> Call:
    """Fused where torch has it for the device, else by lists of tensors (foreach)."""
    parameter = torch.nn.Parameter(_input(device, row).detach())
    parameter.grad = _input(device, row).detach()
    try:
        optimizer = torch.optim.Adam([parameter], fused=True)
    except RuntimeError:
        optimizer = torch.optim.Adam([parameter], foreach=True)
    return optimizer.step


_SINGLE_PASS: dict[str, Builder] = {
    "bias_add": _bias_add, "bias_gradient": _bias_gradient, "add": _add, "copy": _copy, "adam": _adam,
}  # fmt: skip


def measure_launch(device: Device, row: Measurement, effort: Effort) -> Measurement:
    """Time the start of a small kernel: in a busy stream, from the host, or in a CUDA graph."""
    way, _, operator = row.name.partition("_")
    call = _small_call(device, operator)
    if not isinstance(device, Cuda) or way == "stream":
        return timed(row, sample_times([call], device.kernel_samples, effort), device.clock)
    if way == "host":
        return timed(row, sample_times([call], device.host_samples, effort), "wall")
    graph = device.graph(call, GRAPH_KERNELS)
    samples = sample_times([graph], device.kernel_samples, effort)
    return timed(row, [sample / GRAPH_KERNELS for sample in samples], device.clock)


def _small_call(device: Device, operator: str) -> Call:
    x, weight = device.random(SMALL, SMALL), device.random(SMALL, SMALL)
    return {
        "add": partial(torch.add, x, weight),
        "linear": partial(functional.linear, x, weight),
        "layer_norm": partial(functional.layer_norm, x, (SMALL,), weight[0], weight[1]),
        "softmax": partial(functional.softmax, x, -1),
    }[operator]
