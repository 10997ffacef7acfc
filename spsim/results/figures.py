"""The figures of a result, listed once: what JSON documents, rows of sweeps, reports and validation call them.

A figure is a property of `Result`. Documents use its name; rows of sweeps may have it in another unit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from spsim.units import MIB, MS_PER_S

if TYPE_CHECKING:
    from spsim.results.result import Result


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure: a property of a result, and the column that it is in a table."""

    name: str
    column: str = ""
    """None if it is no column."""
    convert: Callable[[Any], Any] = lambda value: value
    """From the figure to the column."""


def _milliseconds(seconds: float) -> float:
    return seconds * MS_PER_S


FIGURES: tuple[Figure, ...] = (
    Figure("step_time_s", "step_time_ms", _milliseconds),
    Figure("layer_forward_s", "layer_forward_ms", _milliseconds),
    Figure("layer_backward_s", "layer_backward_ms", _milliseconds),
    Figure("exposed_comm_s"),
    Figure("idle_s"),
    Figure("weight_sync_s", "weight_sync_ms", _milliseconds),
    Figure("mfu", "mfu"),
    Figure("mfu_causal"),
    Figure("hfu"),
    Figure("tflops_per_gpu"),
    Figure("tokens_per_s_per_gpu", "tokens_per_s_per_gpu"),
    Figure("peak_memory_gib", "peak_memory_gib"),
    Figure("device_memory_gib", "device_memory_gib"),
    Figure("capacity_gib", "capacity_gib"),
    Figure("fits", "fits"),
    Figure("peak_operator", "peak_operator"),
    Figure("out_of_memory_at", "out_of_memory_at", lambda operator: operator or ""),
    Figure("activation_bytes_per_layer", "activation_mib_per_layer", lambda size: size / MIB),
    Figure("statistics_bytes_per_layer"),
    Figure("comm_bytes_per_gpu_by_op"),
    Figure("collectives_per_layer"),
)
_BY_COLUMN = {figure.column: figure for figure in FIGURES if figure.column}
_BY_NAME = {figure.name: figure for figure in FIGURES}


def documented(result: Result) -> Iterator[tuple[str, Any]]:
    """(name, value) of every figure that the result has."""
    return ((figure.name, getattr(result, figure.name)) for figure in FIGURES if figure.name not in result.unknown)


def column(result: Result, name: str) -> Any:
    """The figure of a column, in its unit, or of a name."""
    if name in _BY_NAME:
        return getattr(result, name)
    figure = _BY_COLUMN[name]
    return figure.convert(getattr(result, figure.name))
