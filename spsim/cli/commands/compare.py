"""The command that sets plans side by side: compare."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from spsim.cli.options import GlobalBatchOption, JsonOption, MicroBatchOption, PrecisionOption
from spsim.cli.outputs import file_names, open_console, print_json, print_written, staging
from spsim.report import comparison as report
from spsim.studies.comparison import PlanComparison, compare


def command(
    model: Annotated[str, typer.Option("--model", help="Preset or path of a TOML table.")],
    hardware: Annotated[str, typer.Option("--hardware", help="Profile name or path of a TOML profile.")],
    seq_len: Annotated[int, typer.Option("--seq-len", help="Tokens of a sequence.")],
    plan: Annotated[list[str] | None, typer.Option("--plan", help="Once for each plan, at least twice.")] = None,
    micro_batch: MicroBatchOption = None,
    global_batch: GlobalBatchOption = None,
    precision: PrecisionOption = None,
    as_json: JsonOption = False,
    out: Annotated[Path | None, typer.Option("--out", help="Directory for pictures and comparison.json.")] = None,
) -> None:
    """Two or more plans side by side: where time and memory differ, and why."""
    workload = {
        "seq_len": seq_len, "micro_batch": micro_batch, "global_batch": global_batch, "precision": precision
    }  # fmt: skip
    workload = {key: value for key, value in workload.items() if value is not None}
    comparison = compare(plan or [], hardware=hardware, model=model, workload=workload)
    document = {**comparison.to_json(), "words": report.comparison_lines(comparison)}
    written = [] if out is None else _write_comparison(comparison, document, out)
    if as_json:
        print_json(document)
        return
    console = open_console()
    console.print(report.plans_table(comparison))
    for pair in comparison.differences:
        console.print(report.time_table(pair))
        console.print(report.memory_table(pair))
    for line in document["words"]:
        console.print(line, soft_wrap=True)
    print_written(console, out, written)


def _write_comparison(comparison: PlanComparison, document: dict[str, Any], out: Path) -> list[str]:
    """Pictures and the document of a comparison; the names of the files."""
    from spsim import plots

    with staging(out) as directory:
        comparison.plot_waterfalls(directory / "waterfall.png")
        plots.save(plots.plot_timelines(comparison.results), directory / "timelines.png")
        plots.save(plots.plot_memory_curves(comparison.results), directory / "memory_curves.png")
        (directory / "comparison.json").write_text(json.dumps(document, indent=2), encoding="utf-8")
        return file_names(directory)
