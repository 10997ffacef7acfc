"""Shipped hardware profiles keep their promises, and the schema refuses what a user may get wrong."""

import pickle
from copy import deepcopy
from functools import cache
from math import nan

import pytest

from spsim.errors import InputError
from spsim.inputs.inheritance import with_base
from spsim.inputs.profiles import load_profile, parse_profile, profile_names
from spsim.inputs.resources import profiles_directory, read_toml

GPU_PROFILES = [name for name in profile_names() if name != "cpu-2"]
NVSWITCH_WITH_NVLS = {"dgx-h100", "dgx-h200", "dgx-b200", "dgx-b300", "gb200-nvl72", "gb300-nvl72", "h800-8", "h20-8"}
BLOCKS = ("datasheet", "calibrated", "assumed", "inherited")


def tables(name):
    """A fresh copy of a shipped profile's TOML tables, with those of its base."""
    return pickle.loads(pickled_tables(name))


@cache
def pickled_tables(name):
    """Read once."""
    data = read_toml(profiles_directory() / f"{name}.toml")
    return pickle.dumps(with_base(data, load_profile(data["base"]), name) if "base" in data else data)


def changed(name, path, value):
    """The tables of a profile with the entry at a dotted path set, or deleted where the value is None."""
    data = tables(name)
    *parents, last = path.split(".")
    table = data
    for key in parents:
        table = table[int(key)] if key.isdigit() and isinstance(table, list) else table[key]
    if value is None:
        del table[last]
    else:
        table[last] = value
    return data


def refusal(data):
    """The message with which a profile is refused; one line."""
    with pytest.raises(InputError) as caught:
        parse_profile(data, "profile")
    message = str(caught.value)
    assert message.startswith("profile: ")
    assert "\n" not in message
    return message


def numbers(value, path=""):
    """(path, table) of every table that holds a number or a curve."""
    if isinstance(value, list):
        for index, item in enumerate(value):
            yield from numbers(item, f"{path}{index}.")
    elif isinstance(value, dict):
        if {"value", "points", "source"} & value.keys():
            yield path, value
        else:
            for key, item in value.items():
                yield from numbers(item, f"{path}{key}.")


def curves(profile):
    """(level, operation, curve) of every collective curve of a profile."""
    levels = {level.name: level for level in profile.datasheet.topology}
    for name, operations in profile.coefficients.collectives.items():
        for operation, found in operations.items():
            for curve in found:
                yield levels[name], operation, curve


def wire_factor(operation, ranks):
    """Bus bandwidth x time / message, as nccl-tests defines it."""
    if operation == "send_receive":
        return 1.0
    return (2 if operation == "all_reduce" else 1) * (ranks - 1) / ranks


# ------------------------------------------------------------ shipped profiles


def test_shipped_names():
    assert {
        "cpu-2", "dgx-a100-40gb", "dgx-a100-80gb", "dgx-h100", "dgx-h200", "dgx-b200", "dgx-b300", "gb200-nvl72",
        "gb300-nvl72", "a100-pcie-8", "h100-pcie-8", "l40s-8", "mi300x-8", "h800-8", "h20-8", "a800-8", "rtx4090-8",
    } <= set(profile_names())  # fmt: skip


@pytest.mark.parametrize("name", profile_names())
def test_profile_loads_under_its_own_name(name):
    assert load_profile(name).name == name


@pytest.mark.parametrize("name", profile_names())
def test_path_and_name_load_the_same_profile(name):
    assert load_profile(profiles_directory() / f"{name}.toml") == load_profile(name)


@pytest.mark.parametrize("name", profile_names())
def test_every_number_has_a_known_source(name):
    data = tables(name)
    found = [item for block in BLOCKS for item in numbers(data.get(block, {}), f"{block}.")]
    assert len(found) > 30
    for path, table in found:
        assert table.get("source") in data["sources"], path
        assert len(data["sources"][table["source"]]) > 20, path


