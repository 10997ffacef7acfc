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

from spsim.engine.recording import BufferUse, TaskInfo
from spsim.engine.tasks import Meeting, RankProgram, Task
from spsim.engine.trace import Trace
from spsim.program.instructions import Compute
from spsim.results.metrics import peak_memory
from spsim.step.folding import Step, run_step
from spsim.step.schedule import Item, LayerSchedule, Pass
from spsim.work import FlashAttention
from tests.cases import H100, program, random_scenarios, result

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
    documents = [{k: v for k, v in found.to_json().items() if k != "engine"} for found in (folded, unfolded)]
    assert documents[0] == documents[1]


def test_every_rank_has_its_rows():
    """One simulated rank stands for eight in both tables."""
    found = result("tp=2,sequence_parallel,ulysses=2,ring=2")
    assert found.trace.copies == {0: tuple(range(8))}
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


@settings(max_examples=40, deadline=None, derandomize=True)
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


# ------------------------------------------------------------ by hand, with a communication that nobody reads

RANKS = (0, 1)
FORWARD_BUFFERS = (
    BufferUse("x", "activations", None, (0,), outlives=False),
    BufferUse("kept", "activations", 0, (), outlives=True),
    BufferUse("sent", "communication buffers", 0, (1,), outlives=False),
    BufferUse("y", "activations", 2, (), outlives=True),
)
BACKWARD_BUFFERS = (
    BufferUse("y gradient", "activations", None, (1,), outlives=False),
    BufferUse("kept", "activations", None, (2, 1), outlives=False),
    BufferUse("x gradient", "activations", 2, (), outlives=True),
)
SIZES = {"forward": (10, 3, 7, 10), "backward": (10, 3, 10), "weight_sync": ()}
FORWARD = (("compute", ()), ("tp", (0,)), ("compute", (0,)))
"""A kernel, a collective that nobody waits for, a kernel."""
BACKWARD = (("tp", ()), ("compute", ()), ("compute", (0,)))
"""A collective that reads nothing of its pass, a kernel beside it, a kernel that reads it."""
SYNC = (("dp", ()),)


def hand_made(phase, tasks, buffers=(), entry=None, handed_on=None):
    """(pass, programs of two ranks that meet in every communication)."""
    items = tuple(Item(lane, ("tp",) if lane != "compute" else (), needs=needs) for lane, needs in tasks)
    labels = tuple(TaskInfo(f"{phase} {i}", "elementwise", phase) for i in range(len(tasks)))
    found = Pass(phase, (), items, buffers, (), entry, handed_on, labels)
    meetings = [(Meeting((i, 0), len(RANKS)),) if lane != "compute" else () for i, (lane, _) in enumerate(tasks)]
    own = [Task(i, lane, needs=needs, meetings=meetings[i]) for i, (lane, needs) in enumerate(tasks)]
    return found, {rank: RankProgram(own) for rank in RANKS}


def hand_made_step(durations, layers=3, micro_batches=2, slowdown=0.0, layer=None):
    """`durations` by phase, rank and task, those beyond a pass left out; passes as above or without buffers."""
    if layer is None:
        forward, up = hand_made("forward", FORWARD, FORWARD_BUFFERS, 0, 3)
        backward, down = hand_made("backward", BACKWARD, BACKWARD_BUFFERS, 0, 2)
    else:
        (forward, up), (backward, down) = map(hand_made, ("forward", "backward"), layer)
    sync, end = hand_made("weight_sync", SYNC)
    schedule = LayerSchedule(
        forward, backward, sync, (), dict.fromkeys(RANKS, 0), {rank: (rank,) for rank in RANKS}, {},
        {"forward": up, "backward": down, "weight_sync": end},
    )  # fmt: skip
    counts = {"forward": len(forward.items), "backward": len(backward.items), "weight_sync": len(sync.items)}
    own = {phase: {rank: durations[phase][rank][:count] for rank in RANKS} for phase, count in counts.items()}
    sizes = SIZES if layer is None else dict.fromkeys(SIZES, ())
    return Step(schedule, own, sizes, layers, micro_batches, slowdown)


def both(step):
    """(folded trace, unfolded trace, events, reason)."""
    stretches, events, reason = run_step(step, fold=True)
    traces = [
        Trace(found, step.schedule.copies, lambda piece: piece.recording.outline.labels)
        for found in (stretches, run_step(step, fold=False)[0])
    ]
    return (*traces, events, reason)


def equal(one, other):
    """Whether two traces have the same spans, memory, labels and end."""
    names = ("spans", "memory", "tasks", "end_ps")
    return all(getattr(one, name) == getattr(other, name) for name in names)


def same_on_all(forward, backward, sync):
    """Durations of two ranks that do the same work."""
    return {
        "forward": dict.fromkeys(RANKS, forward),
        "backward": dict.fromkeys(RANKS, backward),
        "weight_sync": dict.fromkeys(RANKS, sync),
    }


def test_a_communication_that_ends_with_the_kernels_is_folded():
    """Kernels of 4 and 6 ps, a collective of 6 beside the second: 10 a layer, and 3 + 5 back, then 2 at the end."""
    folded, unfolded, events, reason = both(hand_made_step(same_on_all([4, 6, 6], [2, 3, 5], [2])))
    assert reason == ""
    assert events == len(RANKS) * (3 + 3 + 1)
    assert folded.end_ps == 2 * 3 * (10 + 8) + 2
    assert equal(folded, unfolded)
    assert sum(change.bytes for change in folded.memory) == 0


