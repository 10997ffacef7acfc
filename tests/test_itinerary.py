"""Itineraries that no model makes, folded and unfolded: communication that outlasts its segment, lanes that fall
behind for ever, two stages of a pipeline, and random ones of everything.
"""

from collections import defaultdict
from itertools import accumulate

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spsim.engine.pieces import Repeat
from spsim.engine.recording import BufferUse, TaskInfo
from spsim.engine.tasks import Meeting, RankProgram, Task
from spsim.engine.trace import Trace
from spsim.results.accounts import of_step
from spsim.results.held import held_at
from spsim.results.metrics import Idle, exposed_communication, idle, peak_memory
from spsim.step.folding import Step, fold_step
from spsim.step.itinerary import Loop, Visit, segments_of
from spsim.step.segments import Call, Segment
from spsim.step.unfolded import unfold_step

pytestmark = pytest.mark.slow

RANKS = (0, 1)


def segment(name, tasks, *, phase="forward", buffers=(), exports=(), joins=(), kinds=None):
    """A segment of (lane, needs); whatever is not on the compute lane is a communication, of the kind of its lane or
    of that in `kinds` by its place.
    """
    own = tuple(Task(index, lane, needs=tuple(needs)) for index, (lane, needs) in enumerate(tasks))
    kinds = {task.id: task.lane for task in own if task.lane != "compute"} | (kinds or {})
    labels = tuple(
        TaskInfo(f"{name} {task.id}", "elementwise", phase, collective=kinds.get(task.id, "")) for task in own
    )
    calls = {task.id: Call((task.lane,)) for task in own if task.lane != "compute"}
    return Segment(name, phase, own, labels, calls, dict(exports), frozenset(joins), tuple(buffers))


def programs(found, ranks, alone=()):
    """The program of each rank: all meet in every communication, but on lanes where each is `alone`."""
    made = {}
    for rank in ranks:
        calls = defaultdict(int)
        tasks = []
        for task in found.tasks:
            if task.id in found.calls:
                communicator = (task.lane, rank) if task.lane in alone else (task.lane, tuple(ranks))
                calls[communicator] += 1
                parties = 1 if task.lane in alone else len(ranks)
                meetings = (Meeting((communicator, calls[communicator]), parties),)
                task = Task(task.id, task.lane, needs=task.needs, meetings=meetings)
            tasks.append(task)
        made[rank] = RankProgram(tasks)
    return made


def step(itinerary, durations, *, ranks=RANKS, slowdown=0.0, sizes=None, alone=()):
    """`durations` by segment, of each rank or the same for all; `ranks` likewise."""
    segments = {found.name: found for found in segments_of(itinerary)}
    by_segment = {name: ranks[name] if isinstance(ranks, dict) else ranks for name in segments}
    own = {
        name: {rank: given[rank] if isinstance(given, dict) else given for rank in by_segment[name]}
        for name, given in durations.items()
        if name in segments
    }
    made = {name: programs(found, by_segment[name], alone) for name, found in segments.items()}
    return Step(itinerary, made, own, sizes or dict.fromkeys(segments, ()), slowdown)


def both(made):
    """(folded trace, unfolded trace, tasks through the engine when folded)."""
    ranks = sorted({rank for programs in made.programs.values() for rank in programs})
    folded, unfolded = fold_step(made), unfold_step(made)
    traces = [
        Trace(
            walked.nodes,
            {rank: (rank,) for rank in ranks},
            lambda piece: piece.recording.outline.labels,
            {},
            walked.overlapping,
        )
        for walked in (folded, unfolded)
    ]
    return (*traces, folded.events)


def assert_equal(one, other):
    """Two traces have the same spans, memory, labels, places and end; the same peak, and the same accounts."""
    assert one.spans == other.spans
    assert one.memory == other.memory
    assert one.tasks == other.tasks
    assert one.end_ps == other.end_ps == max(span.end_ps for span in other.spans)
    assert [piece[1:4] + piece[5:6] for piece in one.pieces] == [piece[1:4] + piece[5:6] for piece in other.pieces]
    for piece in one.pieces:
        assert one.piece_of(piece.first_task)[1:6] == piece[1:6]
    assert peak_memory(one, defaultdict(int))[:2] == peak_memory(other, defaultdict(int))[:2]
    assert peak_memory(one, defaultdict(int)).bytes == largest_sum(other)
    assert held_at(peak_memory(one, defaultdict(int)), one, {}) == held_at(
        peak_memory(other, defaultdict(int)), other, {}
    )
    assert of_step(one) == of_step(other)
    assert of_step(one).parts.total() == one.end_ps
    assert idle(one) == idle(other)
    middle, moment = one.end_ps // 2, one.end_ps // 2 + 1
    found = [piece for piece in one.pieces if piece.window[0] < moment and piece.window[1] > middle]
    assert list(one.pieces_during(middle, moment)) == found


