"""When ranks of a pipeline post and wait, against what Megatron-Core and torch did when they were recorded."""

import csv
import gzip
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spsim.step.pipeline.exchange import Exchange, instructions
from spsim.step.pipeline.messages import DeadlockError, Instruction, Message, Post, Run, Wait

RECORDED = Path(__file__).parent / "data" / "pipeline_exchanges.csv.gz"
NAMES = {
    ("activation", True): "send_next",
    ("activation", False): "recv_prev",
    ("gradient", True): "send_prev",
    ("gradient", False): "recv_next",
}
"""Megatron-Core's, by kind and whether the rank sends."""


def recorded() -> list[dict[str, str]]:
    with gzip.open(RECORDED, "rt") as file:
        return [*csv.DictReader(file)]


@pytest.mark.slow
@pytest.mark.parametrize("recorded_as", sorted({row["recorded_as"] for row in recorded()}))
def test_ranks_post_and_wait_as_recorded(recorded_as: str) -> None:
    """Every rank of 344 runs: the messages of each call, and where they are posted and waited for between passes."""
    rows = [row for row in recorded() if row["recorded_as"] == recorded_as]
    assert len(rows) >= 6
    for row in rows:
        library, rank = row["library"].split("-")[0], int(row["rank"])
        numbers = [int(row[name]) for name in ("stages", "chunks", "micro_batches", "group")]
        exchange = Exchange(library, **dict.fromkeys(row["options"].split(), True))
        own = instructions(row["schedule"], *numbers, exchange)[rank]
        assert [*written(own, rank, library)] == row["instructions"].split(), row


def written(row: tuple[Instruction, ...], rank: int, library: str) -> Iterator[str]:
    calls: dict[Message, int] = {}
    waits: list[str] = []

    def name(message: Message) -> str:
        sends = message.sender == rank
        if library == "torch":
            return f"isend:{message.receiver}" if sends else f"irecv:{message.sender}"
        return NAMES[message.kind, sends]

    for instruction in row:
        if isinstance(instruction, Wait):
            waits += [f"{name(message)}@{calls[message]}" for message in instruction.messages]
            continue
        if waits:
            yield "wait:" + "+".join(sorted(waits))
            waits = []
        if isinstance(instruction, Run):
            yield "{}{}.{}".format(*instruction.action)
        else:
            calls |= dict.fromkeys(instruction.messages, len({*calls.values()}))
            yield "post:" + "+".join(sorted(map(name, instruction.messages)))
    if waits:
        yield "wait:" + "+".join(sorted(waits))


MEGATRON = [
    Exchange(),
    Exchange(overlap_p2p_comm=True),
    Exchange(overlap_p2p_comm=True, awaits_activations=True),
    Exchange(overlap_p2p_comm=True, overlap_p2p_comm_warmup_flush=True),
    Exchange(overlap_p2p_comm=True, overlap_p2p_comm_warmup_flush=True, awaits_activations=True),
]
TORCH = [Exchange("torch"), Exchange("torch", defer_pp_recv=True)]


@st.composite
def runs(draw: st.DrawFn) -> tuple[str, int, int, int, int, Exchange]:
    """Whatever the libraries run: (schedule, stages, chunks, micro-batches, group, exchange)."""
    schedule = draw(st.sampled_from(["1f1b", "gpipe", "looped_bfs", "interleaved_zero_bubble", "zbv", "dualpipev"]))
    stages = draw(st.integers(2, 5))
    chunks = {"zbv": 2, "dualpipev": 2, "gpipe": 1}.get(schedule) or draw(st.integers(1, 3))
    if schedule == "1f1b" and (chunks == 1 or draw(st.booleans())):
        exchange = draw(st.sampled_from(MEGATRON if chunks > 1 else [MEGATRON[0], TORCH[0]]))
        group = draw(st.integers(stages, stages + 3))
        rest = draw(st.sampled_from([0, *range(stages, group)]))
        return schedule, stages, chunks, group * draw(st.integers(1, 4)) + rest, group, exchange
    group = draw(st.integers(stages, 2 * stages - 1))
    rounds = draw(st.integers(1, 4)) if group == stages else 1
    micro_batches = 2 * stages + draw(st.integers(0, 6)) if schedule == "dualpipev" else group * rounds
    return schedule, stages, chunks, micro_batches, group, draw(st.sampled_from(TORCH))


