"""Fused attention: blocks by hand, blocks started one by one, the library's rule for splits, and measured times."""

import csv
import heapq
from dataclasses import astuple, fields, replace
from itertools import product
from math import ceil
from pathlib import Path

import numpy as np
import pytest

from spsim import Scenario, simulate
from spsim.costs.kernels import ComputeCost
from spsim.costs.key_split import splits
from spsim.errors import InputError
from spsim.inputs.documents import Documents, drawn
from spsim.inputs.profiles import load_profile, parse_profile, profile_names
from spsim.inputs.resources import profiles_directory, read_toml
from spsim.measuring.calibrate.attention_fit import fit_attention
from spsim.measuring.calibrate.fit import fit_profile
from spsim.measuring.calibrate.records import Measurement, append_measurements, read_measurements
from spsim.measuring.calibrate.samples import Batch, attention_samples
from spsim.measuring.calibrate.shapes import flash_attention
from spsim.units import US_PER_S
from spsim.work import FlashAttention, Gemm
from tests.cases import H100, model

US = 1e-6
UNITS, PEAK = 132, 989.4e12
MEASURED = Path(__file__).parents[1] / "experiments/data/h100_attention.csv"


def attention(
    kernel="cudnn", direction="forward", *, batch=1, heads=16, kv_heads=None, size=128, queries=4096, keys=None,
    causal=False,
):  # fmt: skip
    """A kernel as the compiler describes it; causal: the square of equal sides."""
    keys, kv_heads = keys or queries, kv_heads or heads
    passes = 1 if direction == "forward" else 2
    moved = passes * 2 * (queries * heads + keys * kv_heads) * batch * size * 2
    twice_pairs = queries * keys * (1 if causal else 2)
    return FlashAttention(
        kernel, direction, batch, heads, kv_heads, size, size, queries, keys, twice_pairs, causal, moved
    )  # fmt: skip


def seconds(work, profile=None):
    return float(ComputeCost(profile or load_profile(H100), "bf16").duration(work))


def blocks_only(**changes):
    """H100 with a kernel of nothing but blocks: half of the peak, 2 us a block, no start and no traffic."""
    source = {"source": "by-hand"}
    tile = {"128": {"fraction": {"value": 0.5, **source}, "block_us": {"value": 2, **source}}}
    zero = {name: {"value": 0, **source} for name in ("start_us", "traffic_exposed")}
    one_way = {**zero, "block_rows": {"value": 128, **source}, "causal": tile, "full": tile}
    one_way |= {name: {"value": value, **source} for name, value in changes.items()}
    tables = read_toml(profiles_directory() / f"{H100}.toml")
    tables["sources"]["by-hand"] = "By hand"
    kernels = tables["calibrated"]["attention"]
    kernels["cudnn"] = {"forward": one_way, "backward": one_way}
    tables["calibrated"]["kernel_overhead_us"] = {"value": 0, **source}
    return parse_profile(tables, "by hand")


TOKEN = {"forward": 128 * 4 * 128 / (0.5 * PEAK / UNITS), "backward": 128 * 10 * 128 / (0.5 * PEAK / UNITS)}
"""Seconds for which a block of 128 rows of 128 loops over one token, at half of the peak."""


# ------------------------------------------------------------ by hand


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize(("heads", "waves"), [(4, 1), (8, 2), (9, 3), (1, 1)])
def test_full_attention_runs_in_waves(direction, heads, waves):
    """4,096 tokens are 32 blocks a head: 128, 256, 288 and 32 blocks on 132 units."""
    expected = waves * (2 * US + 4096 * TOKEN[direction])
    assert seconds(attention("cudnn", direction, heads=heads), blocks_only()) == pytest.approx(expected, rel=1e-9)


def test_backward_blocks_take_keys():
    """256 queries on 8,192 keys: 2 blocks forward, 64 backward, a head; both in one wave."""
    for direction, length in (("forward", 8192), ("backward", 256)):
        work = attention("cudnn", direction, heads=2, queries=256, keys=8192)
        assert seconds(work, blocks_only()) == pytest.approx(2 * US + length * TOKEN[direction], rel=1e-9)


