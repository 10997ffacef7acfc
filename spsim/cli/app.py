"""The application: its commands by name, each imported when it is asked for, so that none waits for the others."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Annotated, Any, cast

import typer
from typer.core import TyperCommand, TyperGroup

import spsim
from spsim.cli.loading import loading

COMMANDS = {
    "run": "Simulate one scenario.",
    "compare": "Two or more plans side by side: where time and memory differ, and why.",
    "plan": "The plans with the shortest step that fit, of all there are for a model on some GPUs.",
    "explain": "Which operators does sequence parallelism apply to, and why?",
    "validate": "Predicted against measured, a row a case.",
    "collective": "The time of one collective by itself, as nccl-tests measure it.",
    "kernels": "Your own microbenchmarks of products or attention against a hardware profile.",
    "trace": "A run that torch.profiler recorded: its passes, time by class, collectives and exposed communication.",
    "list": "The shipped hardware profiles or models, the options of a plan, or the libraries that have their own.",
    "schema": "JSON Schema of hardware profiles, cases or models, for editors.",
    "calibrate": "Measure this machine, alone or under torchrun, and fit a hardware profile to it.",
    "verify": "Run real PyTorch layers on the GPUs or CPU at hand, and compare them with the simulation.",
}
"""What `spsim --help` says of each module of `spsim.cli.commands`: the first line of the help of its command."""

EXPERIMENT = "experiment"
"""The command behind `spsim FILE.py`."""

_LOOK: dict[str, Any] = {
    "pretty_exceptions_enable": False, "rich_markup_mode": None,
    "context_settings": {"help_option_names": ["-h", "--help"]},
}  # fmt: skip


class _Unopened(TyperCommand):
    """The name and line of a command; its module is imported when it is run or asked for its help."""

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        """The context of the command itself, which takes over from here."""
        alone = typer.Typer(**_LOOK, add_completion=False)
        alone.command(self.name, context_settings=_LOOK["context_settings"])(
            _loaded(f"spsim.cli.commands.{self.name}").command
        )
        return typer.main.get_command(alone).make_context(info_name, args, parent, **extra)


@cache
def _loaded(module: str) -> Any:
    with loading():
        return import_module(module)


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
    group = cast("TyperGroup", typer.main.get_command(root))  # with the options that install shell completion
    for name, line in COMMANDS.items():
        group.add_command(_Unopened(name, short_help=line))
    group.add_command(_Unopened(EXPERIMENT, hidden=True))
    return group
