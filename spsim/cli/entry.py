"""The entry point: from arguments to an exit status.

A user's mistake is one line on stderr and exit status 2; nothing is written before the simulation is done.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import NoReturn

import typer

from spsim.cli.app import EXPERIMENT, build_app
from spsim.cli.terminal import prepare_output
from spsim.errors import InputError, one_line
from spsim.interrupts import INTERRUPTED

_USAGE_ERROR: type[Exception] = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")
"""What the parser raises on a wrong command line, wherever typer keeps it."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point: exit status 0, 2 for a user's mistake, 130 when interrupted."""
    try:
        prepare_output()
        status = build_app().main(
            args=_command_line(sys.argv[1:] if arguments is None else arguments),
            prog_name="spsim",
            standalone_mode=False,
        )
    except InputError as error:
        _fail(str(error))
    except _USAGE_ERROR as error:
        said = getattr(error, "format_message", error.__str__)().rstrip(".")
        _fail(f"{said.replace('Value error, ', '')}; see spsim --help")  # words of pydantic, which typer quotes
    except (KeyboardInterrupt, typer.Abort):
        _interrupted()
    except SystemExit as stop:
        if stop.code == INTERRUPTED:
            _interrupted()
        raise
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        _fail(f"{error.filename or 'output'}: {error.strerror}; check the path, its rights and the space left")
    if status == INTERRUPTED:  # how newer versions of typer report a keyboard interrupt
        _interrupted()
    sys.exit(status if isinstance(status, int) else 0)


def _command_line(arguments: Sequence[str]) -> list[str]:
    """Help where nothing is given; a Python file is an experiment."""
    if not arguments:
        return ["--help"]
    return [EXPERIMENT, *arguments] if arguments[0].endswith(".py") else list(arguments)


def _interrupted() -> NoReturn:
    print("interrupted; finished rows are kept, run again to go on", file=sys.stderr)
    sys.exit(INTERRUPTED)


def _fail(message: str) -> NoReturn:
    print(f"error: {one_line(message)}", file=sys.stderr)
    sys.exit(2)
