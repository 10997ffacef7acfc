"""Simulating identical ranks and identical passes once gives, bit for bit, what simulating all of them gives; and
ranks that differ differ as the cut of the ring says.
"""

from collections import defaultdict
from fractions import Fraction
from itertools import accumulate

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pandas.testing import assert_frame_equal

from spsim.inputs.plan import parse_plan
from spsim.program.instructions import Compute
from spsim.program.mesh import mesh_of
from spsim.step.ranks import Ranks
from spsim.work import FlashAttention
from tests.cases import H100, figures, program, random_scenarios, result

pytestmark = pytest.mark.slow

UNFUSED = {"attention": "unfused", "dropout": 0.1}
GQA = {"gated_mlp": True, "ffn_hidden": 704, "kv_heads": 2}

# plan, changes of the model, ranks simulated.
CASES = [
    ("tp=4", {}, 1),
    ("tp=8", UNFUSED, 1),
    ("tp=4,sequence_parallel", {}, 1),
    ("tp=4,sequence_parallel,recompute=selective", UNFUSED, 1),
    ("tp=4,sequence_parallel,recompute=full", {}, 1),
    ("tp=4,sequence_parallel,tp_backward_overlap=false", {}, 1),
    ("tp=4,sequence_parallel,keep_gathered", GQA, 1),
    ("tp=8", GQA, 1),
    ("ulysses=4", {}, 1),
    ("ulysses=8,distributed_optimizer", GQA, 1),
    ("ulysses=4,recompute=selective", UNFUSED, 1),
    ("ring=4", {}, 1),
    ("ring=4,recompute=full", GQA, 1),
    ("ring=16", GQA, 1),
    ("ring=16,recompute=full", {}, 1),
    ("ring=4,ring_kind=all_gather", UNFUSED, 1),
    ("ring=4,ring_kind=all_gather", {}, 1),
    ("ring=4,ring_cut=contiguous", {"causal": False}, 1),
    ("ring=2,ring_cut=contiguous", {}, 2),
    ("ring=4,ring_cut=contiguous", {}, 4),
    ("ring=8,ring_cut=contiguous", GQA, 8),
    ("ring=4,ring_cut=contiguous,recompute=full", {}, 4),
    ("ring=4,ring_cut=contiguous,ring_kind=all_gather", {}, 4),
    ("ulysses=2,ring=4", {}, 1),
    ("ulysses=2,ring=4,ring_cut=contiguous", {}, 4),
    ("tp=2,ring=4,ring_cut=contiguous,recompute=selective", {}, 4),
    ("tp=2,sequence_parallel,ulysses=2,ring=2", {}, 1),
    ("tp=2,sequence_parallel,ulysses=2,ring=2,ring_cut=contiguous", {}, 2),
    ("tp=2,sequence_parallel,ulysses=2,ring=2,ring_cut=contiguous,ring_kind=all_gather", GQA, 2),
    ("tp=2,sequence_parallel,ulysses=2,ring=2,recompute=full", GQA, 1),
    ("tp=8,ring=2", {}, 1),
    ("tp=4,ring=4,ring_cut=contiguous", GQA, 4),
]


@pytest.mark.parametrize("hardware", ["dgx-a100-80gb", H100])
@pytest.mark.parametrize(("plan", "changes", "simulated"), CASES)
def test_folded_equals_unfolded(plan, changes, simulated, hardware):
    """Spans of every rank, memory of every rank, and the document: equal without any tolerance."""
    run = {"hardware": hardware, "global_batch": 2, **changes}
    folded, unfolded = (result(plan, fold=fold, **run) for fold in (True, False))
    assert len(folded.trace.copies) == simulated
    assert len(unfolded.trace.copies) == unfolded.scenario.plan.gpus
    assert folded.folded
    assert not unfolded.folded
    assert folded.events < unfolded.events == len(unfolded.trace.spans)
    assert_equal(folded, unfolded)


def assert_equal(folded, unfolded):
    """Two results without any tolerance, but for what they say of the engine."""
    assert_frame_equal(folded.spans, unfolded.spans, check_exact=True)
    by_rank = [found.memory_curve.sort_values("rank", kind="stable", ignore_index=True) for found in (folded, unfolded)]
    assert_frame_equal(*by_rank, check_exact=True)
    assert figures(folded) == figures(unfolded)


