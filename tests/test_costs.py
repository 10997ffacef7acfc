"""Durations of collectives and kernels against formulas worked by hand, and the work of a ring by counting."""

from copy import deepcopy
from fractions import Fraction
from itertools import product
from math import hypot

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spsim import simulate
from spsim.costs.collectives import CommCost
from spsim.costs.curves import CurveTime
from spsim.costs.kernels import ComputeCost
from spsim.costs.traffic import TrafficCost
from spsim.errors import InputError
from spsim.inputs.collective_curves import CollectiveCurve
from spsim.inputs.profiles import load_profile, parse_profile, profile_names
from spsim.inputs.resources import profiles_directory, read_toml
from spsim.program.instructions import Compute
from spsim.program.lowerings.ring_steps import ring_blocks
from spsim.work import FlashAttention, Gemm, MemoryBound
from tests.cases import A100, H100, program, scenario

US = 1e-6
COLLECTIVES = ["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send_receive"]


def profile(change, name=A100):
    """A shipped profile with its TOML tables passed through `change`."""
    tables = deepcopy(read_toml(profiles_directory() / f"{name}.toml"))
    change(tables)
    return parse_profile(tables, "profile")


def curve(name="all_gather", **changes):
    """10 us among 4 ranks and 2 us a step; 4 MB at 100 GB/s, 8 MB at 150 GB/s."""
    fields = {
        "algorithm": "ring",
        "ranks": 4,
        "latency_us": 10.0,
        "step_latency_us": 2.0,
        "source": "by hand",
        "points": ((4e6, 100.0), (8e6, 150.0)),
    }
    return CurveTime(CollectiveCurve(**{**fields, **changes}), name)


# ------------------------------------------------------------ collectives


# At 4 ranks 3/4 of an all-gather is on the wire: 3 MB in 30 us and 6 MB in 40 us, 20 and 30 beyond the latency.
@pytest.mark.parametrize(
    ("megabytes", "ranks", "microseconds"),
    [
        (4, 4, 30),  # measured
        (8, 4, 40),  # measured
        (6, 4, 35),  # half way between
        (2, 4, 20),  # half way to the smallest
        (0, 4, 10),  # the latency
        (12, 4, 60),  # 3 MB more on the wire at 150 GB/s: 20 us more
        (6, 2, 6 + 20),  # one step: 10 - 2 x 2; 3 MB on the wire
        (24 / 7, 8, 18 + 20),  # seven steps: 10 + 4 x 2; 3 MB on the wire
    ],
)
def test_a_curve_by_hand(megabytes, ranks, microseconds):
    """Latency by steps, transfer by bytes on the wire, linear in between."""
    assert curve()(round(megabytes * 1e6), ranks) == pytest.approx(microseconds * US, rel=1e-6)


@pytest.mark.parametrize(
    ("algorithm", "name", "steps"),
    [
        ("ring", "all_reduce", {2: 2, 4: 6, 8: 14}),
        ("ring", "all_gather", {2: 1, 4: 3, 8: 7}),
        ("ring", "reduce_scatter", {2: 1, 4: 3, 8: 7}),
        ("pairwise", "all_to_all", {2: 1, 4: 3, 8: 7}),
        ("nvls", "all_reduce", {2: 1, 4: 1, 8: 1}),
        ("send_receive", "send_receive", {2: 1, 4: 1, 8: 1}),
    ],
)
def test_latency_changes_by_the_steps_of_the_algorithm(algorithm, name, steps):
    """Measured among 4 ranks, 50 us; each step more or less is 2 us."""
    found = curve(name, algorithm=algorithm, latency_us=50.0)
    for ranks, count in steps.items():
        assert found(0, ranks) == pytest.approx((50 + 2 * (count - steps[4])) * US)


def test_latency_is_never_negative():
    """Six steps of 5 us less than 10 us measured are 0, not -20."""
    assert curve("all_reduce", step_latency_us=5.0)(0, 2) == 0.0


