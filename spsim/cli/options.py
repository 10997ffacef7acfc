"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

CaseFile = Annotated[Path | None, typer.Argument(help="A case file (TOML) with hardware, model, plan and workload.")]
ModelOption = Annotated[str | None, typer.Option("--model", help="Preset or path of a TOML table.")]
HardwareOption = Annotated[str | None, typer.Option("--hardware", help="Profile name or path of a TOML profile.")]
PlanOption = Annotated[str | None, typer.Option("--plan", help='For instance "tp=8,sequence_parallel".')]
SeqLenOption = Annotated[int | None, typer.Option("--seq-len", help="Tokens of a sequence.")]
MicroBatchOption = Annotated[int | None, typer.Option("--micro-batch", help="Sequences of a micro-batch.")]
GlobalBatchOption = Annotated[int | None, typer.Option("--global-batch", help="Sequences of a step.")]
NodesOption = Annotated[int | None, typer.Option("--nodes", help="Nodes to spread the GPUs over; as few as hold them.")]
PrecisionOption = Annotated[str | None, typer.Option("--precision", help="fp32, bf16, fp16 or fp8.")]
PhaseOption = Annotated[str | None, typer.Option("--phase", help="training, prefill or decode.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]
OutOption = Annotated[
    Path | None, typer.Option("--out", help="Directory for timeline, memory curve, trace and tables.")
]
