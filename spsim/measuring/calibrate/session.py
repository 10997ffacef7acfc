"""One calibration as rank 0 leads it: what is missing, in what order, within what time; rows as they are made."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from threading import Timer

from spsim.errors import InputError
from spsim.inputs.hardware import HardwareProfile
from spsim.measuring.calibrate import catalogue
from spsim.measuring.calibrate.records import Measurement, append_measurements, read_measurements
from spsim.measuring.calibrate.timing import FULL, QUICK, Effort

RAW_FILE = "measurements.csv"
IDENTITY = ("device", "torch", "cuda", "hip")
"""Environment rows that must not change within a raw file."""
OVERHEAD_CALLS = 12
"""Warm-up, pilot and least repeats of one measurement."""
MEMORY_OF_PACE = 0.3
"""Weight of the latest measurement in the ratio of time taken to time expected."""
DEVICE_LOST = re.compile(r"(CUDA|HIP) error: (?!\w+_STATUS_)")
"""How torch begins the message of an error after which a process cannot use its device any more. The status of a
library, such as CUBLAS_STATUS_NOT_SUPPORTED, is of one call; if the device is lost, the next measurement says so.
"""
KEPT = "finished measurements are kept, run again to go on"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the user asked for."""

    raw: Path
    """Directory of the raw file."""
    base: str | None = None
    quick: bool = False
    time_limit: float = 120.0
    """Seconds after which one measurement is taken to hang."""

    @property
    def file(self) -> Path:
        """The raw file."""
        return self.raw / RAW_FILE

    @property
    def budget(self) -> float:
        """Seconds for all measurements: what is promised, less starting, fitting and drawing."""
        return 80.0 if self.quick else 1080.0

    @property
    def effort(self) -> Effort:
        """Of one measurement."""
        return QUICK if self.quick else FULL


@dataclass(frozen=True)
class Progress:
    """Where a calibration stands."""

    remaining: float
    """Seconds, expected."""
    item: str
    done: int
    total: int


@dataclass(frozen=True)
class Note:
    """A line for the user."""

    text: str


Report = Callable[[Progress | Note], None]
Measure = Callable[[Measurement], Measurement]


def class_of(row: Measurement) -> str:
    """The class that a row counts to: of kernels with its type, of collectives with the level."""
    name = row.name if row.kind == "collective" else row.operator_class or row.kind
    return " ".join(part for part in (name, row.level or row.dtype) if part)


def title(row: Measurement) -> str:
    """What a row measures, in a few words."""
    if row.kind in ("collective", "interference", "memory"):
        size = row.message_bytes or row.bytes_moved
        of = [f"{size} bytes" if size else "", f"on {row.ranks} ranks by {row.level}" if row.ranks else ""]
        return " ".join(part for part in (row.name, row.dtype, *of) if part)
    if row.kind == "attention":
        batch = f"{row.batch} x " if row.batch and row.batch > 1 else ""
        shape = f"{batch}{row.heads}/{row.kv_heads} heads of {row.head_dim}, {row.queries} tokens"
        kernel = f"{row.kernel} " if row.kernel else ""
        return f"attention {kernel}{row.name} {row.dtype} {shape}{', causal' if row.causal else ''}"
    shape = "x".join(str(size) for size in (row.batch, row.m, row.n, row.k) if size and size > 1)
    main = ", accumulated" if row.accumulated else ""
    return " ".join(
        part for part in (row.kind if row.kind == "gemm" else "", row.name, row.dtype, shape + main) if part
    )


class RawFile:
    """The raw file of a session: what it holds already, and what is added."""

    def __init__(self, path: Path, environment: Sequence[Measurement]) -> None:
        self.path = path
        rows = read_measurements(path) if path.exists() else []
        self._check_same(rows, environment)
        self.measured = {row.key for row in rows if not row.skipped}
        self.skipped = {row.key for row in rows if row.skipped}
        self.add([row for row in environment if row.key not in self.measured])

    def _check_same(self, rows: Sequence[Measurement], environment: Sequence[Measurement]) -> None:
        before = {row.name: row.text for row in rows if row.kind == "environment"}
        for row in environment:
            if row.name in IDENTITY and before.get(row.name, row.text) != row.text:
                raise InputError(
                    f"{self.path}: was measured with {row.name} {before[row.name]!r}, here it is {row.text!r}; "
                    "give another --raw or --out"
                )

    def missing(self, rows: Sequence[Measurement]) -> list[Measurement]:
        """Rows without a result; those that failed before come last, so that they cannot stop the others again."""
        left = [row for row in rows if row.key not in self.measured]
        return sorted(left, key=lambda row: row.key in self.skipped)

    def add(self, rows: Sequence[Measurement]) -> None:
        """Write rows; `InputError` where that fails."""
        try:
            append_measurements(self.path, rows)
        except OSError as error:
            raise InputError(f"{self.path}: cannot be written ({error.strerror}); {KEPT} once there is space") from None


def environment_rows(facts: dict[str, str]) -> list[Measurement]:
    """Versions, names and the date, a row each."""
    return [
        Measurement(kind="environment", name=name, text=text)
        for name, text in {**facts, "date": datetime.now(UTC).date().isoformat()}.items()
        if text
    ]


