"""The command line: `spsim` and `python -m spsim`.

A user's mistake is one line on stderr and exit status 2; nothing is written before the simulation is done.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager
from enum import StrEnum
from multiprocessing import parent_process
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Thread
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console

from spsim import report
from spsim.comparison import PlanComparison, compare_plans
from spsim.errors import InputError
from spsim.explanation import explain as explain_plan
from spsim.model import load_model
from spsim.plan import parse_plan
from spsim.scenario import Scenario, check_shapes, load_scenario
from spsim.simulation import Result, simulate
from spsim.validation import load_cases
from spsim.validation import validate as validate_cases
from spsim.workload import Workload

MIN_WIDTH = 160
"""Columns of a table where output is not a terminal: wide enough for the operator table."""

MAX_RECORDS = 2_000_000
"""Spans of all ranks that are written out: some hundred megabytes."""

INTERRUPTED = 130
"""Exit status of a command that was interrupted from the keyboard."""

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Discrete-event simulator of multi-GPU sequence parallelism. A Python file instead of a command is run as an "
    "experiment: spsim experiments/sweep.py [--out DIR] [--jobs N] [--quick].",
)


def _console() -> Console:
    plain = not sys.stdout.isatty()
    return Console(width=max(MIN_WIDTH, Console().width) if plain else None, highlight=False, markup=False)


def _print_json(document: Any) -> None:
    print(json.dumps(document, indent=2))


CaseFile = Annotated[Path | None, typer.Argument(help="A case file (TOML) with hardware, model, plan and workload.")]
ModelOption = Annotated[str | None, typer.Option("--model", help="Preset or path of a TOML table.")]
HardwareOption = Annotated[str | None, typer.Option("--hardware", help="Profile name or path of a TOML profile.")]
PlanOption = Annotated[str | None, typer.Option("--plan", help='For instance "tp=8,sequence_parallel".')]
SeqLenOption = Annotated[int | None, typer.Option("--seq-len", help="Tokens of a sequence.")]
MicroBatchOption = Annotated[int | None, typer.Option("--micro-batch", help="Sequences of a micro-batch.")]
GlobalBatchOption = Annotated[int | None, typer.Option("--global-batch", help="Sequences of a step.")]
NodesOption = Annotated[int | None, typer.Option("--nodes", help="Nodes to spread the GPUs over; as few as hold them.")]
PrecisionOption = Annotated[str | None, typer.Option("--precision", help="bf16, fp16 or fp8.")]
PhaseOption = Annotated[str | None, typer.Option("--phase", help="training, prefill or decode.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]
OutOption = Annotated[
    Path | None, typer.Option("--out", help="Directory for timeline, memory curve, trace and tables.")
]


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
        _print_json(result.to_json())
        return
    console = _console()
    console.print(report.summary(result))
    console.print(report.operator_table(result))
    for line in report.notes(result):
        console.print(line, soft_wrap=True)
    _print_written(console, out, written)


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
    with _staging(out) as staging:
        result.plot_timeline(staging / "timeline.png")
        result.plot_memory(staging / "memory.png")
        result.to_chrome_trace(staging / "trace.json")
        (staging / "result.json").write_text(json.dumps(result.to_json(), indent=2), encoding="utf-8")
        for name in ("spans", "memory_curve", "operators"):
            getattr(result, name).to_csv(staging / f"{name}.csv", index=False)
        return _names(staging)


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
        _print_json(document)
        return
    console = _console()
    console.print(report.plans_table(comparison))
    for pair in comparison.differences:
        console.print(report.time_table(pair))
        console.print(report.memory_table(pair))
    for line in document["words"]:
        console.print(line, soft_wrap=True)
    _print_written(console, out, written)


def _write_comparison(comparison: PlanComparison, document: dict[str, Any], out: Path) -> list[str]:
    """Pictures and the document of a comparison; the names of the files."""
    from spsim import plots

    with _staging(out) as staging:
        comparison.plot_waterfalls(staging / "waterfall.png")
        plots.save(plots.plot_timelines(comparison.results), staging / "timelines.png")
        plots.save(plots.plot_memory_curves(comparison.results), staging / "memory_curves.png")
        (staging / "comparison.json").write_text(json.dumps(document, indent=2), encoding="utf-8")
        return _names(staging)


@contextmanager
def _staging(out: Path) -> Iterator[Path]:
    """A directory whose files move to `out` at the end: all of them, or none."""
    _make_directory(out)
    with TemporaryDirectory(dir=out, prefix=".partial-") as partial:
        yield Path(partial)
        names = _names(Path(partial))
        for name in names:
            if (out / name).is_dir():
                raise InputError(f"{out / name}: is a directory, expected a file; give another --out")
        for name in names:
            (Path(partial) / name).replace(out / name)


def _names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def _print_written(console: Console, out: Path | None, names: Sequence[str]) -> None:
    if names:
        console.print(f"written to {out}: {', '.join(names)}", soft_wrap=True)


def _make_directory(path: Path) -> None:
    if path == Path():
        raise InputError("--out is empty; give a directory")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path}: cannot be made a directory ({error.strerror}); give another --out") from None
    if not os.access(path, os.W_OK):
        raise InputError(f"{path}: is not writable; give another --out")


@app.command()
def explain(
    model: Annotated[str, typer.Option("--model", help="Preset or path of a TOML table.")],
    plan: Annotated[str, typer.Option("--plan", help='For instance "tp=8,sequence_parallel".')] = "",
    seq_len: Annotated[int, typer.Option("--seq-len", help="Tokens of a sequence.")] = 2048,
    micro_batch: Annotated[int, typer.Option("--micro-batch", help="Sequences of a micro-batch.")] = 1,
    as_json: JsonOption = False,
) -> None:
    """Which operators does sequence parallelism apply to, and why?"""
    parsed, loaded = parse_plan(plan), load_model(model)
    workload = Workload(seq_len=seq_len, micro_batch=micro_batch)
    check_shapes(loaded, parsed, workload)
    explanation = explain_plan(loaded, parsed, workload)
    if as_json:
        _print_json(explanation.to_json())
        return
    console = _console()
    console.print(report.explanation_table(explanation, parsed.label))
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
        _print_json(validation.to_json())
        return
    console = _console()
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
    _console().print(report.hardware_table() if what is Listing.hardware else report.model_table())


@app.command(hidden=True)
def experiment(
    file: Path,
    out: Annotated[Path, typer.Option("--out", help="Directory of results.")] = Path("results"),
    jobs: Annotated[
        int | None, typer.Option("--jobs", min=1, help="Processes; by default all cores for a large sweep.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A small selection of the points.")] = False,
) -> None:
    """Run an experiment file: a Python file that defines build() -> spsim.Experiment."""
    from spsim.experiments import load_experiment, run_experiment

    loaded = load_experiment(file)
    directory = out / loaded.name
    _make_directory(directory)
    with _executor(jobs, len(loaded.selection(quick=quick))) as executor:
        run_experiment(loaded, directory, executor, quick=quick, console=_console())


LARGE_SWEEP = 2000
"""Configurations from which starting processes pays."""


@contextmanager
def _executor(jobs: int | None, points: int) -> Iterator[Executor | None]:
    """Processes for a large sweep, unless told how many; none for one job."""
    if jobs is None:
        jobs = os.cpu_count() or 1 if points >= LARGE_SWEEP else 1
    if jobs == 1:
        yield None
        return
    with ProcessPoolExecutor(jobs, initializer=_end_with_parent) as pool:
        yield pool


def _end_with_parent() -> None:
    """A worker of a killed sweep ends too: it waits on a queue whose other end it holds itself."""
    parent = parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
        os._exit(1)

    Thread(target=watch, daemon=True).start()


_USAGE_ERROR: type[Exception] = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")
"""What the parser raises on a wrong command line, wherever typer keeps it."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point: exit status 0, 2 for a user's mistake, 130 when interrupted."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given:
        given = ["--help"]
    elif given[0].endswith(".py"):
        given.insert(0, "experiment")
    try:
        status = app(args=given, prog_name="spsim", standalone_mode=False)
    except InputError as error:
        _fail(str(error))
    except _USAGE_ERROR as error:
        _fail(f"{getattr(error, 'format_message', error.__str__)().rstrip('.')}; see spsim --help")
    except (KeyboardInterrupt, typer.Abort):
        _interrupted()
    except SystemExit as stop:
        if stop.code == INTERRUPTED:
            _interrupted()
        raise
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        _fail(f"{error.filename or 'output'}: {error.strerror}; check the path, its rights and the space left")
    sys.exit(status if isinstance(status, int) else 0)


def _interrupted() -> NoReturn:
    print("interrupted; finished rows are kept, run again to go on", file=sys.stderr)
    sys.exit(INTERRUPTED)


def _fail(message: str) -> NoReturn:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)
