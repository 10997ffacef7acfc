"""Published measurements against predictions, one row per measured value.

The columns of a measured case: a label and a family; hardware by profile name; the dimensions of the model;
the plan; the workload; the metric with its unit in the name; the measured value. `docs/validation.md` says
what each means. Nothing here knows a case by name.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from spsim.errors import InputError, first_problem
from spsim.inputs.configuration import Name
from spsim.inputs.csvrows import csv_rows
from spsim.inputs.hardware import HardwareProfile
from spsim.inputs.model import Model
from spsim.inputs.plan import Plan
from spsim.inputs.profiles import load_profile
from spsim.inputs.resources import measured_cases, read_text
from spsim.inputs.scenario import Scenario
from spsim.inputs.workload import Workload
from spsim.results.figures import measurable
from spsim.results.result import Result
from spsim.simulation import simulate

Results = dict[tuple[HardwareProfile, Model, Plan, Workload], Result]
Metric = Literal["step_time_s", "layer_forward_ms", "layer_backward_ms", "peak_memory_gib"]

PENDING: frozenset[str] = frozenset({"step_time_s", "peak_memory_gib"})
"""Metrics of a whole step, which is not simulated yet: embedding, head, loss and optimizer are missing."""


class MeasuredCase(BaseModel):
    """One row of a file of measured cases; columns that are not named here are notes."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)

    case_id: Name = Field(min_length=1)
    family: Name = Field(min_length=1)
    hardware: str
    model: str
    layers: int
    hidden: int
    ffn_hidden: int
    heads: int
    kv_heads: int
    vocab: int
    gated_mlp: bool
    norm: Literal["layernorm", "rmsnorm"]
    attention: Literal["flash", "unfused"]
    dropout: float
    seq_len: int
    micro_batch: int
    global_batch: int
    tp: int
    sequence_parallel: bool
    ulysses: int
    ring: int
    pp: int
    virtual_pp: int
    dp: int
    gpus: int
    distributed_optimizer: bool
    recompute: Literal["none", "selective", "full"]
    precision: Literal["fp16", "bf16", "fp8"]
    tp_backward_overlap: bool
    tp_overlap: bool
    dp_overlap: bool
    metric: Metric
    measured: float = Field(gt=0)

    @field_validator("norm", mode="before")
    @classmethod
    def _lower_case(cls, value: Any) -> Any:
        return value.lower() if isinstance(value, str) else value

    def scenario(self) -> Scenario:
        """The scenario of the row; `InputError` where it cannot be simulated."""
        plan = Plan(**self._settings(Plan))
        if plan.gpus != self.gpus:
            raise InputError(f"gpus = {self.gpus} is not the product of the degrees, {plan.gpus}; correct one")
        return Scenario(
            hardware=load_profile(self.hardware),
            model=Model(name=self.model, **self._settings(Model)),
            plan=plan,
            workload=Workload(**self._settings(Workload)),
        )

    def _settings(self, kind: type[BaseModel]) -> dict[str, Any]:
        return {key: value for key, value in self.model_dump().items() if key in kind.model_fields and key != "name"}


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


def load_cases(path: Path | None = None) -> list[MeasuredCase]:
    """The measured cases of a CSV file, by default the shipped one; `InputError` names line and column."""
    where = path or measured_cases()
    columns, rows = csv_rows(read_text(where), where)
    missing = [name for name in MeasuredCase.model_fields if name not in columns]
    if missing:
        raise InputError(f"{where}: column {missing[0]!r} is missing; a measured case needs it")
    cases = []
    for line, row in rows:
        try:
            cases.append(MeasuredCase.model_validate(row))
        except ValidationError as error:
            raise first_problem(error, f"{where}: line {line}") from None
    if not cases:
        raise InputError(f"{where}: no measured cases; give at least one row below the header")
    return cases


def validate(cases: Sequence[MeasuredCase]) -> Validation:
    """Predict every case; rows of one configuration share a simulation."""
    results: Results = {}
    comparisons = tuple(_compare(case, results) for case in cases)
    return Validation(
        comparisons,
        dict(_errors_by_family(c for c in comparisons if not c.fitted)),
        dict(_errors_by_family(c for c in comparisons if c.fitted)),
    )


def _compare(case: MeasuredCase, results: Results) -> Comparison:
    fitted = False
    try:
        if case.metric in PENDING:
            load_profile(case.hardware)
            raise InputError(f"{case.metric} of a whole step: not simulated yet")
        result = _result(case, results)
        fitted = case.case_id in result.scenario.hardware.fitted_on
        predicted = measurable(result, case.metric)
    except InputError as error:
        return Comparison(case.case_id, case.family, case.metric, case.measured, None, None, fitted, str(error))
    percent = 100 * (predicted / case.measured - 1)
    return Comparison(case.case_id, case.family, case.metric, case.measured, predicted, percent, fitted, None)


def _result(case: MeasuredCase, results: Results) -> Result:
    scenario = case.scenario()
    key = (scenario.hardware, scenario.model, scenario.plan, scenario.workload)
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
