"""The answer of experiments/sweep.py follows from its rows, and the plans are what it says."""

import runpy
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from rich.table import Table

import spsim

SWEEP = runpy.run_path(str(Path(__file__).parent.parent / "experiments" / "sweep.py"), run_name="experiment")
TP, SP, ULYSSES = "tp=8", "tp=8,sequence_parallel", "ulysses=8,zero=3"


def row(plan: str, step: float, memory: float, seq_len: int = 8192) -> dict[str, Any]:
    """A made-up row; of 80 GiB."""
    strategy = {TP: "TP only", SP: "TP+SP", ULYSSES: "Ulysses"}[plan.partition(",recompute")[0]]
    return {
        "model": "llama-3-8b", "hardware": "dgx-h100", "strategy": strategy, "seq_len": seq_len, "plan": plan,
        "gpus": 8, "step_time_ms": step, "device_memory_gib": memory, "fits": memory <= 80, "error": "",
    }  # fmt: skip


def frame(*rows: dict[str, Any]) -> pd.DataFrame:
    return pd.DataFrame(rows)


ROWS = frame(
    row(TP, 1000, 90), row(f"{TP},recompute=full", 1300, 50),
    row(SP, 1010, 60), row(f"{SP},recompute=full", 1310, 40),
    row(ULYSSES, 650, 79), row(f"{ULYSSES},recompute=full", 900, 45),
    row(TP, 2000, 160, 16384), row(f"{TP},recompute=full", 2600, 85, 16384),
    row(SP, 2020, 80, 16384), row(f"{SP},recompute=full", 2620, 45, 16384),
    row(ULYSSES, 1900, 140, 16384), row(f"{ULYSSES},recompute=full", 2500, 81, 16384),
)  # fmt: skip


def test_of_each_strategy_the_fastest_plan_that_fits_is_chosen() -> None:
    steps = SWEEP["chosen"](ROWS, "step_time_ms")["step_time_ms"]
    assert list(steps) == [1300, 1010, 650, 2600, 2020, 2500], "where none fits the one that needs least"
    leanest = SWEEP["chosen"](ROWS, "device_memory_gib")["device_memory_gib"]
    assert list(leanest) == [50, 40, 45, 85, 45, 81]


def test_rows_that_failed_are_not_chosen() -> None:
    failed = row(TP, float("nan"), float("nan")) | {"error": "reason", "fits": None}
    assert list(SWEEP["chosen"](frame(failed, row(SP, 5, 6)), "step_time_ms")["strategy"]) == ["TP+SP"]


def test_the_answer_is_read_from_the_rows() -> None:
    time, memory, fit = SWEEP["answer"](ROWS)
    assert "of 2 cases TP only fits in 1" in time
    assert "TP+SP is shorter in 1 (by up to 22 %, llama-3-8b on dgx-h100 at 8K), longer in 0" in time
    assert "Ulysses is shorter in 1 (by up to 50 %" in time
    assert "33 % (llama-3-8b on dgx-h100 at 8K) to 50 % (llama-3-8b on dgx-h100 at 16K) less" in memory
    assert "in 1 of the 1 cases" in memory
    assert fit == "What fits: only sequence parallelism fits llama-3-8b on dgx-h100 from 16K on (at 16K TP+SP)."


def test_the_answer_says_when_nothing_was_bought() -> None:
    same = frame(row(TP, 1000, 50), row(SP, 1001, 50), row(ULYSSES, 1500, 50))
    time, _, fit = SWEEP["answer"](same)
    assert "TP+SP is shorter in 0, longer in 0 and a tie in 1" in time
    assert "Ulysses is shorter in 0, longer in 1 (by up to 50 %" in time
    assert fit == "What fits: wherever a plan fits, TP only fits too."
    none = SWEEP["time_bought"](SWEEP["cases"](frame(row(TP, 1000, 90), row(SP, 1000, 90))))
    assert "TP only fits nowhere" in none


def test_the_table_marks_what_does_not_fit_and_who_is_first() -> None:
    made = next(iter(SWEEP["tables"](ROWS)))
    assert isinstance(made, Table)
    shown = [list(column.cells) for column in made.columns]
    assert shown[1] == ["1.3 s, 50 GiB, full", "✗ 85 GiB"]
    assert shown[2] == ["1.0 s, 60 GiB", "*2.0 s, 80 GiB"]
    assert shown[3] == ["*0.7 s, 79 GiB, Z3", "✗ 81 GiB"]


@pytest.mark.parametrize("case", SWEEP["CASES"], ids=lambda case: case.model)
def test_the_plans_of_a_case_use_the_same_gpus_for_the_same_tokens(case: Any) -> None:
    """All are whole steps that spsim accepts."""
    scenarios = [spsim.Scenario(**point.settings) for point in case.points()]
    assert {scenario.scope for scenario in scenarios} == {"step"}
    assert {scenario.plan.gpus for scenario in scenarios} == {32 if case.model == "llama-3-70b" else 8}
    assert {scenario.global_batch * scenario.workload.seq_len for scenario in scenarios} == {2**20}
    spread = [s.plan for s in scenarios if s.plan.ulysses * s.plan.ring > 1]
    assert all(plan.zero_stage > 0 for plan in spread)
