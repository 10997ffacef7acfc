"""Steps of several pipeline stages: folded and as one program of each rank they are the same to the picosecond and
byte; figures that are read without a trace are those of the trace; a schedule worked by hand; published step times.
"""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pandas.testing import assert_frame_equal

from spsim import Scenario, load_model, simulate
from spsim.engine.pieces import Stretch
from spsim.engine.recording import COMPUTE_LANE, TaskInfo
from spsim.engine.tasks import Task
from spsim.engine.trace import Trace
from spsim.errors import InputError
from spsim.inputs.plan import parse_plan
from spsim.inputs.schedules import HALVED
from spsim.inputs.step_rules import refused_count
from spsim.results import metrics
from spsim.results.accounts import PEERS, STAGES, is_exposed, of_step
from spsim.results.derived import operator_name
from spsim.step.folding import Step
from spsim.step.halves import Halves
from spsim.step.itinerary import Run
from spsim.step.pipeline.clock import Clock
from spsim.step.pipeline.exchange import Exchange, score
from spsim.step.pipeline.orders import Action
from spsim.step.pipelined import Closed, Messages, run_pipeline
from spsim.step.prepared import prepared_layer
from spsim.step.ranks import Ranks
from spsim.step.segments import BlockPass, Part, Segment
from spsim.step.stages import Passes, PlacedChunk, Stages
from spsim.step.unfolded_pipeline import unfold_pipeline
from tests.cases import A100, H100, figures, model
from tests.test_pipeline_timing import by_hand

pytestmark = pytest.mark.slow


def staged(plan, micro_batches=4, *, hardware=H100, seq_len=256, **changes):
    """A small model's whole step under a plan."""
    changes = {"layers": 6, **changes}
    dp = parse_plan(plan).dp
    return Scenario(
        hardware=hardware,
        model=model(**changes),
        plan=plan,
        workload={"seq_len": seq_len, "global_batch": micro_batches * dp},
        scope="step",
    )


def both(case):
    """Folded and unfolded."""
    return simulate(case), simulate(case, fold=False)


def assert_equal(folded, unfolded):
    """Spans and changes of memory of every simulated rank, waits, peaks, and where the time goes."""
    ranks = {*folded.trace.copies}
    for found in ("spans", "memory"):
        one, other = (Counter(getattr(result.trace, found)) for result in (folded, unfolded))
        assert one == Counter({record: n for record, n in other.items() if record.rank in ranks})
    assert _waits(folded.trace, ranks) == _waits(unfolded.trace, ranks)
    assert folded.step_ps == unfolded.step_ps == unfolded.trace.end_ps
    for rank in ranks:  # all that passes have allocated is freed
        assert not sum(change.bytes for change in unfolded.trace.memory if change.rank == rank)
    accounts = [of_step(result.trace) for result in (folded, unfolded)]
    assert accounts[0] == accounts[1]
    assert accounts[0].parts.total() == folded.step_ps
    names = ("peak_bytes", "peak_operator", "exposed_ps", "idle_s", "weight_sync_ps", "compute_ps", "pass_ps", "bubble")
    for name in names:
        assert getattr(folded, name) == getattr(unfolded, name), name


def _waits(trace, ranks):
    return Counter((wait[:3], tuple(sorted(wait.flights, key=str))) for wait in trace.waits if wait.rank in ranks)


# ------------------------------------------------------------ folded and unfolded

CASES = [
    ("pp=2", 1, {}),
    ("pp=4", 3, {}),
    ("pp=2,virtual_pp=3", 6, {}),
    ("pp=3,virtual_pp=2,pp_overlap=false,tp=2,sequence_parallel", 6, {}),
    ("pp=2,virtual_pp=2,pp_group=4,pp_warmup_flush", 8, {"gated_mlp": True, "ffn_hidden": 704}),
    ("pp=2,virtual_pp=2,ulysses=2,distributed_optimizer", 4, {}),
    ("pp=2,dp=2,recompute=full", 4, {"tied_embeddings": False}),
    ("pp=3,pp_layout=Ett/t/tttL,recompute=selective", 4, {"attention": "unfused"}),
    ("pp=4", 4, {"layers": 7}),
    ("pp=2,pp_schedule=gpipe,ring=2", 4, {}),
    ("pp=2,virtual_pp=2,pp_schedule=looped_bfs", 5, {}),
    ("pp=2,pp_sends=torch", 12, {}),
    ("pp=2,ring=2,ring_cut=contiguous,dp=2", 3, {"causal": True}),
    ("pp=3,virtual_pp=2,pp_schedule=interleaved_zero_bubble,tp=2,sequence_parallel", 6, {}),
    ("pp=2,virtual_pp=2,pp_schedule=zbv,ring=2", 5, {}),
    ("pp=2,virtual_pp=2,pp_schedule=dualpipev,recompute=full", 9, {"tied_embeddings": False}),
]


