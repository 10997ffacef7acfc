"""Calibrations that run: two gloo processes, and what happens when they die, hang or differ.

A raw file that has all rows but a few makes a run short: a calibration measures only what is missing.
"""

import os
import signal
import socket
import subprocess
import sys
from multiprocessing import active_children
from threading import Thread

import pytest
import torch

from spsim.cli import main
from spsim.errors import InputError
from spsim.inputs.profiles import load_profile
from spsim.measuring.calibrate import catalogue, launch, rank_process
from spsim.measuring.calibrate.base import base_of_rows, base_profile, check_ranks
from spsim.measuring.calibrate.devices import Cpu
from spsim.measuring.calibrate.ranks import Ranks
from spsim.measuring.calibrate.records import append_measurements, read_measurements
from spsim.measuring.calibrate.session import Note, Progress, Settings, expected_seconds, sections, title
from spsim.units import MIB
from tests.test_calibrate_catalogue import CPU, machine

FORWARD = "gemm forward fp32 128x768x256"
ALL_REDUCE = "all_reduce fp32 4096 bytes on 2 ranks by shared-memory"


def all_rows():
    here = machine(
        device="cpu", dtypes=CPU.dtypes, cache_bytes=Cpu(2).cache_share, ranks=2, levels=("shared-memory",),
        attention_kernels=("torch_cpu",),
    )  # fmt: skip
    return [row for section in sections(here, quick=True) for row in section.rows]


def prepare(directory, missing, *, timed=True):
    """Settings of a calibration whose raw file lacks only the rows that `missing` chooses; those that are not `timed`
    have no result to fit.
    """
    settings = Settings(raw=directory, quick=True, time_limit=60)
    profile = load_profile("cpu-2")
    made_up = [
        row.model_copy(update={"time_us": 1 + 2e6 * expected_seconds(row, profile) if timed else None})
        for row in all_rows()
        if not missing(row)
    ]
    append_measurements(settings.file, made_up)
    return settings


def named(*titles):
    return lambda row: title(row) in titles


