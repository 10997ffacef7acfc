"""Rows of a sweep: what one configuration came to, or why it could not be simulated."""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from spsim.errors import InputError, one_line
from spsim.inputs.hardware import HardwareProfile
from spsim.inputs.model import Model
from spsim.inputs.plan import Plan, parse_plan
from spsim.inputs.presets import load_model, model_of
from spsim.inputs.profiles import load_profile
from spsim.inputs.scenario import scenario_from
from spsim.inputs.workload import Workload
from spsim.results.columns import ResultColumns
from spsim.results.figures import columns
from spsim.results.joined import JoinedColumns
from spsim.results.result import Result
from spsim.simulation import simulate
from spsim.studies.points import Point, Settings

Row = dict[str, Any]

DEFECT = "spsim failed: "
"""How the reason of a row begins that is no fault of its settings; such rows are computed again."""


def row(point: Point) -> Row:
    """The row of one configuration; one that breaks a rule has its settings, its reason in `error` and no numbers."""
    try:
        result = simulate(scenario_from(point.settings, "point"))
    except Exception as error:  # one row, whatever is wrong with it, ends no sweep
        return failed(point, error)
    return {**point.labels, **measures(result), **point.labels, "error": ""}


def failed(point: Point, error: Exception) -> Row:
    """The row of a configuration that could not be simulated."""
    reason = str(error) if isinstance(error, InputError) else f"{DEFECT}{_described(error)}"
    return {**point.labels, **dict(_given(point.settings)), **point.labels, "error": reason}


def _described(error: Exception) -> str:
    place = traceback.extract_tb(error.__traceback__)[-1]
    return one_line(f"{type(error).__name__}: {error} ({Path(place.filename).name}:{place.lineno})")


def _given(settings: Settings) -> Iterator[tuple[str, Any]]:
    """The columns that settings have by themselves, as far as they can be read."""
    hardware, model, plan = (settings.get(name) for name in ("hardware", "model", "plan"))
    with suppress(Exception):
        hardware = load_profile(hardware) if isinstance(hardware, str | Path) else hardware
    with suppress(Exception):
        model = model_of(model) if isinstance(model, Mapping) else load_model(model) if model else model
    with suppress(Exception):
        plan = parse_plan(plan or "") if isinstance(plan, str | None) else plan
        plan = Plan.of_table(plan) if isinstance(plan, Mapping) else plan
    yield "model", model.name if isinstance(model, Model) else _text(model)
    yield "hardware", hardware.name if isinstance(hardware, HardwareProfile) else _text(hardware)
    if isinstance(plan, Plan):
        yield from (("strategy", plan.label), ("plan", plan.text))
    else:
        yield "plan", _text(plan)
    workload = settings.get("workload")
    sizes = workload.model_dump() if isinstance(workload, Workload) else workload
    for name, usual in (("seq_len", None), ("micro_batch", 1)):
        size = sizes.get(name, usual) if isinstance(sizes, Mapping) else None
        if type(size) is int:
            yield name, size
    if isinstance(plan, Plan):
        yield "gpus", plan.gpus
    if isinstance(model, Model):
        yield "layers", model.layers


def _text(value: Any) -> str:
    return "" if value is None else one_line(str(value))


def measures(result: Result | ResultColumns | JoinedColumns) -> Row:
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


def _calibration(result: Result | ResultColumns | JoinedColumns) -> dict[str, Any]:
    """The error band and flags, where a calibration wrote the profile."""
    band = {} if result.error_band is None else {"step_time_error_percent": result.error_band.step_time_percent}
    return {**band, "flagged": ", ".join(result.flagged)} if band or result.flagged else {}
