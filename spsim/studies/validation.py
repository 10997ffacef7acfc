"""Published measurements against predictions, and errors by family."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from spsim.errors import InputError
from spsim.results.figures import measurable
from spsim.results.result import Result
from spsim.simulation import simulate
from spsim.studies.measured_cases import MeasuredCase


@dataclass(frozen=True, slots=True)
class Comparison:
    """A measured value and its prediction, or the reason why there is none."""

    case_id: str
    family: str
    metric: str
    measured: float
    predicted: float | None
    error_percent: float | None
    fitted: bool
    skipped: str | None


@dataclass(frozen=True, slots=True)
class Errors:
    """Absolute errors over the rows of a family, in percent."""

    n: int
    mean_abs_error_percent: float
    p90_abs_error_percent: float
    max_abs_error_percent: float


@dataclass(frozen=True, slots=True)
class Validation:
    """All comparisons, and errors by family over the rows that no coefficient was fitted on."""

    cases: tuple[Comparison, ...]
    families: dict[str, Errors]
    fitted: dict[str, Errors]

    def to_json(self) -> dict[str, Any]:
        """The document of `validate --json`."""
        return {
            "cases": [asdict(case) for case in self.cases],
            "families": {name: asdict(errors) for name, errors in self.families.items()},
            "fitted": {name: asdict(errors) for name, errors in self.fitted.items()},
        }


def validate(cases: Sequence[MeasuredCase]) -> Validation:
    """Predict every case; rows of one configuration share a simulation."""
    results: dict[Any, Result] = {}
    comparisons = tuple(_compare(case, results) for case in cases)
    return Validation(
        comparisons,
        dict(_errors_by_family(c for c in comparisons if not c.fitted)),
        dict(_errors_by_family(c for c in comparisons if c.fitted)),
    )


def _compare(case: MeasuredCase, results: dict[Any, Result]) -> Comparison:
    fitted = False
    try:
        result = _result(case, results)
        fitted = case.case_id in result.scenario.hardware.fitted_on
        predicted = measurable(result, case.metric)
    except InputError as error:
        return Comparison(case.case_id, case.family, case.metric, case.measured, None, None, fitted, str(error))
    percent = 100 * (predicted / case.measured - 1)
    return Comparison(case.case_id, case.family, case.metric, case.measured, predicted, percent, fitted, None)


def _result(case: MeasuredCase, results: dict[Any, Result]) -> Result:
    scenario = case.scenario()
    key = (scenario.hardware, scenario.model, scenario.plan, scenario.workload, scenario.scope)
    if key not in results:
        results[key] = simulate(scenario)
    return results[key]


def _errors_by_family(comparisons: Iterable[Comparison]) -> Iterator[tuple[str, Errors]]:
    errors: dict[str, list[float]] = {}
    for comparison in comparisons:
        if comparison.error_percent is not None:
            errors.setdefault(comparison.family, []).append(abs(comparison.error_percent))
    everything = [error for family in errors.values() for error in family]
    for name, values in [*errors.items(), *([("overall", everything)] if everything else [])]:
        yield name, Errors(len(values), float(np.mean(values)), float(np.percentile(values, 90)), max(values))
