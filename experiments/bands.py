"""How far is spsim off published measurements, family by family? Makes the bands that results are given.

    python experiments/bands.py

writes `experiments/data/bands.csv` from the rows of `spsim validate`, `collectives.py` and `longcontext.py`, and prints
it: run it again when costs or profiles change. `spsim.results.bands` reads it, and says what a family is. Ten seconds.

- **ratio**: all pairs of plans of one table, or of one family of `validate`, that differ in one way. Of layers, since
  no published steps of one model differ so; attention alone, which says less of a step, stands where no layers do.
- **time**: whole training steps, of dense models and of those with experts, with biases or without, on each machine,
  on machines joined in one way, and on any; where there are none, layers, and where there are none of these either,
  attention alone.
- **part**: collectives by machine, how the group lies, and size, on the fabric that the profile describes; attention by
  machine, how it is split, and head size.

`best_table_percent` is the median of the table that agrees best: a family is far off where every table says so, while
one that is met shows that the others are of other machines. Rows that a curve was made from count too; steps that a
coefficient was fitted on do not, and none was on a row of layers or attention.
"""

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import collectives
import longcontext
import pandas as pd
from rich.console import Console

from spsim import report
from spsim.inputs.plan import Plan, parse_plan
from spsim.inputs.profiles import load_profile
from spsim.results import bands
from spsim.results.figures import measurable
from spsim.simulation import simulate
from spsim.studies.measured_cases import MeasuredCase, load_cases
from spsim.studies.validation import validate

FILE = Path(__file__).parent / "data" / "bands.csv"
KEYS = ["of", "what", "machine", "family", "from_bytes"]


class Measured(NamedTuple):
    """One time, measured and predicted, in any unit."""

    table: str
    hardware: str
    plan: Plan
    what: str
    """`steps`, `layers` or `attention`."""
    measured: float
    predicted: float
    head_dim: int = 0
    family: str = ""
    """Of times, by the model."""


class Error(NamedTuple):
    """How far one measurement, or one pair, is off, in percent."""

    of: str
    what: str
    machine: str
    family: str
    from_bytes: int
    percent: float
    table: str


def steps() -> Iterator[Measured]:
    """The whole training steps of `validate` that spsim simulates and no coefficient was fitted on."""
    cases = [case for case in load_cases() if case.metric == "step_time_s"]
    for case, found in zip(cases, validate(cases).cases, strict=True):
        if found.predicted is not None and not found.fitted:
            scenario = case.scenario()
            times = case.measured, found.predicted
            family = bands.family_of(scenario.model)
            yield Measured(case.family, case.hardware, scenario.plan, "steps", *times, family=family)


def layers() -> Iterator[Measured]:
    """The forward and backward pass of each case of `validate` together; and layers of `longcontext.py`."""
    cases: dict[str, list[MeasuredCase]] = {}
    for case in load_cases():
        if case.scope == "layers":
            cases.setdefault(case.case_id, []).append(case)
    for passes in cases.values():
        first = passes[0]
        result = simulate(first.scenario())
        predicted = sum(measurable(result, case.metric) for case in passes)
        yield Measured(
            first.family, first.hardware, result.scenario.plan, "layers", sum(c.measured for c in passes), predicted
        )
    yield from longcontext_rows("tflops_per_gpu", "layers")


def attention() -> Iterator[Measured]:
    """Windows of core attention alone, forward or both."""
    yield from longcontext_rows("attention_forward_per_s", "attention")
    yield from longcontext_rows("attention_both_per_s", "attention")


def longcontext_rows(metric: str, what: str) -> Iterator[Measured]:
    """Rows of a rate, as times; without the ideals of their tables."""
    frame = longcontext.compared()
    for row in longcontext.records(frame[(frame["metric"] == metric) & (frame["plan"] != "")]):
        times = (1 / row["measured"], 1 / row["predicted"])
        yield Measured(row["table"], row["hardware"], parse_plan(row["plan"]), what, *times, int(row["head_dim"] or 0))


def ratio_errors(rows: Iterable[Measured]) -> Iterator[Error]:
    """Of all pairs of a table that differ in one way."""
    for one, other in combinations(rows, 2):
        families = bands.pair_families(one.plan, other.plan)
        if one.table == other.table and one.hardware == other.hardware and len(families) == 1:
            ratio = one.predicted / other.predicted / (one.measured / other.measured)
            machine = bands.link(load_profile(one.hardware))
            yield Error("ratio", one.what, machine, families[0], 0, bands.off_by(ratio), one.table)


def time_errors(rows: Iterable[Measured]) -> Iterator[Error]:
    """On the machine, on those joined in the same way, and on any."""
    for row in rows:
        for machine in (row.hardware, bands.link(load_profile(row.hardware)), bands.ANY):
            yield Error("time", row.what, machine, row.family, 0, bands.off_by(row.predicted / row.measured), row.table)


def attention_errors(rows: Iterable[Measured]) -> Iterator[Error]:
    """By machine, split and head size."""
    for row in rows:
        family = bands.attention_family(row.plan, row.head_dim)
        yield Error("part", "attention", row.hardware, family, 0, bands.off_by(row.predicted / row.measured), row.table)


def collective_errors() -> Iterator[Error]:
    """By machine, how the group lies, and size of the message."""
    frame = collectives.compared()
    for row in longcontext.records(frame[frame["fabric"] == "profile"]):
        family = bands.collective_family(row["collective"], row["gpus"], row["nodes"])
        start = bands.SIZES[bisect_right(bands.SIZES, row["message_bytes"]) - 1]
        percent = bands.off_by(row["predicted_us"] / row["time_us"])
        yield Error("part", "collective", row["hardware"], family, start, percent, row["table"])


def preferred(better: Iterable[Error], other: Iterable[Error]) -> Iterator[Error]:
    """The better errors, and the others of what has none of them."""
    kept = list(better)
    yield from kept
    known = {(error.machine, error.family) for error in kept}
    yield from (error for error in other if (error.machine, error.family) not in known)


def made() -> pd.DataFrame:
    """The table of bands, a line for each family."""
    whole, parts = list(layers()), list(attention())
    times = preferred(time_errors(whole), time_errors(parts))
    errors = [
        *preferred(ratio_errors(whole), ratio_errors(parts)),
        *preferred(time_errors(steps()), times),
        *collective_errors(),
        *attention_errors(parts),
    ]
    frame = pd.DataFrame(errors)
    best = frame.groupby([*KEYS, "table"])["percent"].median().groupby(KEYS, sort=True).min()
    groups = frame.groupby(KEYS, sort=True)
    return groups.agg(
        rows=("percent", "size"),
        best_table_percent=("percent", lambda percent: best[tuple(frame.loc[percent.index[0], KEYS])]),
        p90_percent=("percent", lambda percent: percent.quantile(0.9)),
        largest_percent=("percent", "max"),
        tables=("table", lambda tables: " ".join(sorted(set(tables)))),
    ).reset_index()  # fmt: skip


def main() -> None:
    """Write and print the table."""
    frame = made()
    frame.to_csv(FILE, index=False, float_format="%.2f")
    shown = report.table("Bands of errors", [*frame.columns], numbers=frame.columns[4:-1])
    for row in frame.to_dict("records"):
        shown.add_row(*(f"{value:.1f}" if isinstance(value, float) else str(value) for value in row.values()))
    Console(width=200).print(shown)


if __name__ == "__main__":
    main()
