"""Rows of a sweep: what one configuration came to, or why it could not be simulated."""

from __future__ import annotations

from typing import Any

import numpy as np

from spsim.errors import InputError
from spsim.inputs.scenario import scenario_from
from spsim.program.operators import OPERATOR_CLASSES
from spsim.results.columns import ResultColumns
from spsim.results.result import Result
from spsim.simulation import simulate
from spsim.studies.points import Point
from spsim.units import MIB, PS_PER_MS

Row = dict[str, Any]


def row(point: Point) -> Row:
    """The row of one configuration; one that breaks a rule has its reason in `error` and no numbers."""
    try:
        result = simulate(scenario_from(point.settings, "point"))
    except InputError as error:
        return {**point.labels, "error": str(error)}
    return {**point.labels, **measures(result), **point.labels, "error": ""}


def measures(result: Result | ResultColumns) -> Row:
    """The columns of a result, each one value, or an array of those of many workloads; times are of one layer and
    micro-batch unless the name says otherwise.
    """
    scenario = result.scenario
    instances = scenario.model.layers * scenario.num_micro_batches
    forward_s, backward_s = result.layer_forward_s, result.layer_backward_s
    compute = result.compute_ps
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
        "layer_time_ms": (forward_s + backward_s) * 1e3,
        "layer_forward_ms": forward_s * 1e3,
        "layer_backward_ms": backward_s * 1e3,
        "exposed_comm_ms": result.exposed_comm_s * 1e3 / instances,
        **{f"{name}_ms": compute.get(name, 0) / PS_PER_MS / instances for name in OPERATOR_CLASSES},
        "step_time_ms": result.step_time_s * 1e3,
        "weight_sync_ms": result.weight_sync_s * 1e3,
        "mfu": result.mfu,
        "tokens_per_s_per_gpu": result.tokens_per_s_per_gpu,
        "activation_mib_per_layer": result.activation_bytes_per_layer / MIB,
        "peak_memory_gib": result.peak_memory_gib,
        "device_memory_gib": result.device_memory_gib,
        "capacity_gib": result.capacity_gib,
        "fits": result.fits,
        "peak_operator": result.peak_operator,
        "out_of_memory_at": _text(result.out_of_memory_at),
        **_calibration(result),
    }


def _text(operators: Any) -> Any:
    """Empty where there is none."""
    if isinstance(operators, np.ndarray):
        return np.where(operators.astype(bool), operators, "")
    return operators or ""


def _calibration(result: Result | ResultColumns) -> dict[str, Any]:
    """The error band and flags, where a calibration wrote the profile."""
    band = {} if result.error_band is None else {"step_time_error_percent": result.error_band.step_time_percent}
    return {**band, "flagged": ", ".join(result.flagged)} if band or result.flagged else {}