@pytest.mark.parametrize("name", profile_names())
def test_no_number_stands_outside_a_table_with_a_source(name):
    def bare(value, path=""):
        if isinstance(value, dict) and not {"value", "points"} & value.keys():
            return [hit for key, item in value.items() for hit in bare(item, f"{path}{key}.")]
        if isinstance(value, list):
            return [hit for index, item in enumerate(value) for hit in bare(item, f"{path}{index}.")]
        return [path] if isinstance(value, int | float) and not isinstance(value, bool) else []

    data = tables(name)
    hits = [hit for block in BLOCKS for hit in bare(data.get(block, {}), f"{block}.")]
    assert [hit for hit in hits if not hit.endswith(".gpus.")] == []


@pytest.mark.parametrize("name", profile_names())
def test_two_coefficients_are_fitted_on_training_cases(name):
    """The spread of H100s, and products in 8 bits of a whole rack of GB200."""
    profile = load_profile(name)
    coefficients = profile.coefficients
    straggler = coefficients.straggler if name in ("dgx-h100", "h800-8", "h20-8") else None
    own = {"gb200-nvl72": coefficients.gemm.sustained_limit.get("fp8")}.get(name, straggler)
    assert profile.fitted_on == frozenset(own.fitted_on if own else ())


@pytest.mark.parametrize("name", profile_names())
def test_peak_is_units_times_flop_per_clock_times_clock(name):
    sheet = load_profile(name).datasheet
    flop_per_clock = sheet.compute_units.value * sheet.flop_per_clock_per_unit.value
    assert sheet.peak_tflops["bf16"].value == pytest.approx(
        flop_per_clock * sheet.clock_tensor_mhz.value / 1e6, rel=0.01
    )


@pytest.mark.parametrize("name", GPU_PROFILES)
def test_tf32_is_half_of_bf16(name):
    profile = load_profile(name)
    assert profile.peak("fp16") == profile.peak("bf16")
    assert profile.peak("tf32") == pytest.approx(profile.peak("bf16") / 2, rel=0.001)


WITHOUT_FP8 = {"dgx-a100-40gb", "dgx-a100-80gb", "a100-pcie-8", "a800-8"}


@pytest.mark.parametrize("name", GPU_PROFILES)
def test_fp8_is_twice_bf16_where_there_is_any(name):
    """Ampere has no fp8; pages that give it 624 TFLOP/s mean int8."""
    peaks = load_profile(name).datasheet.peak_tflops
    assert ("fp8" not in peaks) == (name in WITHOUT_FP8)
    if "fp8" in peaks:
        assert peaks["fp8"].value == pytest.approx(2 * peaks["bf16"].value, rel=0.002)


def test_fp8_is_twice_bf16_on_h100_and_missing_on_a100():
    h100 = load_profile("dgx-h100")
    assert h100.peak("fp8") == pytest.approx(2 * h100.peak("bf16"), rel=0.001)
    with pytest.raises(InputError, match=r"'fp8'.*A100.*bf16"):
        load_profile("dgx-a100-80gb").peak("fp8")


@pytest.mark.parametrize("name", profile_names())
def test_every_peak_has_a_gemm_fraction(name):
    profile = load_profile(name)
    assert profile.coefficients.gemm.fraction.keys() == profile.datasheet.peak_tflops.keys()


@pytest.mark.parametrize("name", profile_names())
def test_reported_memory_is_not_the_label(name):
    memory = load_profile(name).datasheet.memory
    # A100 reports its label in GiB, 81920 MiB: 7 % more bytes than the label says; L40S 0.6 % more.
    assert memory.reported_mib.value * 2**20 != pytest.approx(memory.label_gb.value * 1e9, rel=0.005)


REPORTED_MIB = [
    ("dgx-a100-40gb", 40960), ("dgx-a100-80gb", 81920), ("dgx-h100", 81559), ("dgx-h200", 143771),
    ("dgx-b200", 183359), ("dgx-b300", 275038), ("gb200-nvl72", 189471), ("gb300-nvl72", 284206), ("l40s-8", 46068),
    ("h20-8", 97871), ("rtx4090-8", 24564),
]  # fmt: skip


@pytest.mark.parametrize(("name", "mib"), REPORTED_MIB)
def test_reported_memory(name, mib):
    assert load_profile(name).datasheet.memory.reported_mib.value == mib


