"""Whole steps of replicas: what they send, folded as unfolded, and what overlap hides."""

import json

import pytest

from spsim import Scenario, simulate
from spsim.errors import InputError
from spsim.inputs.grid import Grid
from spsim.inputs.model import Model
from spsim.results.accounts import of_step
from spsim.simulation import simulate_many
from tests.test_replicas import calls_of

MODEL = Model(
    layers=4, hidden=64, heads=4, vocab=512, ffn_hidden=256, positions="none", tied_embeddings=False, dropout=0.0
)


def result(plan, *, fold=True, micro_batches=2, precision="bf16", **model):
    """Of the small model on H100s."""
    replicas = int(dict(item.split("=") for item in plan.split(",") if "=" in item).get("dp", 1))
    workload = {"seq_len": 128, "global_batch": replicas * micro_batches, "precision": precision}
    own = MODEL.model_copy(update=model)
    return simulate(Scenario(hardware="dgx-h100", model=own, plan=plan, workload=workload, scope="step"), fold=fold)


def sent(simulated):
    """(collective, bytes) of the messages over weights, in order of issue."""
    found = []
    for piece in simulated.trace.pieces:
        for span, info in zip(piece.spans(), simulated.trace.describe(piece), strict=True):
            if info.purpose == "weight":
                found.append((span.task, info.collective, info.message_bytes))
    return [message[1:] for message in sorted(found)]


def expected(case):
    return [call[1:3] for call in calls_of(case)]


STEPS = {
    "fsdp2_reshardTrue_fp32": ("dp=2,dp_library=fsdp,zero=3", "fp32"),
    "hsdp2x2_bf16_reduce_fp32_sync_every": ("dp=4,shard_group=2,dp_library=fsdp,zero=3", "bf16"),
    "ds_zero0_bf16": ("dp=2,dp_library=deepspeed", "bf16"),
    "ds_zero1_overlap_comm_bucket100k": ("dp=2,dp_library=deepspeed,zero=1,dp_overlap,bucket_elements=100000", "bf16"),
    "ds_zero2_bucket100k": ("dp=2,dp_library=deepspeed,zero=2,bucket_elements=100000", "bf16"),
    "ds_zero3_bf16": ("dp=2,dp_library=deepspeed,zero=3", "bf16"),
    "ddp_h64_cap0.25MiB_bf16": ("dp=2,dp_library=ddp,bucket_elements=131072", "bf16"),
}


@pytest.mark.parametrize("case", STEPS)
def test_a_simulated_step_sends_what_was_recorded(case):
    plan, precision = STEPS[case]
    simulated = result(plan, precision=precision)
    assert sent(simulated) == expected(case)
    assert sum(call.calls for call in simulated.collectives) == len(sent(simulated))


