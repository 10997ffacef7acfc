"""How far is spsim off what others measured, family by family, beside other predictors?

The 203 values of `spsim validate`, 108 of them published for layers and steps of up to 10,752 GPUs and 95 from the
performance pages of Megatron-Bridge, predicted by one set of coefficients for each machine. Draws predicted against
measured, a colour a family, with a band of 5 % around what is right, and the errors below; hollow are rows that a
coefficient was fitted on, which stand in no mean. Prints errors by family, beside those of other programs where they
are known, then what was left out and why. Rows of fully sharded parameters or 4 bits are a family of their own.
A minute.

    python -m spsim experiments/validate.py [--out results] [--quick]
"""

from collections import Counter
from collections.abc import Iterator, Mapping

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.table import Table

import spsim
from spsim import report
from spsim.errors import InputError
from spsim.inputs.profiles import load_profile
from spsim.plots.colours import SERIES
from spsim.studies.measured_cases import MeasuredCase, load_cases

COLUMNS = {
    "step_time_s": ("step_time_ms", 1e-3),
    "layer_forward_ms": ("layer_forward_ms", 1e-3),
    "layer_backward_ms": ("layer_backward_ms", 1e-3),
    "peak_memory_gib": ("peak_memory_gib", 1),
}
"""Metric -> column of a row, and what makes seconds or GiB of it."""
PANELS = {"time": "seconds", "memory": "GiB"}
OTHERS: Mapping[str, tuple[str, ...]] = {
    "kort22_t4": ("Calculon 9.4 %, and sequence parallelism slower instead of faster",),
    "kort22_t5": (
        "Calculon 3.7 %, largest 8.9 %",
        "SimuMax with its starter values 6.5 %, largest 15.4 %",
        "llm-analysis with the efficiencies of its README 11.4 %",
    ),
    "simumax": ("SimuMax 5.6 % on its authors' 43 runs, 16 of them here",),
    "simumax_memory": ("SimuMax 0.46 % on its authors' 43 runs",),
}
"""Mean errors of other programs, run on the same rows or, for SimuMax on B200, as its authors report."""
BAND = 0.05


def family(case: MeasuredCase) -> str:
    """That of its file; runs with sharded parameters or products of 4 bits differ more from one to the next."""
    apart = case.fsdp > 0 or "nvfp4" in (case.precision, case.precision_recipe)
    return f"{case.family}, FSDP or nvfp4" if apart else case.family


def points() -> Iterator[spsim.Point]:
    """A configuration for each measured value whose columns make one."""
    for case in load_cases():
        try:
            settings = case.settings()
            fitted = case.case_id in load_profile(case.hardware).fitted_on
        except InputError:
            continue
        labels = {"case": case.case_id, "family": family(case), "metric": case.metric, "measured": case.measured}
        yield spsim.Point(settings, {**labels, "fitted": fitted})


def compared(frame: pd.DataFrame) -> pd.DataFrame:
    """Measured and predicted values in seconds or GiB, and the error in percent."""
    rows = frame[["case", "family", "metric", "fitted"]].copy()
    scales = frame["metric"].map({metric: scale for metric, (_, scale) in COLUMNS.items()})
    units = frame["metric"].map(lambda metric: 1e-3 if metric.endswith("_ms") else 1)
    rows["measured"] = frame["measured"] * units
    rows["predicted"] = [row[COLUMNS[row["metric"]][0]] for row in frame.to_dict("records")] * scales
    rows["percent"] = 100 * (rows["predicted"] / rows["measured"] - 1)
    rows["panel"] = np.where(frame["metric"] == "peak_memory_gib", "memory", "time")
    return rows


# ------------------------------------------------------------ pictures


def figures(frame: pd.DataFrame) -> dict[str, Figure]:
    """Predicted against measured above, errors below; times and memory beside each other."""
    rows = compared(frame)
    names = [name for name in PANELS if (rows["panel"] == name).any()]
    colours = dict(zip(rows["family"].unique(), SERIES * 2, strict=False))
    figure = Figure(figsize=(13.33, 7.5), layout="constrained")
    panels = figure.subplots(2, len(names), sharex="col", squeeze=False, height_ratios=(3, 2))
    for column, name in enumerate(names):
        found = rows[rows["panel"] == name]
        draw_values(panels[0][column], found, colours, name)
        draw_errors(panels[1][column], found, colours, PANELS[name])
    figure.suptitle(
        "Predicted against measured; hollow: a coefficient was fitted on it", x=0.01, ha="left", weight="bold"
    )
    return {"validate.png": figure}


