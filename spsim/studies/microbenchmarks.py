"""A user's own microbenchmarks of kernels against a profile, one row per measured time.

A file of products has the columns `m, n, k, time_us` and may have `direction`: forward is m × k by k × n, dgrad its
gradient by the transposed weight (m × k), wgrad the transposed gradient by the input (n × k). A file of attention has
`heads, head_dim` with `tokens`, or with `keys` and, but for one query, `queries`; it may have `kernel, batch, kv_heads,
causal`, and as times `forward_us` and `backward_us` or `time_us`. Other columns are kept. Predicted is a burst, as
microbenchmarks run, unless the rates of long runs at the power limit are asked for.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from spsim.costs.kernels import ComputeCost
from spsim.errors import InputError, first_problem
from spsim.inputs.csvrows import csv_rows
from spsim.inputs.hardware import HardwareProfile
from spsim.inputs.resources import read_text
from spsim.inputs.workload import ELEMENT_BYTES, Precision, product_type
from spsim.units import US_PER_S
from spsim.work import OPERAND_BYTES, AttentionKernel, FlashAttention, Framework, Gemm

Kind = Literal["gemm", "attention"]
Count = Annotated[int, Field(ge=1, lt=2**31)]
Time = Annotated[float, Field(gt=0, lt=1e9)]
PICKED: Framework = "torch"
"""What picks the kernel of attention where a row names none."""


class Product(BaseModel):
    """One row of a file of products."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)

    m: Count
    n: Count
    k: Count
    batch: Count = 1
    direction: Literal["forward", "dgrad", "wgrad"] = "forward"
    time_us: Time

    @property
    def times(self) -> Iterator[tuple[str, float]]:
        """Direction and measured µs."""
        yield self.direction, self.time_us

    def work(self, direction: str, precision: Precision) -> Gemm:
        """The product that runs; of operands in 8 bits the result has 16 bits."""
        m, n, k = {
            "forward": (self.m, self.n, self.k), "dgrad": (self.m, self.k, self.n), "wgrad": (self.n, self.k, self.m)
        }[direction]  # fmt: skip
        operand = Fraction(OPERAND_BYTES[product_type(precision)])
        moved = self.batch * (math.ceil(operand * (m * k + k * n)) + ELEMENT_BYTES[precision] * m * n)
        return Gemm(m, n, k, self.batch, moved)


