"""The two sorts of device that torch calls `cpu` and `cuda` (the latter ROCm's name too): clock, waiting, memory.

Everything that differs between them is here; the measurements are written once.
"""

from __future__ import annotations

import os
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist

from spsim.measuring.calibrate.records import Clock
from spsim.measuring.processes.at_hand import cpu_info, gpu_index
from spsim.units import KIB, MIB

_cuda: Any = torch.cuda
"""The same, where torch has no types."""
Call = Callable[[], object]
DTYPES = {
    "fp32": torch.float32, "tf32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16
}  # fmt: skip
RANDOM_BLOCK = 2**20
"""Random numbers that are drawn once and repeated to fill a tensor: distinct enough for a product's power."""
QUEUED_SAMPLES = 5
"""Samples that wait in a stream at once. It takes some thousand kernels and events before the host has to wait for it;
a sample of many calls is of a hundred microseconds, and so of a hundred kernels at most.
"""
WARM_UP_SECONDS, WARM_UP_SIDE = 1.0, 4096
"""How long a GPU multiplies matrices, and of which size, before anything is measured."""


class Device(ABC):
    """One device of one rank."""

    kind: Literal["cpu", "cuda"]
    clock: Clock
    """Of kernels."""
    communication_clock: Clock
    dtypes: tuple[str, ...]
    backend: str
    """Of torch.distributed."""
    uuid: str = ""
    """Of the one device that no two ranks may share; empty where it is not known, or may be shared."""

    def __init__(self, device: torch.device, cache_bytes: int) -> None:
        self.torch_device = device
        self.cache_bytes = cache_bytes
        """Last-level cache, as far as the system says; a datasheet may know of one beyond."""
        self.sharers = 1
        """Ranks that share that cache."""
        self._block = torch.randn(RANDOM_BLOCK, device=device)

    def random(self, *shape: int, dtype: str = "fp32") -> torch.Tensor:
        """A tensor of random numbers with mean 0 and variance 1."""
        count = int(torch.Size(shape).numel())
        filled = self._block[:count].to(self.type_of(dtype)).repeat(-(-count // RANDOM_BLOCK))
        return filled[:count].view(shape)

    @property
    def cache_share(self) -> int:
        """Bytes of the cache that one rank can count on when all are busy."""
        return self.cache_bytes // self.sharers

    def type_of(self, dtype: str) -> torch.dtype:
        """The torch type of a name."""
        return DTYPES[dtype]

    @property
    @abstractmethod
    def name(self) -> str:
        """As the maker calls it."""

    @abstractmethod
    def synchronize(self) -> None:
        """Wait for everything that was started."""

    @abstractmethod
    def used_bytes(self) -> int:
        """Memory of the device that is taken, by tensors and by all else."""

    @abstractmethod
    def kernel_samples(self, calls: Iterator[Call], per_sample: int, repeats: int) -> list[float]:
        """Seconds of one call, `repeats` times, each the mean of `per_sample` calls."""

    @abstractmethod
    def communication_samples(self, calls: Iterator[Call], per_sample: int, repeats: int) -> list[float]:
        """The same for calls that wait for other ranks."""

    @abstractmethod
    def mark(self) -> Any:
        """A point in time of the current stream."""

    @abstractmethod
    def elapsed(self, start: Any, end: Any) -> float:
        """Seconds from one mark to another, once both are passed."""

    @abstractmethod
    def warm_up(self) -> None:
        """Bring the device to the clock that it has under load."""

    def beside(self) -> AbstractContextManager[Any]:
        """Where marks do not wait for the kernels that were started before."""
        return nullcontext()

    @abstractmethod
    def facts(self) -> dict[str, str]:
        """Versions, clocks and names for the environment rows."""


class Cpu(Device):
    """One core: kernels on the CPU clock of the thread, which other processes do not move; gloo on the wall clock."""

    kind = "cpu"
    clock = "thread_cpu"
    communication_clock = "wall"
    dtypes = ("fp32", "bf16")
    backend = "gloo"

    def __init__(self, sharers: int) -> None:
        sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
        found = [int(size.read_text().strip().removesuffix("K")) * KIB for size in sizes]
        super().__init__(torch.device("cpu"), max(found, default=32 * MIB))
        self.sharers = sharers

    @property
    def name(self) -> str:
        return cpu_info("model name") or "CPU"

    def synchronize(self) -> None:
        """Nothing runs behind the caller's back."""

    def warm_up(self) -> None:
        """A CPU is there at once."""

    def used_bytes(self) -> int:
        raise AssertionError("a CPU has no memory of its own")

    def kernel_samples(self, calls: Iterator[Call], per_sample: int, repeats: int) -> list[float]:
        return _samples(time.thread_time, calls, per_sample, repeats)

    def communication_samples(self, calls: Iterator[Call], per_sample: int, repeats: int) -> list[float]:
        return _samples(time.perf_counter, calls, per_sample, repeats)

    def mark(self) -> float:
        return time.perf_counter()

    def elapsed(self, start: float, end: float) -> float:
        return end - start

    def facts(self) -> dict[str, str]:
        return {
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "cores": str(os.cpu_count()),
            "clock_mhz": cpu_info("cpu MHz"),
            "load_average": f"{os.getloadavg()[0]:.2f}",
        }


def _samples(clock: Callable[[], float], calls: Iterator[Call], per_sample: int, repeats: int) -> list[float]:
    times = []
    for _ in range(repeats):
        chosen = [next(calls) for _ in range(per_sample)]
        start = clock()
        for call in chosen:
            call()
        times.append((clock() - start) / per_sample)
    return times


class Cuda(Device):
    """One GPU, timed by events in the stream.

    Calls are queued behind a kernel that only waits, so that the device runs them one after the other however
    slowly the host starts them; never more of them than the stream takes, since a host that waits for room in it is
    as late for all that follow as one without a queue.
    """

    kind = "cuda"
    clock = "cuda_events"
    communication_clock = "cuda_events"
    backend = "nccl"
    max_hold = 0.2
    """Seconds that the waiting kernel runs at most."""
    cycles_per_second = 3e9
    """More than the clock of any GPU, so that the waiting kernel is not too short."""

    def __init__(self, index: int) -> None:
        torch.cuda.set_device(index)
        self.properties: Any = torch.cuda.get_device_properties(index)
        super().__init__(torch.device("cuda", index), getattr(self.properties, "L2_cache_size", 0))
        rocm = torch.version.hip is not None
        # Partitions of one AMD GPU may share theirs.
        self.uuid = "" if rocm else str(getattr(self.properties, "uuid", ""))
        architecture = getattr(self.properties, "gcnArchName", "")
        fp8 = architecture.startswith(("gfx94", "gfx95")) if rocm else torch.cuda.get_device_capability() >= (8, 9)
        self.fp8 = torch.float8_e4m3fnuz if architecture.startswith("gfx94") else torch.float8_e4m3fn
        tf32 = not rocm and torch.cuda.get_device_capability() >= (8, 0)
        self.dtypes = ("fp32", *(["tf32"] if tf32 else []), "fp16", "bf16", *(["fp8"] if fp8 else []))

    def type_of(self, dtype: str) -> torch.dtype:
        return self.fp8 if dtype == "fp8" else super().type_of(dtype)

    @property
    def name(self) -> str:
        return str(self.properties.name)

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def used_bytes(self) -> int:
        free, total = torch.cuda.mem_get_info()
        return int(total - free)

    def kernel_samples(self, calls: Iterator[Call], per_sample: int, repeats: int) -> list[float]:
        return self._queued(calls, per_sample, repeats, ahead=0)

    def communication_samples(self, calls: Iterator[Call], per_sample: int, repeats: int) -> list[float]:
        """The same, behind a call in which the ranks meet."""
        return self._queued(calls, per_sample, repeats, ahead=1)

    def warm_up(self) -> None:
        square = self.random(WARM_UP_SIDE, WARM_UP_SIDE, dtype="bf16")
        end = time.monotonic() + WARM_UP_SECONDS
        while time.monotonic() < end:
            torch.mm(square, square)
            torch.cuda.synchronize()

    def _queued(self, calls: Iterator[Call], per_sample: int, repeats: int, ahead: int) -> list[float]:
        """Samples in groups that fit the queue, each behind a waiting kernel and `ahead` calls that are not timed."""
        (host,) = _samples(time.perf_counter, calls, per_sample, 1)
        times: list[float] = []
        while len(times) < repeats:
            samples = min(QUEUED_SAMPLES, repeats - len(times))
            hold = 1.5 * host * (ahead + per_sample * samples)
            events = [_cuda.Event(enable_timing=True) for _ in range(samples + 1)]
            torch.cuda.synchronize()
            _cuda._sleep(int(min(hold, self.max_hold) * self.cycles_per_second))
            for _ in range(ahead):
                next(calls)()
            events[0].record()
            for event in events[1:]:
                for _ in range(per_sample):
                    next(calls)()
                event.record()
            torch.cuda.synchronize()
            times += [first.elapsed_time(second) / 1e3 / per_sample for first, second in pairwise(events)]
        return times

    def host_samples(self, calls: Iterator[Call], per_sample: int, repeats: int) -> list[float]:
        """Seconds that the host takes to start a call, with nothing queued before."""
        times = []
        for _ in range(repeats):
            times += _samples(time.perf_counter, calls, per_sample, 1)
            torch.cuda.synchronize()
        return times

    def graph(self, call: Call, count: int) -> Call:
        """`count` calls captured in one CUDA graph: its replay."""
        call()  # what its first call loads and sets up must not be captured
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(count):
                call()
        return graph.replay

    def mark(self) -> Any:
        event = _cuda.Event(enable_timing=True)
        event.record()
        return event

    def elapsed(self, start: Any, end: Any) -> float:
        torch.cuda.synchronize()
        return float(start.elapsed_time(end)) / 1e3

    def beside(self) -> AbstractContextManager[Any]:
        return torch.cuda.stream(_cuda.Stream())

    def facts(self) -> dict[str, str]:
        nccl = ".".join(str(part) for part in _cuda.nccl.version()) if dist.is_nccl_available() else ""
        query = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit"
        return {
            "hip" if torch.version.hip else "cuda": str(torch.version.hip or torch.version.cuda),
            "nccl": nccl,
            "cpu": cpu_info("model name"),
            **dict(zip(_QUERIED, _nvidia_smi(query, self.uuid), strict=False)),
        }


_QUERIED = ("driver", "clock_sm", "clock_max_sm", "clock_memory", "power_limit")


def _nvidia_smi(query: str, uuid: str) -> list[str]:
    """Answers of nvidia-smi, none where it is missing (ROCm) or refuses.

    It numbers all devices of the machine, torch those of CUDA_VISIBLE_DEVICES: only the UUID means the same to both.
    """
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader", "-i", f"GPU-{uuid}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [part.strip() for part in done.stdout.split(",")]


def open_device(local_rank: int, ranks_per_node: int) -> Device:
    """The GPU of a local rank, or one thread of the CPU where torch sees none; `InputError` without one for it."""
    if torch.cuda.is_available():
        return Cuda(gpu_index(local_rank, ranks_per_node))
    torch.set_num_threads(1)
    return Cpu(ranks_per_node)
