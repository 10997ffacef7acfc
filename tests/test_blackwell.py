"""Blackwell profiles against published kernels and wires: attention of cuDNN, products, norms, the ring of a tray."""

import csv

import numpy as np
import pytest

from spsim.costs.attention import AttentionCost
from spsim.costs.collectives import CommCost
from spsim.costs.kernels import ComputeCost
from spsim.costs.power import straggler_factor
from spsim.inputs.profiles import load_profile
from spsim.inputs.resources import data_directory
from spsim.work import OPERAND_BYTES, FlashAttention, Gemm, MemoryBound

with (data_directory() / "blackwell_attention.csv").open() as file:
    ROWS = list(csv.DictReader(file))
"""NVIDIA/cudnn-frontend at 3929da2, benchmark/sdpa_benchmark_training/results: cuDNN 9.22, caches flushed."""


def attention(row):
    """Gradients and results are of 16 bits, operands of those of the row."""
    batch, heads, kv_heads, queries = (int(row[name]) for name in ("batch", "heads", "kv_heads", "tokens"))
    keys_dim, values_dim = int(row["head_dim"]), int(row["value_dim"])
    element = 2 if row["dtype"] == "bf16" else 1
    inputs = batch * queries * (heads * keys_dim + kv_heads * (keys_dim + values_dim))
    result, statistics = batch * queries * heads * values_dim, 4 * batch * queries * heads
    forward = element * inputs + 2 * result + statistics
    moved = forward if row["direction"] == "forward" else forward + element * result + 2 * inputs
    causal = row["causal"] == "1"
    return FlashAttention("cudnn", row["direction"], batch, heads, kv_heads, keys_dim, values_dim, queries, queries,
                          (1 if causal else 2) * queries**2, causal, moved)  # fmt: skip


def errors(hardware, dtype, **wanted):
    profile = load_profile(hardware)
    cost = AttentionCost(profile, dtype, profile.memory_bandwidth * profile.coefficients.memory_bound.elementwise.value)
    rows = [row for row in ROWS if (row["hardware"], row["dtype"]) == (hardware, dtype)]
    rows = [row for row in rows if all(row[name] == value for name, value in wanted.items())]
    return np.array([float(cost.time(attention(row))) * 1e6 / float(row["time_us"]) - 1 for row in rows])


@pytest.mark.parametrize("hardware", ["gb200-nvl72", "gb300-nvl72"])
@pytest.mark.parametrize("dtype", ["bf16", "fp8", "mxfp8"])
def test_attention_that_was_fitted(hardware, dtype):
    found = np.abs(errors(hardware, dtype, fitted="1"))
    assert len(found) >= 60
    assert found.mean() < 0.06
    assert np.percentile(found, 90) < 0.11


@pytest.mark.parametrize("hardware", ["gb300-nvl72"])
def test_attention_of_video_models_that_nothing_was_fitted_on(hardware):
    """32 and 40 heads without sharing keys, 6144 to 75600 tokens; the longest run into the power limit."""
    found = np.abs(errors(hardware, "bf16", fitted="0"))
    assert len(found) == 20
    assert found.mean() < 0.05
    assert found.max() < 0.14


def test_attention_of_8_bits_is_faster_than_of_16_but_not_twice():
    """Forward 1.3 to 1.5 times at head size 128 on GB200, less backward."""
    bf16, fp8 = (AttentionCost(load_profile("gb200-nvl72"), dtype, 6.7e12) for dtype in ("bf16", "fp8"))
    for direction, least, most in (("forward", 1.15, 1.6), ("backward", 1.0, 1.6)):
        work = FlashAttention("cudnn", direction, 2, 64, 8, 128, 128, 8192, 8192, 8192**2, True, 10**9)
        assert least < bf16.time(work) / fp8.time(work) < most


GB200_PRODUCTS = [
    ("fp8", 4096, 4096, 4096, 48.5), ("fp8", 8192, 8192, 8192, 382.2), ("fp8", 16384, 16384, 16384, 3025.9),
    ("fp8", 6144, 12288, 12288, 640.8), ("fp8", 802816, 192, 768, 162.2), ("nvfp4", 4096, 4096, 4096, 26.5),
    ("nvfp4", 802816, 192, 768, 106.8),
]  # fmt: skip
"""cuBLASLt after 10,000 products on random data (Azure/AI-benchmarking-guide, ND_GB200_v6_results.md at 2a370be)."""


def product_us(name, dtype, m, n, k, *, burst):
    moved = OPERAND_BYTES[dtype] * (m * k + k * n) + 2 * m * n
    return ComputeCost(load_profile(name), dtype, burst=burst).duration(Gemm(m, n, k, 1, moved)) * 1e6


RACK = 0.84
"""Of what one GPU sustains, in a rack where all run: fitted on steps, so that these products are met by it."""


def test_products_of_gb200_at_its_power_limit():
    """How products begin to reach their limits is from none of these rows; those of few columns do not."""
    found = [
        product_us("gb200-nvl72", dtype, m, n, k, burst=False) * (RACK if n > 192 else 1) / us - 1
        for dtype, m, n, k, us in GB200_PRODUCTS
    ]
    assert np.mean(np.abs(found)) < 0.06
    assert np.max(np.abs(found)) < 0.13