def largest_sum(trace):
    """Over all ranks and instants, the sum of all changes up to and at that instant."""
    fullest = 0
    for rank in trace.copies:
        at = defaultdict(int)
        for change in trace.memory:
            at[change.time_ps] += change.bytes if change.rank == rank else 0
        fullest = max(fullest, *accumulate(at[time] for time in sorted(at))) if at else fullest
    return fullest


def layers(first, second, count, micro_batches=1):
    """Up through one segment, down through the other."""
    up, down = Loop((Visit(first, 0, 0),), count, layers=1), Loop((Visit(second, count - 1, 0),), count, layers=-1)
    return (Loop((up, down), micro_batches, micro_batches=1),)


# ------------------------------------------------------------ by hand

FORWARD = segment("forward", [("compute", ()), ("tp", (0,)), ("compute", (0,))])
"""A kernel, a collective that nobody waits for, a kernel."""
BACKWARD = segment("backward", [("tp", ()), ("compute", ()), ("compute", (0,))], phase="backward")
"""A collective that reads nothing of its segment, a kernel beside it, a kernel that reads it."""


def test_a_communication_that_ends_with_the_kernels():
    """Kernels of 4 and 6 ps, a collective of 6 beside the second: 10 a layer, and 3 + 5 back."""
    made = step(layers(FORWARD, BACKWARD, 3, 2), {"forward": [4, 6, 6], "backward": [2, 3, 5]})
    folded, unfolded, events = both(made)
    assert events == len(RANKS) * (3 + 3)
    assert folded.end_ps == 2 * 3 * (10 + 8)
    assert_equal(folded, unfolded)


def test_a_communication_that_outlasts_its_segment():
    """The collective takes 1 ps longer than the kernel beside it. The lane is free at 11, 21 and 31, the backward
    pass begins at 30 with a collective of 2 behind that of the last layer, done at 33 as is its first kernel.

    Two states of the forward pass, free and busy for 1 ps, and of the backward pass likewise: four runs.
    """
    made = step(layers(FORWARD, BACKWARD, 5), {"forward": [4, 7, 6], "backward": [2, 3, 5]})
    folded, unfolded, events = both(made)
    assert events == 4 * len(RANKS) * 3
    assert [(s.posted_ps, s.end_ps) for s in folded.spans if s.rank == 0 and s.lane == "tp"] == [
        (4, 11), (14, 21), (24, 31), (34, 41), (44, 51), (51, 53), (58, 60), (66, 68), (74, 76), (82, 84),
    ]  # fmt: skip
    assert folded.end_ps == 50 + 8 * 5
    assert_equal(folded, unfolded)


def test_kinds_that_share_a_lane_are_told_apart():
    """A kernel of 10 beside a gather of 4 and a scatter of 8 that nobody waits for, then a kernel of 1 that waits for
    the lane: 2 of the scatter are exposed, but nothing of the gather.
    """
    first = segment("first", [("compute", ()), ("dp", ()), ("dp", ())], kinds={1: "all_gather", 2: "reduce_scatter"})
    last = segment("last", [("compute", ())], phase="backward", joins={"dp"})
    folded, unfolded, _ = both(step((Visit(first, 0, 0), Visit(last, 0, 0)), {"first": [10, 4, 8], "last": [1]}))
    assert of_step(folded).parts == {"elementwise": 11, "exposed reduce-scatter": 2}
    assert_equal(folded, unfolded)
    flights = [flight.kind for flight in folded.pieces[1].recording.flights[0]]
    assert flights == ["reduce_scatter"]
    assert_equal(*both(step((Loop((Visit(first, 0, 0),), 6, layers=1),), {"first": [10, 4, 8]}))[:2])


