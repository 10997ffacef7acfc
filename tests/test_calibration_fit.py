"""The fit of a calibration: known coefficients come back from noisy rows, and what cannot be described is flagged.

Rows are made by the catalogue of a calibration and timed by a profile that the test knows; the fit begins with
another one. Under 30 s.
"""

import json
from io import StringIO
from math import hypot

import numpy as np
import pytest
from rich.console import Console

from spsim import Scenario, Workload, plots, simulate, sweep
from spsim.cli import main
from spsim.costs.collectives import CommCost
from spsim.errors import InputError
from spsim.inputs.hardware import leaves
from spsim.inputs.inheritance import tables_of
from spsim.inputs.kernel_coefficients import KernelRates
from spsim.inputs.profiles import load_profile, parse_profile, profile_names
from spsim.inputs.quantities import Bandwidth, NonNegative, Provenance
from spsim.measuring.calibrate.catalogue import collective_rows, compute_rows
from spsim.measuring.calibrate.coefficients import leaf_at, with_leaves, with_values
from spsim.measuring.calibrate.collective_fit import measured_series
from spsim.measuring.calibrate.fit import fit_profile
from spsim.measuring.calibrate.outcome import LIMIT_PERCENT
from spsim.measuring.calibrate.profile_file import profile_text, write_profile
from spsim.measuring.calibrate.records import Measurement, append_measurements
from spsim.measuring.calibrate.samples import Batch, attention_samples, gemm_samples, memory_samples
from spsim.measuring.calibrate.solver import halves
from spsim.plots.colours import COLOURS
from spsim.report.calibration import calibration_lines, calibration_table, rates_table
from spsim.report.comparison import comparison_lines, plans_table
from spsim.report.run import notes
from spsim.studies.comparison import PlanComparison
from spsim.studies.plan_accounts import PlanAccount
from tests.cases import model
from tests.test_calibrate_catalogue import CPU, machine

pytestmark = pytest.mark.slow

SHIPPED = load_profile("dgx-h100").eager
H100 = SHIPPED.model_copy(
    update={"coefficients": SHIPPED.coefficients.model_copy(update={"kernel_rates": {}, "row_rates": {}})}
)
"""Kernels at the shares of their classes."""
GPU = machine(dtypes=("fp32", "bf16", "fp8"), attention_kernels=("cudnn",))
TRUTH = {
    "gemm.fraction.bf16": 0.55, "gemm.fraction.fp8": 0.5, "gemm.weight_gradient_rate.bf16": 0.8,
    "gemm.k_pad_bytes": 800.0, "gemm.full_rate_side": 150.0,
    "attention.cudnn.forward.causal.128.fraction": 0.5, "attention.cudnn.forward.causal.128.block_us": 4.0,
    "attention.cudnn.backward.full.64.fraction": 0.4, "attention.cudnn.backward.start_us": 8.0,
    "memory_bound.norm": 0.5, "memory_bound.elementwise": 0.7, "l2_bandwidth_gb_per_s": 5000.0,
}  # fmt: skip
SAMPLES = {
    "gemm": gemm_samples,
    "attention": attention_samples,
    "memory_bound": lambda rows: memory_samples(rows, 1.0),
}


def timed_rows(rows, profile, *, noise=0.0, outliers=0.0, seed=1):
    """Rows with the times of a profile, times a log-normal factor; some take three times as long."""
    random = np.random.default_rng(seed)
    clock = "thread_cpu" if profile.name.startswith("cpu") else "cuda_events"
    found = []
    for kind, samples_of in SAMPLES.items():
        own = [r.model_copy(update={"time_us": 1.0, "clock": clock}) for r in rows if r.kind == kind]
        own = [r for r in own if kind != "memory_bound" or leaf_at(profile, f"memory_bound.{r.operator_class}")]
        if not own:
            continue
        factors = np.exp(noise * random.standard_normal(len(own))) * np.where(random.random(len(own)) < outliers, 3, 1)
        times = 1e6 * factors * Batch(samples_of(own)).times(profile)
        found += [r.model_copy(update={"time_us": float(time)}) for r, time in zip(own, times, strict=True)]
    found += [
        r.model_copy(update={"time_us": profile.coefficients.kernel_overhead_us.value})
        for r in rows if r.kind == "launch"
    ]  # fmt: skip
    comm = CommCost(profile)
    found += [
        r.model_copy(update={"time_us": 1e6 * comm.time(r.name, r.message_bytes, r.ranks, r.nodes)})
        for r in rows if r.kind == "collective"
    ]  # fmt: skip
    return found


FEW = ("layer_norm", "rms_norm", "softmax", "dropout", "gelu", "bias_dropout_add", "add", "copy")
"""Memory-bound kernels of four classes, of which most tests ask; each is fitted by itself, at a cost."""
DIRECTIONS = ("_forward", "_backward")


def kernel_rows(on=GPU, *, quick=False, kernels=FEW):
    """Rows of a catalogue of one device; of the memory-bound kernels only some, or all for None."""
    wanted = None if kernels is None else {f"{name}{ending}" for name in kernels for ending in ("", *DIRECTIONS)}
    rows = compute_rows(on, quick=quick)
    return [row for row in rows if row.kind != "memory_bound" or wanted is None or row.name in wanted]


def measurements(profile, *, collectives=False, on=GPU, quick=False, kernels=FEW, **disturbance):
    rows = kernel_rows(on, quick=quick, kernels=kernels)
    return timed_rows([*rows, *(collective_rows(on, quick=quick) if collectives else ())], profile, **disturbance)


def value(profile, path):
    return leaf_at(profile, path).value


@pytest.fixture(scope="module")
def truth():
    return with_values(H100, TRUTH)


