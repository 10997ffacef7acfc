"""The command that sets plans side by side: compare."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from spsim.cli.completion import plan_options
from spsim.cli.options import (
    CaseFile,
    FromOption,
    GlobalBatchOption,
    HardwareOption,
    JsonOption,
    MicroBatchOption,
    ModelOption,
    NetworkOption,
    NodesOption,
    PhaseOption,
    PrecisionOption,
    ReportOption,
    ScopeOption,
    SeqLenOption,
    SetOption,
)
from spsim.cli.outputs import (
    check_report,
    file_names,
    open_console,
    print_json,
    print_notes,
    print_report,
    print_written,
    staging,
)
from spsim.cli.settings import Given
from spsim.report import comparison as report
from spsim.studies.comparison import PlanComparison, compare


def command(
    case: CaseFile = None,
    launch_file: FromOption = None,
    model: ModelOption = None,
    hardware: HardwareOption = None,
    plan: Annotated[
        list[str] | None,
        typer.Option(
            "--plan", help="Once for each plan; that of a case file is the first.", autocompletion=plan_options
        ),
    ] = None,
    seq_len: SeqLenOption = None,
    micro_batch: MicroBatchOption = None,
    global_batch: GlobalBatchOption = None,
    precision: PrecisionOption = None,
    phase: PhaseOption = None,
    nodes: NodesOption = None,
    scope: ScopeOption = None,
    network: NetworkOption = None,
    changes: SetOption = None,
    as_json: JsonOption = False,
    out: Annotated[Path | None, typer.Option("--out", help="Directory for pictures and comparison.json.")] = None,
    page: ReportOption = None,
) -> None:
    """Two or more plans side by side: where time and memory differ, and why."""
    check_report(page)
    given = Given.of(
        "compare", case, plan, changes, launch_file, hardware=hardware, model=model, nodes=nodes, scope=scope,
        network=network, seq_len=seq_len, micro_batch=micro_batch, global_batch=global_batch, precision=precision,
        phase=phase,
    )  # fmt: skip
    print_notes(given)
    comparison = compare(given.all_plans(), **given.settings())
    words = report.comparison_lines(comparison)
    written = [] if out is None else _write_comparison(comparison, words, out)
    if page is not None:
        comparison.to_html(page)
    if as_json:
        print_json(_document(comparison, words))
        return
    console = open_console()
    console.print(report.plans_table(comparison))
    for pair in comparison.differences:
        console.print(report.time_table(pair))
        console.print()
        console.print(report.memory_table(pair))
    for line in words:
        console.print(line, soft_wrap=True)
    print_written(console, out, written)
    print_report(console, page)


def _document(comparison: PlanComparison, words: list[str]) -> dict[str, Any]:
    return {**comparison.to_json(), "words": words}


def _write_comparison(comparison: PlanComparison, words: list[str], out: Path) -> list[str]:
    """Pictures and the document of a comparison; the names of the files."""
    with staging(out) as directory:
        comparison.plot_waterfalls(directory / "waterfall.png")
        comparison.plot_steps(directory / "steps.png")
        comparison.plot_timelines(directory / "timelines.png")
        comparison.plot_memory_curves(directory / "memory_curves.png")
        text = json.dumps(_document(comparison, words), indent=2)
        (directory / "comparison.json").write_text(text, encoding="utf-8")
        return file_names(directory)
