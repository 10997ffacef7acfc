"""The command behind `spsim FILE.py`: an experiment."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from spsim.cli.options import ReportOption
from spsim.cli.outputs import check_report, make_directory, open_console, print_report
from spsim.measuring.processes.processes import end_with_parent
from spsim.studies.experiment import Experiment
from spsim.studies.experiments import load_experiment, run_experiment


def command(
    file: Path,
    out: Annotated[Path, typer.Option("--out", help="Directory of results.")] = Path("results"),
    jobs: Annotated[
        int | None, typer.Option("--jobs", min=1, help="Processes; by default all cores for a large sweep.")
    ] = None,
    page: ReportOption = None,
    quick: Annotated[bool, typer.Option("--quick", help="A small selection of the points.")] = False,
) -> None:
    """Run an experiment file: a Python file that defines build() -> spsim.Experiment."""
    check_report(page)
    loaded = _load(file)
    directory = out / loaded.name
    make_directory(directory)
    with _executor(jobs, len(loaded.selection(quick=quick))) as executor:
        run_experiment(loaded, directory, executor, quick=quick, console=open_console(), page=page)
    print_report(open_console(), page)


def _load(file: Path) -> Experiment:
    """The experiment of a file. Its points stay until the end: looking for garbage among them is in vain, and takes
    several times as long as making them.
    """
    gc.disable()
    try:
        return load_experiment(file)
    finally:
        gc.freeze()
        gc.enable()


LARGE_SWEEP = 2000
"""Configurations from which starting processes pays."""


@contextmanager
def _executor(jobs: int | None, points: int) -> Iterator[Executor | None]:
    """Processes for a large sweep, unless told how many; none for one job."""
    if jobs is None:
        jobs = os.cpu_count() or 1 if points >= LARGE_SWEEP else 1
    if jobs == 1:
        yield None
        return
    with ProcessPoolExecutor(jobs, initializer=_start_worker) as pool:
        yield pool


def _start_worker() -> None:
    """An interrupted worker ends without a word, and that of a killed sweep too: it holds both ends of its queue."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    end_with_parent()
