"""The raw file of a calibration: one row a measurement, written as soon as it is made.

The file holds all that a fit needs: the environment, what each kernel did, how long it took. A row is appended
in one write; a last line that was cut short is dropped when the file is read, and measured again.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from spsim.errors import InputError, first_problem

Kind = Literal["environment", "gemm", "attention", "memory_bound", "launch", "collective", "interference", "memory"]
Clock = Literal["cuda_events", "thread_cpu", "wall"]


class Measurement(BaseModel):
    """One row; fields that do not apply stay empty. Times are of one call."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    kind: Kind
    name: str
    """What was measured: forward, dgrad, wgrad; layer_norm_backward; all_reduce; context; torch; and so on."""
    dtype: str = ""
    operator_class: str = ""
    """Of a memory-bound kernel: elementwise, norm, softmax, dropout, embedding, cross_entropy, optimizer."""
    m: int | None = None
    n: int | None = None
    k: int | None = None
    batch: int | None = None
    accumulated: int | None = None
    heads: int | None = None
    kv_heads: int | None = None
    head_dim: int | None = None
    queries: int | None = None
    keys: int | None = None
    causal: bool | None = None
    bytes_moved: int | None = None
    """Of a kernel, or asked of the allocator."""
    level: str = ""
    """Level of the topology that a collective was measured on."""
    ranks: int | None = None
    nodes: int | None = None
    message_bytes: int | None = None
    """As nccl-tests count: the whole array, the per-rank buffer for all-to-all and send-receive."""
    clock: Clock | None = None
    repeats: int | None = None
    time_us: float | None = None
    """Median."""
    p10_us: float | None = None
    p90_us: float | None = None
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

    @property
    def key(self) -> tuple[object, ...]:
        """What was measured, without the result: equal keys are the same measurement."""
        return tuple(value for name, value in self if name not in RESULTS)


REQUIRED = frozenset({"kind", "name"})
RESULTS = frozenset({"clock", "repeats", "time_us", "p10_us", "p90_us", "value", "text", "skipped"})
COLUMNS = tuple(Measurement.model_fields)


def read_measurements(path: Path) -> list[Measurement]:
    """The rows of a raw file; a last line that was cut short is left out. `InputError` names line and column."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise InputError(f"{path}: cannot be read ({reason}); give the raw CSV of a calibration") from None
    whole = text[: text.rfind("\n") + 1]
    if not whole:
        return []
    reader = csv.DictReader(io.StringIO(whole))
    if tuple(reader.fieldnames or ()) != COLUMNS:
        raise InputError(f"{path}: the header is not that of a calibration; give the raw CSV that calibrate wrote")
    return list(_rows(path, reader))


def _rows(path: Path, reader: csv.DictReader[str]) -> Iterator[Measurement]:
    for row in reader:
        try:
            yield Measurement.model_validate(row)
        except ValidationError as error:
            raise first_problem(error, f"{path}: line {reader.line_num}") from None


LONGEST_LINE = 2**16
"""Bytes from the end of a file within which its last line begins."""


def append_measurements(path: Path, rows: Sequence[Measurement]) -> None:
    """Add rows to a raw file, with its header when it is new; a line that was cut short is removed first."""
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
