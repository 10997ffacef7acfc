"""The report of a calibration: what was fitted, how well, and what the base supplies."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, get_args

from rich.table import Table

from spsim.report.table import table
from spsim.work import MemoryBoundClass

if TYPE_CHECKING:
    from spsim.measuring.calibrate.outcome import ClassFit, FittedProfile


NOT_CHECKED = "not checked"
"""Instead of a flag, where too few shapes were measured to leave some out."""
WORDS = {
    "kernel_overhead_us": "start of a kernel {} us",
    "start_us": "start {} us",
    "weight_gradient_rate": "rate of the weight gradient {} of forward",
    "accumulation_exposed": "{} times the traffic of gradient accumulation added",
    "accumulation_half_k": "half of it hidden at K {}",
    "k_pad_bytes": "{} bytes of K for the prologue and epilogue of a tile",
    "full_rate_side": "full rate from square tiles of {} on",
    "burst_limit": "at most {} in a burst",
    "fraction": "fraction of peak {}",
    "block_us": "{} us of a block beside its loop",
    "block_tokens": "block of {} tokens under the causal mask",
    "traffic_exposed": "{} times the time of memory traffic added",
    "lone_rate": "{} of a unit's rate by one block alone",
    "rate": "{} times that rate where keys are split",
    "join_us": "{} us to join the parts",
    "join_traffic": "{} times the traffic of the parts",
    "block_gb_per_s": "{} GB/s read by one block",
    **dict.fromkeys(get_args(MemoryBoundClass), "fraction of the memory bandwidth {}"),
}
"""What a coefficient is called beside its number."""


def calibration_table(fitted: FittedProfile) -> Table:
    """A row a class: the number of measurements, and errors on shapes that its coefficients were not fitted on."""
    columns = ["class", "rows", "median", "p90", "largest", "flag"]
    made = table(f"Calibration of {fitted.profile.name}: held-out errors", columns, numbers=columns[1:5])
    made.columns[0].no_wrap = True
    for one in fitted.classes:
        made.add_row(one.name, str(len(one.measured)), *_errors(one))
    made.caption = (
        "Errors of the time on shapes (of collectives: sizes) that were left out of the fit, half at a time; p90: "
        "90th percentile. A class whose p90 is above 20 % is flagged, as is every result that uses it"
    )
    if any(one.errors is None for one in fitted.classes):
        made.caption += f". {NOT_CHECKED.capitalize()}: too few shapes"
    made.caption_justify = "left"
    return made


def _errors(one: ClassFit) -> tuple[str, str, str, str]:
    errors = one.errors
    if errors is None:
        return "–", "–", "–", NOT_CHECKED
    return (
        f"{errors.median:.1f} %", f"{errors.p90:.1f} %", f"{errors.max:.1f} %", "flagged" if one.flagged else ""
    )  # fmt: skip


def rates_table(fitted: FittedProfile) -> Table | None:
    """A row for each type, direction and row length of kernels with rates of their own; None where there are none."""
    measured = ["memory, GB/s", "cache, GB/s", "start, us"]
    made = table(
        "Rates of single kernels", ["kernel", "type", "direction", "row", *measured], numbers=["row", *measured]
    )
    for one in fitted.classes:
        for dtype, name, row in _rates(one):
            path = f"row_rates.{dtype}.{name}.{row}" if row else f"kernel_rates.{dtype}.{name}"
            rates = _at(fitted.profile.coefficients, path)
            numbers = (rates.memory_gb_per_s, rates.cache_gb_per_s, rates.start_us)
            shown = (f"{number.value:g}" if number else "–" for number in numbers)
            made.add_row(one.name, dtype, name.rpartition("_")[2], str(row or "any"), *shown)
    made.caption = "Rates count all traffic of a kernel; start: beyond that of any kernel; row: its length in elements"
    made.caption_justify = "left"
    return made if made.row_count else None


def _at(table: Any, path: str) -> Any:
    for name in path.split("."):
        table = table[name] if isinstance(table, dict) else getattr(table, name)
    return table


def _rates(one: ClassFit) -> list[tuple[str, str, int]]:
    """Type, pass and row length (0: any) of each table of rates that was fitted on a class."""
    parts = (path.split(".") for path in one.paths if path.startswith(("kernel_rates.", "row_rates.")))
    found = {(dtype, name, int(rest[0]) if table == "row_rates" else 0) for table, dtype, name, *rest in parts}
    return sorted(found, key=lambda rates: (rates[0], rates[1].endswith("_backward"), rates[2]))


def coefficient_lines(fitted: FittedProfile) -> Iterator[str]:
    """A line a class: its coefficients, of all rows, in words and with their units; rates of kernels are a table."""
    for one in (one for one in fitted.classes if not _rates(one)):
        yield f"{one.name}: {_coefficients(one.coefficients)}"


def _coefficients(values: Mapping[str, str]) -> str:
    """Parts with several figures are divided by semicolons."""
    words = [_in_words(name, value) for name, value in values.items()]
    return ("; " if any(", " in text for text in words) else ", ").join(words) or "composed of those of others"


def _in_words(name: str, value: str) -> str:
    """Such as `fraction of peak 0.876` of `bf16`; what has no such name is a part with figures of its own."""
    base, _, head_size = name.partition(" at ")
    text = WORDS[base].format(value) if base in WORDS else f"{name} {value}"
    return f"{text} (head size {head_size})" if head_size else text


APART = 1.5
"""Factor between the operators of a flagged class from which they are told."""


def _apart(one: ClassFit) -> Iterator[str]:
    """The slowest and the fastest operator of a class, where one description does not serve both."""
    times = list(one.operator_times.items())
    if times and times[0][1] > APART * times[-1][1]:
        (slow, most), (fast, least) = times[0], times[-1]
        yield f"{one.name}: its operators differ; {slow} takes {most:.2g} and {fast} {least:.2g} of the fitted time"


def calibration_lines(fitted: FittedProfile) -> Iterator[str]:
    """Coefficients, notes, what comes from the base, and what is flagged."""
    yield from coefficient_lines(fitted)
    for note in fitted.notes:
        yield f"note: {note}"
    if fitted.kept:
        yield f"from {fitted.base}, not measured ({len(fitted.kept)}): {', '.join(fitted.kept)}"
    yield from (line for one in fitted.classes if one.flagged for line in _apart(one))
    flagged = [one.name for one in fitted.classes if one.flagged]
    if flagged:
        yield f"flagged ({len(flagged)} of {len(fitted.classes)} classes): {', '.join(flagged)}"