def test_points_faster_than_the_latency_make_a_flat_tier():
    """At 1 and 2 MB the measured 7.5 us are below the latency of 10: the tier is flat, then the curve rises."""
    found = curve(points=((1e6, 100.0), (2e6, 200.0), (4e6, 100.0)))
    assert found(500_000, 4) == found(1_000_000, 4) == found(2_000_000, 4) == pytest.approx(10 * US)
    assert found(4_000_000, 4) == pytest.approx(30 * US)


def wire_share(name, ranks):
    """Bytes on the wire of one rank over the message (nccl-tests, PERFORMANCE.md)."""
    factor = {"all_reduce": 2, "send_receive": Fraction(ranks, ranks - 1)}.get(name, 1)
    return factor * Fraction(ranks - 1, ranks)


@pytest.mark.parametrize("hardware", profile_names())
@pytest.mark.parametrize("name", COLLECTIVES)
def test_measured_points_are_reproduced(hardware, name):
    """At its own ranks a curve gives back each measured time, the latency where that is more, and the time
    of a smaller message where that was measured slower. Within the whole bytes of the wire.
    """
    cost = CommCost(load_profile(hardware))
    for measured in cost.inner.curves.get(name, ()):
        slowest = measured.curve.latency_us * US
        for message, bandwidth in measured.curve.points:
            time = float(wire_share(name, measured.curve.ranks)) * message / (bandwidth * 1e9)
            slowest = max(slowest, time)
            assert measured(int(message), measured.curve.ranks) == pytest.approx(slowest, rel=1e-5)


def test_a_duration_adds_the_start_of_a_collective():
    """8.4 us from a framework on A100; one curve: 42.5 us of latency at 8 ranks."""
    cost = CommCost(load_profile(A100))
    assert cost.duration("all_reduce", 0, 8) == pytest.approx((8.4 + 42.5) * US)
    assert cost.duration("all_reduce", 0, 2) == pytest.approx((8.4 + 42.5 - 12 * 2.7) * US)


def test_in_network_reduction_serves_large_groups_and_all_reduce_only():
    """H100: from 6 ranks on the faster of ring and NVLS, below that the ring; 1 GiB at 469.67 GB/s."""
    cost = CommCost(load_profile(H100))
    ring, nvls = cost.inner.curves["all_reduce"]
    for ranks in (2, 4, 5):
        assert cost.duration("all_reduce", 2**30, ranks) == cost.overhead + ring(2**30, ranks)
    for ranks in (6, 8):
        assert cost.duration("all_reduce", 2**30, ranks) == cost.overhead + nvls(2**30, ranks)
        assert nvls(2**30, ranks) < ring(2**30, ranks)
    assert cost.duration("all_reduce", 2**30, 8) - cost.overhead == pytest.approx(2**30 * 1.75 / 469.67e9, rel=1e-5)
    others = [c.curve.algorithm for name in COLLECTIVES[1:] for c in cost.inner.curves.get(name, ())]
    assert "nvls" not in others


def test_a_missing_curve_is_the_users_to_add():
    """The error names the profile, the collective, the ranks and the level."""

    def remove(tables):
        del tables["assumed"]["collectives"]["nvlink"]["all_to_all"]

    with pytest.raises(InputError, match=r"dgx-a100-80gb.*'nvlink'.*no all_to_all curve for 4 ranks"):
        CommCost(profile(remove)).duration("all_to_all", 1024, 4)


SIZES = st.integers(0, 2**36)


@pytest.mark.slow
@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.sampled_from([A100, H100]), st.sampled_from(COLLECTIVES), SIZES, SIZES, st.integers(2, 8))
def test_a_larger_message_takes_no_less(hardware, name, first, second, ranks):
    """For every shipped curve and number of ranks."""
    cost = CommCost(load_profile(hardware))
    small, large = sorted((first, second))
    assert 0 < cost.duration(name, small, ranks) <= cost.duration(name, large, ranks)


