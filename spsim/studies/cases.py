"""Rows of a sweep as cases: one model, hardware, sequence length, number of GPUs and tokens, under several strategies.

A row has the columns of `rows.measures`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from spsim.inputs.hardware import HardwareProfile
from spsim.inputs.plan import parse_plan
from spsim.program.blocks.transformer import LAYER_CLASSES
from spsim.studies.ranking import Ranking, Row, ranked
from spsim.units import KIB, MS_PER_S

if TYPE_CHECKING:
    import pandas as pd

EXPOSED = "exposed communication"
END = "weight synchronisation, optimizer"
REST = "embedding, waiting"
PARTS = (*LAYER_CLASSES, EXPOSED, END, REST)
"""Of the time of a step, as far as rows tell them apart."""
NOTICEABLE = 1e-3
"""Share of a step below which the rest is rounding."""


@dataclass(frozen=True)
class Case:
    """The rows of one case by strategy: of each the plan that fits with the shortest step, or needs least memory."""

    model: str
    hardware: str
    seq_len: int
    gpus: int
    rows: Mapping[str, Row]
    parts: Mapping[str, Mapping[str, float]]
    """Of each, milliseconds per 1K tokens of the step by part."""
    ranking: Ranking | None
    """Of those that fit; None where nothing does."""


def cases(frame: pd.DataFrame, hardware: Mapping[str, HardwareProfile]) -> Iterator[Case]:
    """The cases of rows without errors, in their order; profiles by name. A column `inputs` tells apart what has the
    same name.
    """
    tokens = (frame["tokens_per_s_per_gpu"] * frame["gpus"] * frame["step_time_ms"] / MS_PER_S).round(0)
    keys = ["model", "hardware", "seq_len", "gpus", "tokens", "inputs"]
    parts = step_parts(frame)
    for _, group in frame.assign(tokens=tokens).groupby(keys, sort=False):
        rows: dict[str, Row] = {}
        places: dict[str, Any] = {}
        for place, record in zip(group.index, group.to_dict("records"), strict=True):
            row = {str(name): value for name, value in record.items()}
            known = rows.get(row["strategy"])
            if known is None or _order(row) < _order(known):
                rows[row["strategy"]], places[row["strategy"]] = row, place
        times = {name: {part: float(sizes[at]) for part, sizes in parts.items()} for name, at in places.items()}
        fitting = {name: row for name, row in rows.items() if row["fits"]}
        one = next(iter(rows.values()))
        ranking = ranked(fitting, hardware[one["hardware"]]) if fitting else None
        yield Case(one["model"], one["hardware"], int(one["seq_len"]), int(one["gpus"]), rows, times, ranking)


def _order(row: Row) -> tuple[bool, float]:
    """What fits first."""
    return (not row["fits"], row["step_time_ms"] if row["fits"] else row["device_memory_gib"])


def step_parts(bars: pd.DataFrame) -> dict[str, pd.Series[Any]]:
    """Milliseconds per 1K tokens of each part, whose sum is that of the step."""
    whole = KIB * MS_PER_S / (bars["tokens_per_s_per_gpu"] * bars["gpus"])
    of_step = whole / bars["step_time_ms"]
    replicas = bars["plan"].where(whole.notna(), "").map(lambda plan: parse_plan(plan).dp)
    of_layers = KIB * bars["layers"] / (bars["seq_len"] * bars["micro_batch"] * replicas)
    parts = {name: bars[f"{name}_ms"] * of_layers for name in PARTS if f"{name}_ms" in bars}
    parts[EXPOSED] = bars["exposed_comm_ms"] * of_layers
    parts[END] = (bars["weight_sync_ms"] + bars["optimizer_ms"]) * of_step
    rest = whole - sum(part.fillna(0) for part in parts.values())
    parts[REST] = rest.where(rest > NOTICEABLE * whole, 0.0)
    return {name: part.fillna(0) for name, part in parts.items() if part.max() > 0}
