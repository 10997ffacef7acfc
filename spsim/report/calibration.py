"""The report of a calibration: what was fitted, how well, and what the base supplies."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from rich.table import Table

from spsim.report.table import table

if TYPE_CHECKING:
    from spsim.calibrate.outcome import ClassFit, FittedProfile


def calibration_table(fitted: FittedProfile) -> Table:
    """A row a class: measurements, coefficients, and errors on shapes that they were not fitted on."""
    columns = ["class", "rows", "coefficients", "median", "90th percentile", "largest", "flag"]
    made = table(f"Calibration of {fitted.profile.name}: held-out errors", columns, numbers=[columns[1], *columns[3:6]])
    made.columns[0].no_wrap = True
    for one in fitted.classes:
        made.add_row(one.name, str(len(one.measured)), _coefficients(one.coefficients), *_errors(one))
    made.caption = (
        "Errors of the time on shapes (of collectives: sizes) that were left out of the fit, half at a time; the "
        "coefficients are of all rows. A class whose 90th percentile is above 20 % is flagged, as is every result "
        "that uses it"
    )
    made.caption_justify = "left"
    return made


def _errors(one: ClassFit) -> tuple[str, str, str, str]:
    errors = one.errors
    if errors is None:
        return "–", "–", "–", "not checked: too few shapes"
    return (
        f"{errors.median:.1f} %", f"{errors.p90:.1f} %", f"{errors.max:.1f} %", "flagged" if one.flagged else ""
    )  # fmt: skip


def _coefficients(values: Mapping[str, float]) -> str:
    return ", ".join(f"{_short(path)} {value:g}" for path, value in values.items()) or "none: composed of others"


def _short(path: str) -> str:
    """The end of a dotted path, with the head size that it is of."""
    *_, owner, name = ("", *path.split("."))
    return f"{name} at {owner}" if owner.isdecimal() else name


def calibration_lines(fitted: FittedProfile) -> Iterator[str]:
    """What comes from the base, and notes."""
    for note in fitted.notes:
        yield f"note: {note}"
    if fitted.kept:
        yield f"from {fitted.base}, not measured ({len(fitted.kept)}): {', '.join(fitted.kept)}"
    flagged = [one.name for one in fitted.classes if one.flagged]
    if flagged:
        yield f"flagged ({len(flagged)} of {len(fitted.classes)} classes): {', '.join(flagged)}"
