"""What names say: the category of an event, the class of an operator, the kind of a collective.

The first pattern that is found decides, so that a flash-attention kernel written with CUTLASS is attention. A
name that no pattern knows is `other`: it is not guessed.
"""

from __future__ import annotations

import re
from functools import lru_cache

# Categories (ActivityType.h of Kineto and of its forks for other devices), in small letters.

FORMER = {
    "operator": "cpu_op", "runtime": "cuda_runtime", "memcpy": "gpu_memcpy", "memset": "gpu_memset",
    "user": "gpu_user_annotation",
}  # fmt: skip
"""Categories of torch 1.8 to 1.11, and those of today."""
DEVICE_WORK = frozenset({"kernel", "gpu_memcpy", "gpu_memset", "mtia_ccp_events", "collective_comm"})
"""What a device does."""
HOST = frozenset({
    "", "cpu_op", "user_annotation", "cpu_instant_event", "python_function", "overhead", "trace", "hpu_op",
    "external_correlation",
})  # fmt: skip
"""What the host does beside calls to a device."""
FRAMES = ("_user_annotation", "_sync", "_event", "_profiler_range", "_profiler", "_counters", "_insight", "_notifier")
"""How categories end of what frames, awaits and counts the work of a device: `cuda_sync`, `gpu_user_annotation`."""
CALLS = ("_runtime", "_driver")
"""How categories of calls from the host to a device end, whichever device it is."""
AWAITS = frozenset({"event_record", "event_wait"})
"""Names of events on a device that move and compute nothing."""

OTHER = "other"
COMMUNICATION = "communication"
COPY = "copy"

CLASSES: tuple[tuple[str, tuple[str, ...]], ...] = (
    # NCCL and RCCL; the libraries of Intel, Habana and Meta.
    (COMMUNICATION, ("nccl", "rccl", "msccl", "oneccl", "xccl", "hccl")),
    # What copy engines do by CUDA's, ROCm's and MTIA's name; a kernel that copies is elementwise.
    (COPY, ("^memcpy", "memorycopy", "^copy(host|device)", "^dma_", "_local_scalar_dense")),
    # FlashAttention, cuDNN, CUTLASS's memory-efficient attention, AOTriton; aten's scaled dot products.
    ("attention", ("flash", "fmha", "attention", "attn", "sdpa", r"\bmha")),
    ("softmax", ("softmax",)),
    ("norm", ("(layer|rms|batch|group)_?norm", r"\bln_(fwd|bwd)", "rowwisemoments", "gammabeta")),
    # `masked_scale` is the backward pass of fused dropout, `bernoulli` its mask on a CPU.
    ("dropout", ("dropout", "masked_scale", "bernoulli")),
    # cuBLAS, CUTLASS, Tensile (of rocBLAS); aten's products.
    ("gemm", ("gemm", "gemv", "cutlass", "xmma", "nvjet", "cublas", "splitkreduce", "cijk_")),
    ("gemm", (r"^aten::_?(add|b|badd)?(mm|bmm|mv)_?$", r"^aten::(matmul|linear\w*|mkldnn_linear\w*|dot)$")),
    # Fused updates of parameters by torch, Apex and Transformer Engine, which are multi-tensor kernels of a functor.
    ("optimizer", ("adam", "optimizer", "^sgd")),
    ("cross_entropy", ("nll_?loss", "cross_?entropy")),
    ("embedding", ("embedding",)),
    ("elementwise", ("elementwise", "vectorized", "unrolled", "reduce_kernel", "catarray", "multi_tensor")),
    ("elementwise", ("memset", "copy", "fill", "transpose", "foreach", "cast", "triton_(poi|red|per)")),
    ("elementwise", (
        "^aten::(add|sub|rsub|mul|div|neg|abs|pow|square|exp|sqrt|rsqrt|sin|cos|maximum|minimum|clamp|lerp)_?$",
        "^aten::(addcmul|addcdiv|where|masked_fill|tril|triu|sum|mean|cat|stack|clone|contiguous|repeat)_?$",
        "^aten::(new_)?(zero|zeros|ones|full|arange|index|index_put|logaddexp)(_like|_)?$",
        "^aten::(gelu|relu|silu|sigmoid|tanh|threshold)(_backward)?_?$",
    )),
)  # fmt: skip
"""(operator class, patterns), the first match decides; case does not matter."""

