"""What a recorded call costs: its class, its kernels as `Work`, and the bytes that it moves."""

from __future__ import annotations

import math
from collections.abc import Mapping

from spsim.pytorch.modules.tape import Call, Value, values_in
from spsim.work import Direction, FlashAttention, Gemm, KernelClass, KernelName, MemoryBound, Work

PRODUCTS = {"mm": ("self", "mat2"), "addmm": ("mat1", "mat2"), "bmm": ("self", "mat2"), "baddbmm": ("batch1", "batch2")}
"""Matrix products, with the names of their factors."""
CONVOLUTIONS = frozenset({"convolution", "_convolution", "cudnn_convolution", "convolution_overrideable"})
ATTENTION = "_scaled_dot_product_"
NORMS = ("layer_norm", "rms_norm", "group_norm", "batch_norm")
SOFTMAX = frozenset({
    "_softmax", "_safe_softmax", "_log_softmax", "_softmax_backward_data", "_log_softmax_backward_data", "logsumexp"
})  # fmt: skip
DROPOUT = frozenset({"native_dropout", "native_dropout_backward", "bernoulli_"})
LOOKUPS = {"embedding": "weight", "index": "self", "index_select": "self", "gather": "self"}
"""Operators that read of one argument only as much as they write."""
PICKS = frozenset({"nll_loss_forward", "nll_loss_backward"})
"""Operators that read of each row one element."""
MOVES = frozenset({"cat", "clone", "slice_backward", "select_backward"})
"""Operators that move elements about and are no pointwise operators to torch."""
FLOATS = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
"""dtype of a tensor -> data type of a profile."""
ALIGNMENT = 16
"""Bytes that the fast kernels of products read at once."""
OVERWRITES = frozenset({"copy_", "fill_", "zero_", "bernoulli_", "uniform_", "normal_"})
"""Operators in place that do not read what they write."""


KERNELS: Mapping[str, tuple[KernelName, bool]] = {
    "native_layer_norm": ("layer_norm", False),
    "native_layer_norm_backward": ("layer_norm", True),
    "rms_norm": ("rms_norm", False),
    "rms_norm_backward": ("rms_norm", True),
    "_softmax": ("softmax", False),
    "_softmax_backward_data": ("softmax", True),
    "_log_softmax": ("softmax", False),
    "_log_softmax_backward_data": ("softmax", True),
    "native_dropout": ("dropout", False),
    "native_dropout_backward": ("dropout", True),
    "gelu": ("gelu", False),
    "gelu_backward": ("gelu", True),
    "add": ("add", False),
    "copy_": ("copy", False),
    "clone": ("copy", False),
    "embedding": ("embedding", False),
}
"""Operators that a calibration measures by themselves, and whether they are its gradient."""


def operator_class(call: Call) -> KernelClass:
    """The class of coefficients that a call is timed with; a product that sums nothing writes zeros."""
    if (call.op in PRODUCTS and call.flops) or call.op in CONVOLUTIONS or call.op == "convolution_backward":
        return "gemm"
    if call.op.startswith(ATTENTION):
        return "attention"
    if any(norm in call.op for norm in NORMS):
        return "norm"
    if call.op in SOFTMAX:
        return "softmax"
    return "dropout" if call.op in DROPOUT else "elementwise"


def kernel_of(call: Call) -> tuple[KernelName | None, bool]:
    """The kernel that a profile may know the rates of, and whether the call is its gradient."""
    return ("bias_gradient", False) if _sums_rows(call) else KERNELS.get(call.op, (None, False))


def _sums_rows(call: Call) -> bool:
    """Whether it is the gradient of a bias: the sum over all dimensions but the last."""
    if call.op != "sum" or not call.results:
        return False
    given, result = call.arguments["self"].shape, call.results[0].shape
    return len(given) > 1 and bool(result[-1:] == given[-1:]) and math.prod(result) == int(given[-1])


def bytes_moved(call: Call) -> int:
    """Operands and results, each once; what is written in place counts twice unless it is only overwritten. Of
    the tensor that a new one is made like, only the shape is read.
    """
    if not call.launches:
        return 0
    results = sum(value.bytes for value in dict.fromkeys(call.results))
    if call.op.endswith("_like") or call.op.startswith("new_"):
        return results
    read = {name: value for name, value in call.arguments.items() if name not in call.mutated}
    operands = sum(value.bytes for value in dict.fromkeys(values_in(read.values())))
    if call.op in PICKS:  # one element a row is read, or written beside zeros
        return results
    looked_up = call.arguments.get(LOOKUPS.get(call.op, ""))
    if isinstance(looked_up, Value):
        operands += min(0, results - looked_up.bytes)
    mutated = sum(value.bytes for value in dict.fromkeys(call.written))
    written = mutated if not call.results else results
    return operands + written + (0 if call.op in OVERWRITES or not call.mutated else mutated)