@pytest.mark.parametrize(("size", "slower"), [(16384, 5604), (32768, 5262)])
def test_large_products_of_4_bits_run_as_the_slower_of_two_versions_of_a_page(size, slower):
    """egmsft/AI-benchmarking-guide, TFLOP/s; Azure/AI-benchmarking-guide at 2a370be has 7628 and 7487."""
    tflops = 2 * size**3 / product_us("gb200-nvl72", "nvfp4", size, size, size, burst=False) / 1e6
    assert tflops == pytest.approx(slower, rel=0.05)


B300_ON_RANDOM_DATA = [
    ("bf16", 8192, 8192, 8192, 1517), ("bf16", 16384, 16384, 16384, 1568), ("bf16", 8192, 28672, 8192, 1490),
    ("bf16", 8192, 10240, 8192, 1476), ("bf16", 4096, 14336, 4096, 1449), ("bf16", 4096, 4096, 4096, 1402),
    ("bf16", 1024, 8192, 8192, 1365), ("fp8", 8192, 8192, 8192, 2625), ("fp8", 16384, 16384, 16384, 2637),
]  # fmt: skip
"""TFLOP/s of cuBLAS, a thousand products at 1100 W (ademeure/QuickRunCUDA, b300_clean/CUBLAS_REAL_VALIDATION.md)."""


def test_products_of_b300_on_random_data():
    found = [
        2 * m * n * k / product_us("dgx-b300", dtype, m, n, k, burst=False) / 1e6 / tflops - 1
        for dtype, m, n, k, tflops in B300_ON_RANDOM_DATA
    ]
    assert np.mean(np.abs(found)) < 0.05
    assert np.max(np.abs(found)) < 0.12


@pytest.mark.parametrize(("more", "fewer"), [("gb300-nvl72", "gb200-nvl72"), ("gb200-nvl72", "dgx-b200")])
@pytest.mark.parametrize("dtype", ["bf16", "fp8", "nvfp4"])
def test_more_watts_sustain_more(more, fewer, dtype):
    """The same die at 1400, 1200 and 1000 W."""
    one, other = (product_us(name, dtype, 16384, 16384, 16384, burst=False) for name in (more, fewer))
    assert one < other


@pytest.mark.parametrize("name", ["dgx-b200", "dgx-b300", "gb200-nvl72", "gb300-nvl72"])
def test_limits_in_a_burst_are_not_below_the_sustained_ones(name):
    gemm = load_profile(name).coefficients.gemm
    for dtype, limit in gemm.sustained_limit.items():
        assert gemm.burst_limit[dtype].value >= limit.value, dtype


CUDNN_RMS_NORM = [
    ("forward", 16384, 4096, 41.8), ("backward", 16384, 4096, 65.1), ("forward", 8192, 8192, 44.8),
    ("backward", 8192, 8192, 77.4), ("forward", 4096, 16384, 43.9), ("backward", 4096, 16384, 84.1),
    ("forward", 8192, 5120, 28.0), ("backward", 8192, 5120, 50.8), ("forward", 4096, 8192, 22.6),
    ("backward", 4096, 8192, 41.2),
]  # fmt: skip
"""Rows, columns, us on GB200 (NVIDIA/cudnn-frontend at 3929da2, benchmark/norms/results)."""


@pytest.mark.parametrize(("direction", "rows", "columns", "measured"), CUDNN_RMS_NORM)
def test_norms_of_gb200(direction, rows, columns, measured):
    """One tensor is read and one written forward, two read and one written backward."""
    backward = direction == "backward"
    work = MemoryBound("norm", (3 if backward else 2) * 2 * rows * columns, "rms_norm", backward=backward, row=columns)
    assert ComputeCost(load_profile("gb200-nvl72"), "bf16").duration(work) * 1e6 == pytest.approx(measured, rel=0.2)


def test_four_gpus_of_a_tray_take_their_own_ring():
    """20 us for 1 MiB, 680 GB/s for 8 GiB (Azure/AI-benchmarking-guide at 2a370be); eight are slower for short ones."""
    cost = CommCost(load_profile("gb200-nvl72"))
    assert cost.time("all_reduce", 2**20, 4) == pytest.approx(1.5 * 2**20 / 80.5e9, rel=0.01)
    assert cost.time("all_reduce", 2**33, 4) == pytest.approx(1.5 * 2**33 / 679.6e9, rel=0.01)
    assert cost.time("all_reduce", 2**20, 8) > 1.5 * cost.time("all_reduce", 2**20, 4)


@pytest.mark.parametrize(("gpus", "standard_deviations"), [(8, 1.424), (40, 2.161), (64, 2.345), (1024, 3.23)])
def test_the_slowest_of_many_gpus(gpus, standard_deviations):
    """Expected extremes of so many normal numbers (Tippett 1925 tabulates 1.424 for 8)."""
    factor = straggler_factor(load_profile("dgx-b200"), gpus)
    assert factor - 1 == pytest.approx(0.02 * standard_deviations, rel=0.01)
    rng = np.random.default_rng(1)
    drawn = rng.normal(size=(4000, gpus)).max(axis=1).mean()
    assert (factor - 1) / 0.02 == pytest.approx(drawn, rel=0.02)


def test_without_a_spread_all_gpus_are_alike():
    assert straggler_factor(load_profile("dgx-a100-80gb"), 1024) == 1
    assert straggler_factor(load_profile("dgx-b200"), 1) == 1
