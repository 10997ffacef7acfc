"""How well do the forms of collectives hold, and what does it cost a layer to cross nodes?

674 published times of collectives on A100, H100, H200, B200, GB200 and MI300X, on one node and on up to 32, against
`spsim.costs.collectives`. Rows that a curve was made from are marked, and those that the law of rings and trees over
nodes was fitted to; the others are predictions: other machines, group sizes, and what else crosses nodes. Then a step
of two layers of llama-3-8b on eight H100 spread over one, two and four nodes. A few seconds.

From 1 GiB on expect 2 % within a node and 3 % over nodes. What errs more:

- Two tables are of AWS, whose fabric (EFA) takes 20 us a hop where InfiniBand takes 4.2; that is put in. Two nodes take
  1.3 times the prediction at 32 MiB, four of B200 twice at 1 to 4 MiB.
- All-gather and reduce-scatter of 64 and 128 MiB on ten nodes of eight differ by a fifth, and no form has both.
- On 32 nodes of eight an all-gather of 2 GiB takes 1.18 times the prediction (a single iteration).
- Eight nodes elsewhere all-reduce 387 GB/s up to 8 GiB, more than a ring through NVLink has, where the present NCCL
  goes back to the ring: the table is held against the tree that ran.
- 160 rows are spoilt by their launch, and stand in no error: Open MPI binds a process to one core when two are started,
  and the log of such a run on two B200 nodes (mit-orcd/orcd-benchmarks, b200-nodes at bca7147) shows the network
  threads of all eight GPUs of a node on it. 1 MiB gathers in 585 and 262 us there. The virtual machines of Lambda and
  the pair of DGX H100 with two, four and eight GPUs a node were started in the same way; that their threads shared a
  core is likely, not logged: 16 KiB on all GPUs take 967 us out of place and 50 in place, and eight adapters add up to
  less than four. With one GPU a node nothing is shared.
- The pairs of nodes of the cluster of ten send at 40 to 46 GB/s, other adapters at 48.7.
- H200 sends up to 1.8 times as fast in the one sweep found, as from registered buffers.
- 20 racks of GB200 take 2.1 to 2.5 times the prediction, two racks do not. The measured times are 4.6 ms + M / 215
  GB/s, and the 2878 steps of a ring at the 1.5 us measured on one node are 4.4 ms, so the library (2.26) may have taken
  the ring, which alone would err 24 %.

    python -m spsim experiments/collectives.py [--out results] [--quick]
"""

from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from rich.table import Table

import spsim
from spsim import report
from spsim.costs.collectives import CommCost
from spsim.costs.curves import algorithm_steps
from spsim.inputs.collective_curves import CollectiveCurve, CollectiveName
from spsim.inputs.hardware import HardwareProfile
from spsim.inputs.profiles import load_profile
from spsim.plots.colours import GRID, MUTED, SERIES
from spsim.plots.figure import SMALL_SIZE, TEXT_SIZE, WIDTH, Picture, add_legend, add_title, axes_at
from spsim.program.placement import sent_bytes
from spsim.units import GB, MIB

DATA = Path(__file__).parent / "data" / "collectives.csv"
OPERATIONS = dict(
    zip(
        ("all_reduce", "all_to_all", "all_gather", "reduce_scatter", "send_receive"),
        SERIES[:4] + SERIES[5:6],
        strict=True,
    )
)
LARGE = 2**30
"""Bytes from which on the picture says how large errors are."""
SIZES = {2**-10: "1 KiB", 2**-5: "32 KiB", 1: "1 MiB", 2**5: "32 MiB", 2**10: "1 GiB"}
SIZES_MIB = (2**-11, 2**15)
PANELS = {"one node": (1, 1), "two nodes": (2, 2), "4 to 32 nodes": (3, 32)}
STRATEGIES = {
    "TP+SP": spsim.Plan(tp=8, sequence_parallel=True),
    "Ulysses": spsim.Plan(ulysses=8),
    "Ring": spsim.Plan(ring=8),
}
NODES = (1, 2, 4)
EFA_STEP_US = 20.0
"""8 bytes from one p5 node to another over EFA (aws/aws-ofi-nccl, src/tuner/nccl_ofi_model.cpp at 2daf7d3)."""


RAN = {"h100-8x8": "nvls_tree"}
"""What ran where the rows tell, whatever the present version picks: 387 GB/s is more than a ring through NVLink has."""


def measured() -> pd.DataFrame:
    """The published rows: operation, GPUs, nodes, message, bus bandwidth and time, use, fabric, source."""
    return pd.read_csv(DATA)


@cache
def cost(hardware: str, fabric: str) -> CommCost:
    """The closed forms of one profile, on its own fabric or on EFA."""
    profile = load_profile(hardware)
    return CommCost(profile if fabric == "profile" else on_efa(profile))


def on_efa(profile: HardwareProfile) -> HardwareProfile:
    """A profile whose nodes EFA joins: every step between them takes `EFA_STEP_US` of latency, and a hop of a tree is
    longer by twice the difference, for a chunk and for the credit that comes back.
    """
    collectives, between = profile.coefficients.collectives, profile.coefficients.between_nodes
    level = profile.datasheet.topology[1].name
    moved = {name: tuple(slower(curve, name) for curve in curves) for name, curves in collectives[level].items()}
    law, step = between[level], collectives[level]["all_gather"][0].step_latency_us
    hop = law.tree_hop_us.model_copy(update={"value": law.tree_hop_us.value + 2 * (EFA_STEP_US - step)})
    update = {
        "collectives": {**collectives, level: moved},
        "between_nodes": {**between, level: law.model_copy(update={"tree_hop_us": hop})},
    }
    coefficients = profile.coefficients.model_copy(update=update)
    return profile.model_copy(update={"coefficients": coefficients})


