"""The raw file of a calibration: one row a measurement, written as soon as it is made.

The file holds all that a fit needs: the environment, what each kernel did, how long it took. A row is appended
in one write; a last line that was cut short is dropped when the file is read, and measured again.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import date
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from spsim.errors import InputError, first_problem
from spsim.inputs.collective_curves import CollectiveName
from spsim.inputs.csvrows import csv_rows
from spsim.inputs.kernel_coefficients import MemoryBoundFractions
from spsim.inputs.resources import read_text
from spsim.work import DATA_TYPES, AttentionKernel

Kind = Literal["environment", "gemm", "attention", "memory_bound", "launch", "collective", "interference", "memory"]
Clock = Literal["cuda_events", "thread_cpu", "wall"]


Count = Annotated[int, Field(gt=0, lt=2**40)]
Ranks = Annotated[int, Field(gt=0, lt=2**20)]
Size = Annotated[int, Field(gt=0, lt=2**50)]
"""Of bytes or elements: less than a PiB."""
Microseconds = Annotated[float, Field(ge=1e-3, lt=1e9)]
"""From a nanosecond, about one clock of the device, to a quarter of an hour."""
NAMES: Mapping[str, Sequence[str]] = {
    "gemm": ("forward", "dgrad", "wgrad"),
    "attention": ("forward", "backward"),
    "memory_bound": ("*_forward", "*_backward", "bias_add", "bias_gradient", "add", "copy", "adam"),
    "launch": ("stream_*", "host_add", "graph_add"),
    "collective": get_args(CollectiveName),
    "interference": [
        f"{a}_beside_{b}" for name in get_args(CollectiveName) for a, b in (("gemm", name), (name, "gemm"))
    ],
    "memory": ("context", "communicator", "allocated", "reserved", "norm_statistics"),
}
"""Names of each kind, as patterns; the environment may have any."""
NEEDED: Mapping[str, Sequence[str]] = {
    "gemm": ("dtype", "m", "n", "k"),
    "attention": ("dtype", "queries", "keys", "heads", "head_dim", "causal"),
    "memory_bound": ("dtype", "operator_class", "bytes_moved"),
    "collective": ("level", "ranks", "message_bytes"),
}
"""Columns without which a time says nothing."""
NUMBERS = {"ranks": 1, "nodes": 1, "cache_bytes": 0}
"""Environment rows that are whole numbers, and the smallest that each may be."""


class Measurement(BaseModel):
    """One row; fields that do not apply stay empty. Times are of one call."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    kind: Kind
    name: str
    """What was measured: forward, dgrad, wgrad; layer_norm_backward; all_reduce; context; torch; and so on."""
    dtype: Annotated[str, Field(pattern=f"^({'|'.join(DATA_TYPES)})?$")] = ""
    operator_class: str = ""
    """Of a memory-bound kernel: elementwise, norm, softmax, dropout, embedding, cross_entropy, optimizer."""
    m: Count | None = None
    n: Count | None = None
    k: Count | None = None
    batch: Count | None = None
    accumulated: Size | None = None
    heads: Count | None = None
    kv_heads: Count | None = None
    head_dim: Count | None = None
    queries: Count | None = None
    keys: Count | None = None
    causal: bool | None = None
    kernel: AttentionKernel | None = None
    """Of fused attention."""
    bytes_moved: Size | None = None
    """Of a kernel, or asked of the allocator."""
    level: str = ""
    """Level of the topology that a collective was measured on."""
    ranks: Ranks | None = None
    nodes: Ranks | None = None
    message_bytes: Size | None = None
    """As nccl-tests count: the whole array, the per-rank buffer for all-to-all and send-receive."""
    clock: Clock | None = None
    repeats: Count | None = None
    time_us: Microseconds | None = None
    """Median."""
    p10_us: Microseconds | None = None
    p90_us: Microseconds | None = None
    value: float | None = None
    """Of what is not a time: bytes; of interference the share of its rate that one loses beside the other."""
    text: str = ""
    """Of the environment: a version, a device, a date; of norm statistics, their type."""
    skipped: str = ""
    """Why there is no result, such as out of memory; the other columns still say what was tried."""

    @field_validator("*", mode="before")
    @classmethod
    def _empty_is_default(cls, value: Any, info: Any) -> Any:
        return cls.model_fields[info.field_name].default if value == "" and info.field_name not in REQUIRED else value

    @model_validator(mode="after")
    def _is_possible(self) -> Self:
        names = NAMES.get(self.kind, ("*",))
        if not any(fnmatchcase(self.name, pattern) for pattern in names):
            raise ValueError(f"{self._row} is none that calibrate measures; its name is one of {', '.join(names)}")
        if self.operator_class not in ("", *MemoryBoundFractions.model_fields):
            classes = ", ".join(MemoryBoundFractions.model_fields)
            raise ValueError(f"{self._row} is of the class {self.operator_class!r}; use one of {classes}")
        if self.time_us is not None and not self.skipped:
            for name in NEEDED.get(self.kind, ()):
                if getattr(self, name) in (None, ""):
                    raise ValueError(f"{self._row} has no {name}; measure it again")
        self._check_ranks()
        self._check_value()
        if self.kind == "environment":
            _check_fact(self.name, self.text)
        return self

    def _check_ranks(self) -> None:
        if self.kind in ("collective", "interference") and self.ranks == 1:
            raise ValueError(f"{self._row} has 1 rank; a collective takes at least 2")
        if self.ranks and self.ranks % (self.nodes or 1):
            raise ValueError(f"{self._row} has {self.ranks} ranks on {self.nodes} nodes; nodes hold equally many")

    def _check_value(self) -> None:
        low, high = (-1, 1) if self.kind == "interference" else (0, 2**50)
        if self.value is not None and not low <= self.value <= high:
            raise ValueError(f"{self._row} has the value {self.value:g}; it is from {low} to {high}")

    @property
    def _row(self) -> str:
        return f"{'an' if self.kind[0] in 'aeiou' else 'a'} {self.kind} row ({self.name})"

    @property
    def key(self) -> tuple[object, ...]:
        """What was measured, without the result: equal keys are the same measurement."""
        return tuple(value for name, value in self if name not in RESULTS)


