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
    plans = "plans"
    libraries = "libraries"


def command(what: Annotated[Listing, typer.Argument(help="hardware, models, plans or libraries")]) -> None:
    """The shipped hardware profiles or models, the options of a plan, or the libraries that have their own."""
    tables = {
        Listing.hardware: report.hardware_table, Listing.models: report.model_table, Listing.plans: report.plan_table,
        Listing.libraries: report.library_table,
    }  # fmt: skip
    open_console().print(tables[what]())
