"""One rank: it builds the layer of a case, runs it forward and backward, and looks on."""

from __future__ import annotations

import gc
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import cached_property, lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from spsim.engine.pieces import Pass
from spsim.engine.recording import COMPUTE_LANE
from spsim.inputs.plan import Plan
from spsim.measuring.processes.at_hand import Position, cpu_info, gpu_index
from spsim.measuring.verify.cases import VerifyCase
from spsim.measuring.verify.records import PASSES, Environment, Job, RankMeasurement
from spsim.program.mesh import mesh_of
from spsim.pytorch.kineto import read_spans
from spsim.pytorch.layers import Groups, HostTime, ParallelLayer, record_collectives, record_saved
from spsim.results.measured import MeasuredSpan
from spsim.units import US_PER_S

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
BACKENDS = {"cpu": "gloo", "cuda": "nccl"}
_cuda: Any = torch.cuda
"""The same, where torch has no types."""


class Rank:
    """One process of the group; `address` is None where a launcher has set the environment."""

    def __init__(self, device: str, position: Position, address: str | None, limit_s: float) -> None:
        self.rank, self.world = position.rank, position.world
        self.device = torch.device("cpu")
        if device == "cuda":
            self.device = torch.device("cuda", gpu_index(position.local_rank, position.per_node))
            torch.cuda.set_device(self.device)
            # The kernel that calibrate measures and the ring's blocks run: Hopper's torch else prefers cuDNN's.
            torch.backends.cuda.enable_cudnn_sdp(False)
        else:
            torch.set_num_threads(1)
        dist.init_process_group(
            BACKENDS[device], init_method=address or "env://", rank=self.rank, world_size=self.world,
            timeout=timedelta(seconds=limit_s),
        )  # fmt: skip

    @property
    def environment(self) -> Environment:
        """What the figures were measured with."""
        gpu = self.device.type == "cuda"
        return Environment(
            device=torch.cuda.get_device_name() if gpu else cpu_info("model name") or "CPU",
            backend=BACKENDS[self.device.type],
            torch=str(torch.__version__),
            compute_clock="device kernels" if gpu else "thread CPU clock",
        )

    def gather(self, own: Any) -> list[Any] | None:
        """What all ranks have, on rank 0."""
        found: list[Any] | None = [None] * self.world if self.rank == 0 else None
        dist.gather_object(own, found)
        return found

    def close(self) -> None:
        """Leave the groups once all ranks do, while Python still runs: a thread of theirs that comes back to it later
        would end the process.
        """
        dist.barrier()
        dist.destroy_process_group()
        _groups.cache_clear()
        gc.collect()

    def measure(self, job: Job) -> RankMeasurement:
        """Bytes and collectives of one pass, the times of many, and a profile of some more."""
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        run = _Run.of(job.case, self.device)
        with record_collectives(run.layer.groups) as calls:
            with record_saved(run.layer) as saved:
                out = run.forward()
            run.backward(out)
        kept: dict[str, int] = defaultdict(int)
        for tensor in saved.tensors:
            kept[tensor.category] += tensor.bytes
        passes, compute = self._times(run, job)
        base_ns, spans = self._profiled(run, job)
        return RankMeasurement(
            self.rank, passes, compute or _kernel_seconds(spans), kept,
            [("backward" if c.phase != "forward" else c.phase, c.collective, c.message_bytes) for c in calls],
            base_ns, spans,
        )  # fmt: skip

    def _times(self, run: _Run, job: Job) -> tuple[dict[Pass, list[float]], dict[Pass, list[float]]]:
        """Seconds of each pass on the wall clock and, on a CPU, of the thread outside its collectives."""
        wall: dict[Pass, list[float]] = {phase: [] for phase in PASSES}
        thread: dict[Pass, list[float]] = {phase: [] for phase in PASSES}
        for repetition in range(job.warm_up + job.repeats):
            for phase, step in zip(PASSES, run.passes(), strict=True):
                self._meet()
                began, began_thread, before = time.perf_counter(), time.thread_time(), HostTime.seconds
                step()
                busy = time.thread_time() - began_thread - (HostTime.seconds - before)
                self._finish()
                if repetition >= job.warm_up:
                    wall[phase].append(time.perf_counter() - began)
                    thread[phase].append(busy)
        return wall, thread if self.device.type == "cpu" else {}

    def _profiled(self, run: _Run, job: Job) -> tuple[int, list[MeasuredSpan]]:
        """Spans of further repetitions; collectives of a plan of one axis stand on the lane of that axis."""
        activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if self.device.type == "cuda" else [])
        with TemporaryDirectory() as directory, _quiet():
            path = Path(directory) / "trace.json"
            with profile(activities=activities, record_shapes=True) as profiler:
                for _ in range(job.profiled):
                    for step in run.passes():
                        self._meet()
                        step()
                    self._finish()
            if self.device.type == "cuda":
                _check_kernels(profiler)
            profiler.export_chrome_trace(str(path))
            base_ns, spans = read_spans(path, self.rank)
        axes = mesh_of(job.case.plan).axes
        named = [replace(span, lane=axes[0]) if span.collective and len(axes) == 1 else span for span in spans]
        return base_ns, [span for span in named if span.collective != "barrier"]

    def _meet(self) -> None:
        dist.barrier(device_ids=[self.device.index] if self.device.type == "cuda" else None)
        self._finish()

    def _finish(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


@dataclass(frozen=True)
class _Run:
    """A layer with its input and the gradient of its output."""

    layer: ParallelLayer
    x: Tensor

    @classmethod
    def of(cls, case: VerifyCase, device: torch.device) -> _Run:
        """Seeded, so that all ranks see the same whole input."""
        torch.manual_seed(0)
        dtype = DTYPES[case.workload.precision]
        layer = ParallelLayer(case.model, case.plan, _groups(case.plan), dtype=dtype, device=device)
        whole = torch.randn(case.workload.seq_len, case.workload.micro_batch, case.model.hidden, dtype=dtype)
        return cls(layer, layer.local_input(whole).to(device).requires_grad_())

    @cached_property
    def gradient(self) -> Tensor:
        """Of the output, which has the input's shape."""
        return torch.randn_like(self.x)

    def forward(self) -> Tensor:
        """The output."""
        out: Tensor = self.layer(self.x)
        return out

    def backward(self, out: Tensor) -> None:
        """Gradients of the input and the weights."""
        torch.autograd.backward(out, self.gradient)

    def passes(self) -> Iterator[Callable[[], None]]:
        """The two passes, to be called in turn. Gradients begin empty: torch adds to others in kernels of their own,
        where the simulator, as Megatron, has that in the product.
        """
        self.layer.zero_grad(set_to_none=True)
        self.x.grad = None
        outputs: list[Tensor] = []
        yield lambda: outputs.append(self.forward())
        yield lambda: self.backward(outputs.pop())


@lru_cache
def _groups(plan: Plan) -> Groups:
    """Made once a plan: a communicator takes time and memory."""
    return Groups.create(plan)


def _check_kernels(profiler: profile) -> None:
    """Raise `RuntimeError` where only the host's operators were recorded, whose times are not those of kernels."""
    if not any(event.device_type == DeviceType.CUDA for event in profiler.events() or ()):
        raise RuntimeError("torch.profiler recorded no kernels; end other profilers, and let it use CUPTI or ROCTracer")


def _kernel_seconds(spans: Sequence[MeasuredSpan]) -> dict[Pass, list[float]]:
    """Pass -> seconds of kernels of each profiled repetition."""
    times: dict[Pass, dict[int, float]] = {phase: defaultdict(float) for phase in PASSES}
    for span in spans:
        if span.lane.startswith(COMPUTE_LANE) and span.phase in times:
            times[span.phase][span.micro_batch] += (span.end_us - span.start_us) / US_PER_S
    return {phase: list(found.values()) for phase, found in times.items()}


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the profiler's library writes to the standard error."""
    with Path(os.devnull).open("w") as nowhere:
        before = os.dup(2)
        os.dup2(nowhere.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(before, 2)
            os.close(before)
