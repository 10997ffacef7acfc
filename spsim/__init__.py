"""spsim: a discrete-event simulator of multi-GPU sequence parallelism for transformers.

Public names are imported when they are first asked for: the command line starts by answering interrupts, and must
get to it before numpy and pandas are loaded.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spsim.errors import InputError
    from spsim.hardware import HardwareProfile
    from spsim.kineto import load_kineto_trace
    from spsim.measured import MeasuredSpan, measured_trace
    from spsim.model import Model, load_model
    from spsim.plan import Plan
    from spsim.profiles import load_profile
    from spsim.scenario import Scenario
    from spsim.simulation import Result, simulate
    from spsim.sweeps import Experiment, Point, sweep
    from spsim.torch_modules import trace_module
    from spsim.workload import Workload

__all__ = [
    "Experiment",
    "HardwareProfile",
    "InputError",
    "MeasuredSpan",
    "Model",
    "Plan",
    "Point",
    "Result",
    "Scenario",
    "Workload",
    "load_kineto_trace",
    "load_model",
    "load_profile",
    "measured_trace",
    "simulate",
    "sweep",
    "trace_module",
]

_HOMES = {
    "errors": ("InputError",),
    "hardware": ("HardwareProfile",),
    "kineto": ("load_kineto_trace",),
    "measured": ("MeasuredSpan", "measured_trace"),
    "model": ("Model", "load_model"),
    "plan": ("Plan",),
    "profiles": ("load_profile",),
    "scenario": ("Scenario",),
    "simulation": ("Result", "simulate"),
    "sweeps": ("Experiment", "Point", "sweep"),
    "torch_modules": ("trace_module",),
    "workload": ("Workload",),
}
"""The module of each public name."""


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            value = globals()[name] = getattr(import_module(f"spsim.{home}"), name)
            return value
    raise AttributeError(f"module 'spsim' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
