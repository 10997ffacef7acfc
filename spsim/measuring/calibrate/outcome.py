"""What a fit found: the profile, and how well each class of measurements is described."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from spsim.inputs.hardware import HardwareProfile
from spsim.units import US_PER_S

LIMIT_PERCENT = 20
"""Held-out error above which a class is flagged."""

COLUMNS = ["class", "operator_class", "measured_us", "fitted_us", "held_out_us", "flagged"]

Seconds = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Errors:
    """Absolute errors in percent of the measured time."""

    rows: int
    median: float
    p90: float
    max: float


@dataclass(frozen=True)
class ClassFit:
    """The measurements of one class, the times by the final coefficients, and those found without them."""

    name: str
    coefficients: Mapping[str, str]
    """What was fitted, as text by name; none where the class only checks others."""
    measured: Seconds
    fitted: Seconds
    held_out: Seconds
    """Times by coefficients from other shapes; not a number where there were too few to leave some out."""
    paths: tuple[str, ...]
    """Dotted paths of the coefficients that were fitted on it."""
    operators: tuple[str, ...] = ()
    """What each measurement is of."""
    operator_class: str = ""
    """Where the name does not begin with it: of one kernel, or of the others of a class."""

    @cached_property
    def operator_times(self) -> dict[str, float]:
        """Median of measured over fitted time by operator, slowest first: whether one description serves all."""
        ratios = self.measured / self.fitted
        names = np.array(self.operators)
        medians = {name: float(np.median(ratios[names == name])) for name in dict.fromkeys(self.operators)}
        return dict(sorted(medians.items(), key=lambda item: -item[1]))

    @cached_property
    def errors(self) -> Errors | None:
        """Held-out errors; None where nothing was held out."""
        ratio = self.held_out / self.measured
        errors = 100 * np.abs(ratio[np.isfinite(ratio)] - 1)
        if not len(errors):
            return None
        median, p90 = np.percentile(errors, (50, 90))
        return Errors(len(errors), float(median), float(p90), float(errors.max()))

    @property
    def mean_error(self) -> float:
        """Mean size of the logarithm of held-out over measured; not a number where nothing was held out."""
        return mean_error([self])

    @property
    def flagged(self) -> bool:
        """Whether more than one in ten held-out measurements is off by more than the limit."""
        return self.errors is not None and self.errors.p90 > LIMIT_PERCENT

    def provenance(self, source: str) -> dict[str, Any]:
        """Source, held-out error and flag of its coefficients; the error is the 90th percentile."""
        if self.errors is None:
            return {"source": source, "held_out_error_percent": None, "flagged": False}
        return {
            "source": source, "held_out_error_percent": round(self.errors.p90, 1), "flagged": self.flagged
        }  # fmt: skip


def mean_error(classes: Sequence[ClassFit]) -> float:
    """Mean size of the logarithm of held-out over measured time of all their rows; not a number where none was."""
    logs = np.concatenate([np.abs(np.log(fit.held_out / fit.measured)) for fit in classes])
    return float(np.nanmean(logs)) if np.isfinite(logs).any() else float("nan")


@dataclass(frozen=True)
class FittedProfile:
    """A complete profile and the report of its fit."""

    profile: HardwareProfile
    base: str
    """Name of the profile that supplied what was not measured."""
    classes: tuple[ClassFit, ...]
    kept: tuple[str, ...]
    """Dotted paths of the coefficients that come from the base."""
    notes: tuple[str, ...]

    @cached_property
    def frame(self) -> pd.DataFrame:
        """A row a measurement: times in us, and whether its class is flagged."""
        return pd.DataFrame(self._rows(), columns=COLUMNS)

    def _rows(self) -> Iterator[tuple[str, str, float, float, float, bool]]:
        for fit in self.classes:
            for measured, fitted, held_out in US_PER_S * np.array([fit.measured, fit.fitted, fit.held_out]).T:
                yield (
                    fit.name,
                    fit.operator_class or fit.name.split()[0],
                    float(measured),
                    float(fitted),
                    float(held_out),
                    fit.flagged,
                )