LINK_RATES = [
    ("dgx-a100-40gb", "nvlink", 8, 300, 25),
    ("dgx-a100-80gb", "nvlink", 8, 300, 25),
    ("dgx-h100", "nvlink", 8, 450, 50),
    ("dgx-h200", "nvlink", 8, 450, 50),
    ("dgx-b200", "nvlink", 8, 900, 50),
    ("dgx-b300", "nvlink", 8, 900, 100),
    ("gb200-nvl72", "nvlink", 72, 900, 50),
    ("gb300-nvl72", "nvlink", 72, 900, 100),
    ("mi300x-8", "xgmi", 8, 448, 50),
    ("a100-pcie-8", "pcie", 8, 31, None),
    ("l40s-8", "pcie", 8, 31, None),
    ("h100-pcie-8", "pcie", 8, 63, None),
    ("h800-8", "nvlink", 8, 200, 50),
    ("h20-8", "nvlink", 8, 450, 50),
    ("a800-8", "nvlink", 8, 200, 25),
    ("rtx4090-8", "pcie", 8, 31, None),
]
"""Profile, inner level, its GPUs, GB/s of one GPU inside and of one adapter, per direction."""


@pytest.mark.parametrize(("name", "level", "gpus", "inside", "outside"), LINK_RATES)
def test_link_rates_per_direction(name, level, gpus, inside, outside):
    inner, *outer = load_profile(name).datasheet.topology
    assert (inner.name, inner.gpus, inner.bandwidth) == (level, gpus, inside * 1e9)
    assert load_profile(name).gpus_per_node == gpus
    found = [(fabric.name, fabric.gpus, fabric.bandwidth) for fabric in outer]
    assert found == ([("infiniband", None, outside * 1e9)] if outside else [])


MEMORY_BANDWIDTHS = {
    "dgx-a100-40gb": 1555, "dgx-a100-80gb": 2039, "a100-pcie-8": 1935, "dgx-h100": 3350, "dgx-h200": 4800,
    "h100-pcie-8": 2000, "dgx-b200": 7672, "dgx-b300": 8000, "gb200-nvl72": 7928, "gb300-nvl72": 8000,
    "l40s-8": 864, "mi300x-8": 5300, "h800-8": 3350, "h20-8": 4000, "a800-8": 2039, "rtx4090-8": 1008,
}  # fmt: skip


def test_memory_bandwidths():
    found = {name: load_profile(name).datasheet.memory.bandwidth_gb_per_s.value for name in GPU_PROFILES}
    assert found == MEMORY_BANDWIDTHS


def without_sources(value, drop=()):
    """A table as plain data, without sources and without the keys in `drop`."""
    if isinstance(value, dict):
        skip = ("source", "held_out_error_percent", "fitted_on", *drop)
        return {key: without_sources(item, drop) for key, item in value.items() if key not in skip}
    return [without_sources(item, drop) for item in value] if isinstance(value, list | tuple) else value


@pytest.mark.parametrize(
    ("name", "other", "own"),
    [
        # H200 takes NVLS from 5 GPUs, and its small all-reduces were measured there.
        (
            "dgx-h200",
            "dgx-h100",
            ("device", "memory", "memory_bound", "all_reduce", "kernel_rates", "row_rates", "fused_rates"),
        ),
        ("dgx-a100-40gb", "dgx-a100-80gb", ("device", "memory", "memory_bound", "kernel_rates", "fused_rates")),
    ],
)
def test_same_device_but_for_its_memory(name, other, own):
    """H200 is H100 and A100-40 is A100-80 with other HBM; only the share of elementwise kernels was measured again, and
    rates of kernels from the memory are scaled.
    """
    mine, base = load_profile(name), load_profile(other)
    assert without_sources(mine.datasheet.model_dump(), own) == without_sources(base.datasheet.model_dump(), own)
    assert without_sources(mine.coefficients.model_dump(), own) == without_sources(base.coefficients.model_dump(), own)
    shares, others = (p.coefficients.memory_bound.model_dump(exclude_none=True) for p in (mine, base))
    differing = {key for key in shares if shares[key]["value"] != others[key]["value"]}
    assert differing == {"elementwise"}
    assert mine.memory_bandwidth != base.memory_bandwidth


CARRIED = [("dgx-h200", "gemm.fraction.bf16"), ("dgx-b200", "memory_bound.norm"), ("l40s-8", "collectives.pcie")]


@pytest.mark.parametrize(("name", "path"), CARRIED)
def test_carried_values_are_assumed(name, path):
    assert any(found.startswith(path) for found in load_profile(name).assumed)


