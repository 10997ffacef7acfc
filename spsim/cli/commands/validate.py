"""The command that holds predictions against published measurements: validate."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from spsim.cli.options import JsonOption
from spsim.cli.outputs import open_console, print_json
from spsim.report import validation as report
from spsim.studies.measured_cases import load_cases
from spsim.studies.validation import validate


def command(
    measured: Annotated[Path | None, typer.Argument(help="CSV of measured cases; the shipped ones by default.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Predicted against measured, a row a case."""
    validation = validate(load_cases(measured))
    if as_json:
        print_json(validation.to_json())
        return
    console = open_console()
    console.print(report.comparison_table([case for case in validation.cases if case.skipped is None]))
    console.print(report.error_table("Errors of predictions", validation.families))
    if validation.fitted:
        console.print(report.error_table("Errors of rows that a coefficient was fitted on", validation.fitted))
    for line in report.skipped_lines(validation):
        console.print(line, soft_wrap=True)
