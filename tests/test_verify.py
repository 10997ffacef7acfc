"""Real torch layers on two gloo processes: what must be equal is, what fails ends in one line."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from torch.autograd import DeviceType

from spsim import Model, load_profile, plots
from spsim.cli import main
from spsim.cli.commands import verify as command
from spsim.errors import InputError
from spsim.inputs.resources import profiles_directory
from spsim.measuring.calibrate.coefficients import leaf_at, with_leaves
from spsim.measuring.processes.at_hand import out_of_memory
from spsim.measuring.processes.processes import RankError, RankMemoryError
from spsim.measuring.verify import build_cases, count_ranks, open_ranks, predict, verify
from spsim.measuring.verify.measurement import Rank, _check_kernels
from spsim.measuring.verify.ranks import StartedRanks
from spsim.measuring.verify.records import Job
from spsim.pytorch.layers import HostTime, collectives

pytestmark = pytest.mark.slow

pytest.importorskip("torch")

CPU = load_profile("cpu-2")
CURVE = "[[calibrated.collectives.shared-memory.all_to_all]]"
ARGUMENTS = ["verify", "--hardware", "cpu-2", "--quick", "--seq-len", "64"]
COLLECTIVES = {
    # Forward and backward of one layer: Korthikanti et al. 2022 section 4.2 and Megatron's re-gather; DeepSpeed-Ulysses
    # (Jacobs et al. 2023) section 3.2; ring attention of two ranks.
    "TP2": ({"all_reduce": 2}, {"all_reduce": 2}),
    "TP2+SP": ({"all_gather": 2, "reduce_scatter": 2}, {"all_gather": 4, "reduce_scatter": 2}),
    "Ulysses 2": ({"all_to_all": 4}, {"all_to_all": 4}),
    "Ring 2": ({"send_receive": 1}, {"send_receive": 2}),
    "Ring 2 AG": ({"all_gather": 2}, {"all_gather": 2, "reduce_scatter": 2}),
}


def cases(**settings):
    return build_cases(2, "cpu", "fp32", quick=True, **{"seq_len": 128, **settings})


@pytest.fixture(scope="module")
def found():
    """The quick cases on two processes, few repetitions, as if on the CPU of the profile."""
    with open_ranks(2, "cpu", 60) as pool:
        made = verify([predict(case, CPU) for case in cases()], CPU, pool, repeats=3, profiled=2)
    return on_device(made, CPU.provenance["device"])


def on_device(found, device, **environment):
    """The same run as if on another device."""
    return dataclasses.replace(found, environment=dataclasses.replace(found.environment, device=device, **environment))


def calibrated(name, device):
    """A profile as a calibration on this device would call it."""
    profile = load_profile(name)
    return profile.model_copy(update={"provenance": {**profile.provenance, "device": device}})


def test_every_case_was_run(found):
    assert not found.failure
    assert not found.skipped
    assert {(case.case.strategy, case.case.model.attention) for case in found.cases} == {
        *((strategy, "flash") for strategy in ("TP2", "TP2+SP", "Ulysses 2", "Ring 2")),
        *((strategy, "unfused") for strategy in ("TP2", "TP2+SP", "Ulysses 2", "Ring 2 AG")),
    }


def test_saved_bytes_are_equal(found):
    for case in found.cases:
        for name in ("saved_activation_bytes", "saved_statistics_bytes"):
            assert case[name].measured == case[name].predicted > 0, case.case.name
    # Korthikanti et al. 2022, equation 2 in fp32, and what masks of one byte add: unfused TP without its statistics.
    (tp,) = (case for case in found.cases if (case.case.strategy, case.case.model.attention) == ("TP2", "unfused"))
    s, b, h, a, t = 128, 1, 512, 8, 2
    full, sharded, masks = 8 * s * b * h, 24 * s * b * h + 4 * a * s * s * b, a * s * s * b
    assert tp["saved_activation_bytes"].measured == 2 * full + 2 * s * b * h + (2 * sharded + masks) // t


def test_collectives_are_equal(found):
    for case in found.cases:
        for phase, expected in zip(("forward", "backward"), COLLECTIVES[case.case.strategy], strict=True):
            measured = {
                quantity.name.removeprefix(f"{phase}_").removesuffix("_calls"): quantity.measured
                for quantity in case.quantities
                if quantity.name.startswith(phase) and quantity.name.endswith("_calls")
            }
            assert measured == expected
        assert case.collectives_equal
        assert case.bytes_equal


def test_times_are_there(found):
    """Three kinds of both passes, each with its clock and spread; how large they are is no matter of a test."""
    for case in found.cases:
        times = {quantity.name: quantity for quantity in case.quantities if quantity.name.endswith("_ms")}
        assert len(times) == 6
        for name, quantity in times.items():
            assert 0 < quantity.p10 <= quantity.measured <= quantity.p90
            assert quantity.predicted > 0
            assert quantity.clock == ("thread CPU clock" if "compute" in name else "wall clock")
        assert case.load_average >= 0


def test_the_measured_run_is_a_trace(found):
    """Both ranks, both passes; the collectives that torch's profiler saw are those that were counted."""
    for case in found.cases:
        trace = case.measured
        assert set(trace.copies) == {0, 1}
        axis = {"T": "tp", "U": "ulysses", "R": "ring"}[case.case.strategy[0]]
        assert {span.lane for span in trace.spans} == {"compute", axis}
        for phase, expected in zip(("forward", "backward"), COLLECTIVES[case.case.strategy], strict=True):
            seen = [info.collective for info in trace.tasks if info.part == phase and info.collective]
            assert {kind: seen.count(kind) for kind in seen} == expected
            size = sum(info.message_bytes for info in trace.tasks if info.part == phase and info.collective)
            assert size == sum(case[f"{phase}_{kind}_bytes"].measured for kind in expected)
        assert {"gemm", "norm", "elementwise"} <= {info.operator_class for info in trace.tasks}


