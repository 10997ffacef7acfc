"""What kills, interrupts, full disks and two writers leave behind: a rerun ends byte for byte as if nothing had been.

A few of them here; `python -m pytest -m faults` tries all.
"""

import os
import resource
import signal
import subprocess
import sys
import time
from itertools import product
from pathlib import Path

import pytest

import spsim
from tests.sweeping import wait_for_rows

pytestmark = [pytest.mark.faults, pytest.mark.slow]
EXPERIMENT = """
import spsim

MODEL = {"layers": 2, "hidden": 256, "heads": 8, "vocab": 512}
PLANS = ["tp=8", "ulysses=8", "ring=8", "tp=4,ring=2", "tp=3"]


def build():
    points = [
        spsim.Point({"hardware": "dgx-h100", "model": MODEL, "plan": plan, "workload": {"seq_len": 64 * n}})
        for n in range(1, 81) for plan in PLANS
    ]
    return spsim.Experiment(name="mine", title="Mine", points=points)
"""
FILES = ["manifest.json", "mine.csv", "rows.jsonl"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(spsim.__file__).parent.parent)}


def every(*parameters, here):
    """Parameters of which all but some are left to the suite."""
    return [pytest.param(*one, marks=() if one in here else pytest.mark.long) for one in parameters]


def started(*arguments, limit=None):
    """A command of its own process group; `limit` is the most bytes that a file may have, as where a disk is full."""
    own = None if limit is None else lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    return subprocess.Popen(
        [sys.executable, "-m", "spsim", *map(str, arguments)], env=ENVIRONMENT, start_new_session=True, text=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, preexec_fn=own,
    )  # fmt: skip


def ended(running):
    """Exit status and stderr; the pipe ends when all processes that hold it have."""
    with running:
        error = running.communicate(timeout=120)[1]
    return running.returncode, error


def left(directory):
    """What a sweep left: table and manifest as they are, rows in any order; nothing else."""
    assert sorted(path.name for path in (directory / "mine").iterdir()) == FILES
    manifest, table, rows = ((directory / "mine" / name).read_bytes() for name in FILES)
    return manifest, table, sorted(rows.splitlines())


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    path = tmp_path_factory.mktemp("experiment") / "mine.py"
    path.write_text(EXPERIMENT)
    return path


@pytest.fixture(scope="module")
def undisturbed(experiment, tmp_path_factory):
    directory = tmp_path_factory.mktemp("undisturbed")
    assert ended(started(experiment, "--out", directory, "--jobs", 1)) == (0, "")
    return left(directory)


def is_whole_after_a_rerun(experiment, directory, undisturbed):
    assert ended(started(experiment, "--out", directory, "--jobs", 1)) == (0, "")
    return left(directory) == undisturbed


STOPS = ["SIGKILL", "SIGINT", "SIGTERM", "SIGHUP"]


@pytest.mark.parametrize(
    ("stop", "jobs", "rows"),
    every(*product(STOPS, [1, 2], [1, 50, 300]), here=[("SIGKILL", 2, 50)]),
)
def test_stopped(stop, jobs, rows, experiment, undisturbed, tmp_path):
    """All processes of a sweep at once, as a terminal or a batch system does."""
    running = started(experiment, "--out", tmp_path, "--jobs", jobs)
    wait_for_rows(running, tmp_path, rows)
    os.killpg(running.pid, getattr(signal, stop))
    status, error = ended(running)
    assert "Traceback" not in error
    assert status in (0, 130, -getattr(signal, stop))  # it may have been at its end
    assert is_whole_after_a_rerun(experiment, tmp_path, undisturbed)


@pytest.mark.parametrize("rows", every((1,), (50,), (300,), here=[]))
def test_the_parent_is_killed(rows, experiment, undisturbed, tmp_path):
    """Its workers end too, each of which holds the pipe."""
    running = started(experiment, "--out", tmp_path, "--jobs", 2)
    wait_for_rows(running, tmp_path, rows)
    running.kill()
    ended(running)
    assert is_whole_after_a_rerun(experiment, tmp_path, undisturbed)


@pytest.mark.parametrize("rows", every((1,), (50,), here=[]))
def test_a_worker_is_killed(rows, experiment, undisturbed, tmp_path):
    """As the system does where memory runs out."""
    running = started(experiment, "--out", tmp_path, "--jobs", 2)
    wait_for_rows(running, tmp_path, rows)
    children = Path(f"/proc/{running.pid}/task/{running.pid}/children")
    workers = [int(pid) for pid in children.read_text().split()] if children.exists() else []
    for pid in workers[-1:]:
        os.kill(pid, signal.SIGKILL)
    ended(running)
    assert is_whole_after_a_rerun(experiment, tmp_path, undisturbed)


LIMITS = [0, 1000, 20_000, 100_000]


@pytest.mark.parametrize(("limit", "jobs"), every(*product(LIMITS, [1, 2]), here=[(20_000, 1)]))
def test_a_full_disk_in_a_sweep(limit, jobs, experiment, undisturbed, tmp_path):
    status, error = ended(started(experiment, "--out", tmp_path, "--jobs", jobs, limit=limit))
    assert (status, error.count("\n"), error[:7]) == (2, 1, "error: ")
    assert is_whole_after_a_rerun(experiment, tmp_path, undisturbed)


RUN = ["--hardware", "dgx-h100", "--model", "llama-3-8b", "--seq-len", "2048", "--plan", "tp=2"]
COMMANDS = {"run": ["run", *RUN], "compare": ["compare", *RUN, "--plan", "ulysses=2"]}


@pytest.mark.parametrize(("name", "limit"), every(*product(COMMANDS, [0, 100, 30_000]), here=[("run", 100)]))
def test_a_full_disk_leaves_no_part_of_the_outputs(name, limit, tmp_path):
    status, error = ended(started(*COMMANDS[name], "--out", tmp_path / "out", limit=limit))
    assert (status, error.count("\n"), error[:7]) == (2, 1, "error: ")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize(("jobs", "delay"), every(*product([1, 2], [0, 0.3, 1]), here=[]))
def test_two_writers(jobs, delay, experiment, undisturbed, tmp_path):
    """Two sweeps into one directory: each ends well, and what both leave is what one would."""
    first = started(experiment, "--out", tmp_path, "--jobs", jobs)
    time.sleep(delay)
    second = started(experiment, "--out", tmp_path, "--jobs", jobs)
    assert [ended(first), ended(second)] == [(0, ""), (0, "")]
    assert is_whole_after_a_rerun(experiment, tmp_path, undisturbed)
