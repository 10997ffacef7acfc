"""Training steps of real layers on the CPU clock, against a simulation with coefficients from kernels of other shapes.

The time is that of forward and backward together, of one thread on one core, with the gradients of the weights
empty before (`zero_grad`), so that none is added to an older one by a kernel of its own. Kernels and layers take turns,
since a virtual core changes its pace; medians count. About 35 s; a disturbed host adds as much (`MAX_PASSES`).
"""

import multiprocessing
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pytest
import torch

from spsim import Model, Plan, Scenario, Workload, load_profile, simulate
from spsim.measuring.calibrate.catalogue import Machine, compute_rows
from spsim.measuring.calibrate.devices import Cpu
from spsim.measuring.calibrate.fit import fit_profile
from spsim.measuring.calibrate.kernels import measure_kernel, measure_launch
from spsim.measuring.calibrate.records import Measurement
from spsim.measuring.calibrate.timing import Effort
from spsim.program.assembly import layer_program
from spsim.program.instructions import Compute
from spsim.pytorch.layers import Groups, ParallelLayer
from spsim.units import MIB
from spsim.work import FlashAttention, Gemm, MemoryBound, Work

RANKS = 2
"""Processes that share the last-level cache, as in a calibration."""
EFFORT = Effort(0.02, 3, 0)
TURNS = 5
"""Of kernels, each in one of them, and of steps of each layer."""
MAX_PASSES = 2
SPREAD_PERCENT = 10
"""Between the quartiles of the steps of a layer: from here on the host counts as disturbed, and all is measured once
more, whatever the simulation says."""
MAX_TENSOR = 16 * MIB
"""Of a memory-bound kernel: that of a layer here is smaller."""
NOT_IN_A_LAYER = ("embedding", "cross_entropy", "adam")
KEEP_MEMORY = {"MALLOC_TRIM_THRESHOLD_": "4000000000", "MALLOC_MMAP_THRESHOLD_": "4000000000"}
"""The C library keeps what is freed, as torch's allocator on a GPU does; else a large tensor is cleared pages each
time, which the simulator does not model.
"""
MEDIAN_PERCENT, MAX_PERCENT = 10, 25


