"""Plans whose passes are alike are simulated together, to the bit as one by one; and fall back where that is not so."""

from functools import cache
from itertools import product
from random import Random

import numpy as np
import pytest

from spsim import Point, sweep
from spsim.inputs.plan import parse_plan
from spsim.step.closing import _closing
from spsim.step.columns.closing import ends_of, parts_of
from spsim.step.gradients import Sync
from spsim.step.pipeline.clock import Clock
from spsim.step.pipeline.exchange import Exchange
from spsim.step.pipeline.waiting import gaps_of
from spsim.studies import grids
from spsim.studies.rows import row
from tests.cases import model

EXCHANGES = {1: Exchange(), 2: Exchange(overlap_p2p_comm=True)}


def points(base: str, *, seq_len: int = 2048, **changes: object) -> list[dict[str, object]]:
    """Stages, chunks, replicas, micro-batches and batches of one plan on 16 GPUs."""
    own = model(**changes)
    found = []
    for pp, chunks, micro_batch, batch, rest in product(
        (1, 2, 4), (1, 2), (1, 2), (16, 48), ("", ",distributed_optimizer")
    ):
        dp = 16 // parse_plan(base).gpus // pp
        if (pp == 1 and chunks > 1) or batch % (dp * micro_batch):
            continue
        if chunks > 1 and batch // (dp * micro_batch) % pp:
            continue
        plan = f"{base},pp={pp},virtual_pp={chunks},dp={dp}{rest}"
        workload = {"seq_len": seq_len, "micro_batch": micro_batch, "global_batch": batch}
        found.append({"hardware": "dgx-h100", "model": own, "plan": plan, "workload": workload})
    return found


@pytest.mark.parametrize(
    ("tied", "base", "layers"),
    [
        (False, "tp=2,sequence_parallel", 8),
        (True, "tp=2,sequence_parallel,recompute=selective", 8),
        (False, "ulysses=2,recompute=full", 7),
        (False, "ring=2", 10),
    ],
)
def test_rows_are_those_of_each_plan_alone(monkeypatch, tied, base, layers):
    compare(monkeypatch, base, 12, layers=layers, tied_embeddings=tied)


def compare(monkeypatch, base: str, number: int, **changes: object) -> None:
    """So many rows with those of plans one by one, to the bit; no row of the sweep is found so."""
    every = points(base, **changes)
    some = Random(base).sample(every, number)
    alone = {id(own): row(Point(own)) for own in some}
    monkeypatch.setattr(grids, "row", lambda point: pytest.fail(f"one by one: {point.settings['plan']}"))
    found = sweep(every)
    assert (found["error"] == "").all()
    for place, own in enumerate(every):
        if id(own) in alone:
            known = found.iloc[place].to_dict()
            assert known == {name: alone[id(own)][name] for name in known}


