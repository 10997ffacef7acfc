"""Documents packed into one sequence: pairs counted one by one, on rings too; times; lengths as given and drawn."""

import numpy as np
import pytest

from spsim import Scenario, simulate
from spsim.errors import InputError
from spsim.inputs.documents import Documents, drawn, parts_of
from spsim.inputs.workload import Workload
from spsim.studies.sweeps import sweep

SMALL = {
    "layers": 4, "hidden": 1024, "ffn_hidden": 4096, "heads": 16, "kv_heads": 4, "gated_mlp": True, "vocab": 32000
}  # fmt: skip


def step(documents, plan="", model=SMALL, tokens=16384, **further):
    workload = {"seq_len": tokens, "global_batch": 2, "documents": documents}
    return simulate(Scenario(hardware="dgx-h100", model=model, plan=plan, workload=workload), **further)


def counted(lengths, queries, keys, window=None):
    """Twice the pairs of query and key, the diagonal half."""
    document = np.repeat(np.arange(len(lengths)), lengths)
    q, k = (np.concatenate([np.arange(part.start, part.stop) for part in parts]) for parts in (queries, keys))
    same = document[q][:, None] == document[k]
    seen = same & (q[:, None] >= k) & (q[:, None] - k < (window or len(document)))
    return 2 * int(seen.sum()) - int((same & (q[:, None] == k)).sum())


@pytest.mark.parametrize("cut", ["contiguous", "zigzag"])
def test_pairs_are_those_within_documents(cut):
    lengths, degree = (5, 1, 20, 3, 19), 4
    documents, every = Documents(lengths), (range(48),)
    places = [parts_of(48, degree, rank, cut) for rank in range(degree)]
    for own in places:
        assert documents.of_queries(*own).twice_pairs == counted(lengths, own, every)
        assert sum(documents.between(own, other).twice_pairs for other in places) == counted(lengths, own, every)
        for other in places:
            assert documents.between(own, other).twice_pairs == counted(lengths, own, other)
    total = documents.of_queries(*every)
    assert (total.twice_pairs, total.documents, total.longest) == (sum(n * n for n in lengths), 5, 20)
    assert sum(documents.of_queries(*own).twice_pairs for own in places) == total.twice_pairs


def test_windows_within_documents():
    lengths = (30, 2, 16)
    found = Documents(lengths, 4).of_queries(range(48)).twice_pairs
    pairs = (counted(lengths, (range(48),), (range(48),), 4) + 48) // 2
    assert found == 2 * pairs - 2  # of the one that the window holds half of the diagonal is left out


def test_one_document_is_the_sequence():
    one, usual = step([16384]), step(None)
    assert one.step_ps == pytest.approx(usual.step_ps, rel=0.01)
    assert one.amounts == usual.amounts


def test_flops_are_those_of_the_documents():
    halves, whole = step([8192, 8192]), step(None)
    attention = 3 * 4 * 4 * 16 * 64 * 16384**2 // 2
    assert whole.amounts.causal - halves.amounts.causal == attention // 2
    assert halves.step_ps < whole.step_ps
    quarters = step([4096] * 4)
    assert quarters.step_ps < halves.step_ps


@pytest.mark.parametrize("kind", ["p2p", "all_gather"])
@pytest.mark.parametrize("cut", ["contiguous", "zigzag"])
def test_the_rank_that_sees_most_paces_a_ring(kind, cut):
    """One long document behind short ones: the ranks that hold its end have most to do."""
    plan = f"ring=4,ring_kind={kind},ring_cut={cut}"
    late = step([512] * 16 + [8192], plan)
    even = step([4096] * 4, plan)
    assert late.step_ps > even.step_ps
    assert len(late.statics) == 4


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["ring=4", "ring=4,ring_cut=contiguous", "ring=2,ring_kind=all_gather,tp=2"])
def test_folded_is_unfolded(plan):
    lengths = drawn(16384, 3000, 1)
    one, other = (step(lengths, plan, fold=fold) for fold in (True, False))
    assert (one.step_ps, one.peak_bytes) == (other.step_ps, other.peak_bytes)


def test_lengths_are_drawn_by_mean_and_seed():
    own = Workload(seq_len="64K", documents={"mean": 2048, "seed": 7})
    assert (
        own.documents == drawn(65536, 2048, 7) == Workload(seq_len=65536, documents={"mean": 2048, "seed": 7}).documents
    )
    assert sum(own.documents) == 65536
    assert own.documents != Workload(seq_len=65536, documents={"mean": 2048, "seed": 8}).documents
    many = drawn(2**24, 2048, 0)
    assert 2**24 / len(many) == pytest.approx(2048, rel=0.05)


@pytest.mark.slow
def test_a_sweep_draws_for_each_length():
    rows = sweep([
        {"hardware": "dgx-h100", "model": SMALL, "workload": {"seq_len": tokens, "documents": {"mean": 512}}}
        for tokens in (4096, 8192)
    ])  # fmt: skip
    assert list(rows["error"]) == ["", ""]
    alone = simulate(Scenario(hardware="dgx-h100", model=SMALL, workload={"seq_len": 8192, "documents": {"mean": 512}}))
    assert rows["step_time_ms"][1] == pytest.approx(alone.step_time_s * 1e3, rel=1e-9)


@pytest.mark.parametrize(
    ("workload", "model", "message"),
    [
        ({"documents": [100, 200]}, {}, "documents have 300 tokens in all, but seq_len = 4096"),
        ({"documents": {"mean": 0}}, {}, "a mean of at least 1 and a seed"),
        ({"documents": {"means": 7}}, {}, "give lengths, or a mean"),
        ({"documents": 4}, {}, "documents = 4: give lengths, or a mean"),
        ({"documents": [4096], "phase": "prefill"}, {}, "packed sequences are trained on"),
        ({"documents": [4096]}, {"causal": False}, "is not causal"),
        ({"documents": []}, {}, "documents"),
    ],
)
def test_what_does_not_fit_is_refused(workload, model, message):
    with pytest.raises(InputError, match=message):
        Scenario(hardware="dgx-h100", model={**SMALL, **model}, workload={"seq_len": 4096, **workload})


def test_plans_without_rings_fold_as_without_documents():
    assert len(step([1024] * 16, "tp=2,dp=2").statics) == 1


def test_a_model_that_was_simulated_with_documents_is_as_before():
    packed = step([8192, 8192])
    assert step(None, model=packed.scenario.model).step_ps == step(None).step_ps
    assert "documents" not in packed.scenario.model.model_dump()
