"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from spsim.cli.completion import hardware_names, library_names, model_names, plan_options, settings
from spsim.inputs.workload import tokens


def read_tokens(text: str) -> int:
    """A number of tokens, as 65536 or 64K."""
    try:
        return int(tokens(text))
    except ValueError:
        raise typer.BadParameter(f"{text!r} is no number of tokens; write for instance 65536 or 64K") from None


CaseFile = Annotated[
    Path | None,
    typer.Argument(
        help="A case file (TOML) with hardware, model, plan and workload; options take the place of its own."
    ),
]
ModelOption = Annotated[
    str | None,
    typer.Option("--model", help="Preset, or path of a TOML table or a config.json.", autocompletion=model_names),
]
HardwareOption = Annotated[
    str | None,
    typer.Option("--hardware", help="Profile name or path of a TOML profile.", autocompletion=hardware_names),
]
PlanOption = Annotated[
    list[str] | None,
    typer.Option(
        "--plan", metavar="PLAN", help="For instance tp=8,sequence_parallel or TP8+SP; see spsim list plans.",
        autocompletion=plan_options,
    ),
]  # fmt: skip
LibraryOption = Annotated[
    str | None,
    typer.Option(
        "--library", metavar="NAME", help="Whose implementation the plan is, as torchtitan; see spsim list libraries.",
        autocompletion=library_names,
    ),
]  # fmt: skip
SeqLenOption = Annotated[
    int | None,
    typer.Option(
        "--seq-len", "--seq-length", metavar="TOKENS", parser=read_tokens, help="Tokens of a sequence, as 65536 or 64K."
    ),
]
MicroBatchOption = Annotated[
    int | None, typer.Option("--micro-batch", "--micro-batch-size", help="Sequences of a micro-batch.")
]
GlobalBatchOption = Annotated[
    int | None, typer.Option("--global-batch", "--global-batch-size", help="Sequences of a step.")
]
NodesOption = Annotated[int | None, typer.Option("--nodes", help="Nodes to spread the GPUs over; as few as hold them.")]
ScopeOption = Annotated[
    str | None, typer.Option("--scope", help="step, the whole training step, or layers, those of one stage alone.")
]
NetworkOption = Annotated[
    str | None, typer.Option("--network", help="closed_form, transfers alone on their links, or flows that share.")
]
PrecisionOption = Annotated[
    str | None, typer.Option("--precision", help="fp32, bf16, fp16, fp8, fp8_delayed, mxfp8, fp8_blockwise or nvfp4.")
]
PhaseOption = Annotated[str | None, typer.Option("--phase", help="training, or of inference prefill or decode.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="SETTING=VALUE", help="Change one setting, as model.attention=flash; may be repeated.",
        autocompletion=settings,
    ),
]  # fmt: skip
FromOption = Annotated[
    Path | None,
    typer.Option(
        "--from", metavar="FILE",
        help="A Megatron-LM launch script, a torchtitan TOML or a DeepSpeed JSON instead of a case file.",
    ),
]  # fmt: skip
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]
ReportOption = Annotated[
    Path | None,
    typer.Option(
        "--report", metavar="FILE.html", help="One page for a browser, which needs no network: charts and tables."
    ),
]
OutOption = Annotated[
    Path | None, typer.Option("--out", help="Directory for timeline, memory curve, trace and tables.")
]
Library = Literal["megatron", "torchtitan", "deepspeed", "transformers"]
EmitOption = Annotated[
    Library | None,
    typer.Option("--emit", help="Print the scenario as flags or configuration of a library, and run nothing."),
]
