"""Runs an experiment file: rows, figures, tables and a manifest in one directory."""

from __future__ import annotations

import importlib.util
import re
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import BrokenExecutor, Executor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

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

from spsim.errors import InputError, printable
from spsim.inputs.profiles import load_profile
from spsim.inputs.resources import read_text
from spsim.studies.cases import cases
from spsim.studies.experiment import Experiment, Selection
from spsim.studies.manifest import Manifest
from spsim.studies.points import Point
from spsim.studies.rowfile import RowFile
from spsim.studies.spool import Spool
from spsim.studies.sweeps import run_points
from spsim.studies.tablefile import TableFormat, write_table

if TYPE_CHECKING:
    import pandas as pd


PACKAGE = Path(__file__).parent.parent
SHOWN = 20
"""Reasons that are printed."""


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
        count = len(experiment.selection(quick=False)) if isinstance(experiment, Experiment) else 0
    if not isinstance(experiment, Experiment):
        raise InputError(f"{path}: must define build() that returns a spsim.Experiment")
    if not count:
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
        theirs = [frame for frame in own if not Path(frame.filename).is_relative_to(PACKAGE)]
        name, line = (theirs[-1].filename, theirs[-1].lineno) if theirs else (where, None)
        if isinstance(error, SyntaxError):
            name, line = error.filename or where, error.lineno
        at = f"line {line}: " if line else ""
        raise InputError(f"{name}: {at}{type(error).__name__}: {error}") from None


def run_experiment(
    experiment: Experiment, directory: Path, executor: Executor | None, *, quick: bool, console: Console,
    page: Path | None = None, rows: TableFormat = "csv",
) -> Spool:  # fmt: skip
    """Compute the rows, then write their table, the manifest, the figures and the page, and print the tables.

    A frame of all rows is made where figures, tables or a page ask for one.
    """
    points = experiment.selection(quick=quick)
    console.print(f"{experiment.title}: {len(points)} configurations", soft_wrap=True)
    manifest = Manifest(experiment, directory)
    file = RowFile(directory / "rows.jsonl")
    try:
        found = _compute(points, manifest, file, executor, console)
    except BrokenExecutor:
        raise InputError(
            "a worker process was ended from outside, as the system does where memory runs out; finished rows are "
            "kept, run again to go on, with fewer --jobs if it was memory"
        ) from None
    whole = directory / f"{experiment.name}.{rows}"
    _write(found, whole, manifest, directory / "manifest.json")
    written = [whole.name, "manifest.json", "rows.jsonl"]
    if found.failed < found.count and (experiment.asks_for_rows or page):
        frame = found.frame()
        good = frame[frame["error"] == ""] if found.failed else frame
        figures, tables = _drawn(experiment, good, directory)
        written += _saved(figures, directory)
        for table in tables:
            console.print(table, soft_wrap=isinstance(table, str))
        if page is not None:
            _write_page(experiment, manifest.resolved(points), good, tables, page)
    _tell(found, file, console)
    console.print(f"written to {printable(str(directory))}: {', '.join(sorted(written))}", soft_wrap=True)
    if found.failed == found.count:
        raise InputError(f"{experiment.name}: all {found.count} configurations failed; correct their settings")
    return found


def _tell(found: Spool, file: RowFile, console: Console) -> None:
    """Say what failed, and what the file has besides."""
    for reason, count in found.failures.most_common(SHOWN):
        console.print(f"{count} configurations failed: {printable(reason)}", soft_wrap=True)
    if len(found.failures) > SHOWN:
        rest = found.failed - sum(count for _, count in found.failures.most_common(SHOWN))
        console.print(f"{rest} configurations failed for other reasons; each row has its own", soft_wrap=True)
    if file.others:
        console.print(f"rows.jsonl keeps {file.others} rows of other configurations", soft_wrap=True)


def _write(rows: Spool, table: Path, manifest: Manifest, path: Path) -> None:
    """Write the table, and after it the manifest, which so vouches for it: where that is the same, and the table was
    not touched since, both stay.
    """
    untouched = table.is_file() and path.is_file() and table.stat().st_mtime_ns <= path.stat().st_mtime_ns
    if not (untouched and manifest.describes(path)):
        write_table(rows, table)
        manifest.write(path)


def _drawn(experiment: Experiment, rows: pd.DataFrame, where: Path) -> tuple[Mapping[str, Any], Sequence[Any]]:
    """Figures by file name, and tables."""
    with _users_code(where):
        figures, tables = experiment.figures(rows), list(experiment.tables(rows))
        _check_figures(figures)
    return figures, tables


def _saved(figures: Mapping[str, Any], directory: Path) -> Iterable[str]:
    """The names of the figures, which are written."""
    if figures:
        from spsim import plots

        for name, figure in figures.items():
            plots.save(figure, directory / name)
    return figures


def _write_page(
    experiment: Experiment, points: Iterable[Point], rows: pd.DataFrame, tables: Sequence[Any], page: Path
) -> None:
    """The page of the rows, with the tables of the experiment."""
    from spsim.report.page import write_sweep

    places = {*rows.index}
    used = [point.settings for place, point in enumerate(points) if place in places]
    named = {own: load_profile(own) if isinstance(own, str | Path) else own for own in {s["hardware"] for s in used}}
    profiles = [named[settings["hardware"]] for settings in used]
    inputs = [f"{id(profile)} {settings['model']!r}" for profile, settings in zip(profiles, used, strict=True)]
    hardware = {profile.name: profile for profile in profiles}
    write_sweep(experiment.title, [*cases(rows.assign(inputs=inputs), hardware)], tables, page)


def _check_figures(figures: Any) -> None:
    """Raise `InputError` unless they are pictures under names of files in the directory of results."""
    if not isinstance(figures, Mapping):
        raise InputError(f"figures: gave {figures!r}; return a dictionary of file names and matplotlib figures")
    for name, figure in figures.items():
        if not isinstance(name, str) or not re.fullmatch(r"[\w][\w .+-]*", name):
            raise InputError(f"figures: {name!r}: is no plain file name; use letters, digits, _ and -")
        if not hasattr(figure, "savefig"):
            raise InputError(f"figures: {name}: {figure!r} is no matplotlib figure; return one")


class _Rate(ProgressColumn):
    """Configurations per second."""

    def render(self, task: Task) -> Text:
        """Empty until the first is finished."""
        return Text(f"{task.speed:.0f} per s" if task.speed else "")


def _compute(
    points: Selection, manifest: Manifest, file: RowFile, executor: Executor | None, console: Console
) -> Spool:
    progress = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Rate(),
        TimeRemainingColumn(), console=console, transient=not console.is_terminal,
    )  # fmt: skip
    with progress:
        task = progress.add_task("simulating", total=len(points))
        found = run_points(
            manifest.keyed(points), Spool(file.path.parent), file, executor,
            lambda finished: progress.update(task, completed=finished),
        )  # fmt: skip
    if found.count != len(points):
        raise InputError(
            f"points: gave {len(points)} configurations at first and {found.count} later; return a new iterator "
            "each time, of the same ones"
        )
    return found