def test_nothing_is_calibrated_where_nothing_was_measured():
    """No measurement on L40S was found: every coefficient is assumed."""
    assert "calibrated" not in tables("l40s-8")


@pytest.mark.parametrize("name", profile_names())
def test_nvls_serves_only_all_reduce_and_only_from_h100_on(name):
    profile = load_profile(name)
    expected = {("nvlink", "all_reduce")} if name in NVSWITCH_WITH_NVLS else set()
    nvls = {(level.name, op) for level, op, curve in curves(profile) if curve.algorithm == "nvls"}
    declared = {(level.name, op) for level in profile.datasheet.topology for op in level.in_network_reduction}
    assert nvls == declared == expected


def test_h100_all_reduce_has_a_ring_curve_for_few_ranks():
    ring, nvls = load_profile("dgx-h100").coefficients.collectives["nvlink"]["all_reduce"]
    assert (ring.algorithm, ring.min_ranks, nvls.algorithm, nvls.min_ranks) == ("ring", 2, "nvls", 6)


@pytest.mark.parametrize("name", profile_names())
def test_innermost_level_has_every_collective(name):
    profile = load_profile(name)
    level = profile.datasheet.topology[0].name
    inner = {*profile.coefficients.collectives[level]}
    inner |= {"send_receive"} if level in profile.coefficients.sends else set()
    assert inner == {"all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send_receive"}


@pytest.mark.parametrize("name", profile_names())
def test_bus_bandwidth_stays_below_the_links(name):
    for level, operation, curve in curves(load_profile(name)):
        largest = max(bandwidth for _, bandwidth in curve.points) * 1e9
        # With in-network reduction a rank sends its array once, so the wire carries message / time.
        wire = largest / wire_factor(operation, curve.ranks) if curve.algorithm == "nvls" else largest
        assert wire <= level.bandwidth, (level.name, operation, curve.algorithm)


@pytest.mark.parametrize("name", profile_names())
def test_larger_messages_take_no_less_time(name):
    for level, operation, curve in curves(load_profile(name)):
        slowest = 0.0
        for size, bandwidth in curve.points:
            time = wire_factor(operation, curve.ranks) * size / (bandwidth * 1e9)
            assert time >= 0.9 * slowest, (level.name, operation, curve.algorithm, size)
            slowest = max(slowest, time)


@pytest.mark.parametrize("name", profile_names())
def test_latency_is_no_more_than_the_smallest_measured_time(name):
    for level, operation, curve in curves(load_profile(name)):
        size, bandwidth = curve.points[0]
        time_us = wire_factor(operation, curve.ranks) * size / bandwidth / 1e3
        assert curve.latency_us <= 1.1 * time_us, (level.name, operation, curve.algorithm)


ASSUMED = [
    ("dgx-a100-80gb", "collectives.nvlink.all_gather"),
    ("cpu-2", "memory.context_mib"),
    ("dgx-h200", "collectives.infiniband.all_to_all"),
]


@pytest.mark.parametrize(("name", "path"), ASSUMED)
def test_assumed_paths_are_listed(name, path):
    assumed = load_profile(name).assumed
    assert path in assumed
    assert "l2_bandwidth_gb_per_s" not in assumed


# ------------------------------------------------------------ refusals


def test_unchanged_tables_are_accepted():
    assert parse_profile(tables("dgx-h100"), "profile") == load_profile("dgx-h100")


def test_unknown_hardware_lists_the_names():
    with pytest.raises(InputError) as caught:
        load_profile("dgx-h1000")
    message = str(caught.value)
    assert "'dgx-h1000'" in message
    assert all(name in message for name in profile_names())


def test_missing_file_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        load_profile(tmp_path / "mine.toml")


UNKNOWN = ["nvlinks", "datasheet.tdp_w", "calibrated.gemm.tile_k", "calibrated.memory.slack_mib"]


@pytest.mark.parametrize("path", UNKNOWN)
def test_unknown_key_is_refused(path):
    message = refusal(changed("dgx-h100", path, {"value": 1.0, "source": "ml-network"}))
    assert path.rpartition(".")[2] in message
    assert "unknown key" in message


