"""The figures of a result, listed once: what documents, rows of sweeps and validation call them and how they read them.

A figure is a property of a result; documents call it by that name. A row may have it as a column, in another unit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from spsim.program.blocks.transformer import LAYER_CLASSES
from spsim.results.derived import SERVED
from spsim.units import MIB, MS_PER_S, PS_PER_MS

if TYPE_CHECKING:
    from spsim.results.derived import Derived
    from spsim.results.result import Result


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure: a property of a result, and the column that it is in a row."""

    name: str
    column: str = ""
    """Empty if it is no column."""
    of: Callable[[Any, Any], Any] = lambda value, _: value
    """The value of the column, from the figure and the number of passes of layers in a step."""
    documented: bool = True
    served: bool = False
    """Whether inference alone has it."""


def _milliseconds(seconds: Any, _: Any) -> Any:
    return seconds * MS_PER_S


def _of_a_layer(seconds: Any, instances: Any) -> Any:
    return seconds * MS_PER_S / instances


def _mebibytes(size: Any, _: Any) -> Any:
    return size / MIB


def _operator(name: Any, _: Any) -> Any:
    """Empty where there is none; also of an array of names."""
    if not hasattr(name, "astype"):
        return name or ""
    name = name.copy()
    name[~name.astype(bool)] = ""
    return name


FIGURES: tuple[Figure, ...] = (
    Figure("layer_time_s", "layer_time_ms", _milliseconds, documented=False),
    Figure("layer_forward_s", "layer_forward_ms", _milliseconds),
    Figure("layer_backward_s", "layer_backward_ms", _milliseconds),
    Figure("exposed_comm_s", "exposed_comm_ms", _of_a_layer),
    Figure("idle_s"),
    *(
        Figure(f"compute_ps.{name}", f"{name}_ms", lambda ps, instances: ps / PS_PER_MS / instances, documented=False)
        for name in LAYER_CLASSES
    ),
    Figure("step_time_s", "step_time_ms", _milliseconds),
    Figure("ttft_s", "ttft_ms", _milliseconds, served=True),
    Figure("tpot_s", "tpot_ms", _milliseconds, served=True),
    Figure("weight_sync_s", "weight_sync_ms", _milliseconds),
    Figure("optimizer_s", "optimizer_ms", _milliseconds),
    Figure("bubble", "bubble"),
    Figure("mfu", "mfu"),
    Figure("mfu_causal"),
    Figure("hfu"),
    Figure("tflops_per_gpu"),
    Figure("tokens_per_s_per_gpu", "tokens_per_s_per_gpu"),
    Figure("activation_bytes_per_layer", "activation_mib_per_layer", _mebibytes),
    Figure("statistics_bytes_per_layer"),
    Figure("peak_memory_gib", "peak_memory_gib"),
    Figure("device_memory_gib", "device_memory_gib"),
    Figure("capacity_gib", "capacity_gib"),
    Figure("kv_cache_gib", "kv_cache_gib", served=True),
    Figure("largest_micro_batch", "largest_micro_batch", served=True),
    Figure("fits", "fits"),
    Figure("peak_operator", "peak_operator"),
    Figure("out_of_memory_at", "out_of_memory_at", _operator),
    Figure("comm_bytes_per_gpu_by_op"),
    Figure("collectives_per_layer"),
)
"""In the order of the columns of a row."""
OF_TRAINING = frozenset({
    "layer_backward_s", "weight_sync_s", "optimizer_s", "bubble", "hfu", "activation_bytes_per_layer",
    "statistics_bytes_per_layer",
})  # fmt: skip
"""Figures of a backward pass and of what follows it."""
_COLUMNS: Mapping[str, Figure] = {figure.column: figure for figure in FIGURES if figure.column}


def documented(result: Result) -> Iterator[tuple[str, Any]]:
    """(name, value) of every figure that documents have and the result knows."""
    for figure in FIGURES:
        if figure.documented and figure.name not in result.unknown:
            yield figure.name, getattr(result, figure.name)


def columns(result: Derived) -> dict[str, Any]:
    """Column -> value of a result, or array of those of many; times are of one layer and micro-batch unless the name
    says otherwise.
    """
    instances = result.scenario.model.layers * result.scenario.num_micro_batches
    own = {name: figure for name, figure in _COLUMNS.items() if not figure.served or _is_known(result, figure)}
    return {name: figure.of(_value(result, figure.name), instances) for name, figure in own.items()}


def _is_known(result: Derived, figure: Figure) -> bool:
    """Whether a result has a figure of inference."""
    return result.is_served and figure.name not in unknown_in(result.scope)


def unknown_in(scope: str) -> frozenset[str]:
    """Figures that results of a scope do not have."""
    if scope not in SERVED:
        return frozenset(figure.name for figure in FIGURES if figure.served)
    return OF_TRAINING | {"tpot_s" if scope == "prefill" else "ttft_s"}


def measurable(result: Derived, name: str) -> Any:
    """A figure by its name in documents or in rows."""
    figure = _COLUMNS.get(name)
    return _value(result, name) if figure is None else figure.of(_value(result, figure.name), 1)


def _value(result: Derived, name: str) -> Any:
    if "." not in name:
        return getattr(result, name)
    name, _, key = name.partition(".")
    return getattr(result, name).get(key, 0)
