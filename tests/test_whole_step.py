"""The whole training step: rows of sweeps are results, and what is around the layers adds what it should."""

import pytest

import spsim
from spsim import Scenario, simulate
from spsim.results.accounts import of_step
from tests.cases import H100, result

PLANS = (
    "tp=8,sequence_parallel", "ulysses=8,zero=1", "tp=4,pp=2", "tp=2,pp=2,virtual_pp=2,dp=2,distributed_optimizer",
    "tp=4,dp=2,distributed_optimizer", "tp=4,dp=2,distributed_optimizer,dp_overlap",
    "tp=2,pp=2,virtual_pp=2,dp=2,distributed_optimizer,dp_overlap", "tp=8,recompute=full,recompute_layers=4",
    "ring=4,pp=2,loss_fusion",
)  # fmt: skip


@pytest.mark.parametrize("plan", PLANS)
def test_rows_of_whole_steps_are_results(plan):
    """Four workloads of a plan, computed together where that is possible, to the bit."""
    settings = {"hardware": H100, "model": "llama-3-8b", "plan": plan}
    points = [{**settings, "workload": {"seq_len": 4096 * k, "global_batch": 16 * m}} for k in (1, 2) for m in (1, 2)]
    frame = spsim.sweep(points)
    assert not frame["error"].astype(bool).any()
    for point, (_, row) in zip(points, frame.iterrows(), strict=True):
        found = simulate(Scenario(**point))
        assert row["step_time_ms"] == found.step_time_s * 1e3
        assert row["weight_sync_ms"] == found.weight_sync_s * 1e3
        assert row["peak_memory_gib"] == found.peak_memory_gib
        assert row["peak_operator"] == found.peak_operator
        assert row["mfu"] == found.mfu


@pytest.mark.parametrize("plan", ["tp=2", "tp=2,sequence_parallel,dp=2", "tp=2,pp=2", "pp=2,dp=2,dp_overlap,zero=1"])
def test_an_account_of_a_step_is_all_of_it(plan):
    """Each picosecond of the rank that ends last belongs to one part."""
    found = result(plan, hardware=H100, scope="step", layers=4, global_batch=8)
    assert of_step(found.trace).parts.total() == found.step_ps


def test_what_is_around_the_layers_adds_to_the_step():
    """Head and optimizer of a vocabulary of 512 and 2 layers: more time, more FLOPs, the same layers."""
    layers, step = (result("tp=2", hardware=H100, scope=scope) for scope in ("layers", "step"))
    assert step.step_time_s > layers.step_time_s
    assert step.amounts.model - layers.amounts.model == 6 * 256 * 256 * 512
    assert step.activation_bytes_per_layer == layers.activation_bytes_per_layer
    assert step.collectives_per_layer == layers.collectives_per_layer


STAGED = (
    "pp=4,virtual_pp=2,tp=2", "pp=2,dp=2,dp_overlap,zero=1", "pp=3,recompute=full,ring=2",
    "pp=2,pp_schedule=zbv,virtual_pp=2",
)  # fmt: skip


@pytest.mark.parametrize("plan", STAGED)
def test_figures_of_stages_are_those_of_their_trace(plan):
    """Accounts without a trace written out, a waterfall that adds up, and messages counted as m (2 v - 1) or more."""
    found = result(plan, hardware=H100, scope="step", layers=6, global_batch=12, seq_len=768)
    written = of_step(found.trace)
    assert found.account.parts == written.parts
    assert found.account.contended == written.contended
    assert sum(found.waterfall.values()) == pytest.approx(found.step_time_s, rel=1e-12)
    sends = sum(
        piece.recording.outline.lanes[0].endswith("send") and 0 in piece.recording.times for piece in found.trace.pieces
    )
    assert found.sends[0] == sends


def test_the_bubble_of_equal_stages_and_free_transfers():
    """4 stages, 2 chunks, 8 micro-batches: 3 of 16 + 3 of the time of passes; head and embedding make it longer."""
    found = result(
        "pp=4,virtual_pp=2,pp_overlap=false", hardware=H100, scope="step", layers=64, global_batch=8, vocab=128
    )
    assert 3 / 19 < found.bubble < 1.3 * 3 / 19
    assert result("", hardware=H100, scope="step").bubble == 0
