"""Where the time of a rank goes, worked by hand; folded runs have the accounts of unfolded ones, whatever overlaps."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spsim.engine.pieces import Move, Repeat, Stretch
from spsim.engine.recording import Flight, Outline, Recording, TaskInfo
from spsim.engine.trace import Trace
from spsim.report.run import stage_table, summary, waterfall_table
from spsim.results import accounts, metrics
from spsim.results.accounts import (
    IDLE,
    KERNEL,
    OTHER,
    PEER,
    PEERS,
    SEVERAL,
    SLOWED,
    STAGES,
    SYNC,
    TRANSFER,
    Activity,
    account,
)
from spsim.results.held import held_at
from spsim.units import GIB
from tests.cases import random_scenarios, result

pytestmark = pytest.mark.slow

STAGED = result("tp=2,pp=2", hardware="dgx-h100", scope="step", layers=4, global_batch=8, seq_len=4096, hidden=2048)
"""Two stages, whose step has an optimizer."""

# ------------------------------------------------------------ by hand


def test_each_moment_has_one_part():
    """A kernel of which 10 are contended, a wait, one transfer, two at once, then nothing."""
    activities = [
        Activity(-5, 30, KERNEL, "gemm"),
        Activity(20, 50, PEER, PEERS),
        Activity(50, 80, TRANSFER, "exposed all-gather"),
        Activity(70, 90, TRANSFER, "exposed send-receive"),
    ]
    found = account(activities, 0, 100)
    assert found.contended == {"gemm": 10}
    assert found.charged(0.1) == {
        "gemm": 29, SLOWED: 1, PEERS: 20, "exposed all-gather": 20, SEVERAL: 10, "exposed send-receive": 10, IDLE: 10,
    }  # fmt: skip


def test_what_a_part_loses_is_rounded_once():
    """Three times 5 contended picoseconds at a tenth are 1.5, rounded to 2, not three times 0."""
    own = account([Activity(0, 5, KERNEL, "gemm"), Activity(0, 5, TRANSFER, "exposed all-reduce")], 0, 5)
    window = accounts.Account()
    window.add(own, times=3)
    assert own.charged(0.1)[SLOWED] == 0
    assert window.charged(0.1) == {"gemm": 13, SLOWED: 2}


def test_communications_take_their_own_share():
    """Beside half a device 5, beside that and a usual one the larger share for 5, beside the usual one 10, and beside
    what takes nothing 10: 2.5 + 2.5 + 1 are lost.
    """
    activities = [
        Activity(0, 40, KERNEL, "gemm"),
        Activity(0, 10, TRANSFER, "exposed send-receive", 0.5),
        Activity(5, 20, TRANSFER, "exposed all-reduce"),
        Activity(30, 40, PEER, PEERS, 0.0),
    ]
    found = account(activities, 0, 40)
    assert found.contended == {"gemm": 10}
    assert found.charged(0.1) == {"gemm": 34, SLOWED: 6}
    assert found.charged(0.8) == {"gemm": 40 - round(8 + 2.5 + 4), SLOWED: round(8 + 2.5 + 4)}
    twice = accounts.Account()
    twice.add(found, times=2)
    assert twice.charged(0.1) == {"gemm": 68, SLOWED: 12}


def test_what_belongs_to_the_window_counts_before_what_does_not():
    """A transfer beside that of another layer is exposed; a kernel of another layer is no time of this one."""
    activities = [
        Activity(0, 10, TRANSFER, "exposed all-reduce"),
        Activity(5, 20, TRANSFER, OTHER),
        Activity(20, 30, KERNEL, OTHER),
        Activity(20, 30, TRANSFER, "exposed all-reduce"),
    ]
    found = account(activities, 0, 30)
    assert found.parts == {"exposed all-reduce": 10, OTHER: 20}
    assert not found.contended


LANES = ("compute", "pp up", "compute", "dp")
LABELS = (
    TaskInfo("a", "gemm", "forward"),
    TaskInfo("message", "communication", "forward", collective="send_receive"),
    TaskInfo("b", "gemm", "recompute"),
    TaskInfo("gradients", "communication", "weight_sync", collective="all_reduce"),
)
FLIGHT = Flight("dp", 0, 0, 4, "weight_sync")
ONE = Recording(
    Outline(LANES, LABELS),
    {0: np.array([(1, 1, 5), (5, 9, 11), (12, 12, 20), (20, 20, 30)])},
    (),
    begins={0: 0},
    flights={0: [FLIGHT]},
)
"""Kernels 1-5 and 12-20, between them a message that another stage comes to at 9 and that takes 2, and at the end a
sum that takes 10; 4 of one before are left.
"""
OWN = {"gemm": 4, STAGES: 4, "exposed send-receive": 2, IDLE: 1, "recomputation": 8, SYNC: 1}


def trace(*nodes):
    """A trace of one rank, tasks described by their labels."""
    return Trace(nodes, {0: (0,)}, lambda piece: piece.recording.outline.labels)


def test_a_piece_reaches_to_the_end_of_its_last_kernel():
    """What outlasts it is not its own; what outlasts the one before is."""
    assert accounts.of_piece(ONE, 0).parts == OWN
    assert accounts.of_piece(ONE, 0).contended == {"gemm": 3}


def test_a_step_is_the_sum_of_its_pieces_and_what_outlasts_the_last():
    """Three pieces of 20, then 10 of a sum."""
    found = accounts.of_step(trace(Stretch(ONE, "forward", 0, 0, 0, 0, runs=3, move=Move(20, 4, 1))))
    assert found.parts == Counter({part: 3 * time for part, time in OWN.items()}) + Counter({SYNC: 10})
    assert found.parts.total() == 70


def test_idle_time_has_the_reasons_of_the_account():
    (idle,) = metrics.idle(trace(Stretch(ONE, "forward", 0, 0, 0, 0, runs=3, move=Move(20, 4, 1)))).values()
    assert idle == metrics.Idle(communication=3 * (2 + 1), peer=0, stage=3 * 4, dependency=3)


def test_a_pass_counts_what_runs_before_and_after_as_other_layers():
    """The second of three layers, from 21 to its sum's end at 50: the sum of the first ends at 30, so that it is what
    is waited for from 25 to 29, and a kernel of the third runs from 41 to 45.
    """
    found = accounts.of_pass(trace(Stretch(ONE, "forward", 0, 0, 0, 0, runs=3, move=Move(20, 4, 1))), "forward", 1)
    assert found.parts == {
        "gemm": 4, "exposed send-receive": 2, IDLE: 1, "recomputation": 8, SYNC: 1 + 5, OTHER: 4 + 4,
    }  # fmt: skip


# ------------------------------------------------------------ searched by time


@settings(max_examples=40, deadline=None, derandomize=True)
@given(random_scenarios(fold=st.booleans(), layers=3, micro_batches=2), st.floats(0, 1), st.floats(0, 0.3))
def test_pieces_are_found_by_time(run, at, length):
    """Those whose window meets another, in order; and the last of each rank."""
    found = result(**run).trace
    start = int(at * found.end_ps)
    end = start + 1 + int(length * found.end_ps)
    wanted = [piece for piece in found.pieces if piece.window[0] < end and piece.window[1] > start]
    assert list(found.pieces_during(start, end)) == wanted
    for rank in found.copies:
        assert found.last_of(rank) == [piece for piece in found.pieces if rank in piece.recording.times][-1]


def test_a_repeat_is_searched_by_time():
    """Two layers of 20 in each of 100 micro-batches of 50."""
    layers = Stretch(ONE, "forward", 0, 0, 0, 0, runs=2, move=Move(20, 4, 1))
    found = trace(Repeat((layers,), 100, Move(50, 8, 0, 1)))
    assert [(piece.layer, piece.micro_batch) for piece in found.pieces_during(1020, 1055)] == [
        (0, 20), (1, 20), (0, 21),
    ]  # fmt: skip
    assert found.last_of(0) == found.pieces[-1]


# ------------------------------------------------------------ of simulations


@settings(max_examples=40, deadline=None, derandomize=True)
@given(random_scenarios(fold=st.just(True), layers=3, micro_batches=2))
def test_folded_runs_have_the_accounts_of_unfolded_ones(run):
    """Of the step, its passes and what each rank waits for; and they add up."""
    folded, unfolded = (result(**{**run, "fold": fold}) for fold in (True, False))
    one, other = folded.trace, unfolded.trace
    assert accounts.of_step(one) == accounts.of_step(other)
    assert accounts.of_step(one).parts.total() == one.end_ps
    for phase in ("forward", "backward"):
        assert accounts.of_pass(one, phase) == accounts.of_pass(other, phase)
        assert accounts.of_pass(one, phase).parts.total() == metrics.layer_window(one, phase)
    idle = metrics.idle(other)
    assert all(idle[copy] == own for rank, own in metrics.idle(one).items() for copy in one.copies[rank])


@settings(max_examples=40, deadline=None, derandomize=True)
@given(random_scenarios(fold=st.booleans(), layers=3, micro_batches=2))
def test_what_is_held_at_the_peak_is_the_row_of_the_memory_curve(run):
    found = result(**run)
    held = held_at(found.peak, found.trace, found.static.by_category())
    curve = found.memory_curve
    row = curve.iloc[int(curve["total_gib"].argmax())]
    assert sum(held.values()) == found.peak.bytes
    assert {name: size / GIB for name, size in held.items()} == pytest.approx(
        {
            name.removesuffix("_gib").replace("_", " "): row[name]
            for name in curve.columns
            if name.endswith("_gib") and name != "total_gib" and row[name]
        }
    )


def test_a_summary_names_what_is_waited_for():
    """Where something is."""
    for plan, expected in (("ring=4,ring_cut=contiguous", True), ("tp=8", False)):
        found = result(plan, seq_len=16384)
        assert bool(found.idle_s["peer"]) == expected
        assert (PEERS in summary(found).columns[0].cells) == expected


def rows_of(table):
    """The cells of a table, row by row."""
    return [*zip(*(column.cells for column in table.columns), strict=True)]


def test_a_summary_names_bubble_and_optimizer_where_there_are_any():
    rows = {row[0]: row[1] for row in rows_of(summary(STAGED))}
    assert rows["bubble"] == f"{100 * STAGED.bubble:.1f} %"
    assert rows["optimizer"] == f"{STAGED.optimizer_s * 1e3:.3f} ms"
    assert not {"bubble", "optimizer"} & {row[0] for row in rows_of(summary(result("tp=8")))}


def test_the_waterfall_in_a_table_adds_up():
    """Parts of half a percent and more by themselves, the others as one row, the step as the last."""
    *parts, last = rows_of(waterfall_table(STAGED))
    told = {name: float(share.removesuffix(" %")) for name, _, share in parts}
    step = STAGED.step_time_s
    assert {*told} == {name for name, took in STAGED.waterfall.items() if took >= 0.005 * step} | {"other"}
    assert told["model FLOPs at peak"] == pytest.approx(100 * STAGED.mfu, abs=0.051)
    assert sum(told.values()) == pytest.approx(100, abs=0.05 * len(told))
    assert last == ("step", f"{step * 1e3:.3f} ms", "100.0 %")


def test_the_peak_of_each_stage_is_told():
    rows = rows_of(stage_table(STAGED))
    assert [row[:2] for row in rows] == [("0", "0"), ("1", "2")]
    assert max(STAGED.stage_peaks, key=lambda spot: spot.bytes).operator == STAGED.peak_operator
    assert f"{STAGED.peak_bytes / GIB:.2f} GiB" in {row[2] for row in rows}