@dataclass(frozen=True)
class Case:
    """One layer with heads of 64, and one sequence."""

    hidden: int
    tokens: int
    attention: Literal["flash", "unfused"]
    gated: bool = False
    dropout: float = 0.0

    @property
    def model(self) -> Model:
        """GPT's, or Llama's with a quarter of the heads for K and V."""
        heads = self.hidden // 64
        llama = {"gated_mlp": True, "ffn_hidden": self.hidden * 11 // 4, "kv_heads": heads // 4}
        return Model(
            layers=1, hidden=self.hidden, heads=heads, vocab=1024, attention=self.attention, dropout=self.dropout,
            **(llama if self.gated else {}),
        )  # fmt: skip

    @property
    def workload(self) -> Workload:
        return Workload(seq_len=self.tokens, micro_batch=1, precision="fp32")

    @property
    def name(self) -> str:
        kind = f"{'gated ' if self.gated else ''}{self.attention}{' with dropout' if self.dropout else ''}"
        return f"{self.tokens} x {self.hidden} {kind}"


CASES = (
    Case(512, 256, "flash"), Case(640, 384, "flash"), Case(768, 640, "flash"), Case(1024, 256, "flash"),
    Case(512, 1024, "flash"), Case(768, 768, "flash", gated=True), Case(1024, 384, "flash", gated=True),
    Case(640, 256, "unfused"), Case(768, 384, "unfused"), Case(512, 768, "unfused"),
    Case(768, 384, "unfused", gated=True), Case(768, 384, "unfused", dropout=0.1),
)  # fmt: skip


def _shape(work: Work) -> tuple[object, ...]:
    """Equal for kernels that do the same: forward and gradients of a linear have the same sides."""
    match work:
        case Gemm():
            return "gemm", *sorted((work.m, work.n, work.k)), work.batch
        case FlashAttention():
            return "attention", work.heads, work.head_dim, work.queries
        case MemoryBound():
            return work.kernel, work.backward, work.bytes_moved


def _row_shape(row: Measurement) -> tuple[object, ...]:
    if row.kind == "gemm":
        return "gemm", *sorted((row.m or 0, row.n or 0, row.k or 0)), row.batch
    if row.kind == "attention":
        return "attention", row.heads, row.head_dim, row.queries
    return *_kernel(row.name), row.bytes_moved


def _kernel(name: str) -> tuple[str, bool]:
    """Its name, and whether it is the gradient."""
    return name.removesuffix("_forward").removesuffix("_backward"), name.endswith("_backward")


SHAPES = {
    _shape(work)
    for case in CASES
    for step in layer_program(case.model, Plan(), case.workload).instructions
    if isinstance(step, Compute)
    for work in step.work
    if work
}
"""Of all kernels of all layers."""


def kernel_rows(cache_bytes: int) -> list[Measurement]:
    """What `calibrate --quick` measures, as far as these layers need it and without the shapes that they have."""
    machine = Machine(
        device="cpu",
        dtypes=("fp32",),
        cache_bytes=cache_bytes,
        ranks=1,
        nodes=1,
        levels=("shared-memory",),
        attention_kernels=("torch_cpu",),
    )
    return [row for row in compute_rows(machine, quick=True) if _is_needed(row) and _row_shape(row) not in SHAPES]


def _is_needed(row: Measurement) -> bool:
    if row.kind == "memory_bound":
        tensor = (row.m or 0) * (row.n or 0) * torch.float32.itemsize
        return tensor <= MAX_TENSOR and not row.name.startswith(NOT_IN_A_LAYER)
    return row.head_dim in (None, 64)


@dataclass(frozen=True)
class Step:
    """A forward and a backward pass."""

    layer: ParallelLayer
    x: torch.Tensor
    gradient: torch.Tensor

    @classmethod
    def of(cls, case: Case) -> "Step":
        plan = Plan()
        torch.manual_seed(0)
        x, gradient = (torch.randn(case.tokens, 1, case.hidden) for _ in range(2))
        return cls(ParallelLayer(case.model, plan, Groups.create(plan)), x.requires_grad_(), gradient)

    def seconds(self) -> float:
        """On the clock of this thread."""
        self.layer.zero_grad()
        self.x.grad = None
        start = time.thread_time()
        torch.autograd.backward(self.layer(self.x), self.gradient)
        return time.thread_time() - start


@dataclass(frozen=True)
class Measured:
    """Kernels, and the seconds of the steps of each case."""

    rows: list[Measurement]
    steps: dict[Case, list[float]]

    @property
    def spread_percent(self) -> float:
        """Distance of the quartiles of the case where it is largest."""
        quartiles = np.array([np.percentile(steps, (25, 50, 75)) for steps in self.steps.values()])
        return float(100 * np.max((quartiles[:, 2] - quartiles[:, 0]) / quartiles[:, 1]))


def measure() -> Measured:
    """All kernels and layers; twice where the steps of a layer scatter."""
    torch.set_num_threads(1)
    device = Cpu(RANKS)
    steps = {case: Step.of(case) for case in CASES}
    for step in steps.values():
        step.seconds()
    facts = {"cache_bytes": str(device.cache_bytes), "ranks": str(RANKS), "device": device.name}
    found = Measured([Measurement(kind="environment", name=name, text=text) for name, text in facts.items()],
                     {case: [] for case in CASES})  # fmt: skip
    rows = kernel_rows(device.cache_share)
    for _ in range(MAX_PASSES):
        for turn in range(TURNS):
            found.rows.extend(_measured(device, rows[turn::TURNS]))
            for case, step in steps.items():
                found.steps[case].append(step.seconds())
        if found.spread_percent < SPREAD_PERCENT:
            break
    return found


def _measured(device: Cpu, rows: Sequence[Measurement]) -> Iterator[Measurement]:
    for row in rows:
        yield (measure_launch if row.kind == "launch" else measure_kernel)(device, row, EFFORT)


@pytest.fixture(scope="module")
def measured() -> Measured:
    """In a process of its own, whose allocator keeps its memory."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in KEEP_MEMORY.items():
            patch.setenv(name, value)
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            return pool.submit(measure).result()


def test_step_compute(measured: Measured) -> None:
    kernels = [row for row in measured.rows if row.time_us]
    assert {row.kind for row in kernels} == {"launch", "gemm", "attention", "memory_bound"}
    assert not SHAPES & {_row_shape(row) for row in kernels}
    profile = fit_profile(measured.rows, load_profile("cpu-2"), "this machine").profile
    errors, table = [], []
    for case, seconds in measured.steps.items():
        result = simulate(Scenario(hardware=profile, model=case.model, plan=Plan(), workload=case.workload))
        predicted, real = result.layer_forward_s + result.layer_backward_s, float(np.median(seconds))
        errors.append(100 * (predicted / real - 1))
        table.append(f"{case.name:34} {1e3 * real:8.1f} ms, predicted {1e3 * predicted:8.1f} ms, {errors[-1]:+6.1f} %")
    report = "\n".join([*table, f"quartiles of the steps {measured.spread_percent:.1f} % apart at most"])
    print(report)
    assert np.median(np.abs(errors)) <= MEDIAN_PERCENT, report
    assert np.max(np.abs(errors)) <= MAX_PERCENT, report