@pytest.mark.parametrize(
    "plan", ["tp=4,sequence_parallel", "ulysses=4,recompute=selective", "ring=2,ring_cut=contiguous"]
)
def test_effects_of_assumed_numbers_are_those_of_unfolded_runs(plan):
    folded, unfolded = (result(plan, fold=fold, hardware=H100, layers=1).to_json() for fold in (True, False))
    assert folded["assumed_effects"]
    assert folded["assumed_effects"] == unfolded["assumed_effects"]
    assert folded["assumed"] == unfolded["assumed"]


def test_every_rank_has_its_rows():
    """One simulated rank stands for eight in both tables."""
    found = result("tp=2,sequence_parallel,ulysses=2,ring=2")
    assert {rank: tuple(copies) for rank, copies in found.trace.copies.items()} == {0: tuple(range(8))}
    assert set(found.spans["rank"]) == set(found.memory_curve["rank"]) == set(range(8))
    assert len(found.spans) == 8 * len(found.trace.spans)


def test_the_result_says_that_it_folded_and_why():
    """Reasons are part of the document."""
    assert "identical" in result("tp=8").to_json()["engine"]["reasons"][0]
    assert "ring" in result("tp=2,ring=4,ring_cut=contiguous").to_json()["engine"]["reasons"][0]
    assert result("tp=8", fold=False).to_json()["engine"] == {
        "events": len(result("tp=8", fold=False).trace.spans),
        "folded": False,
        "reasons": ["ranks are not folded: it was switched off", "layers are not folded: it was switched off"],
    }


# ------------------------------------------------------------ layers


@st.composite
def random_runs(draw):
    """Any plan, half of them rings whose ranks do different work, with one to six layers."""
    layers, micro_batches = draw(st.integers(1, 6)), draw(st.integers(1, 3))
    run = draw(random_scenarios(fold=st.just(True), layers=layers, micro_batches=micro_batches))
    if draw(st.booleans()):
        plan = run["plan"].replace("zigzag", "contiguous")
        run |= {"plan": plan, "causal": True, "seq_len": draw(st.sampled_from([256, 4096, 16384]))}
    return run


@settings(max_examples=20, deadline=None, derandomize=True)
@given(random_runs())
def test_folded_layers_equal_unfolded_ones(run):
    """Spans, memory and document of random plans, layers and micro-batches; the peak is the largest sum."""
    folded, unfolded = (result(**{**run, "fold": fold}) for fold in (True, False))
    assert_equal(folded, unfolded)
    assert folded.peak.bytes == folded.static.total + largest_sum(unfolded.trace)


def largest_sum(trace):
    """Over all ranks and instants, the sum of all changes up to and at that instant."""
    fullest = 0
    for rank in trace.copies:
        at = defaultdict(int)
        for change in trace.memory:
            at[change.time_ps] += change.bytes if change.rank == rank else 0
        fullest = max(fullest, *accumulate(at[time] for time in sorted(at)))
    return fullest


@pytest.mark.parametrize("plan", ["ring=4,ring_cut=contiguous", "tp=2,ring=2,ring_cut=contiguous,recompute=full"])
def test_skewed_ranks_enter_the_next_layer_apart(plan):
    """The second layer is not a copy of the first: its ranks begin apart; and still no span differs."""
    run = {"layers": 5, "global_batch": 2, "seq_len": 16384}
    folded, unfolded = (result(plan, fold=fold, **run) for fold in (True, False))
    kernels = unfolded.spans[(unfolded.spans["lane"] == "compute") & (unfolded.spans["micro_batch"] == 0)]
    forward = kernels[kernels["part"] == "forward"]
    begins = forward.groupby(["layer", "rank"])["start_us"].min().groupby("layer")
    skew = begins.max() - begins.min()
    assert skew[0] == 0
    assert (skew[1:] > 0).all()
    assert_equal(folded, unfolded)


@pytest.mark.parametrize("plan", ["", "tp=8", "tp=4,sequence_parallel", "ulysses=4,recompute=full", "ring=4"])
def test_events_of_identical_ranks_do_not_grow(plan):
    """One forward and one backward pass and the synchronisation, whatever the layers and micro-batches."""
    one = result(plan, layers=1)
    assert one.events == len(one.trace.spans)
    for layers, micro_batches in ((2, 1), (7, 3), (96, 2)):
        found = result(plan, layers=layers, global_batch=micro_batches)
        assert found.events == one.events
        assert found.trace.num_spans > one.trace.num_spans * (layers * micro_batches) // 2


