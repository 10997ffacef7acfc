"""The application: its commands by name, each imported when it is asked for, so that none waits for the others."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

import spsim
from spsim.interrupts import ending_at_once

COMMANDS = {
    "run": "Simulate one scenario.",
    "compare": "Two or more plans side by side: where time and memory differ, and why.",
    "explain": "Which operators does sequence parallelism apply to, and why?",
    "validate": "Predicted against measured, a row a case.",
    "list": "The shipped hardware profiles or models.",
    "calibrate": "Measure this machine, alone or under torchrun, and fit a hardware profile to it.",
    "verify": "Run real PyTorch layers on the GPUs or CPU at hand, and compare them with the simulation.",
}
"""What `spsim --help` says of each module of `spsim.cli.commands`: the first line of the help of its command."""

EXPERIMENT = "experiment"
"""The command behind `spsim FILE.py`."""

_LOOK: dict[str, Any] = {"add_completion": False, "pretty_exceptions_enable": False, "rich_markup_mode": None}


class _Unopened(TyperCommand):
    """The name and line of a command; its module is imported when it is run or asked for its help."""

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        """The context of the command itself, which takes over from here."""
        with ending_at_once(), _without_threads():
            module = import_module(f"spsim.cli.commands.{self.name}")
        alone = typer.Typer(**_LOOK)
        alone.command(self.name)(module.command)
        return typer.main.get_command(alone).make_context(info_name, args, parent, **extra)


@contextmanager
def _without_threads() -> Iterator[None]:
    """numpy, where it is imported here, starts no threads for linear algebra: to start them takes longer than a command
    computes with arrays. What is imported later, or by other processes, starts its own.
    """
    name = "OPENBLAS_NUM_THREADS"
    if name in os.environ:
        yield
        return
    os.environ[name] = "1"
    try:
        yield
    finally:
        del os.environ[name]


def _print_version(asked: bool) -> None:
    if asked:
        print(f"spsim {spsim.__version__}")
        raise typer.Exit


def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Discrete-event simulator of multi-GPU sequence parallelism.

    A Python file instead of a command is run as an experiment: spsim experiments/sweep.py [--out DIR] [--jobs N]
    [--quick].
    """


def build_app() -> TyperGroup:
    """The application with all its commands unopened."""
    root = typer.Typer(**_LOOK)
    root.callback()(_options)
    group = typer.main.get_group(root)
    for name, line in COMMANDS.items():
        group.add_command(_Unopened(name, short_help=line))
    group.add_command(_Unopened(EXPERIMENT, hidden=True))
    return group