def test_two_blocks_share_a_unit():
    """Two at once take as long as one after the other; one alone reaches 0.8 of the rate of both."""
    shared = blocks_only(blocks_per_unit=2, lone_rate=0.8)
    loop = 2 * 4096 * TOKEN["forward"]
    for heads, expected in ((8, loop), (4, loop / (2 * 0.8)), (9, loop + loop / (2 * 0.8))):
        starts = 2 * US * ceil(heads * 32 / 264)
        assert seconds(attention(heads=heads), shared) == pytest.approx(starts + expected, rel=1e-9)


def test_a_block_of_a_ring_sees_its_keys():
    """Rank 3 of 4 with all keys before its own: the last query sees 4,096 keys, the mean block 3,648."""
    work = replace(attention(heads=64, queries=1024, keys=4096, causal=True), twice_pairs=1024 * 1024 * 7)
    mean = 64 * 8 * (2 * US + 3648 * TOKEN["forward"]) / UNITS
    longest = 2 * US + 4096 * TOKEN["forward"]
    assert mean + 0.4 * longest < seconds(work, blocks_only()) < mean + 0.8 * longest
    alone = replace(work, heads=8, kv_heads=8)
    assert seconds(alone, blocks_only()) == pytest.approx(longest, rel=1e-9)


# ------------------------------------------------------------ blocks started one by one


def started_one_by_one(direction, heads, per_head):
    """Each block on the unit that is free first: forward the mask leaves 1, 2, 3, ... tiles of keys, backward the
    first keys are seen by all queries.
    """
    lengths = [2 * US + 128 * tiles * TOKEN[direction] for tiles in range(1, per_head + 1)]
    free = [0.0] * UNITS
    for length in heads * (lengths if direction == "forward" else lengths[::-1]):
        heapq.heapreplace(free, free[0] + length)
    return max(free)


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_causal_attention_is_as_long_as_blocks_started_one_by_one(direction):
    """From one head to hundreds, and from 4 blocks of a head to more than there are units."""
    cost, errors = ComputeCost(blocks_only(), "bf16"), []
    for per_head in (4, 8, 12, 16, 24, 32, 48, 64, 96, 112, 128, 132, 144, 192, 256):
        for heads in (1, 2, 3, 4, 5, 8, 12, 16, 20, 32, 40, 64, 96):
            time = float(cost.duration(attention("cudnn", direction, heads=heads, queries=128 * per_head, causal=True)))
            errors.append(time / started_one_by_one(direction, heads, per_head) - 1)
    assert np.mean(np.abs(errors)) < 0.025
    assert np.percentile(np.abs(errors), 95) < 0.08


def documents_started_one_by_one(direction, heads, lengths):
    """The same of documents in a row: each has blocks of 128 rows, the last of which may hold fewer."""
    free = [0.0] * UNITS
    for _ in range(heads):
        for length in lengths:
            tiles = range(1, ceil(length / 128) + 1)
            for seen in tiles if direction == "forward" else reversed(tiles):
                heapq.heapreplace(free, free[0] + 2 * US + 128 * seen * TOKEN[direction])
    return max(free)


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_attention_within_documents_is_as_long_as_blocks_started_one_by_one(direction):
    """A few long ones and many short ones."""
    cost, errors = ComputeCost(blocks_only(), "bf16"), []
    for mean, heads, seed in product((512, 2048, 8192), (8, 16, 32), (0, 1, 2)):
        lengths = drawn(32768, mean, seed)
        seen = Documents(lengths).of_queries(range(32768))
        work = attention("cudnn", direction, heads=heads, queries=32768, causal=True)
        work = replace(work, twice_pairs=seen.twice_pairs, documents=seen.documents, longest=seen.longest)
        errors.append(float(cost.duration(work)) / documents_started_one_by_one(direction, heads, lengths) - 1)
    assert np.mean(np.abs(errors)) < 0.025
    assert np.max(np.abs(errors)) < 0.08