@pytest.mark.parametrize("plan", ["ring=4,ring_cut=contiguous", "tp=2,ring=2,ring_cut=contiguous,recompute=full"])
def test_events_of_different_ranks_stop_growing(plan):
    """Ranks soon leave every layer as they entered it."""
    assert result(plan, layers=48, seq_len=16384).events == result(plan, layers=96, seq_len=16384).events


# ------------------------------------------------------------ the cut of the ring


def attention_flops(plan, degree, **changes):
    """Attention FLOPs of each ring position, forward and backward."""
    totals = defaultdict(int)
    for step in program(plan, **changes).instructions:
        if isinstance(step, Compute) and any(isinstance(work, FlashAttention) for work in step.work):
            for rank in range(degree):
                work = step.work[rank if len(step.work) > 1 else 0]
                totals[rank] += work.flops if work else 0
    return [totals[rank] for rank in range(degree)]


@pytest.mark.parametrize("kind", ["p2p", "all_gather"])
@pytest.mark.parametrize("degree", [2, 4, 8])
def test_contiguous_ranks_do_odd_multiples_of_work(degree, kind):
    """Rank r attends to r whole chunks and half of its own: (2r + 1)/P of the mean; the last (2P - 1)/P."""
    flops = attention_flops(f"ring={degree},ring_cut=contiguous,ring_kind={kind}", degree)
    mean = Fraction(sum(flops), degree)
    assert [work / mean for work in flops] == [Fraction(2 * r + 1, degree) for r in range(degree)]


@pytest.mark.parametrize("kind", ["p2p", "all_gather"])
@pytest.mark.parametrize("degree", [2, 4, 8])
def test_zigzag_ranks_do_the_same_work(degree, kind):
    """All equal, and together the same as contiguous ranks: half of the square."""
    zigzag = attention_flops(f"ring={degree},ring_kind={kind}", degree)
    contiguous = attention_flops(f"ring={degree},ring_cut=contiguous,ring_kind={kind}", degree)
    assert len(set(zigzag)) == 1
    assert sum(zigzag) == sum(contiguous) == sum(attention_flops("", 1))


def attention_time(found):
    """Seconds of core attention of each rank, in order."""
    rows = found.spans[found.spans["operator_class"] == "attention"]
    return list(rows.groupby("rank")["duration_us"].sum())


LONG = {"seq_len": 65536, "layers": 1, "hidden": 1024}


def test_the_timeline_shows_the_imbalance():
    """At 64 Ki tokens kernels are long: the last of four ranks needs 7/4 of the mean time, the first 1/4.

    Within 1 / (1 - 24 / 108): waiting messages hold so many of the SMs.
    """
    times = attention_time(result("ring=4,ring_cut=contiguous", **LONG))
    mean = sum(times) / 4
    assert [time / mean for time in times] == pytest.approx([0.25, 0.75, 1.25, 1.75], rel=0.286)
    assert len(set(attention_time(result("ring=4", **LONG)))) == 1


def test_an_unbalanced_ring_is_slower():
    """The slowest rank sets the pace, all ranks end together, and those with less work wait."""
    zigzag, contiguous = (result(f"ring=4,ring_cut={cut}", **LONG) for cut in ("zigzag", "contiguous"))
    assert contiguous.layer_forward_s > 1.3 * zigzag.layer_forward_s
    assert contiguous.idle_s["peer"] > 5 * zigzag.exposed_comm_s
    assert zigzag.idle_s["peer"] == 0
    ends = contiguous.spans.groupby("rank")["end_us"].max()
    assert ends.min() == ends.max()


def test_ranks_that_stand_for_all_of_a_stage_are_not_written_out():
    """Of 131,072: a step costs what it costs on fewer."""
    copies = Ranks(mesh_of(parse_plan("tp=8,pp=16,dp=1024")), "one").copies_on(16)
    assert [*copies] == [*range(0, 131072, 8192)]
    assert all(isinstance(own, range) and own[0] == rank and len(own) == 8192 for rank, own in copies.items())
