"""The command that says which operators sequence parallelism applies to: explain."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from spsim.cli.options import (
    CaseFile,
    GlobalBatchOption,
    HardwareOption,
    JsonOption,
    LibraryOption,
    MicroBatchOption,
    ModelOption,
    NodesOption,
    PhaseOption,
    PlanOption,
    PrecisionOption,
    ScopeOption,
    SeqLenOption,
    SetOption,
)
from spsim.cli.outputs import file_names, open_console, print_json, print_written, staging
from spsim.cli.settings import Given
from spsim.inputs.scenario import scenario_from
from spsim.inputs.workload import Workload
from spsim.report import explanation as report
from spsim.studies.explanation import Explanation, explain

SEQ_LEN = 2048
"""Tokens, unless given: the table is the same for all lengths, but for its numbers."""


def command(
    case: CaseFile = None,
    model: ModelOption = None,
    hardware: HardwareOption = None,
    plan: PlanOption = None,
    library: LibraryOption = None,
    seq_len: SeqLenOption = None,
    micro_batch: MicroBatchOption = None,
    global_batch: GlobalBatchOption = None,
    precision: PrecisionOption = None,
    phase: PhaseOption = None,
    nodes: NodesOption = None,
    scope: ScopeOption = None,
    changes: SetOption = None,
    as_json: JsonOption = False,
    out: Annotated[Path | None, typer.Option("--out", help="Directory for explanation.json.")] = None,
) -> None:
    """Which operators does sequence parallelism apply to, and why?"""
    own = [] if library is None else [f"plan.library={library}"]
    given = Given.of(
        "explain", case, plan, [*own, *(changes or [])], hardware=hardware, model=model, nodes=nodes, scope=scope,
        seq_len=seq_len, micro_batch=micro_batch, global_batch=global_batch, precision=precision, phase=phase,
    )  # fmt: skip
    explanation = _explanation(given)
    written = [] if out is None else _write(explanation, out)
    if as_json:
        print_json(explanation.to_json())
        return
    console = open_console()
    console.print(report.explanation_table(explanation))
    for line in (*report.saving_lines(explanation), *(f"note: {note}" for note in explanation.notes)):
        console.print(line, soft_wrap=True)
    print_written(console, out, written)


def _explanation(given: Given) -> Explanation:
    """Of a model under a plan; hardware, where it is given, must hold them."""
    settings = given.settings(required=("model",))
    workload = settings.get("workload", {})
    if isinstance(workload, Mapping):
        workload = {"seq_len": SEQ_LEN, **Workload.own_words(workload)}
    if "hardware" not in settings and "nodes" not in settings:
        return explain(settings["model"], given.plan(), workload)
    settings = given.settings(required=("hardware", "model"))
    scenario = scenario_from({**settings, "plan": given.plan(), "workload": workload}, given.where)
    return explain(scenario.model, scenario.plan, scenario.workload)


def _write(explanation: Explanation, out: Path) -> list[str]:
    with staging(out) as directory:
        text = json.dumps(explanation.to_json(), indent=2)
        (directory / "explanation.json").write_text(text, encoding="utf-8")
        return file_names(directory)
