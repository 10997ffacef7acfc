"""Does spsim rank sequence-parallel strategies as they were measured?

Published rates of attention under Ulysses, ring attention and their products, contiguous and zigzag, on eight
A100, H800 and L20 and four A100 on PCIe, and of the layers of a 7B model on eight A800, against predictions:
how many pairs of strategies come in the measured order, and how far the rates are off. Pairs closer than 3 %
do not count. A few seconds. Expect the order to hold nearly everywhere at 128K tokens, Ulysses in front on
NVLink and last on PCIe, and rates too high where the host paces the launches.

    python -m spsim experiments/longcontext.py [--out results] [--quick]
"""

import math
from collections.abc import Iterator, Mapping
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, MultipleLocator, NullLocator
from rich.table import Table

import spsim
from spsim import report
from spsim.inputs.collective_curves import CollectiveCurve
from spsim.inputs.hardware import Datasheet, HardwareProfile
from spsim.inputs.kernel_coefficients import SendCoefficients
from spsim.inputs.plan import parse_plan
from spsim.plots.colours import GRID, MUTED, OTHER, SERIES
from spsim.plots.figure import SMALL_SIZE, WIDTH, Picture, add_legend, add_title, axes_at

DATA = Path(__file__).parent / "data" / "longcontext.csv"
TIE = 0.03
"""Two measured rates closer than this are not in any order."""

REASONS = {
    "a100-128k-32x32": "The measured order, Ulysses in front: its kernels have four heads of the whole sequence.",
    "a100-128k-8x32": "The measured order; all too fast, since head size 32 has no coefficients and is slower.",
    "a100-128k-4x32": "As above; and 1 to 2 ms a call, whatever the plan: packing, copies and launches.",
    "a100-128k-2x32": "Kernels of 0.8 ms under 1 to 2 ms of packing, copies and launches; the zigzag rings are a tie.",
    "a100-128k-8x128": "Zigzag rings are predicted 4 % ahead of Ulysses, measured up to 13 % behind: merges not fused.",
    "a100-128k-64x32-gqa8": "The measured order; the same factor in every plan, that of head size 32.",
    "a100-32k-32x32": "Measured 2.5 to 3.5 times as long as a sixteenth of the 128K rows, Ulysses too: not explained.",
    "a100-report-32k-32x128-gqa4": "Ulysses ends with a few long blocks; the long ring is measured behind: merges.",
    "a100-report-128k-32x128-gqa4": "4.2 times too fast, 13 % if the rows held the backward pass; zigzag plans tie.",
    "l20-128k-32x32": "Zigzag plans with a ring tie; Ulysses is not far enough behind: all-to-all is slower.",
    "l20-128k-32x128-gqa4": "As above: Ulysses last of the zigzag plans, but not behind the contiguous rings.",
    "l20-32k-32x128-gqa4": "All-to-all runs at 1.4 GB/s here, the profile has 8.3; all plans with little of it agree.",
    "l20-8k-32x128-gqa4": "All-to-all again, and steps shorter than their launches.",
    "a100-ring-forward": "The kernel of 64K tokens is 10 % slower than charts of 16K say; merges are not fused.",
    "a100-ring-both": "As forward; the longer kernels of the backward pass hide more of it.",
    "h800-ring-forward": "Relative to the ideal: the contiguous ring waits for messages longer than measured.",
    "h800-ring-both": "Relative to the ideal, as forward: more communication is exposed than measured.",
    "a800-7b-64k": "Whole layers agree within 6 %; Ulysses against a ring of 2 is a tie.",
    "a800-7b-30k": "Within 3 % but for the ring of 8, whose 60 MiB sends get 4 of 32 channels of 9 GB/s.",
    "a100-8b-longest": "Layers only, checkpoints on the device, ZeRO-1: what is left out and kept too much balance.",
}
"""One sentence a table: where the prediction agrees, where not, and why."""

COLOURS = dict(zip(("Ulysses", "ring", "Ulysses × ring", "with TP", "ideal"), SERIES[:3] + SERIES[5:7], strict=True))
LENGTHS = tuple(32768 * 2**power for power in range(8))

Row = Mapping[str, Any]


def measured() -> pd.DataFrame:
    """The published rows, with the columns that docs/validation.md describes."""
    return pd.read_csv(DATA, keep_default_na=False)