@pytest.fixture(scope="module")
def fitted(truth):
    return fit_profile(measurements(truth, kernels=None, noise=0.03, outliers=0.03), H100, "mine")


# ------------------------------------------------------------ recovery


@pytest.mark.parametrize("path", TRUTH)
def test_coefficients_come_back_from_noisy_rows(fitted, path):
    """3 % of noise, and 3 % of the rows take three times as long: a mean would be 6 % off by these alone.

    What a block takes beside its loop is seen on the shortest sequences alone, where there are starts and traffic too.
    """
    tolerance = 0.3 if path.endswith("_us") else 0.05
    assert value(fitted.profile, path) == pytest.approx(TRUTH[path], rel=tolerance)


def test_times_come_back_closer_than_coefficients(fitted, truth):
    """Terms that trade against each other still make the same time, on every shape of the catalogue."""
    rows = measurements(truth, kernels=None)
    for samples_of in SAMPLES.values():
        batch = Batch(samples_of([r for r in rows if r.kind != "collective"]))
        errors = np.abs(batch.times(fitted.profile) / batch.seconds - 1)
        assert np.percentile(errors, 90) < 0.05


def test_without_noise_nothing_is_left_over(truth):
    found = fit_profile(measurements(truth), H100, "exact")
    for one in found.classes:
        assert np.abs(one.fitted / one.measured - 1).max() < 0.01, one.name
        assert not one.flagged


def test_held_out_errors_are_those_of_the_noise(fitted):
    """|exp(0.03 z) - 1| has the median 2 % and the 90th percentile 5 %; outliers are rarer than one in ten."""
    for one in fitted.classes:
        if one.name.startswith(("gemm", "norm", "elementwise")):
            assert one.errors.median == pytest.approx(2.0, abs=1.0)
            assert 3.0 < one.errors.p90 < 8.0
            assert one.errors.max > 50.0
            assert not one.flagged


def test_halves_hold_out_every_shape_once():
    samples = gemm_samples([r.model_copy(update={"time_us": 1.0}) for r in compute_rows(GPU, quick=True)])
    first, second = halves(samples)
    assert not np.any(first & second)
    assert np.all(first | second)
    shapes = [{s.shape for s, out in zip(samples, mask, strict=True) if out} for mask in (first, second)]
    assert not shapes[0] & shapes[1], "forward and both gradients of a layer are of one shape"
    assert abs(len(shapes[0]) - len(shapes[1])) <= len({s.group for s in samples})


# ------------------------------------------------------------ terms that are fitted where the data show them


def test_what_a_cpu_shows_is_found():
    """A masked kernel that skips whole blocks of 512 keys, a product with a start, and
    dropout that takes the time of its random numbers in the cache as well.
    """
    rates = KernelRates(memory_gb_per_s=bandwidth(2.0), cache_gb_per_s=bandwidth(2.0))
    slower = KernelRates(memory_gb_per_s=bandwidth(4.0), cache_gb_per_s=bandwidth(6.0), start_us=extra(20.0))
    base = load_profile("cpu-2")
    kernel = base.coefficients.attention["torch_cpu"]
    truth = with_leaves(
        base,
        {
            "gemm.start_us": extra(15.0),
            "kernel_rates.fp32.dropout_forward": rates,
            "kernel_rates.fp32.gelu_backward": slower,
            **{f"attention.torch_cpu.{d}.block_tokens": extra(512) for d in ("forward", "backward")},
            **{f"attention.torch_cpu.{d}.causal": getattr(kernel, d).full for d in ("forward", "backward")},
        },
    )
    rows = measurements(truth, on=CPU, noise=0.02)
    found = fit_profile(rows, base, "cpu").profile
    assert value(found, "gemm.start_us") == pytest.approx(15.0, rel=0.2)
    assert value(found, "attention_by_dtype.fp32.torch_cpu.forward.block_tokens") == pytest.approx(512, rel=0.05)
    assert value(found, "attention.torch_cpu.backward.block_tokens") == pytest.approx(512, rel=0.05)
    for tier in ("memory", "cache"):
        assert value(found, f"kernel_rates.fp32.dropout_forward.{tier}_gb_per_s") == pytest.approx(2.0, rel=0.05)
    for name, number in (("memory_gb_per_s", 4.0), ("cache_gb_per_s", 6.0), ("start_us", 20.0)):
        assert value(found, f"kernel_rates.fp32.gelu_backward.{name}") == pytest.approx(number, rel=0.15)
    again = fit_profile([r for r in rows if r.kind == "memory_bound"], found, "cpu").profile
    assert again.coefficients.kernel_rates == found.coefficients.kernel_rates, "whatever base it begins with"


def test_a_kernel_starts_as_fast_as_the_fastest_of_the_small_ones():
    times = {"stream_add": 2.5, "stream_linear": 4.0, "stream_softmax": 3.0, "host_add": 1.0, "graph_add": 0.5}
    rows = [Measurement(kind="launch", name=name, dtype="fp32", time_us=time) for name, time in times.items()]
    found = fit_profile(rows, H100, "starts").profile
    assert found.coefficients.kernel_overhead_us.value == 2.5
    assert (
        "stream add 2.5 us, stream linear 4 us, stream softmax 3 us, host add 1 us, graph add 0.5 us"
        in found.sources[found.coefficients.kernel_overhead_us.source]
    )


def bandwidth(number):
    return Bandwidth(value=number, source="made-up")


def extra(number):
    return NonNegative(value=number, source="made-up")