def _check_fact(name: str, text: str) -> None:
    """Raise `ValueError` for a text of the environment that is not what its name says."""
    if name in NUMBERS and not (text.isdecimal() and len(text) < 16 and int(text) >= NUMBERS[name]):
        raise ValueError(f"the environment's {name} is {text!r}; it is a whole number from {NUMBERS[name]}")
    if name == "date" and not (len(text) == len("2026-01-31") and _is_date(text)):
        raise ValueError(f"the environment's date is {text!r}; write it as 2026-01-31")


def _is_date(text: str) -> bool:
    try:
        date.fromisoformat(text)
    except ValueError:
        return False
    return True


class RowError(InputError):
    """A row that the base of a fit, or any device, rules out."""

    def __init__(self, row: Measurement, message: str) -> None:
        super().__init__(message)
        self.row = row


REQUIRED = frozenset({"kind", "name"})
RESULTS = frozenset({"clock", "repeats", "time_us", "p10_us", "p90_us", "value", "text", "skipped"})
COLUMNS = tuple(Measurement.model_fields)
COLUMNS_BEFORE = tuple(name for name in COLUMNS if name != "kernel")
"""Of raw files from before attention had several kernels."""


def read_measurements(path: Path) -> list[Measurement]:
    """The rows of a raw file; a last line that was cut short is left out. `InputError` names line and column."""
    text = read_text(path)
    whole = text[: text.rfind("\n") + 1]
    if not whole:
        return []
    header, rows = csv_rows(whole, path)
    if tuple(header) not in (COLUMNS, COLUMNS_BEFORE):
        raise InputError(f"{path}: the header is not that of a calibration; give the raw CSV that calibrate wrote")
    return list(_measurements(path, rows))


def _measurements(path: Path, rows: Iterable[tuple[int, dict[Any, Any]]]) -> Iterator[Measurement]:
    for line, row in rows:
        if None in row or None in row.values():
            raise InputError(
                f"{path}: line {line} has another number of columns than the header; it was cut or edited, "
                "remove it and run calibrate again to measure it"
            )
        try:
            yield Measurement.model_validate(row)
        except ValidationError as error:
            raise first_problem(error, f"{path}: line {line}") from None


def _check_header(path: Path) -> None:
    with path.open("a+", encoding="utf-8", newline="") as file:
        file.seek(0)
        header = next(csv.reader(file), None)
    if header is not None and tuple(header) == COLUMNS_BEFORE:
        raise InputError(
            f"{path}: was measured before attention had several kernels; fit it alone, or give another --raw"
        )


LONGEST_LINE = 2**16
"""Bytes from the end of a file within which its last line begins."""


def append_measurements(path: Path, rows: Sequence[Measurement]) -> None:
    """Add rows to a raw file, with its header when it is new; a line that was cut short is removed first.
    `InputError` where the file is of an older version, with other columns.
    """
    _check_header(path)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    with path.open("a+b") as file:
        tail = max(0, file.seek(0, io.SEEK_END) - LONGEST_LINE)
        file.seek(tail)
        kept = tail + file.read().rfind(b"\n") + 1
        if not kept:
            writer.writerow(COLUMNS)
        writer.writerows([["" if value is None else value for _, value in row] for row in rows])
        file.truncate(kept)
        file.write(text.getvalue().encode())
