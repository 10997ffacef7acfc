"""Pictures of results and sweeps: functions of their records and tables, and the only user of matplotlib.

Every function returns a `matplotlib.figure.Figure` that no backend knows and a notebook shows; `save` writes it. Of
frames, `plot_step_times` and `plot_peak_memory` take what `spsim.sweep` returns.

Functions are imported when they are first asked for, so that the colours are there without matplotlib.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spsim.plots.calibration import plot_calibration as plot_calibration
    from spsim.plots.collective import plot_collective as plot_collective
    from spsim.plots.figure import save as save
    from spsim.plots.figure import saved as saved
    from spsim.plots.kernels import plot_kernels as plot_kernels
    from spsim.plots.mapping import plot_mapping as plot_mapping
    from spsim.plots.memory import plot_memory as plot_memory
    from spsim.plots.memory import plot_memory_curves as plot_memory_curves
    from spsim.plots.perturbed import plot_perturbed as plot_perturbed
    from spsim.plots.pipeline import plot_pipeline as plot_pipeline
    from spsim.plots.plans import plot_plans as plot_plans
    from spsim.plots.search import plot_front as plot_front
    from spsim.plots.step import plot_steps as plot_steps
    from spsim.plots.sweep import plot_peak_memory as plot_peak_memory
    from spsim.plots.sweep import plot_step_times as plot_step_times
    from spsim.plots.timeline import plot_timeline as plot_timeline
    from spsim.plots.timeline import plot_timelines as plot_timelines
    from spsim.plots.verification import plot_verification as plot_verification
    from spsim.plots.waterfall import Waterfall as Waterfall
    from spsim.plots.waterfall import plot_waterfalls as plot_waterfalls

_HOMES = {
    "Waterfall": "waterfall",
    "plot_calibration": "calibration",
    "plot_collective": "collective",
    "plot_front": "search",
    "plot_kernels": "kernels",
    "plot_mapping": "mapping",
    "plot_memory": "memory",
    "plot_memory_curves": "memory",
    "plot_peak_memory": "sweep",
    "plot_perturbed": "perturbed",
    "plot_pipeline": "pipeline",
    "plot_plans": "plans",
    "plot_step_times": "sweep",
    "plot_steps": "step",
    "plot_timeline": "timeline",
    "plot_timelines": "timeline",
    "plot_verification": "verification",
    "plot_waterfalls": "waterfall",
    "save": "figure",
    "saved": "figure",
}
"""The module of each public name; above they stand for type checkers."""

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'spsim.plots' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"spsim.plots.{_HOMES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
