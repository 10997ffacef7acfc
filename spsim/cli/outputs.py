"""What all commands write with: the console, JSON, and the directory of outputs."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Any, cast

from rich.console import Console

from spsim.cli.settings import Given
from spsim.errors import InputError, printable
from spsim.inputs.scenario import Scenario

MIN_WIDTH = 160
"""Columns of a table where output is not a terminal: wide enough for the operator table."""

_PLAIN: dict[str, Any] = {"highlight": False, "markup": False, "emoji": False}
"""Names stand as they are given."""


def open_console() -> Console:
    """A console that wraps nothing where output is not a terminal."""
    if sys.stdout.isatty():
        return Console(**_PLAIN)
    width = max(MIN_WIDTH, Console().width)
    return Console(file=cast("IO[str]", _Unpadded()), width=width, **_PLAIN)


class _Unpadded:
    """Standard output without the blanks with which tables fill their lines."""

    def write(self, text: str) -> int:
        """Pass on the text; the console writes whole lines."""
        return sys.stdout.write(re.sub(r" +$", "", text, flags=re.MULTILINE))

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stdout, name)


def print_json(document: Any) -> None:
    """One JSON document on stdout."""
    print(json.dumps(document, indent=2))


def print_notes(given: Given) -> None:
    """What of a launch file is not simulated, a line each, on stderr."""
    for line in given.launch.lines if given.launch is not None else ():
        print(f"note: {printable(line)}", file=sys.stderr)


def print_emission(scenario: Scenario, library: str) -> None:
    """A scenario as a library takes it: the text on stdout, what it does not say on stderr."""
    from spsim.inputs.launch.emission import emit

    emission = emit(scenario, library)
    print(emission.text, end="")
    for line in emission.unsaid:
        print(f"note: {line}", file=sys.stderr)


@contextmanager
def staging(out: Path) -> Iterator[Path]:
    """A directory whose files move to `out` at the end: all of them, or none. Folders in it move too, and of the traces
    that an earlier run left in them none stay.
    """
    make_directory(out)
    with TemporaryDirectory(dir=out, prefix=".partial-") as partial:
        try:
            yield Path(partial)
        except InputError as error:  # the user knows the file by the place where it was to stand
            raise InputError(str(error).replace(partial, str(out))) from None
        names = file_names(Path(partial))
        for name in names:
            if (out / name).is_dir():
                raise InputError(f"{out / name}: is a directory, expected a file; give another --out")
        for name in names:
            make_directory((out / name).parent)
            (Path(partial) / name).replace(out / name)
        for folder in {(out / name).parent for name in names} - {out}:
            for file in folder.glob("*.json.gz"):
                if file.relative_to(out).as_posix() not in names:
                    file.unlink()


def file_names(directory: Path) -> list[str]:
    """Names of the files in a directory and its folders, sorted."""
    return sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())


def print_written(console: Console, out: Path | None, names: Sequence[str]) -> None:
    """Say which files were written."""
    if names:
        console.print(f"written to {out}: {', '.join(names)}", soft_wrap=True)


def check_report(path: Path | None) -> None:
    """`InputError`, before anything is computed, for a report that is no page or has nowhere to stand."""
    if path is None:
        return
    if path.suffix.lower() not in (".html", ".htm"):
        raise InputError(f"--report {str(path)!r}: a report is a page; end its name in .html")
    if not path.parent.is_dir():
        raise InputError(f"--report {str(path)!r}: {str(path.parent)!r} is no directory; make it, or give another file")


def print_report(console: Console, path: Path | None) -> None:
    """Say where the page is, if one was asked for."""
    if path is not None:
        console.print(f"report: {printable(str(path))}", soft_wrap=True)


def make_directory(path: Path, option: str = "--out") -> None:
    """Make the directory of an option, that can be written; `InputError` where that fails."""
    if path == Path():
        raise InputError(f"{option} is empty; give a directory")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path}: cannot be made a directory ({error.strerror}); give another {option}") from None
    if not os.access(path, os.W_OK):
        raise InputError(f"{path}: is not writable; give another {option}")
