"""The command that simulates one scenario: run."""

from __future__ import annotations

import json
from pathlib import Path

from spsim.cli.options import (
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
    SetOption,
)
from spsim.cli.outputs import file_names, open_console, print_json, print_written, staging
from spsim.cli.settings import Given
from spsim.errors import InputError
from spsim.report import run as report
from spsim.results.result import Result
from spsim.simulation import simulate

MAX_RECORDS = 2_000_000
"""Spans of all ranks that are written out: some hundred megabytes."""


def command(
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
    changes: SetOption = None,
    as_json: JsonOption = False,
    out: OutOption = None,
) -> None:
    """Simulate one scenario."""
    given = Given.of(
        "run", case, plan, changes, hardware=hardware, model=model, nodes=nodes, seq_len=seq_len,
        micro_batch=micro_batch, global_batch=global_batch, precision=precision, phase=phase,
    )  # fmt: skip
    result = simulate(given.scenario())
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