def test_a_collective_that_reads_nothing_of_its_segment_waits_for_the_kernel_before():
    """Nothing is issued before the segment that it belongs to is reached, 30 and every 8 ps on."""
    made = step(layers(FORWARD, BACKWARD, 3), {"forward": [4, 6, 6], "backward": [2, 3, 5]})
    for found in both(made)[:2]:
        posted = [s.posted_ps for s in found.spans if s.rank == 0 and s.lane == "tp"]
        assert posted[3:] == [30, 38, 46]


BUCKET = segment("bucket", [("compute", ()), ("dp", (0,))], phase="backward")
"""A kernel, and a collective over its gradients that nobody in the block waits for."""
OPTIMIZER = segment("optimizer", [("compute", ())], phase="optimizer", joins=["dp"])
"""A kernel that waits for all gradients."""


@pytest.mark.parametrize(
    ("collective", "end", "runs"),
    [
        # Done with the next layer's kernel: the lane is free again, 80 layers of 100 and the rest of the last.
        (30, 80 * 100 + 30 + 7, 3), (90, 80 * 100 + 90 + 7, 3), (100, 80 * 100 + 100 + 7, 3),
        # The lane falls behind by 2 and by 50 ps a layer: 80 collectives in a row from 100 on.
        (102, 100 + 80 * 102 + 7, 4), (150, 100 + 80 * 150 + 7, 4),
    ],
)  # fmt: skip
@pytest.mark.parametrize("slowdown", [0.0, 0.25])
def test_gradients_behind_the_next_layer(collective, end, runs, slowdown):
    """80 layers of a kernel of 100 ps, each followed by a collective beside the next, and an optimizer of 7 ps."""
    loop = Loop((Visit(BUCKET, 79, 0),), 80, layers=-1)
    made = step(
        (loop, Visit(OPTIMIZER)), {"bucket": [100, collective], "optimizer": [7]}, ranks=(0,), slowdown=slowdown
    )
    folded, unfolded, events = both(made)
    if not slowdown:
        assert folded.end_ps == end
    assert events <= 2 * runs + 3
    assert len(folded.nodes) <= 4
    assert_equal(folded, unfolded)


def test_a_lane_that_is_behind_catches_up():
    """Ten long collectives leave the lane 950 ps behind; in the next loop it catches up 60 ps a run, and then idles."""
    behind, ahead = (segment(name, [("compute", ()), ("dp", (0,))]) for name in ("behind", "ahead"))
    itinerary = (Loop((Visit(behind, 0),), 10, layers=1), Loop((Visit(ahead, 10),), 40, layers=1))
    folded, unfolded, events = both(step(itinerary, {"behind": [100, 195], "ahead": [100, 40]}, ranks=(0,)))
    assert_equal(folded, unfolded)
    assert events < 50
    assert [s.posted_ps for s in folded.spans if s.lane == "dp"][-1] == 50 * 100


# ------------------------------------------------------------ a pipeline of two stages

UP = [segment(f"up {stage}", [("compute", ())]) for stage in (0, 1)]
DOWN = [segment(f"down {stage}", [("compute", ())], phase="backward", joins=["pp"]) for stage in (0, 1)]
LAST = segment("down last", [("compute", ()), ("dp", (0,))], phase="backward", joins=["pp"])
RECEIVE = segment("up after message", [("compute", ())], joins=["pp"])
SEND = segment("message", [("pp", ())])
FIRST = dict.fromkeys(("up 0", "down 0", "down last"), (0,))
SECOND = dict.fromkeys(("up after message", "down 1"), (1,))
ONE_F_ONE_B = {**FIRST, **SECOND, "message": RANKS}


def one_f_one_b(micro_batches):
    """1F1B on two stages: one micro-batch of warm-up on the first; then an activation goes up while a gradient comes
    down, in one message that both wait for.
    """
    up0, down0 = (lambda m, s=s: Visit(s, 0, m) for s in (UP[0], DOWN[0]))
    up1, down1 = (lambda m, s=s: Visit(s, 1, m) for s in (RECEIVE, DOWN[1]))
    message = Visit(SEND, None, None)
    steady = Loop((up0(1), up1(0), down1(0), message, down0(0)), micro_batches - 1, micro_batches=1)
    last = micro_batches - 1
    return (up0(0), message, steady, up1(last), down1(last), message, Visit(LAST, 0, last))


