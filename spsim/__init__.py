"""spsim: a discrete-event simulator of multi-GPU sequence parallelism for transformers.

Public names are imported when they are first asked for: the command line starts by answering interrupts, and must
get to it before numpy and pandas are loaded.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spsim.errors import InputError
    from spsim.inputs.hardware import HardwareProfile
    from spsim.inputs.model import Model, load_model
    from spsim.inputs.plan import Plan
    from spsim.inputs.profiles import load_profile
    from spsim.inputs.scenario import Scenario
    from spsim.inputs.workload import Workload
    from spsim.pytorch.kineto import load_kineto_trace
    from spsim.pytorch.modules import trace_module
    from spsim.results.measured import MeasuredSpan, measured_trace
    from spsim.results.result import Result
    from spsim.simulation import simulate
    from spsim.studies.experiment import Experiment
    from spsim.studies.points import Point
    from spsim.studies.sweeps import sweep

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
    "inputs.hardware": ("HardwareProfile",),
    "pytorch.kineto": ("load_kineto_trace",),
    "results.measured": ("MeasuredSpan", "measured_trace"),
    "inputs.model": ("Model", "load_model"),
    "inputs.plan": ("Plan",),
    "inputs.profiles": ("load_profile",),
    "inputs.scenario": ("Scenario",),
    "results.result": ("Result",),
    "simulation": ("simulate",),
    "studies.experiment": ("Experiment",),
    "studies.points": ("Point",),
    "studies.sweeps": ("sweep",),
    "pytorch.modules": ("trace_module",),
    "inputs.workload": ("Workload",),
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