@pytest.mark.parametrize(("plan", "micro_batches", "changes"), CASES)
def test_folded_equals_unfolded(plan, micro_batches, changes):
    """Tables of all ranks and the document, without any tolerance."""
    folded, unfolded = both(staged(plan, micro_batches, **changes))
    assert_equal(folded, unfolded)
    assert len(unfolded.trace.copies) == unfolded.scenario.plan.gpus
    assert_frame_equal(folded.spans, unfolded.spans, check_exact=True)
    curves = [own.memory_curve.sort_values("rank", kind="stable", ignore_index=True) for own in (folded, unfolded)]
    assert_frame_equal(*curves, check_exact=True)
    assert figures(folded) == figures(unfolded)


INNER = ("", "tp=2,", "tp=2,sequence_parallel,", "ulysses=2,", "ring=2,", "dp=2,", "dp=2,distributed_optimizer,")


@st.composite
def random_steps(draw):
    """Any schedule, way to send and spread of layers that libraries run, on two ranks a stage at most."""
    pp, virtual = draw(st.integers(2, 4)), draw(st.integers(1, 3))
    schedules = ["1f1b", "1f1b", "gpipe" if virtual == 1 else "looped_bfs", "interleaved_zero_bubble"]
    schedule = draw(st.sampled_from([*schedules, *(["zbv", "dualpipev"] if virtual == 2 else [])]))
    plan = f"pp={pp},virtual_pp={virtual},pp_schedule={schedule},{draw(st.sampled_from(INNER))}"
    if schedule == "1f1b":
        ways = ["pp_sends=torch,", ""]
        if virtual > 1:
            ways += ["pp_warmup_flush,", *(["pp_overlap=false,"] if pp > 2 else [])]
        plan += draw(st.sampled_from(ways))
    plan += f"recompute={draw(st.sampled_from(['none', 'selective', 'full']))}"
    halves = schedule in HALVED
    layers = draw(st.integers(max(1, pp * virtual - (0 if halves else 2)), pp * virtual + 3))
    if not halves and draw(st.booleans()):
        cuts = sorted(draw(st.lists(st.integers(0, layers), min_size=pp * virtual - 1, max_size=pp * virtual - 1)))
        counts = [stop - start for start, stop in zip([0, *cuts], [*cuts, layers], strict=True)]
        if all(counts[1:-1]):
            plan += ",pp_layout=E" + "/".join("t" * count for count in counts) + "L"
    valid = [number for number in range(1, 13) if refused_count(parse_plan(plan), number) is None]
    return {
        "plan": plan,
        "micro_batches": draw(st.sampled_from(valid)),
        "hardware": draw(st.sampled_from([A100, H100])),
        "seq_len": draw(st.sampled_from([128, 2048])),
        "layers": layers,
        "gated_mlp": draw(st.booleans()),
        "ffn_hidden": 704,
        "tied_embeddings": draw(st.booleans()),
    }


@settings(max_examples=12, deadline=None, derandomize=True)
@given(random_steps())
def test_random_steps_folded_equal_unfolded_ones(case):
    """Spans, memory, waits, accounts and figures."""
    folded, unfolded = both(staged(**case))
    assert_equal(folded, unfolded)
    assert_figures_are_those_of_the_trace(folded)