def records(frame: pd.DataFrame) -> list[Row]:
    """Rows as mappings, with Python's own numbers."""
    return [{str(name): value for name, value in row.items()} for row in frame.to_dict("records")]


@cache
def device(name: str, compute_share: float, link_share: float) -> HardwareProfile:
    """The nearest profile with the peak and the link rate of the measured device, given as shares of
    the profile's; all else is the profile's.
    """
    profile = spsim.load_profile(name)
    collectives = {
        level: {kind: tuple(slower(curve, link_share) for curve in curves) for kind, curves in table.items()}
        for level, table in profile.coefficients.collectives.items()
    }
    sends = {level: thinner(send, link_share) for level, send in profile.coefficients.sends.items()}
    coefficients = profile.coefficients.model_copy(update={"collectives": collectives, "sends": sends})
    datasheet = weaker(profile.datasheet, compute_share)
    return profile.model_copy(update={"coefficients": coefficients, "datasheet": datasheet})


def slower(curve: CollectiveCurve, share: float) -> CollectiveCurve:
    """A curve with a share of its bandwidth at every message, and the same latency."""
    return curve.model_copy(update={"points": tuple((size, rate * share) for size, rate in curve.points)})


def thinner(send: SendCoefficients, share: float) -> SendCoefficients:
    """Sends with a share of the bandwidth of channels and links."""
    rates = {name: getattr(send, name) for name in ("channel_gb_per_s", "link_gb_per_s")}
    return send.model_copy(
        update={name: rate.model_copy(update={"value": rate.value * share}) for name, rate in rates.items()}
    )


def weaker(datasheet: Datasheet, share: float) -> Datasheet:
    """A device with a share of the peaks."""
    peaks = {
        name: peak.model_copy(update={"value": peak.value * share}) for name, peak in datasheet.peak_tflops.items()
    }
    return datasheet.model_copy(update={"peak_tflops": peaks})


def settings(row: Row) -> dict[str, Any]:
    """The scenario of a measured row: one layer whose attention has that shape, or the named model."""
    shape = (row["heads"], row["kv_heads"], row["head_dim"])
    return {
        "hardware": device(row["hardware"], row["compute_share"], row["link_share"]),
        "model": spsim.load_model(row["model"]) if row["model"] else attention_model(*shape),
        "plan": parse_plan(row["plan"]),
        "workload": spsim.Workload(
            seq_len=row["seq_len"], micro_batch=row["micro_batch"], global_batch=row["global_batch"]
        ),
        "scope": "layers",
    }


def attention_model(heads: int, kv_heads: int, head_dim: int) -> spsim.Model:
    """One layer with an attention of this shape, by the kernel that was measured everywhere; what surrounds the
    attention is not looked at.
    """
    return spsim.Model(
        name="attention", layers=1, hidden=heads * head_dim, heads=heads, kv_heads=kv_heads, vocab=1,
        positions="none", attention="flash_attention_2",
    )  # fmt: skip


def attention_seconds(result: spsim.Result, phase: str) -> float:
    """The window of the core attention of the first layer over all ranks.

    Forward: from the posting of the first communication or kernel of `attention`, which is the all-to-all of
    q, the first message of the ring or the first kernel, to the end of the last kernel or merge, or of the
    all-to-all that brings the output to `projection`. Backward: from the posting of the all-to-all of the output's
    gradient, or of the first message or kernel, to the end of the last sum of dq, dk and dv, or of the
    all-to-all that brings them to `qkv`. With Ulysses the weight gradient of the projection runs in that window too.
    """
    spans = result.spans
    first = spans[(spans["layer"] == 0) & (spans["micro_batch"] == 0) & (spans["part"] == phase)]
    after = "projection" if phase == "forward" else "qkv"
    leaves = (first["name"] == after) & (first["collective"] == "all_to_all")
    window = first[(first["name"] == "attention") | leaves]
    seconds: float = (window["end_us"].max() - window["posted_us"].min()) / 1e6
    return seconds


def predicted(row: Row) -> float:
    """The predicted figure of a row in the unit of its metric: iterations/s, TFLOP/s a GPU (full square), or tokens.

    A plan for one GPU is the ideal of a table: its rate times the number of GPUs.
    """
    if row["metric"] == "longest_tokens":
        return longest(row)
    result = spsim.simulate(spsim.Scenario(**settings(row)))
    if row["metric"] == "tflops_per_gpu":
        return result.tflops_per_gpu
    phases = ("forward",) if row["metric"] == "attention_forward_per_s" else ("forward", "backward")
    gpus: int = row["gpus"]
    return gpus / result.scenario.plan.gpus / sum(attention_seconds(result, phase) for phase in phases)


