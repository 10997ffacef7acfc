"""Ctrl-C: one line, exit status 130, and no process or traceback left behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from spsim.cli import main

pytestmark = pytest.mark.slow

LINE = "interrupted; finished rows are kept, run again to go on\n"
SWEEP = str(Path(__file__).parent.parent / "experiments" / "sweep.py")


@pytest.mark.parametrize(
    ("arguments", "sign"),
    [
        (["verify", "--hardware", "cpu-2", "--quick"], "spsim-verify-*/store-0"),
        (["calibrate", "--quick", "--out", "{}/p.toml"], "p.raw/measurements.csv"),
        ([SWEEP, "--jobs", "2", "--out", "{}"], "sweep/rows.jsonl"),
    ],
    ids=["verify", "calibrate", "experiment"],
)
def test_an_interrupt_of_all_processes(arguments, sign, tmp_path):
    """As a terminal sends it, once the other processes are at work; the pipe ends when all have."""
    if "verify" in arguments or "calibrate" in arguments:
        pytest.importorskip("torch")
    command = [sys.executable, "-m", "spsim", *(argument.format(tmp_path) for argument in arguments)]
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    with subprocess.Popen(
        command, env={**environment, "TMPDIR": str(tmp_path)}, start_new_session=True, text=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    ) as running:  # fmt: skip
        while running.poll() is None and not any(path.stat().st_size for path in tmp_path.glob(sign)):
            time.sleep(0.01)
        os.killpg(running.pid, signal.SIGINT)
        _, error = running.communicate(timeout=60)
    assert (running.returncode, error) == (130, LINE)


@pytest.mark.parametrize("command", ["list", "run", "calibrate", "verify"])
def test_an_interrupt_while_packages_are_imported(command, tmp_path):
    """An import of pydantic that does not end, and takes an interrupt for a failure of its own."""
    (tmp_path / "pydantic.py").write_text(
        "import pathlib, time\n"
        "try:\n    pathlib.Path(__file__).with_name('begun').touch()\n"
        "    for _ in range(6000): time.sleep(0.01)  # one sleep would not end, if the signal came just before it\n"
        "except BaseException as error:\n    raise ImportError('cannot load') from error\n"
    )
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).parent.parent)])
    with subprocess.Popen(
        [sys.executable, "-m", "spsim", command, "--help"], env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    ) as running:  # fmt: skip
        while running.poll() is None and not (tmp_path / "begun").exists():
            time.sleep(0.001)
        running.send_signal(signal.SIGINT)
        _, error = running.communicate(timeout=60)
    assert (running.returncode, error) == (130, "interrupted; nothing was started\n")


def test_an_interrupted_run(capsys, monkeypatch):
    """The simulation itself is interrupted."""

    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("spsim.cli.commands.run.simulate", interrupt)
    with pytest.raises(SystemExit) as ended:
        main(["run", "--hardware", "dgx-h100", "--model", "llama-3-70b", "--plan", "tp=8", "--seq-len", "1024"])
    assert (ended.value.code, capsys.readouterr().err) == (130, LINE)
