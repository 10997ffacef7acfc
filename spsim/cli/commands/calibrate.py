"""The command that makes a profile out of measurements: calibrate."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from spsim.cli.leader import leader_speaks
from spsim.cli.outputs import make_directory, open_console, staging
from spsim.errors import InputError
from spsim.inputs.profiles import load_profile, profile_names
from spsim.measuring.calibrate.base import base_of_rows, base_profile, check_ranks_at_hand
from spsim.measuring.calibrate.launch import measure
from spsim.measuring.calibrate.records import RowError, read_measurements
from spsim.measuring.calibrate.session import RAW_FILE, Note, Report, Settings
from spsim.measuring.calibrate.session import Progress as Standing
from spsim.measuring.processes.at_hand import check_installed, is_leader
from spsim.report import calibration as report

if TYPE_CHECKING:
    from spsim.measuring.calibrate.outcome import FittedProfile

FIRST_ROW = 2
"""Line of a raw file where its rows begin; each takes one."""


def command(
    out: Annotated[Path, typer.Option("--out", help="The profile to write, a .toml file.")],
    base: Annotated[
        str | None,
        typer.Option("--base", help="Profile of what is not measured; by default the shipped one of the device."),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Under 2 minutes: fewer shapes and repeats.")] = False,
    full: Annotated[bool, typer.Option("--full", help="Under 20 minutes; the default.")] = False,
    raw: Annotated[
        Path | None, typer.Option("--raw", help="Directory of the raw rows; by default beside the profile.")
    ] = None,
    fit: Annotated[
        Path | None, typer.Option("--fit", help="Measure nothing: fit the raw rows of this directory or CSV.")
    ] = None,
    nccl_tests: Annotated[
        list[Path] | None,
        typer.Option("--nccl-tests", metavar="LOG...", help="Measure nothing: curves from what nccl-tests printed."),
    ] = None,
    further: Annotated[list[Path] | None, typer.Argument(hidden=True, metavar="[LOG]...")] = None,
) -> None:
    """Measure this machine, alone or under torchrun, and fit a hardware profile to it."""
    if quick and full:
        raise InputError("calibrate: --quick and --full are both given; give one of them")
    logs = _logs(nccl_tests, further)
    _check_reading({"--fit": fit is not None, "--nccl-tests": bool(logs)}, measures=quick or full or raw is not None)
    if base is not None:
        load_profile(base)
    if logs:
        check_installed("calibrate", "scipy")
        _check_profile_path(out)
        _read_logs(logs, base, out)
        return
    if fit is not None:
        check_installed("calibrate", "scipy")
        _check_profile_path(out)
        _fit(fit / RAW_FILE if fit.is_dir() else fit, base, out)
        return
    check_installed("calibrate", "torch", "scipy")
    settings = Settings(raw=raw if raw is not None else out.with_suffix(".raw"), base=base, quick=quick)
    with leader_speaks():
        _check_profile_path(out)
        check_ranks_at_hand(base)
        if not is_leader():
            measure(settings, lambda _: None)
            return
        make_directory(out.parent.absolute())
        make_directory(settings.raw, option="--raw")
        with _progress_bar() as show:
            measure(settings, show)
    _fit(settings.file, base, out)


def _logs(first: list[Path] | None, further: list[Path] | None) -> list[Path]:
    """Those of the option, and those that follow it, as a shell writes them for a pattern."""
    if further and not first:
        raise InputError(f"calibrate: {further[0]}: is given to no option; write --nccl-tests before logs")
    return [*(first or ()), *(further or ())]


def _check_reading(given: Mapping[str, bool], *, measures: bool) -> None:
    """`InputError` where options that read what was measured stand beside each other, or beside those that measure."""
    reads = [option for option, there in given.items() if there]
    if reads and measures:
        raise InputError(f"calibrate: {reads[0]} measures nothing; leave out --quick, --full and --raw")
    if len(reads) > 1:
        raise InputError(f"calibrate: {' and '.join(reads)} are both given; give one of them")


def _check_profile_path(out: Path) -> None:
    """Before anything is measured: the profile can be written, and will be found by its name."""
    if out.suffix != ".toml":
        raise InputError(f"--out {str(out)!r}: a profile is a .toml file; give its name this ending")
    if out.is_dir():
        raise InputError(f"{out}: is a directory; give --out the name of a file")
    if out.stem in profile_names():
        raise InputError(
            f"--out {str(out)!r}: --hardware {out.stem} is the shipped profile of this name; choose another file name"
        )
    if out.exists() and not os.access(out, os.W_OK):
        raise InputError(f"{out}: is not writable; give another --out")


@contextmanager
def _progress_bar() -> Iterator[Report]:
    console = open_console()
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[left]}"), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("starting", total=None, left="")

        def show(standing: Standing | Note) -> None:
            if isinstance(standing, Note):
                console.print(standing.text, soft_wrap=True)
                return
            minutes, seconds = divmod(round(standing.remaining), 60)
            progress.update(
                task, completed=standing.done, total=standing.total, description=standing.item,
                left=f"{minutes}:{seconds:02} left",
            )  # fmt: skip

        yield show


def _fit(raw: Path, base: str | None, out: Path) -> None:
    """Fit the rows of a raw file."""
    from spsim.measuring.calibrate.fit import fit_profile

    rows = read_measurements(raw)
    start = base_of_rows(base, rows)
    try:
        fitted = fit_profile(rows, start, out.stem)
    except RowError as error:
        number = FIRST_ROW + len(rows) - 1 - rows[::-1].index(error.row)
        raise InputError(f"{raw}: line {number}: {error}") from None
    except InputError as error:
        raise InputError(f"{raw}: {error}") from None
    _write(fitted, out, f"measured rows in {raw}")


def _read_logs(paths: list[Path], base: str | None, out: Path) -> None:
    """Curves of some logs of nccl-tests, in a profile."""
    from spsim.measuring.calibrate.fit import fit_logs
    from spsim.measuring.calibrate.nccl_tests import read_logs

    logs = read_logs(paths)
    start = base_profile(base, logs.device, gpu=True)
    make_directory(out.parent.absolute())
    fitted = fit_logs(logs, start, out.stem, datetime.now(tz=UTC).date().isoformat())
    _write(fitted, out, f"curves from {', '.join(map(str, paths))}")


def _write(fitted: FittedProfile, out: Path, origin: str) -> None:
    """Write profile and picture, and print the report."""
    from spsim import plots
    from spsim.measuring.calibrate.outcome import LIMIT_PERCENT
    from spsim.measuring.calibrate.profile_file import write_profile

    picture = out.with_suffix(".png")
    with staging(out.parent.absolute()) as directory:
        if fitted.classes:
            figure = plots.plot_calibration(fitted.frame, limit_percent=LIMIT_PERCENT, note=out.stem)
            plots.save(figure, directory / picture.name)
        write_profile(fitted.profile, directory / out.name)
    console = open_console()
    console.print(report.calibration_table(fitted))
    rates = report.rates_table(fitted)
    if rates:
        console.print(rates)
    for line in report.calibration_lines(fitted):
        console.print(line, soft_wrap=True)
    written = f"{out}, {picture}" if fitted.classes else f"{out}, no picture since no kernel was timed"
    console.print(f"written: {written}; {origin}", soft_wrap=True)
