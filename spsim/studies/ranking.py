"""Which of some rows of a sweep has the shortest step, and which others tie with it.

Steps are compared, not layers: neighbouring layers overlap under a contiguous ring, so that the layer time times the
layers exceeds the step by up to a fifth; and weights are synchronised at the end of the step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from spsim.inputs.hardware import HardwareProfile
from spsim.inputs.plan import parse_plan
from spsim.results import bands

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Ranking:
    """Names of rows in order of their steps."""

    names: tuple[str, ...]
    """Shortest step first."""
    tied: tuple[str, ...]
    """Those that tie with the first."""
    lead_percent: float
    """By how much the step of the next one that does not tie is longer; 0 where there is none."""
    over: str
    """That one, or nothing."""


def ranked(rows: Mapping[str, Row], hardware: HardwareProfile) -> Ranking:
    """Rows of one model, hardware and workload by their steps."""
    first, *others = sorted(rows, key=lambda name: float(rows[name]["step_time_ms"]))
    tied = tuple(name for name in others if tie(rows[first], rows[name], hardware))
    over = next((name for name in others if name not in tied), "")
    lead = bands.lead(rows[first]["step_time_ms"], rows[over]["step_time_ms"]) if over else 0.0
    return Ranking((first, *others), tied, lead, over)


def tie(one: Row, other: Row, hardware: HardwareProfile) -> bool:
    """Whether the steps of two rows differ by less than the larger of their error bands, on a profile that no
    calibration wrote by less than the band of published ratios.
    """
    known = [row["step_time_error_percent"] for row in (one, other) if row.get("step_time_error_percent") is not None]
    plans = [parse_plan(row["plan"]) for row in (one, other)]
    percent = max(known) if known else bands.of_pair(hardware, *plans).percent
    return bands.lead(one["step_time_ms"], other["step_time_ms"]) < percent