def longest(row: Row) -> int:
    """The longest sequence of the grid that fits the device."""
    results = (spsim.simulate(spsim.Scenario(**settings({**row, "seq_len": tokens}))) for tokens in LENGTHS)
    return max((result.scenario.workload.seq_len for result in results if result.fits), default=0)


@cache
def compared() -> pd.DataFrame:
    """The measured rows with `predicted`, `error_percent` (positive if predicted is more), `strategy`, `label`."""
    frame = measured()
    frame["predicted"] = [predicted(row) for row in records(frame)]
    for _, rows in frame[frame["relative"] == 1].groupby("table"):
        ideal = rows[rows["plan"] == ""].iloc[0]
        frame.loc[rows.index, "predicted"] *= ideal["measured"] / ideal["predicted"]
    frame["error_percent"] = 100 * (frame["predicted"] / frame["measured"] - 1)
    plans = [parse_plan(text) for text in frame["plan"]]
    frame["strategy"] = [strategy(plan) for plan in plans]
    frame["label"] = [label(plan) for plan in plans]
    return frame


def strategy(plan: spsim.Plan) -> str:
    """The family of a plan, which has a colour."""
    if plan.tp > 1:
        return "with TP"
    if plan.ulysses > 1:
        return "Ulysses × ring" if plan.ring > 1 else "Ulysses"
    return "ring" if plan.ring > 1 else "ideal"


def label(plan: spsim.Plan) -> str:
    """Degrees in short: `T4U2`, `U4R2`; a contiguous ring is `r`."""
    ring = "R" if plan.ring_cut == "zigzag" else "r"
    degrees = {"T": plan.tp, "U": plan.ulysses, ring: plan.ring}
    return "".join(f"{letter}{degree}" for letter, degree in degrees.items() if degree > 1) or "ideal"


def agreement(rows: pd.DataFrame) -> tuple[int, int]:
    """(pairs of strategies in the measured order, pairs that are measured further apart than a tie)."""
    plans = rows[rows["strategy"] != "ideal"]
    counted = [(a, b) for a, b in combinations(records(plans), 2) if abs(a["measured"] / b["measured"] - 1) > TIE]
    agree = sum((a["measured"] - b["measured"]) * (a["predicted"] - b["predicted"]) > 0 for a, b in counted)
    return agree, len(counted)


def order(rows: pd.DataFrame, column: str) -> str:
    """Plans by a column, best first, with ≈ between neighbours that tie."""
    ranked = rows[rows["strategy"] != "ideal"].sort_values(column, ascending=False, kind="stable")
    text, previous = "", 0.0
    for name, value in zip(ranked["label"], ranked[column], strict=True):
        text += {True: " ≈ ", False: " > "}[previous / value - 1 < TIE] + name if text else name
        previous = value
    return text


def points() -> Iterator[spsim.Point]:
    """A configuration a measured row; the frame holds whole layers, the tables compare the rows."""
    for index, row in enumerate(records(measured())):
        yield spsim.Point(settings(row), {"table": row["table"], "plan": row["plan"], "row": index})


def figures(frame: pd.DataFrame) -> Mapping[str, Figure]:
    """Rates of all tables against each other, each as a share of its table's mean, and the order of its pairs."""
    rows = compared().loc[frame["row"]]
    rows = rows[rows["strategy"] != "ideal"]
    groups = {str(name): group for name, group in rows.groupby("table", sort=False)}
    counts = {name: agreement(group) for name, group in groups.items()}
    agree, pairs = (sum(column) for column in zip(*counts.values(), strict=True))
    side, gap, row = 5.2, 3.6, 0.26
    figure = Picture(figsize=(WIDTH, 7.2))
    draw_rates(axes_at(figure, 0.95, 1.15, side, side), groups)
    draw_pairs(
        axes_at(figure, side + gap, 6.35 - row * len(counts), WIDTH - side - gap - 0.8, row * len(counts)), counts
    )
    add_legend(figure, key())
    add_title(
        figure,
        f"{agree} of {pairs} pairs of strategies come in the measured order",
        f"sequence-parallel attention and layers, {len(groups)} published tables, pairs measured more than "
        f"{100 * TIE:.0f} % apart",
    )
    return {"longcontext.png": figure}


