"""The command that names what is shipped: list."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from spsim.cli.outputs import open_console
from spsim.report import listing as report


class Listing(StrEnum):
    """What can be listed."""

    hardware = "hardware"
    models = "models"


def command(what: Annotated[Listing, typer.Argument(help="hardware or models")]) -> None:
    """The shipped hardware profiles or models."""
    open_console().print(report.hardware_table() if what is Listing.hardware else report.model_table())
