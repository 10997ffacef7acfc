"""spsim: a discrete-event simulator of multi-GPU sequence parallelism for transformers."""

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
