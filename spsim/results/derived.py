"""Figures that follow from a few others, by the same formulas for one workload and for many at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from spsim.costs.static_memory import capacity, outside_tensors
from spsim.engine.recording import TaskInfo
from spsim.errors import InputError
from spsim.inputs.hardware import HardwareProfile
from spsim.inputs.plan import Plan
from spsim.inputs.scenario import Network
from spsim.inputs.workload import product_type
from spsim.lazy import lazy
from spsim.program.operators import TensorKind
from spsim.step.preparation import PreparedStep
from spsim.units import GIB, seconds


class Named(Protocol):
    """What a result asks of a model."""

    @property
    def name(self) -> str: ...
    @property
    def layers(self) -> int: ...


class Simulated(Protocol):
    """What a result asks of what was simulated: a `Scenario`, or a traced module on some hardware."""

    @property
    def hardware(self) -> HardwareProfile: ...
    @property
    def model(self) -> Named: ...
    @property
    def plan(self) -> Plan: ...
    @property
    def workload(self) -> Any: ...
    @property
    def network(self) -> Network: ...
    @property
    def num_micro_batches(self) -> int: ...
    @property
    def gpus_per_node(self) -> int: ...
    @property
    def notes(self) -> tuple[str, ...]: ...
    @property
    def summary(self) -> tuple[str, ...]: ...


@dataclass(frozen=True, slots=True)
class Amounts:
    """FLOPs of one micro-batch, all ranks together, and tokens of a step where they are known."""

    model: int
    """Full square of attention, recomputation not counted."""
    causal: int
    """The same with the half of the square that a causal mask leaves."""
    executed: float
    """Full square, and what is recomputed."""
    tokens: int | None


FITS_SCOPE = {
    "step": "the whole step",
    "layers": "layers only: embedding, head and loss are not counted",
    "module": "a step of the module, the states of its optimizer with it",
    "passes": "passes only: optimizer states are not counted",
    "prefill": "weights, the cache of all tokens of the prompt, and a pass",
    "decode": "weights, the cache of all tokens so far, and a pass",
}
"""By scope, what the memory is of that has to fit."""
OVERLAPPING = 0.001
"""Share of the step from which on layers that overlap are spoken of."""
SERVED = ("prefill", "decode")
"""Scopes of inference."""
STATIC = "weights, gradients and optimizer state"
"""What makes a peak that no task makes."""
SERVED_STATIC = "weights and KV cache"
"""The same of inference."""


def operator_name(label: TaskInfo, layer: int | None) -> str:
    """What a task is called where memory is highest or runs out."""
    where = f" of layer {layer}" if layer is not None else ""
    return f"{label.name} ({label.part}){where}"


class Derived:
    """What has times in picoseconds and memory in bytes; where they are arrays, for many workloads, so are its
    figures. Times are in seconds, memory in GiB.
    """

    scope: str
    scenario: Simulated
    prepared: PreparedStep
    amounts: Amounts
    step_ps: int
    pass_ps: Mapping[str, int]
    """Of one layer and micro-batch, forward and backward."""
    exposed_ps: int
    weight_sync_ps: int
    optimizer_ps: int
    compute_ps: Mapping[str, int]
    """Of the compute lane of the first rank, by operator class."""
    peak_bytes: int

    @property
    def always(self) -> str:
        """What is there all the time, and makes a peak that no task makes."""
        return SERVED_STATIC if self.scope in SERVED else STATIC

    @property
    def nodes(self) -> int:
        """Nodes that the GPUs of the plan are spread over."""
        return self.scenario.plan.gpus // self.scenario.gpus_per_node

    # Times

    @property
    def step_time_s(self) -> float:
        """All layers and micro-batches, and the synchronisation of weight gradients."""
        return seconds(self.step_ps)

    @property
    def layer_forward_s(self) -> float:
        """One layer and micro-batch, from its start to the end of its slowest rank."""
        return seconds(self.pass_ps["forward"])

    @property
    def layer_backward_s(self) -> float:
        """The same of its backward pass, recomputation included."""
        return seconds(self.pass_ps["backward"])

    @property
    def layer_time_s(self) -> float:
        """Both."""
        return self.layer_forward_s + self.layer_backward_s

    @property
    def exposed_comm_s(self) -> float:
        """Transfers that no kernel hides, on the rank with most of them; weight synchronisation apart."""
        return seconds(self.exposed_ps)

    @property
    def weight_sync_s(self) -> float:
        """Synchronisation of weight gradients at the end of the step."""
        return seconds(self.weight_sync_ps)

    @property
    def optimizer_s(self) -> float:
        """The optimizer: its kernels, and what ranks agree on between them; 0 of layers alone."""
        return seconds(self.optimizer_ps)

    @property
    def bubble(self) -> float:
        """Share of the step in which ranks have no pass to run until all have run theirs, a mean over ranks, transfers
        apart: with free transfers and equal stages (p - 1) / (v m + p - 1) of the passes, of p stages with v chunks and
        m micro-batches. Narayanan et al. 2021 (arXiv:2104.04473, section 2.2) have it over the ideal time instead,
        (p - 1) / (v m).
        """
        return 0.0

    @property
    def overlap(self) -> str:
        """That neighbouring layers overlap, in words; empty where they do not, and of more than layers."""
        if self.scope in ("step", "module"):
            return ""
        passes = self.scenario.model.layers * self.scenario.num_micro_batches
        more = passes * sum(self.pass_ps.values()) / (self.step_ps - self.weight_sync_ps) - 1
        if more <= OVERLAPPING:
            return ""
        return (
            f"neighbouring layers overlap: {passes} times the layer time is {100 * more:.1f} % more than they take "
            "together; compare steps"
        )

    # Inference

    @property
    def is_served(self) -> bool:
        """Whether it is inference, not training."""
        return self.scope in SERVED

    # Rates

    def _of_step(self, flops: float) -> float:
        return flops * self.scenario.num_micro_batches

    def _rate(self, flops: float) -> float:
        """FLOP/s per GPU for FLOPs counted per micro-batch."""
        return self._of_step(flops) / self.step_time_s / self.scenario.plan.gpus

    @property
    def ideal_s(self) -> float:
        """The FLOPs of `mfu` at the peak of all GPUs."""
        return self._of_step(self.amounts.model) / self.scenario.plan.gpus / self._peak_rate

    @property
    def _peak_rate(self) -> float:
        return self.scenario.hardware.peak(product_type(self.scenario.workload.precision))

    @property
    def tflops_per_gpu(self) -> float:
        """Model TFLOP/s of one GPU, full square of attention, recomputation not counted."""
        return self._rate(self.amounts.model) / 1e12

    @property
    def mfu(self) -> float:
        """Model FLOPs utilisation by the published formula (full square)."""
        return self._rate(self.amounts.model) / self._peak_rate

    @property
    def mfu_causal(self) -> float:
        """The same, counting the half of the square that a causal mask leaves."""
        return self._rate(self.amounts.causal) / self._peak_rate

    @property
    def hfu(self) -> float:
        """Hardware FLOPs utilisation: what is recomputed counts, full square."""
        return self._rate(self.amounts.executed) / self._peak_rate

    @property
    def tokens_per_s_per_gpu(self) -> float:
        """Tokens of a step over its time and GPUs."""
        if self.amounts.tokens is None:
            raise InputError("tokens_per_s_per_gpu: a module does not say what a token is; use step_time_s")
        return self.amounts.tokens / self.step_time_s / self.scenario.plan.gpus

    # Memory

    @property
    def peak_memory_gib(self) -> float:
        """What the allocator's peak counter would report on the fullest rank."""
        return self.peak_bytes / GIB

    @lazy
    def _outside(self) -> int:
        return outside_tensors(self.scenario.hardware, self.prepared.mesh)

    @property
    def device_memory_gib(self) -> float:
        """Peak with context, communicator buffers and reserve."""
        return (self.peak_bytes + self._outside) / GIB

    @property
    def capacity_gib(self) -> float:
        """Memory that the driver reports."""
        return capacity(self.scenario.hardware) / GIB

    @property
    def fits(self) -> bool:
        """Whether the device memory suffices."""
        return self.device_memory_gib <= self.capacity_gib

    @property
    def limit(self) -> int:
        """Bytes that tensors may take."""
        return capacity(self.scenario.hardware) - self._outside

    def saved_bytes(self, *categories: TensorKind) -> int:
        """Bytes that one layer keeps for one micro-batch on the fullest rank."""
        raise NotImplementedError

    @property
    def activation_bytes_per_layer(self) -> int:
        """What one layer keeps for one micro-batch on the fullest rank, masks included."""
        return self.saved_bytes("activation", "mask")

    @property
    def statistics_bytes_per_layer(self) -> int:
        """Norm statistics and log-sum-exp kept beside them."""
        return self.saved_bytes("norm statistics", "log-sum-exp")