# ------------------------------------------------------------ keys divided among blocks


def as_the_library_says(blocks, slots, key_blocks):
    """num_splits_heuristic of csrc/flash_attn/flash_api.cpp, number by number."""
    if blocks >= 0.8 * slots:
        return 1
    uses = {}
    for parts in range(1, min(128, slots, key_blocks) + 1):
        if parts == 1 or ceil(key_blocks / parts) != ceil(key_blocks / (parts - 1)):
            waves = blocks * parts / slots
            uses[parts] = waves / ceil(waves)
    return next(parts for parts, use in uses.items() if use >= 0.85 * max(uses.values()))


def test_keys_are_split_as_the_library_splits_them():
    cases = list(product((1, 2, 7, 32, 63, 64, 128, 144, 200, 220), (216, 264), (1, 4, 8, 64, 999)))
    found = splits(*(np.array(column, dtype=float) for column in zip(*cases, strict=True)))
    assert found.tolist() == [as_the_library_says(*case) for case in cases]


@pytest.mark.parametrize(
    ("batch", "heads", "kv_heads", "keys", "us"),
    [(1, 32, 8, 65536, 105.98), (16, 32, 8, 4096, 98.34), (1, 8, 1, 131072, 54.45)],
)  # fmt: skip
def test_one_query_against_a_cache_is_as_measured(batch, heads, kv_heads, keys, us):
    """H100, torch 2.11: FlashAttention-2 divides the keys, so that all units read."""
    work = attention(
        "flash_attention_2", batch=batch, heads=heads, kv_heads=kv_heads, queries=1, keys=keys
    )  # fmt: skip
    assert seconds(work) / US == pytest.approx(us, rel=0.06)


def test_one_query_is_refused_by_a_kernel_that_does_not_split():
    with pytest.raises(InputError, match=r"one query.*flash_attention_2"):
        seconds(attention("cudnn", queries=1, keys=4096))


# ------------------------------------------------------------ against measurements


def measured_rows():
    """The shapes of the shipped file, forward and backward, as a calibration has them."""
    with MEASURED.open() as file:
        for row in csv.DictReader(file):
            for direction in ("forward", "backward"):
                sizes = {name: int(row[name]) for name in ("batch", "heads", "head_dim", "tokens")}
                shape = flash_attention(
                    row["kernel"], "bf16", direction, kv_heads=sizes["heads"], causal=row["causal"] == "1", **sizes
                )  # fmt: skip
                yield shape.model_copy(update={"time_us": float(row[f"{direction}_us"]), "clock": "cuda_events"})


def errors_of(rows, profile):
    batch = Batch(attention_samples(rows))
    return np.abs(batch.times(profile) / batch.seconds - 1)


def test_the_shipped_h100_meets_its_measurements():
    errors = errors_of(list(measured_rows()), load_profile(H100))
    assert len(errors) == 612
    assert errors.mean() < 0.03
    assert np.percentile(errors, 90) < 0.06


@pytest.mark.slow
def test_half_of_the_rows_predict_the_other_half():
    """Of cuDNN forward, begun with another kernel's coefficients; the other passes alike, with more time."""
    rows = [row for row in measured_rows() if row.kernel == "cudnn" and row.name == "forward"]
    order = np.random.default_rng(4).permutation(len(rows))
    inside, outside = ([rows[i] for i in part] for part in (order[::2], order[1::2]))
    fitted = fit_attention(inside, blocks_only()).profile
    errors = errors_of(outside, fitted)
    assert errors.mean() < 0.03
    assert np.percentile(errors, 90) < 0.06


