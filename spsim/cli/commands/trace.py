"""The command that sums up a measured run: trace."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from spsim.cli.options import JsonOption
from spsim.cli.outputs import file_names, open_console, print_json, print_written, staging
from spsim.engine.trace import Trace
from spsim.errors import printable
from spsim.pytorch.kineto import load_kineto_trace
from spsim.report import trace as report
from spsim.results.measured_summary import TraceSummary, summarise

MAX_DRAWN = 4
"""Ranks of the picture."""


def command(
    files: Annotated[list[Path], typer.Argument(help="Files of torch.profiler (.json or .json.gz), one a rank.")],
    as_json: JsonOption = False,
    out: Annotated[Path | None, typer.Option("--out", help="Directory for timeline and summary.json.")] = None,
) -> None:
    """A run that torch.profiler recorded: its passes, time by class, collectives and exposed communication."""
    trace = load_kineto_trace(files)
    summary = summarise(trace)
    written = [] if out is None else _write(trace, summary, files, out)
    if as_json:
        print_json(summary.to_json())
        return
    console = open_console()
    console.print(report.headline(summary), soft_wrap=True)
    console.print(report.time_table(summary))
    if summary.collectives:
        console.print(report.collective_table(summary))
    for line in report.lines(summary):
        console.print(line, soft_wrap=True)
    print_written(console, out, written)


def _write(trace: Trace, summary: TraceSummary, files: list[Path], out: Path) -> list[str]:
    """The timeline of the first passes, and the document; the names of the files."""
    from spsim import plots

    name = files[0].name if len(files) == 1 else f"{files[0].name} and {len(files) - 1} more"
    figure = plots.plot_timeline(
        trace,
        ranks=sorted(trace.copies)[:MAX_DRAWN],
        phases=list(summary.passes),
        title=f"First passes of {printable(name)}",
    )
    with staging(out) as directory:
        plots.save(figure, directory / "timeline.png")
        (directory / "summary.json").write_text(json.dumps(summary.to_json(), indent=2), encoding="utf-8")
        return file_names(directory)
