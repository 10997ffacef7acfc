"""Clocks, repeats and devices of a calibration, against sleeps, loops of known length and a stand-in for CUDA."""

import time
from collections import deque
from contextlib import contextmanager, nullcontext
from itertools import cycle, repeat
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from spsim.errors import InputError
from spsim.measuring.calibrate import devices, kernels
from spsim.measuring.calibrate.catalogue import compute_rows
from spsim.measuring.calibrate.devices import Cpu, Cuda
from spsim.measuring.calibrate.kernels import measure_kernel, measure_launch
from spsim.measuring.calibrate.memory import measure_memory
from spsim.measuring.calibrate.rank_process import _measure
from spsim.measuring.calibrate.records import Measurement
from spsim.measuring.calibrate.session import Settings
from spsim.measuring.calibrate.shapes import MEMORY_BOUND, flash_attention, linear, memory_bound, score_products
from spsim.measuring.calibrate.timing import FULL, QUICK, Effort, choose_repeats, sample_times, timed
from spsim.measuring.processes import at_hand
from tests.test_calibrate_catalogue import machine

SHORT = Effort(0.002, 3, 1)


@pytest.fixture(autouse=True)
def _one_thread():
    """As in a process of a calibration."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def cpu():
    return Cpu(2)


def test_the_cpu_clock_counts_work_and_not_waiting(cpu):
    def work():
        end = time.thread_time() + 0.01
        while time.thread_time() < end:
            pass

    assert min(cpu.kernel_samples(repeat(work), 1, 3)) == pytest.approx(0.01, rel=0.05)
    assert max(cpu.kernel_samples(repeat(lambda: time.sleep(0.02)), 1, 3)) < 0.005
    assert min(cpu.communication_samples(repeat(lambda: time.sleep(0.02)), 1, 3)) >= 0.02


def test_the_time_of_a_sample_is_that_of_one_call():
    clock = SimpleNamespace(now=0.0)

    def passing(seconds):
        clock.now += seconds

    calls = cycle([lambda: passing(0.002), lambda: passing(0.004)])
    assert devices._samples(lambda: clock.now, calls, 4, 3) == pytest.approx([0.003] * 3)


def test_repeats_fill_the_time_within_their_bounds():
    assert choose_repeats(1e-6, QUICK).per_sample == pytest.approx(100, abs=1)  # a sample of 100 us
    assert choose_repeats(1e-3, QUICK) == (1, 40)  # 40 ms
    assert choose_repeats(1.0, QUICK) == (1, QUICK.min_repeats)
    assert choose_repeats(0.0, QUICK).samples == 200


def test_calls_take_turns_on_their_buffers():
    used = []
    calls = [lambda name=name: used.append(name) for name in "abc"]
    sample_times(calls, lambda turn, per_sample, count: [next(turn)() or 1.0 for _ in range(count)], SHORT)
    assert "".join(used) == ("abc" * len(used))[: len(used)]


def test_percentiles_are_of_the_samples():
    row = timed(Measurement(kind="launch", name="stream_add"), [sample * 1e-6 for sample in range(1, 102)], "wall")
    assert (row.p10_us, row.time_us, row.p90_us, row.repeats) == (11, 51, 91, 101)


@pytest.mark.slow
def test_a_product_takes_its_time_on_the_cpu(cpu):
    """64 times the FLOPs take some 64 times as long, and as long as torch takes in a loop of our own."""
    small, large = (next(linear("fp32", size, size, size)) for size in (256, 1024))
    times = [measure_kernel(cpu, row, SHORT).time_us for row in (small, large)]
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    own = []
    for _ in range(7):
        start = time.thread_time()
        a @ b
        own.append((time.thread_time() - start) * 1e6)
    assert 10 < times[1] / times[0] < 200
    assert 0.4 < times[1] / sorted(own)[3] < 2.5


ROWS = [
    *linear("fp32", 16, 32, 48),
    *linear("bf16", 16, 32, 48),
    *score_products("fp32", 1, 2, 16, 32),
    *(row for name in MEMORY_BOUND for row in memory_bound(name, "fp32", 8, 128)),
    *(row for name in MEMORY_BOUND if name != "adam" for row in memory_bound(name, "bf16", 8, 128)),
    *(
        flash_attention(
            "torch_cpu", "bf16", direction, batch=1, heads=4, kv_heads=kv_heads, head_dim=64, tokens=64, causal=causal
        )
        for direction in ("forward", "backward")
        for kv_heads in (4, 1)
        for causal in (True, False)
    ),
]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.kind}-{row.name}-{row.dtype}")
def test_every_sort_of_kernel_runs(cpu, row, monkeypatch):
    monkeypatch.setattr(kernels, "MAX_SETS", 2)
    done = measure_kernel(cpu, row, Effort(0.0001, 2, 1))
    assert done.key == row.key
    assert done.clock == "thread_cpu"
    assert 0 < done.p10_us <= done.time_us <= done.p90_us


@pytest.mark.parametrize("row", list(linear("fp32", 16, 32, 48)), ids=lambda row: f"{row.name}-{row.accumulated}")
def test_products_have_the_shapes_of_their_rows(cpu, row):
    """dgrad and forward give m x n; torch keeps weights, and their gradients, as outputs x inputs: n x m."""
    result = kernels._gemm(cpu, row)()
    assert tuple(result.shape) == ((row.n, row.m) if row.name == "wgrad" else (row.m, row.n))


def test_accumulated_weight_gradients_are_added_to_an_fp32_tensor(cpu):
    x, gradient, main = torch.ones(16, 32).bfloat16(), torch.ones(16, 48).bfloat16(), torch.ones(48, 32)
    kernels._accumulate(cpu, gradient, x, main)()
    assert main.dtype == torch.float32
    assert torch.equal(main, torch.full((48, 32), 17.0))


def test_buffers_rotate_beyond_the_cache_or_inside_it(cpu):
    product = next(linear("bf16", 128, 256, 256))
    assert kernels._sets(cpu, product) * product.bytes_moved >= min(2 * cpu.cache_bytes, 512 * product.bytes_moved)
    inside, between = (next(memory_bound("add", "bf16", rows, 1024)) for rows in (8, cpu.cache_bytes // 1024 // 8))
    assert cpu.cache_share // 4 < kernels._sets(cpu, inside) * inside.bytes_moved <= cpu.cache_share // 2
    # Beyond this rank's half of the cache, but not beyond all of it: cold all the same.
    assert cpu.cache_share < between.bytes_moved < cpu.cache_bytes
    assert kernels._sets(cpu, between) * between.bytes_moved >= 2 * cpu.cache_bytes


@pytest.mark.parametrize("name", ["stream_add", "stream_linear", "stream_layer_norm", "stream_softmax"])
def test_starts_take_microseconds(cpu, name):
    done = measure_launch(cpu, Measurement(kind="launch", name=name, dtype="fp32"), SHORT)
    assert 0.05 < done.time_us < 500


def test_norm_statistics_have_the_type_that_torch_keeps(cpu):
    types = [
        measure_memory(cpu, Measurement(kind="memory", name="norm_statistics", dtype=dtype))
        for dtype in ("fp32", "bf16")
    ]
    # On a CPU they have the type of the weights.
    assert [(row.value, row.text) for row in types] == [(4, "torch.float32"), (2, "torch.bfloat16")]


@pytest.mark.parametrize(
    "row",
    [
        next(linear("fp32", 2**22, 2**20, 2**10)),
        next(memory_bound("copy", "fp32", 2**32, 2**10)),
    ],
    ids=["gemm", "memory_bound"],
)
def test_a_shape_that_does_not_fit_is_skipped_by_name(cpu, row, tmp_path):
    done = _measure(None, cpu, Settings(raw=tmp_path, quick=True), row)
    assert (done.skipped, done.time_us, done.key) == ("out of memory", None, row.key)


# ------------------------------------------------------------ CUDA, by a stand-in


class FakeEvent:
    def __init__(self, clock, **_):
        self.clock = clock

    def record(self):
        self.at = self.clock.now

    def elapsed_time(self, other):
        return (other.at - self.at) * 1e3


@pytest.fixture
def cuda(monkeypatch):
    """A device of class Cuda whose stream advances as the calls say, and whose tensors are on the CPU."""
    clock = SimpleNamespace(now=0.0, slept=[], waits=0)
    module = SimpleNamespace(
        Event=lambda **options: FakeEvent(clock, **options),
        _sleep=clock.slept.append,
        synchronize=lambda: setattr(clock, "waits", clock.waits + 1),
        Stream=lambda: None,
    )
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(devices, "_cuda", module)
    monkeypatch.setattr(torch.cuda, "synchronize", module.synchronize)
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: None)
    properties = SimpleNamespace(name="NVIDIA H100 80GB HBM3", L2_cache_size=50 * 2**20)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch, "randn", lambda *shape, device: torch.ones(*shape))
    return Cuda(0), clock


def test_events_time_each_sample_behind_a_kernel_that_waits(cuda):
    device, clock = cuda

    def call():
        clock.now += 0.003

    assert device.kernel_samples(repeat(call), 4, 3) == pytest.approx([0.003] * 3)
    assert len(clock.slept) == 1
    assert clock.slept[0] > 0
    assert clock.waits == 2


class Stream:
    """A stream of one device and the host that fills it: the host waits where DEPTH operations are not done yet."""

    DEPTH = 1000
    CYCLES_PER_SECOND = 1.98e9

    def __init__(self):
        self.host = self.device = 0.0
        self.pending = deque()

    def start(self, host_s, device_s):
        self.host += host_s
        if len(self.pending) == self.DEPTH:
            self.host = max(self.host, self.pending.popleft())
        self.device = max(self.device, self.host) + device_s
        self.pending.append(self.device)
        self.now = self.device  # for events

    def sleep(self, cycles):
        self.start(5e-6, cycles / self.CYCLES_PER_SECOND)

    def synchronize(self):
        self.host = max(self.host, self.device)
        self.pending.clear()


class StreamEvent(FakeEvent):
    def record(self):
        self.clock.start(1e-6, 0.0)
        super().record()


@pytest.fixture
def stream(cuda, monkeypatch):
    """The device of `cuda` on such a stream."""
    made = Stream()
    module = SimpleNamespace(Event=lambda **_: StreamEvent(made), _sleep=made.sleep, synchronize=made.synchronize)
    monkeypatch.setattr(devices, "_cuda", module)
    monkeypatch.setattr(torch.cuda, "synchronize", made.synchronize)
    monkeypatch.setattr(devices.time, "perf_counter", lambda: made.host)
    return cuda[0], made


@pytest.mark.parametrize(
    ("kernels_of_a_call", "host_us", "device_us"),
    [(1, 5, 2), (1, 12, 3), (20, 6, 2), (1, 8, 40), (3, 30, 5), (1, 10, 5000)],
)
@pytest.mark.parametrize("sampler", ["kernel_samples", "communication_samples"])
def test_a_slow_host_never_shows_in_the_time_of_a_kernel(stream, sampler, kernels_of_a_call, host_us, device_us):
    """Neither with one kernel a call nor with many, although a full stream makes the host wait."""
    device, queue = stream

    def call():
        for _ in range(kernels_of_a_call):
            queue.start(host_us * 1e-6, device_us * 1e-6)

    samples = sample_times([call], getattr(device, sampler), FULL)
    assert samples == pytest.approx([kernels_of_a_call * device_us * 1e-6] * len(samples), rel=1e-6)


def test_ranks_meet_in_a_call_before_their_collectives_are_timed(stream, monkeypatch):
    """The first collective after a pause also waits for the rank that comes last; no sample holds that."""
    device, queue = stream
    synchronize = queue.synchronize
    late = []

    def pause():
        synchronize()
        late[:] = [1e-3]

    monkeypatch.setattr(torch.cuda, "synchronize", pause)

    def collective():
        queue.start(10e-6, 50e-6 + (late.pop() if late else 0.0))

    assert device.communication_samples(repeat(collective), 2, 12) == pytest.approx([50e-6] * 12)


def test_marks_are_events(cuda):
    device, clock = cuda
    start = device.mark()
    clock.now += 0.5
    assert device.elapsed(start, device.mark()) == pytest.approx(0.5)


def test_kernels_of_a_graph_share_its_time(cuda, monkeypatch):
    """100 kernels are captured, none of them the first of its sort, and a replay of 200 us is 2 us for each."""
    device, clock = cuda
    captured, capturing = [], []

    @contextmanager
    def capture(graph):
        capturing.append(len(captured))
        yield
        capturing.append(len(captured))

    replay = SimpleNamespace(replay=lambda: setattr(clock, "now", clock.now + 200e-6))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: replay)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(kernels, "_small_call", lambda *_: lambda: captured.append(1))
    done = measure_launch(device, Measurement(kind="launch", name="graph_add", dtype="fp32"), SHORT)
    assert capturing == [1, 101]
    assert (done.time_us, done.clock) == (pytest.approx(2.0), "cuda_events")


def test_the_host_is_timed_without_waiting_for_the_device(cuda, monkeypatch):
    device, clock = cuda
    monkeypatch.setattr(kernels, "_small_call", lambda *_: lambda: None)
    done = measure_launch(device, Measurement(kind="launch", name="host_add", dtype="fp32"), SHORT)
    assert done.clock == "wall"
    assert clock.waits >= done.repeats


def test_a_gpu_has_the_types_of_its_generation(cuda, monkeypatch):
    assert cuda[0].dtypes == ("fp32", "tf32", "fp16", "bf16", "fp8")
    assert cuda[0].type_of("fp8") == torch.float8_e4m3fn
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    assert Cuda(0).dtypes == ("fp32", "tf32", "fp16", "bf16")
    assert (cuda[0].name, cuda[0].cache_bytes) == ("NVIDIA H100 80GB HBM3", 50 * 2**20)


@pytest.mark.parametrize("row", list(linear("fp8", 16, 32, 48)), ids=lambda row: f"{row.name}-{row.accumulated}")
def test_fp8_operands_have_the_contracted_dimension_innermost(cuda, row, monkeypatch):
    def product(a, b, *, scale_a, scale_b, out_dtype, use_fast_accum):
        assert a.dtype == b.dtype == torch.float8_e4m3fn
        assert a.stride(1) == b.stride(0) == 1
        return torch.zeros(a.shape[0], b.shape[1], dtype=out_dtype)

    monkeypatch.setattr(torch, "_scaled_mm", product)
    device = cuda[0]
    device.torch_device = torch.device("cpu")
    assert tuple(kernels._fp8_gemm(device, row)().shape) == (row.m, row.n)


@pytest.mark.slow
@pytest.mark.parametrize("quick", [True, False], ids=["quick", "full"])
@pytest.mark.parametrize("dtype", ["fp8", "bf16"])
def test_products_are_such_as_a_gpu_takes(dtype, quick):
    """Fake tensors on a GPU: torch checks shapes and types, of fp8 products also layouts and multiples of 16."""
    kinds = {(row.name, row.m, row.n, row.k): row for row in compute_rows(machine(), quick=quick) if row.kind == "gemm"}
    types = {"fp8": torch.float8_e4m3fn, "bf16": torch.bfloat16, "fp32": torch.float32}

    def random(*shape, dtype="fp32"):
        return torch.empty(shape, dtype=types[dtype], device="cuda")

    with FakeTensorMode():
        device = SimpleNamespace(random=random, type_of=types.get, torch_device=torch.device("cuda"))
        for row in kinds.values():
            if row.batch == 1 or dtype != "fp8":
                result = kernels._gemm(device, row.model_copy(update={"dtype": dtype}))()
                size = (row.n, row.m) if row.name == "wgrad" and dtype != "fp8" else (row.m, row.n)
                assert tuple(result.shape[-2:]) == size


def test_only_forward_products_in_fp8_accumulate_fast(cuda, monkeypatch):
    """As Transformer Engine and torchao have it; gradients are summed in full precision."""
    fast = []

    def product(a, b, *, use_fast_accum, out_dtype, **_):
        fast.append(use_fast_accum)
        return torch.zeros(a.shape[0], b.shape[1], dtype=out_dtype)

    monkeypatch.setattr(torch, "_scaled_mm", product)
    cuda[0].torch_device = torch.device("cpu")
    for row in linear("fp8", 16, 32, 48):
        kernels._fp8_gemm(cuda[0], row)()
    assert fast == [True, False, False, False]


def test_a_gpu_is_asked_about_by_its_uuid(cuda, monkeypatch):
    """nvidia-smi does not number devices as torch does under CUDA_VISIBLE_DEVICES; and a torch may lack NCCL."""
    asked = []

    def run(command, **_):
        asked.append(command)
        return SimpleNamespace(stdout="570.00, 1980 MHz, 1980 MHz, 2619 MHz, 700.00 W\n")

    monkeypatch.setattr(devices.subprocess, "run", run)
    cuda[0].uuid = "1234-56"
    assert cuda[0].facts()["power_limit"] == "700.00 W"
    assert asked[0][-2:] == ["-i", "GPU-1234-56"]
    assert cuda[0].facts()["nccl"] == ""


@pytest.mark.parametrize(
    ("gpus", "local_rank", "per_node", "index"), [(8, 3, 8, 3), (1, 3, 8, 0), (1, 0, 1, 0), (4, 1, 2, 1)]
)
def test_a_rank_has_the_gpu_of_its_number_or_the_only_one_it_sees(monkeypatch, gpus, local_rank, per_node, index):
    monkeypatch.setattr(at_hand, "count_gpus", lambda: gpus)
    assert at_hand.gpu_index(local_rank, per_node) == index


def test_a_rank_that_sees_one_gpu_opens_that(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(at_hand, "count_gpus", lambda: 1)
    monkeypatch.setattr(devices, "Cuda", lambda index: index)
    assert devices.open_device(3, 8) == 0


class Launched(TorchDispatchMode):
    """The operators of torch that run inside."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.names.append(operator.overloadpacket.__name__)
        return operator(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("operator", "launches", "shape"),
    [
        ("masked_softmax", ["mul", "add", "_softmax"], (8, 2, 32)), ("softmax", ["_softmax"], (16, 32)),
        ("bias_add", ["add", "add"], (16, 32)), ("bias_gradient", ["sum"], (32,)), ("add", ["add"], (16, 32)),
    ],
)  # fmt: skip
def test_operators_that_torch_composes_are_measured_whole(operator, launches, shape, cpu):
    """Scale, mask and softmax of eight heads; bias and residual; a sum over rows, not over columns."""
    call = kernels._memory_bound(cpu, next(memory_bound(operator, "fp32", 16, 32)))
    with Launched() as launched:
        result = call()
    assert [name for name in launched.names if name != "detach"] == launches
    assert result.shape == shape


