"""The command that times one collective by itself: collective."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from spsim.cli.completion import hardware_names
from spsim.cli.options import JsonOption, NodesOption
from spsim.cli.outputs import file_names, open_console, print_json, print_written, staging
from spsim.report import collective as report
from spsim.studies.collectives import AUTO, Group, curves, group, message_bytes, timed


def command(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="all_reduce, all_gather, reduce_scatter, all_to_all or send_receive.")
    ],
    size: Annotated[
        str, typer.Option("--bytes", metavar="SIZE", help="Of the whole array, as 64MiB or 4096; 1GB is 1e9.")
    ],
    hardware: Annotated[
        str, typer.Option("--hardware", help="Profile name or path of a TOML profile.", autocompletion=hardware_names)
    ],
    gpus: Annotated[int, typer.Option("--gpus", help="In the group; up to a node's GPUs stay in one.")],
    algorithm: Annotated[
        str,
        typer.Option(
            "--algorithm", help="auto, or ring, tree, nvls, nvls_tree, hierarchical, pat, pairwise, send_receive."
        ),
    ] = AUTO,
    nodes: NodesOption = None,
    as_json: JsonOption = False,
    out: Annotated[Path | None, typer.Option("--out", help="Directory for the curve and the document.")] = None,
) -> None:
    """The time of one collective by itself, as nccl-tests measure it."""
    found = group(name, hardware, gpus, algorithm=algorithm, nodes=nodes)
    result = timed(found, message_bytes(size))
    written = _write(out, found, result.message_bytes) if out else []
    if as_json:
        print_json(result.to_json())
        return
    console = open_console()
    console.print(report.sentence(result), soft_wrap=True)
    console.print()
    console.print(report.algorithms_table(curves(found, (result.message_bytes,))))
    print_written(console, out, written)


def _write(out: Path, found: Group, message: int) -> list[str]:
    from spsim.plots import save
    from spsim.plots.collective import plot_collective

    made, result = curves(found), timed(found, message)
    document = {**result.to_json(), "curves": {name: [row.to_json() for row in rows] for name, rows in made.items()}}
    with staging(out) as directory:
        save(plot_collective(made, result), directory / "collective.png")
        (directory / "collective.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        return file_names(directory)
