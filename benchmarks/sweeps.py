"""What does an experiment file cost beyond `sweep()`? CPU time, best of several repetitions.

    python benchmarks/sweeps.py [--rows N]
    python benchmarks/sweeps.py --memory [--rows 1000000]

1. Rows through `sweep()` and through an experiment file, points by name and with profile and model objects.
2. An experiment that is complete, run again: CPU time and peak memory of its process.
3. With `--memory` instead: points that a function gives one by one, a sixteenth of the rows, a fourth and all, each
   run again.
"""

from __future__ import annotations

import argparse
import io
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from itertools import islice, product
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console
from timing import REPETITIONS, cpu_seconds

import spsim
from spsim.report.table import table
from spsim.studies.experiments import run_experiment

HARDWARE, MODELS = ("dgx-a100-80gb", "dgx-h100"), ("gpt-22b", "llama-3-8b")
PLANS = ("tp=8", "tp=8,sequence_parallel", "ulysses=8", "tp=2,sequence_parallel,ulysses=4")
LONGEST, MICRO_BATCHES = 2**18, 16
"""Of a sequence and a micro-batch: a million points."""
FILE = """
import sys
sys.path.insert(0, {here!r})
from sweeps import experiment

def build():
    return experiment({rows}, anew={anew})
"""


def points(*, objects: bool) -> Iterator[spsim.Point]:
    """Longer and longer sequences, then larger micro-batches of the same."""
    hardware = [spsim.load_profile(name) if objects else name for name in HARDWARE]
    models = [spsim.load_model(name) if objects else name for name in MODELS]
    for micro_batch, seq_len in product(range(1, MICRO_BATCHES + 1), range(64, LONGEST + 1, 64)):
        workload = {"seq_len": seq_len, "micro_batch": micro_batch}
        for plan, profile, model in product(PLANS, hardware, models):
            settings = {"hardware": profile, "model": model, "plan": plan, "workload": workload}
            yield spsim.Point(settings, {"strategy": plan, "seq_len": seq_len})


def experiment(rows: int, *, objects: bool = False, anew: bool = False) -> spsim.Experiment:
    """As a user would write it, with a list of points or a function that gives them."""
    give = partial(_some, rows, objects=objects)
    return spsim.Experiment(name="long", title="Long", points=give if anew else list(give()))


def _some(rows: int, *, objects: bool) -> Iterator[spsim.Point]:
    return islice(points(objects=objects), rows)


def through_a_file(long: spsim.Experiment, directory: Path) -> None:
    """Run an experiment anew."""
    (directory / "rows.jsonl").unlink(missing_ok=True)
    (directory / "manifest.json").unlink(missing_ok=True)
    run_experiment(long, directory, None, quick=False, console=Console(file=io.StringIO()))


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--memory", action="store_true")
    options = parser.parse_args()
    if options.memory:
        memory(options.rows)
    else:
        times(options.rows)


def times(number: int) -> None:
    """What a row costs, and resuming them."""
    made = table(f"{number:,} rows", ["points", "sweep()", "experiment file", "more"], numbers=["more"])
    with TemporaryDirectory() as out:
        directory = Path(out) / "long"
        directory.mkdir()
        for kind in ("with objects", "by name"):
            long = experiment(number, objects=kind == "with objects")
            alone = cpu_seconds(lambda long=long: spsim.sweep(long.points)) / number
            filed = cpu_seconds(lambda long=long: through_a_file(long, directory)) / number
            made.add_row(kind, *(f"{seconds * 1e6:.1f} us a row" for seconds in (alone, filed, filed - alone)))
        Console(width=140).print(made)
        again(number, Path(out))


def again(number: int, out: Path) -> None:
    """Resume the experiment that stands in a directory."""
    runs = [run(number, out) for _ in range(REPETITIONS)]
    print(f"run again: {min(seconds for seconds, _ in runs):.2f} s, peak memory {runs[-1][1]:.0f} MiB")


def memory(number: int) -> None:
    """Longer and longer sweeps, each in a process of its own."""
    for rows in (number // 16, number // 4, number):
        with TemporaryDirectory() as out:
            for what in ("computed", "run again"):
                seconds, peak = run(rows, Path(out), anew=True)
                print(f"{rows:,} rows {what}: {seconds:.1f} s, peak memory {peak:.0f} MiB", flush=True)


def run(rows: int, out: Path, *, anew: bool = False) -> tuple[float, float]:
    """CPU seconds and MiB at most of a process that runs an experiment."""
    file = out / "long.py"
    file.write_text(FILE.format(here=str(Path(__file__).parent), rows=rows, anew=anew))
    command = [sys.executable, "-m", "spsim", str(file), "--out", str(out), "--jobs", "1"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(process.returncode)
    return used.ru_utime + used.ru_stime, used.ru_maxrss / 1024


if __name__ == "__main__":
    main()
