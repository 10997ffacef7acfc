"""The picture and table of predictions against measurements, from rows made by hand."""

import runpy
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest

from spsim.studies.measured_cases import load_cases

FILE = Path(__file__).parent.parent / "experiments" / "validate.py"
validate = SimpleNamespace(**runpy.run_path(str(FILE), run_name="experiment"))
FRAME = pd.DataFrame(
    [
        ("a", "layers", "layer_forward_ms", 8.0, False, 0.0, 7.6, 0.0, 0.0),
        ("a", "layers", "layer_backward_ms", 16.0, True, 0.0, 0.0, 20.0, 0.0),
        ("b", "steps", "step_time_s", 2.0, False, 2100.0, 0.0, 0.0, 0.0),
        ("b", "steps", "step_time_s", 4.0, False, 3600.0, 0.0, 0.0, 0.0),
        ("b", "memory", "peak_memory_gib", 50.0, False, 2100.0, 0.0, 0.0, 49.0),
    ],
    columns=["case", "family", "metric", "measured", "fitted", "step_time_ms", "layer_forward_ms", "layer_backward_ms",
             "peak_memory_gib"],
)  # fmt: skip


def test_values_have_one_unit_and_errors_are_of_the_measured():
    rows = validate.compared(FRAME)
    assert rows["measured"].tolist() == pytest.approx([0.008, 0.016, 2.0, 4.0, 50.0])
    assert rows["predicted"].tolist() == pytest.approx([0.0076, 0.020, 2.1, 3.6, 49.0])
    assert rows["percent"].tolist() == pytest.approx([-5.0, 25.0, 5.0, -10.0, -2.0])
    assert rows["panel"].tolist() == ["time"] * 4 + ["memory"]


def test_a_table_has_the_errors_of_each_family_and_fitted_rows_apart():
    predictions, fitted, *_ = validate.tables(FRAME)
    cells = [[*column.cells] for column in predictions.columns[:6]]
    assert [*zip(*cells, strict=True)] == [
        ("layers", "1", "5.0 %", "5.0 %", "5.0 %", "−5.0 %"),
        ("steps", "2", "7.5 %", "9.5 %", "10.0 %", "−2.5 %"),
        ("memory", "1", "2.0 %", "2.0 %", "2.0 %", "−2.0 %"),
    ]
    assert [*fitted.columns[2].cells] == ["25.0 %"]


def test_fitted_rows_are_hollow():
    panels = validate.figures(FRAME)["validate.png"].axes
    assert [axes.get_ylabel() for axes in panels[:2]] == ["predicted time, seconds", "predicted memory, GiB"]
    layers = next(dots for dots in panels[0].collections if len(dots.get_offsets()) == 2)
    assert [face[3] for face in layers.get_facecolors()] == [1.0, 0.0]


def test_families_and_other_predictors():
    """Names of other predictors are of families that there are; sharded and 4-bit rows stand apart."""
    families = {validate.family(case) for case in load_cases()}
    assert set(validate.OTHERS) <= families
    assert "bridge_dense, FSDP or nvfp4" in families
    apart = [case for case in load_cases() if validate.family(case) == "bridge_dense, FSDP or nvfp4"]
    assert {(case.fsdp > 0) or case.precision_recipe == "nvfp4" for case in apart} == {True}
    assert sum(case.family == "bridge_dense" for case in load_cases()) == 39
    assert len(apart) == 15