# NVIDIA/cudnn-frontend at 3929da2, benchmark/sdpa_benchmark_training/results/h200_919_only_cudnn: 64 heads on 8 of
# keys, head size 128; TFLOP/s full and causal, forward and backward.
H200 = {
    2048: (633, 504, 484, 370), 4096: (671, 560, 591, 474), 8192: (691, 594, 644, 541), 16384: (702, 612, 673, 579),
    32768: (693, 572, 688, 581),
}  # fmt: skip


def test_cudnn_on_another_device_of_the_same_chip():
    """Published rates on H200, where H100's coefficients were not fitted, and of grouped heads."""
    profile, errors = load_profile("dgx-h200"), []
    for tokens, rates in H200.items():
        cases = [(direction, causal) for causal in (False, True) for direction in ("forward", "backward")]
        for (direction, causal), rate in zip(cases, rates, strict=True):
            work = attention("torch", direction, heads=64, kv_heads=8, queries=tokens, causal=causal)
            errors.append(abs(seconds(work, profile) * rate * 1e12 / work.flops - 1))
    assert np.mean(errors) < 0.04
    assert max(errors) < 0.1


# TFLOP/s of Dao-AILab/flash-attention, assets at 0251105 (hidden size 2048, 16,384 tokens in all), the backward figure
# of the FlashAttention-3 paper, and others that no coefficient was fitted to.
CHARTED = [
    ("dgx-h100", "flash_attention_3", "forward", False, 512, 16, 467),
    ("dgx-h100", "flash_attention_3", "forward", True, 2048, 16, 521),
    ("dgx-h100", "flash_attention_3", "backward", False, 16384, 16, 561),
    ("dgx-h100", "flash_attention_2", "forward", False, 2048, 16, 360),  # not in the fit
    ("dgx-a100-80gb", "torch", "forward", True, 8192, 32, 205.3),  # not in the fit
    ("dgx-a100-80gb", "torch", "backward", True, 8192, 32, 174.4),  # not in the fit
    ("dgx-a100-80gb", "torch", "forward", False, 65536, 32, 217),  # not in the fit
]


