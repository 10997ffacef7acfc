"""What one kernel does: FLOPs and bytes, without a clock.

Numbers are integers, or arrays of them for many kernels of one kind at once, whose names and flags are tuples
where they differ.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, get_args

Direction = Literal["forward", "backward"]
MemoryBoundClass = Literal[
    "norm", "softmax", "dropout", "elementwise", "embedding", "cross_entropy", "optimizer", "cast"
]
"""Classes of kernels that take the time of their memory traffic; `cast` makes operands of 8 or 4 bits."""
KernelClass = Literal["gemm", "attention"] | MemoryBoundClass
"""Which coefficients time a kernel; the kind of an operator is the class of its kernels."""
KERNEL_CLASSES: tuple[KernelClass, ...] = ("gemm", "attention", *get_args(MemoryBoundClass))
KernelName = Literal[
    "layer_norm", "rms_norm", "softmax", "masked_softmax", "dropout", "gelu", "bias_gelu", "relu", "squared_relu",
    "swiglu", "geglu", "rope", "bias_dropout_add", "bias_add", "bias_gradient", "add", "copy", "embedding",
    "cross_entropy", "adam",
    "permute",
    "amax", "quantize", "quantize_columnwise", "quantize_both", "transpose", "swizzle_scales",
]  # fmt: skip
"""Memory-bound kernels that a profile may have rates of their own for; others are known by their class only. Those of
the last line are casts, as Transformer Engine names them: `quantize` writes rows, `quantize_both` rows and columns for
the products that need either, `swizzle_scales` puts scales in the order in which tensor cores read them."""
FP32_BYTES = 4
MAIN_GRADIENT_BYTES = FP32_BYTES
"""Of an element: gradients of weights are accumulated and reduced in fp32."""
CAST_TYPES = ("fp8", "mxfp8", "fp8_blockwise", "nvfp4")
"""Types that operands of products are cast to, tensors between products staying in 16 bits: 8 bits with a scale for the
tensor, for 32 values (E8M0), for 128 or 128 x 128 (fp32), and 4 bits with one for 16 (E4M3)."""
DATA_TYPES = ("fp32", "tf32", "fp16", "bf16", *CAST_TYPES)
OPERAND_BYTES = {
    "fp32": 4, "tf32": 4, "fp16": 2, "bf16": 2, "fp8": 1, "mxfp8": 1 + 1 / 32, "fp8_blockwise": 1 + 4 / 128,
    "nvfp4": 1 / 2 + 1 / 16,
}  # fmt: skip
"""Of an element that a product reads, its part of a scale included."""
AttentionKernel = Literal[
    "flash_attention_2", "flash_attention_3", "cudnn", "cudnn_2024", "memory_efficient", "torch_cpu"
]  # fmt: skip
"""Fused kernels, by the library that they are of, cuDNN as it is and as it was in 2024; `memory_efficient` is CUTLASS's
in torch."""
Framework = Literal["transformer_engine", "torch"]
"""What picks a kernel where none is asked for: Megatron-Core through Transformer Engine, or torch by itself."""
Decoding = Literal["flash_decoding"]
"""Of one query whatever kernel divides its keys among thread blocks (Dao et al. 2023, flash-decoding)."""


KERNEL_PASSES = [f"{kernel}_{direction}" for kernel in get_args(KernelName) for direction in get_args(Direction)]


def known_kernel_pass(name: str) -> str:
    """A kernel and its direction, such as gelu_backward; `ValueError` for any other name."""
    if name not in KERNEL_PASSES:
        known = ", ".join(get_args(KernelName))
        raise ValueError(f"no such kernel; use one of {known}, ending in _forward or _backward")
    return name


def known_data_type(name: str) -> str:
    """One of `DATA_TYPES`; `ValueError` for any other name."""
    if name not in DATA_TYPES:
        raise ValueError(f"no such data type; use one of {', '.join(DATA_TYPES)}")
    return name


def each(look_up: Callable[..., tuple[float, ...]], *keys: Any) -> Any:
    """Numbers that names and flags stand for, or an array of each number where some are tuples."""
    count = next((len(key) for key in keys if isinstance(key, tuple)), None)
    if count is None:
        return look_up(*keys)
    import numpy as np

    columns = [key if isinstance(key, tuple) else (key,) * count for key in keys]
    return np.array([*zip(*map(look_up, *columns), strict=True)])


def smaller(one: Any, other: Any) -> Any:
    """Of two whole numbers, or of two arrays of them one by one."""
    return (one + other - abs(one - other)) // 2


@dataclass(slots=True, unsafe_hash=True)
class Gemm:
    """`batch` products of an m x k by a k x n matrix."""

    m: int
    n: int
    k: int
    batch: int
    bytes_moved: int
    """Operands and result, each once."""
    accumulated: int = 0
    """Elements of an fp32 main gradient that the epilogue reads and writes; above 0 for weight gradients."""
    unaligned: int = 0
    """1 where rows of an operand or of the result begin at no multiple of 16 bytes, which tensor cores load whole."""
    dtype: str | None = None
    """Data type of its operands, where that is another than the block's."""
    pieces: int = 1
    """Products like this one that run beside each other on streams, so that only all of them fill whole waves."""
    launched: int = 0
    """Of the products those that are launched one by one, as of the experts of a rank; 0 where one kernel does all."""
    grouped: int = 0
    """1 where one kernel multiplies matrices that have different numbers of rows, with more in its epilogue."""

    @property
    def flops(self) -> int:
        """A multiplication and an addition per m, n, k and batch."""
        return 2 * self.m * self.n * self.k * self.batch


