"""Times of pipeline schedules: worked by hand, replayed from recorded runs, the same whichever way they are found."""

import csv
from collections import Counter
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spsim.step.pipeline.clock import Clock
from spsim.step.pipeline.exchange import Exchange, instructions, score
from spsim.step.pipeline.graph import Graph, Part, PassClass
from spsim.step.pipeline.messages import DeadlockError, Message, Post, Run, Stages, Wait
from spsim.step.pipeline.orders import Action
from spsim.step.pipeline.tape import taped
from spsim.step.pipeline.timing import Times, walk
from tests.test_pipeline_exchange import MEGATRON, TORCH

BUBBLES = Path(__file__).parent / "data" / "pipeline_bubbles.csv"
UNIT_PS = 60
BY_HAND = """
    F0 0 F1 1 F2 2 F3 3 F4 4 F5 5 F6 6 F7 7 F8 8 F9 9 F10 10 B0 14 F11 16 B1 17 F12 20 B2 21 F13 23 B3 24 \
      F14 26 B4 27 F15 29 B5 30 B6 32 B7 35 B8 38 B9 43 B10 45 B11 47 B12 49 B13 51 B14 53 B15 55
    F0 1 F1 2 F2 3 F3 4 F4 5 F5 6 F6 7 F7 8 F8 9 B0 12 F9 14 B1 15 F10 17 B2 18 F11 20 B3 21 F12 23 B4 24 \
      F13 26 B5 27 F14 29 B6 30 F15 32 B7 33 B8 36 B9 39 B10 42 B11 45 B12 47 B13 49 B14 51 B15 53
    F0 2 F1 3 F2 4 F3 5 F4 6 F5 7 F6 8 B0 10 F7 12 B1 13 F8 15 B2 16 F9 18 B3 19 F10 21 B4 22 F11 24 B5 25 \
      F12 27 B6 28 F13 30 B7 31 F14 33 B8 34 F15 36 B9 37 B10 40 B11 43 B12 45 B13 47 B14 49 B15 51
    F0 3 F1 4 F2 5 F3 6 F4 7 B0 8 F5 10 B1 11 F6 13 B2 14 F7 16 B3 17 F8 19 B4 20 F9 22 B5 23 F10 25 B6 26 \
      F11 28 B7 29 F12 31 B8 32 F13 34 B9 35 F14 37 B10 38 F15 40 B11 41 B12 43 B13 45 B14 47 B15 49
"""