def test_unknown_key_beside_a_value_is_refused():
    message = refusal(changed("dgx-h100", "datasheet.memory.l2_mib.unit", "MB"))
    assert "datasheet.memory.l2_mib.unit: unknown key" in message


def test_wrong_unit_in_the_name_is_refused():
    data = tables("dgx-h100")
    memory = data["datasheet"]["memory"]
    memory["bandwidth_gbps"] = memory.pop("bandwidth_gb_per_s")
    message = refusal(data)
    assert "bandwidth_gb" in message

    memory["bandwidth_gb_per_s"] = deepcopy(memory["bandwidth_gbps"])
    assert "datasheet.memory.bandwidth_gbps: unknown key" in refusal(data)


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("fp32.norm_backward", ["kernel_rates.fp32.norm_backward: no such kernel; use one of layer_norm, rms_norm"]),
        ("fp32.gelu", ["kernel_rates.fp32.gelu: no such kernel", "_forward or _backward"]),
        ("fp31.gelu_forward", ["kernel_rates.fp31: no such data type; use one of fp32"]),
    ],
)
def test_rates_of_an_unknown_kernel_or_type_are_refused_with_what_there_is(path, words):
    dtype, name = path.split(".")
    rate = {"value": 10.0, "source": "ml-network"}
    rates = {dtype: {name: {"memory_gb_per_s": rate, "cache_gb_per_s": rate}}}
    message = refusal(changed("dgx-h100", "calibrated.kernel_rates", rates))
    assert all(word in message for word in words), message
    assert "pattern" not in message
    assert "[key]" not in message


def test_sparse_peak_is_refused():
    message = refusal(changed("dgx-h100", "datasheet.peak_tflops.bf16.value", 1979))
    assert "1979" in message
    assert "dense" in message


def test_vector_clock_in_place_of_tensor_clock_is_refused():
    assert "clock" in refusal(changed("dgx-h100", "datasheet.clock_tensor_mhz.value", 1980))


def test_coefficient_in_both_blocks_is_refused():
    data = tables("dgx-h100")
    data["calibrated"]["overlap_slowdown"] = data["assumed"]["overlap_slowdown"]
    assert "overlap_slowdown: stands in both calibrated and assumed" in refusal(data)


def test_nested_coefficient_in_both_blocks_is_refused():
    data = changed("dgx-h100", "assumed.memory_bound", {"dropout": {"value": 0.7, "source": "calibrate-memory-bound"}})
    assert "memory_bound.dropout: stands in both" in refusal(data)


NUMBERS = [
    "datasheet.memory.bandwidth_gb_per_s",
    "datasheet.topology.0.link_gb_per_s",
    "calibrated.l2_bandwidth_gb_per_s",
    "calibrated.memory_bound.norm",
    "calibrated.kernel_overhead_us",
    "calibrated.gemm.fraction.bf16",
]


@pytest.mark.slow
@pytest.mark.parametrize("path", NUMBERS)
@pytest.mark.parametrize("value", [nan, float("inf"), -1.0])
def test_nan_infinity_and_negative_numbers_are_refused(path, value):
    assert path.rpartition(".")[2] in refusal(changed("dgx-h100", f"{path}.value", value))


@pytest.mark.parametrize("path", ["calibrated.gemm.fraction.bf16", "calibrated.memory_bound.norm"])
def test_share_above_one_is_refused(path):
    assert "1.5" in refusal(changed("dgx-h100", f"{path}.value", 1.5))


def test_total_overlap_slowdown_is_refused():
    assert "below 1" in refusal(changed("dgx-h100", "assumed.overlap_slowdown.value", 1.0))


MISSING = [
    "calibrated.l2_bandwidth_gb_per_s",
    "assumed.overlap_slowdown",
    "calibrated.gemm.k_pad_bytes",
    "calibrated.attention.cudnn.backward.full",
    "assumed.memory.context_mib",
    "datasheet.memory.reported_mib",
]


@pytest.mark.parametrize("path", MISSING)
def test_missing_coefficient_is_named(path):
    message = refusal(changed("dgx-h100", path, None))
    assert path.partition(".")[2] in message
    assert "missing" in message


@pytest.mark.parametrize("name", ["weight_gradient_rate", "accumulation_exposed"])
def test_what_products_of_one_type_lack_is_named(name):
    assert f"{name}.bf16 is missing" in refusal(changed("dgx-h100", f"calibrated.gemm.{name}.bf16", None))