def test_terms_that_the_data_do_not_show_stay_those_of_the_base(fitted):
    """Bursts do not show the power limit, nor times the tiles of the library."""
    assert {"gemm.tile_m", "gemm.tile_n", "gemm.sustained_limit.bf16"} <= set(fitted.kept)
    assert leaf_at(fitted.profile, "attention.cudnn.forward.block_tokens") is None
    assert not fitted.profile.coefficients.kernel_rates
    for path in fitted.kept:
        assert leaf_at(fitted.profile, path) == leaf_at(H100, path)
        assert (path in fitted.profile.assumed) == (path in H100.assumed)


def test_a_class_that_the_model_cannot_describe_is_flagged(truth):
    """Attention of random times; everything else as it was."""
    rows = measurements(truth, noise=0.02, quick=True)
    random = np.random.default_rng(3)
    rows = [
        r.model_copy(update={"time_us": r.time_us * float(np.exp(abs(random.standard_normal())))})
        if r.kind == "attention" else r for r in rows
    ]  # fmt: skip
    found = fit_profile(rows, H100, "noisy")
    assert all(one.flagged == one.name.startswith("attention") for one in found.classes)
    tiles = found.profile.coefficients.attention["cudnn"].forward.causal
    assert all(tile.fraction.flagged for tile in tiles.values())
    assert tiles["128"].fraction.held_out_error_percent > LIMIT_PERCENT
    assert not found.profile.coefficients.gemm.fraction["bf16"].flagged


# ------------------------------------------------------------ collectives


def wire_rows(times, *, name="all_reduce", ranks=8, level="nvlink"):
    return [
        Measurement(
            kind="collective", name=name, level=level, ranks=ranks, nodes=1, message_bytes=size, time_us=time,
            clock="cuda_events",
        )
        for size, time in times.items()
    ]  # fmt: skip


def test_curves_are_the_measured_points_by_hand():
    """All-gather among 4: 3/4 of 64 MiB in 210 us are 239.7 GB/s. Latency: the median of the smallest three."""
    rows = wire_rows({1024: 9.0, 4096: 10.0, 16384: 11.0, 2**26: 210.0}, name="all_gather", ranks=4)
    found = fit_profile(rows, H100, "wire")
    (curve,) = found.profile.coefficients.collectives["nvlink"]["all_gather"]
    assert curve.points[-1] == (2**26, pytest.approx(0.75 * 2**26 / 210e-6 / 1e9, rel=1e-3))
    assert (curve.ranks, curve.latency_us, curve.algorithm) == (4, 10.0, "ring")
    assert CommCost(found.profile).time("all_gather", 2**26, 4) == pytest.approx(210e-6, rel=1e-3)
    assert found.profile.coefficients.collectives["nvlink"]["all_reduce"] == H100.coefficients.collectives[
        "nvlink"]["all_reduce"]  # fmt: skip


@pytest.mark.parametrize(("collective", "kept"), [("all_gather", False), ("all_to_all", True), ("send_receive", True)])
def test_measured_rings_between_nodes_take_the_place_of_the_law(collective, kept):
    rows = [
        Measurement(
            kind="collective", name=collective, level="infiniband", ranks=2, nodes=2, message_bytes=2**power,
            time_us=20 + 2**power / 4e4, clock="cuda_events",
        )
        for power in range(10, 28, 2)
    ]  # fmt: skip
    found = fit_profile(rows, H100, "pair").profile
    assert ("infiniband" in found.coefficients.between_nodes) is kept
    assert ("infiniband" in found.coefficients.sends) is (collective != "send_receive")


def test_step_latency_is_the_slope_over_ranks():
    """Ring all-gather of 2, 4 and 8: 10 us and 2 us for each of the 1, 3 and 7 steps."""
    rows = [
        r for n in (2, 4, 8) for r in wire_rows({1024: 10 + 2.0 * (n - 1), 2**24: 500.0}, name="all_gather", ranks=n)
    ]
    curves = fit_profile(rows, H100, "wire").profile.coefficients.collectives["nvlink"]["all_gather"]
    assert [(c.ranks, c.min_ranks, c.max_ranks) for c in curves] == [(2, 2, 2), (4, 3, 4), (8, 5, None)]
    assert all(c.step_latency_us == pytest.approx(2.0) for c in curves)


def test_sizes_left_out_of_a_straight_line_are_found():
    """Time linear in bytes: whatever is left out, the neighbours interpolate it. One that lies off is seen."""
    straight = {2**power: 20 + 2**power / 3e5 for power in range(14, 30, 2)}
    errors = fit_profile(wire_rows(straight), H100, "wire").classes[0].errors
    assert errors.rows == len(straight) - 2
    assert errors.max < 2.0
    bent = {**straight, 2**24: 1.5 * straight[2**24]}
    assert fit_profile(wire_rows(bent), H100, "wire").classes[0].errors.max > 30.0


def test_a_disturbed_small_message_does_not_lift_larger_ones():
    """A message takes no longer than a larger one: 4 ms at 1 KiB becomes the 12 us of 4 KiB."""
    (series,) = measured_series(wire_rows({1024: 4000.0, 4096: 12.0, 16384: 13.0, 2**20: 40.0}), H100)
    assert list(series.times.values()) == pytest.approx([12e-6, 12e-6, 13e-6, 40e-6])


def test_all_curves_of_a_node_come_back():
    """From 2 to 8 ranks, in-network reduction where the base has it."""
    rows = [r for r in measurements(H100, collectives=True) if r.kind == "collective"]
    found = fit_profile(rows, H100, "node")
    assert {path for path, _ in leaves(found.profile.coefficients) if path not in found.kept} == {
        "collective_overhead_us",
        *(f"collectives.nvlink.{name}" for name in (*H100.coefficients.collectives["nvlink"], "send_receive")),
    }
    assert set(found.profile.coefficients.sends) == {"infiniband"}, "a measured curve takes the place of the law"
    mine, base = CommCost(found.profile), CommCost(H100)
    assert mine.overhead == 0.0, "it is part of what was measured"
    for r in rows:
        if r.message_bytes >= 2**20:
            args = (r.name, r.message_bytes, r.ranks)
            assert mine.time(*args) == pytest.approx(base.time(*args), rel=0.02), args