def key() -> list[Line2D]:
    """A dot for each strategy, and a hollow one for contiguous rings."""
    marks = {"marker": "o", "linestyle": "", "markersize": 6}
    dots = [Line2D([], [], color=colour, label=name, **marks) for name, colour in COLOURS.items() if name != "ideal"]
    return [*dots, Line2D([], [], color="black", markerfacecolor="none", label="hollow: contiguous ring", **marks)]


def draw_rates(axes: Axes, groups: Mapping[str, pd.DataFrame]) -> None:
    """A dot for each row: its rate over the geometric mean of its table, measured across, predicted up."""
    rates = [group for group in groups.values() if "longest_tokens" not in set(group["metric"])]
    shares = pd.concat([group[["measured", "predicted"]].transform(relative) for group in rates])
    for group in rates:
        for name, text, place in zip(group["strategy"], group["label"], group.index, strict=True):
            across, up = shares.loc[place]
            colour = COLOURS[name]
            axes.plot(across, up, "o", markersize=5, markeredgecolor=colour, alpha=0.85,
                      markerfacecolor="none" if "r" in text else colour)  # fmt: skip
    limits = (shares.to_numpy().min() / 1.1, shares.to_numpy().max() * 1.1)
    axes.plot(limits, limits, color=MUTED, linewidth=0.8)
    axes.set(xscale="log", yscale="log", xlim=limits, ylim=limits)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(FixedLocator([0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3]))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_locator(NullLocator())
    axes.set_xlabel("measured rate over the mean of its table", size=SMALL_SIZE)
    axes.set_ylabel("predicted rate over the mean of its table", size=SMALL_SIZE)
    axes.grid(color=GRID, linewidth=0.6)


def relative(rates: "pd.Series[float]") -> "pd.Series[float]":
    """Rates over their geometric mean."""
    return rates / math.exp(rates.map(math.log).mean())


def draw_pairs(axes: Axes, counts: Mapping[str, tuple[int, int]]) -> None:
    """A bar for each table: the pairs in the measured order, and in grey the others."""
    for place, (agree, pairs) in enumerate(counts.values()):
        axes.barh(place, agree, 0.72, color=COLOURS["Ulysses"])
        axes.barh(place, pairs - agree, 0.72, agree, color=OTHER)
        axes.annotate(
            f"{agree} of {pairs}", (pairs, place), (5, 0), textcoords="offset points", va="center", size=SMALL_SIZE
        )
    axes.set_yticks(range(len(counts)), [*counts], size=SMALL_SIZE)
    axes.set_ylim(len(counts) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_major_locator(MultipleLocator(5))
    axes.set_xlabel("pairs in the measured order, by table", size=SMALL_SIZE)


def tables(frame: pd.DataFrame) -> Iterator[Table | str]:
    """Order and error of every table, then a sentence on each."""
    columns = ["table", "measured order", "predicted order", "pairs", "tau", "mean error", "from", "to"]
    made = report.table("Predicted against measured order", columns, numbers=columns[3:])
    counts = []
    groups = list(compared().loc[frame["row"]].groupby("table", sort=False))
    for name, rows in groups:
        agree, pairs = agreement(rows)
        counts.append((agree, pairs))
        error = rows["error_percent"]
        tau = f"{2 * agree / pairs - 1:.2f}" if pairs else "–"
        figures_of = (f"{value:.0f} %" for value in (error.abs().mean(), error.min(), error.max()))
        made.add_row(
            str(name), order(rows, "measured"), order(rows, "predicted"), f"{agree}/{pairs}", tau, *figures_of
        )  # fmt: skip
    yield made
    agree, pairs = (sum(column) for column in zip(*counts, strict=True))
    yield f"{agree} of {pairs} pairs that are measured more than {100 * TIE:.0f} % apart come in the measured order."
    yield "\n".join(f"{name}: {REASONS[str(name)]}" for name, _ in groups)


def build() -> spsim.Experiment:
    """The experiment; nothing runs before it is asked for."""
    every = tuple(points())
    return spsim.Experiment(
        name="longcontext",
        title="Sequence-parallel attention in the order of measurements",
        points=every,
        quick=every[:7],
        figures=figures,
        tables=tables,
    )
