"""Which strategy gives the first token of a long prompt soonest, on one node and on two?

Llama 3 8B reads a prompt of 8K to 1M tokens on 8 or 16 H100: by tensor parallelism, with sequence parallelism, by
Ulysses, by a ring in which K and V go round or Q (pass-KV and pass-Q of Yang et al. 2024, arXiv:2411.01783), and on
two nodes also by a ring of two nodes with tensor parallelism or Ulysses within each. Some seconds.

Expect tensor parallelism, with sequence parallelism or without, to send two sums of all hidden states in each layer: it
takes up to half as long again, until attention, which grows with the square of the prompt, outweighs all else. Ulysses
and rings move K and V of eight heads instead. Pass-Q sends twice as much as pass-KV, for Llama has four heads of Q for
each of K and V, and its results besides. Over the network a ring's messages hide behind attention only where the prompt
is long; a ring of two nodes with Ulysses within each leaves little to hide.

    python -m spsim experiments/long_prompt.py [--out results] [--quick]
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.table import Table

import spsim
from spsim import report
from spsim.plots.colours import GRID, MUTED
from spsim.plots.figure import SMALL_SIZE, TEXT_SIZE, WIDTH, Picture, add_legend, add_title, axes_at

STRATEGIES: Mapping[str, Mapping[str, Any]] = {
    "TP": {"tp": 8},
    "TP+SP": {"tp": 8, "sequence_parallel": True},
    "Ulysses": {"ulysses": 8},
    "ring, pass-KV": {"ring": 8},
    "ring, pass-Q": {"ring": 8, "ring_pass": "q"},
    "TP+SP × ring": {"tp": 8, "sequence_parallel": True, "ring": 1},
    "Ulysses × ring": {"ulysses": 8, "ring": 1},
}
"""On one node; on two the last degree is twice as much."""
TWO_NODES_ONLY = ("TP+SP × ring", "Ulysses × ring")
COLOURS = {
    "TP": "#4477aa", "TP+SP": "#66ccee", "Ulysses": "#228833", "ring, pass-KV": "#ee6677", "ring, pass-Q": "#aa3377",
    "TP+SP × ring": "#66ccee", "Ulysses × ring": "#228833",
}  # fmt: skip
LENGTHS = tuple(2**power for power in range(13, 21))
NODES = (1, 2)
KIB = 2**10
NEAR = 1.05
"""Times of others up to which the order is not told: they are within the error of such predictions."""


def points(lengths: Sequence[int]) -> Iterator[spsim.Point]:
    """Every strategy for prompts of some lengths on one node and on two."""
    for nodes in NODES:
        for strategy, degrees in STRATEGIES.items():
            if nodes == 1 and strategy in TWO_NODES_ONLY:
                continue
            last = [name for name in degrees if name in ("tp", "ulysses", "ring")][-1]
            for length in lengths:
                settings = {
                    "hardware": "dgx-h100",
                    "model": "llama-3-8b",
                    "plan": {**degrees, last: degrees[last] * nodes},
                    "workload": {"seq_len": length, "phase": "prefill"},
                    "nodes": nodes,
                }
                yield spsim.Point(settings, {"of": strategy, "nodes": nodes})


def times(frame: pd.DataFrame, nodes: int) -> pd.DataFrame:
    """Milliseconds to the first token by length and strategy; of what does not fit none."""
    own = frame[(frame["nodes"] == nodes) & frame["fits"].astype(bool)]
    made = own.pivot_table(index="seq_len", columns="of", values="ttft_ms")
    return made[[name for name in STRATEGIES if name in made]]


def figures(frame: pd.DataFrame) -> Mapping[str, Figure]:
    """A panel for one node and one for two, a line for each strategy, over the fastest at each length."""
    figure = Picture(figsize=(WIDTH, 5.2))
    left, gap, bottom, height = 0.8, 0.5, 1.15, 2.75
    width = (WIDTH - left - 0.3 - gap) / 2
    panels = [axes_at(figure, left + place * (width + gap), bottom, width, height) for place in range(len(NODES))]
    for axes, nodes in zip(panels, NODES, strict=True):
        draw(axes, times(frame, nodes), f"{8 * nodes} GPUs, {'one node' if nodes == 1 else 'two nodes'}")
    top = max(axes.get_ylim()[1] for axes in panels)
    for axes in panels:
        axes.set_ylim(0.9, top)
    panels[0].set_ylabel("time to first token, times the shortest", size=TEXT_SIZE)
    add_legend(figure, panels[-1].lines[: len(STRATEGIES)])
    add_title(
        figure, "Time to the first token of a long prompt",
        "llama-3-8b on dgx-h100 · prompts of 8K to 1M tokens · above: the shortest time",
    )  # fmt: skip
    return {"long_prompt.png": figure}


def draw(axes: Axes, took: pd.DataFrame, title: str) -> None:
    """Times over the shortest at each length, which stands above."""
    least = took.min(axis=1)
    for strategy in took:
        both = strategy in TWO_NODES_ONLY
        look = {"linestyle": "--", "markerfacecolor": "white"} if both else {}
        ratio = took[strategy] / least
        axes.plot(ratio.index, ratio, marker="o", markersize=5, color=COLOURS[strategy], label=strategy, **look)
    axes.set_xscale("log", base=2)
    axes.set_xticks([*took.index], [length_of(length) for length in took.index])
    axes.minorticks_off()
    axes.set_xlabel("tokens of the prompt", size=TEXT_SIZE)
    for length, shortest in least.items():
        axes.annotate(
            duration(shortest), (length, 1), (0, 3), xycoords=("data", "axes fraction"), textcoords="offset points",
            ha="center", size=SMALL_SIZE, color=MUTED,
        )  # fmt: skip
    axes.set_title(title, size=TEXT_SIZE, weight="bold", loc="left", pad=16)
    axes.grid(axis="y", color=GRID)


def length_of(tokens: float) -> str:
    """As 8K or 1M."""
    return f"{tokens / KIB**2:g}M" if tokens >= KIB**2 else f"{tokens / KIB:g}K"


def duration(milliseconds: float) -> str:
    """In ms or s."""
    return f"{milliseconds:.0f} ms" if milliseconds < 1000 else f"{milliseconds / 1000:.3g} s"


def tables(frame: pd.DataFrame) -> Iterator[Table | str]:
    """Times at each length, then what follows."""
    for nodes in NODES:
        took = times(frame, nodes)
        made = report.table(f"{8 * nodes} GPUs: time to first token", ["tokens", *took], numbers=["tokens", *took])
        for length, row in took.iterrows():
            made.add_row(length_of(length), *("no room" if pd.isna(value) else duration(value) for value in row))
        yield made
    for nodes in NODES:
        yield from sentences(times(frame, nodes), nodes)


def sentences(took: pd.DataFrame, nodes: int) -> Iterator[str]:
    """Which strategies are the fastest, and at which lengths."""
    best = {length: " or ".join(row.index[row <= NEAR * row.min()]) for length, row in took.iterrows()}
    parts = []
    for names, group in groupby(best, key=best.__getitem__):
        lengths = [*group]
        span = length_of(lengths[0]) + (f" to {length_of(lengths[-1])}" if len(lengths) > 1 else "")
        parts.append(f"{names} at {span}")
    where = "one node" if nodes == 1 else "two nodes"
    yield f"On {where} the first token comes soonest under {'; '.join(parts)} (within {100 * NEAR - 100:.0f} %)."
    slowest = (took.max(axis=1) / took.min(axis=1)).agg(["idxmax", "max"])
    name = took.loc[slowest["idxmax"]].idxmax()
    yield f"The choice matters most at {length_of(slowest['idxmax'])}: {name} takes {slowest['max']:.1f} times as long."


def build() -> spsim.Experiment:
    """The experiment; nothing runs before it is asked for."""
    return spsim.Experiment(
        name="long_prompt",
        title="Which strategy gives the first token of a long prompt soonest",
        points=[*points(LENGTHS)],
        quick=[*points(LENGTHS[::3])],
        figures=figures,
        tables=tables,
    )