# ------------------------------------------------------------ the base, and another device


def test_a_raw_file_of_kernels_only_takes_the_rest_from_the_base(fitted):
    assert fitted.profile.coefficients.collectives == H100.coefficients.collectives
    assert fitted.profile.datasheet == H100.datasheet
    assert {"overlap_slowdown", "memory.context_mib", "collectives.infiniband.all_to_all"} <= set(fitted.kept)
    (line,) = [line for line in calibration_lines(fitted) if line.startswith("from dgx-h100, not measured")]
    assert "collectives.nvlink.all_reduce" in line


def test_a_class_without_a_kernel_in_memory_stays_unknown():
    """Nothing says at which rate it would run there; the base has no figure, since no layer contains it."""
    base = load_profile("cpu-2")
    share = base.coefficients.memory_bound.norm
    truth = with_leaves(base, {"memory_bound.cross_entropy": share, "memory_bound.optimizer": share})
    rows = [r for r in compute_rows(CPU, quick=True) if r.kind == "memory_bound" and r.dtype == "fp32"]
    inside = [r for r in rows if r.operator_class != "cross_entropy" or r.bytes_moved < CPU.cache_bytes / 2]
    fit = fit_profile(timed_rows(inside, truth), base, "inside")
    assert fit.profile.coefficients.memory_bound.cross_entropy is None
    assert fit.profile.coefficients.memory_bound.optimizer is not None
    assert [note.partition(" ")[0] for note in fit.notes] == ["cross_entropy"]


def test_measurements_of_interference_and_memory_replace_the_base():
    rows = [
        Measurement(kind="interference", name="gemm_beside_all_reduce", value=0.2),
        Measurement(kind="interference", name="gemm_beside_all_gather", value=0.3),
        Measurement(kind="interference", name="gemm_beside_reduce_scatter", value=0.25),
        Measurement(kind="interference", name="all_reduce_beside_gemm", value=0.9),
        Measurement(kind="memory", name="context", value=600 * 2**20),
        Measurement(kind="environment", name="date", text="2027-01-02"),
    ]
    profile = fit_profile(rows, H100, "few").profile
    assert profile.coefficients.overlap_slowdown.value == 0.25
    assert profile.coefficients.memory.context_mib.value == 600
    assert not {"overlap_slowdown", "memory.context_mib"} & profile.assumed
    assert profile.as_of == "2027-01-02"
    assert "2027-01-02" in profile.sources[profile.coefficients.overlap_slowdown.source]


def test_a_gpu_above_the_peak_of_the_base_is_another_device(truth):
    with pytest.raises(InputError, match=r"--base dgx-a100-80gb: measured above its datasheet .* another device"):
        fit_profile(measurements(truth, quick=True), load_profile("dgx-a100-80gb"), "wrong")


def test_a_faster_cpu_replaces_the_peaks():
    """Four times the speed of the base in products, twice that of its memory."""
    base = load_profile("cpu-2")
    rows = [
        r.model_copy(update={"time_us": r.time_us / (4 if r.kind != "memory_bound" else 2)})
        for r in measurements(base, on=CPU, quick=True)
    ]
    found = fit_profile(rows, base, "fast")
    sheet = found.profile.datasheet
    assert sheet.peak_tflops["bf16"].value > 3 * base.datasheet.peak_tflops["bf16"].value
    assert sheet.peak_tflops["bf16"].source == "calibrate-highest-rate"
    assert any("put in its place" in note for note in found.notes)
    assert found.profile == parse_profile(tables_of(found.profile), "fast")


GEMM = {"kind": "gemm", "name": "forward", "dtype": "bf16", "m": 64, "n": 64, "k": 64, "time_us": 1}
ATTENTION = {
    "kind": "attention", "name": "forward", "dtype": "bf16", "queries": 8, "keys": 8, "heads": 1, "head_dim": 64,
    "causal": True, "time_us": 1,
}  # fmt: skip
COPY = {
    "kind": "memory_bound", "name": "copy", "dtype": "bf16", "operator_class": "elementwise", "bytes_moved": 64,
    "time_us": 1,
}  # fmt: skip
WIRE = {
    "kind": "collective", "name": "all_reduce", "dtype": "bf16", "level": "nvlink", "ranks": 2, "nodes": 1,
    "message_bytes": 1024, "time_us": 9,
}  # fmt: skip
BESIDE = {"kind": "interference", "name": "gemm_beside_all_reduce", "value": 0.5}


def fact(name, text):
    return {"kind": "environment", "name": name, "text": text}


def raw_file(path, *rows):
    """A raw file of rows that are not checked before they are written."""
    append_measurements(path, [Measurement.model_construct(**row) for row in rows])
    return path


