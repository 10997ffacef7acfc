"""The simulation of a traced module: its program through the schedule, the engine and the metrics."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from spsim.costs.static_memory import StaticMemory
from spsim.errors import InputError
from spsim.inputs.hardware import HardwareProfile
from spsim.inputs.plan import Plan
from spsim.inputs.rules import check_nodes, gpus_per_node
from spsim.inputs.scenario import Network
from spsim.inputs.workload import ELEMENT_BYTES, Precision, Workload
from spsim.lazy import lazy
from spsim.program.instructions import LAYER, Compute, Program
from spsim.program.sizes import Template
from spsim.pytorch.modules.allocator import ERROR_PERCENT, reserved_bytes
from spsim.pytorch.modules.costs import kernels
from spsim.pytorch.modules.gradients import Gradients, added, gradient_sizes
from spsim.pytorch.modules.optimizers import MOMENTS, AdamW, OptimizerName
from spsim.pytorch.modules.tape import Tape
from spsim.results.derived import Amounts
from spsim.results.result import Result
from spsim.simulation import assemble
from spsim.step.itinerary import Run
from spsim.step.preparation import PreparedStep
from spsim.units import GIB

PRECISIONS: dict[str, Precision] = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
"""dtype of a module -> precision of a profile; torch computes fp32 products in fp32 unless told otherwise."""


@dataclass(frozen=True)
class TracedShape:
    """What the result of a simulation asks of a model."""

    name: str
    layers: int = 1


@dataclass(frozen=True)
class TracedWorkload:
    """What the result of a simulation asks of a workload."""

    precision: Precision

    def model_dump(self) -> dict[str, Any]:
        """For documents."""
        return {"precision": self.precision}


@dataclass(frozen=True)
class TracedScenario:
    """Stands where a `Scenario` does if a module was traced: one micro-batch of it."""

    hardware: HardwareProfile
    model: TracedShape
    plan: Plan
    workload: TracedWorkload
    inputs: tuple[tuple[int, ...], ...]
    num_micro_batches: int = 1
    network: Network = "closed_form"
    notes: tuple[str, ...] = ()

    @property
    def gpus_per_node(self) -> int:
        """GPUs of each node that the plan uses."""
        return gpus_per_node(self.hardware, self.plan)

    @property
    def summary(self) -> tuple[str, ...]:
        """Shapes of the inputs, ring cut and recomputation, for subtitles."""
        return (*(f"input {' × '.join(map(str, shape))}" for shape in self.inputs), *self.plan.summary)


@dataclass(frozen=True, repr=False)
class TracedResult(Result):
    """What one simulation of a traced module found; a layer is the module."""

    weights: tuple[int, ...] = ()
    """Bytes of each weight of one rank, or of those of each operator."""
    states: tuple[int, ...] = ()
    """Bytes of each state of the optimizer."""

    @lazy
    def peak_reserved_gib(self) -> float:
        """An estimate of what torch's caching allocator reserves for such steps, `reserved_error_percent` off: the
        peak and what lies idle between its blocks.
        """
        kept = self.weights if self.static.gradients else ()
        return reserved_bytes(self.program, (*self.weights, *kept), self.states) / GIB

    @property
    def reserved_error_percent(self) -> float:
        """Half-width of the band of `peak_reserved_gib`."""
        return ERROR_PERCENT

    def to_json(self) -> dict[str, Any]:
        """As of any result, and the estimate of reserved memory."""
        reserved = {name: getattr(self, name) for name in ("peak_reserved_gib", "reserved_error_percent")}
        return {**super().to_json(), **reserved}

    @property
    def forward_s(self) -> float:
        """The forward pass, to the end of its slowest rank."""
        return self.layer_forward_s

    @property
    def backward_s(self) -> float:
        """The backward pass, recomputation included."""
        return self.layer_backward_s


def simulate_program(
    program: Program,
    tape: Tape,
    hardware: HardwareProfile,
    plan: Plan,
    gradients: Gradients,
    optimizer: OptimizerName,
) -> TracedResult:
    """A step, or without an optimizer its passes; weights, gradients and states in the module's dtype.

    Raises `InputError` where the profile lacks the dtype, or a curve that the plan needs.
    """
    scenario = _scenario(tape, hardware, plan)
    itemsize = ELEMENT_BYTES[scenario.workload.precision]
    written = gradient_sizes(program.backward)
    trained = optimizer != "none" and bool(written)
    states = written * MOMENTS if trained else ()
    update = AdamW(program.parameters, sum(written), scenario.workload.precision, gradients) if trained else None
    held = tape.parameter_bytes if plan.gpus == 1 else itemsize * program.parameters
    static = StaticMemory(held, sum(written) if gradients == "kept" else 0, sum(states))
    weights = _weights(program, tape, plan)
    if gradients == "kept" and written:
        program = added(program)
    template = Template(program, 1)
    prepared = PreparedStep(
        template, plan, lambda _: {LAYER: program}, fold=True, gradient_bytes=itemsize, optimizer=update
    )  # fmt: skip
    numbers = template.at(Workload(seq_len=1))
    scope, amounts = "module" if trained else "passes", _amounts(program, tape, plan)
    result = assemble(scope, scenario, prepared, [Run(LAYER)], numbers, amounts, static)
    found = {field.name: getattr(result, field.name) for field in fields(result)}
    return TracedResult(**found, weights=weights, states=states)


def _weights(program: Program, tape: Tape, plan: Plan) -> tuple[int, ...]:
    """Under a plan those of an operator together, which are as large as their gradients."""
    if plan.gpus == 1:
        return tuple(tape.storages[storage] for storage in tape.parameters)
    return tuple(b.bytes for step in program.backward for b in step.writes if b.category == "gradients")


def _amounts(program: Program, tape: Tape, plan: Plan) -> Amounts:
    """FLOPs as torch counts them; as the kernels compute them, half of the square under a causal mask; and with what
    is recomputed, and what the ranks compute each for itself.
    """
    model = sum(call.flops for call in tape.calls)
    causal = sum(work.flops for call in tape.calls for work in kernels(call))
    steps = (step for step in program.instructions if isinstance(step, Compute))
    executed = sum(work.flops for step in steps for work in step.work if work) * plan.gpus
    return Amounts(model, causal, model * executed / causal if causal else 0.0, tokens=None)


def _scenario(tape: Tape, hardware: HardwareProfile, plan: Plan) -> TracedScenario:
    if tape.dtype not in PRECISIONS:
        raise InputError(f"{tape.name}: {tape.dtype} is not simulated; use one of {', '.join(PRECISIONS)}")
    precision = PRECISIONS[tape.dtype]
    hardware.peak(precision)
    inputs = tuple(value.shape for value in tape.inputs)
    scenario = TracedScenario(hardware, TracedShape(tape.name), plan, TracedWorkload(precision), inputs)
    check_nodes(hardware, plan)
    return scenario