# ------------------------------------------------------------ the command


@contextmanager
def instead(monkeypatch, result):
    """The command with a run that was made before."""
    with monkeypatch.context() as patch:
        patch.setattr(command, "_run", lambda *arguments, **options: result)
        yield


def run_main(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    out, err = capsys.readouterr()
    return int(stop.value.code or 0), out, err


def test_tables_and_files(found, monkeypatch, tmp_path, capsys):
    with instead(monkeypatch, found):
        status, out, err = run_main([*ARGUMENTS, "--out", str(tmp_path / "out")], capsys)
    assert (status, err) == (0, "")
    assert "Saved bytes are as simulated in 8 of 8 cases" in out
    assert "load average" in out
    assert "…" not in out, "a column was cut"
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"verification.csv", "verification.json", "scatter.png"} <= names
    assert sum(name.startswith("timeline-") for name in names) == 8
    frame = pd.read_csv(tmp_path / "out" / "verification.csv")
    assert set(frame["case"]) == {case.case.name for case in found.cases}
    document = json.loads((tmp_path / "out" / "verification.json").read_text())
    assert document["bytes_equal"] is document["collectives_equal"] is True


def test_a_difference_is_named(found, monkeypatch, capsys):
    """One byte too much: the case is not equal, and a line says which figure."""
    case = found.cases[0]
    wrong = tuple(
        dataclasses.replace(quantity, predicted=quantity.predicted + 1)
        if quantity.name == "saved_activation_bytes"
        else quantity
        for quantity in case.quantities
    )
    changed = dataclasses.replace(found, cases=[dataclasses.replace(case, quantities=wrong), *found.cases[1:]])
    with instead(monkeypatch, changed):
        _, out, _ = run_main(ARGUMENTS, capsys)
    assert "Saved bytes are as simulated in 7 of 8 cases" in out
    assert f"differs: {case.case.name}: saved_activation_bytes is" in out


def test_finished_cases_are_shown_when_a_rank_is_lost(found, monkeypatch, tmp_path, capsys):
    lost = dataclasses.replace(found, cases=found.cases[:2], failure="rank 1 was ended by SIGKILL in Ring 2")
    with instead(monkeypatch, lost):
        status, out, err = run_main([*ARGUMENTS, "--out", str(tmp_path)], capsys)
    assert status == 2
    assert "in 2 of 2 cases" in out
    assert err == "error: verify: rank 1 was ended by SIGKILL in Ring 2; 2 cases were finished\n"
    assert (tmp_path / "verification.csv").exists()


@pytest.mark.parametrize(
    ("hardware", "device", "line"),
    [
        (load_profile("dgx-h100"), "AMD EPYC", "dgx-h100 is of NVIDIA H100-SXM5-80GB, but the layers ran on AMD EPYC;"),
        (CPU, "Intel(R) Xeon(R)", "cpu-2 is of AMD EPYC, but the layers ran on Intel(R) Xeon(R);"),
    ],
    ids=["GPU", "CPU"],
)
def test_a_profile_of_another_device_is_told(hardware, device, line, found, monkeypatch, capsys):
    with instead(monkeypatch, dataclasses.replace(on_device(found, device), hardware=hardware)):
        _, out, _ = run_main(ARGUMENTS, capsys)
    first, _, rest = out.partition("\n")
    assert first.startswith(f"times cannot be compared: {line}")
    rows = [line for line in rest.splitlines() if " forward " in line and " 128×" in line and "[" in line]
    assert len(rows) == len(found.cases)
    assert not any("%" in row for row in rows)
    assert "Error of simulated times" not in out