def faster(factor):
    """Tables with every curve and link `factor` times as fast, and no contention for the device."""

    def change(tables):
        for level in tables["datasheet"]["topology"]:
            level["link_gb_per_s"]["value"] *= factor
        for block in ("calibrated", "assumed"):
            for operations in tables[block].get("collectives", {}).values():
                for curves in operations.values():
                    for item in curves:
                        item["points"] = [[size, bandwidth * factor] for size, bandwidth in item["points"]]
        tables["assumed"]["overlap_slowdown"]["value"] = 0.0

    return change


PLANS = ["tp=8", "tp=4,sequence_parallel", "ulysses=4", "ring=4", "ring=4,ring_cut=contiguous", "tp=2,ulysses=2,ring=2"]


@pytest.mark.parametrize("hardware", [A100, H100])
@pytest.mark.parametrize("plan", PLANS)
def test_more_bandwidth_is_never_slower(plan, hardware):
    """Without contention a step is a longest path: shorter messages cannot lengthen it."""
    settings = {"seq_len": 8192, "hidden": 2048, "heads": 16}
    times = [
        simulate(scenario(plan, hardware=profile(faster(factor), hardware), **settings)).step_time_s
        for factor in (1.0, 1.2, 2.0, 10.0)
    ]
    assert times == sorted(times, reverse=True)
    assert times[0] > times[-1]


# ------------------------------------------------------------ kernels


def a100():
    """Compute cost on A100 in bf16: 312 TFLOP/s, 2039 GB/s, 108 units, 4 us to start a kernel."""
    return ComputeCost(load_profile(A100), "bf16")


UNITS, TILES_M, TILES_N = 108, (64, 128), (32, 64, 96, 128, 160, 192, 224, 256)