def test_more_ranks_than_gpus_are_refused_on_every_rank(monkeypatch):
    monkeypatch.setattr(at_hand, "count_gpus", lambda: 2)
    for rank in range(4):
        with pytest.raises(InputError, match="4 ranks were started on a node where torch sees 2 GPUs"):
            at_hand.gpu_index(rank, 4)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("CUDA error: out of memory\nCUDA kernel errors might be", "out of memory"),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", "out of memory"),
        (
            """NCCL error in: NCCLUtils.cpp:77, invalid usage, NCCL version 2.27.3
            ncclInvalidUsage: This usually reflects invalid usage of NCCL library.
            Last error:
            Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 1000""",
            "NCCL: Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 1000",
        ),
        ("No available kernel. Aborting execution.", "No available kernel. Aborting execution."),
    ],
)
def test_reasons_say_what_the_user_can_change(text, expected):
    assert at_hand.reason(RuntimeError(text)) == expected


def test_memory_on_a_gpu_is_what_the_allocator_does_not_account_for(cuda, monkeypatch):
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 300)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (200, 1000))
    assert measure_memory(cuda[0], Measurement(kind="memory", name="context")).value == 500


def test_the_allocator_is_asked_before_and_after(cuda, monkeypatch):
    counts = iter([1024, 2048])
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: next(counts))
    monkeypatch.setattr(torch, "empty", lambda *shape, **options: None)
    assert measure_memory(cuda[0], Measurement(kind="memory", name="allocated", bytes_moved=513)).value == 1024
