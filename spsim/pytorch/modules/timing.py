"""The simulation of a traced module: its program through the schedule, the engine and the metrics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, cast

from spsim.costs.models import cost_models
from spsim.costs.static_memory import StaticMemory
from spsim.engine.recording import TaskInfo
from spsim.engine.trace import Piece, Trace
from spsim.errors import InputError
from spsim.inputs.hardware import HardwareProfile
from spsim.inputs.plan import Plan
from spsim.inputs.rules import check_nodes, gpus_per_node
from spsim.inputs.scenario import Scenario
from spsim.inputs.workload import ELEMENT_BYTES, Precision, Workload
from spsim.program.instructions import Compute, Program
from spsim.program.sizes import Template
from spsim.pytorch.modules.costs import kernels
from spsim.pytorch.modules.tape import Tape
from spsim.results.result import Result
from spsim.step.folding import OUTLASTS, Step, run_step
from spsim.step.preparation import PreparedLayer
from spsim.step.schedule import task_info
from spsim.units import MS_PER_S

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


@dataclass(frozen=True)
class TracedScenario:
    """Stands for a `Scenario` where a module was traced: one pass of it, one micro-batch."""

    hardware: HardwareProfile
    model: TracedShape
    plan: Plan
    workload: TracedWorkload
    inputs: tuple[tuple[int, ...], ...]
    nodes: int | None = None
    num_micro_batches: int = 1
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

    compiled: Program
    tape: Tape

    def __repr__(self) -> str:
        where = f"{self.scenario.hardware.name}, {self.scenario.plan.gpus} GPUs"
        return f"TracedResult({self.scenario.model.name} on {where}: {self.step_time_s * MS_PER_S:.3f} ms)"

    @cached_property
    def program(self) -> Program:
        """The module under the plan."""
        return self.compiled

    @property
    def forward_s(self) -> float:
        """The forward pass, to the end of its slowest rank."""
        return self.layer_forward_s

    @property
    def backward_s(self) -> float:
        """The backward pass, recomputation included."""
        return self.layer_backward_s

    @cached_property
    def _model_rate(self) -> float:
        return self._rate(sum(call.flops for call in self.tape.calls))

    @cached_property
    def _kernel_flops(self) -> int:
        """As the kernels compute them: half of the square under a causal mask."""
        return sum(work.flops for call in self.tape.calls for work in kernels(call))

    @property
    def mfu_causal(self) -> float:
        """FLOPs utilisation, counting the half of the square that a causal mask leaves."""
        return self._rate(self._kernel_flops) / self._peak

    @property
    def hfu(self) -> float:
        """Hardware FLOPs utilisation: what is recomputed counts, and what the ranks compute each for itself."""
        steps = (step for step in self.compiled.instructions if isinstance(step, Compute))
        executed = sum(work.flops for step in steps for work in step.work if work) * self.scenario.plan.gpus
        return self.mfu * executed / self._kernel_flops

    @property
    def tokens_per_s_per_gpu(self) -> float:
        """Not known: a module has inputs, not tokens."""
        raise InputError("tokens_per_s_per_gpu: a traced module does not say what a token is; use step_time_s")

    def to_json(self) -> dict[str, Any]:
        """The numbers of the result by name."""
        names = (
            "step_time_s", "layer_forward_s", "layer_backward_s", "exposed_comm_s", "weight_sync_s", "mfu", "hfu",
            "tflops_per_gpu", "peak_memory_gib", "device_memory_gib", "capacity_gib", "fits", "peak_operator",
            "out_of_memory_at", "activation_bytes_per_layer", "comm_bytes_per_gpu_by_op", "collectives_per_layer",
        )  # fmt: skip
        scenario = self.scenario
        return {
            "scope": "module",
            "hardware": scenario.hardware.name,
            "model": scenario.model.name,
            "plan": scenario.plan.model_dump(),
            "gpus": scenario.plan.gpus,
            **{name: getattr(self, name) for name in names},
            "assumed": list(self.assumed),
        }


def simulate_program(program: Program, tape: Tape, hardware: HardwareProfile, plan: Plan) -> TracedResult:
    """One forward and backward pass; weights and gradients in the module's dtype, and no optimizer.

    Raises `InputError` where the profile lacks the dtype, or a curve that the plan needs.
    """
    scenario = _scenario(tape, hardware, plan)
    precision = scenario.workload.precision
    layer = PreparedLayer(Template(program, 1), plan, fold=True)
    syncs = (replace(sync, itemsize=ELEMENT_BYTES[precision]) for sync in layer.schedule.syncs)
    layer.schedule = replace(layer.schedule, syncs=tuple(syncs))
    numbers = layer.template.at(Workload(seq_len=1))
    messages = layer.sync_messages(numbers, 1)
    compute, comm = cost_models(hardware, precision)
    step = Step(
        layer.schedule,
        layer.durations(numbers, compute, comm, gpus_per_node=scenario.gpus_per_node, sync_messages=messages),
        layer.sizes(numbers),
        layers=1, micro_batches=1, slowdown=hardware.coefficients.overlap_slowdown.value,
    )  # fmt: skip
    stretches, events, reason = run_step(step, fold=True)

    def describe(piece: Piece) -> Sequence[TaskInfo]:
        if piece.phase == "weight_sync":
            return [sync.info(message) for sync, message in zip(layer.schedule.syncs, messages, strict=True)]
        steps = program.forward if piece.phase == "forward" else program.backward
        return [task_info(step, piece.layer, piece.micro_batch) for step in steps]

    copies = layer.schedule.copies
    return TracedResult(
        scenario=cast("Scenario", scenario), numbers=numbers,
        trace=Trace(stretches, copies, describe, layer.schedule.groups, reason == OUTLASTS),
        static=_static(program, tape, plan, ELEMENT_BYTES[precision]),
        events=events, folded=len(copies) < plan.gpus, reasons=(reason,) if reason else (),
        compiled=program, tape=tape,
    )  # fmt: skip


def _scenario(tape: Tape, hardware: HardwareProfile, plan: Plan) -> TracedScenario:
    if tape.dtype not in PRECISIONS:
        raise InputError(f"{tape.name}: {tape.dtype} is not simulated; use one of {', '.join(PRECISIONS)}")
    precision = PRECISIONS[tape.dtype]
    hardware.peak(precision)
    inputs = tuple(value.shape for value in tape.inputs)
    scenario = TracedScenario(hardware, TracedShape(tape.name), plan, TracedWorkload(precision), inputs)
    check_nodes(hardware, plan)
    return scenario


def _static(program: Program, tape: Tape, plan: Plan, itemsize: int) -> StaticMemory:
    """Weights and gradients of one rank, in the dtype of the module; a module has no optimizer."""
    if plan.gpus == 1:
        return StaticMemory(tape.parameter_bytes, tape.gradient_bytes, 0)
    return StaticMemory(itemsize * program.parameters, itemsize * program.parameters, 0)