def tile_seconds(m, n, k, batch=1):
    """Of the tiles of A100, one by one: the seconds of a wave are those of one tile on one unit, at 0.83 of its share
    of 312 TFLOP/s, or longer where a smaller tile than 137 x 137 reads its operands; K is 115 elements longer.
    """
    times = []
    for tile_m, tile_n in product(TILES_M, TILES_N):
        tiles = -(-m // tile_m) * -(-n // tile_n) * batch
        waves = -(-tiles // UNITS)
        slower = max(1, 137 * (tile_m + tile_n) / (2 * tile_m * tile_n))
        times.append(waves * slower * 2 * tile_m * tile_n * (k + 115) / (0.83 * 312e12 / UNITS))
    return min(times)


def beside(compute, traffic):
    """Two times of which the shorter is not hidden where it is as long as the other."""
    return hypot(compute**2, traffic**2) ** 0.5


def test_a_square_product_by_hand():
    """4096^3: 32 x 16 tiles of 128 x 256 are 5 waves on 108 units; 5 x 2 x 128 x 256 x (4096 + 115) FLOPs at 0.83 of
    the 2.889 TFLOP/s of a unit take 575.5 us, 0.3 in 10,000 more beside 59.2 us of traffic, and 4 us to start.
    """
    work = Gemm(4096, 4096, 4096, 1, bytes_moved=3 * 2 * 4096**2)
    assert work.flops == 137_438_953_472
    compute = 5 * 2 * 128 * 256 * 4211 * 108 / (0.83 * 312e12)
    assert tile_seconds(4096, 4096, 4096) == pytest.approx(compute)
    assert a100().duration(work) == pytest.approx(4 * US + beside(compute, 100_663_296 / (0.834 * 2039e9)), rel=1e-9)
    assert a100().duration(work) == pytest.approx(579.5 * US, rel=1e-4)


SHAPES = [(16, 4096, 4096, 1), (8192, 2304, 6144, 1), (6144, 2304, 8192, 1), (2048, 2048, 96, 32),
          (108 * 128, 256, 512, 1), (108 * 128 + 1, 256, 512, 1), (1, 1, 1, 1)]  # fmt: skip


@pytest.mark.parametrize(("m", "n", "k", "batch"), SHAPES)
def test_a_product_takes_the_tiles_that_are_done_first(m, n, k, batch):
    """As every size of tile is counted by itself; one row more than whole waves hold is another wave."""
    found = a100().duration(Gemm(m, n, k, batch, bytes_moved=1))
    limit = 2 * m * n * k * batch / (0.822 * 312e12)
    assert found == pytest.approx(4 * US + max(tile_seconds(m, n, k, batch), limit), rel=1e-9)


def test_kernels_at_once_take_the_times_of_each_alone():
    """Arrays of any shape, to the last bit."""
    random = np.random.default_rng(1)
    m, n, k, batch, moved, accumulated = (random.integers(1, 10_000, (5, 7)) for _ in range(6))
    cost = ComputeCost(load_profile(H100), "bf16")
    many = cost.duration(Gemm(*(a.astype(float) for a in (m, n, k, batch, moved, accumulated))))
    for at in np.ndindex(m.shape):
        one = Gemm(*(int(a[at]) for a in (m, n, k, batch, moved, accumulated)))
        assert cost.duration(one) == many[at]


def test_a_product_bound_by_memory():
    """2 GB at 0.834 of 2039 GB/s take 1176.1 us, twice the 575 us of its tiles: together 1192.6."""
    work = Gemm(4096, 4096, 4096, 1, bytes_moved=2 * 10**9)
    assert a100().duration(work) == pytest.approx(
        4 * US + beside(tile_seconds(4096, 4096, 4096), 2 / (0.834 * 2039)), rel=1e-9
    )
    assert a100().duration(work) == pytest.approx(1196.6 * US, rel=1e-3)


def test_a_weight_gradient_by_hand():
    """6144 x 6144 over 8192 tokens as any product, and 0.51 of 8 bytes x 6144^2 at 2039 GB/s: 75.5 us."""
    work = Gemm(6144, 6144, 8192, 1, bytes_moved=1, accumulated=6144**2)
    compute = max(tile_seconds(6144, 6144, 8192), work.flops / (0.822 * 312e12))
    assert a100().duration(work) == pytest.approx(4 * US + compute + 75.53 * US, rel=1e-5)


def test_main_loops_hide_the_accumulation_of_long_weight_gradients():
    """H100 hides half of 1.39 x 8 bytes x 1024^2 at 3350 GB/s at K = 3382, three quarters at three times that."""
    cost = ComputeCost(load_profile(H100), "bf16")
    plain, accumulated = (
        [cost.duration(Gemm(1024, 1024, k, 1, 1, elements)) for k in (3382, 3 * 3382)] for elements in (1, 1024**2)
    )
    whole = 1.39 * 8 * 1024**2 / 3350e9
    extra = [after - before for before, after in zip(plain, accumulated, strict=True)]
    assert extra == pytest.approx([whole / 2, whole / 4], rel=1e-4)


def test_a_burst_is_faster_than_a_step_at_the_power_limit():
    """8192^3 on H100 in bf16: 0.689 of 989.4 TFLOP/s after seconds, 0.7945 at most before."""
    work = Gemm(8192, 8192, 8192, 1, bytes_moved=1)
    step, burst = (ComputeCost(load_profile(H100), "bf16", burst=burst).duration(work) for burst in (False, True))
    assert work.flops / step == pytest.approx(0.689 * 989.4e12, rel=0.01)
    assert step / burst == pytest.approx(0.7945 / 0.689, rel=0.01)


MIB = 2**20
CLASSES = {"elementwise": 0.834, "norm": 0.70, "softmax": 0.71, "dropout": 0.71}


@pytest.mark.parametrize("name", CLASSES)
def test_memory_bound_tiers_by_hand(name):
    """A100: up to half of the 40 MiB cache 3900 GB/s, from the whole on the class's share of 2039 GB/s, and
    half way between, at 30 MiB, the mean of the two.
    """
    cache, memory = 3900e9, 2039e9 * CLASSES[name]
    expected = {
        10 * MIB: 10 * MIB / cache,
        20 * MIB: 20 * MIB / cache,
        30 * MIB: 30 * MIB * (1 / cache + 1 / memory) / 2,
        40 * MIB: 40 * MIB / memory,
        4000 * MIB: 4000 * MIB / memory,
    }
    for size, time in expected.items():
        assert a100().duration(MemoryBound(name, size)) == pytest.approx(4 * US + time, rel=1e-9)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    st.sampled_from(profile_names()),
    st.sampled_from(sorted(CLASSES)),
    st.integers(0, 200 * MIB),
    st.integers(0, 2**16),
)
def test_memory_bound_time_is_monotone_and_continuous(hardware, name, size, more):
    """A few bytes more take a little more, never less: at most 4 times what they would at memory speed."""
    cost = ComputeCost(load_profile(hardware), "bf16")
    less, longer = (cost.duration(MemoryBound(name, n)) for n in (size, size + more))
    at_memory_speed = more / TrafficCost(load_profile(hardware), "bf16").bandwidth(name)
    assert less <= longer <= less + 4 * at_memory_speed + 1e-15


# ------------------------------------------------------------ terms that only a calibration measures


def measured(**blocks):
    """A100 with more coefficients than it was shipped with."""
    source = {"source": "by-hand"}

    def change(tables):
        tables["sources"]["by-hand"] = "By hand"
        calibrated = tables["calibrated"]
        tables["assumed"].pop("kernel_rates", None)
        for name, value in blocks.get("gemm", {}).items():
            tables["assumed"]["gemm"].pop(name, None)
            calibrated["gemm"][name] = {"value": value, **source}
        for dtype, kernels in blocks.get("kernel_rates", {}).items():
            calibrated.setdefault("kernel_rates", {})[dtype] = {
                name: {
                    field: {"value": value, **source}
                    for field, value in zip(("memory_gb_per_s", "cache_gb_per_s", "start_us"), rates, strict=False)
                }
                for name, rates in kernels.items()
            }

    return profile(change)


def test_a_product_with_a_start():
    """15 us more."""
    work = Gemm(8192, 8192, 8192, 1, bytes_moved=10**8)
    cost = ComputeCost(measured(gemm={"start_us": 15}), "bf16")
    assert cost.duration(work) == pytest.approx(a100().duration(work) + 15 * US, rel=1e-9)


def test_rates_by_row_length_by_hand():
    """LayerNorm at 1000 GB/s and 2 us with rows of 1024, at 500 GB/s and 6 us with rows of 3072: half way between the
    mean of both times, beyond as at the nearest. Others as before, in the same array, too.
    """

    def change(tables):
        rates = {
            length: {
                **{f"{tier}_gb_per_s": {"value": rate, "source": "made-up"} for tier in ("memory", "cache")},
                "start_us": {"value": start, "source": "made-up"},
            }
            for length, rate, start in (("1024", 1000, 2), ("3072", 500, 6))
        }
        tables["sources"]["made-up"] = "By hand"
        tables["calibrated"]["row_rates"] = {"bf16": {"layer_norm_forward": rates}}

    cost, size = ComputeCost(profile(change), "bf16"), 10**9
    expected = {512: 2 + 1000, 1024: 2 + 1000, 2048: 4 + 1500, 3072: 6 + 2000, 8192: 6 + 2000}
    for row, microseconds in expected.items():
        work = MemoryBound("norm", size, "layer_norm", row=row)
        assert cost.duration(work) == pytest.approx((4 + microseconds) * US, rel=1e-9)
        assert cost.class_of(work) == "row_rates.bf16.layer_norm_forward"
    names, rows = ("layer_norm", "rms_norm", "layer_norm"), np.array([2048.0, 2048.0, 64.0])
    many = cost.duration(MemoryBound("norm", size, names, row=rows))
    alone = [
        cost.duration(MemoryBound("norm", size, name, row=int(row))) for name, row in zip(names, rows, strict=True)
    ]
    assert many.tolist() == alone
    assert alone[1] == a100().duration(MemoryBound("norm", size, "rms_norm"))


def test_rates_of_a_kernel_by_hand():
    """Backward LayerNorm at 500 GB/s from memory and 800 in the cache of 40 MiB, forward as before; fp16 as bf16.

    Dropout starts 9 us after the 4 of any kernel.
    """
    extended = measured(kernel_rates={"bf16": {"layer_norm_backward": (500, 800), "dropout_forward": (100, 100, 9)}})
    for dtype in ("bf16", "fp16"):
        cost = ComputeCost(extended, dtype)
        for size, rate in ((4000 * MIB, 500e9), (10 * MIB, 800e9)):
            work = MemoryBound("norm", size, "layer_norm", backward=True)
            assert cost.duration(work) == pytest.approx(4 * US + size / rate, rel=1e-9)
            for other in (
                MemoryBound("norm", size, "layer_norm"),
                MemoryBound("norm", size, "rms_norm", backward=True),
            ):
                assert cost.duration(other) == ComputeCost(measured(), "bf16").duration(other)
    assert cost.duration(MemoryBound("dropout", 10**8, "dropout")) == pytest.approx(13 * US + 1e-3, rel=1e-9)
    assert cost.coefficients_of(work) == ("kernel_overhead_us", "kernel_rates.bf16.layer_norm_backward")
    assert cost.coefficients_of(other) == ("kernel_overhead_us", "memory_bound.norm", "l2_bandwidth_gb_per_s")


# ------------------------------------------------------------ the kernels of a layer


def kernels(plan, kind, **changes):
    """(part, work) of the kernels of one kind in a compiled layer, first ring position."""
    steps = [step for step in program(plan, **changes).instructions if isinstance(step, Compute)]
    return [(step.part, step.work[0]) for step in steps if isinstance(step.work[0], kind)]


SPLIT = ["", "tp=4", "tp=4,sequence_parallel", "ulysses=4", "ring=4", "tp=2,ulysses=2,ring=2"]


@pytest.mark.parametrize("plan", SPLIT)
def test_products_of_a_layer_by_the_published_formula(plan):
    """24 s b h^2 FLOPs forward, twice that backward, shared by the ranks; unfused attention adds 4 s^2 b h."""
    ranks = scenario(plan).plan.gpus
    linear, square = 24 * 256 * 3 * 256**2, 4 * 256**2 * 3 * 256
    for attention in ("flash", "unfused") if "ring" not in plan else ("flash",):
        found = {"forward": 0, "dgrad": 0, "wgrad": 0}
        for part, work in kernels(plan, Gemm, micro_batch=3, attention=attention):
            found[part] += work.flops
        scores = square if attention == "unfused" else 0
        assert found["forward"] * ranks == linear + scores
        assert found["dgrad"] * ranks == linear + 2 * scores
        assert found["wgrad"] * ranks == linear


@pytest.mark.parametrize("plan", SPLIT)
def test_attention_flops_by_the_published_formula(plan):
    """Causal flash attention: 2 s^2 b h forward, 2.5 times that backward, shared by the ranks."""
    ranks = scenario(plan).plan.gpus
    found = {"forward": 0, "backward": 0}
    for part, work in kernels(plan, FlashAttention, micro_batch=3):
        found[part] += work.flops
    assert found["forward"] * ranks == 2 * 256**2 * 3 * 256
    assert found["backward"] * ranks == 5 * 256**2 * 3 * 256


@pytest.mark.parametrize("plan", SPLIT)
def test_weight_gradients_accumulate_every_matrix_once(plan):
    """12 h^2 elements over tp, on every rank of the sequence axes."""
    accumulated = sum(work.accumulated for _, work in kernels(plan, Gemm))
    assert accumulated * scenario(plan).plan.tp == 12 * 256**2


def test_traffic_of_attention():
    """Forward reads q, k, v and writes the output, 8 s b h bytes; backward moves each and its gradient, 16."""
    found = {part: work.bytes_moved for part, work in kernels("", FlashAttention)}
    assert found == {"forward": 8 * 256 * 256, "backward": 16 * 256 * 256}


def test_a_sum_of_gradients_is_an_addition():
    """Of a residual and a norm, under no plan: two gradients of 2 s b h bytes read, one written."""
    found = [work for part, work in kernels("", MemoryBound) if part == "accumulate"]
    assert found == [MemoryBound("elementwise", 3 * 2 * 256 * 256, "add")] * 2


def test_traffic_of_norms_and_residuals():
    """In units of one activation, 2 s b h bytes: a norm reads one and writes one; backward it reads the
    gradient and its input and writes a gradient. A residual reads two and writes one. Weights and statistics
    (4 h and 8 s b bytes) are small beside. Without dropout a residual has no gradient kernel but the sum of
    the gradient for its bias, with dropout it also reads gradient and mask and writes a gradient: 2.5 more.
    """
    unit = 2 * 256 * 256

    def traffic(operator, part, dropout):
        steps = program("", dropout=dropout).instructions
        found = [s for s in steps if isinstance(s, Compute) and (s.operator, s.part) == (operator, part)]
        return sum(step.work[0].bytes_moved for step in found) / unit

    assert traffic("norm1", "forward", 0.0) == pytest.approx(2, rel=0.03)
    assert traffic("norm1", "backward", 0.0) == pytest.approx(3, rel=0.03)
    assert traffic("residual1", "forward", 0.0) == pytest.approx(3, rel=0.03)
    assert traffic("residual1", "forward", 0.1) == pytest.approx(3.5, rel=0.03)
    assert traffic("residual1", "backward", 0.0) == pytest.approx(1, rel=0.03)
    assert traffic("residual1", "backward", 0.1) == pytest.approx(3.5, rel=0.03)


# ------------------------------------------------------------ the ring


def causal_pairs(queries, keys):
    """Pairs that a causal mask leaves between two sets of positions, the diagonal counted half."""
    return sum(Fraction(1 if key < query else 0) for query in queries for key in keys) + Fraction(
        len(set(queries) & set(keys)), 2
    )


def owned(rank, degree, tokens, cut):
    """Positions of a rank: one stretch, or half-chunks r and 2P - 1 - r."""
    if cut == "contiguous":
        return list(range(rank * tokens, (rank + 1) * tokens))
    half = tokens // 2
    return [chunk * half + i for chunk in (rank, 2 * degree - 1 - rank) for i in range(half)]


@pytest.mark.parametrize("cut", ["zigzag", "contiguous"])
@pytest.mark.parametrize("degree", [2, 3, 4, 5, 8])
def test_ring_blocks_count_the_pairs_of_the_mask(degree, cut):
    """Every step of every rank, counted position by position: the keys at step i are those of rank r - i."""
    tokens = 4
    for step in range(degree):
        blocks = ring_blocks(tokens, degree, step, causal=True, cut=cut)
        for rank in range(degree):
            block = blocks[rank if len(blocks) > 1 else 0]
            keys = owned((rank - step) % degree, degree, tokens, cut)
            pairs = causal_pairs(owned(rank, degree, tokens, cut), keys)
            assert 2 * pairs == (block.twice_pairs if block else 0)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(2, 64), st.integers(1, 500), st.sampled_from(["zigzag", "contiguous"]), st.booleans())
def test_ring_shares_sum_to_half_the_square(degree, half, cut, causal):
    """All ranks and steps together: half of (P x tokens)^2 under a causal mask, the whole of it without."""
    tokens, total = 2 * half, 0
    for step in range(degree):
        blocks = ring_blocks(tokens, degree, step, causal=causal, cut=cut)
        twice = [block.twice_pairs if block else 0 for block in blocks]
        total += sum(twice) if len(twice) == degree else degree * twice[0]
    assert total == (1 if causal else 2) * (degree * tokens) ** 2


@pytest.mark.parametrize("cut", ["zigzag", "contiguous"])
def test_a_block_fits_its_kernel(cut):
    """No kernel computes more pairs than its queries times its keys; a masked one computes half."""
    for step in range(4):
        for block in filter(None, ring_blocks(8, 4, step, causal=True, cut=cut)):
            assert block.twice_pairs == (1 if block.causal else 2) * block.queries * block.keys