def slower(curve: CollectiveCurve, collective: CollectiveName) -> CollectiveCurve:
    """A curve with the latency of EFA, which every measured time waits for too."""
    longer = algorithm_steps(curve.algorithm, collective, curve.ranks) * (EFA_STEP_US - curve.step_latency_us)
    points = []
    for message, bandwidth in curve.points:
        wire = sent_bytes(collective, int(message), curve.ranks) / GB
        points.append((message, wire / (wire / bandwidth + 1e-6 * longer)))
    update = {"latency_us": curve.latency_us + longer, "step_latency_us": EFA_STEP_US, "points": tuple(points)}
    return curve.model_copy(update=update)


def predicted_us(row: "pd.Series[float]") -> float:
    """The time of a measured row; benchmarks in a framework pay the start of a collective too."""
    time = cost(row["hardware"], row["fabric"])
    group = (row["collective"], row["message_bytes"], row["gpus"], row["nodes"])
    if row["table"] in RAN:
        return 1e6 * time.forms(group[0], row["gpus"], row["nodes"], RAN[row["table"]])(row["message_bytes"])
    return 1e6 * (time.duration if row["started_from"] == "framework" else time.time)(*group)


def compared() -> pd.DataFrame:
    """The measured rows with `predicted_us` and `error_percent`, positive where the prediction is longer; without those
    that their launch has spoilt.
    """
    frame = measured()
    frame = frame[frame["use"] != "spoilt"].copy()
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
    """Predicted over measured time by message size, a panel for each number of nodes on one scale."""
    rows = compared()
    rows = rows.assign(ratio=rows["predicted_us"] / rows["time_us"])
    limits = rows["ratio"].min() / 1.2, rows["ratio"].max() * 1.2
    figure = Picture(figsize=(WIDTH, 5.6))
    left, gap, bottom, height = 0.85, 0.35, 1.1, 3.3
    width = (WIDTH - left - 0.3 - gap * (len(PANELS) - 1)) / len(PANELS)
    errors_of = {}
    for place, (title, (fewest, most)) in enumerate(PANELS.items()):
        found = rows[rows["nodes"].between(fewest, most)]
        axes = axes_at(figure, left + place * (width + gap), bottom, width, height)
        large = found[(found["use"] == "prediction") & (found["message_bytes"] >= LARGE)]
        errors_of[title] = large["error_percent"].abs().median()
        draw(axes, found, f"{title}: {len(found)} times", limits)
        axes.tick_params(labelleft=place == 0)
    figure.axes[0].set_ylabel("predicted over measured time", size=SMALL_SIZE)
    add_legend(figure, key())
    add_title(
        figure,
        "Half of the collectives of 1 GiB and more are predicted within "
        + ", ".join(f"{error:.0f} % on {title}" for title, error in errors_of.items()),
        f"closed forms against {len(rows)} published times · hollow: a curve was made from it, or a law fitted to it",
    )
    return {"collectives.png": figure}


def key() -> list[Line2D]:
    """A dot for each operation."""
    marks = {"marker": "o", "linestyle": "", "markersize": 6}
    return [Line2D([], [], color=colour, label=name.replace("_", "-"), **marks) for name, colour in OPERATIONS.items()]


def draw(axes: Axes, rows: pd.DataFrame, title: str, limits: tuple[float, float]) -> None:
    """One panel: a dot a row, hollow where the row is a point of a curve."""
    for name, colour in OPERATIONS.items():
        found = rows[rows["collective"] == name]
        face = [colour if use == "prediction" else "none" for use in found["use"]]
        axes.scatter(
            found["message_bytes"] / MIB, found["ratio"], s=14, facecolors=face, edgecolors=colour, linewidths=0.8
        )
    axes.axhline(1, color=MUTED, linewidth=0.8)
    axes.set(xscale="log", yscale="log", xlim=SIZES_MIB, ylim=limits)
    axes.xaxis.set_major_locator(FixedLocator([*SIZES]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda mib, _: SIZES[mib]))
    axes.yaxis.set_major_locator(FixedLocator([0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5]))
    axes.yaxis.set_major_formatter("{x:g}")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_locator(NullLocator())
    axes.set_title(title, loc="left", size=TEXT_SIZE, weight="bold")
    axes.set_xlabel("message", size=SMALL_SIZE)
    axes.grid(color=GRID, linewidth=0.6)


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
    spread = report.table(
        "A step of two layers of llama-3-8b on 8 x H100, 32K tokens", ["strategy", *map(across, NODES)]
    )
    for strategy, group in frame.groupby("strategy", sort=False):
        times = dict(zip(group["nodes"], group["step_time_ms"], strict=True))
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
        title="Closed forms of collectives against benchmarks, and a step across nodes",
        points=every,
        quick=every[:6],
        figures=figures,
        tables=tables,
    )
