"""Replicas of pipeline stages: recorded steps of Megatron-Core, and what other libraries send, by hand."""

from collections import Counter

import pytest

from spsim import InputError, Model, Scenario, simulate
from spsim.costs.collectives import CommCost
from spsim.inputs.profiles import load_profile
from spsim.program.mesh import Mesh, nodes_of
from spsim.step.costed_pipeline import boundary_bytes
from spsim.step.ending import syncs_of
from spsim.step.gradients import PARAMETERS
from tests.cases import A100, H100, model
from tests.test_replicas import RECORDED
from tests.test_stages_simulated import assert_equal, both, staged

# ------------------------------------------------------------ Megatron-Core, recorded

MEGATRON = {
    "mc_pp2_dp2_untied": "dp=2",
    "mc_pp2_dp2_tied": "dp=2",
    "mc_pp2_dp2_tied_bf16grads": "dp=2,grad_dtype=bf16",
}


def calls(own):
    """What closes the step of a stage, in order."""
    return [(sync.collective, sync.message_bytes) for sync in syncs_of(own.closings)]


@pytest.mark.parametrize("case", MEGATRON)
def test_stages_of_megatron(case):
    """Buckets on the first stage only, a tied table alone in its own and summed over both stages in the type of
    gradients, the norm, and gathers of the weights.
    """
    shape = Model(
        layers=4, hidden=64, heads=4, vocab=512, ffn_hidden=256, positions="learned", max_positions=16,
        tied_embeddings="untied" not in case,
    )  # fmt: skip
    plan = f"pp=2,{MEGATRON[case]},distributed_optimizer,dp_overlap=gradients,bucket_elements=60000"
    result = simulate(Scenario(hardware=A100, model=shape, plan=plan, workload={"seq_len": 16, "global_batch": 4}))
    for stage, own in enumerate(result.prepared.of_stages.values()):
        rows = RECORDED[f"{case}_stage{stage}"]
        assert calls(own) == [(row["collective"], int(row["message_bytes"])) for row in rows]


# ------------------------------------------------------------ tied embeddings


def pair(plan, micro_batches=4, **changes):
    """The same model with its embeddings tied, and not."""
    return [simulate(staged(plan, micro_batches, tied_embeddings=tied, **changes)) for tied in (True, False)]


@pytest.mark.parametrize(("grad_dtype", "itemsize"), [("fp32", 4), ("bf16", 2)])
def test_a_tied_table_is_summed_over_both_ends(grad_dtype, itemsize):
    """Copies of 512 x 256 elements, half of it on each rank of tp: all else being equal, the step is later by this sum,
    which nothing hides.
    """
    tied, untied = pair(f"pp=4,tp=2,grad_dtype={grad_dtype}")
    (call,) = [call for call in tied.collectives if call.axis == "embedding"]
    assert (call.collective, call.ranks, call.calls) == ("all_reduce", 2, 1)
    assert call.message_bytes == itemsize * 512 * 256 // 2
    alone = CommCost(load_profile(H100)).duration("all_reduce", call.message_bytes, 2, 1)
    assert tied.step_time_s - untied.step_time_s == pytest.approx(alone, rel=1e-6)
    assert not [call for call in untied.collectives if call.axis == "embedding"]
    assert tied.weight_sync_s > untied.weight_sync_s
    assert tied.peak_bytes == untied.peak_bytes


def test_stages_between_the_ends_do_not_take_part():
    result = simulate(staged("pp=4,dp=2"))
    names = [[sync.name for sync in syncs_of(own.closings)] for own in result.prepared.of_stages.values()]
    assert ["shared gradients" in own for own in names] == [True, False, True]  # the two in the middle are alike
    with_table = {span.rank for span in result.trace.spans if result.trace.tasks[span.task].name == "shared gradients"}
    assert with_table == {0, 6}
    assert result.trace.groups["embedding"][1] == (1, 7)