@pytest.mark.parametrize("path", ["datasheet.memory.l2_mib.source", "assumed.overlap_slowdown.source"])
def test_missing_source_is_refused(path):
    message = refusal(changed("dgx-h100", path, None))
    assert "source" in message
    assert "missing" in message


RING = "calibrated.collectives.nvlink.all_reduce.0"


@pytest.mark.parametrize(
    ("entry", "value", "expected"),
    [
        ("points", [[2048, 10.0], [1024, 5.0]], "increase"),
        ("points", [[1024, 5.0], [1024, 5.0]], "increase"),
        ("points", [[1024, 0.0]], "above 0"),
        ("points", [], "points"),
        ("points", [[1024, nan]], "finite"),
        ("algorithm", "butterfly", "butterfly"),
        ("latency_us", 0.0, "latency_us"),
        ("latency_s", 1e-5, "latency_s: unknown key"),
        ("ranks", 1, "ranks"),
        ("max_ranks", 2, "below the 4 ranks"),
    ],
)
def test_bad_curve_is_refused(entry, value, expected):
    assert expected in refusal(changed("dgx-h100", f"{RING}.{entry}", value))


def test_curves_of_an_unknown_level_are_refused():
    data = tables("dgx-h100")
    data["calibrated"]["collectives"]["ethernet"] = data["calibrated"]["collectives"].pop("infiniband")
    assert "'ethernet'" in refusal(data)


def test_other_schema_version_is_refused():
    assert "schema_version" in refusal(changed("dgx-h100", "schema_version", 2))