def draw_values(axes: Axes, rows: pd.DataFrame, colours: Mapping[str, str], title: str) -> None:
    """Both logarithmic, with the band around the diagonal."""
    values = rows[["measured", "predicted"]].to_numpy()
    line = np.array([values.min() / 1.5, values.max() * 1.5])
    axes.fill_between(line, line * (1 - BAND), line * (1 + BAND), color="#DDDDDD")
    axes.plot(line, line, color="black", linewidth=0.8)
    scatter(axes, rows, colours, "predicted")
    axes.set(xscale="log", yscale="log", ylabel=f"predicted {title}, {PANELS[title]}")
    axes.legend(fontsize=8)


def draw_errors(axes: Axes, rows: pd.DataFrame, colours: Mapping[str, str], unit: str) -> None:
    """In percent, with the same band."""
    axes.axhspan(-100 * BAND, 100 * BAND, color="#DDDDDD")
    axes.axhline(0, color="black", linewidth=0.8)
    scatter(axes, rows, colours, "percent")
    axes.set(xscale="log", xlabel=f"measured, {unit}", ylabel="error, %")


def scatter(axes: Axes, rows: pd.DataFrame, colours: Mapping[str, str], column: str) -> None:
    """A dot a row, hollow where it was fitted on, a colour a family."""
    for name, group in rows.groupby("family", sort=False):
        colour = colours[str(name)]
        faces = ["none" if fitted else colour for fitted in group["fitted"]]
        axes.scatter(group["measured"], group[column], s=18, facecolors=faces, edgecolors=colour)
        own = group.loc[~group["fitted"], "percent"].abs()
        mean = "all fitted on" if own.empty else f"{own.mean():.1f} %"
        rows_of = f"{len(group)} row{'s' if len(group) > 1 else ''}"
        axes.scatter([], [], s=18, color=colour, label=f"{name}: {rows_of}, {mean}")


# ------------------------------------------------------------ tables


def tables(frame: pd.DataFrame) -> Iterator[Table | str]:
    """Errors by family, those of rows that were fitted on apart, and what is left out."""
    rows = compared(frame)
    yield error_table("Errors of predictions", rows[~rows["fitted"]])
    if rows["fitted"].any():
        yield error_table("Errors of rows that a coefficient was fitted on", rows[rows["fitted"]])
    for reason, count in left_out().items():
        yield f"left out, {reason}: {count} rows"


def error_table(title: str, rows: pd.DataFrame) -> Table:
    """Mean, 90th percentile and largest of each family, beside other programs."""
    columns = ["family", "rows", "mean", "90th percentile", "largest", "bias", "others, mean"]
    made = report.table(title, columns, numbers=columns[1:-1])
    for name, group in rows.groupby("family", sort=False):
        percent = group["percent"].abs()
        figures_of = (percent.mean(), percent.quantile(0.9), percent.max())
        made.add_row(
            str(name), str(len(group)), *(f"{value:.1f} %" for value in figures_of),
            f"{group['percent'].mean():+.1f} %".replace("-", "−"), "; ".join(OTHERS.get(str(name), ())),
        )  # fmt: skip
    return made


def left_out() -> Counter[str]:
    """Reasons for which measured values are no configuration."""
    reasons: Counter[str] = Counter()
    for case in load_cases():
        try:
            case.settings()
            load_profile(case.hardware)
        except InputError as error:
            reasons[str(error)] += 1
    return reasons


def build() -> spsim.Experiment:
    """The experiment; nothing runs before it is asked for."""
    every = tuple(points())
    return spsim.Experiment(
        name="validate",
        title="Predicted against measured",
        points=every,
        quick=every[::6],
        figures=figures,
        tables=tables,
    )