def expected_seconds(row: Measurement, profile: HardwareProfile) -> float:
    """Seconds of one call, roughly: bytes at the memory's or the link's rate plus FLOPs at the peak."""
    if row.message_bytes:
        level = next((level for level in profile.datasheet.topology if level.name == row.level), None)
        return 2 * row.message_bytes / (level.bandwidth if level else profile.memory_bandwidth)
    if row.kind == "attention":
        flops = 4.0 * (row.queries or 0) ** 2 * (row.heads or 0) * (row.head_dim or 0) * (row.batch or 1)
        flops *= (1 if row.name == "forward" else 2.5) * (0.5 if row.causal else 1)
    else:
        flops = 2.0 * (row.m or 0) * (row.n or 0) * (row.k or 0) * (row.batch or 1)
    peaks = profile.datasheet.peak_tflops
    peak = peaks[row.dtype if row.dtype in peaks else next(iter(peaks))].value * 1e12
    return flops / peak + (row.bytes_moved or 0) / profile.memory_bandwidth


@contextmanager
def time_limit(seconds: float, expired: Callable[[], None]) -> Iterator[None]:
    """Call `expired`, on a thread of its own, should the block take longer."""
    timer = Timer(seconds, expired)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@dataclass(frozen=True)
class Section:
    """Measurements of a kind, to be finished when this share of the budget is spent."""

    rows: list[Measurement]
    share: float


def sections(machine: catalogue.Machine, *, quick: bool) -> list[Section]:
    """All there is to measure: memory after kernels, so that the context holds them, and before communicators."""
    alone = 0.6 if machine.ranks > 1 else 1.0
    return [
        Section(catalogue.compute_rows(machine, quick=quick), alone - 0.02),
        Section(catalogue.memory_rows(machine), alone),
        Section(catalogue.interference_rows(machine), 0.72),
        Section(catalogue.collective_rows(machine, quick=quick), 1.0),
    ]


class Session:
    """Measures what is missing, small before large, and leaves out what the time does not allow."""

    def __init__(
        self,
        settings: Settings,
        profile: HardwareProfile,
        raw: RawFile,
        report: Report,
        guard: Callable[[Measurement], AbstractContextManager[None]],
    ) -> None:
        self.settings, self.profile, self.raw, self.report, self.guard = settings, profile, raw, report, guard
        self.pace = 1.0
        self.left_out: list[Measurement] = []
        self.skipped: list[Measurement] = []
        self.done = 0

    def run(self, planned: Sequence[Section], measure: Measure) -> None:
        """Measure all sections; notes name what was skipped or left out."""
        self.start = time.monotonic()
        todo = [Section(self._ordered(section.rows), section.share) for section in planned]
        self.total = sum(len(section.rows) for section in todo)
        for number, section in enumerate(todo):
            later = sum(self._expected(row) for other in todo[number + 1 :] for row in other.rows)
            self._run_section(section, later, measure)
        self._run_section(Section(self._take_left_out(), 1.0), 0.0, measure)
        for row in self.skipped:
            self.report(Note(f"skipped: {title(row)}: {row.skipped}"))
        if self.left_out:
            classes = Counter(class_of(row) for row in self.left_out)
            width = max(map(len, classes))
            lines = [f"  {name:{width}}  {number:4}" for name, number in classes.items()]
            title_line = f"left out for lack of time ({len(self.left_out)}), run again to measure them:"
            self.report(Note("\n".join([title_line, *lines])))

    def _take_left_out(self) -> list[Measurement]:
        """What sections left out, for the time that others did not need."""
        rows, self.left_out = self.left_out, []
        return rows

    def _ordered(self, rows: Sequence[Measurement]) -> list[Measurement]:
        return self.raw.missing(sorted(rows, key=self._expected))

    def _expected(self, row: Measurement) -> float:
        if row.kind == "memory":
            return 0.1
        calls = OVERHEAD_CALLS if row.kind != "interference" else 4 * self.settings.effort.min_rounds
        return self.settings.effort.seconds + calls * expected_seconds(row, self.profile)

    def _run_section(self, section: Section, later: float, measure: Measure) -> None:
        expected = [self._expected(row) for row in section.rows]
        end = section.share * self.settings.budget
        for index, row in enumerate(section.rows):
            elapsed = time.monotonic() - self.start
            if elapsed + expected[index] * self.pace > end:
                self.left_out.append(row)
                continue
            rest = min(self.pace * sum(expected[index:]), end - elapsed) + later * self.pace
            remaining = min(rest, self.settings.budget - elapsed)
            self.report(Progress(remaining, title(row), self.done, self.total))
            self._measure_one(row, measure)
            taken = time.monotonic() - self.start - elapsed
            self.pace += MEMORY_OF_PACE * (taken / expected[index] - self.pace)

    def _measure_one(self, row: Measurement, measure: Measure) -> None:
        with self.guard(row):
            result = measure(row)
        self.raw.add([result])
        self.done += 1
        if DEVICE_LOST.match(result.skipped):
            raise InputError(f"calibrate: {title(row)}: {result.skipped}; {KEPT}")
        if result.skipped:
            self.skipped.append(result)