def numbers_at(value, path=""):
    """(dotted path, number) of every number of some tables but those of points."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        yield path, value
    for key, item in value.items() if isinstance(value, dict) else ():
        if key != "points":
            yield from numbers_at(item, f"{path}.{key}" if path else key)
    for number, item in enumerate(value) if isinstance(value, list) else ():
        if isinstance(item, dict):
            yield from numbers_at(item, f"{path}.{number}")


def times(name, path, factor):
    """The tables of a profile with a number multiplied."""
    *_, number = (value for found, value in numbers_at(tables(name)) if found == path)
    return changed(name, path, number * factor)


WRONG_UNITS = [
    ("datasheet.memory.bandwidth_gb_per_s.value", 1e-3, "FLOP a byte"),
    ("datasheet.memory.bandwidth_gb_per_s.value", 1e3, "bandwidth_gb_per_s"),
    ("datasheet.memory.reported_mib.value", 2**-10, "label_gb"),
    ("datasheet.memory.reported_mib.value", 1e3, "reported_mib"),
    ("datasheet.memory.label_gb.value", 1e-3, "label_gb"),
    ("datasheet.memory.l2_mib.value", 1e-3, "l2_mib"),
    ("datasheet.memory.l2_mib.value", 1e3, "l2_mib"),
    ("datasheet.clock_vector_mhz.value", 1e-3, "clock_vector_mhz"),
    ("datasheet.peak_tflops.fp16.value", 1e-3, "peak_tflops.fp16"),
    ("datasheet.topology.0.link_gb_per_s.value", 1e3, "link"),
    ("datasheet.topology.0.gpus", 1000, "gpus"),
    ("calibrated.l2_bandwidth_gb_per_s.value", 1e-3, "l2_bandwidth"),
    ("calibrated.gemm.fraction.bf16.value", 1e-3, "gemm.fraction.bf16"),
    ("calibrated.memory_bound.norm.value", 1e-3, "memory_bound.norm"),
    ("calibrated.memory.reserve_mib.value", 1e3, "reserve_mib"),
    ("assumed.memory.context_mib.value", 100, "context_mib"),
    ("calibrated.kernel_overhead_us.value", 1e3, "kernel_overhead_us"),
    ("assumed.adapter_chunk_mib.value", 1e3, "adapter_chunk_mib"),
    ("calibrated.sends.nvlink.channel_gb_per_s.value", 1e-3, "channel_gb_per_s"),
    ("calibrated.sends.nvlink.link_gb_per_s.value", 1e-3, "link_gb_per_s"),
    (f"{RING}.latency_us", 1e3, "latency_us"),
    (f"{RING}.latency_us", 1e-3, "latency_us"),
    (f"{RING}.step_latency_us", 1e3, "step_latency_us"),
    (f"{RING}.ranks", 1000, "GPUs of the level"),
]


@pytest.mark.parametrize(("path", "factor", "words"), WRONG_UNITS)
def test_a_number_in_another_unit_is_refused(path, factor, words):
    assert words in refusal(times("dgx-h100", path, factor))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gb200-nvl72", "mi300x-8"])
def test_hardly_any_number_is_taken_a_million_times_too_large(name):
    """All but the ranks of groups that no level limits."""
    data = tables(name)
    found = [path for block in BLOCKS for path, number in numbers_at(data.get(block, {}), block) if number]
    accepted = []
    for path in found:
        try:
            parse_profile(times(name, path, 2**20), "profile")
        except InputError:
            continue
        accepted.append(path)
    assert [path for path in accepted if not path.endswith("ranks")] == []


@pytest.mark.slow
@pytest.mark.parametrize("name", GPU_PROFILES)
@pytest.mark.parametrize("factor", [1e-3, 1e3])
def test_a_bandwidth_of_a_curve_in_another_unit_is_refused(name, factor):
    """Whichever point of whichever curve, and all of a curve."""
    data = tables(name)
    for block in ("calibrated", "assumed"):
        for level, collectives in data.get(block, {}).get("collectives", {}).items():
            for collective, curves_of in collectives.items():
                for number, curve in enumerate(curves_of):
                    points = curve["points"]
                    for at in [{0}, {len(points) // 2}, {len(points) - 1}, {*range(len(points))}]:
                        wrong = [[size, gb * (factor if i in at else 1)] for i, (size, gb) in enumerate(points)]
                        refusal(changed(name, f"{block}.collectives.{level}.{collective}.{number}.points", wrong))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["l40s-8", "cpu-2"])
def test_numbers_are_no_texts_and_no_switches(name):
    data = tables(name)
    found = [(path, number) for block in BLOCKS for path, number in numbers_at(data.get(block, {}), block)]
    assert len(found) > 50
    for path, number in found:
        assert path.rpartition(".")[2] in refusal(changed(name, path, str(number))) or "point" in path
        refusal(changed(name, path, True))


@pytest.mark.slow
def test_kernel_coefficients_in_another_unit_are_refused():
    """Of every third kernel: shares and rates a thousandth, starts and sizes a thousandfold."""
    data = tables("dgx-h100")
    found = [(p, n) for block in BLOCKS[1:] for p, n in numbers_at(data.get(block, {}), block) if p.endswith("value")]
    small = [path for path, _ in found if ".fraction." in path or "memory_bound." in path or "memory_gb_per_s" in path]
    large = [path for path, n in found if n > 1.1 and path.split(".")[-2] in ("start_us", "block_us")]
    assert min(len(small), len(large)) > 10
    for path in small[::3]:
        assert path.split(".")[-2] in refusal(times("dgx-h100", path, 1e-3))
    for path in large[::3]:
        refusal(times("dgx-h100", path, 1000))


def test_the_first_level_says_how_many_gpus_it_joins():
    assert "needs gpus" in refusal(changed("dgx-h100", "datasheet.topology.0.gpus", None))
    assert "more gpus than the one inside" in refusal(changed("dgx-h100", "datasheet.topology.1.gpus", 4))


@pytest.mark.parametrize("name", profile_names())
def test_every_peak_needs_a_fraction(name):
    for block in ("calibrated", "assumed"):
        for dtype in tables(name).get(block, {}).get("gemm", {}).get("fraction", {}):
            path = f"{block}.gemm.fraction.{dtype}"
            assert f"gemm.fraction has no {dtype}" in refusal(changed(name, path, None))


@pytest.mark.parametrize("value", [-50, 1e300, nan, "3"])
def test_a_held_out_error_is_a_percentage(value):
    assert "held_out_error_percent" in refusal(
        changed("dgx-h100", "calibrated.l2_bandwidth_gb_per_s.held_out_error_percent", value)
    )


def test_control_characters_of_a_profile_are_written_out():
    found = parse_profile(changed("dgx-h100", "description", "a\x1b[31mb"), "profile")
    assert found.description == "a\\x1b[31mb"