TIMES = {
    "up 0": [30], "up after message": [30], "down 0": [60], "down 1": [60], "down last": [60, 25], "message": [5],
}  # fmt: skip


@pytest.mark.parametrize("micro_batches", [1, 2, 3, 8, 64])
def test_one_forward_one_backward(micro_batches):
    """The second stage paces: after 30 + 5 ps it takes 90 for each micro-batch and 5 for a message, and the first has
    60 + 25 left. The steady state is run once, whatever the number of micro-batches.
    """
    made = step(one_f_one_b(micro_batches), TIMES, ranks=ONE_F_ONE_B)
    folded, unfolded, events = both(made)
    assert_equal(folded, unfolded)
    assert folded.end_ps == 30 + 5 + 95 * micro_batches + 60 + 25
    assert events <= 40
    if micro_batches >= 8:
        assert any(isinstance(node, Repeat) and node.runs >= micro_batches - 4 for node in folded.nodes)


def test_why_a_stage_idles():
    """Two micro-batches. Stage 0: up 0-30, message 30-35, for which it does not wait, up 30-60; the next one it posts
    at 60 and the other at 125, after its own up and down from 35 on; down 130-190, posts the last, which the other
    comes to at 220 after up and down from 130 on; down 225-285.
    """
    folded, _, _ = both(step(one_f_one_b(2), TIMES, ranks=ONE_F_ONE_B))
    found = [(s.rank, s.lane, s.posted_ps, s.start_ps, s.end_ps) for s in folded.spans]
    assert found[:6] == [
        (0, "compute", 0, 0, 30),
        (0, "pp", 30, 30, 35), (1, "pp", 0, 30, 35),
        (0, "compute", 30, 30, 60),
        (1, "compute", 35, 35, 65),
        (1, "compute", 65, 65, 125),
    ]  # fmt: skip
    # 60-125 and 190-220 for the other stage, and two messages of 5 ps.
    assert idle(folded)[0] == Idle(communication=5 + 5, stage=65 + 30)
    # 0-30 for the first message, and two messages of 5 ps.
    assert idle(folded)[1] == Idle(communication=5 + 5, stage=30)
    assert exposed_communication(folded) == {0: 10, 1: 10}


# ------------------------------------------------------------ random ones


@st.composite
def random_segments(draw, name, shared=True):
    """Up to five kernels and collectives, at least one kernel; what outlasts it may be waited for later."""
    lanes = draw(st.lists(st.sampled_from(["compute", "compute", "tp", "ring", "dp"]), max_size=4))
    lanes.insert(draw(st.integers(0, len(lanes))), "compute")
    tasks = []
    for index, lane in enumerate(lanes):
        needs = draw(st.sets(st.integers(0, index - 1), max_size=2)) if index else set()
        names = draw(st.sets(st.sampled_from(["a", "b"]), max_size=1)) if shared else set()
        tasks.append((lane, (*sorted(needs), *sorted(names))))
    calls = [index for index, lane in enumerate(lanes) if lane != "compute"]
    exports = (
        {name: draw(st.sampled_from(calls)) for name in draw(st.sets(st.sampled_from(["a", "b"])))} if calls else {}
    )
    joins = draw(st.sets(st.sampled_from(["tp", "ring", "dp"]), max_size=1))
    buffers = []
    for index in range(len(lanes)):
        readers = draw(st.sets(st.integers(index, len(lanes) - 1), max_size=2))
        buffers.append(BufferUse(f"{name} {index}", "temporary", index, tuple(sorted(readers)), draw(st.booleans())))
    kept = [i for i, buffer in enumerate(buffers) if buffer.outlives]
    found = tuple(BufferUse(f"{name} found {i}", "temporary", None, (len(lanes) - 1,), False) for i in kept[:1])
    return segment(name, tasks, exports=exports, joins=joins, buffers=(*buffers, *found))


