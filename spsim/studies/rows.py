"""Rows of a sweep: what one configuration came to, or why it could not be simulated."""

from __future__ import annotations

from typing import Any

from spsim.errors import InputError
from spsim.inputs.scenario import scenario_from
from spsim.results.columns import ResultColumns
from spsim.results.figures import columns
from spsim.results.result import Result
from spsim.simulation import simulate
from spsim.studies.points import Point

Row = dict[str, Any]


def row(point: Point) -> Row:
    """The row of one configuration; one that breaks a rule has its reason in `error` and no numbers."""
    try:
        result = simulate(scenario_from(point.settings, "point"))
    except InputError as error:
        return {**point.labels, "error": str(error)}
    return {**point.labels, **measures(result), **point.labels, "error": ""}


def measures(result: Result | ResultColumns) -> Row:
    """The columns of a result, each one value, or an array of those of many workloads."""
    scenario = result.scenario
    return {
        "model": scenario.model.name,
        "hardware": scenario.hardware.name,
        "strategy": scenario.plan.label,
        "plan": scenario.plan.text,
        "seq_len": scenario.workload.seq_len,
        "micro_batch": scenario.workload.micro_batch,
        "gpus": scenario.plan.gpus,
        "scope": result.scope,
        "layers": scenario.model.layers,
        **columns(result),
        **_calibration(result),
    }


def _calibration(result: Result | ResultColumns) -> dict[str, Any]:
    """The error band and flags, where a calibration wrote the profile."""
    band = {} if result.error_band is None else {"step_time_error_percent": result.error_band.step_time_percent}
    return {**band, "flagged": ", ".join(result.flagged)} if band or result.flagged else {}