@pytest.mark.slow
@settings(max_examples=40, deadline=None, derandomize=True)
@given(runs())
def test_what_a_pass_needs_has_arrived_and_each_message_is_posted_once_a_side(
    run: tuple[str, int, int, int, int, Exchange],
) -> None:
    rows = instructions(*run)
    sides = Counter(
        message
        for rank, row in enumerate(rows)
        for instruction in row
        if isinstance(instruction, Post)
        for message in instruction.messages
        if rank in (message.sender, message.receiver)
    )
    assert {*sides.values()} <= {2}
    schedule, stages, chunks, micro_batches, *_ = run
    v_shaped = schedule in ("zbv", "dualpipev")
    for rank, row in enumerate(rows):
        ends = rank in (0, stages - 1)
        sent = [message for message in sides if message.sender == rank]
        assert len(sent) == micro_batches * (2 * chunks - ends * (2 if v_shaped else 1))
        arrived: set[Message] = set()
        for instruction in row:
            if isinstance(instruction, Wait):
                arrived |= {*instruction.messages}
            elif isinstance(instruction, Run) and instruction.action.kind != "W":
                assert _needed(run, rank, instruction) <= {message[:4] for message in arrived}


def _needed(run: tuple[str, int, int, int, int, Exchange], rank: int, instruction: Run) -> set[tuple[object, ...]]:
    """(kind, micro-batch, stage of the model that sends, its rank), worked out without the code under test."""
    schedule, stages, chunks, *_ = run
    kind, chunk, micro_batch = instruction.action
    v_shaped = schedule in ("zbv", "dualpipev")
    places = [rank for number in range(chunks) for rank in range(stages)[:: -1 if v_shaped and number else 1]]
    own = [place for place, found in enumerate(places) if found == rank][chunk]
    other = own - 1 if kind == "F" else own + 1
    if not 0 <= other < len(places) or places[other] == rank:
        return set()
    return {("activation" if kind == "F" else "gradient", micro_batch, other, places[other])}


def test_ranks_send_what_the_schedule_says() -> None:
    """m (2v − 1) messages at the ends, 2 m v between, as recorded of Megatron-Core and torch."""
    for chunks, exchange in [(1, Exchange()), (3, Exchange()), (2, Exchange("torch"))]:
        rows = instructions("1f1b", 4, chunks, 8, 4, exchange)
        sent = [
            sum(m.sender == rank for i in row if isinstance(i, Post) for m in i.messages)
            for rank, row in enumerate(rows)
        ]
        assert sent == [8 * (2 * chunks - 1), 16 * chunks, 16 * chunks, 8 * (2 * chunks - 1)]


def test_newer_versions_wait_for_an_activation_before_the_backward_that_should_hide_it() -> None:
    """In the steady state, and in warm-up with flush; receives and gradients stay as they were."""
    for flush in (False, True):
        old = Exchange(overlap_p2p_comm=True, overlap_p2p_comm_warmup_flush=flush)
        new = Exchange(overlap_p2p_comm=True, overlap_p2p_comm_warmup_flush=flush, awaits_activations=True)
        for rank, (row, before) in enumerate(
            zip(instructions("1f1b", 4, 2, 8, 4, new), instructions("1f1b", 4, 2, 8, 4, old), strict=True)
        ):
            assert _without_sent_activations(row, rank) == _without_sent_activations(before, rank)
            assert _behind_passes(row, rank) == 0
            assert _behind_passes(before, rank) > 0


def _without_sent_activations(row: tuple[Instruction, ...], rank: int) -> list[Instruction]:
    kept = []
    for instruction in row:
        if isinstance(instruction, Wait):
            others = [m for m in instruction.messages if m.kind == "gradient" or m.sender != rank]
            kept += [Wait((message,)) for message in others]
        else:
            kept.append(instruction)
    return kept


def _behind_passes(row: tuple[Instruction, ...], rank: int) -> int:
    """Passes that run while an activation that the rank sends is posted and not waited for."""
    underway: set[Message] = set()
    found = 0
    for instruction in row:
        if isinstance(instruction, Post):
            underway |= {m for m in instruction.messages if m.kind == "activation" and m.sender == rank}
        elif isinstance(instruction, Wait):
            underway -= {*instruction.messages}
        else:
            found += bool(underway)
    return found


def test_torch_cannot_place_receives_of_a_schedule_that_waits_for_itself() -> None:
    """Groups of one micro-batch over three ranks: the second chunk would run before the first has passed all ranks."""
    with pytest.raises(DeadlockError, match="pipeline ranks 0, 1, 2 wait"):
        instructions("1f1b", 3, 2, 4, 1, Exchange("torch"))


def test_a_schedule_that_the_library_has_not_is_refused() -> None:
    with pytest.raises(ValueError, match="Megatron-Core has no schedule zbv"):
        instructions("zbv", 2, 2, 4, None, Exchange())