def test_four_stages_eight_micro_batches_two_chunks_by_hand() -> None:
    """Interleaved 1F1B with overlapped exchanges, F 1, B 2, transfers free: every start, worked out on paper.

    Passes of a rank are numbered: F0–F3 are micro-batches 0–3 of its first chunk, F4–F7 the same of its second, F8–F15
    micro-batches 4–7; B0–B3 are micro-batches 0–3 of the second chunk, and so on. Warm-up is 10, 8, 6 and 4 passes.

    F_i starts at r + i in warm-up. Rank 3 has F4 at 7, B0 at 8, and a pair in each 3 from then on. A rank above follows
    with B two later, so B0 is at 10, 12 and 14 and rank 0 idles from 11. F12 of rank 0 needs what F8 of rank 3 makes:
    20, not 19. In cool-down exchanges are waited for: rank 0 has done B8 at 40, but rank 3 posts the receive of its
    gradient only with that of its own last pair, at 43; B9 and B10 come 2 and 1 later for it, and B11 is in time again.
    Rank 0 is done at 57: 9 of 48 are bubble, (p − 1) / (v m).
    """
    times = _unit_times("1f1b", 4, 2, 8, 4, Exchange(overlap_p2p_comm=True), Fraction(0), chunk=2)
    for rank, expected in enumerate(by_hand()):
        found = [(span.action, span.start_ps // UNIT_PS) for span in times.passes if span.rank == rank]
        assert found == expected
    assert max(times.finished_ps) == 57 * UNIT_PS


def by_hand() -> list[list[tuple[Action, int]]]:
    """Of each rank, its passes and when they start."""
    rows = [row.split() for row in BY_HAND.strip().splitlines()]
    return [[(_named(name), int(start)) for name, start in zip(row[::2], row[1::2], strict=True)] for row in rows]


def _named(name: str) -> Action:
    """The hand's numbers as chunk and micro-batch."""
    kind, number = name[0], int(name[1:])
    chunk = number % 8 // 4
    return Action(kind, chunk if kind == "F" else 1 - chunk, number // 8 * 4 + number % 4)


def test_one_f_one_b_of_two_stages_by_hand() -> None:
    """Exposed exchanges, transfers 1, F 2, B 4, and what rank 0 waits for.

    Rank 0: F0 0–2, sent 2–3; F1 3–5, then one exchange: F1's activation and B0's gradient, which rank 1 makes at 3–9
    (F0 3–5, B0 5–9) and sends 9–10, with the receive of F1: so F1 travels 9–10 too. B0 10–14. Rank 1: F1 10–12, B1
    12–16, sent 16–17. Rank 0: B1 17–21.
    """
    times = _times("1f1b", 2, 1, 2, None, Exchange(), {"F": 2, "B": 4}, 1)
    assert [(*span.action[::2], span.start_ps, span.end_ps) for span in times.passes if span.rank == 0] == [
        ("F", 0, 0, 2), ("F", 1, 3, 5), ("B", 0, 10, 14), ("B", 1, 17, 21),
    ]  # fmt: skip
    assert [(*span.action[::2], span.start_ps, span.end_ps) for span in times.passes if span.rank == 1] == [
        ("F", 0, 3, 5), ("B", 0, 5, 9), ("F", 1, 10, 12), ("B", 1, 12, 16),
    ]  # fmt: skip
    assert [(m.message[:2], *m[1:]) for m in times.messages] == [
        (("activation", 0), 2, 0, 2, 3),
        (("activation", 1), 5, 9, 9, 10),
        (("gradient", 0), 9, 5, 9, 10),
        (("gradient", 1), 16, 14, 16, 17),
    ]


def _times(
    schedule: str, stages: int, chunks: int, micro_batches: int, group: int | None, exchange: Exchange,
    pass_ps: dict[str, int], message_ps: int,
) -> Times:  # fmt: skip
    """Of passes that take one time for each kind, the same by every way."""
    clock = Clock(schedule, stages, chunks, micro_batches, group, exchange)
    timeline = clock.times([pass_ps[name.kind] for name in clock.classes], [message_ps] * len(clock.lanes))
    rows = instructions(schedule, stages, chunks, micro_batches, group, exchange)
    walked = walk(rows, lambda rank, action, at_ps: at_ps + pass_ps[action.kind], lambda sender, receiver: message_ps)
    assert timeline.written_out() == walked
    return walked


def _unit_times(
    schedule: str, stages: int, chunks: int, micro_batches: int, group: int, exchange: Exchange, transfer: Fraction,
    chunk: int,
) -> Times:  # fmt: skip
    """F 1 for `chunk` chunks, B 2, or I and W 1 each."""
    unit_ps = UNIT_PS * chunk // chunks
    pass_ps = {"F": unit_ps, "B": 2 * unit_ps, "I": unit_ps, "W": unit_ps}
    return _times(schedule, stages, chunks, micro_batches, group, exchange, pass_ps, int(transfer * UNIT_PS))


@pytest.mark.slow
@pytest.mark.parametrize("row", [*csv.DictReader(BUBBLES.open())], ids=lambda row: "-".join([*row.values()][1:8]))
def test_bubbles_are_those_of_the_recorded_runs(row: dict[str, str]) -> None:
    """To the three decimals printed, with free transfers and with 0.1 of a forward; 1F1B is exactly the textbook's."""
    exchange = Exchange(row["library"], **dict.fromkeys(row["options"].split(), True))
    p, v, m, g = (int(row[name]) for name in ("stages", "chunks", "micro_batches", "group"))
    for transfer, printed in [(Fraction(0), row["free"]), (Fraction(1, 10), row["tenth"])]:
        times = _unit_times(row["schedule"], p, v, m, g, exchange, transfer, chunk=1)
        bubble = Fraction(max(times.finished_ps), 3 * m * UNIT_PS) - 1
        assert abs(float(bubble) - float(printed)) < 0.00051
        if row["schedule"] in ("1f1b", "gpipe", "looped_bfs") and not transfer:
            assert bubble == Fraction(p - 1, v * m)


@st.composite
def long_runs(draw: st.DrawFn) -> tuple[str, int, int, int, int, Exchange]:
    """With as many micro-batches as folding needs, or fewer."""
    schedule = draw(
        st.sampled_from(["1f1b", "1f1b", "interleaved_zero_bubble", "zbv", "dualpipev", "gpipe", "looped_bfs"])
    )
    stages = draw(st.integers(2, 3))
    chunks = {"zbv": 2, "dualpipev": 2, "gpipe": 1}.get(schedule) or draw(st.integers(1, 3))
    exchange = draw(st.sampled_from(TORCH))
    if schedule == "1f1b" and draw(st.booleans()):
        exchange = draw(st.sampled_from(MEGATRON if chunks > 1 else MEGATRON[:1]))
    if schedule in ("zbv", "dualpipev", "gpipe"):
        return schedule, stages, chunks, draw(st.integers(2 * stages, 30)), stages, exchange
    group = draw(st.integers(stages, 2 * stages - 1))
    rest = draw(st.sampled_from([0, *range(stages, group)])) if exchange.library == "megatron" else 0
    return schedule, stages, chunks, group * draw(st.integers(1, 12)) + rest, group, exchange


@st.composite
def durations(draw: st.DrawFn, clock: Clock) -> tuple[list[int], list[int]]:
    """Uneven stages and links, and first and last passes of their own, or all alike."""
    small = draw(st.booleans())
    numbers = np.random.default_rng(draw(st.integers(0, 1 << 30)))
    of_kind = dict(zip("FBIW", numbers.integers(0 if small else 100, 5 if small else 1000, 4), strict=True))
    uneven = numbers.integers(0, 300, (clock.stages, clock.chunks)) * draw(st.booleans())
    own = {"middle": 0, **dict.fromkeys(("first", "last", "only"), int(numbers.integers(0, 200)) * draw(st.booleans()))}
    pass_ps = [int(of_kind[n.kind] + uneven[n.rank, n.chunk] + own[n.occurrence]) for n in clock.classes]
    links = {lane[:2]: int(numbers.integers(0, 80)) for lane in clock.lanes}
    return pass_ps, [links[lane[:2]] for lane in clock.lanes]


@pytest.mark.slow
@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.data())
def test_folded_and_walked_are_the_same(data: st.DataObject) -> None:
    """Every pass and message, whichever schedule, exchange and durations; also of a second step on the same clock."""
    run = data.draw(long_runs())
    clock = Clock(*run)
    rows = instructions(*run)
    for _ in range(2):
        pass_ps, message_ps = data.draw(durations(clock))
        timeline = clock.times(pass_ps, message_ps)
        assert timeline.written_out() == _walked(rows, clock, pass_ps, message_ps)


def _walked(rows: tuple[tuple[object, ...], ...], clock: Clock, pass_ps: list[int], message_ps: list[int]) -> Times:
    by_class = dict(zip(clock.classes, pass_ps, strict=True))
    links = {lane[:2]: time_ps for lane, time_ps in zip(clock.lanes, message_ps, strict=True)}
    number = Counter((rank, *i.action[:2]) for rank, row in enumerate(rows) for i in row if isinstance(i, Run))
    so_far = Counter()

    def end_of(rank: int, action: Action, at_ps: int) -> int:
        key = rank, *action[:2]
        so_far[key] += 1
        ends = (so_far[key] == 1) + 2 * (so_far[key] == number[key])
        occurrence = ("middle", "first", "last", "only")[ends]
        return at_ps + by_class[PassClass(rank, action.chunk, action.kind, occurrence)]

    return walk(rows, end_of, lambda sender, receiver: links[sender, receiver])


def test_a_long_step_is_short_and_comes_again() -> None:
    """Of 512 micro-batches over 8 stages, all but the ends is one round that runs hundreds of times."""
    clock = Clock("1f1b", 8, 1, 512)
    timeline = clock.times([{"F": 10, "B": 20}[name.kind] for name in clock.classes], [1] * len(clock.lanes))
    before, again, after = timeline.sections
    assert again.runs > 480
    assert len(again.passes.ranks) == 2 * 8
    assert again.micro_batches == 1
    whole = sum(len(section.passes.ranks) * section.runs for section in (before, again, after))
    assert whole == 2 * 8 * 512


def test_how_long_a_pass_takes_may_depend_on_when_it_runs() -> None:
    rows = instructions("1f1b", 2, 1, 2, None, Exchange())
    times = walk(rows, lambda rank, action, at_ps: at_ps + 10 + (at_ps >= 15), lambda sender, receiver: 1)
    assert [(span.start_ps, span.end_ps) for span in times.passes if span.rank == 0] == [
        (0, 10),
        (11, 21),
        (33, 44),
        (56, 67),
    ]


def test_ranks_that_wait_for_each_other_are_named() -> None:
    """Each of two ranks waits for what the other sends only afterwards; a third one is done."""
    act = Message("activation", 0, 0, 0, 1)
    grad = Message("gradient", 0, 1, 1, 0)
    rows = [
        (Run(Action("F", 0, 0)), Post((grad,)), Wait((grad,)), Post((act,)), Run(Action("B", 0, 0))),
        (Run(Action("F", 0, 0)), Post((act,)), Wait((act,)), Post((grad,)), Run(Action("B", 0, 0))),
        (Run(Action("F", 0, 0)), Run(Action("B", 0, 0))),
    ]
    with pytest.raises(DeadlockError, match="pipeline ranks 0, 1 wait"):
        walk(rows, lambda rank, action, at_ps: at_ps + 1, lambda sender, receiver: 1)
    actions = [tuple(i.action for i in row if isinstance(i, Run)) for row in rows]
    graph = Graph(taped(Stages("1f1b", 3, 1), actions, rows))
    nodes = np.arange(len(graph.own))
    with pytest.raises(DeadlockError, match="pipeline ranks 0, 1 wait"):
        Part(graph, nodes[:1], nodes[1:]).ends(nodes[:1], np.ones(len(graph.classes.names) + len(graph.lanes) + 1))


def test_a_message_that_one_side_never_posts_is_a_deadlock() -> None:
    rows = [(Run(Action("F", 0, 0)),), (Post((Message("activation", 0, 0, 0, 1),)), Run(Action("F", 0, 0)))]
    with pytest.raises(DeadlockError, match="pipeline ranks 1 wait"):
        Graph(taped(Stages("1f1b", 2, 1), [tuple(i.action for i in row if isinstance(i, Run)) for row in rows], rows))


def test_messages_of_a_lane_follow_each_other() -> None:
    """Where torch posts receives ahead and transfers are longer than passes, a message waits for the one before it."""
    times = _times("1f1b", 2, 2, 4, 2, Exchange("torch"), {"F": 1, "B": 2}, 10)
    held_up = 0
    for before, span in pairwise(times.messages):
        same_lane = before.message.kind == span.message.kind and before.message.sender == span.message.sender
        posted_ps = max(span.sender_posted_ps, span.receiver_posted_ps)
        assert span.start_ps == max(posted_ps, before.end_ps if same_lane else 0)
        held_up += span.start_ps > posted_ps
    assert held_up


def test_score_of_a_structure_is_evaluated_for_many_durations_at_once() -> None:
    graph = Graph(score("1f1b", 3, 2, 6, 3, Exchange(overlap_p2p_comm=True)))
    nodes = np.arange(len(graph.own))
    part = Part(graph, nodes[:1], nodes[1:])
    times_ps = np.random.default_rng(0).integers(0, 100, (len(graph.classes.names) + len(graph.lanes) + 1, 5))
    times_ps[-1] = 0
    together = part.ends(np.zeros((1, 5), np.int64), times_ps)
    for column in range(5):
        assert (together[:, column] == part.ends(np.zeros(1, np.int64), times_ps[:, column])).all()


def test_one_stage_sends_nothing() -> None:
    clock = Clock("1f1b", 1, 1, 4)
    assert clock.lanes == ()
    assert clock.times([{"F": 10, "B": 20}[name.kind] for name in clock.classes], []).finished_ps.tolist() == [120]


def test_times_are_not_negative() -> None:
    clock = Clock("1f1b", 2, 1, 4)
    with pytest.raises(ValueError, match="a pass or message of -1 ps"):
        clock.times([1] * len(clock.classes), [-1] * len(clock.lanes))


def test_groups_of_fewer_micro_batches_than_stages_are_a_deadlock() -> None:
    with pytest.raises(DeadlockError, match="pipeline ranks 0, 3 wait"):
        Clock("1f1b", 4, 2, 8, 2)
