"""Runs an experiment file: rows, figures, tables and a manifest in one directory."""

from __future__ import annotations

import importlib.util
import json
import re
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from spsim.errors import InputError
from spsim.files import write_text
from spsim.inputs.resources import read_text
from spsim.studies.points import Point
from spsim.studies.sweeps import Experiment, RowFile, manifest, run_points


def load_experiment(path: Path) -> Experiment:
    """The experiment that `build()` of a Python file returns; importing the file runs nothing."""
    read_text(path)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise InputError(f"{path}: is not a Python file; give an experiment file ending in .py")
    module = importlib.util.module_from_spec(spec)
    with _users_code(path):
        spec.loader.exec_module(module)
        build = getattr(module, "build", None)
        experiment = build() if callable(build) else None
    if not isinstance(experiment, Experiment):
        raise InputError(f"{path}: must define build() that returns a spsim.Experiment")
    if not experiment.points:
        raise InputError(f"{path}: the experiment has no points; give at least one")
    if not re.fullmatch(r"[\w-]+", experiment.name):
        raise InputError(f"{path}: name = {experiment.name!r}: use letters, digits, _ and -, for it names a directory")
    return experiment


@contextmanager
def _users_code(where: Path) -> Iterator[None]:
    """What fails in an experiment's own code is one line with its place."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in frames if not re.search(r"site-packages|<frozen", frame.filename)]
        place = own[-1]
        line = error.lineno if isinstance(error, SyntaxError) else place.lineno
        name = place.filename if place.filename != __file__ else where
        raise InputError(f"{name}: line {line}: {type(error).__name__}: {error}") from None


def run_experiment(
    experiment: Experiment, directory: Path, executor: Executor | None, *, quick: bool, console: Console
) -> pd.DataFrame:
    """Compute the rows, then write the CSV, the figures and the manifest, and print the tables."""
    points = experiment.selection(quick=quick)
    console.print(f"{experiment.title}: {len(points)} configurations", soft_wrap=True)
    frame = _compute(points, directory, executor, console)
    write_text(directory / f"{experiment.name}.csv", frame.drop(columns="key").to_csv(index=False))
    write_text(directory / "manifest.json", json.dumps(manifest(experiment, points), indent=1))
    failed = frame[frame["error"] != ""]
    good = frame[frame["error"] == ""]
    written = [f"{experiment.name}.csv", "manifest.json", "rows.jsonl"]
    if not good.empty:
        from spsim import plots

        with _users_code(directory):
            figures, tables = experiment.figures(good), list(experiment.tables(good))
        for name, figure in figures.items():
            plots.save(figure, directory / name)
        for table in tables:
            console.print(table, soft_wrap=isinstance(table, str))
        written += figures
    for reason, count in failed["error"].value_counts().items():
        console.print(f"{count} configurations failed: {reason}", soft_wrap=True)
    console.print(f"written to {directory}: {', '.join(sorted(written))}", soft_wrap=True)
    return frame


class _Rate(ProgressColumn):
    """Configurations per second."""

    def render(self, task: Task) -> Text:
        """Empty until the first is finished."""
        return Text(f"{task.speed:.0f} per s" if task.speed else "")


def _compute(points: Sequence[Point], directory: Path, executor: Executor | None, console: Console) -> pd.DataFrame:
    progress = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Rate(),
        TimeRemainingColumn(), console=console, transient=not console.is_terminal,
    )  # fmt: skip
    with progress:
        task = progress.add_task("simulating", total=len(points))
        file = RowFile(directory / "rows.jsonl")
        return run_points(points, file, executor, lambda finished: progress.update(task, completed=finished))