def test_a_table_of_one_rank_is_summed_with_none():
    """Where the ends of the model are on one stage, as of a V."""
    tied, untied = pair("pp=2,virtual_pp=2,pp_schedule=zbv")
    assert tied.step_ps == untied.step_ps
    assert not [call for call in tied.collectives if call.axis == "embedding"]


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["pp=3,dp=2,distributed_optimizer", "pp=2,ring=2,ring_cut=contiguous"])
def test_folded_steps_with_a_tied_table_equal_written_out_ones(plan):
    assert_equal(*both(staged(plan, 3, causal=True)))


@pytest.mark.parametrize("pp", [2, 3, 4, 8])
@pytest.mark.parametrize("inner", [1, 2, 6])
def test_nodes_of_both_ends(pp, inner):
    """Ranks of the first and the last stage at the same place, on one node or on two."""
    mesh = Mesh({"pp": pp, "tp": inner})
    for per_node in (1, 2, 4, 8):
        spanned = {place // per_node != ((pp - 1) * inner + place) // per_node for place in range(inner)}
        assert nodes_of(mesh, ("embedding",), per_node) == 1 + max(spanned)
    assert mesh.group(inner - 1, ("embedding",)) == (inner - 1, pp * inner - 1)
    assert mesh.size(("embedding",)) == 2


# ------------------------------------------------------------ other libraries

UNTIED = {"tied_embeddings": False}
LAYER = model().layer_parameters
ENDS = 512 * 256 + 2048 * 256, 512 * 256 + 2 * 256
"""Parameters of embedding with positions, and of norm and head."""


def sums(result, stage=0):
    """Bytes of each collective of a stage over replicas."""
    found = Counter()
    for sync in syncs_of([*result.prepared.of_stages.values()][stage].closings):
        if "pp" not in sync.axes:
            found[sync.collective, sync.name] += sync.message_bytes
    return found


def test_fully_sharded_stages():
    """3 layers and an end: weights gathered in 16 bits, gradients reduced in 32, once, whatever micro-batches."""
    small, large = (simulate(staged("pp=2,dp=2,dp_library=fsdp,zero=2", m, **UNTIED)) for m in (2, 8))
    own = 3 * LAYER + ENDS[0]
    assert sums(small) == sums(large)
    assert sums(small)["all_gather", PARAMETERS] == 2 * own
    assert sums(small)["reduce_scatter", "weight gradients"] == 4 * own
    static = small.statics[0]
    assert (static.weights, static.gradients, static.optimizer) == (4 * own / 2 + 2 * own, 4 * own, 8 * own / 2)


def test_gathers_hide_behind_the_first_pass_but_for_the_first():
    """Embedding first, then a layer at a time: as if only the embedding's table had to be waited for."""
    plan = "pp=2,dp=2,dp_library=fsdp,zero=2"
    result = simulate(staged(plan, 4, seq_len=8192, **UNTIED))
    ran = result.staged.ran
    first = CommCost(load_profile(H100)).duration("all_gather", 2 * ENDS[0], 2, 1)
    assert ran.lead_ps == pytest.approx(1e12 * first, rel=1e-6)
    runtime = simulate(staged(f"{plan},virtual_pp=2,pp_sends=torch", 4, seq_len=8192, layers=8, **UNTIED))
    whole = runtime.staged.ran.closed.gathers[0][0]
    assert (len(whole), runtime.staged.ran.lead_ps) == (1, whole[0])


def test_stages_under_ddp():
    """Gradients of 16 bits in buckets, all but the last behind the last backward pass."""
    behind = simulate(staged("pp=2,dp=2,dp_library=ddp,bucket_elements=100000", 4, **UNTIED))
    whole = simulate(staged("pp=2,dp=2,dp_library=ddp,bucket_elements=100000000", 4, **UNTIED))
    own = 3 * LAYER + ENDS[0]
    assert sums(behind) == sums(whole) == {("all_reduce", "weight gradients"): 2 * own}
    assert behind.staged.ran.closed.reductions[0][0] > 1 == whole.staged.ran.closed.reductions[0][0]
    assert min(start for span in behind.trace.spans if behind.trace.tasks[span.task].name == "weight gradients"
               for start in [span.start_ps]) < max(behind.staged.pass_ends.values())  # fmt: skip


def test_stages_under_deepspeed():
    """ZeRO-1: whole buckets all-reduced in 16 bits after all passes, one gather; a tied table summed in 16 bits."""
    case = staged("pp=2,dp=2,dp_library=deepspeed,zero=1", 4)
    result = simulate(case)
    own = 3 * LAYER + ENDS[0]
    found = sums(result)
    assert found["all_reduce", "weight gradients"] == found["all_gather", PARAMETERS] == 2 * own
    assert found["all_reduce", "shared gradients"] == 2 * 512 * 256
    assert found["all_reduce", "overflow"] == 1
    assert_equal(*both(case))


def test_shards_of_few_replicas():
    """HSDP: reduced over those that share a copy, then their shards over the copies."""
    found = sums(simulate(staged("pp=2,dp=4,dp_library=fsdp,zero=2,shard_group=2", 4, **UNTIED)))
    own = 3 * LAYER + ENDS[0]
    assert found["reduce_scatter", "weight gradients"] == 4 * own
    assert found["all_reduce", "weight gradients"] == 2 * own


@pytest.mark.parametrize(
    ("plan", "changes", "told"),
    [
        ("dp_library=fsdp,zero=3", UNTIED, "zero=2, which keeps them gathered"),
        ("zero=3", UNTIED, "use zero=1, or dp_library=fsdp with zero=2"),
        ("dp_library=deepspeed,zero=2", UNTIED, "use zero=1, or dp_library=fsdp with zero=2"),
        ("dp_library=fsdp,zero=2", {}, "share no embedding, which the model ties"),
        ("dp_library=ddp", {}, "share no embedding, which the model ties"),
        ("dp_library=fsdp,zero=2,virtual_pp=4", UNTIED, "use virtual_pp=3 or less"),
        ("dp_library=ddp,virtual_pp=2", UNTIED, "use dp_library=fsdp, or 1f1b or gpipe without virtual_pp"),
        ("dp_library=deepspeed,zero=1,virtual_pp=2", UNTIED, "runs 1f1b alone"),
    ],
)
def test_what_libraries_do_not_have(plan, changes, told):
    with pytest.raises(InputError, match=told):
        staged(f"pp=2,dp=2,{plan}", 4, layers=8, **changes)


# ------------------------------------------------------------ outputs that are kept


@pytest.mark.parametrize(
    ("plan", "kept"),
    [
        ("pp=4", [4, 3, 2, 0]),
        ("pp=4,tp=2,sequence_parallel", [4, 3, 2, 0]),
        ("pp=2,virtual_pp=2", [5, 2]),
        ("pp=2,recompute=full,ulysses=2", [2, 0]),
    ],
)
def test_outputs_are_kept_once_they_are_sent(plan, kept):
    """One boundary tensor a micro-batch of a chunk in flight, of the last chunk none: min(p - r, m) of 1F1B, of the
    interleaved schedule (v - 1) p + 2 (p - 1 - r) + 1, one of them on the last stage of the last chunk. Times stay.
    """
    freed, held = (simulate(staged(f"{plan},pp_deallocate={it}", 8, layers=8)) for it in ("true", "false"))
    boundary = boundary_bytes(freed.prepared, freed.numbers)
    more = [two.bytes - one.bytes for one, two in zip(freed.stage_peaks, held.stage_peaks, strict=True)]
    assert more == [boundary * number for number in kept]
    assert freed.step_ps == held.step_ps


@pytest.mark.slow
@pytest.mark.parametrize(
    "plan",
    [
        "pp=3,pp_deallocate=false", "pp=2,ring=2,ring_cut=contiguous,pp_deallocate=false",
        "pp=2,virtual_pp=2,pp_schedule=zbv", "pp=2,virtual_pp=2,pp_schedule=interleaved_zero_bubble",
    ],
)  # fmt: skip
def test_folded_steps_that_keep_outputs_equal_written_out_ones(plan):
    assert_equal(*both(staged(plan, 6, layers=7, causal=True)))


def test_torch_keeps_outputs():
    """It has no such option."""
    torch, freed, held = (simulate(staged(f"pp=2,{way}", 4)).peak_bytes for way in (
        "pp_sends=torch", "pp_deallocate=true", "pp_deallocate=false"
    ))  # fmt: skip
    assert torch == held > freed
