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


def _coefficients(values: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items()) or "none: composed of others"


APART = 1.5
"""Factor between the operators of a flagged class from which they are told."""


def _apart(one: ClassFit) -> Iterator[str]:
    """The slowest and the fastest operator of a class, where one description does not serve both."""
    times = list(one.operator_times.items())
    if times and times[0][1] > APART * times[-1][1]:
        (slow, most), (fast, least) = times[0], times[-1]
        yield f"{one.name}: its operators differ; {slow} takes {most:.2g} and {fast} {least:.2g} of the fitted time"


def calibration_lines(fitted: FittedProfile) -> Iterator[str]:
    """What comes from the base, and notes."""
    for note in fitted.notes:
        yield f"note: {note}"
    if fitted.kept:
        yield f"from {fitted.base}, not measured ({len(fitted.kept)}): {', '.join(fitted.kept)}"
    yield from (line for one in fitted.classes if one.flagged for line in _apart(one))
    flagged = [one.name for one in fitted.classes if one.flagged]
    if flagged:
        yield f"flagged ({len(flagged)} of {len(fitted.classes)} classes): {', '.join(flagged)}"
