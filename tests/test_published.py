"""Predictions against published measurements, with the limits that the README states."""

import json
import re
from collections import Counter
from pathlib import Path
from statistics import mean

import pytest

from spsim import Scenario, Workload
from spsim.cli import main
from spsim.inputs.profiles import load_profile, profile_names
from spsim.inputs.resources import measured_cases
from spsim.results.result import Result
from spsim.simulation import simulate
from spsim.step.pipeline.in_flight import most_held
from spsim.step.pipeline.orders import orders
from spsim.studies.measured_cases import MeasuredCase, load_cases
from spsim.studies.validation import Validation
from spsim.units import GIB
from tests.cases import published

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def validation() -> Validation:
    """All shipped cases."""
    return published()


@pytest.fixture(scope="module")
def cases() -> dict[str, MeasuredCase]:
    """Cases by id; rows of one id differ in the metric only."""
    return {case.case_id: case for case in load_cases()}


def errors(validation: Validation, family: str) -> list[float]:
    return [abs(c.error_percent) for c in validation.cases if c.family == family and c.error_percent is not None]


def test_22b_layer_on_a100(validation: Validation) -> None:
    """Korthikanti et al. 2022, Table 4: five variants of the 22B layer, forward and backward."""
    found = errors(validation, "kort22_t4")
    assert len(found) == 10
    assert sum(found) / len(found) <= 5
    assert max(found) <= 10


def test_sequence_parallelism_gains_in_the_forward_pass_only(cases: dict[str, MeasuredCase]) -> None:
    """Measured: 7.7 ms to 7.2 ms forward (6.5 %), backward unchanged within 1 %."""
    tp, sp = (simulate(cases[f"kort22_t4_22B_{name}"].scenario()) for name in ("base_none", "sp"))
    assert 4 <= 100 * (1 - sp.layer_forward_s / tp.layer_forward_s) <= 9
    assert abs(sp.layer_backward_s / tp.layer_backward_s - 1) < 0.03


def test_175b_layer_on_h100(validation: Validation, cases: dict[str, MeasuredCase]) -> None:
    """One Transformer Engine layer, wall clock with launches and a sync, which are not in the prediction. Measured,
    TP+SP takes 5 % longer forward and 1 % backward.
    """
    assert max(errors(validation, "fuser")) <= 21
    assert mean(errors(validation, "fuser")) <= 15
    tp, sp = (simulate(cases[f"fuser3546_{name}"].scenario()) for name in ("tp", "sp"))
    assert 0.95 <= sp.layer_forward_s / tp.layer_forward_s <= 1.12
    assert 0.97 <= sp.layer_backward_s / tp.layer_backward_s <= 1.06
    assert_a_third_of_the_activations(tp, sp)


def assert_a_third_of_the_activations(tp: Result, sp: Result) -> None:
    """34/t against 10 + 24/t at t = 8: 4.25 of 13."""
    assert sp.activation_bytes_per_layer / tp.activation_bytes_per_layer == pytest.approx(4.25 / 13)


def test_at_most_a_third_of_a_family_was_fitted_on(validation: Validation) -> None:
    families = Counter(case.family for case in validation.cases)
    fitted = Counter(case.family for case in validation.cases if case.fitted)
    assert fitted.keys() == {"dgxc", "mlperf", "bridge_dense"}
    assert all(3 * count <= families[name] for name, count in fitted.items())
    declared = frozenset[str]().union(*(load_profile(name).fitted_on for name in profile_names()))
    assert sum(fitted.values()) == len(declared)


def test_no_case_is_known_by_name_in_the_package() -> None:
    """No prediction may depend on which case it is."""
    from tests.test_architecture import modules

    labels = {case.case_id for case in load_cases()} | {case.family for case in load_cases()}
    for _, path in modules():
        words = {*re.findall(r"\w+", path.read_text())}
        assert not labels & words, path


def test_rows_that_cannot_be_predicted_have_a_reason(validation: Validation) -> None:
    for case in validation.cases:
        assert (case.predicted is None) == (case.skipped is not None)
    assert all(c.skipped is None for c in validation.cases if c.metric.startswith("layer_"))
    dropped = Counter(c.skipped for c in validation.cases if c.family == "bridge_moe" and c.skipped)
    assert dropped["tokens that are dropped and padded are not simulated yet"] == 8


