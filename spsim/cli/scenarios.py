"""The commands that simulate: run, compare, explain, validate, list."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from spsim import report
from spsim.cli.app import (
    CaseFile,
    GlobalBatchOption,
    HardwareOption,
    JsonOption,
    MicroBatchOption,
    ModelOption,
    NodesOption,
    OutOption,
    PhaseOption,
    PlanOption,
    PrecisionOption,
    SeqLenOption,
    app,
    file_names,
    open_console,
    print_json,
    print_written,
    staging,
)
from spsim.errors import InputError
from spsim.inputs.scenario import Scenario, load_scenario
from spsim.results.result import Result
from spsim.simulation import simulate
from spsim.studies.comparison import PlanComparison
from spsim.studies.comparison import compare as compare_plans
from spsim.studies.explanation import explain as explain_plan
from spsim.studies.validation import load_cases
from spsim.studies.validation import validate as validate_cases

MAX_RECORDS = 2_000_000
"""Spans of all ranks that are written out: some hundred megabytes."""


@app.command()
def run(
    case: CaseFile = None,
    model: ModelOption = None,
    hardware: HardwareOption = None,
    plan: PlanOption = None,
    seq_len: SeqLenOption = None,
    micro_batch: MicroBatchOption = None,
    global_batch: GlobalBatchOption = None,
    precision: PrecisionOption = None,
    phase: PhaseOption = None,
    nodes: NodesOption = None,
    as_json: JsonOption = False,
    out: OutOption = None,
) -> None:
    """Simulate one scenario."""
    workload = {
        "seq_len": seq_len, "micro_batch": micro_batch, "global_batch": global_batch, "precision": precision,
        "phase": phase,
    }  # fmt: skip
    workload = {key: value for key, value in workload.items() if value is not None}
    result = simulate(_scenario(case, hardware, model, plan, workload, nodes))
    written = [] if out is None else _write_outputs(result, out)
    if as_json:
        print_json(result.to_json())
        return
    console = open_console()
    console.print(report.summary(result))
    console.print(report.operator_table(result))
    for line in report.notes(result):
        console.print(line, soft_wrap=True)
    print_written(console, out, written)


def _scenario(
    case: Path | None,
    hardware: str | None,
    model: str | None,
    plan: str | None,
    workload: dict[str, Any],
    nodes: int | None,
) -> Scenario:
    options = {"--hardware": hardware, "--model": model, "--plan": plan, "--nodes": nodes, **workload}
    given = [name for name, value in options.items() if value is not None]
    if case is not None:
        if case == Path():
            raise InputError("run: the name of the case file is empty; give its path")
        if given:
            raise InputError(f"run: both a case file and {given[0]} are given; use one of them")
        return load_scenario(case)
    if model is None or hardware is None or "seq_len" not in workload:
        missing = "--model" if model is None else "--hardware" if hardware is None else "--seq-len"
        raise InputError(f"run: {missing} is missing; give a case file, or at least --model, --hardware and --seq-len")
    return Scenario(hardware=hardware, model=model, plan=plan or "", workload=workload, nodes=nodes)


def _write_outputs(result: Result, out: Path) -> list[str]:
    """Pictures, trace and tables of one run; the names of the files."""
    records = result.trace.num_spans * result.scenario.plan.gpus // len(result.trace.copies)
    if records > MAX_RECORDS:
        raise InputError(
            f"run: --out would write {records:,} spans; micro-batches are alike, so use a smaller global_batch, "
            "or --json for the figures alone"
        )
    with staging(out) as directory:
        result.plot_timeline(directory / "timeline.png")
        result.plot_memory(directory / "memory.png")
        result.to_chrome_trace(directory / "trace.json")
        (directory / "result.json").write_text(json.dumps(result.to_json(), indent=2), encoding="utf-8")
        for name in ("spans", "memory_curve", "operators"):
            getattr(result, name).to_csv(directory / f"{name}.csv", index=False)
        return file_names(directory)


@app.command()
def compare(
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
    comparison = compare_plans(plan or [], hardware=hardware, model=model, workload=workload)
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


@app.command()
def explain(
    model: Annotated[str, typer.Option("--model", help="Preset or path of a TOML table.")],
    plan: Annotated[str, typer.Option("--plan", help='For instance "tp=8,sequence_parallel".')] = "",
    seq_len: Annotated[int, typer.Option("--seq-len", help="Tokens of a sequence.")] = 2048,
    micro_batch: Annotated[int, typer.Option("--micro-batch", help="Sequences of a micro-batch.")] = 1,
    as_json: JsonOption = False,
) -> None:
    """Which operators does sequence parallelism apply to, and why?"""
    explanation = explain_plan(model, plan, {"seq_len": seq_len, "micro_batch": micro_batch})
    if as_json:
        print_json(explanation.to_json())
        return
    console = open_console()
    console.print(report.explanation_table(explanation))
    for line in report.saving_lines(explanation):
        console.print(line, soft_wrap=True)


@app.command()
def validate(
    measured: Annotated[Path | None, typer.Argument(help="CSV of measured cases; the shipped ones by default.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Predicted against measured, a row a case."""
    validation = validate_cases(load_cases(measured))
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


class Listing(StrEnum):
    """What can be listed."""

    hardware = "hardware"
    models = "models"


@app.command("list")
def list_(what: Annotated[Listing, typer.Argument(help="hardware or models")]) -> None:
    """The shipped hardware profiles or models."""
    open_console().print(report.hardware_table() if what is Listing.hardware else report.model_table())
