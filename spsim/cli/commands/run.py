"""The command that simulates one scenario: run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from spsim.cli.numbers import numbers
from spsim.cli.options import (
    CaseFile,
    EmitOption,
    FromOption,
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
    ScopeOption,
    SeqLenOption,
    SetOption,
)
from spsim.cli.outputs import (
    file_names,
    open_console,
    print_emission,
    print_json,
    print_notes,
    print_written,
    staging,
)
from spsim.cli.settings import Given
from spsim.errors import InputError
from spsim.export import chrome_trace, kineto
from spsim.report import run as report
from spsim.results import tables
from spsim.results.result import Result
from spsim.results.selection import Selection
from spsim.simulation import simulate

RanksOption = Annotated[
    str | None,
    typer.Option("--ranks", help="Ranks in trace and tables of --out, such as 0,8-15, or all; one of each class."),
]
LayersOption = Annotated[
    str | None,
    typer.Option("--layers", help="Layers in trace and tables of --out, such as 0-3, or all; as many as are quick."),
]
FormatOption = Annotated[
    Literal["perfetto", "kineto"],
    typer.Option("--trace-format", help="One trace for Perfetto, or one a rank as torch.profiler writes them."),
]


def command(
    case: CaseFile = None,
    launch_file: FromOption = None,
    model: ModelOption = None,
    hardware: HardwareOption = None,
    plan: PlanOption = None,
    seq_len: SeqLenOption = None,
    micro_batch: MicroBatchOption = None,
    global_batch: GlobalBatchOption = None,
    precision: PrecisionOption = None,
    phase: PhaseOption = None,
    nodes: NodesOption = None,
    scope: ScopeOption = None,
    changes: SetOption = None,
    as_json: JsonOption = False,
    out: OutOption = None,
    ranks: RanksOption = None,
    layers: LayersOption = None,
    trace_format: FormatOption = "perfetto",
    library: EmitOption = None,
) -> None:
    """Simulate one scenario."""
    if out is None and (ranks is not None or layers is not None or trace_format != "perfetto"):
        raise InputError("run: --ranks, --layers and --trace-format choose what --out writes; give --out too")
    given = Given.of(
        "run", case, plan, changes, launch_file, hardware=hardware, model=model, nodes=nodes, scope=scope,
        seq_len=seq_len, micro_batch=micro_batch, global_batch=global_batch, precision=precision, phase=phase,
    )  # fmt: skip
    print_notes(given)
    if library is not None:
        if as_json or out is not None:
            raise InputError("run: --emit prints a configuration, not a result; leave --json and --out out")
        print_emission(given.scenario(), library)
        return
    result = simulate(given.scenario())
    selection = None if out is None else _selection(result, ranks, layers)
    written = [] if out is None or selection is None else _write_outputs(result, out, selection, trace_format)
    if as_json:
        print_json(result.to_json())
        return
    _print_result(result, out, written, selection)


def _print_result(result: Result, out: Path | None, written: list[str], selection: Selection | None) -> None:
    console = open_console()
    console.print(report.summary(result))
    console.print(report.waterfall_table(result))
    if result.stage_peaks:
        console.print(report.stage_table(result))
    console.print(report.operator_table(result))
    for line in report.notes(result):
        console.print(line, soft_wrap=True)
    print_written(console, out, written)
    if selection is not None:
        console.print(
            f"trace, spans and memory curve: {selection.words}; --ranks and --layers choose others", soft_wrap=True
        )


def _selection(result: Result, ranks: str | None, layers: str | None) -> Selection:
    """What trace and tables are of."""
    gpus, total = result.scenario.plan.gpus, result.scenario.model.layers
    return result.select(
        ranks=None if ranks is None else numbers("--ranks", ranks, gpus),
        layers=None if layers is None else numbers("--layers", layers, total),
    )


def _write_outputs(result: Result, out: Path, selection: Selection, trace_format: str) -> list[str]:
    """Pictures, traces and tables of one run; the names of the files."""
    from spsim import plots

    with staging(out) as directory:
        result.plot_timeline(directory / "timeline.png")
        result.plot_memory(directory / "memory.png")
        if result.staged:
            plots.save(plots.plot_pipeline(result), directory / "pipeline.png")
        plots.save(plots.plot_steps({result.scenario.plan.label: result}), directory / "step.png")
        if trace_format == "kineto":
            (directory / "kineto").mkdir()
            kineto.write_kineto_traces(result, directory / "kineto", selection)
        else:
            chrome_trace.write_chrome_trace(result, directory / "trace.json.gz", selection)
        (directory / "result.json").write_text(json.dumps(result.to_json(), indent=2), encoding="utf-8")
        tables.spans_frame(result.trace, selection).to_csv(directory / "spans.csv", index=False)
        tables.memory_frame(result.trace, result.statics, selection).to_csv(directory / "memory_curve.csv", index=False)
        result.operators.to_csv(directory / "operators.csv", index=False)
        return file_names(directory)