# ------------------------------------------------------------ the clock of the host


@pytest.fixture
def clock(monkeypatch):
    """The CPU clock of this thread, which stands unless a test moves it: `clock.advance(seconds)`."""
    now = [100.0]
    monkeypatch.setattr("time.thread_time", lambda: now[0])

    def advance(seconds):
        now[0] += seconds
        return SimpleNamespace(wait=lambda: None)

    return SimpleNamespace(advance=advance)


@pytest.mark.parametrize(
    ("start", "inside"),
    [
        (collectives.start_all_reduce, "dist.all_reduce"), (collectives.start_all_gather, "_all_gather"),
        (collectives.start_reduce_scatter, "_reduce_scatter"), (collectives.all_to_all, "dist.all_to_all_single"),
        (collectives.start_exchange, "dist.batch_isend_irecv"),
    ],
)  # fmt: skip
def test_time_of_the_host_inside_a_collective_is_counted(start, inside, clock, monkeypatch):
    """Three seconds to start one, in which torch may fail as well; two seconds outside are not."""
    module = "spsim.pytorch.layers.collectives"
    monkeypatch.setattr(f"{module}.dist.get_process_group_ranks", lambda group: [0, 1])
    monkeypatch.setattr(f"{module}.dist.get_rank", lambda group=None: 0)
    monkeypatch.setattr(f"{module}.dist.P2POp", lambda *arguments: arguments)
    monkeypatch.setattr(f"{module}.{inside}", lambda *arguments, **options: [clock.advance(3.0)])
    before, group = HostTime.seconds, SimpleNamespace(size=lambda: 2)
    clock.advance(2.0)
    start(torch.zeros(2, 2), group)
    assert HostTime.seconds - before == 3.0
    monkeypatch.setattr(f"{module}.{inside}", lambda *arguments, **options: clock.advance(1.0).missing)
    with pytest.raises(AttributeError):
        start(torch.zeros(2, 2), group)
    assert HostTime.seconds - before == 4.0


def test_time_of_the_host_that_waits_for_a_collective_is_counted(clock):
    before = HostTime.seconds
    work = SimpleNamespace(wait=lambda: clock.advance(5.0))
    collectives.Pending(torch.zeros(1), [work]).wait()
    assert HostTime.seconds - before == 5.0


def test_compute_of_a_pass_is_the_time_outside_its_collectives(clock, monkeypatch):
    """Of 7 s on the thread's clock, the 5 s that wait for a collective are none."""
    work = SimpleNamespace(wait=lambda: clock.advance(5.0))

    def step():
        clock.advance(2.0)
        collectives.Pending(torch.zeros(1), [work]).wait()

    rank = object.__new__(Rank)
    rank.device = torch.device("cpu")
    monkeypatch.setattr(rank, "_meet", lambda: clock.advance(11.0))
    run, job = SimpleNamespace(passes=lambda: (step, step)), SimpleNamespace(warm_up=1, repeats=2)
    _, compute = rank._times(run, job)
    assert compute == {"forward": [2.0, 2.0], "backward": [2.0, 2.0]}


@pytest.mark.parametrize(
    ("hardware", "device", "backend", "comparable"),
    [
        (load_profile("dgx-h100"), "NVIDIA H100 80GB HBM3", "nccl", True),
        (load_profile("dgx-h200"), "NVIDIA H100 80GB HBM3", "nccl", False),
        (load_profile("h100-pcie-8"), "NVIDIA H100 80GB HBM3", "nccl", False),
        (CPU, "NVIDIA H100 80GB HBM3", "nccl", False),
        (calibrated("dgx-h100", "NVIDIA GeForce RTX 4090"), "NVIDIA GeForce RTX 4090", "nccl", True),
        (calibrated("dgx-h100", "NVIDIA GeForce RTX 4090"), "NVIDIA H100 80GB HBM3", "nccl", False),
        (calibrated("dgx-h100", "NVIDIA H200"), "NVIDIA H200", "nccl", True),
        (calibrated("dgx-h100", "NVIDIA H100 MIG 1g.10gb"), "NVIDIA H100 MIG 1g.10gb", "nccl", True),
        (CPU, "AMD EPYC", "gloo", True),
        (CPU, "AMD EPYC 7763 64-Core Processor", "gloo", False),
        (calibrated("cpu-2", "AMD EPYC 7763 64-Core Processor"), "AMD EPYC 7763 64-Core Processor", "gloo", True),
        (calibrated("dgx-h100", "AMD EPYC"), "AMD EPYC", "gloo", False),
    ],
)
def test_times_compare_on_the_device_of_the_profile_alone(hardware, device, backend, comparable, found):
    run = dataclasses.replace(on_device(found, device, backend=backend), hardware=hardware)
    assert run.times_comparable is run.to_json()["times_comparable"] is comparable