@dataclass(slots=True, unsafe_hash=True)
class FlashAttention:
    """Attention in one kernel, scores never in memory (Dao et al. 2022)."""

    kernel: AttentionKernel | Framework | Decoding
    """By its name, or by that of the framework that picks it."""
    direction: Direction
    batch: int
    heads: int
    """Of queries; those of keys and values are `kv_heads`."""
    kv_heads: int
    head_dim: int
    """Of queries and keys, which selects the coefficients of its efficiency."""
    value_dim: int
    queries: int
    keys: int
    twice_pairs: int
    """Twice the query-key pairs that are computed, per head and sequence: the square under a causal mask."""
    causal: bool
    """The kernel masks a triangle, which changes its efficiency."""
    bytes_moved: int
    dropout: int = 0
    """1 where scores are dropped inside the kernel, which draws a random number for each."""
    dtype: str | None = None
    """Data type of its operands, where that is another than the block's."""
    window: int = 0
    """Keys that a query looks back at, itself included; 0 where all before it."""
    documents: int = 0
    """Of the keys, within each of which queries stay; 0 where there is one."""
    longest: int = 0
    """Keys of the longest of them."""

    @property
    def flops(self) -> int:
        """Two products forward, of the width of keys and of values; backward recomputes the first and has two more
        of each: 2.5 times where the widths are equal (Dao 2023, section 4.1).
        """
        return self.batch * self.heads * self.width * self.twice_pairs_in_window

    @property
    def twice_pairs_in_window(self) -> int:
        """Twice the pairs that a window leaves: w for each query, less where the first queries see fewer."""
        window = smaller(self.window, self.keys)
        within: int = 2 * self.queries * window - (self.queries == self.keys) * window * (window - 1)
        pairs: int = (window > 0) * smaller(within, self.twice_pairs) + (window == 0) * self.twice_pairs
        return pairs

    @property
    def width(self) -> int:
        """Multiplications of a pair of query and key: of a head of its products, each."""
        of_keys, of_values = products_of(self.direction)
        return of_keys * self.head_dim + of_values * self.value_dim


@dataclass(slots=True, unsafe_hash=True)
class MemoryBound:
    """A kernel that takes the time of its memory traffic."""

    operator_class: MemoryBoundClass
    bytes_moved: int
    kernel: KernelName | None = None
    backward: bool = False
    """The gradient of the kernel; of a cast, one of a gradient."""
    row: int = 0
    """Elements that it reduces or scales together: of a norm, a softmax, a bias; 0 where that does not matter."""
    dtype: str | None = None
    """Data type of what it moves, where that is another than the products'."""
    accesses: int = 0
    """Elements that it reads and writes one by one, for operands are strided or broadcast; 0 where vectors are."""
    launched: int = 0
    """Kernels like it that are launched one by one, as of the experts of a rank; 0 where it is one."""
    eager: bool = False
    """As torch runs it by itself, whatever a library fuses under that name."""

    @property
    def flops(self) -> int:
        """Not counted, as in the published model FLOPs."""
        return 0


@cache
def products_of(direction: Direction) -> tuple[int, int]:
    """Matrix products of a flash kernel along the width of keys and along that of values."""
    found: tuple[int, int] = each({"forward": (1, 1), "backward": (3, 2)}.__getitem__, direction)
    return found


Work = Gemm | FlashAttention | MemoryBound