def refused(arguments, capsys):
    """The one line with which a command ends."""
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**GEMM, "k": None}, "a gemm row (forward) has no k"),
        ({**GEMM, "dtype": ""}, "a gemm row (forward) has no dtype"),
        ({**ATTENTION, "causal": None}, "an attention row (forward) has no causal"),
        ({**WIRE, "message_bytes": None}, "has no message_bytes"),
        ({**COPY, "operator_class": "sorting"}, "class 'sorting'"),
        ({**GEMM, "m": 0}, "m: Input should be greater than 0, got '0'"),
        ({**GEMM, "m": -64}, "m: Input should be greater than 0"),
        ({**GEMM, "m": 10**30}, "m: Input should be less than"),
        ({**COPY, "bytes_moved": 10**30}, "bytes_moved: Input should be less than"),
        ({**GEMM, "time_us": 0}, "time_us: Input should be greater than"),
        ({**GEMM, "time_us": -1}, "time_us: Input should be greater than"),
        ({**GEMM, "time_us": 1e300}, "time_us: Input should be less than"),
        ({**GEMM, "time_us": 1e-6}, "time_us: Input should be greater than"),
        ({**GEMM, "dtype": "fp99"}, "got 'fp99'"),
        ({**GEMM, "name": "sideways"}, "gemm row (sideways) is none that calibrate measures"),
        ({**COPY, "name": "foo_sideways"}, "memory_bound row (foo_sideways) is none"),
        ({**WIRE, "name": "gossip"}, "collective row (gossip) is none"),
        ({**WIRE, "ranks": 1}, "has 1 rank; a collective takes at least 2"),
        ({**WIRE, "ranks": 2**30}, "ranks: Input should be less than"),
        ({**WIRE, "ranks": 3, "nodes": 2}, "3 ranks on 2 nodes"),
        ({**BESIDE, "value": 1.5}, "has the value 1.5; it is from -1 to 1"),
        ({**BESIDE, "value": -7}, "has the value -7; it is from -1 to 1"),
        (fact("ranks", "x"), "ranks is 'x'; it is a whole number from 1"),
        (fact("nodes", "0"), "nodes is '0'; it is a whole number from 1"),
        (fact("nodes", ""), "nodes is ''; it is a whole number from 1"),
        (fact("date", "yesterday"), "date is 'yesterday'; write it as"),
        (fact("date", "2026-02-30"), "date is '2026-02-30'; write it as"),
    ],
)
def test_a_row_that_cannot_be_is_one_line_with_its_place(row, message, tmp_path, capsys):
    """The third line of the file: header, a good row, the bad one. Nothing is written, not even the directory."""
    raw = raw_file(tmp_path / "measurements.csv", GEMM, row)
    out = tmp_path / "new" / "mine.toml"
    line = refused(["calibrate", "--fit", str(raw), "--base", "dgx-h100", "--out", str(out)], capsys)
    assert f"{raw}: line 3: " in line
    assert message in line
    assert not out.parent.exists()


@pytest.mark.parametrize(
    ("row", "base", "message"),
    [
        ({**COPY, "name": "foo_forward"}, "dgx-h100", "foo_forward bf16: there is no such operator"),
        ({**WIRE, "level": "token-ring"}, "dgx-h100", "by token-ring: dgx-h100 has no level 'token-ring', only nvlink"),
        ({**WIRE, "ranks": 3, "level": "shared-memory"}, "cpu-2", "on 3 ranks by shared-memory: cpu-2 has 2 GPUs"),
        ({**GEMM, "m": 2**20, "n": 2**20, "k": 2**20}, "cpu-2", "gemm forward bf16 1048576x1048576x1048576: 1 us is"),
        ({**COPY, "bytes_moved": 2**49}, "cpu-2", "copy bf16: 1 us is"),
        ({**WIRE, "level": "shared-memory", "message_bytes": 2**49, "time_us": 1}, "cpu-2", "1 us is"),
    ],
)
def test_a_row_that_does_not_fit_the_base_is_one_line(row, base, message, tmp_path, capsys):
    raw = raw_file(tmp_path / "measurements.csv", fact("date", "2026-01-31"), row)
    out = tmp_path / "new" / "mine.toml"
    line = refused(["calibrate", "--fit", str(raw), "--base", base, "--out", str(out)], capsys)
    assert str(raw) in line
    assert message in line
    assert ": line 3: " in line or "no such operator" in line
    assert not out.parent.exists()


@pytest.mark.parametrize("change", [lambda line: line[:-20], lambda line: line + ",1"], ids=["cut", "longer"])
def test_a_line_of_another_length_is_named(change, tmp_path, capsys):
    raw = raw_file(tmp_path / "measurements.csv", GEMM, ATTENTION, COPY)
    lines = raw.read_text().splitlines()
    raw.write_text("\n".join([*lines[:2], change(lines[2]), lines[3], ""]))
    line = refused(["calibrate", "--fit", str(raw), "--base", "cpu-2", "--out", str(tmp_path / "p.toml")], capsys)
    assert f"{raw}: line 3 has another number of columns than the header; it was cut or edited, remove it" in line


def test_of_equal_rows_the_last_counts():
    """A twin of each row with another time changes nothing where it comes first, held-out errors included."""
    rows = wire_rows({2**power: 20 + 2**power / 3e5 for power in range(14, 30, 2)})
    twins = [r.model_copy(update={"time_us": 3 * r.time_us}) for r in rows]
    once, twice = fit_profile(rows, H100, "wire"), fit_profile([*twins, *rows], H100, "wire")
    assert once.profile == twice.profile
    assert once.classes[0].errors == twice.classes[0].errors
    products = [Measurement(**{**GEMM, "m": m, "time_us": m / 8}) for m in (64, 128, 256, 512, 1024)]
    (found,) = fit_profile([*products, *products], H100, "gemm").classes
    assert len(found.measured) == len(products)


def test_profile_and_picture_are_written_both_or_none(tmp_path, capsys):
    raw = raw_file(tmp_path / "measurements.csv", *({**GEMM, "m": m} for m in (64, 128)))
    out = tmp_path / "out"
    (out / "mine.toml").parent.mkdir()
    (out / "mine.png").mkdir()
    line = refused(["calibrate", "--fit", str(raw), "--base", "dgx-h100", "--out", str(out / "mine.toml")], capsys)
    assert "mine.png: is a directory" in line
    assert [path.name for path in out.iterdir()] == ["mine.png"]


