"""Orders of pipeline schedules, against those that Megatron-Core and torch ran, and the rules that they follow."""

import csv
import gzip
from collections import Counter
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spsim.inputs.schedules import SCHEDULES, refused_exchange, refused_schedule, torch_group
from spsim.step.pipeline.in_flight import held, most_held
from spsim.step.pipeline.orders import Action, Row, global_stage, gradients, orders, pairs, place_of

few = settings(max_examples=25, deadline=None, derandomize=True)
RECORDED = Path(__file__).parent / "data" / "pipeline_orders.csv.gz"


def recorded() -> Iterator[dict[str, str]]:
    with gzip.open(RECORDED, "rt") as file:
        yield from csv.DictReader(file)


def test_orders_are_those_that_the_libraries_ran() -> None:
    """All 600 rows of both libraries, DualPipeV's pairs included."""
    number = 0
    for row in recorded():
        stages, rank = int(row["stages"]), int(row["rank"])
        micro_batches, group = int(row["micro_batches"]), int(row["group"])
        own = orders(row["schedule"], stages, int(row["chunks"]), micro_batches, group)[rank]
        assert _written(own, row["schedule"], stages, rank) == row["order"], row
        number += 1
    assert number == 600


def _written(row: Row, schedule: str, stages: int, rank: int) -> str:
    units = pairs(schedule, stages, rank, row)
    return " ".join("+".join(f"{a.kind}{a.chunk}.{a.micro_batch}" for a in unit) for unit in units)


def test_torch_chooses_groups_by_rounds() -> None:
    for row in recorded():
        if row["library"] == "torch" and row["schedule"] == "interleaved_zero_bubble":
            assert torch_group(int(row["stages"]), int(row["micro_batches"])) == int(row["group"])
    assert torch_group(4, 6) == 6
    assert orders("interleaved_zero_bubble", 4, 2, 10, None) == orders("interleaved_zero_bubble", 4, 2, 10, 5)


@st.composite
def schedules(draw: st.DrawFn) -> tuple[str, int, int, int, int]:
    """(schedule, stages, chunks, micro-batches, group) of all sizes."""
    schedule = draw(st.sampled_from(SCHEDULES))
    stages = draw(st.integers(2, 7))
    fixed = {"zbv": 2, "dualpipev": 2, "gpipe": 1}
    chunks = fixed.get(schedule) or draw(st.integers(1, 4))
    micro_batches = draw(st.integers(2 * stages if schedule == "dualpipev" else 1, 30))
    return schedule, stages, chunks, micro_batches, draw(st.integers(1, micro_batches))


@few
@given(schedules())
def test_every_micro_batch_passes_each_chunk_once(case: tuple[str, int, int, int, int]) -> None:
    _, _, chunks, micro_batches, _ = case
    all_of_them = {(chunk, micro_batch) for chunk in range(chunks) for micro_batch in range(micro_batches)}
    for row in orders(*case):
        found = Counter(action.kind for action in row)
        assert found["F"] == found["B"] + found["I"] == found["B"] + found["W"] == len(all_of_them)
        assert {action[1:] for action in row if action.kind == "F"} == all_of_them
        place = {action: number for number, action in enumerate(row)}
        for chunk, micro_batch in all_of_them:
            times = [place[Action(kind, chunk, micro_batch)] for kind in "FBIW" if (kind, chunk, micro_batch) in place]
            assert times == sorted(times)


@few
@given(schedules())
def test_stages_of_the_model_are_placed_once(case: tuple[str, int, int, int, int]) -> None:
    schedule, stages, chunks, *_ = case
    places = {(rank, chunk) for rank in range(stages) for chunk in range(chunks)}
    found = {global_stage(schedule, stages, *place): place for place in places}
    assert sorted(found) == list(range(stages * chunks))
    assert all(place_of(schedule, stages, stage) == place for stage, place in found.items())


def test_chunks_of_a_v_come_back_up() -> None:
    assert [global_stage("zbv", 4, rank, 1) for rank in range(4)] == [7, 6, 5, 4]
    assert [global_stage("1f1b", 4, rank, 1) for rank in range(4)] == [4, 5, 6, 7]


def _before_backward(row: Row) -> int:
    return next(place for place, action in enumerate(row) if action.kind != "F")


def _peak(row: Row, chunks: int, until: str = "W") -> int:
    return max(map(sum, held(row, chunks, until)))


@pytest.mark.slow
@few
@given(st.integers(2, 8), st.integers(1, 4), st.integers(1, 40), st.data())
def test_forwards_before_the_first_backward_and_peak_in_flight(p: int, v: int, m: int, data: st.DataObject) -> None:
    """The closed forms of schedules by groups: 1F1B min(p − r, m); interleaved min((v − 1) g + 2 (p − 1 − r) + 1, m v);
    its zero-bubble kind one less a rank, and until W min((v − 1) g + p, m v) on every rank.
    """
    g = data.draw(st.integers(min(p, m), m))
    for r in range(p):
        most = min(p - r, m) if v == 1 else min((v - 1) * g + 2 * (p - 1 - r) + 1, m * v)
        row = orders("1f1b", p, v, m, g)[r]
        assert _before_backward(row) == _peak(row, v) == most
        row = orders("interleaved_zero_bubble", p, v, m, g)[r]
        assert _before_backward(row) == _peak(row, v, "I") == min((v - 1) * g + p - r, m * v)
        assert _peak(row, v) == min((v - 1) * g + p, m * v)
        assert _peak(orders("looped_bfs", p, v, m, None)[r], v) == m * v
        assert _peak(orders("gpipe", p, 1, m, None)[r], 1) == m


