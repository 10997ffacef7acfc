"""The command that says which operators sequence parallelism applies to: explain."""

from __future__ import annotations

from typing import Annotated

import typer

from spsim.cli.options import JsonOption
from spsim.cli.outputs import open_console, print_json
from spsim.report import explanation as report
from spsim.studies.explanation import explain


def command(
    model: Annotated[str, typer.Option("--model", help="Preset or path of a TOML table.")],
    plan: Annotated[str, typer.Option("--plan", help='For instance "tp=8,sequence_parallel".')] = "",
    seq_len: Annotated[int, typer.Option("--seq-len", help="Tokens of a sequence.")] = 2048,
    micro_batch: Annotated[int, typer.Option("--micro-batch", help="Sequences of a micro-batch.")] = 1,
    as_json: JsonOption = False,
) -> None:
    """Which operators does sequence parallelism apply to, and why?"""
    explanation = explain(model, plan, {"seq_len": seq_len, "micro_batch": micro_batch})
    if as_json:
        print_json(explanation.to_json())
        return
    console = open_console()
    console.print(report.explanation_table(explanation))
    for line in report.saving_lines(explanation):
        console.print(line, soft_wrap=True)