def kernels(call: Call) -> tuple[Work, ...]:
    """The kernels of a call: none for a view, two for the gradients of a convolution."""
    if not call.launches:
        return ()
    kind, moved = operator_class(call), bytes_moved(call)
    if kind == "gemm":
        return (_product(call, moved),) if call.op in PRODUCTS else _convolution(call, moved)
    if kind == "attention":
        return (_attention(call, moved),)
    found = MemoryBound(kind, moved, *kernel_of(call), row=_row(call), dtype=_dtype(call), accesses=_accesses(call))
    return (found,)


def _dtype(call: Call) -> str | None:
    """The type that a profile may know the rates of: of the widest floating-point tensor."""
    floats = [value for value in (*call.results, *call.tensors) if value.dtype in FLOATS]
    return FLOATS[max(floats, key=lambda value: value.itemsize).dtype] if floats else None


def _accesses(call: Call) -> int:
    """Elements that an elementwise kernel reads and writes one by one: all, unless every tensor is as large as the
    result and lies like it, so that it is one row of vectors (`aten/src/ATen/native/cuda/CUDALoops.cuh`).
    """
    if not (call.pointwise or call.op in MOVES) or not (call.results or call.written):
        return 0
    out = (call.results or call.written)[0]
    given = [value for value in call.tensors if value.shape]
    if all(_alike(value, out) for value in given) and _dense(out):
        return 0
    return out.elements * (1 + len(given))


def _alike(value: Value, out: Value) -> bool:
    own = [(size, step) for size, step in zip(value.shape, value.stride, strict=True) if size != 1]
    return own == [(size, step) for size, step in zip(out.shape, out.stride, strict=True) if size != 1]


def _dense(value: Value) -> bool:
    """Whether its elements lie side by side in some order of its dimensions."""
    expected = 1
    for step, size in sorted((step, size) for size, step in zip(value.shape, value.stride, strict=True) if size != 1):
        if step != expected:
            return False
        expected *= size
    return True


def _row(call: Call) -> int:
    """Elements that a norm, a softmax or the sum for a bias works on together: the last dimension of its result."""
    shape = call.results[0].shape if call.results else ()
    return shape[-1] if len(shape) else 0


def _product(call: Call, moved: int) -> Gemm:
    operands = [call.arguments[name] for name in PRODUCTS[call.op]]
    left, right = (value.shape for value in operands)
    batch = left[0] if len(left) == 3 else 1
    unaligned = int(any(map(_is_unaligned, (*operands, *call.results))))
    return Gemm(m=left[-2], n=right[-1], k=left[-1], batch=batch, bytes_moved=moved, unaligned=unaligned)


def _is_unaligned(value: Value) -> bool:
    """Whether rows, or columns, of a matrix begin at no multiple of 16 bytes."""
    steps = [step for size, step in zip(value.shape, value.stride, strict=True) if size > 1 and step > 1]
    return any(step * value.itemsize % ALIGNMENT for step in steps)


def _convolution(call: Call, moved: int) -> tuple[Gemm, ...]:
    """As the product that it is: a row per output position, a column per output channel.

    Both gradients have the same dimensions in another order. A transposed convolution is the gradient of the
    input of a plain one.
    """
    given, weight = call.arguments["input"].shape, call.arguments["weight"].shape
    groups, transposed = call.arguments["groups"], call.arguments["transposed"]
    output = call.arguments["grad_output"].shape if call.op == "convolution_backward" else call.results[0].shape
    rows = given[0] * math.prod((given if transposed else output)[2:])
    m, n, k = rows, weight[0] // groups, math.prod(weight[1:])
    if transposed:
        n, k = k, n
    if call.op != "convolution_backward":
        return (Gemm(m, n, k, groups, moved),)
    wanted = call.arguments["output_mask"]
    shapes = [(m, k, n)] * wanted[0] + [(k, n, m)] * wanted[1]
    return tuple(Gemm(*shape, groups, moved // len(shapes)) for shape in shapes)


def _attention(call: Call, moved: int) -> FlashAttention:
    batch, heads, queries, head_dim = call.arguments["query"].shape
    _, kv_heads, keys, _ = call.arguments["key"].shape
    value_dim = call.arguments["value"].shape[-1]
    causal = bool(call.arguments.get("is_causal", False))
    direction: Direction = "backward" if call.op.endswith("_backward") else "forward"
    return FlashAttention(
        "torch", direction, batch, heads, kv_heads, head_dim, value_dim, queries, keys,
        twice_pairs=twice_pairs(queries, keys) if causal else 2 * queries * keys, causal=causal, bytes_moved=moved,
        dropout=int(call.arguments.get("dropout_p", 0.0) > 0),
    )  # fmt: skip


def twice_pairs(queries: int, keys: int) -> int:
    """Twice the pairs under torch's causal mask, which starts at the first key: a triangle, then whole rows."""
    corner = min(queries, keys)
    return corner * corner + 2 * (queries - corner) * keys