@st.composite
def random_itineraries(draw, stages):
    """Visits in up to three levels of loops; stages meet in messages."""
    made = {}
    for stage in range(stages):
        for number in range(draw(st.integers(1, 2))):
            name = f"{number} of stage {stage}"
            made[name] = draw(random_segments(name)), (2 * stage, 2 * stage + 1)
    if stages > 1:
        made["message"] = segment("message", [("pp", ())]), tuple(range(2 * stages))
    names = st.sampled_from(sorted(made))
    visit = names.map(lambda name: Visit(made[name][0], 0, 0))
    loops = st.recursive(
        visit,
        lambda inner: st.builds(
            lambda body, runs, layers, micro: Loop(tuple(body), runs, layers, micro),
            st.lists(inner, min_size=1, max_size=3), st.integers(1, 5), st.integers(0, 0), st.integers(0, 0),
        ),
        max_leaves=4,
    )  # fmt: skip
    itinerary = tuple(draw(st.lists(loops, min_size=1, max_size=3)))
    used = {found.name for found in segments_of(itinerary)}
    ranks = {name: own for name, (_, own) in made.items() if name in used}
    same = draw(st.booleans())
    of_task = st.sampled_from([0, 1, 2, 3, 5, 8, 30]) if draw(st.booleans()) else st.integers(1, 9)
    durations, sizes = {}, {}
    for name in used:
        tasks = len(made[name][0].tasks)
        one = draw(st.lists(of_task, min_size=tasks, max_size=tasks))
        other = one if same else draw(st.lists(of_task, min_size=tasks, max_size=tasks))
        durations[name] = {rank: one if rank % 2 == 0 else other for rank in ranks[name]}
        buffers = len(made[name][0].buffers)
        sizes[name] = draw(st.lists(st.integers(1, 9), min_size=buffers, max_size=buffers))
    slowdown = draw(st.sampled_from([0.0, 0.15, 0.5]))
    alone = draw(st.sampled_from([(), ("dp",), ("tp", "ring", "dp")]))
    return step(itinerary, durations, ranks=ranks, slowdown=slowdown, sizes=sizes, alone=alone)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(random_itineraries(stages=1))
def test_folded_equals_unfolded_on_one_stage(made):
    """Spans, memory, labels and peak of two ranks, whatever outlasts what."""
    folded, unfolded, _ = both(made)
    assert_equal(folded, unfolded)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(random_itineraries(stages=2))
def test_folded_equals_unfolded_on_two_stages(made):
    """The same where ranks run different segments and meet in messages."""
    folded, unfolded, _ = both(made)
    assert_equal(folded, unfolded)


@st.composite
def drifting_loops(draw):
    """Long loops of one or two segments whose collectives may take longer than their kernels, now and then awaited."""
    made = []
    for number in range(draw(st.integers(1, 3))):
        tasks = [("compute", ())]
        for _ in range(draw(st.integers(1, 3))):
            lane = draw(st.sampled_from(["compute", "dp", "dp", "ring"]))
            earlier = [i for i, (own, _) in enumerate(tasks) if own == "compute" or draw(st.integers(0, 9)) == 0]
            tasks.append((lane, tuple(sorted(draw(st.sets(st.sampled_from(earlier), max_size=1))))))
        joins = ["ring"] if draw(st.integers(0, 3)) == 0 else []
        made.append(segment(f"segment {number}", tasks, joins=joins))
    visits = st.sampled_from(made).map(Visit)
    bodies = st.lists(visits, min_size=1, max_size=2).map(tuple)
    loops = [Loop(draw(bodies), draw(st.integers(5, 40))) for _ in range(draw(st.integers(1, 3)))]
    itinerary = (*loops, Visit(OPTIMIZER))
    kernel, collective = st.integers(5, 30), st.sampled_from([0, 3, 8, 20, 29, 31, 60])
    durations = {"optimizer": [7]}
    same = draw(st.booleans())
    for found in made:
        ranks = [[draw(kernel if task.lane == "compute" else collective) for task in found.tasks] for _ in RANKS]
        durations[found.name] = {rank: ranks[0 if same else rank] for rank in RANKS}
    slowdown = draw(st.sampled_from([0.0, 0.15, 0.5]))
    return step(itinerary, durations, slowdown=slowdown, alone=draw(st.sampled_from([(), ("dp",), ("dp", "ring")])))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(drifting_loops())
def test_lanes_that_fall_behind(made):
    """However far lanes fall behind, and whoever waits for them in the end."""
    folded, unfolded, _ = both(made)
    assert_equal(folded, unfolded)
