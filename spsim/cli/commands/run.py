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
    NetworkOption,
    NodesOption,
    OutOption,
    PhaseOption,
    PlanOption,
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
    print_emission,
    print_json,
    print_notes,
    print_report,
    print_written,
    staging,
)
from spsim.cli.settings import Given
from spsim.errors import InputError
from spsim.export import chrome_trace, kineto
from spsim.inputs.scenario import Scenario
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
PerturbOption = Annotated[
    Path | None,
    typer.Option("--perturb", metavar="FILE", help="A TOML file of slow ranks, jitter, slow or failing links."),
]
SeedsOption = Annotated[
    int | None, typer.Option("--seeds", help="Steps to draw where --perturb has jitter; p50, p95 and p99 are of them.")
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
    network: NetworkOption = None,
    changes: SetOption = None,
    as_json: JsonOption = False,
    out: OutOption = None,
    page: ReportOption = None,
    ranks: RanksOption = None,
    layers: LayersOption = None,
    trace_format: FormatOption = "perfetto",
    library: EmitOption = None,
    perturb: PerturbOption = None,
    seeds: SeedsOption = None,
) -> None:
    """Simulate one scenario."""
    _check_out(out, ranks, layers, trace_format)
    check_report(page)
    given = Given.of(
        "run", case, plan, changes, launch_file, hardware=hardware, model=model, nodes=nodes, scope=scope,
        seq_len=seq_len, micro_batch=micro_batch, global_batch=global_batch, precision=precision, phase=phase,
        network=network, perturbations=perturb,
    )  # fmt: skip
    print_notes(given)
    scenario = given.scenario()
    if library is not None:
        _emit(scenario, library, more=as_json or out is not None or page is not None)
        return
    if _is_perturbed(scenario, seeds):
        _run_perturbed(scenario, seeds or 1, out, page, as_json=as_json)
        return
    result = simulate(scenario)
    selection, written = _written(result, out, ranks, layers, trace_format)
    if page is not None:
        result.to_html(page)
    if as_json:
        print_json(result.to_json())
    else:
        _print_result(result, out, written, selection)
        print_report(open_console(), page)


def _emit(scenario: Scenario, library: str, *, more: bool) -> None:
    """Print it for a library; `InputError` where more is asked for."""
    if more:
        raise InputError("run: --emit prints a configuration, not a result; leave --json, --out and --report out")
    print_emission(scenario, library)


def _check_out(out: Path | None, ranks: str | None, layers: str | None, trace_format: str) -> None:
    if out is None and (ranks is not None or layers is not None or trace_format != "perfetto"):
        raise InputError("run: --ranks, --layers and --trace-format choose what --out writes; give --out too")


def _is_perturbed(scenario: Scenario, seeds: int | None) -> bool:
    """Whether it is; `InputError` where that does not fit what is asked for."""
    if not scenario.perturbations.perturbations:
        if seeds is not None:
            raise InputError("run: --seeds are of perturbations; give them with --perturb, or in the case file")
        return False
    if seeds is not None and seeds < 1:
        raise InputError(f"run: --seeds {seeds} is no number from 1 on")
    return True


def _run_perturbed(scenario: Scenario, seeds: int, out: Path | None, page: Path | None, *, as_json: bool) -> None:
    """The step with and without perturbations, and who is to blame."""
    from spsim.report import perturbation
    from spsim.studies.perturbation import perturb

    found = perturb(scenario, seeds=seeds)
    document = {**found.before.to_json(), "perturbed": found.to_json()}
    written: list[str] = []
    if out is not None:
        with staging(out) as directory:
            found.plot(directory / "perturbed.png")
            found.frame().to_csv(directory / "seeds.csv", index=False)
            (directory / "result.json").write_text(json.dumps(document, indent=2), encoding="utf-8")
            written = file_names(directory)
    if page is not None:
        found.to_html(page)
    if as_json:
        print_json(document)
        return
    console = open_console()
    for made in (perturbation.summary(found), *perturbation.blame_tables(found)):
        console.print(made)
    for line in perturbation.notes(found):
        console.print(line, soft_wrap=True)
    print_written(console, out, written)
    print_report(console, page)


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


def _written(
    result: Result, out: Path | None, ranks: str | None, layers: str | None, trace_format: str
) -> tuple[Selection | None, list[str]]:
    """What outputs are of, and the names of their files."""
    if out is None:
        return None, []
    selection = _selection(result, ranks, layers)
    return selection, _write_outputs(result, out, selection, trace_format)


def _selection(result: Result, ranks: str | None, layers: str | None) -> Selection:
    """What trace and tables are of."""
    gpus, total = result.scenario.plan.gpus, result.scenario.model.layers
    return result.select(
        ranks=None if ranks is None else numbers("--ranks", ranks, gpus),
        layers=None if layers is None else numbers("--layers", layers, total),
    )


def _write_outputs(result: Result, out: Path, selection: Selection, trace_format: str) -> list[str]:
    """Pictures, traces and tables of one run; the names of the files."""
    with staging(out) as directory:
        result.plot_timeline(directory / "timeline.png")
        result.plot_memory(directory / "memory.png")
        if result.staged:
            result.plot_pipeline(directory / "pipeline.png")
        result.plot_step(directory / "step.png")
        if result.scenario.plan.gpus > 1:
            result.plot_mapping(directory / "mapping.png")
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