@pytest.mark.parametrize("arguments", [["--fit", "raw.csv"], ["--quick"]])
def test_the_name_of_a_shipped_profile_is_taken(arguments, tmp_path, capsys, monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    line = refused(["calibrate", *arguments, "--out", str(tmp_path / "new" / "dgx-h100.toml")], capsys)
    assert "dgx-h100 is the shipped profile of this name; choose another file name" in line
    assert not (tmp_path / "new").exists()


def test_nothing_measured_is_an_error():
    with pytest.raises(InputError, match="no measurement has a result"):
        fit_profile([Measurement(kind="gemm", name="forward", skipped="out of memory")], H100, "empty")


# ------------------------------------------------------------ files


@pytest.mark.parametrize("name", profile_names())
def test_every_profile_survives_the_way_through_its_document(name):
    profile = load_profile(name)
    assert parse_profile(tables_of(profile), name) == profile


def test_a_written_profile_loads_back_equal(fitted, tmp_path):
    write_profile(fitted.profile, tmp_path / "mine.toml")
    assert load_profile(tmp_path / "mine.toml") == fitted.profile
    assert [path.name for path in tmp_path.iterdir()] == ["mine.toml"]
    cited = (tmp_path / "mine.toml").read_text()
    assert "Measured by spsim calibrate" in cited


def test_the_same_rows_give_the_same_bytes(tmp_path, capsys):
    """The command reads nothing but the CSV and the base; `run` and `sweep` take what it writes."""
    raw = tmp_path / "measurements.csv"
    rows = [
        Measurement(kind="environment", name="device", text="NVIDIA H100 80GB HBM3"),
        Measurement(kind="environment", name="cuda", text="12.8"),
    ]
    append_measurements(raw, rows + timed_rows(kernel_rows(quick=True)[::3], H100, noise=0.02))
    texts = []
    for name in ("one", "two"):
        directory = tmp_path / name
        main_ok(["calibrate", "--fit", str(raw), "--out", str(directory / "mine.toml")])
        texts.append((directory / "mine.toml").read_bytes())
        assert (directory / "mine.png").stat().st_size > 10_000
    assert texts[0] == texts[1]
    assert "held-out errors" in capsys.readouterr().out
    run = ["run", "--json", "--model", "gpt-22b", "--seq-len", "2048", "--plan", "tp=8"]
    main_ok([*run, "--hardware", str(tmp_path / "one" / "mine.toml")])
    document = json.loads(capsys.readouterr().out)
    assert 0 < document["error_band"]["step_time_percent"] < 10
    assert document["flagged"] == []


def main_ok(arguments):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert not stop.value.code


# ------------------------------------------------------------ error bands of results


def with_errors(profile, errors):
    """A profile with these held-out errors and no others; one above the limit is flagged."""
    without = {
        path: leaf.model_copy(update={"held_out_error_percent": None})
        for path, leaf in leaves(profile.coefficients) if isinstance(leaf, Provenance)
    }  # fmt: skip
    return with_leaves(
        profile,
        without
        | {
            path: leaf_at(profile, path).model_copy(
                update={"held_out_error_percent": error, "flagged": error > LIMIT_PERCENT}
            )
            for path, error in errors.items()
        },
    )


def small(hardware, plan=""):
    workload = Workload(seq_len=1024, micro_batch=2)
    return simulate(
        Scenario(
            hardware=hardware,
            model=model(hidden=1024, dropout=0.1, bias=False),
            plan=plan,
            workload=workload,
            scope="layers",
        )
    )


def test_band_of_one_gpu_by_hand():
    """Products off by 10 % together, norms by 30 %, independent of them: the root of the squares of the shares."""
    result = small(with_errors(H100, {"gemm.fraction.bf16": 10.0, "memory_bound.norm": 30.0}))
    times = result.operators.groupby("operator_class")["time_ms"].sum()
    share = times / (1e3 * result.step_time_s)
    assert share.sum() == pytest.approx(1.0)
    band = result.error_band
    assert band.step_time_percent == pytest.approx(hypot(10 * share["gemm"], 30 * share["norm"]))
    assert band.known_share == pytest.approx(share["gemm"] + share["norm"])
    assert band.layer_forward_percent < band.step_time_percent or band.layer_backward_percent < band.step_time_percent
    assert result.flagged == ("memory_bound.norm",)


def test_products_have_the_error_of_their_precision():
    hardware = with_errors(H100, {"gemm.fraction.bf16": 90.0, "gemm.fraction.fp16": 10.0})
    workload = Workload(seq_len=1024, precision="fp16")
    result = simulate(Scenario(hardware=hardware, model=model(hidden=1024), plan="", workload=workload))
    assert result.error_band.step_time_percent == pytest.approx(10 * result.error_band.known_share)
    assert result.flagged == ()


def test_the_error_of_a_kernel_with_rates_of_its_own_is_its_own():
    """LayerNorm has rates, off by 40 %, forward and backward apart: each share of the time counts, by hand."""
    leaf = Bandwidth(value=500.0, source="made-up", held_out_error_percent=40.0, flagged=True)
    rates = KernelRates(memory_gb_per_s=leaf, cache_gb_per_s=leaf)
    base = with_errors(H100, {"gemm.fraction.bf16": 0.0, "memory_bound.norm": 0.0})
    passes = {f"kernel_rates.bf16.layer_norm_{direction}": rates for direction in ("forward", "backward")}
    result = small(with_leaves(base, passes))
    norms = result.operators[result.operators["operator_class"] == "norm"]
    shares = norms.groupby("part")["time_ms"].sum() / (1e3 * result.step_time_s)
    expected = hypot(40 * shares["forward"], 40 * shares["backward"])
    assert result.error_band.step_time_percent == pytest.approx(expected)
    assert result.flagged == ("kernel_rates.bf16.layer_norm_backward", "kernel_rates.bf16.layer_norm_forward")


def compared(error):
    """One GPU without and with recomputation of the layer, and the change of the step in percent."""
    results = [small(with_errors(H100, {"gemm.fraction.bf16": error}), plan) for plan in ("", "recompute=full")]
    accounts = tuple(PlanAccount(name, name, result) for name, result in zip(("A", "B"), results, strict=True))
    return PlanComparison(accounts), 100 * (results[1].step_time_s / results[0].step_time_s - 1)


def test_a_comparison_tells_what_is_within_the_band():
    """The rule: smaller than the larger of both half-widths; wide and narrow bands of the same plans."""
    wide, change = compared(90.0)
    bands = [account.result.error_band.step_time_percent for account in wide.accounts]
    assert abs(change) < max(bands)
    lines = comparison_lines(wide)
    assert f"the band of ±{max(bands):.1f} %, from held-out errors of the calibration" in lines[0]
    assert "A and B: the calibration missed its error limit for: gemm.fraction.bf16" in lines
    cells = [list(column.cells) for column in plans_table(wide).columns]
    (index,) = [i for i, quantity in enumerate(cells[0]) if quantity == "error band"]
    assert [f"step ±{band:.1f} %" in cells[k + 1][index] for k, band in enumerate(bands)] == [True, True]
    narrow, _ = compared(0.001)
    lines = comparison_lines(narrow)
    assert "tie" not in lines[0]
    assert not any("missed" in line for line in lines)


def test_band_counts_communication_that_nothing_hides():
    """tp=8, the all-reduce is off by 50 % and products by nothing: half of the exposed share of the step."""
    (ring, nvls) = H100.coefficients.collectives["nvlink"]["all_reduce"]
    wrong = nvls.model_copy(update={"held_out_error_percent": 50.0, "flagged": True})
    base = with_errors(H100, {"gemm.fraction.bf16": 0.0})
    result = small(with_leaves(base, {"collectives.nvlink.all_reduce": (ring, wrong)}), "tp=8")
    exposed = result.exposed_comm_s / result.step_time_s
    assert result.error_band.step_time_percent == pytest.approx(50 * exposed)
    assert result.error_band.known_share > exposed
    assert result.flagged == ("collectives.nvlink.all_reduce",)
    assert any("missed its error limit" in note for note in notes(result))


def test_band_of_the_weight_synchronisation():
    """Two nodes of Ulysses and ring: the all-reduce of the gradients is off by 20 %, and stands alone."""
    curves = H100.coefficients.collectives["infiniband"]["all_reduce"]
    wrong = tuple(curve.model_copy(update={"held_out_error_percent": 20.0}) for curve in curves)
    base = with_errors(H100, {"gemm.fraction.bf16": 0.0})
    result = small(with_leaves(base, {"collectives.infiniband.all_reduce": wrong}), "ulysses=8,ring=2")
    assert result.weight_sync_s > 0
    share = result.weight_sync_s / result.step_time_s
    assert result.error_band.step_time_percent == pytest.approx(20 * share)
    assert result.error_band.layer_forward_percent == 0


@pytest.mark.parametrize("name", ["dgx-h100", "dgx-a100-80gb"])
def test_a_profile_that_no_calibration_wrote_has_no_band(name):
    """A100 has held-out errors of its attention alone, which say little of a step."""
    result = small(load_profile(name), "tp=8")
    assert (result.error_band, result.flagged) == (None, ())
    document = result.to_json()
    assert (document["error_band"], document["flagged"]) == (None, [])
    assert not any("calibration" in note for note in notes(result))
    found = sweep([{"hardware": name, "model": "gpt-22b", "workload": {"seq_len": 1024}}])
    assert "flagged" not in found


def test_rows_of_a_sweep_carry_the_band(tmp_path):
    write_profile(with_errors(H100, {"gemm.fraction.bf16": 40.0}), tmp_path / "mine.toml")
    settings = {"hardware": str(tmp_path / "mine.toml"), "model": "gpt-22b", "workload": {"seq_len": 1024}}
    found = sweep([settings]).iloc[0]
    assert found["flagged"] == "gemm.fraction.bf16"
    assert 0 < found["step_time_error_percent"] < 40


# ------------------------------------------------------------ report and picture


def test_the_table_has_a_row_a_class(fitted):
    table = calibration_table(fitted)
    assert table.row_count == len(fitted.classes)
    names = list(table.columns[0].cells)
    assert {"gemm bf16", "norm", "attention cudnn forward causal"} <= set(names)


def test_the_report_fits_eighty_columns_and_names_the_coefficients(fitted):
    console = Console(width=80, file=StringIO())
    console.print(calibration_table(fitted))
    text = console.file.getvalue()
    assert "…" not in text
    for one in fitted.classes:
        assert sum(line.strip().startswith(f"{one.name} ") for line in text.splitlines()) == 1
    lines = list(calibration_lines(fitted))
    (gemm,) = [line for line in lines if line.startswith("gemm bf16: ")]
    value = fitted.profile.coefficients.gemm.fraction["bf16"].value
    assert f"fraction of peak {value:g}" in gemm
    fitted_lines = [line for line in lines if ": " in line and not line.startswith("from ")]
    assert not any("latency_us" in line or "start_us" in line for line in fitted_lines)


@pytest.fixture(scope="module")
def mixed(truth):
    """Norms that one rate cannot describe: each has rates of its own."""
    rows = [
        r.model_copy(update={"time_us": 3 * r.time_us}) if r.name.startswith("rms_norm") else r
        for r in measurements(truth, quick=True)
    ]
    return fit_profile(rows, H100, "mixed")


def test_operators_that_one_description_does_not_serve_have_rates_of_their_own(mixed):
    """RMSNorm takes three times as long as LayerNorm for its bytes: no rate describes both, nor any other norm."""
    assert {"rms_norm", "layer_norm"} < {one.name for one in mixed.classes}
    (other,) = [one for one in mixed.classes if one.flagged]
    assert other.name == "other norm"
    for name, ratio in (("layer_norm", 3.0), ("rms_norm", 1 / 3)):
        own = np.array([operator.startswith(name) for operator in other.operators])
        assert other.held_out[own] / other.measured[own] == pytest.approx(ratio, rel=0.05), "at the share of the other"
    assert not any("is not fitted" in note for note in mixed.notes)
    (line,) = [line for line in calibration_lines(mixed) if line.startswith("other norm: its operators differ")]
    assert "rms_norm" in line.partition(" and ")[0]
    assert "layer_norm" in line.partition(" and ")[2]


@pytest.mark.parametrize("streaming", ["add", "copy"])
def test_the_share_of_a_class_with_rates_is_that_of_kernels_that_only_move_data(streaming, truth):
    """GELU takes four times as long for its bytes: products and attention write at what a sum or a copy reaches."""
    rows = [
        r.model_copy(update={"time_us": 4 * r.time_us}) if r.name.startswith("gelu") else r
        for r in measurements(truth)
        if r.name in (streaming, "gelu_forward", "gelu_backward")
    ]
    found = fit_profile(rows, H100, "streaming")
    assert {streaming, "gelu", "other elementwise"} == {one.name for one in found.classes}
    assert value(found.profile, "memory_bound.elementwise") == pytest.approx(
        TRUTH["memory_bound.elementwise"], rel=0.02
    )


def test_rates_of_kernels_are_a_table_that_fits_eighty_columns(mixed, fitted):
    """A cell for each number of the profile, a row a type and direction; a report without such kernels has none."""
    console = Console(width=80, file=StringIO())
    console.print(rates_table(mixed))
    cells = [line.split() for line in console.file.getvalue().splitlines()]
    rates = mixed.profile.coefficients.kernel_rates["bf16"]["rms_norm_backward"]
    start = f"{rates.start_us.value:g}" if rates.start_us else "–"
    expected = [
        "rms_norm",
        "bf16",
        "backward",
        "any",
        f"{rates.memory_gb_per_s.value:g}",
        f"{rates.cache_gb_per_s.value:g}",
        start,
    ]
    assert cells.count(expected) == 1
    assert not any(line.startswith("rms_norm:") for line in calibration_lines(mixed))
    assert rates_table(fitted) is None


def test_kernels_are_drawn_in_the_colour_of_their_class(mixed):
    figure = plots.plot_calibration(mixed.frame, limit_percent=LIMIT_PERCENT)
    colours = {axes.get_title(loc="left"): axes.lines[-1].get_markerfacecolor() for axes in figure.axes}
    assert colours["rms_norm"] == colours["layer_norm"] == colours["other norm"]
    assert colours["rms_norm"] not in (colours["gemm bf16"], colours["attention cudnn forward full"])
    assert colours["rms_norm"] == COLOURS["norm"]


def test_a_raw_file_with_a_former_class_of_a_kernel_gives_the_same_profile(truth):
    """bias_dropout_add counted to dropout once; a file that was gone on with has rows of both spellings."""
    classes = ("dropout", "elementwise")
    rows = [r for r in measurements(truth, quick=True, noise=0.03) if r.operator_class in classes]
    before = [
        r.model_copy(update={"operator_class": "dropout"}) if r.name.startswith("bias_dropout_add") else r for r in rows
    ]
    assert before != rows
    assert profile_text(fit_profile(before, H100, "old").profile) == profile_text(
        fit_profile(rows, H100, "old").profile
    )


def test_a_picture_of_one_class_is_square_and_explains_its_band(fitted):
    figure = plots.plot_calibration(fitted.frame[fitted.frame["class"] == "norm"], limit_percent=LIMIT_PERCENT)
    (axes,) = figure.axes
    box = axes.get_window_extent()
    assert box.width == pytest.approx(box.height)
    assert f"within ±{LIMIT_PERCENT} % of the measurement" in [
        text.get_text() for text in figure.legends[0].get_texts()
    ]


def test_the_picture_marks_flagged_classes(fitted):
    frame = fitted.frame.assign(flagged=fitted.frame["class"] == "norm")
    figure = plots.plot_calibration(frame, limit_percent=LIMIT_PERCENT)
    assert len(figure.axes) == frame["class"].nunique()
    texts = {axes.get_title(loc="left"): axes.texts[0].get_text() for axes in figure.axes}
    assert [name for name, text in texts.items() if "flagged" in text] == ["norm"]
    for axes in figure.axes:
        low, high = axes.get_xlim()
        assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
        assert axes.get_ylim() == (low, high)


def test_text_of_a_profile_is_stable(fitted):
    assert profile_text(fitted.profile) == profile_text(fitted.profile)


def test_rows_without_a_kernel_make_a_profile_without_a_picture(tmp_path, capsys):
    """Starts of kernels alone: their coefficient is fitted, and there is nothing to draw."""
    start = {"kind": "launch", "name": "stream_add", "dtype": "bf16", "time_us": 3.0, "repeats": 10}
    raw = raw_file(tmp_path / "measurements.csv", fact("date", "2026-01-31"), start)
    with pytest.raises(SystemExit) as stop:
        main(["calibrate", "--fit", str(raw), "--base", "dgx-h100", "--out", str(tmp_path / "mine.toml")])
    assert not stop.value.code, capsys.readouterr().err
    assert "no picture" in capsys.readouterr().out
    assert not (tmp_path / "mine.png").exists()
    assert load_profile(tmp_path / "mine.toml").coefficients.kernel_overhead_us.value == 3.0