def test_layers_are_not_folded_where_a_communication_outlasts_the_kernels():
    """The collective takes 1 ps longer than the kernel beside it. The lane is free at 11, 21 and 31, the backward
    pass begins at 30 with a collective of 2 behind that of the last layer, done at 33 as is its first kernel.
    """
    step = hand_made_step(same_on_all([4, 7, 6], [2, 3, 5], [2]), micro_batches=1)
    folded, unfolded, events, reason = both(step)
    assert reason == "layers are not folded: a communication outlasts the kernels of its pass"
    assert events == len(folded.spans) == len(RANKS) * (3 * (3 + 3) + 1)
    assert [(s.posted_ps, s.end_ps) for s in folded.spans if s.rank == 0 and s.lane == "tp"] == [
        (4, 11), (14, 21), (24, 31), (31, 33), (38, 40), (46, 48),
    ]  # fmt: skip
    assert folded.end_ps == 30 + 8 * 3 + 2
    assert equal(folded, unfolded)


def test_a_collective_that_reads_nothing_of_its_pass_waits_for_the_kernel_before():
    """Unfolded, too: nothing is issued before the pass that it belongs to is reached, 30 and every 8 ps on."""
    _, unfolded, _, _ = both(hand_made_step(same_on_all([4, 6, 6], [2, 3, 5], [2]), micro_batches=1))
    posted = [s.posted_ps for s in unfolded.spans if s.rank == 0 and s.lane == "tp"]
    assert posted[3:] == [30, 38, 46]


@st.composite
def passes(draw):
    """Up to six kernels and collectives on two lanes, each of which may need any before it; one kernel at least."""
    lanes = draw(st.lists(st.sampled_from(["compute", "compute", "tp", "ring"]), max_size=5))
    lanes.insert(draw(st.integers(0, len(lanes))), "compute")
    return tuple(
        (lane, tuple(sorted(draw(st.sets(st.integers(0, i - 1), max_size=2))) if i else ()))
        for i, lane in enumerate(lanes)
    )


PHASES = ("forward", "backward", "weight_sync")


def durations_of_passes(shortest):
    """Picoseconds by phase, rank and task, for passes of up to six tasks."""
    of_rank = st.lists(st.integers(shortest, 9), min_size=6, max_size=6)
    return st.fixed_dictionaries(dict.fromkeys(PHASES, st.tuples(*[of_rank for _ in RANKS])))


@settings(max_examples=500, deadline=None, derandomize=True)
@given(
    st.tuples(passes(), passes()),
    durations_of_passes(shortest=0),
    st.integers(1, 6),
    st.integers(1, 3),
    st.sampled_from([0.0, 0.15, 0.5]),
)
def test_folding_turns_itself_off_exactly_where_it_must(layer, durations, layers, micro_batches, slowdown):
    """Random passes of two ranks: always equal, and a reason is given if and only if, unfolded, some communication
    ends after the last kernel of its pass.
    """
    step = hand_made_step(durations, layers, micro_batches, slowdown, layer)
    folded, unfolded, _, reason = both(step)
    assert equal(folded, unfolded)
    assert bool(reason) == any(map(outlasts, unfolded.pieces))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(durations_of_passes(shortest=1), st.integers(1, 6), st.integers(1, 3))
def test_memory_of_both_is_equal_and_returns_to_zero(durations, layers, micro_batches):
    """Buffers of the passes above, whatever outlasts what; all is freed in the end, on both ranks. The peak is the
    largest sum where the passes of a rank do not overlap.
    """
    folded, unfolded, _, reason = both(hand_made_step(durations, layers, micro_batches, slowdown=0.15))
    assert equal(folded, unfolded)
    assert [sum(c.bytes for c in folded.memory if c.rank == rank) for rank in RANKS] == [0, 0]
    if not reason:
        assert peak_memory(folded, 0).bytes == peak_memory(unfolded, 0).bytes == largest_sum(unfolded)
        assert folded.end_ps == max(span.end_ps for span in unfolded.spans)


def outlasts(piece):
    """Whether a communication of a pass ends after the last kernel of its rank."""
    kernels, others = defaultdict(int), defaultdict(int)
    for span in piece.recording.spans:
        ends = kernels if span.lane == "compute" else others
        ends[span.rank] = max(ends[span.rank], span.end_ps)
    return bool(kernels) and any(others[rank] > kernels[rank] for rank in kernels)


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

    Within 1 / (1 - 0.15): waiting messages hold part of a device.
    """
    times = attention_time(result("ring=4,ring_cut=contiguous", **LONG))
    mean = sum(times) / 4
    assert [time / mean for time in times] == pytest.approx([0.25, 0.75, 1.25, 1.75], rel=0.18)
    assert len(set(attention_time(result("ring=4", **LONG)))) == 1


def test_an_unbalanced_ring_is_slower():
    """The slowest rank sets the pace, all ranks end together, and those with less work wait."""
    zigzag, contiguous = (result(f"ring=4,ring_cut={cut}", **LONG) for cut in ("zigzag", "contiguous"))
    assert contiguous.layer_forward_s > 1.3 * zigzag.layer_forward_s
    assert contiguous.exposed_comm_s > 10 * zigzag.exposed_comm_s
    ends = contiguous.spans.groupby("rank")["end_us"].max()
    assert ends.min() == ends.max()
