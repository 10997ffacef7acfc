"""Strategies in the order of published measurements, and the physics behind it."""

import runpy
from itertools import pairwise
from pathlib import Path

import pytest

from spsim import Plan, Scenario, Workload, load_profile, simulate
from spsim.inputs.plan import parse_plan

EXPERIMENT = runpy.run_path(str(Path(__file__).parent.parent / "experiments" / "longcontext.py"), run_name="experiment")
COMPARED = EXPERIMENT["compared"]()

# Table: (agreeing pairs, counted pairs) that are reached at least, and the largest mean error in percent.
LIMITS = {
    "a100-128k-32x32": (20, 20, 35),
    "a100-128k-8x32": (18, 18, 33),
    "a100-128k-4x32": (12, 12, 35),
    "a100-128k-2x32": (4, 5, 47),
    "a100-128k-8x128": (18, 19, 11),
    "a100-128k-64x32-gqa8": (19, 19, 30),
    "a100-32k-32x32": (16, 20, 200),  # also Ulysses: not explained
    "a100-report-32k-32x128-gqa4": (17, 18, 16),
    "a100-report-128k-32x128-gqa4": (16, 19, 325),  # perhaps forward and backward
    "l20-128k-32x32": (15, 21, 22),
    "l20-128k-32x128-gqa4": (15, 20, 20),
    "l20-32k-32x128-gqa4": (13, 21, 43),  # all-to-all at a sixth of the assumed rate
    "l20-8k-32x128-gqa4": (16, 19, 92),
    "a100-ring-forward": (1, 1, 11.5),
    "a100-ring-both": (1, 1, 8),
    "h800-ring-forward": (1, 1, 4.5),
    "h800-ring-both": (1, 1, 9),
    "a800-7b-64k": (2, 2, 5),
    "a800-7b-30k": (9, 10, 6),
    "a100-8b-longest": (1, 1, 0.1),
}
LONG = [name for name in LIMITS if "128k" in name and name.startswith("a100") and "2x32" not in name.split("-")]
"""128K tokens on NVLink; with two heads the host adds as much to either ring."""
PCIE = [name for name in LIMITS if name.startswith("l20")]


def rates(table, column="predicted"):
    """Label -> rate of one table."""
    rows = COMPARED[COMPARED["table"] == table]
    return dict(zip(rows["label"], rows[column], strict=True))


def test_every_table_has_a_limit_and_every_row_its_source():
    assert set(COMPARED["table"]) == set(LIMITS) == set(EXPERIMENT["REASONS"])
    assert COMPARED["source"].str.len().min() > 20
    assert len(COMPARED) == 109


@pytest.mark.parametrize("table", LIMITS)
def test_pairs_come_in_the_measured_order(table):
    agree, pairs, error = LIMITS[table]
    rows = COMPARED[COMPARED["table"] == table]
    found, counted = EXPERIMENT["agreement"](rows)
    assert counted == pairs
    assert found >= agree
    assert rows["error_percent"].abs().mean() < error


def test_most_pairs_of_all_tables_agree():
    found = [EXPERIMENT["agreement"](rows) for _, rows in COMPARED.groupby("table")]
    assert sum(agree for agree, _ in found) > 0.83 * sum(pairs for _, pairs in found)


def test_agreement_counts_pairs_by_hand():
    """Measured a ≈ b > c, predicted b > c > a: of the two pairs that count, b over c agrees."""
    rows = COMPARED[:3].assign(
        strategy="ring", measured=[100.0, 99.0, 50.0], predicted=[10.0, 30.0, 20.0], label=["a", "b", "c"]
    )  # fmt: skip
    assert EXPERIMENT["agreement"](rows) == (1, 2)
    assert EXPERIMENT["order"](rows, "measured") == "a ≈ b > c"
    assert EXPERIMENT["order"](rows, "predicted") == "b > c > a"


@pytest.mark.parametrize("table", LONG)
def test_zigzag_beats_contiguous_by_the_measured_factor(table):
    measured, predicted = rates(table, "measured"), rates(table)
    names = [name for name in measured if "R" in name]
    assert names
    for name in names:
        other = name.replace("R", "r")
        factor = measured[name] / measured[other]
        assert predicted[name] / predicted[other] == pytest.approx(factor, rel=0.2), name


@pytest.mark.parametrize("table", ["a100-128k-32x32", "a100-128k-8x32"])
def test_a_longer_ring_gains_nothing_on_nvlink(table):
    """Measured, Ulysses ≥ product ≥ ring; predicted within a tie."""
    measured, predicted = rates(table, "measured"), rates(table)
    chain = ["U8", "U4R2", "U2R4", "R8"]
    for one, next_ in pairwise(chain):
        assert measured[next_] < measured[one] * (1 + EXPERIMENT["TIE"])
        assert predicted[next_] < predicted[one] * (1 + EXPERIMENT["TIE"])


