"""What does one slow GPU cost, and one slow network adapter, under each strategy and at each size?

Llama 3 8B at 32K tokens on H100 nodes: GPUs share a sequence by tensor parallelism, with sequence parallelism, by
Ulysses or by a ring, on one node or on two, and replicas of them fill 8 to 1,024 GPUs. Of all these one GPU takes 1.2
times as long for every kernel, or one adapter moves half as many bytes a second; everybody waits for it somewhere. The
steps are simulated whole, those that are alike once, so that 1,024 GPUs take no longer than 16. Some seconds.

Expect a slow GPU to cost up to its 20 %, less where more of the step is communication, and the same at all sizes. A
slow adapter costs a few percent where only gradients leave the node, and more than half of the step where every layer
waits for it: a group over two nodes makes the adapter a part of its critical path, also that of a ring, of which two
GPUs of sixteen send over the network at all.

    python -m spsim experiments/stragglers.py [--out results] [--quick]
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.table import Table

import spsim
from spsim import report
from spsim.plots.colours import GRID, MUTED
from spsim.plots.figure import TEXT_SIZE, WIDTH, Picture, add_legend, add_title, axes_at

STRATEGIES: Mapping[str, Mapping[str, Any]] = {
    "TP": {"tp": 8},
    "TP+SP": {"tp": 8, "sequence_parallel": True},
    "Ulysses": {"ulysses": 8},
    "ring": {"ring": 8},
    "TP+SP, 2 nodes": {"tp": 16, "sequence_parallel": True},
    "ring, 2 nodes": {"ring": 16},
}
COLOURS = {"TP": "#4477aa", "TP+SP": "#66ccee", "Ulysses": "#228833", "ring": "#ee6677"}
FACTOR, LINK_FACTOR = 1.2, 2.0
PERTURBATIONS: Mapping[str, list[Mapping[str, Any]]] = {
    "none": [],
    "slow GPU": [{"ranks": [7], "factor": FACTOR}],
    "slow adapter": [{"link": {"node": 0, "adapter": 7}, "factor": LINK_FACTOR}],
}
"""The last GPU of a node, which sends to the next one where a ring goes on there."""
GPUS = tuple(2**power for power in range(3, 11))
MICRO_BATCHES = 4


def points(sizes: Sequence[int]) -> Iterator[spsim.Point]:
    """Every strategy at some sizes, unperturbed and under each perturbation."""
    for gpus in sizes:
        for strategy, degrees in STRATEGIES.items():
            replicas = gpus // max(degrees.values())
            if not replicas:
                continue
            plan = {**degrees, "dp": replicas, "distributed_optimizer": True, "recompute": "full"}
            for name, own in PERTURBATIONS.items():
                settings = {
                    "hardware": "dgx-h100",
                    "model": "llama-3-8b",
                    "plan": plan,
                    "workload": {"seq_len": 32768, "global_batch": MICRO_BATCHES * replicas},
                    **({"perturbations": own} if own else {}),
                }
                yield spsim.Point(settings, {"strategy": strategy, "perturbation": name})


def lost(frame: pd.DataFrame) -> pd.DataFrame:
    """Percent of the unperturbed step that each perturbation costs, by strategy and GPUs."""
    steps = frame.pivot_table(index=["strategy", "gpus"], columns="perturbation", values="step_time_ms")
    return (100 * steps.div(steps["none"], axis=0) - 100).drop(columns="none")


def figures(frame: pd.DataFrame) -> Mapping[str, Figure]:
    """A panel for each perturbation, a line for each strategy."""
    costs = lost(frame)
    figure = Picture(figsize=(WIDTH, 5.0))
    titles = {
        "slow GPU": f"one GPU takes {FACTOR:g} times as long",
        "slow adapter": f"one adapter at 1/{LINK_FACTOR:g} of its rate",
    }
    left, gap, bottom, height = 0.8, 0.8, 1.05, 2.75
    width = (WIDTH - left - 0.3 - gap) / 2
    panels = [axes_at(figure, left + place * (width + gap), bottom, width, height) for place in range(2)]
    for axes, (name, title) in zip(panels, titles.items(), strict=True):
        draw(axes, costs[name], title)
    panels[0].axhline(100 * FACTOR - 100, color=MUTED, linewidth=0.8, linestyle=":")
    panels[0].set_ylim(0, 110 * FACTOR - 110)
    panels[0].set_ylabel("longer step (%)", size=TEXT_SIZE)
    panels[1].set_yscale("log")
    panels[1].set_ylim(1, 100)
    panels[1].set_yticks([1, 2, 5, 10, 20, 50, 100], labels=["1", "2", "5", "10", "20", "50", "100"])
    panels[1].minorticks_off()
    panels[1].set_xlim(panels[0].get_xlim())
    add_legend(figure, panels[0].lines[: len(STRATEGIES)])
    add_title(figure, "What one straggler costs", "llama-3-8b on dgx-h100 · 32K tokens · 8 or 16 GPUs a replica")
    return {"stragglers.png": figure}


def draw(axes: Axes, costs: "pd.Series[float]", title: str) -> None:
    """Percent over GPUs."""
    for strategy in STRATEGIES:
        own = costs[strategy]
        own = own[own > 0]
        kind, _, two_nodes = strategy.partition(", ")
        look = {"linestyle": "--", "markerfacecolor": "white"} if two_nodes else {}
        axes.plot(own.index, own, marker="o", markersize=5, color=COLOURS[kind], label=strategy, **look)
    axes.set_xscale("log", base=2)
    axes.set_xticks([*costs.index.get_level_values("gpus").unique()])
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("GPUs", size=TEXT_SIZE)
    axes.set_title(title, size=TEXT_SIZE, weight="bold", loc="left")
    axes.grid(axis="y", color=GRID)


def tables(frame: pd.DataFrame) -> Iterator[Table | str]:
    """Percent lost at each size, then what follows."""
    costs = lost(frame)
    for name in costs:
        wide = costs.pivot_table(index="gpus", columns="strategy", values=name)[[*STRATEGIES]]
        made = report.table(f"{name}: percent of the step", ["GPUs", *wide], numbers=["GPUs", *wide])
        for gpus, row in wide.iterrows():
            made.add_row(f"{gpus}", *("" if pd.isna(value) else f"{value:.1f}" for value in row))
        yield made
    yield from sentences(costs)


def sentences(costs: pd.DataFrame) -> Iterator[str]:
    """What the rows say."""
    most = costs.index.get_level_values("gpus").max()
    slow, adapter = (costs[name].xs(most, level="gpus")[[*STRATEGIES]] for name in ("slow GPU", "slow adapter"))
    yield f"At {most} GPUs one of {FACTOR:g} times the time costs {listed(slow)}."
    yield f"An adapter at 1/{LINK_FACTOR:g} of its rate costs {listed(adapter)}."
    worse = [name for name in STRATEGIES if adapter[name] > slow[name]]
    yield f"The adapter costs more than the GPU under {' and '.join(worse) or 'no strategy'}."


def listed(costs: "pd.Series[float]") -> str:
    """Percent by strategy, in words."""
    return "; ".join(f"{name} {cost:.1f} %" for name, cost in costs.items())


def build() -> spsim.Experiment:
    """The experiment; nothing runs before it is asked for."""
    return spsim.Experiment(
        name="stragglers",
        title="What one slow GPU or adapter costs",
        points=[*points(GPUS)],
        quick=[*points(GPUS[:2])],
        figures=figures,
        tables=tables,
    )
