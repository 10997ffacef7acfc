"""Pictures of results and sweeps: functions of their records and tables, and the only user of matplotlib.

Every function returns a `matplotlib.figure.Figure` that no backend knows; `save` writes it.
"""

from spsim.plots.calibration import plot_calibration
from spsim.plots.figure import save
from spsim.plots.memory import plot_memory, plot_memory_curves
from spsim.plots.pipeline import plot_pipeline
from spsim.plots.search import plot_front
from spsim.plots.step import plot_steps
from spsim.plots.sweep import plot_peak_memory, plot_step_times
from spsim.plots.timeline import plot_timeline, plot_timelines
from spsim.plots.verification import plot_verification
from spsim.plots.waterfall import Waterfall, plot_waterfalls

__all__ = [
    "Waterfall",
    "plot_calibration",
    "plot_front",
    "plot_memory",
    "plot_memory_curves",
    "plot_peak_memory",
    "plot_pipeline",
    "plot_step_times",
    "plot_steps",
    "plot_timeline",
    "plot_timelines",
    "plot_verification",
    "plot_waterfalls",
    "save",
]
