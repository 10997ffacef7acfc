"""spsim: a discrete-event simulator of multi-GPU sequence parallelism for transformers.

Public names are imported when they are first asked for: the command line starts by answering interrupts, and must
get to it before numpy and pandas are loaded.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spsim import plots as plots
    from spsim.errors import InputError as InputError
    from spsim.inputs.hardware import HardwareProfile as HardwareProfile
    from spsim.inputs.launch.emission import emit as emit
    from spsim.inputs.launch.reading import read_launch as read_launch
    from spsim.inputs.model import Model as Model
    from spsim.inputs.plan import Plan as Plan
    from spsim.inputs.presets import load_model as load_model
    from spsim.inputs.profiles import load_profile as load_profile
    from spsim.inputs.scenario import Scenario as Scenario
    from spsim.inputs.workload import Workload as Workload
    from spsim.pytorch.kineto import load_kineto_trace as load_kineto_trace
    from spsim.pytorch.modules import trace_module as trace_module
    from spsim.results.measured import MeasuredSpan as MeasuredSpan
    from spsim.results.measured import measured_trace as measured_trace
    from spsim.results.result import Result as Result
    from spsim.simulation import simulate as simulate
    from spsim.studies.collectives import collective as collective
    from spsim.studies.comparison import compare as compare
    from spsim.studies.experiment import Experiment as Experiment
    from spsim.studies.explanation import explain as explain
    from spsim.studies.perturbation import perturb as perturb
    from spsim.studies.points import Point as Point
    from spsim.studies.search.search import plan_search as plan_search
    from spsim.studies.sweeps import sweep as sweep

    __version__: str

_HOMES = {
    "Experiment": "studies.experiment",
    "HardwareProfile": "inputs.hardware",
    "InputError": "errors",
    "MeasuredSpan": "results.measured",
    "Model": "inputs.model",
    "Plan": "inputs.plan",
    "Point": "studies.points",
    "Result": "results.result",
    "Scenario": "inputs.scenario",
    "Workload": "inputs.workload",
    "collective": "studies.collectives",
    "compare": "studies.comparison",
    "emit": "inputs.launch.emission",
    "explain": "studies.explanation",
    "load_kineto_trace": "pytorch.kineto",
    "load_model": "inputs.presets",
    "load_profile": "inputs.profiles",
    "measured_trace": "results.measured",
    "perturb": "studies.perturbation",
    "plan_search": "studies.search.search",
    "read_launch": "inputs.launch.reading",
    "simulate": "simulation",
    "sweep": "studies.sweeps",
    "trace_module": "pytorch.modules",
}
"""The module of each public name; above they stand for type checkers."""

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("spsim")
    if name == "plots":  # a package whose functions are public; importing it binds its name here
        return import_module("spsim.plots")
    if name not in _HOMES:
        raise AttributeError(f"module 'spsim' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"spsim.{_HOMES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "plots"})