_COMPILED = tuple((name, re.compile("|".join(patterns), re.IGNORECASE)) for name, patterns in CLASSES)

COLLECTIVES: tuple[tuple[str, str], ...] = (
    ("all_reduce", "allreduce"),
    ("all_gather", "allgather"),
    ("reduce_scatter", "reducescatter"),
    ("all_to_all", "alltoall"),
    ("broadcast", "broadcast"),
    ("barrier", "barrier"),
    ("send_receive", "send"),
    ("send_receive", "recv"),
    ("reduce", "reduce"),
    ("gather", "gather"),
    ("scatter", "scatter"),
)
"""(kind, what its name contains without underscores), the first match decides: `_allgather_base` of NCCL's metadata,
`c10d::alltoall_base_`, `ncclDevKernel_AllReduce_Sum_bf16_RING_LL`.
"""

METADATA = frozenset({
    "view", "_unsafe_view", "view_as", "reshape", "t", "transpose", "permute", "movedim", "as_strided", "expand",
    "expand_as", "unsqueeze", "squeeze", "slice", "select", "narrow", "split", "split_with_sizes", "chunk", "unbind",
    "unflatten", "flatten", "detach", "detach_", "alias", "empty", "empty_like", "empty_strided", "new_empty",
    "resize_", "set_", "resolve_conj", "resolve_neg", "lift_fresh", "contiguous", "to", "item", "result_type",
    "_reshape_alias", "numpy_T", "promote_types",
})  # fmt: skip
"""Operators of aten that move no data themselves; a copy that one of them needs is an operator inside it."""

ITEMSIZES = {
    # As NCCL's metadata name a dtype, then as the profiler names the type of an operator's input.
    "Float": 4, "BFloat16": 2, "Half": 2, "Double": 8, "Byte": 1, "Char": 1, "Bool": 1, "Short": 2, "Int": 4, "Long": 8,
    "Float8_e4m3fn": 1, "Float8_e5m2": 1,
    "float": 4, "c10::BFloat16": 2, "c10::Half": 2, "double": 8, "unsigned char": 1, "signed char": 1, "bool": 1,
    "short": 2, "int": 4, "long int": 8, "long": 8, "c10::Float8_e4m3fn": 1, "c10::Float8_e5m2": 1,
}  # fmt: skip


def category(given: str) -> str:
    """A category in the words of today's versions for CUDA; forks say `mlu_memcpy`."""
    lowered = given.lower()
    former = FORMER.get(lowered, lowered)
    kind = former.rpartition("_")[2]
    return f"gpu_{kind}" if kind in ("memcpy", "memset") else former


def is_beside_work(category: str) -> bool:
    """Whether it is known to be no work of a device, nor a call that launches some."""
    return category in HOST or category.endswith(FRAMES)


def leaves_device(copy: str) -> bool:
    """Whether a copy of this name moves data from or to the host or another device."""
    return not re.search("d(evice)?(to|2)d", copy, re.IGNORECASE)


@lru_cache(maxsize=2**14)
def operator_class(name: str) -> str:
    """The class of a kernel or operator by its name; `other` if no pattern knows it."""
    return next((found for found, pattern in _COMPILED if pattern.search(name)), OTHER)


def collective(name: str) -> str:
    """The kind of a collective by its name in NCCL's metadata, c10d or a kernel; empty if there is none."""
    bare = name.lower().replace("_", "")
    return next((kind for kind, part in COLLECTIVES if part in bare), "")


def short_name(name: str) -> str:
    """A kernel's name without return type, template arguments, parameters and namespaces."""
    bare = re.split(r"[<(]", name.removeprefix("void ").replace("(anonymous namespace)", ""), maxsplit=1)[0]
    return bare.rsplit("::", 1)[-1].strip() or name
