"""The command that holds the simulation against real layers: verify."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from spsim.cli.leader import leader_speaks
from spsim.cli.options import JsonOption, MicroBatchOption, ModelOption, SeqLenOption
from spsim.cli.outputs import file_names, open_console, print_json, print_written, staging
from spsim.errors import InputError
from spsim.inputs.hardware import HardwareProfile
from spsim.inputs.presets import load_model
from spsim.inputs.profiles import load_profile
from spsim.inputs.workload import Precision
from spsim.measuring.processes.processes import RankError
from spsim.measuring.verify import (
    Verification,
    VerifyCase,
    build_cases,
    count_ranks,
    open_ranks,
    predict,
)
from spsim.measuring.verify import verify as verify_cases
from spsim.report import verification as report

REPEATS, PROFILED = 10, 5
QUICK_REPEATS, QUICK_PROFILED = 5, 3
PROFILED_PASS = "the profiled pass"
"""The pass whose timeline is drawn."""


def command(
    hardware: Annotated[str, typer.Option("--hardware", help="Profile of this machine: name or path of a TOML file.")],
    plan: Annotated[
        list[str] | None, typer.Option("--plan", help="Once for each plan; by default TP, TP+SP, Ulysses and ring.")
    ] = None,
    model: ModelOption = None,
    seq_len: SeqLenOption = None,
    micro_batch: MicroBatchOption = None,
    precision: Annotated[
        str | None, typer.Option("--precision", help="fp32, bf16 or fp16; by default bf16 on GPUs, fp32 on a CPU.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="One small shape, few repetitions.")] = False,
    time_limit: Annotated[float, typer.Option("--time-limit", min=1, help="Seconds that one case may take.")] = 300,
    as_json: JsonOption = False,
    out: Annotated[Path | None, typer.Option("--out", help="Directory for table, scatter plot and timelines.")] = None,
) -> None:
    """Run real PyTorch layers on the GPUs or CPU at hand, and compare them with the simulation.

    One process a GPU, or two on a CPU, are started; under torchrun its ranks are used.
    """
    with leader_speaks():
        profile = load_profile(hardware)
        ranks, device = count_ranks(profile)
        cases = build_cases(
            ranks, device, _precision(precision, device), plans=plan or (), quick=quick,
            model=None if model is None else load_model(model), seq_len=seq_len, micro_batch=micro_batch,
        )  # fmt: skip
        found = _run(cases, profile, ranks, device, time_limit, quick=quick)
    if found is not None:
        _show(found, out, as_json=as_json)


def _precision(given: str | None, device: str) -> Precision:
    choices: dict[str, Precision] = {"fp32": "fp32", "bf16": "bf16", "fp16": "fp16"}
    if given is None:
        return "bf16" if device == "cuda" else "fp32"
    if given not in choices:
        raise InputError(f"verify: precision {given!r} is not one of {', '.join(choices)}")
    return choices[given]


def _run(
    cases: Sequence[VerifyCase], profile: HardwareProfile, ranks: int, device: str, time_limit: float, *, quick: bool
) -> Verification | None:
    """Everything is simulated first, so that what the profile lacks is said before anything runs."""
    predictions = [predict(case, profile) for case in cases]
    repeats, profiled = (QUICK_REPEATS, QUICK_PROFILED) if quick else (REPEATS, PROFILED)
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty(),
    )  # fmt: skip
    with bar:
        task = bar.add_task("starting", total=len(cases))
        try:
            with open_ranks(ranks, device, time_limit) as pool:
                return verify_cases(
                    predictions, profile, pool, repeats=repeats, profiled=profiled,
                    progress=lambda done, name: bar.update(task, completed=done, description=name),
                )  # fmt: skip
        except RankError as error:
            raise InputError(f"verify: {error}; nothing was measured") from None


def _show(found: Verification, out: Path | None, *, as_json: bool) -> None:
    """Write and print what was measured, and then why it is not all."""
    written = _write(found, out) if out is not None and found.cases else []
    if as_json:
        print_json(found.to_json())
    elif found.cases:
        console = open_console()
        for line in (*report.warnings(found), report.headline(found)):
            console.print(line, soft_wrap=True)
        console.print(report.time_table(found))
        console.print(report.count_table(found))
        for line in report.lines(found):
            console.print(line, soft_wrap=True)
        print_written(console, out, written)
    if found.failure:
        raise InputError(f"verify: {found.failure}; {len(found.cases)} cases were finished")


def _write(found: Verification, out: Path) -> list[str]:
    """Table, scatter plot, the last timeline of each strategy and attention kernel, and the document."""
    from spsim import plots

    with staging(out) as directory:
        frame = found.to_frame()
        frame.to_csv(directory / "verification.csv", index=False)
        (directory / "verification.json").write_text(json.dumps(found.to_json(), indent=2), encoding="utf-8")
        figure = plots.plot_verification(
            frame, title=f"{found.hardware.name}: simulated against measured", subtitle=report.circumstances(found)
        )
        plots.save(figure, directory / "scatter.png")
        last = {(case.case.strategy, case.case.model.attention): case for case in found.cases}
        for case in last.values():
            timelines = plots.plot_timelines(
                {PROFILED_PASS: case.measured, "simulated": case.simulated},
                title=f"{case.case.name}, {found.hardware.name}: simulated against measured",
                note=report.profiled_note(found, case),
            )
            plots.save(timelines, directory / f"timeline-{case.case.slug}.png")
        return file_names(directory)