def test_captions_explain_and_lines_have_no_trailing_blanks(found, monkeypatch, capsys):
    with instead(monkeypatch, found):
        _, out, _ = run_main(ARGUMENTS, capsys)
    words = " ".join(out.split())
    for text in (
        "sequence × micro-batch × hidden",
        "simulated / measured − 1",
        "CPU time of the pass outside its collectives",
        "Kept:",
    ):
        assert text in words
    assert not [line for line in out.splitlines() if line.endswith(" ")]


def test_flagged_classes_in_use_are_named_once(found, monkeypatch, capsys):
    """The gemm coefficient of every case is flagged, that of fp16 products is used by none."""
    flags = {"gemm.fraction.fp32": 30.0, "gemm.fraction.fp16": 30.0}
    profile = with_leaves(
        CPU,
        {
            path: leaf_at(CPU, path).model_copy(update={"held_out_error_percent": error, "flagged": True})
            for path, error in flags.items()
        },
    )
    flagged = [dataclasses.replace(case, simulated=predict(case.case, profile).result) for case in found.cases[:2]]
    changed = dataclasses.replace(found, hardware=profile, cases=flagged)
    assert changed.to_json()["flagged"] == ["gemm.fraction.fp32"]
    with instead(monkeypatch, changed):
        _, out, _ = run_main(ARGUMENTS, capsys)
    assert out.count("missed its error limit for: gemm.fraction.fp32\n") == 1


def test_under_torchrun():
    """Two ranks of torchrun: rank 0 alone prints, one JSON document."""
    torchrun = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "spsim",
         *ARGUMENTS, "--plan", "tp=2", "--json"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    try:
        out, err = torchrun.communicate(timeout=120)
    finally:
        torchrun.terminate()
    assert torchrun.returncode == 0, err
    document = json.loads(out)
    assert document["ranks"] == 2
    assert document["bytes_equal"] is document["collectives_equal"] is True
    assert len(document["cases"]) == 2


# ------------------------------------------------------------ ranks that fail


def job():
    return Job(cases(plans=["tp=2"])[0], warm_up=0, repeats=1, profiled=1)


@pytest.fixture
def pool():
    ranks = StartedRanks(2, "cpu", 10)
    yield ranks
    ranks.close()


def test_a_rank_that_dies_then_hangs(pool):
    """A dead rank is named with its signal, a stopped one with the time limit; new ones take over each time."""
    os.kill(pool._ranks.processes[1].pid, signal.SIGKILL)
    with pytest.raises(
        RankError, match=r"^rank 1 was ended by SIGKILL, perhaps out of memory in TP2, flash, 128×1×512$"
    ):
        pool.run(job())
    assert len(pool.run(job())) == 2
    pool.time_limit_s = 1
    os.kill(pool._ranks.processes[0].pid, signal.SIGSTOP)
    with pytest.raises(RankError, match=r"^no answer from rank 0.* within 1 s in TP2, flash, 128×1×512$"):
        pool.run(job())
    assert pool._ranks.processes == []


class Pool:
    """Ranks that lack memory for one case and are lost in another."""

    count, device = 2, "cpu"

    def __init__(self, environment):
        self.environment = environment

    def run(self, asked):
        if asked.case.strategy == "Ulysses 2":
            raise RankError("rank 0 failed")
        raise RankMemoryError("rank 1 is out of memory")


def test_a_case_without_memory_is_skipped_and_a_lost_rank_ends_the_run(found):
    predictions = [predict(case, CPU) for case in cases()[:4]]
    result = verify(predictions, CPU, Pool(found.environment))
    assert list(result.skipped) == [prediction.case.name for prediction in predictions[:2]]
    assert set(result.skipped.values()) == {"rank 1 is out of memory"}
    assert (result.failure, list(result.cases)) == ("rank 0 failed", [])


def test_a_profile_without_kernels_is_no_measurement_of_a_gpu():
    """Else the times of the host's operators would pass for those of kernels, where another profiler has the device."""
    host, device = (SimpleNamespace(device_type=kind) for kind in (DeviceType.CPU, DeviceType.CUDA))
    _check_kernels(SimpleNamespace(events=lambda: [host, device]))
    for events in ([host], [], None):
        with pytest.raises(RuntimeError, match="recorded no kernels"):
            _check_kernels(SimpleNamespace(events=lambda found=events: found))


