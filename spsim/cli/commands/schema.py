"""The command that prints the JSON Schema of a file: schema."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from spsim.cli.outputs import print_json
from spsim.inputs.schema import SCHEMAS


class Kind(StrEnum):
    """Of which files there is a schema."""

    profile = "profile"
    case = "case"
    model = "model"


def command(kind: Annotated[Kind, typer.Argument(help="profile, case or model")]) -> None:
    """JSON Schema of hardware profiles, cases or models, for editors.

    Taplo reads it where the first line of a TOML file is '#:schema ./FILE'.
    """
    print_json(SCHEMAS[kind.value]())
