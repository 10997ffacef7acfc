"""Measured kernels as the work that the simulator charges them with."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from spsim.costs.kernels import ComputeCost
from spsim.costs.traffic import rates_key
from spsim.errors import InputError
from spsim.inputs.hardware import HardwareProfile
from spsim.measuring.calibrate.records import Measurement
from spsim.measuring.calibrate.session import title
from spsim.measuring.calibrate.shapes import MEMORY_BOUND
from spsim.units import US_PER_S
from spsim.work import AttentionKernel, FlashAttention, Gemm, MemoryBound, Work

Seconds = npt.NDArray[np.float64]

CONSTANT = frozenset({"kernel", "direction", "causal", "head_dim", "operator_class", "backward", "dtype", "eager"})
"""Fields of a work that choose its coefficients; all others are numbers, and many kernels are one array."""
HALF_PRECISION = ("bf16", "fp16")
"""Types of one rate, which training runs in."""
NO_ACCUMULATION = 1
"""Elements of a main gradient of a weight-gradient product that accumulates into none: it only marks it."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One measured kernel."""

    group: str
    """The class that its error counts to."""
    name: str
    """The operator."""
    dtype: str
    work: Work
    seconds: float
    shape: Hashable
    """Kernels of one shape are fitted or held out together."""
    stratum: Hashable
    """Part of the class with coefficients of its own: of each, half of the shapes is held out."""


def timed(rows: Iterable[Measurement], kind: str) -> list[Measurement]:
    """The rows of a kind that have a time."""
    return [row for row in rows if row.kind == kind and not row.skipped and row.time_us is not None]


def gemm_samples(rows: Sequence[Measurement]) -> list[Sample]:
    """Matrix products; the shape of a layer is the same for forward and both gradients."""
    return [_sample(row, f"gemm {row.dtype}", _gemm) for row in timed(rows, "gemm")]


def attention_samples(rows: Sequence[Measurement]) -> list[Sample]:
    """Flash attention by direction and masking."""
    return [_sample(row, _attention_group(row), _attention) for row in timed(rows, "attention")]


def memory_samples(rows: Sequence[Measurement], cache_bytes: float) -> list[Sample]:
    """Memory-bound kernels by operator class: that of the catalogue, whatever an older raw file calls it."""
    return [
        _sample(row, _memory_bound(row).operator_class, _memory_bound, (row.bytes_moved or 0) > cache_bytes)
        for row in timed(rows, "memory_bound")
    ]


def _sample(
    row: Measurement,
    group: str,
    work: Callable[[Measurement], Work],
    beyond_cache: bool = False,
) -> Sample:
    made = work(row)
    kernel = rates_key(made.kernel, made.backward) if isinstance(made, MemoryBound) else None
    length = made.row if isinstance(made, MemoryBound) else None
    stratum = (row.dtype, kernel, length, row.head_dim, beyond_cache)
    return Sample(group, row.name, row.dtype, made, (row.time_us or 0.0) / US_PER_S, _shape(row), stratum)


def _shape(row: Measurement) -> Hashable:
    sides = tuple(sorted(side or 0 for side in (row.m, row.n, row.k)))
    return (sides, *(getattr(row, name) or 0 for name in ("batch", "heads", "kv_heads", "head_dim", "queries", "keys")),
            0 if row.kind in ("gemm", "attention") else row.bytes_moved or 0)  # fmt: skip


def _gemm(row: Measurement) -> Gemm:
    m, n, k, batch = row.m or 0, row.n or 0, row.k or 0, row.batch or 1
    accumulated = row.accumulated or (NO_ACCUMULATION if row.name == "wgrad" else 0)
    return Gemm(m, n, k, batch, row.bytes_moved or 0, accumulated)


def kernel_of(row: Measurement) -> AttentionKernel:
    """The fused kernel that a row of attention measures: before it was written down, the flash kernel of the device."""
    return row.kernel or ("torch_cpu" if row.clock == "thread_cpu" else "flash_attention_2")


def _attention_group(row: Measurement) -> str:
    dtype = "" if row.dtype in HALF_PRECISION else f"{row.dtype} "
    return f"attention {dtype}{kernel_of(row)} {row.name} {'causal' if row.causal else 'full'}"


def _attention(row: Measurement) -> FlashAttention:
    queries, keys = row.queries or 0, row.keys or 0
    heads = row.heads or 1
    return FlashAttention(
        kernel_of(row), "backward" if row.name == "backward" else "forward", row.batch or 1, heads,
        row.kv_heads or heads, row.head_dim or 1, row.head_dim or 1, queries, keys,
        queries * keys * (1 if row.causal else 2), bool(row.causal), row.bytes_moved or 0,
    )  # fmt: skip


def _memory_bound(row: Measurement) -> MemoryBound:
    operator, _, direction = row.name.rpartition("_")
    kernel = row.name if row.name in MEMORY_BOUND else operator
    if kernel not in MEMORY_BOUND or (kernel == operator and direction not in ("forward", "backward")):
        raise InputError(f"{title(row)}: there is no such operator; use one of {', '.join(MEMORY_BOUND)}")
    backward = direction == "backward"
    return MemoryBound(MEMORY_BOUND[kernel].operator_class, row.bytes_moved or 0, kernel, backward, row.n or 0)  # type: ignore[arg-type]


class Batch:
    """Many samples at once: their times by the simulator's own formulas."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        self.samples = samples
        self.seconds: Seconds = np.array([sample.seconds for sample in samples])
        where: dict[tuple[object, ...], list[int]] = {}
        for index, sample in enumerate(samples):
            constants = (getattr(sample.work, f.name) for f in fields(sample.work) if f.name in CONSTANT)
            where.setdefault((sample.dtype, type(sample.work), *constants), []).append(index)
        self.groups = [(samples[at[0]].dtype, _stack([samples[i].work for i in at]), at) for at in where.values()]
        self.dtypes = {dtype for dtype, _, _ in self.groups}

    def times(self, profile: HardwareProfile) -> Seconds:
        """Seconds of each sample on a profile: measured one by one, in bursts."""
        found = np.empty(len(self.samples))
        costs = {dtype: ComputeCost(profile, dtype, burst=True) for dtype in self.dtypes}
        for dtype, work, at in self.groups:
            found[at] = costs[dtype].duration(work)
        return found


def _stack(works: Sequence[Work]) -> Work:
    first = works[0]
    values: dict[str, Any] = {
        field.name: getattr(first, field.name)
        if field.name in CONSTANT
        else np.array([getattr(work, field.name) for work in works], dtype=np.float64)
        for field in fields(first)
    }
    return type(first)(**values)