def test_lack_of_memory_is_told_from_other_failures():
    import torch

    with pytest.raises(RuntimeError) as lack:
        torch.empty(2**50)
    assert out_of_memory(lack.value)
    with pytest.raises(RuntimeError) as other:
        torch.empty(2) @ torch.empty(3)
    assert not out_of_memory(other.value)


# ------------------------------------------------------------ what is refused before anything runs


def test_bad_arguments(capsys):
    for arguments, complaint in (
        (["--plan", "tp=4"], "verify: plan 'tp=4' needs 4 processes, but 2 are at hand"),
        (["--plan", "tp=2", "--seq-len", "63", "--plan", "ulysses=2"], "seq_len = 63 is not divisible by 2"),
        (["--precision", "fp8"], "verify: precision 'fp8' is not one of fp32, bf16, fp16"),
        (["--model", "absent"], "unknown model 'absent'"),
    ):
        status, out, err = run_main([*ARGUMENTS, *arguments], capsys)
        assert (status, out) == (2, "")
        assert complaint in err
        assert err.count("\n") == 1


def test_heads_dealt_out_unevenly_are_not_run():
    layer = Model(layers=1, hidden=192, heads=6, kv_heads=3, vocab=8)
    with pytest.raises(InputError, match=r"use degrees that divide kv_heads = 3$"):
        build_cases(2, "cpu", "fp32", plans=["ulysses=2,uneven_heads=by_group"], model=layer)


def test_a_profile_without_curves(tmp_path, capsys):
    """The curve is missed before any process starts."""
    head, _, rest = (profiles_directory() / "cpu-2.toml").read_text().partition(CURVE)
    _, _, rest = rest.partition("[[calibrated.collectives")
    path = tmp_path / "bare.toml"
    path.write_text(f"{head}[[calibrated.collectives{rest}")
    status, out, err = run_main(["verify", "--hardware", str(path), "--plan", "ulysses=2"], capsys)
    assert (status, out) == (2, "")
    assert err == (
        "error: hardware cpu-2: level 'shared-memory' has no all_to_all curve for 2 ranks; add one to the profile\n"
    )


def test_without_torch(monkeypatch):
    monkeypatch.setattr("spsim.measuring.processes.at_hand.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r'^verify: torch is not installed; pip install "spsim\[calibrate\]"$'):
        count_ranks(CPU)


def test_a_model_of_the_user():
    """One of its layers, in its own sizes."""
    model = Model(layers=12, hidden=128, heads=2, vocab=10, attention="unfused")
    (case,) = cases(plans=["tp=2"], model=model, seq_len=32, micro_batch=3)
    assert case.model == model.model_copy(update={"layers": 1})
    assert (case.workload.seq_len, case.workload.micro_batch, case.workload.precision) == (32, 3, "fp32")


def test_the_picture_of_nothing_but_compute():
    """A single GPU communicates nothing: its panel says so."""
    row = {
        "strategy": "single GPU",
        "attention": "flash",
        "clock": "device kernels",
        "p10": 1.0,
        "measured": 2.0,
        "p90": 3.0,
    }
    frame = pd.DataFrame(
        [{**row, "name": f"{phase}_compute_ms", "predicted": 2.5} for phase in ("forward", "backward")]
    )
    figure = plots.plot_verification(frame, title="one")
    texts = [text.get_text() for axes in figure.axes for text in axes.texts]
    assert texts == ["no such time", "no such time"]
    xlim, ylim = figure.axes[0].get_xlim(), figure.axes[0].get_ylim()
    assert xlim == ylim
    assert xlim[0] < 1 < 3 < xlim[1]


@pytest.mark.parametrize(
    ("attention", "forward_ms", "backward_ms"), [("flash_attention_2", 0.5023, 0.982), ("unfused", 1.8341, 2.1097)]
)
def test_kernels_of_a_layer_measured_on_an_h100(attention, forward_ms, backward_ms):
    """`verify --quick` on one H100 SXM, torch 2.11, medians of device kernels; nothing was fitted on these."""
    cases = build_cases(1, "cuda", "bf16", quick=True)
    (case,) = (case for case in cases if case.model.attention == attention)
    figures = predict(case, load_profile("dgx-h100")).figures
    assert figures["forward_compute_ms"] == pytest.approx(forward_ms, rel=0.05)
    assert figures["backward_compute_ms"] == pytest.approx(backward_ms, rel=0.05)
