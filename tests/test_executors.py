"""Sweeps on the workers of a dask scheduler: rows as computed here, whatever is killed meanwhile; tables as Parquet."""

import os
import signal
import subprocess
import sys
from concurrent.futures import Executor, Future

import pandas as pd
import pytest

import spsim
from spsim.cli import main
from spsim.cli.workers import workers
from spsim.errors import InputError
from spsim.studies import sweeps
from tests.sweeping import wait_for_rows

EXPERIMENT = """
import spsim

MODEL = {"layers": 2, "hidden": 256, "heads": 8, "vocab": 512}
PLANS = ["tp=8", "ulysses=8", "ring=8", "tp=4,ring=2", "tp=2,pp=2", "tp=3"]


def build():
    points = [
        spsim.Point({"hardware": hardware, "model": MODEL, "plan": plan, "workload": {"seq_len": 64 * n}}, {"n": n})
        for n in range(1, 81) for plan in PLANS for hardware in ("dgx-h100", "dgx-a100-80gb")
    ]
    return spsim.Experiment(name="mine", title="Mine", points=points)
"""
POINTS = 80 * 6 * 2
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    path = tmp_path_factory.mktemp("experiment") / "mine.py"
    path.write_text(EXPERIMENT)
    return path


@pytest.fixture(scope="module")
def here(experiment, tmp_path_factory):
    """The table and the rows of a sweep in this process."""
    directory = tmp_path_factory.mktemp("here")
    assert status("--jobs", 1, experiment, directory) == 0
    return left(directory)


def status(*arguments):
    *options, experiment, directory = map(str, arguments)
    with pytest.raises(SystemExit) as stop:
        main([experiment, "--out", directory, *options])
    return stop.value.code


def left(directory):
    rows = (directory / "mine" / "rows.jsonl").read_text().splitlines()
    return (directory / "mine" / "mine.csv").read_bytes(), sorted(rows)


def started(experiment, directory, address):
    return subprocess.Popen(
        [sys.executable, "-m", "spsim", experiment, "--out", directory, "--executor", "dask", "--scheduler", address],
        env=ENVIRONMENT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


@pytest.fixture
def cluster():
    """A scheduler, and two worker processes of their own."""
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None) as made:
        yield made


@pytest.mark.slow
def test_a_killed_worker_loses_nothing_and_computes_nothing_twice(cluster, experiment, here, tmp_path):
    running = started(experiment, tmp_path, cluster.scheduler_address)
    assert 0 < wait_for_rows(running, tmp_path, 50) < POINTS
    os.kill(cluster.workers[0].pid, signal.SIGKILL)
    _, error = running.communicate(timeout=60)
    assert running.returncode == 0, error
    table, rows = left(tmp_path)
    assert len(rows) == POINTS
    assert (table, rows) == here


@pytest.mark.slow
def test_a_lost_scheduler_leaves_finished_rows_and_a_rerun_computes_the_others(cluster, experiment, here, tmp_path):
    running = started(experiment, tmp_path, cluster.scheduler_address)
    assert 0 < wait_for_rows(running, tmp_path, 50) < POINTS
    cluster.close()
    _, error = running.communicate(timeout=60)
    kept = (tmp_path / "mine" / "rows.jsonl").read_text().splitlines()
    assert running.returncode == 2
    assert error.splitlines()[-1].startswith("error: the scheduler of the workers was lost; finished rows are kept")
    assert 50 <= len(kept) < POINTS
    assert status("--jobs", 1, experiment, tmp_path) == 0
    assert left(tmp_path) == here
    assert set(kept) <= set(here[1])


# ------------------------------------------------------------ without a cluster


class Elsewhere(Executor):
    """Computes at once, in this process."""

    def submit(self, fn, /, *args, **kwargs):
        future = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except InputError as error:
            future.set_exception(error)
        return future


POINT = {"hardware": "dgx-h100", "model": "llama-3-8b", "plan": "tp=8", "workload": {"seq_len": 2048}}


def test_a_worker_of_another_program_computes_nothing(monkeypatch):
    """Its rows would stand under the keys of this one."""
    assert len(spsim.sweep([POINT], Elsewhere())) == 1
    versions = iter(["ours", "theirs"])
    monkeypatch.setattr(sweeps, "program_fingerprint", lambda: next(versions))
    with pytest.raises(InputError, match="another version of spsim"):
        spsim.sweep([POINT], Elsewhere())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--executor", "dask"], "--executor dask and --scheduler ADDRESS go together"),
        (["--scheduler", "tcp://head:8786"], "go together"),
        (["--executor", "dask", "--scheduler", "tcp://head:8786", "--jobs", "2"], "leave it out with --executor dask"),
    ],
)
def test_options_that_do_not_go_together_are_refused(experiment, tmp_path, capsys, options, words):
    assert status(*options, experiment, tmp_path) == 2
    error = capsys.readouterr().err.strip()
    assert words in error
    assert "\n" not in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "package", "words"),
    [
        (["--executor", "dask", "--scheduler", "tcp://127.0.0.1:1"], "distributed", "spsim[dask]"),
        (["--rows", "parquet"], "pyarrow", "spsim[parquet]"),
    ],
)
def test_what_is_not_installed_is_said_with_how_to_install_it(
    experiment, tmp_path, monkeypatch, capsys, options, package, words
):
    monkeypatch.setitem(sys.modules, package, None)
    assert status(*options, experiment, tmp_path) == 2
    assert words in capsys.readouterr().err


def test_no_scheduler_is_one_line(monkeypatch, tmp_path, experiment, capsys):
    pytest.importorskip("distributed")
    monkeypatch.setattr("spsim.studies.executors.CONNECT_S", 0.2)
    assert status("--executor", "dask", "--scheduler", "tcp://127.0.0.1:1", experiment, tmp_path) == 2
    assert "no dask scheduler answers there" in capsys.readouterr().err


def test_an_experiment_writes_parquet_in_the_place_of_csv(tmp_path, experiment):
    pytest.importorskip("pyarrow")
    assert status("--quick", "--rows", "parquet", experiment, tmp_path) == 0
    assert {path.name for path in (tmp_path / "mine").iterdir()} == {"manifest.json", "mine.parquet", "rows.jsonl"}
    assert len(pd.read_parquet(tmp_path / "mine" / "mine.parquet")) == POINTS / 4


@pytest.mark.slow
def test_a_search_on_a_cluster_finds_the_same(cluster, capsys):
    search = ["plan", "--model", "llama-3-8b", "--hardware", "dgx-h100", "--gpus", "2", "--seq-len", "4K"]
    search += ["--global-batch", "4", "--values", "recompute=none,full", "--json"]
    found = []
    for options in (["--jobs", "1"], ["--executor", "dask", "--scheduler", cluster.scheduler_address]):
        with pytest.raises(SystemExit) as stop:
            main([*search, *options])
        assert stop.value.code == 0
        found.append(capsys.readouterr().out)
    assert found[0] == found[1]


def test_more_processes_than_a_machine_takes_are_one_line():
    with pytest.raises(InputError, match=r"--jobs 100000: each is a process"), workers(100_000):
        pytest.fail("nothing starts")