def assert_figures_are_those_of_the_trace(result):
    """What is read from passes and their number, beside what `metrics` finds in the trace that they make."""
    own, trace = result.staged, result.trace
    static = {rank: found.total for rank, found in result.statics.items()}
    assert own.end_ps == trace.end_ps
    assert own.idle == metrics.idle(trace)
    assert own.weight_sync_ps == metrics.weight_sync(trace)
    assert own.compute_by_class() == metrics.compute_by_class(trace, 0)
    assert {phase: own.layer_window(phase) for phase in ("forward", "backward")} == {
        phase: metrics.layer_window(trace, phase) for phase in ("forward", "backward")
    }
    peak = metrics.peak_memory(trace, static)
    assert (result.peak_bytes, result.peak_operator) == (peak.bytes, _named(trace, peak.task))
    for stage, spot in zip(own.stages, result.stage_peaks, strict=True):
        rank = own.ran.rank_of(stage)
        here = metrics.profile(trace.nodes, rank)
        assert spot == (stage, rank, static[rank] + here.highest, _named(trace, here.task))
        for room in (0, 1 << 16, (peak.bytes - static[peak.rank]) // 2, peak.bytes - static[peak.rank]):
            task = metrics.first_above(trace, rank, static[rank], static[rank] + room)
            assert own.first_above(stage, static[rank], static[rank] + room) == _named(trace, task)


def _named(trace, task):
    if task is None:
        return None
    piece = trace.piece_of(task)
    return operator_name(piece.recording.outline.labels[task - piece.first_task], piece.layer)


def test_ranks_that_differ_by_their_position_on_the_ring():
    """Of two stages with two ranks at each of two positions, four are simulated."""
    folded, unfolded = both(staged("pp=2,tp=2,ring=2,ring_cut=contiguous", 3, seq_len=2048, causal=True))
    assert {rank: [*copies] for rank, copies in folded.trace.copies.items()} == {
        0: [0, 1], 2: [2, 3], 4: [4, 5], 6: [6, 7],
    }  # fmt: skip
    assert_equal(folded, unfolded)
    assert folded.events < unfolded.events
    assert "position" in folded.reasons[0]


def test_too_many_ranks_that_differ_are_refused():
    """A ring of 16 in 64 micro-batches of 6 layers: more than is simulated one by one."""
    plan = "pp=2,ring=16,ring_cut=contiguous"
    with pytest.raises(InputError, match="at most 50,000 are simulated, not 98,304; use ring_cut=zigzag"):
        staged(plan, 64, seq_len=2048, causal=True)
    assert staged(plan, 64, seq_len=2048, causal=False).num_micro_batches == 64
    with pytest.raises(InputError, match=r"dp_overlap, DDP or FSDP with pp: .* use fold=True and ring_cut=zigzag"):
        simulate(staged("pp=2,ring=2,ring_cut=contiguous,dp=2,dp_overlap=gradients", 2, causal=True))


def test_the_trace_says_what_closes_the_step_and_what_is_sent():
    """Messages are of hidden 256 by 256 positions in 16 bits; the last stage has the head's gradients to sum, too."""
    result = simulate(staged("pp=2,dp=2", 2, layers=3, tied_embeddings=False))
    sent = {(info.name, info.sent_bytes) for info in result.trace.tasks if info.axis == "pp" and info.sent_bytes}
    assert sent == {("activation", 2 * 256 * 256), ("gradient", 2 * 256 * 256), ("gradient norm", 4)}
    names = [(info.name, info.message_bytes) for info in result.trace.tasks if info.collective]
    sums = [size for name, size in names if name == "weight gradients"]
    assert len(sums) == 2
    assert sums[0] != sums[1]
    assert [size for name, size in names if name == "gradient norm"] == [4, 4]


@pytest.mark.parametrize(
    ("plan", "sent"), [("pp=4", 1), ("pp=2,virtual_pp=3", 5), ("pp=4,virtual_pp=2,pp_schedule=zbv", 2)]
)
def test_messages_that_the_first_stage_sends(plan, sent):
    """2v − 1 for each micro-batch, as recorded runs of Megatron-Core and torch have it; of a V, whose last stage of the
    model is on the first rank, an activation and a gradient.
    """
    result = simulate(staged(plan, 4, layers=8))
    spans = [span for span in result.trace.spans if span.rank == 0 and span.lane.endswith("send")]
    assert len(spans) == 4 * sent
    assert result.comm_bytes_per_gpu_by_op["send_receive"] == 4 * sent * 2 * 256 * 256
    assert [(call.axis, call.calls) for call in result.collectives if call.collective == "send_receive"] == [
        ("pp", 4 * sent)
    ]


# ------------------------------------------------------------ by hand

UNIT = 60


def made_up(name, phase):
    """A block's pass of one kernel."""
    segment = Segment(name, phase, (Task(0, COMPUTE_LANE),), (TaskInfo(name, "gemm", phase),))
    return BlockPass((Part(segment),))


def run_by_hand(stages, chunks, micro_batches, exchange, transfer, units):
    """(folded nodes, unfolded nodes, step) of passes of `units` each, on stages of one rank."""
    blocks = {"layer": {phase: made_up(phase, phase) for phase in units}}
    names = [*units]
    ranks = Ranks(prepared_layer(model(), parse_plan(""), fold=True).mesh, "one")
    segments = {name: blocks["layer"][name].parts[0].segment for name in names}
    step = Step(
        (),
        {name: ranks.programs(segment) for name, segment in segments.items()},
        {name: {0: [UNIT * units[name]]} for name in names},
        dict.fromkeys(names, ()),
        0.1,
    )
    layout = Stages(
        [[PlacedChunk((Run("layer"),), stages * chunk + stage) for chunk in range(chunks)] for stage in range(stages)]
    )
    ways = [(s, (s + 1) % stages) for s in range(stages)]
    messages = Messages(0, {pair: transfer for way in ways for pair in (way, way[::-1])})
    closed = Closed([()], [0] * stages)
    clock = Clock("1f1b", stages, chunks, micro_batches, None, exchange)
    passes = Passes(blocks, Halves({}, {}))
    folded = run_pipeline(passes, layout, clock, step, messages, closed, stride=1)
    whole = score("1f1b", stages, chunks, micro_batches, None, exchange)
    unfolded = unfold_pipeline(passes, layout, whole, step, messages, closed, ranks)
    return folded.nodes, unfolded.nodes, max(folded.ends_ps)


def test_four_stages_eight_micro_batches_two_chunks_by_hand():
    """Interleaved 1F1B with overlapped exchanges, a forward pass of 1 and a backward pass of 2, transfers free: every
    start of every pass is that of the timeline worked out on paper, and the bubble (p − 1) / (v m).
    """
    *ran, step = run_by_hand(4, 2, 8, Exchange(overlap_p2p_comm=True), 0, {"forward": 1, "backward": 2})
    for nodes in ran:
        found: dict[int, list[tuple[Action, int]]] = {stage: [] for stage in range(4)}
        for node in sorted(nodes, key=lambda node: node.shift_ps + node.recording.window[0]):
            assert isinstance(node, Stretch)
            if node.layer is not None:
                ((rank, times),) = node.recording.times.items()
                kind = "F" if node.phase == "forward" else "B"
                action = Action(kind, node.layer // 4, node.micro_batch)
                assert times[0, 2] - times[0, 1] == UNIT * (1 if kind == "F" else 2)
                found[rank].append((action, int(node.shift_ps + times[0, 1]) // UNIT))
        assert [*found.values()] == by_hand()
    busy = 8 * 2 * 3 * UNIT
    assert step * 2 * 8 == busy * (2 * 8 + 4 - 1)


def test_where_the_time_of_two_stages_goes():
    """One micro-batch, F and B through two stages: the first waits while the second works and two messages travel."""
    case = staged("pp=2", 1)
    result = simulate(case)
    parts = of_step(result.trace).parts
    assert parts[PEERS] == 0
    transfer = sum(length for part, length in parts.items() if is_exposed(part))
    message = result.staged.ran.messages.transfer_ps[0, 1]
    idle = result.staged.idle
    assert [own.communication for own in idle.values()] == [2 * message, 2 * message]
    kernels = {
        rank: sum(s.end_ps - s.start_ps for s in result.trace.spans if s.rank == rank and s.lane == COMPUTE_LANE)
        for rank in result.trace.copies
    }
    last = result.staged.ran.ends_ps.index(result.step_ps)
    rank = result.staged.ran.rank_of(last)
    assert kernels[rank] + transfer + parts[STAGES] + parts["idle"] + parts["weight synchronisation"] == result.step_ps


# ------------------------------------------------------------ published


def test_replicas_are_not_free():
    """530B on 280 A100s and on eight times as many (Korthikanti et al. 2022, 6.3): 37.83 s and, with gradients summed
    without overlap, 39.15 s. It takes no less than a ring at the full rate of the NICs, and no more than measured.
    """
    plan = "tp=8,pp=35,virtual_pp=3,sequence_parallel,recompute=selective"
    one, eight = (
        simulate(
            Scenario(
                hardware=A100, model="gpt-530b", plan=f"{plan},dp={dp}",
                workload={"seq_len": 2048, "global_batch": 280 * dp}, scope="step",
            )
        )
        for dp in (1, 8)
    )  # fmt: skip
    layers = load_model("gpt-530b")
    largest = 12 * layers.hidden**2 * layers.layers / (8 * 35)
    assert 2 * 7 / 8 * 4 * largest / 25e9 < eight.step_time_s - one.step_time_s < 39.15 - 37.83


@pytest.mark.parametrize(
    ("plan", "micro_batches"),
    [
        ("pp=2", 4),
        ("pp=4,virtual_pp=2,tp=2,sequence_parallel", 12),
        ("pp=4,recompute=full", 9),
        ("pp=2,pp_schedule=gpipe,recompute=selective", 5),
        ("pp=2,virtual_pp=2,pp_schedule=zbv", 6),
    ],
)
def test_figures_of_stages_without_what_is_written_out(plan, micro_batches):
    """Memory of passes and of the fullest stage, and the ends of stages, are those of their nodes and moments."""
    result = simulate(staged(plan, micro_batches))
    found = result.staged
    profiles = [metrics.profile(trace.nodes, 0) for trace in found.traces]
    assert found.ran.levels is not None
    assert [level[:2] for level in found.ran.levels()] == [
        (own.highest, own.total) if own else (0, 0) for own in profiles
    ]
    assert result.peak_bytes == max(spot.bytes for spot in result.stage_peaks)
    assert found.ran.ends_ps == [own[-1][1][-1][2] for own in found.ran.closing]
    assert [own.at_ps for own in found.ran.alone] == [Trace(a.nodes, {0: (0,)}, list).end_ps for a in found.ran.alone]