class Attention(BaseModel):
    """One row of a file of attention."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)

    kernel: AttentionKernel | None = None
    batch: Count = 1
    heads: Count
    kv_heads: Count | None = None
    head_dim: Count
    tokens: Count | None = None
    queries: Count | None = None
    keys: Count | None = None
    causal: bool = False
    direction: Literal["forward", "backward"] = "forward"
    time_us: Time | None = None
    forward_us: Time | None = None
    backward_us: Time | None = None

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if (self.tokens is None) == (self.keys is None):
            raise ValueError("give either tokens, or keys with queries; keys alone are those of one query")
        if not any(time is not None for time in (self.time_us, self.forward_us, self.backward_us)):
            raise ValueError("has no time; give time_us, or forward_us and backward_us")
        if self.heads % (self.kv_heads or self.heads):
            raise ValueError(f"kv_heads = {self.kv_heads} does not divide heads = {self.heads}")
        return self

    @property
    def times(self) -> Iterator[tuple[str, float]]:
        """Direction and measured µs."""
        for direction, time in (
            (self.direction, self.time_us), ("forward", self.forward_us), ("backward", self.backward_us)
        ):  # fmt: skip
            if time is not None:
                yield direction, time

    @property
    def lengths(self) -> tuple[int, int]:
        """Queries and keys."""
        return self.queries or self.tokens or 1, self.keys or self.tokens or 1

    def kernel_on(self, profile: HardwareProfile) -> AttentionKernel:
        """The kernel that the row names, else what torch picks; for one query one that splits keys, if there is any."""
        picked = profile.attention_kernel(self.kernel or PICKED)
        known = profile.coefficients.attention
        divides = any(own.forward.split for own in known.values())
        if self.kernel is not None or self.lengths[0] > 1 or known[picked].forward.split or not divides:
            return picked
        return profile.attention_kernel("flash_decoding")

    def work(self, kernel: AttentionKernel, direction: str, precision: Precision) -> FlashAttention:
        """What runs; under a mask the last query sees all keys."""
        queries, keys = self.lengths
        kv_heads = self.kv_heads or self.heads
        visible = 2 * queries * keys - queries * (queries - 1) if self.causal and queries > 1 else 2 * queries * keys
        if self.causal and queries == keys:
            visible = queries * keys  # as kernels are charged: half of the square
        passes = 1 if direction == "forward" else 2
        moved = passes * 2 * self.batch * self.head_dim * (queries * self.heads + keys * kv_heads)
        moved *= ELEMENT_BYTES[precision]
        return FlashAttention(
            kernel, "backward" if direction == "backward" else "forward", self.batch, self.heads,
            kv_heads, self.head_dim, self.head_dim, queries, keys, visible, self.causal and queries > 1, moved,
        )  # fmt: skip

    def mark(self, kernel: AttentionKernel, profile: HardwareProfile) -> str:
        """What the prediction of this row goes beyond: sizes that lie between or beyond those that were measured."""
        own = profile.coefficients.attention[kernel].forward
        tiles = own.causal if self.causal else own.full
        sizes = ", ".join(sorted(tiles, key=int))
        marks = [] if str(self.head_dim) in tiles else [f"head_dim {self.head_dim} from those of {sizes}"]
        if (self.kv_heads or self.heads) < self.heads:
            marks.append("fewer KV heads than heads")
        return "; ".join(marks)


@dataclass(frozen=True, slots=True)
class MeasuredKernel:
    """One measured time beside its prediction."""

    columns: Mapping[str, Any]
    """As they stand in the file."""
    kind: Kind
    direction: str
    kernel: str
    """Of attention: the kernel that was predicted; else empty."""
    measured_us: float
    predicted_us: float | None
    note: str
    """What the prediction goes beyond."""
    skipped: str
    """Why there is none; empty where there is."""

    @property
    def error_percent(self) -> float | None:
        """Positive where the prediction is longer."""
        return None if self.predicted_us is None else 100 * (self.predicted_us / self.measured_us - 1)

    @property
    def group(self) -> str:
        """What errors are summed up by."""
        return " ".join(filter(None, (self.kind, self.kernel, self.direction)))

    def to_json(self) -> dict[str, Any]:
        """The columns of the file, direction and times, and what is not as usual."""
        found = {
            **self.columns, "direction": self.direction, "measured_us": self.measured_us,
            "predicted_us": self.predicted_us, "error_percent": self.error_percent,
        }  # fmt: skip
        others = {"kernel": self.kernel, "note": self.note, "skipped": self.skipped}
        return found | {name: text for name, text in others.items() if text}


@dataclass(frozen=True, slots=True)
class KernelErrors:
    """Absolute errors of some rows in percent, and their mean with its sign."""

    rows: int
    mean_percent: float
    p90_percent: float
    largest_percent: float
    bias_percent: float


def measured_kernels(
    path: Path, profile: HardwareProfile, precision: Precision, *, burst: bool = True
) -> list[MeasuredKernel]:
    """Every time of a file with its prediction on a profile.

    Raises `InputError` for a file that is neither of products nor of attention, and for values that are impossible.
    """
    cost = ComputeCost(profile, product_type(precision), burst=burst)
    rows: list[MeasuredKernel] = []
    for columns, row in _read(path):
        for direction, time in row.times:
            rows.append(_predicted(columns, row, direction, time, profile, cost, precision))
    if not rows:
        raise InputError(f"{path}: has no rows; give at least one measured kernel")
    return rows


def _predicted(
    columns: Mapping[str, Any], row: Product | Attention, direction: str, time: float, profile: HardwareProfile,
    cost: ComputeCost, precision: Precision,
) -> MeasuredKernel:  # fmt: skip
    kind: Kind = "gemm" if isinstance(row, Product) else "attention"
    kernel, note = "", ""
    try:
        if isinstance(row, Product):
            seconds = float(cost.duration(row.work(direction, precision)))
        else:
            kernel = found = row.kernel_on(profile)
            note = row.mark(found, profile)
            seconds = float(cost.duration(row.work(found, direction, precision)))
    except InputError as error:
        return MeasuredKernel(columns, kind, direction, kernel, time, None, note, str(error))
    return MeasuredKernel(columns, kind, direction, kernel, time, seconds * US_PER_S, note, "")


def summary(rows: Sequence[MeasuredKernel], key: Literal["kind", "group"] = "kind") -> dict[str, KernelErrors]:
    """Errors by kind of kernel, or by kind, kernel and direction; of what was predicted."""
    found: dict[str, list[float]] = {}
    for row in rows:
        if row.error_percent is not None:
            found.setdefault(getattr(row, key), []).append(row.error_percent)
    return {name: _errors(np.array(errors)) for name, errors in found.items()}


def _errors(errors: Any) -> KernelErrors:
    size = np.abs(errors)
    return KernelErrors(len(size), *map(float, (size.mean(), np.quantile(size, 0.9), size.max(), errors.mean())))


def _read(path: Path) -> Iterator[tuple[dict[str, Any], Product | Attention]]:
    """The rows of a file: their columns, and what they say."""
    header, lines = csv_rows(read_text(path), path)
    names = set(header)
    if not {"m", "n", "k", "time_us"} <= names and not {"heads", "head_dim"} <= names:
        raise InputError(
            f"{path}: columns {', '.join(sorted(names)) or 'none'}; products have m, n, k, time_us, attention has "
            "heads, head_dim with tokens or keys, and forward_us, backward_us or time_us"
        )
    schema = Product if {"m", "n", "k"} <= names else Attention
    for number, line in lines:
        given = {name: value for name, value in line.items() if name and value not in (None, "")}
        try:
            yield {name: _number(text) for name, text in given.items()}, schema.model_validate(given)
        except ValidationError as error:
            raise first_problem(error, f"{path}: line {number}") from None


def _number(text: str) -> int | float | str:
    """A value of a column as a number, where it is one that JSON knows."""
    for kind in (int, float):
        try:
            value = kind(text)
        except ValueError:
            continue
        return value if abs(value) < math.inf else text
    return text