@pytest.mark.slow
@few
@given(st.integers(2, 8), st.integers(0, 20))
def test_v_shaped_schedules_hold_the_same_on_every_rank(p: int, more: int) -> None:
    for r in range(p):
        row = orders("zbv", p, 2, 2 * p - 1 + more, None)[r]
        assert _before_backward(row) == _peak(row, 2) == 2 * p
        row = orders("dualpipev", p, 2, 2 * p + more, None)[r]
        assert _before_backward(row) == 2 * p + (r == p - 1)
        assert _peak(row, 2) == 2 * p + 1


def test_interleaving_holds_more_by_the_published_factor() -> None:
    """1 + (p − 1) / (p v) of what 1F1B holds on the first rank (Narayanan et al. 2021, Korthikanti et al. 2022)."""
    for p, v in [(4, 2), (8, 2), (8, 3), (35, 3)]:
        row = orders("1f1b", p, v, 4 * p, p)[0]
        assert Fraction(_peak(row, v), v) == p * (1 + Fraction(p - 1, p * v))


def test_the_fullest_moment_depends_on_what_chunks_take() -> None:
    """Of 4 stages of 2 chunks: in units of one, 11 are held, most of them of the first chunk."""
    row = orders("1f1b", 4, 2, 8, 4)[0]
    assert most_held(row, [1.0, 1.0]) == (7, 4)
    assert most_held(row, [0.0, 1.0])[1] == 4
    assert sum(most_held(row, [1.0, 0.0])) >= 8


def test_the_first_stage_leaves_its_whole_backward_to_w() -> None:
    assert gradients("I", 0) == ()
    assert gradients("W", 0) == gradients("B", 3) == ("input", "weight")
    assert gradients("I", 1) + gradients("W", 1) == ("input", "weight")
    assert gradients("F", 1) == ()


REFUSED = [
    ("1f1b", "megatron", 4, 2, 8, 2, "a group of 2 micro-batches is not between the 4 pipeline stages"),
    ("1f1b", "megatron", 4, 2, 8, 9, "a group of 9 micro-batches is not between"),
    ("1f1b", "megatron", 4, 2, 6, None, "leave 2, fewer than the 4 pipeline stages"),
    ("gpipe", "megatron", 4, 1, 8, None, "Megatron-Core has no schedule gpipe"),
    ("1f1b", "torch", 4, 1, 3, None, "at least as many micro-batches as stages: 3 for 4"),
    ("1f1b", "torch", 4, 2, 9, None, "in 2 rounds, which must divide them"),
    ("1f1b", "torch", 4, 2, 8, 8, "torch takes groups of 4 micro-batches here"),
    ("interleaved_zero_bubble", "torch", 4, 1, 9, None, "in 2 rounds"),
    ("dualpipev", "torch", 4, 2, 7, None, "dualpipev needs 2 micro-batches a rank: 8, not 7"),
    ("zbv", "torch", 4, 3, 8, None, "zbv has exactly 2 chunks a rank, not 3"),
    ("gpipe", "torch", 4, 2, 8, None, "gpipe has one chunk a rank, not 2"),
]


@pytest.mark.parametrize(("schedule", "library", "stages", "chunks", "micro_batches", "group", "why"), REFUSED)
def test_what_the_libraries_refuse(
    schedule: str, library: str, stages: int, chunks: int, micro_batches: int, group: int | None, why: str
) -> None:
    assert why in refused_schedule(schedule, library, stages, chunks, micro_batches, group)


def test_what_the_libraries_ran_is_not_refused() -> None:
    """Of torch, tables of fewer micro-batches than stages are among the rows; Megatron's 1F1B accepts that too."""
    for row in recorded():
        numbers = (int(row[name]) for name in ("stages", "chunks", "micro_batches"))
        group = int(row["group"]) if int(row["chunks"]) > 1 else None
        assert refused_schedule(row["schedule"], row["library"].split("-")[0], *numbers, group) is None, row


def test_options_of_communication_that_exclude_each_other() -> None:
    assert "needs interleaving" in refused_exchange(1, 4, overlap=True, batched=False)
    assert "exclude each other" in refused_exchange(2, 4, overlap=True, batched=True)
    assert "over 2 stages" in refused_exchange(2, 2, overlap=False, batched=True)
    assert refused_exchange(2, 2, overlap=True, batched=False) is None
    assert refused_exchange(1, 2, overlap=False, batched=True) is None
