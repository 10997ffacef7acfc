"""The command behind `spsim FILE.py`: an experiment."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import Annotated

import typer

from spsim.cli.options import ReportOption
from spsim.cli.outputs import check_report, make_directory, open_console, print_report
from spsim.cli.workers import ExecutorOption, SchedulerOption, check_workers, workers
from spsim.studies.experiment import Experiment
from spsim.studies.experiments import load_experiment, run_experiment
from spsim.studies.tablefile import TableFormat, check_format


def command(
    file: Path,
    out: Annotated[Path, typer.Option("--out", help="Directory of results.")] = Path("results"),
    jobs: Annotated[
        int | None, typer.Option("--jobs", min=1, help="Processes; by default all cores for a large sweep.")
    ] = None,
    page: ReportOption = None,
    quick: Annotated[bool, typer.Option("--quick", help="A small selection of the points.")] = False,
    executor: ExecutorOption = "processes",
    scheduler: SchedulerOption = None,
    rows: Annotated[TableFormat, typer.Option("--rows", help="Format of the table of rows.")] = "csv",
) -> None:
    """Run an experiment file: a Python file that defines build() -> spsim.Experiment."""
    check_report(page)
    check_workers(executor, scheduler, jobs)
    check_format(rows)
    loaded = _load(file)
    directory = out / loaded.name
    make_directory(directory)
    with workers(_jobs(jobs, len(loaded.selection(quick=quick))), scheduler) as pool:
        run_experiment(loaded, directory, pool, quick=quick, console=open_console(), page=page, rows=rows)
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


def _jobs(asked: int | None, points: int) -> int:
    """All cores for a large sweep, unless told how many."""
    return asked or (os.cpu_count() or 1 if points >= LARGE_SWEEP else 1)