@pytest.fixture
def no_launcher(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


pytestmark = [pytest.mark.usefixtures("no_launcher"), pytest.mark.slow]


def measured(settings):
    """Rows that were measured and not made up."""
    return {title(row): row for row in read_measurements(settings.file) if row.clock or row.value or row.text}


@pytest.fixture
def processes():
    """Those that a test has started, in order of rank; others may live beside them."""
    others = set(active_children())
    return lambda: sorted(set(active_children()) - others, key=lambda process: process._identity)


@pytest.mark.slow
def test_two_processes_measure_one_row_of_each_kind(tmp_path, processes):
    smallest = [f"{name} fp32 1024 bytes on 2 ranks by shared-memory" for name in catalogue.COLLECTIVES]
    beside = "gemm_beside_all_reduce fp32 33554432 bytes on 2 ranks by shared-memory"
    others = [
        "stream_add fp32",
        "norm_statistics bf16",
        "attention torch_cpu forward bf16 4/4 heads of 64, 128 tokens, causal",
    ]
    settings = prepare(tmp_path, named(FORWARD, beside, *smallest, *others))
    reports = []
    launch.measure(settings, reports.append)
    rows = measured(settings)
    notes = [report.text for report in reports if isinstance(report, Note)]
    assert notes == ["no GPU: measuring this machine's CPU, two processes of one thread each, gloo between them"]
    assert {report.item for report in reports if isinstance(report, Progress)} == {
        FORWARD, beside, *smallest, *others
    }  # fmt: skip
    for name in smallest:
        row = rows[name]
        assert (row.clock, row.level, row.ranks, row.nodes) == ("wall", "shared-memory", 2, 1)
        assert 1 < row.time_us < 1e6
    assert {rows[name].clock for name in (FORWARD, others[0], others[2])} == {"thread_cpu"}
    assert rows[others[1]].text == "torch.bfloat16"
    facts = {row.name: row.text for row in rows.values() if row.kind == "environment"}
    assert {"device", "torch", "ranks", "nodes", "backend", "date", "load_average", "clock_mhz"} <= set(facts)
    assert (facts["ranks"], facts["nodes"], facts["backend"]) == ("2", "1", "gloo")
    assert rows[beside].time_us > 0
    assert -1 < rows[beside].value < 1
    assert processes() == []


@pytest.mark.slow
def test_a_process_that_is_killed_is_one_line_and_a_rerun_goes_on(tmp_path, processes):
    settings = prepare(tmp_path, named(FORWARD, ALL_REDUCE))

    def kill(report):
        if isinstance(report, Progress) and report.item == ALL_REDUCE:
            os.kill(processes()[1].pid, signal.SIGKILL)

    with pytest.raises(InputError) as failure:
        launch.measure(settings, kill)
    assert str(failure.value) == (
        f"calibrate: rank 1 was ended by SIGKILL, perhaps out of memory in {ALL_REDUCE}; "
        "finished measurements are kept, run again to go on"
    )
    assert processes() == []
    assert FORWARD in measured(settings)
    assert ALL_REDUCE not in measured(settings)
    items = []
    launch.measure(settings, lambda report: items.append(getattr(report, "item", None)))
    assert items == [None, ALL_REDUCE]
    assert ALL_REDUCE in measured(settings)


@pytest.mark.slow
def test_a_collective_that_hangs_ends_at_the_time_limit(tmp_path, processes):
    settings = prepare(tmp_path, named(FORWARD, ALL_REDUCE))
    settings = Settings(raw=settings.raw, quick=True, time_limit=6)
    stopped = []

    def stop(report):
        if isinstance(report, Progress) and report.item == ALL_REDUCE:
            stopped.append(processes()[1].pid)
            os.kill(stopped[0], signal.SIGSTOP)

    with pytest.raises(InputError) as failure:
        launch.measure(settings, stop)
    assert str(failure.value) == (
        f"calibrate: {ALL_REDUCE} did not end within 6 s; finished measurements are kept, run again to go on"
    )
    assert len(stopped) == 1
    rows = read_measurements(settings.file)
    assert (title(rows[-1]), rows[-1].skipped) == (ALL_REDUCE, "did not end within 6 s")
    assert FORWARD in measured(settings)
    assert processes() == []


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def start_rank(rank, port, *arguments):
    """One of two ranks of a node, with the variables that torchrun sets."""
    variables = {
        "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }  # fmt: skip
    environment = {**os.environ, **{name: str(value) for name, value in variables.items()}}
    command = [sys.executable, "-m", "spsim", "calibrate", *arguments]
    return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.mark.slow
def test_ranks_of_a_launcher_measure_and_the_first_writes(tmp_path):
    (tmp_path / "p.raw").mkdir()
    settings = prepare(tmp_path / "p.raw", named(FORWARD, ALL_REDUCE), timed=False)
    port = free_port()
    started = [start_rank(rank, port, "--quick", "--out", str(tmp_path / "p.toml")) for rank in range(2)]
    (first, error), (second, _) = (process.communicate(timeout=120) for process in started)
    assert [process.returncode for process in started] == [0, 0], error
    assert {FORWARD, ALL_REDUCE} <= set(measured(settings))
    assert first.count("held-out errors") == 1
    assert second == ""
    assert load_profile(tmp_path / "p.toml").provenance["ranks"] == "2"


# ------------------------------------------------------------ what is refused before anything is measured


def refused(capsys, *arguments):
    """The one line of a command that fails."""
    with pytest.raises(SystemExit) as ended:
        main(["calibrate", *map(str, arguments)])
    captured = capsys.readouterr()
    assert (ended.value.code, captured.out) == (2, "")
    assert captured.err.count("\n") == 1
    return captured.err.removeprefix("error: ").strip()


def test_bad_options_are_refused(tmp_path, capsys):
    out = tmp_path / "p.toml"
    (tmp_path / "file").write_text("")
    (tmp_path / "directory.toml").mkdir()
    assert "--quick and --full" in refused(capsys, "--out", out, "--quick", "--full")
    assert "unknown hardware 'dgx-z1'" in refused(capsys, "--out", out, "--base", "dgx-z1")
    assert "--fit measures nothing" in refused(capsys, "--out", out, "--fit", tmp_path, "--quick")
    assert "a profile is a .toml file" in refused(capsys, "--out", tmp_path / "p.json")
    assert "is a directory" in refused(capsys, "--out", tmp_path / "directory.toml")
    assert "cannot be made a directory" in refused(capsys, "--out", tmp_path / "file" / "p.toml")
    assert "cannot be made a directory" in refused(capsys, "--out", out, "--raw", tmp_path / "file" / "raw")
    assert "no such file" in refused(capsys, "--out", out, "--fit", tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["directory.toml", "file"]


def as_rank(monkeypatch, rank, world, per_node):
    for name, number in {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": per_node}.items():
        monkeypatch.setenv(name, str(number))


@pytest.mark.parametrize(
    ("world", "per_node", "base", "message"),
    [
        (4, 4, [], "4 ranks on a node, but one of cpu-2 has 2 GPUs; start at most 2 on each, or give a --base with"),
        (3, 3, [], "3 ranks on a node, but one of cpu-2 has 2 GPUs"),
        (4, 2, [], "the ranks are on 2 nodes, but cpu-2 has no level beyond 'shared-memory'; give a --base with one"),
        (16, 16, ["--base", "dgx-h100"], "16 ranks on a node, but one of dgx-h100 has 8 GPUs"),
    ],
)
def test_ranks_that_the_base_cannot_hold_are_refused_before_anything(
    world, per_node, base, message, tmp_path, capsys, monkeypatch
):  # fmt: skip
    """By the leader, in one line; the others end as it does, and say nothing."""
    monkeypatch.setattr(
        "spsim.cli.commands.calibrate.measure", lambda *arguments: pytest.fail("something was measured")
    )
    monkeypatch.setattr("spsim.cli.leader.LEADER_FIRST_S", 0.0)
    arguments = ["--quick", *base, "--out", str(tmp_path / "new" / "p.toml")]
    as_rank(monkeypatch, 0, world, per_node)
    assert refused(capsys, *arguments).startswith(f"calibrate: {message}")
    as_rank(monkeypatch, 1, world, per_node)
    with pytest.raises(SystemExit) as ended:
        main(["calibrate", *arguments])
    assert (ended.value.code, *capsys.readouterr()) == (2, "", "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("name", "per_node", "nodes"), [("cpu-2", 2, 1), ("dgx-h100", 8, 3), ("gb200-nvl72", 72, 2)])
def test_ranks_that_the_base_holds(name, per_node, nodes):
    check_ranks(load_profile(name), per_node, nodes)


def test_a_level_of_nodes_joins_no_more_gpus_than_it_has():
    """Two nodes of eight fit a network of 16, three do not."""
    base = load_profile("dgx-h100")
    inner, outer = base.datasheet.topology
    topology = (inner, outer.model_copy(update={"gpus": 16}))
    small = base.model_copy(update={"datasheet": base.datasheet.model_copy(update={"topology": topology})})
    check_ranks(small, 8, 2)
    with pytest.raises(InputError, match="24 ranks on 3 nodes, but 'infiniband' of dgx-h100 joins 16 GPUs"):
        check_ranks(small, 8, 3)


def test_without_torch_it_says_what_to_install(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("spsim.measuring.processes.at_hand.find_spec", lambda name: None)
    line = refused(capsys, "--out", tmp_path / "p.toml")
    assert line == 'calibrate: torch is not installed; pip install "spsim[calibrate]"'


@pytest.mark.slow
def test_a_torch_that_does_not_load_is_one_line(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('libcudart.so.12: cannot open\\nshared object file')")
    path = os.pathsep.join([str(tmp_path), *sys.path])
    done = subprocess.run(
        [sys.executable, "-m", "spsim", "calibrate", "--quick", "--out", str(tmp_path / "new" / "p.toml")],
        env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (
        2, "error: torch cannot be loaded (libcudart.so.12: cannot open shared object file); install it again\n"
    )  # fmt: skip
    assert not (tmp_path / "new").exists()


def rank_with(store, rank, per_node=2):
    return Ranks(rank, rank, 2, per_node, store)


@pytest.mark.parametrize(
    ("device", "uuid", "per_node", "message"),
    [
        ("NVIDIA A100", "b", 2, "rank 0 has the device 'NVIDIA H100', rank 1 has 'NVIDIA A100'"),
        ("NVIDIA H100", "b", 1, "rank 1 is one of 1 on its node, rank 0 of 2"),
        ("NVIDIA H100", "a", 2, r"ranks 0 and 1 have the same GPU \(a\); start one process a GPU"),
    ],
)
def test_ranks_that_differ_are_refused_by_the_first_while_the_others_wait(device, uuid, per_node, message):
    store = torch.distributed.HashStore()
    other = Thread(target=lambda: rank_with(store, 1, per_node).check_alike(device, uuid))
    other.start()
    with pytest.raises(InputError, match=message):
        rank_with(store, 0).check_alike("NVIDIA H100", "a")
    assert other.is_alive()
    store.set("alike", "")
    other.join()


def test_a_rank_without_a_device_is_named_by_the_first(monkeypatch):
    def busy(*_):
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(rank_process, "open_device", busy)
    store = torch.distributed.HashStore()
    with pytest.raises(InputError, match=r"^calibrate: out of memory$"):
        rank_process._open(rank_with(store, 0))

    def second():
        with pytest.raises(InputError):
            rank_process._open(rank_with(store, 1))

    other = Thread(target=second)
    other.start()
    with pytest.raises(InputError, match="rank 1 has 'no device: out of memory'"):
        rank_with(store, 0).check_alike("NVIDIA H100", "a")
    assert other.is_alive()
    store.set("alike", "")
    other.join()


def test_equal_ranks_on_devices_of_their_own_go_on():
    store = torch.distributed.HashStore()
    other = Thread(target=lambda: rank_with(store, 1).check_alike("NVIDIA H100", "b"))
    other.start()
    rank_with(store, 0).check_alike("NVIDIA H100", "a")
    other.join(10)
    assert not other.is_alive()


def test_a_gpu_without_a_shipped_profile_needs_a_base():
    with pytest.raises(InputError, match="no shipped profile describes the device 'NVIDIA GeForce RTX 5090'"):
        base_profile(None, "NVIDIA GeForce RTX 5090", gpu=True)
    assert base_profile("dgx-h100", "NVIDIA GeForce RTX 5090", gpu=True).name == "dgx-h100"
    assert base_profile(None, "AMD EPYC", gpu=False).name == "cpu-2"


@pytest.mark.slow
def test_one_gpu_goes_through_its_catalogue(tmp_path, monkeypatch):
    """A device that says it is a GPU, and measurements that are made up: base, sections and facts follow from it."""

    class Gpu(Cpu):
        kind = "cuda"
        name = "NVIDIA H100 80GB HBM3"
        dtypes = ("fp32", "tf32", "fp16", "bf16", "fp8")

        def facts(self):
            return {"cuda": "12.8", "nccl": "2.27.3", "driver": "570.00"}

    def made_up(device, row, *_):
        return row.model_copy(update={"time_us": 1.0})

    for name in ("measure_kernel", "measure_launch", "measure_memory"):
        monkeypatch.setattr(rank_process, name, made_up)
    monkeypatch.setattr(rank_process, "open_device", lambda *_: Gpu(1))
    settings = Settings(raw=tmp_path, quick=True)
    ranks = Ranks(0, 0, 1, 1, torch.distributed.HashStore())
    rank_process.run_rank(ranks, settings, lambda _: None, pytest.fail)
    rows = read_measurements(settings.file)
    assert {row.kind for row in rows} == {"environment", "launch", "gemm", "attention", "memory_bound", "memory"}
    assert {"context", "allocated", "reserved"} <= {row.name for row in rows if row.kind == "memory"}
    assert {"graph_add", "host_add"} <= {row.name for row in rows if row.kind == "launch"}
    assert base_of_rows(None, rows).name == "dgx-h100"
    # The datasheet's cache, which is larger than what this machine reports.
    bytes_of_adds = [row.bytes_moved for row in rows if row.name == "add"]
    assert min(bytes_of_adds) < 50 * MIB < max(bytes_of_adds)


def test_one_rank_that_cannot_allocate_stops_none():
    """All agree on the first problem before any begins to communicate, also with one that was not asked before."""
    store = torch.distributed.HashStore()
    first, second = rank_with(store, 0), rank_with(store, 1)
    first.command(all_rows()[0])
    assert first.agree("", [0]) == ""
    first.command(all_rows()[1])
    commands = second.commands()
    assert [next(commands).key for _ in range(2)] == [row.key for row in all_rows()[:2]]
    store.set("agreement/2/0", "")
    assert second.agree("out of memory", [0, 1]) == "out of memory"
    assert first.agree("", [0, 1]) == "out of memory"
    first.command(None)
    assert list(commands) == []