def test_json_document(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The contract of `validate --json`, of the layers of one family, with the errors recomputed here."""
    lines = measured_cases()[0].read_text().splitlines()
    path = tmp_path / "measured.csv"
    path.write_text("\n".join([lines[0], *(line for line in lines if ",kort22_t4," in line)]))
    with pytest.raises(SystemExit):
        main(["validate", str(path), "--json"])
    document = json.loads(capsys.readouterr().out)
    found = sorted(abs(case["error_percent"]) for case in document["cases"])
    assert len(found) == 10
    for case in document["cases"]:
        assert case["error_percent"] == pytest.approx(100 * (case["predicted"] / case["measured"] - 1))
        assert (case["skipped"], case["fitted"]) == (None, False)
    family = document["families"]["kort22_t4"]
    assert family["n"] == len(found)
    assert family["mean_abs_error_percent"] == pytest.approx(sum(found) / len(found))
    assert family["max_abs_error_percent"] == pytest.approx(found[-1])


@pytest.mark.parametrize(
    ("family", "mean_percent", "p90_percent"),
    [
        ("kort22_t4", 2.5, 5), ("kort22_t5", 2, 4), ("dgxc", 5, 9.5), ("mlperf", 5.2, 9.5),
        ("simumax", 2.5, 4.5), ("simumax_memory", 0.5, 1), ("bridge_dense", 4.7, 9.5),
        ("bridge_moe", 14, 33),
    ],
)  # fmt: skip
def test_families_stay_within_what_they_are_off(
    validation: Validation, family: str, mean_percent: float, p90_percent: float
) -> None:
    """A margin of about a tenth: a change of the costs that makes one family worse is seen."""
    off = validation.families[family]
    assert off.mean_abs_error_percent <= mean_percent
    assert off.p90_abs_error_percent <= p90_percent


def test_experts_without_biases_stay_within_what_they_are_off(
    validation: Validation, cases: dict[str, MeasuredCase]
) -> None:
    found = sorted(
        abs(c.error_percent)
        for c in validation.cases
        if c.family == "bridge_moe" and c.error_percent is not None and not cases[c.case_id].scenario().model.mlp_bias
    )
    assert len(found) == 38
    assert mean(found) <= 9.8
    assert found[int(0.9 * len(found))] <= 24


def test_large_runs_on_h100_stay_within_what_they_are_off(
    validation: Validation, cases: dict[str, MeasuredCase]
) -> None:
    """DGX Cloud and MLPerf on up to 10,752 H100, without the rows that the spread of GPUs was fitted on."""
    found = [
        abs(c.error_percent)
        for c in validation.cases
        if c.family in ("dgxc", "mlperf") and cases[c.case_id].hardware == "dgx-h100" and not c.fitted
        if c.error_percent is not None
    ]
    assert len(found) == 34
    assert mean(found) <= 4.1
    assert sorted(found)[int(0.9 * len(found))] <= 9.5


@pytest.mark.parametrize(
    ("model", "micro_batch", "stages", "chunks", "tp_gib", "sp_selective_gib"),
    [
        ("gpt-22b", 4, 1, 1, 59.25, 9.5625),
        ("gpt-175b", 1, 8, 3, 66.84375, 12.3515625),
        ("gpt-530b", 1, 35, 3, 114.0234375, 23.076171875),
        ("gpt-1t", 1, 64, 1, 131.25, 26.5625),
    ],
)
def test_activations_of_the_first_stage(
    model: str, micro_batch: int, stages: int, chunks: int, tp_gib: float, sp_selective_gib: float
) -> None:
    """Korthikanti et al. 2022, Figure 1, by their equations 1 to 6: L layers in flight, times 1 + (p - 1) / (p m) where
    stages have m chunks.
    """
    for options, gib in (("tp=8", tp_gib), ("tp=8,sequence_parallel,recompute=selective", sp_selective_gib)):
        scenario = Scenario(
            hardware="dgx-a100-80gb", model=model, plan=f"{options},pp={stages},virtual_pp={chunks}",
            workload=Workload(seq_len=2048, micro_batch=micro_batch, global_batch=4 * stages * micro_batch),
        )  # fmt: skip
        result = simulate(scenario)
        first = orders("1f1b", stages, chunks, scenario.num_micro_batches, None)[0]
        layers = scenario.model.layers // (stages * chunks)
        held = sum(most_held(first, [1.0] * chunks)) * layers * result.activation_bytes_per_layer
        assert held / GIB == pytest.approx(gib, rel=1e-9)
