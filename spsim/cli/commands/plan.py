"""The command that searches for a plan: plan."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from spsim.cli.completion import plan_options
from spsim.cli.options import (
    GlobalBatchOption,
    HardwareOption,
    JsonOption,
    Library,
    MicroBatchOption,
    ModelOption,
    PhaseOption,
    PlanOption,
    PrecisionOption,
    ReportOption,
    SeqLenOption,
    SetOption,
)
from spsim.cli.outputs import (
    check_report,
    file_names,
    open_console,
    print_emission,
    print_json,
    print_report,
    print_written,
    staging,
)
from spsim.cli.settings import REQUIRED, Given
from spsim.cli.workers import ExecutorOption, SchedulerOption, check_workers, workers
from spsim.errors import InputError
from spsim.inputs.configuration import read_value
from spsim.report import plan as report
from spsim.studies.search.outcome import PlanSearch
from spsim.studies.search.search import BEST, plan_search
from spsim.studies.tablefile import write_csv

SHORTEST = 4096
"""Tokens from which on the longest sequence is looked for, unless given."""
_COUNTS = {"K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


def read_count(text: str) -> int:
    """Tokens of a training, as 15T or 3e11."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?(?:[eE]\d{1,2})?)([KMBT]?)", text)
    count = round(float(found[1]) * _COUNTS.get(found[2], 1)) if found else 0
    if not 1 <= count <= 10**18:
        raise typer.BadParameter(f"{text!r} is no number of tokens; write for instance 15T or 3e11")
    return count


GpusOption = Annotated[int | None, typer.Option("--gpus", min=1, max=2**20, help="GPUs of the plan.")]
ValuesOption = Annotated[
    list[str] | None,
    typer.Option(
        "--values", metavar="OPTION=A,B,…", autocompletion=plan_options,
        help="Search an option of plans, or micro_batch, among these values; once for each.",
    ),
]  # fmt: skip
MaxOption = Annotated[
    Literal["seq_len"] | None, typer.Option("--max", help="seq_len: the longest sequence that fits, and its plans.")
]
BudgetOption = Annotated[
    int | None,
    typer.Option("--budget", metavar="TOKENS", parser=read_count, help="GPU-hours for so many tokens, as 15T."),
]
BestOption = Annotated[int, typer.Option("--best", min=1, max=1000, help="Plans that are shown.")]
JobsOption = Annotated[int | None, typer.Option("--jobs", min=1, help="Processes; all cores by default.")]
FilesOption = Annotated[Path | None, typer.Option("--out", help="Directory for plans.csv, front.png and search.json.")]

EmitFirstOption = Annotated[
    Library | None,
    typer.Option("--emit", help="Print the first plan as flags or configuration of a library, and nothing else."),
]


def command(
    model: ModelOption = None,
    hardware: HardwareOption = None,
    gpus: GpusOption = None,
    plan: PlanOption = None,
    values: ValuesOption = None,
    seq_len: SeqLenOption = None,
    micro_batch: MicroBatchOption = None,
    global_batch: GlobalBatchOption = None,
    precision: PrecisionOption = None,
    phase: PhaseOption = None,
    changes: SetOption = None,
    longest: MaxOption = None,
    tokens: BudgetOption = None,
    best: BestOption = BEST,
    jobs: JobsOption = None,
    executor: ExecutorOption = "processes",
    scheduler: SchedulerOption = None,
    library: EmitFirstOption = None,
    as_json: JsonOption = False,
    out: FilesOption = None,
    page: ReportOption = None,
) -> None:
    """The plans with the shortest step that fit, of all there are for a model on some GPUs.

    What --plan says is fixed. tp and ulysses stay within a node unless --plan or --values name one of them.
    """
    check_report(page)
    check_workers(executor, scheduler, jobs)
    if library is not None and (as_json or out is not None or page is not None):
        raise InputError("plan: --emit prints a configuration alone; leave --json, --out and --report out")
    if seq_len is None and longest is not None:
        seq_len = SHORTEST
    given = Given.of(
        "plan", None, plan, changes, hardware=hardware, model=model,
        seq_len=seq_len, micro_batch=micro_batch, global_batch=global_batch, precision=precision,
        phase=phase,
    )  # fmt: skip
    if gpus is None:
        raise InputError("plan: --gpus is missing; give the number of GPUs")
    with workers(jobs or os.cpu_count() or 1, scheduler) as pool:
        search = plan_search(
            **_searched(given), gpus=gpus, plan=given.plan(), values=dict(map(_values, values or ())),
            longest=longest is not None, best=best, tokens=tokens, executor=pool,
        )  # fmt: skip
    if library is not None:
        print_emission(search.best[0].scenario, library)
        return
    _show(search, out, page, as_json=as_json)


def _searched(given: Given) -> dict[str, Any]:
    """Hardware, model and workload; `InputError` where something else is set."""
    settings = given.settings()
    for name in settings.keys() - REQUIRED.keys():
        raise InputError(f"plan: --set {name}: a search is of whole steps of plans as they are; leave it out")
    return settings


def _values(text: str) -> tuple[str, Sequence[Any]]:
    name, equals, listed = (part.strip() for part in text.partition("="))
    found = [read_value(value) for value in filter(None, (part.strip() for part in listed.split(",")))]
    if not name or not equals or not found:
        raise InputError(f"--values {text!r} is not option=value,value; write for instance --values tp=2,4,8")
    return name, found


def _show(search: PlanSearch, out: Path | None, page: Path | None, *, as_json: bool) -> None:
    written = [] if out is None else _write(search, out)
    if page is not None:
        search.to_html(page)
    if as_json:
        print_json(search.to_json())
        return
    console = open_console()
    console.print(report.best_table(search))
    for line in report.lines(search):
        console.print(line, soft_wrap=True)
    print_written(console, out, written)
    print_report(console, page)


def _write(search: PlanSearch, out: Path) -> list[str]:
    """All plans, the picture and the document; the names of the files."""
    with staging(out) as directory:
        write_csv(search.frame(), directory / "plans.csv")
        search.plot_front(directory / "front.png")
        (directory / "search.json").write_text(json.dumps(search.to_json(), indent=2), encoding="utf-8")
        return file_names(directory)