@pytest.mark.parametrize("table", PCIE)
def test_pcie_reverses_ulysses_and_ring(table):
    assert rates(table, "measured")["U8"] < rates(table, "measured")["R8"]
    assert rates(table)["U8"] < 0.95 * rates(table)["R8"]


def attention(plan, kv_heads, *, hardware, seq_len=32768):
    """Seconds of the forward core attention of 32 heads of 128."""
    model = EXPERIMENT["attention_model"](32, kv_heads, 128)
    scenario = Scenario(hardware=hardware, model=model, plan=plan, workload=Workload(seq_len=seq_len))
    return EXPERIMENT["attention_seconds"](simulate(scenario), "forward")


def test_fewer_key_value_heads_help_the_ring_more():
    """Its messages are all K and V; Ulysses also moves queries and outputs. At 8K tokens PCIe hides neither."""
    times = {
        (plan, heads): attention(plan, heads, hardware="l40s-8", seq_len=8192)
        for plan in ("ring=8", "ulysses=8") for heads in (32, 8)
    }  # fmt: skip
    ring, ulysses = (times[plan, 32] / times[plan, 8] for plan in ("ring=8", "ulysses=8"))
    assert ring > 1.3 * ulysses
    assert ulysses > 1.2


def test_the_window_of_one_gpu_is_its_kernel():
    """Causal flash attention of 32 heads on 8: its traffic is nothing beside it, and its share is near what it reaches
    full, since a head has more blocks than the device holds.
    """
    profile = load_profile("dgx-a100-80gb")
    tokens = 65536
    fraction = profile.coefficients.attention["flash_attention_2"].forward.causal["128"].fraction.value
    expected = 2 * 32 * 128 * tokens**2 / (312e12 * fraction)
    assert attention(Plan(), 8, hardware="dgx-a100-80gb", seq_len=tokens) == pytest.approx(expected, rel=0.02)


def test_the_window_holds_four_all_to_alls_and_the_kernel_on_an_eighth_of_the_heads():
    plan = parse_plan("ulysses=8")
    model = EXPERIMENT["attention_model"](32, 32, 128)
    scenario = Scenario(hardware="dgx-a100-80gb", model=model, plan=plan, workload=Workload(seq_len=32768))
    result = simulate(scenario)
    own = result.spans[(result.spans["rank"] == 0) & (result.spans["part"] == "forward")]
    messages = own[own["collective"] == "all_to_all"]
    kernel = own[(own["name"] == "attention") & (own["collective"] == "")]
    expected = (messages["duration_us"].sum() + kernel["duration_us"].sum()) / 1e6
    assert len(messages) == 4
    assert EXPERIMENT["attention_seconds"](result, "forward") == pytest.approx(expected, rel=1e-9)


def test_shares_of_the_datasheet_scale_peak_and_links():
    profile = load_profile("l40s-8")
    part = EXPERIMENT["device"]("l40s-8", 0.5, 0.25)
    assert part.peak("bf16") == profile.peak("bf16") / 2
    curves = [p.coefficients.collectives["pcie"]["all_to_all"][1] for p in (profile, part)]
    assert curves[1].points == ((2**30, curves[0].points[0][1] / 4),)
    assert curves[1].latency_us == curves[0].latency_us


def test_which_strategy_runs_out_first():
    """Longest sequence of a doubling grid, 8B on four A100: within one step of the published bars."""
    rows = COMPARED[COMPARED["table"] == "a100-8b-longest"]
    assert len(rows) == 2
    assert (rows["predicted"] / rows["measured"]).between(0.5, 2).all()
    assert rates("a100-8b-longest")["T4"] > rates("a100-8b-longest")["U4"]


def test_the_picture_says_how_many_pairs_come_in_order():
    """In its title, and a bar for each table."""
    (figure,) = EXPERIMENT["figures"](COMPARED.assign(row=COMPARED.index)).values()
    agree, pairs = (
        sum(column)
        for column in zip(*(EXPERIMENT["agreement"](rows) for _, rows in COMPARED.groupby("table")), strict=True)
    )
    assert figure.texts[0].get_text() == f"{agree} of {pairs} pairs of strategies come in the measured order"
    rates, bars = figure.axes
    assert sum(bar.get_width() for bar in bars.patches) == pairs
    assert [label.get_text() for label in bars.get_yticklabels()] == [*COMPARED["table"].unique()]
    diagonal = rates.lines[-1]
    assert len(rates.lines) - 1 == ((COMPARED["strategy"] != "ideal") & (COMPARED["metric"] != "longest_tokens")).sum()
    assert list(diagonal.get_xdata()) == list(diagonal.get_ydata())
