"""What does a whole step cost at the size of real clusters? CPU time and memory against GPUs, layers, micro-batches and
sequence.

    python benchmarks/scale.py [--out DIR]

Each point is a process of its own that simulates one step with all figures of a row: imports apart, with everything new
to it, and once more with another sequence. Memory is the most that the process held. The figure is drawn to
`scale.png`, the table printed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from spsim.report.table import table

ONE = """
import json, resource, sys
from time import process_time
import spsim
from spsim.studies.points import Point
from spsim.studies.rows import row
settings = json.loads(sys.argv[1])
changes = settings.pop("changes")
model = spsim.load_model(settings["model"]).model_copy(update=changes)
small = {"hardware": "dgx-h100", "model": "llama-3-8b", "plan": "tp=2,pp=2", "workload": {"seq_len": 2048}}
row(Point(small))
times = []
for factor in (1, 2):
    sizes = settings["workload"]
    workload = {**sizes, "seq_len": factor * sizes["seq_len"]}
    start = process_time()
    found = row(Point({**settings, "model": model, "workload": workload}))
    times.append(process_time() - start)
    assert not found["error"], found["error"]
memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(json.dumps({"new": times[0], "again": times[1], "memory": memory, "step_s": found["step_time_ms"] / 1e3}))
"""
"""A step as a process simulates it."""
PLAN = "tp=8,sequence_parallel,ring=2,pp=16,virtual_pp=7,distributed_optimizer,recompute=selective"
"""Of llama-3-405b: 256 GPUs a replica."""


class Case(NamedTuple):
    """One point of a curve."""

    axis: str
    number: int
    settings: dict[str, Any]


def step(*, dp: int = 4, micro_batches: int = 64, seq_len: int = 8192, layers: int = 126) -> dict[str, Any]:
    """llama-3-405b on so many replicas."""
    return {
        "hardware": "dgx-h100", "model": "llama-3-405b", "plan": f"{PLAN},dp={dp}", "changes": {"layers": layers},
        "workload": {"seq_len": seq_len, "global_batch": dp * micro_batches},
    }  # fmt: skip


def cases() -> list[Case]:
    """The curves, each from the same step."""
    return [
        *(Case("GPUs", 256 * dp, step(dp=dp)) for dp in (1, 4, 16, 64, 512)),
        *(Case("layers", layers, step(layers=layers)) for layers in (110, 126, 254, 510, 1022)),
        *(Case("micro-batches", number, step(micro_batches=number)) for number in (16, 64, 256, 1024, 4096)),
        *(Case("sequence", length, step(seq_len=length)) for length in (8192, 32768, 131072, 524288)),
    ]


def measured(settings: dict[str, Any]) -> dict[str, float]:
    """Seconds of CPU time of a step that is new and of the next one, and MiB, the better of two processes."""
    runs = [
        json.loads(subprocess.run([sys.executable, "-c", ONE, json.dumps(settings)], env=os.environ, check=True,
                                  capture_output=True, text=True).stdout)
        for _ in range(2)
    ]  # fmt: skip
    return {name: min(run[name] for run in runs) for name in runs[0]}


def draw(found: Sequence[tuple[Case, dict[str, float]]], path: Path) -> None:
    """A panel for each axis."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    axes = list(dict.fromkeys(case.axis for case, _ in found))
    figure, panels = plt.subplots(1, len(axes), figsize=(4 * len(axes), 3.4), sharey=True, layout="constrained")
    for axis, panel in zip(axes, panels, strict=True):
        own = [(case.number, result) for case, result in found if case.axis == axis]
        for name, label in (("new", "new to the process"), ("again", "another sequence")):
            panel.plot([n for n, _ in own], [1e3 * result[name] for _, result in own], marker="o", label=label)
        panel.set(xscale="log", yscale="log", xlabel=axis)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("CPU time of a step, ms")
    panels[0].legend()
    figure.suptitle("Whole steps of llama-3-405b (tp 8, ring 2, pp 16 × 7 chunks), all figures of a row")
    figure.savefig(path, dpi=150)


def main() -> None:
    """Print the table and draw the figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out"), help="where the figure goes")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    columns = ["axis", "number", "new", "again", "peak memory", "step"]
    made = table("Cost of a whole step", columns, numbers=columns[1:])
    found = [(case, measured(case.settings)) for case in cases()]
    for case, result in found:
        made.add_row(
            case.axis, f"{case.number:,}", f"{1e3 * result['new']:.0f} ms", f"{1e3 * result['again']:.0f} ms",
            f"{result['memory']:.0f} MiB", f"{result['step_s']:.2f} s",
        )  # fmt: skip
    Console(width=120).print(made)
    draw(found, out / "scale.png")
    print(f"figure: {out / 'scale.png'}")


if __name__ == "__main__":
    main()
