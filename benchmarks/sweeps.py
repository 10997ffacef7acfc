"""What does an experiment file cost beyond `sweep()`? CPU time, best of several repetitions.

    python benchmarks/sweeps.py [--rows N]

1. Rows through `sweep()` and through an experiment file, points by name and with profile and model objects.
2. An experiment that is complete, run again: CPU time and peak memory of its process.
"""

from __future__ import annotations

import argparse
import io
import resource
import subprocess
import sys
from collections.abc import Iterator
from itertools import count, islice, product
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console
from timing import REPETITIONS, cpu_seconds

import spsim
from spsim.report.table import table
from spsim.studies.experiments import run_experiment

HARDWARE, MODELS = ("dgx-a100-80gb", "dgx-h100"), ("gpt-22b", "llama-3-8b")
PLANS = ("tp=8", "tp=8,sequence_parallel", "ulysses=8", "tp=2,sequence_parallel,ulysses=4")
FILE = """
import sys
sys.path.insert(0, {here!r})
from sweeps import experiment

def build():
    return experiment({rows})
"""


def points(*, objects: bool) -> Iterator[spsim.Point]:
    """Longer and longer sequences."""
    hardware = [spsim.load_profile(name) if objects else name for name in HARDWARE]
    models = [spsim.load_model(name) if objects else name for name in MODELS]
    for seq_len in count(64, 64):
        for plan, profile, model in product(PLANS, hardware, models):
            settings = {"hardware": profile, "model": model, "plan": plan, "workload": {"seq_len": seq_len}}
            yield spsim.Point(settings, {"strategy": plan, "seq_len": seq_len})


def experiment(rows: int, *, objects: bool = False) -> spsim.Experiment:
    """As a user would write it."""
    return spsim.Experiment(name="long", title="Long", points=list(islice(points(objects=objects), rows)))


def through_a_file(long: spsim.Experiment, directory: Path) -> None:
    """Run an experiment anew."""
    (directory / "rows.jsonl").unlink(missing_ok=True)
    (directory / "manifest.json").unlink(missing_ok=True)
    run_experiment(long, directory, None, quick=False, console=Console(file=io.StringIO()))


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=100_000)
    number = parser.parse_args().rows
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
    file = out / "again.py"
    file.write_text(FILE.format(here=str(Path(__file__).parent), rows=number))
    times = []
    for _ in range(REPETITIONS):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        command = [sys.executable, "-m", "spsim", str(file), "--out", str(out), "--jobs", "1"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    print(f"run again: {min(times):.2f} s, peak memory {after.ru_maxrss / 1024:.0f} MiB")


if __name__ == "__main__":
    main()
