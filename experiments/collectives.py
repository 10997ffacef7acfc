"""How well do the closed forms of collectives hold, and what does it cost a layer to cross nodes?

679 published times of collectives on A100, H100, H200, B200, GB200 and MI300X, on one node and on up to 32,
against the closed forms of `spsim.comm_cost`. Rows that a curve was made from are marked; the others are
predictions: other machines, group sizes, and everything that crosses nodes with several GPUs each. Then a
layer of llama-3-8b on eight H100 spread over one, two and four nodes. A few seconds. Expect a few percent
within a node and for groups of up to four GPUs a node, and too short times for eight GPUs a node below
1 GiB, where libraries do not keep both levels busy.

    python -m spsim experiments/collectives.py [--out results] [--quick]
"""

from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.table import Table

import spsim
from spsim import report
from spsim.comm_cost import CommCost
from spsim.profiles import load_profile
from spsim.units import MIB

DATA = Path(__file__).parent / "data" / "collectives.csv"
OPERATIONS = {
    "all_reduce": "#4477aa",
    "all_gather": "#228833",
    "reduce_scatter": "#ccbb44",
    "all_to_all": "#ee6677",
    "send_receive": "#aa3377",
}
PANELS = {"one node": (1, 1), "two nodes": (2, 2), "4 to 32 nodes": (3, 32)}
STRATEGIES = {
    "TP+SP": spsim.Plan(tp=8, sequence_parallel=True),
    "Ulysses": spsim.Plan(ulysses=8),
    "Ring": spsim.Plan(ring=8),
}
NODES = (1, 2, 4)


def measured() -> pd.DataFrame:
    """The published rows: operation, GPUs, nodes, message, bus bandwidth and time, use, source."""
    return pd.read_csv(DATA)


@cache
def cost(hardware: str) -> CommCost:
    """The closed forms of one profile."""
    return CommCost(load_profile(hardware))


def predicted_us(row: "pd.Series[float]") -> float:
    """The time of a measured row; benchmarks in a framework pay the start of a collective too."""
    time = cost(row["hardware"])
    seconds = time.duration if row["started_from"] == "framework" else time.time
    return 1e6 * seconds(row["collective"], row["message_bytes"], row["gpus"], row["nodes"])


def compared() -> pd.DataFrame:
    """The measured rows with `predicted_us` and `error_percent`, positive where the prediction is longer."""
    frame = measured()
    frame["predicted_us"] = frame.apply(predicted_us, axis=1)
    frame["error_percent"] = 100 * (frame["predicted_us"] / frame["time_us"] - 1)
    return frame


def errors(frame: pd.DataFrame) -> pd.DataFrame:
    """Mean, 90th percentile and largest absolute error of each table, operation and use."""
    size = frame.assign(error=frame["error_percent"].abs())
    keys = ["table", "hardware", "gpus", "nodes", "collective", "use"]
    # The table of group sizes has several numbers of GPUs; the largest stands for it.
    size["gpus"] = size.groupby("table")["gpus"].transform("max")
    groups = size.groupby(keys, sort=False)["error"]
    return groups.agg(rows="size", mean="mean", p90=lambda e: e.quantile(0.9), largest="max").reset_index()


def points() -> Iterator[spsim.Point]:
    """Eight GPUs on one, two and four nodes."""
    model = spsim.load_model("llama-3-8b").model_copy(update={"layers": 2})
    for nodes in NODES:
        for strategy, plan in STRATEGIES.items():
            settings = {
                "hardware": "dgx-h100",
                "model": model,
                "plan": plan,
                "workload": spsim.Workload(seq_len=32768),
                "nodes": nodes,
            }
            yield spsim.Point(settings, {"strategy": strategy, "nodes": nodes})


def figures(frame: pd.DataFrame) -> Mapping[str, Figure]:
    """Predicted over measured time by message size, a panel for each number of nodes."""
    rows = compared()
    figure = Figure(figsize=(11, 4), layout="constrained")
    panels = figure.subplots(1, len(PANELS), sharey=True)
    for axes, (title, (fewest, most)) in zip(panels, PANELS.items(), strict=True):
        draw(axes, rows[rows["nodes"].between(fewest, most)], title)
    panels[0].set_ylabel("predicted / measured time")
    panels[-1].legend(title="hollow: a curve was made from it", fontsize=7, title_fontsize=7)
    figure.suptitle("Closed forms of collectives against published benchmarks")
    return {"collectives.png": figure}


def draw(axes: Axes, rows: pd.DataFrame, title: str) -> None:
    """One panel: a dot a row, hollow where the row is a point of a curve."""
    for name, colour in OPERATIONS.items():
        found = rows[rows["collective"] == name]
        ratio = found["predicted_us"] / found["time_us"]
        face = [colour if use == "prediction" else "none" for use in found["use"]]
        axes.scatter(found["message_bytes"] / MIB, ratio, s=14, facecolors=face, edgecolors=colour, label=name)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_title(title)
    axes.set_xlabel("message, MiB")


def tables(frame: pd.DataFrame) -> Iterator[Table | str]:
    """Errors of every table, then what crossing nodes costs a layer."""
    columns = ["table", "profile", "GPUs", "nodes", "operation", "rows", "use", "mean", "90th percentile", "largest"]
    made = report.table("Predicted against measured times", columns, numbers=["GPUs", "nodes", "rows", *columns[-3:]])
    for row in errors(compared()).to_dict("records"):
        figures_of = (f"{row[key]:.1f} %" for key in ("mean", "p90", "largest"))
        made.add_row(
            row["table"], row["hardware"], str(row["gpus"]), str(row["nodes"]), row["collective"], str(row["rows"]),
            row["use"], *figures_of,
        )  # fmt: skip
    yield made
    spread = report.table("One layer of llama-3-8b on 8 x H100, 32K tokens", ["strategy", *map(across, NODES)])
    for strategy, group in frame.groupby("strategy", sort=False):
        times = dict(zip(group["nodes"], group["layer_time_ms"], strict=True))
        spread.add_row(str(strategy), *(f"{times[n]:.2f} ms" if n in times else "–" for n in NODES))
    yield spread


def across(nodes: int) -> str:
    """Column of a number of nodes."""
    return f"{nodes} node{'s' if nodes > 1 else ''}"


def build() -> spsim.Experiment:
    """The experiment; nothing runs before it is asked for."""
    every = tuple(points())
    return spsim.Experiment(
        name="collectives",
        title="Closed forms of collectives against benchmarks, and a layer across nodes",
        points=every,
        quick=every[:6],
        figures=figures,
        tables=tables,
    )
