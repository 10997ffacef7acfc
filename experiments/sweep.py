"""What does sequence parallelism buy on one node of eight GPUs, in time and in memory?

TP only, Megatron TP+SP, Ulysses and ring attention, sequence lengths from 2K to 128K, on A100 and H100
nodes, for gpt-22b and llama-3-8b: four layers of each, flash attention, one sequence a step. About 5
seconds on two cores. Expect TP+SP to need the least memory of all and mostly to tie with TP only in time;
Ulysses and ring to have the shortest step once weights are small against activations, at the price of
whole weights on every GPU.

    python -m spsim experiments/sweep.py [--out results] [--jobs N] [--quick]
"""

from collections.abc import Iterator, Mapping
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from rich.table import Table

import spsim
from spsim import plots, report
from spsim.studies.ranking import ranked, tie

LAYERS = 4
MODELS = ("gpt-22b", "llama-3-8b")
HARDWARE = ("dgx-a100-80gb", "dgx-h100")
SEQ_LENS = tuple(1024 * 2**power for power in range(1, 8))
STRATEGIES = {
    "TP only": spsim.Plan(tp=8),
    "TP+SP": spsim.Plan(tp=8, sequence_parallel=True),
    "Ulysses": spsim.Plan(ulysses=8),
    "Ring": spsim.Plan(ring=8),
}
NOTE = f"{LAYERS} layers, 8 GPUs, micro-batch 1, flash attention"
Rows = Mapping[str, Mapping[str, Any]]
"""Strategy -> its row."""

SHOWN = ("gpt-22b", "dgx-a100-80gb")
"""Model and hardware whose timelines and memory curves are drawn."""
TIMELINE_SEQ_LEN = 8192
MEMORY_SEQ_LEN = 65536
"""Where activations outweigh the weights of four layers."""


def model(name: str) -> spsim.Model:
    """A preset cut to four layers, with flash attention."""
    return spsim.load_model(name).model_copy(update={"layers": LAYERS, "attention": "flash"})


def settings(name: str, hardware: str, seq_len: int, plan: spsim.Plan) -> dict[str, object]:
    """The settings of one scenario."""
    return {
        "hardware": hardware,
        "model": model(name),
        "plan": plan,
        "workload": spsim.Workload(seq_len=seq_len),
    }


def points() -> Iterator[spsim.Point]:
    """Every configuration; its labels are columns of its row even when it fails."""
    for name in MODELS:
        for hardware in HARDWARE:
            for seq_len in SEQ_LENS:
                for strategy, plan in STRATEGIES.items():
                    labels = {"model": name, "hardware": hardware, "strategy": strategy, "seq_len": seq_len}
                    yield spsim.Point(settings(name, hardware, seq_len, plan), labels)


def quick_points() -> list[spsim.Point]:
    """Two sequence lengths."""
    return [point for point in points() if point.labels["seq_len"] in (SEQ_LENS[0], SEQ_LENS[3])]


def figures(frame: pd.DataFrame) -> Mapping[str, Figure]:
    """Time per layer, peak memory, and the plans of one configuration beside each other."""
    name, hardware = SHOWN
    where = f"{name} on {hardware}"
    pair = {strategy: simulate(TIMELINE_SEQ_LEN, STRATEGIES[strategy]) for strategy in ("TP only", "TP+SP")}
    curves = {strategy: simulate(MEMORY_SEQ_LEN, plan) for strategy, plan in STRATEGIES.items()}
    return {
        "layer_times.png": plots.plot_layer_times(frame, note=NOTE),
        "peak_memory.png": plots.plot_peak_memory(frame, note=NOTE),
        "timelines_tp_sp.png": plots.plot_timelines(pair, title=f"One layer of {where}, 8 GPUs"),
        "memory_curves.png": plots.plot_memory_curves(curves, title=f"Memory over a step of {where}, 8 GPUs"),
    }


def simulate(seq_len: int, plan: spsim.Plan) -> spsim.Result:
    """One strategy of the configuration that is drawn."""
    return spsim.simulate(spsim.Scenario(**settings(*SHOWN, seq_len, plan)))


def tables(frame: pd.DataFrame) -> Iterator[Table | str]:
    """Which strategy wins where, in time and in memory, in words."""
    made = report.table(
        f"Which strategy wins where? ({NOTE})",
        ["model", "hardware", "tokens", "shortest step", "least memory", "TP+SP against TP only"],
        numbers=["tokens"],
    )
    for (name, hardware, seq_len), group in frame.groupby(["model", "hardware", "seq_len"], sort=False):
        rows = group.set_index("strategy").to_dict("index")
        made.add_row(
            name, hardware, f"{seq_len // 1024}K", fastest(rows, hardware), leanest(rows), against_tp(rows, hardware),
        )  # fmt: skip
    yield made
    yield (
        "Plans are ranked by the step: all layers, then the synchronisation of weight gradients, which Ulysses and "
        "ring need for every weight. A tie: steps differ by less than published ratios of such plans are off "
        "(experiments/bands.py). Memory: of the device, with context and communicator buffers; kept: activations that "
        "one layer keeps for its backward pass."
    )


def fastest(rows: Rows, hardware: str) -> str:
    """The plan that fits with the shortest step, those that tie with it, and its lead over the next; the fastest of all
    if none fits.
    """
    fitting = {name: row for name, row in rows.items() if row["fits"]}
    ranking = ranked(fitting or rows, spsim.load_profile(hardware))
    first = ranking.names[0]
    text = f"{first}: {rows[first]['step_time_ms']:.2f} ms"
    if ranking.tied:
        text += f", a tie with {', '.join(ranking.tied)}"
    if ranking.over:
        text += f"; {ranking.over} +{ranking.lead_percent:.1f} %"
    missing = [name for name in rows if name not in fitting]
    return text + (f" ({', '.join(missing)} out of memory)" if missing else "")


def leanest(rows: Rows) -> str:
    """The plan that needs the least memory."""
    name = min(rows, key=lambda name: rows[name]["device_memory_gib"])
    return f"{name}, {rows[name]['device_memory_gib']:.1f} GiB"


def against_tp(rows: Rows, hardware: str) -> str:
    """Step and kept activations of TP+SP relative to TP only."""
    tp, sp = rows["TP only"], rows["TP+SP"]
    kept = change(sp["activation_mib_per_layer"], tp["activation_mib_per_layer"])
    tied = " (a tie)" if tie(sp, tp, spsim.load_profile(hardware)) else ""
    return f"step {change(sp['step_time_ms'], tp['step_time_ms'])}{tied}, kept {kept}"


def change(mine: float, other: float) -> str:
    """Relative change with its sign."""
    return f"{100 * (mine / other - 1):+.1f} %".replace("-", "−")


def build() -> spsim.Experiment:
    """The experiment; nothing runs before it is asked for."""
    return spsim.Experiment(
        name="sweep",
        title="What sequence parallelism buys on a node of eight GPUs",
        points=tuple(points()),
        quick=tuple(quick_points()),
        figures=figures,
        tables=tables,
    )