PLANS = [
    "dp=2", "dp=2,distributed_optimizer,dp_overlap,bucket_elements=60000", "dp=4,tp=2,sequence_parallel,zero=3",
    "dp=2,ulysses=2,distributed_optimizer,dp_overlap", "dp=4,shard_group=2,dp_library=fsdp,zero=3",
    "dp=2,ring=2,dp_library=fsdp,zero=2,recompute=full", "library=torchtitan,dp=2,tp=2,recompute=full",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("plan", PLANS)
def test_folded_equals_unfolded(plan):
    """All ranks apart, every layer and micro-batch."""
    one, other = result(plan, micro_batches=3), result(plan, micro_batches=3, fold=False)
    assert one.step_ps == other.step_ps
    assert one.peak_bytes == other.peak_bytes
    assert one.weight_sync_ps == other.weight_sync_ps
    assert [span for span in one.trace.spans if span.rank == 0] == [s for s in other.trace.spans if s.rank == 0]
    assert of_step(one.trace) == of_step(other.trace)
    assert one.comm_bytes_per_gpu_by_op == other.comm_bytes_per_gpu_by_op


def test_sums_over_tp_are_waited_for():
    """torchtitan's within the backward pass, before a unit is reduced: of a layer those of two norms with biases and of
    the biases of projection and fc2. The next layer begins behind them, whatever runs beside the reduction.
    """
    trace = result("library=torchtitan,dp=2,tp=2", micro_batches=1).trace
    found = [(span, trace.tasks[span.task]) for span in trace.spans if span.rank == 0]
    sums = [span for span, info in found if info.collective == "all_reduce" and info.message_bytes == 2 * MODEL.hidden]
    reduced = [span for span, info in found if info.collective == "reduce_scatter" and info.part == "weight_sync"]
    assert (len(sums), len(reduced)) == (6 * MODEL.layers + 2, MODEL.layers + 2)
    for message in sums:
        assert message.end_ps <= max(span.start_ps for span in reduced)
        beside = {
            info.part
            for span, info in found
            if span.lane == "compute" and span.start_ps < message.end_ps and span.end_ps > message.start_ps
        }
        assert beside <= {"accumulate"}, "what ends a layer, not what begins the next"


@pytest.mark.parametrize("plan", ["tp=2", "pp=2"])
def test_a_rank_alone_shards_nothing(plan):
    """In time and memory, whatever the library."""
    alone, plain = (result(f"{plan}{own},pp_sends=torch") for own in (",dp_library=fsdp,zero=2", ""))
    assert (alone.step_ps, alone.peak_bytes) == (plain.step_ps, plain.peak_bytes)


def test_overlap_hides_what_it_can():
    """A model large enough that a layer takes longer than its messages: all but the first gather, the last bucket, and
    the update are hidden.
    """
    large = {"hidden": 4096, "heads": 32, "ffn_hidden": 16384, "layers": 8}
    plan = "dp=8,distributed_optimizer"
    none, gradients, both = (
        result(plan + option, **large).step_ps for option in ("", ",dp_overlap=gradients", ",dp_overlap")
    )
    assert both < gradients < none


def test_sharded_weights_are_not_there_as_a_whole():
    """Zero 3 holds two layers and what is not in layers beside its shards; each step from stage to stage holds less."""
    large = {"hidden": 1024, "layers": 16, "ffn_hidden": 4096}
    held = [
        result(f"dp=8,dp_library={library},zero={zero}", **large).peak_bytes
        for library, zero in (("ddp", 0), ("fsdp", 2), ("fsdp", 3))
    ]
    assert held == sorted(held, reverse=True)
    assert held[2] < held[1] / 1.5


@pytest.mark.parametrize("micro_batches", [3, 40])
def test_micro_batches_and_layers_are_folded(micro_batches):
    simulated = result(
        "dp=2,distributed_optimizer,dp_overlap,bucket_elements=60000", layers=24, micro_batches=micro_batches
    )
    assert simulated.events < 4000
    assert simulated.folded


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["dp=2,distributed_optimizer,dp_overlap,bucket_elements=60000", PLANS[-2]])
def test_what_others_see_of_a_step(plan, tmp_path):
    """Messages between kernels are in traces, tables and the list of what is assumed as any others."""
    simulated = result(plan)
    path = tmp_path / "trace.json"
    simulated.to_chrome_trace(path)
    events = json.loads(path.read_text())["traceEvents"]
    names = [event["name"].partition(" for ")[0] for event in events if event["ph"] == "X" and event["pid"] == 1]
    assert names.count("reduce_scatter") == sum(kind == "reduce_scatter" for kind, _ in sent(simulated))
    simulated.to_kineto_traces(tmp_path)
    assert set(simulated.spans["collective"]) >= {"all_gather", "reduce_scatter"}
    assert json.dumps(simulated.to_json())
    assert simulated.assumed is not None
    simulated.plot_timeline(tmp_path / "timeline.png")
    simulated.plot_memory(tmp_path / "memory.png")


@pytest.mark.parametrize("plan", ["dp=2", "tp=2,sequence_parallel,dp=2,distributed_optimizer", PLANS[-2]])
def test_many_workloads_at_once(plan):
    """Where nothing is sent between kernels; else they are simulated one by one."""
    sizes = [(seq_len, micro_batch, 12) for seq_len in (128, 512) for micro_batch in (1, 3)]
    case = {"hardware": "dgx-h100", "model": MODEL, "plan": plan, "scope": "step"}
    cases = [
        Scenario(**case, workload={"seq_len": s, "micro_batch": b, "global_batch": total}) for s, b, total in sizes
    ]
    together = simulate_many(Grid.of(cases[0], sizes))
    assert (together is None) == ("fsdp" in plan)
    if together is not None:
        alone = [simulate(each) for each in cases]
        assert list(together.step_ps) == [found.step_ps for found in alone]
        assert list(together.peak_bytes) == [found.peak_bytes for found in alone]


@pytest.mark.parametrize("plan", ["pp=2,dp=4", "dp=4"])
def test_a_plan_does_not_step_with_the_optimizer_of_another(plan):
    """What is prepared is kept for plans that are alike, and the kernels of an update are not."""
    large = {"hidden": 1024, "ffn_hidden": 4096, "layers": 8}
    usual = result(f"{plan},distributed_optimizer", **large)
    aware = result(f"{plan},distributed_optimizer,precision_aware_optimizer,moment_dtype=bf16", **large)
    assert aware.step_ps < usual.step_ps


@pytest.mark.parametrize(
    ("plan", "scope", "words"),
    [
        ("dp=2,zero=3", "layers", ["zero = 3", "scope = 'layers'", "scope = 'step'"]),
        ("dp=2,dp_overlap,distributed_optimizer", "layers", ["dp_overlap", "scope = 'layers'"]),
        ("dp=2,pp=2,dp_library=fsdp,zero=3", "step", ["zero = 3", "pp = 2", "not simulated yet"]),
    ],
)
def test_where_replicas_are_not_simulated(plan, scope, words):
    with pytest.raises(InputError) as refused:
        Scenario(hardware="dgx-h100", model=MODEL, plan=plan, workload={"seq_len": 128}, scope=scope)
    for word in words:
        assert word in str(refused.value)
