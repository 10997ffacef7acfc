"""The command that holds a user's own microbenchmarks against a profile: kernels."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from spsim.cli.options import JsonOption
from spsim.cli.outputs import file_names, open_console, print_json, print_written, staging
from spsim.inputs.profiles import load_profile
from spsim.inputs.workload import Precision
from spsim.report import kernels as report
from spsim.studies.microbenchmarks import MeasuredKernel, measured_kernels, summary


def command(
    measured: Annotated[Path, typer.Argument(help="CSV of measured products or attention.")],
    hardware: Annotated[str, typer.Option("--hardware", help="Profile name or path of a TOML profile.")],
    precision: Annotated[
        Precision,
        typer.Option("--precision", help="fp32, bf16, fp16, fp8, fp8_delayed, mxfp8, fp8_blockwise or nvfp4."),
    ] = "bf16",
    sustained: Annotated[bool, typer.Option("--sustained", help="Predict long runs at the power limit.")] = False,
    as_json: JsonOption = False,
    out: Annotated[Path | None, typer.Option("--out", help="Directory for a picture and the document.")] = None,
) -> None:
    """Your own microbenchmarks of products or attention against a hardware profile."""
    profile = load_profile(hardware)
    rows = measured_kernels(measured, profile, precision, burst=not sustained)
    document: dict[str, object] = {
        "hardware": profile.name,
        "precision": precision,
        "rates": "sustained" if sustained else "burst",
        "rows": [row.to_json() for row in rows],
        "summary": {name: asdict(errors) for name, errors in summary(rows).items()},
    }
    written = _write(out, rows, document, f"{measured.name} on {profile.name}, {precision}") if out else []
    if as_json:
        print_json(document)
        return
    console = open_console()
    console.print(report.worst_table(rows))
    console.print(report.summary_table(summary(rows, "group")))
    for line in report.skipped_lines(rows):
        console.print(line, soft_wrap=True)
    print_written(console, out, written)


def _write(out: Path, rows: list[MeasuredKernel], document: dict[str, object], title: str) -> list[str]:
    from spsim.plots import save
    from spsim.plots.kernels import plot_kernels

    with staging(out) as directory:
        save(plot_kernels(rows, title=title, subtitle=report.headline(rows)), directory / "kernels.png")
        (directory / "kernels.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        return file_names(directory)