@pytest.mark.parametrize(("name", "kernel", "direction", "causal", "tokens", "heads", "tflops"), CHARTED)
def test_published_rates_are_met(name, kernel, direction, causal, tokens, heads, tflops):
    batch = max(1, 16384 // tokens) if heads == 16 else 1
    work = attention(kernel, direction, batch=batch, heads=heads, queries=tokens, causal=causal)
    rate = work.flops / seconds(work, load_profile(name)) / 1e12
    assert rate == pytest.approx(tflops, rel=0.06)


@pytest.mark.parametrize("name", profile_names())
def test_attention_is_slower_backward_and_causal(name):
    """FLOPs over time, on the kernel that torch picks."""
    profile = load_profile(name)

    def rate(direction, size, causal):
        work = attention("torch", direction, heads=32, size=size, causal=causal)
        return work.flops / seconds(work, profile)

    for size in (64, 128):
        assert rate("backward", size, False) < rate("forward", size, False)
        for direction in ("forward", "backward"):
            assert rate(direction, size, True) < rate(direction, size, False)


# ------------------------------------------------------------ sizes, types, names


def test_head_sizes_between_measured_ones_lie_between_them():
    """80 and 96 take more than 64 and less than 128, in both kernels, and share of the peak and start are between."""
    for kernel in ("cudnn", "flash_attention_2"):
        times = [seconds(attention(kernel, size=size, heads=32)) for size in (64, 80, 96, 128)]
        assert times == sorted(times)
        half_way = attention(kernel, size=96, heads=32)
        rate = half_way.flops / seconds(half_way)
        outer = [attention(kernel, size=size, heads=32) for size in (64, 128)]
        assert min(w.flops / seconds(w) for w in outer) < rate < max(w.flops / seconds(w) for w in outer)


def streaming():
    """Share of the memory bandwidth that operands pass at."""
    return load_profile(H100).coefficients.memory_bound.elementwise.value


def test_few_queries_draw_no_more_than_the_memory_gives():
    """Reading all keys and values takes their bytes at what a copy reaches of 3,350 GB/s at least."""
    work = attention("flash_attention_2", batch=64, heads=32, queries=1, keys=8192)
    assert seconds(work) > work.bytes_moved / (streaming() * 3350e9)


NUMBERS = [field.name for field in fields(FlashAttention) if field.type == "int"]


def test_arrays_take_the_times_of_each_alone():
    """Kernels, directions, masks, sizes, splits and one query, bit for bit."""
    works = [
        attention(kernel, direction, batch=batch, heads=heads, size=size, queries=tokens, causal=causal)
        for kernel in ("cudnn", "flash_attention_2", "torch") for direction in ("forward", "backward")
        for batch, heads, size, tokens, causal in (
            (1, 2, 64, 512, True), (2, 7, 96, 1000, False), (1, 64, 128, 8192, True)
        )
    ]  # fmt: skip
    works.append(attention("flash_attention_2", heads=32, kv_heads=8, queries=1, keys=9999))
    columns = zip(*(astuple(work) for work in works), strict=True)
    named = zip((field.name for field in fields(FlashAttention)), columns, strict=True)
    many = FlashAttention(**{name: np.array(v, dtype=float) if name in NUMBERS else v for name, v in named})
    many = replace(many, dtype=None)  # kernels of one type are an array
    found = ComputeCost(load_profile(H100), "bf16").duration(many)
    assert found.tolist() == [seconds(work) for work in works]


WITH_FP8 = [name for name in profile_names() if "fp8" in load_profile(name).datasheet.peak_tflops]


@pytest.mark.parametrize("name", WITH_FP8)
def test_attention_beside_fp8_products_runs_in_16_bits(name):
    """Without coefficients of its own it takes the time of bf16, not half of it, and names those that it used."""
    half, eighth = (ComputeCost(load_profile(name), dtype) for dtype in ("bf16", "fp8"))
    work = attention("transformer_engine", causal=True)
    assert eighth.duration(work) == half.duration(work)
    picked = load_profile(name).attention_kernel("transformer_engine")
    assert eighth.class_of(work) == half.class_of(work) == f"attention.{picked}.forward.causal"
    assert "attention_picked.transformer_engine" in half.coefficients_of(work)
    product = Gemm(8192, 8192, 8192, 1, bytes_moved=1)
    assert eighth.duration(product) < 0.7 * half.duration(product)


def test_attention_of_another_type_has_its_own_coefficients():
    """fp32 at half of its peak of 66.9 TFLOP/s; bf16 as before."""
    tables = read_toml(profiles_directory() / f"{H100}.toml")
    own = blocks_only().coefficients.attention["cudnn"].model_dump(exclude_defaults=True)
    tables["sources"]["by-hand"] = "By hand"
    tables["calibrated"]["attention_by_dtype"] = {"fp32": {"cudnn": own}}
    extended = parse_profile(tables, "profile")
    work = attention(heads=4)
    assert seconds(work, extended) == seconds(work)
    start = extended.coefficients.kernel_overhead_us.value * US
    expected = start + 2 * US + 4096 * TOKEN["forward"] * PEAK / 66.9e12
    assert ComputeCost(extended, "fp32").duration(work) == pytest.approx(expected, rel=1e-9)


def test_traffic_is_a_bound():
    """3.35 GB of operands at what a copy reaches of 3,350 GB/s take a millisecond at that share."""
    work = replace(attention(heads=1, queries=128), bytes_moved=round(3_350_000_000 * streaming()))
    assert seconds(work, blocks_only()) == pytest.approx(1000 * US, rel=1e-6)


# ------------------------------------------------------------ which kernel


@pytest.mark.parametrize(
    ("hardware", "attention_of", "used"),
    [
        (H100, "flash", "cudnn"), (H100, "flash_attention_2", "flash_attention_2"), (H100, "unfused", "unfused"),
        ("dgx-a100-80gb", "flash", "flash_attention_2"), ("cpu-2", "flash", "torch_cpu"),
    ],
)  # fmt: skip
def test_a_result_names_its_kernel(hardware, attention_of, used):
    scenario = Scenario(hardware=hardware, model=model(attention=attention_of), workload={"seq_len": 256})
    result = simulate(scenario)
    assert result.attention == result.to_json()["attention"] == used


def test_a_kernel_is_asked_for_by_its_name():
    """Slower ones make a longer layer; one that the profile lacks is refused with those that it has."""
    models = [model(attention=name, heads=4, head_dim=128) for name in ("flash", "cudnn", "flash_attention_2")]
    layers = [simulate(Scenario(hardware=H100, model=own, workload={"seq_len": 16384})) for own in models]
    assert layers[0].layer_forward_s == layers[1].layer_forward_s < layers[2].layer_forward_s
    with pytest.raises(InputError, match=r"memory_efficient.*dgx-h100 has no such kernel.*cudnn, flash_attention_2"):
        Scenario(hardware=H100, model=model(attention="memory_efficient"), workload={"seq_len": 256})


def test_picked_kernels_are_there():
    tables = read_toml(profiles_directory() / f"{H100}.toml")
    tables["calibrated"]["attention_picked"]["torch"]["kernel"] = "memory_efficient"
    with pytest.raises(InputError, match=r"attention_picked\.torch is 'memory_efficient'"):
        parse_profile(tables, "profile")
    del tables["calibrated"]["attention_picked"]["torch"]
    with pytest.raises(InputError, match="attention_picked has no torch"):
        parse_profile(tables, "profile")


def test_a_row_without_a_kernel_is_of_the_flash_kernel():
    """Raw files from before the column: FlashAttention-2 on a GPU, torch's own on a CPU."""
    row = {
        "kind": "attention",
        "name": "forward",
        "dtype": "bf16",
        "heads": 1,
        "head_dim": 64,
        "queries": 128,
        "keys": 128,
    }
    for clock, kernel in (("cuda_events", "flash_attention_2"), ("thread_cpu", "torch_cpu")):
        (sample,) = attention_samples([Measurement(**row, causal=True, clock=clock, time_us=US_PER_S)])
        assert sample.work.kernel == kernel


@pytest.mark.slow
def test_a_calibration_says_which_kernel_torch_picks():
    """And a kernel that the base does not have: begun with another's, whose facts are then assumed of it."""
    rows = [row for row in measured_rows() if row.kernel == "cudnn" and row.name == "forward"][::4]
    other = [row.model_copy(update={"kernel": "memory_efficient", "time_us": 3 * row.time_us}) for row in rows]
    picked = Measurement(kind="environment", name="attention_kernel", text="memory_efficient")
    found = fit_profile([*other, picked], load_profile(H100), "mine").profile
    assert found.attention_kernel("torch") == "memory_efficient"
    assert found.attention_kernel("transformer_engine") == "cudnn"
    assert errors_of(other, found).mean() < 0.05
    assert "attention.memory_efficient.forward.block_rows" in found.assumed
    assert "attention.memory_efficient.forward.full.128.fraction" not in found.assumed
    assert found.coefficients.attention["cudnn"] == load_profile(H100).coefficients.attention["cudnn"]


def test_raw_files_from_before_the_column_are_read_and_not_added_to(tmp_path):
    file = tmp_path / "raw.csv"
    append_measurements(file, [Measurement(kind="environment", name="date", text="2026-11-27")])
    whole = file.read_text().splitlines()
    column = whole[0].split(",").index("kernel")
    file.write_text("".join(",".join(p for i, p in enumerate(line.split(",")) if i != column) + "\n" for line in whole))
    (row,) = read_measurements(file)
    assert (row.text, row.kernel) == ("2026-11-27", None)
    with pytest.raises(InputError, match=r"raw\.csv: was measured before attention had several kernels"):
        append_measurements(file, [row])