OTHERS = {
    "experts": ({"experts": 8, "experts_per_token": 2, "expert_ffn_hidden": 256}, "tp=2,sequence_parallel,ep=2"),
    "experts over tp": ({"experts": 8, "experts_per_token": 2}, "tp=2,sequence_parallel,ep=4,expert_tp=1"),
    "dense layers": ({"experts": 8, "experts_per_token": 2, "shared_ffn_hidden": 256, "dense_layers": 3}, "ep=2"),
    "windows": (
        {"sliding_window": 512, "layer_types": ("sliding_attention", "full_attention")}, "tp=2,recompute=selective",
    ),
    "tied, uneven": ({"layers": 10, "tied_embeddings": True}, "tp=2,recompute=selective"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_rows_of_other_models_are_those_of_each_plan_alone(monkeypatch, name):
    """Experts, whose groups lie inside those of replicas; layers of several types; ends that share a table."""
    changes, base = OTHERS[name]
    compare(monkeypatch, base, 8, **{"layers": 8, "tied_embeddings": False, **changes})


def test_what_does_not_fit_is_named_as_alone():
    """The operator, its layer and its pass."""
    large = {"layers": 24, "hidden": 4096, "heads": 32, "vocab": 32000, "tied_embeddings": False}
    every = points("tp=2", seq_len=24576, **large)
    found = sweep(every)
    assert 0 < found["fits"].sum() < len(every)
    for place in range(0, len(every), 5):
        alone = row(Point(every[place]))
        for name in ("peak_operator", "out_of_memory_at", "peak_memory_gib"):
            assert found[name][place] == alone[name]


def test_plans_that_send_behind_passes_are_not_joined(monkeypatch):
    asked = []
    monkeypatch.setattr(grids, "simulate_together", lambda own: asked.append(own))
    own = [
        {"hardware": "dgx-h100", "model": model(layers=4), "plan": f"tp=2,dp=4,pp=2,{more}",
         "workload": {"seq_len": 2048, "global_batch": batch}}
        for more in ("dp_overlap,distributed_optimizer", "pp_deallocate=false", "pp_schedule=gpipe",
                     "mesh_order=tp-ulysses-ring-pp-dp")
        for batch in (16, 32)
    ]  # fmt: skip
    assert (sweep(own)["error"] == "").all()
    assert not asked


def test_utilisation_counts_more_flops_than_64_bits_hold():
    """A step of 16,384 long sequences."""
    own = [
        {"hardware": "dgx-h100", "model": "llama-3-70b", "plan": plan,
         "workload": {"seq_len": 131072, "micro_batch": micro_batch, "global_batch": 16384}}
        for plan in ("tp=8,dp=64", "tp=8,pp=4,dp=16") for micro_batch in (1, 2)
    ]  # fmt: skip
    found = sweep(own)
    assert found["mfu"].between(0.05, 1.2).all()
    assert found["mfu"][0] == row(Point(own[0]))["mfu"]


# ------------------------------------------------------------ the clock


@cache
def steps(stages: int, chunks: int, number: int) -> tuple[tuple[np.ndarray, np.ndarray], ...]:
    """Random durations: some near each other, so that their longest ways are the same."""
    rng = np.random.default_rng(number)
    clock = Clock("1f1b", stages, chunks, number * stages, None, EXCHANGES[min(chunks, 2)])
    found = []
    for near in range(36):
        if near in (0, 30):
            base = rng.integers(1000, 3000, 2), rng.integers(0, 400, 2), rng.integers(1, 300, 2)
        each = 1 + 0.001 * rng.random(3)
        whole = {kind: int(base[0][place] * each[place]) for place, kind in enumerate("FB")}
        last = int(base[1][0] * each[2])
        passes = [
            whole[c.kind] + (last if c.rank == stages - 1 and c.chunk == chunks - 1 else 0) for c in clock.classes
        ]
        found.append((np.array(passes), np.array([base[2][lane[0] % 2] for lane in clock.lanes])))
    return tuple(found)


@pytest.mark.parametrize(("stages", "chunks"), [(2, 1), (4, 1), (2, 2), (4, 2), (3, 3)])
@pytest.mark.parametrize("rounds", [1, 2, 16])
def test_waits_for_transfers_are_those_of_the_gaps(stages, chunks, rounds):
    """Gone through and summed up."""
    clock = Clock("1f1b", stages, chunks, rounds * stages, None, EXCHANGES[min(chunks, 2)])
    for passes, messages in steps(stages, chunks, rounds):
        finished, transfer = clock.totals(passes, messages)
        timeline = clock.times(passes, messages)
        assert finished.tolist() == timeline.finished_ps.tolist()
        assert transfer.tolist() == gaps_of(timeline).totals(stages)[0]


@pytest.mark.parametrize(("stages", "chunks", "rounds"), [(2, 1, 1), (4, 1, 16), (2, 2, 2), (4, 2, 16), (3, 3, 16)])
def test_many_steps_at_once_are_those_of_the_clock(stages, chunks, rounds):
    """Of a short step and what a round adds: whoever is not steady at once is said to be so."""
    clock = Clock("1f1b", stages, chunks, rounds * stages, None, EXCHANGES[min(chunks, 2)])
    every = steps(stages, chunks, rounds)
    durations = np.array([np.concatenate([*own, [0]]) for own in every]).T
    short = clock.structure.steps.short(durations)
    more = np.full(len(every), clock.more_rounds)
    found = short.longer(np.arange(len(every)), more)
    assert short.steady.mean() > 0.8
    for column in np.flatnonzero(short.steady | (more == 0)).tolist():
        finished, transfer = clock.totals(*every[column])
        assert found.finished[:, column].tolist() == finished.tolist()
        assert found.transfer[:, column].tolist() == transfer.tolist()


def test_steps_that_wait_in_the_same_way_are_summed_up(monkeypatch):
    clock = Clock("1f1b", 4, 1, 68)
    passes, messages = steps(4, 1, 17)[0]
    for times in range(1, 30):
        clock.totals(times * passes, times * messages)
    monkeypatch.setattr(Clock, "_pieces", lambda *_: pytest.fail("gone through"))
    clock.totals(30 * passes, 30 * messages)


def test_stages_close_a_step_when_those_that_they_meet_have_come():
    """Two kinds of stages: the last one comes late to a norm that all meet, after a sum of its own."""
    norm = Sync(("pp",), 3, "all_reduce", 4, (), name="gradient norm", elements=1)
    tied = Sync(("embedding",), 2, "all_reduce", 1, (), name="shared gradients", elements=1)
    sums, tied_sums = _closing("weight_sync", "weight_sync", ("sum",)), _closing("tied", "weight_sync", ("sum", tied))
    update = _closing("optimizer", "optimizer", ("norm kernel", norm, "adam"))
    kinds = [[(tied_sums, [5, 7]), (update, [1, 2, 30])], [(sums, [4]), (update, [1, 2, 20])]]
    found = ends_of([parts_of(times) for times in kinds], (0, 1, 0), np.array([[100, 100], [110, 300], [90, 100]]))
    # Tied sums start at 105 and end at 112 in both; the norm starts when stage 1 comes to it: at 115, and at 305.
    assert found.end.tolist() == [115 + 2 + 30, 305 + 2 + 30]
    assert found.weight_sync.tolist() == [22, 12]  # stage 2 waits for stage 0, from 90 on
    assert found.optimizer.tolist() == [1 + 2 + 20, 1 + 2 + 20]
