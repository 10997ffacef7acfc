"""How tokens get to experts: copies by counting, bytes and kernels of each dispatcher, rates as measured."""

import csv
from itertools import combinations

import numpy as np
import pytest

from spsim import Model, Scenario, explain, simulate
from spsim.costs.collectives import CommCost
from spsim.costs.kernels import ComputeCost
from spsim.errors import InputError
from spsim.inputs.expert_loads import drawn_load
from spsim.inputs.plan import parse_plan
from spsim.inputs.profiles import load_profile
from spsim.inputs.resources import data_directory
from spsim.inputs.workload import Workload
from spsim.program.assembly import layer_program
from spsim.program.instructions import Communication, Compute
from spsim.program.routing import Dispatch, distinct_groups
from spsim.results.accounts import of_step
from spsim.units import GB
from spsim.work import Gemm

SMALL = {
    "layers": 2, "hidden": 2048, "ffn_hidden": 6144, "heads": 16, "kv_heads": 4, "vocab": 32000, "gated_mlp": True,
    "experts": 64, "experts_per_token": 4, "expert_ffn_hidden": 512,
}  # fmt: skip


def layer(plan, precision="bf16", **fields):
    workload = Workload(seq_len=4096, micro_batch=1, precision=precision)
    return layer_program(Model(**{**SMALL, **fields}), parse_plan(plan), workload)


def exchanged(program):
    return [step for step in program.instructions if isinstance(step, Communication)]


@pytest.mark.parametrize(("experts", "per_token", "groups"), [(8, 2, 4), (6, 3, 2), (8, 3, 8)])
def test_copies_of_a_token_are_those_of_every_way_to_pick(experts, per_token, groups):
    own = experts // groups
    ways = [len({expert // own for expert in picked}) for picked in combinations(range(experts), per_token)]
    assert float(distinct_groups(experts, per_token, groups)) == pytest.approx(sum(ways) / len(ways))


def test_a_library_sends_one_copy_to_each_rank():
    """4096 tokens of 2048 numbers of 2 bytes and 4 probabilities of 4, 3.53 times in the place of 4."""
    (step, *_) = exchanged(layer("dp=16,ep=16,moe_dispatcher=hybridep"))
    copies = 16 * (1 - np.prod([(60 - i) / (64 - i) for i in range(4)]))
    assert step.message_bytes == pytest.approx(4096 * (2 * 2048 + 4 * 4) * copies, rel=3e-3)
    assert step.dispatch == Dispatch("hybridep", 64, 4, "dispatch")


def test_a_library_combines_what_was_dispatched():
    program = layer("dp=16,ep=16,moe_dispatcher=deepep")
    assert [(step.part, step.dispatch.way) for step in exchanged(program)] == [
        ("forward", "dispatch"), ("forward", "combine"), ("backward", "dispatch"), ("backward", "combine")
    ]  # fmt: skip
    kernels = [step.operator for step in program.forward if isinstance(step, Compute)]
    assert ["permute" in kernels, "unpermute" in kernels, "dispatch" in kernels] == [True, True, False]


def test_a_gather_reduces_what_experts_make():
    """All ranks have all tokens: one all-gather of them and of the router's choice, one reduce-scatter."""
    kinds = [(step.part, step.collective) for step in exchanged(layer("dp=4,ep=4,moe_dispatcher=allgather"))]
    assert kinds.count(("forward", "reduce_scatter")) == 1
    assert {kind for _, kind in kinds} == {"all_gather", "reduce_scatter"}


def test_products_of_experts_run_in_the_type_of_the_recipe():
    program = layer("dp=4,ep=4", precision="mxfp8")
    types = {
        step.operator: step.work[0].dtype
        for step in program.forward
        if isinstance(step, Compute) and isinstance(step.work[0], Gemm)
    }
    assert types["expert_fc1"] == types["expert_fc2"] == "mxfp8"
    assert types["router"] is None


def test_a_fused_kernel_does_what_lies_between_the_products():
    fused, apart = (layer(plan, precision="mxfp8") for plan in ("dp=4,ep=4,fused_grouped_mlp", "dp=4,ep=4"))
    alone = {step.operator for step in apart.forward if isinstance(step, Compute) and step.work[0]}
    inside = {step.operator for step in fused.forward if isinstance(step, Compute) and not step.work[0]}
    assert inside == {"expert_swiglu", "expert_fc2_cast"} <= alone
    assert fused.saved_bytes("activation") == apart.saved_bytes("activation")


def test_grouped_products_are_as_fast_as_measured():
    """Transformer Engine's on B200: mean error of 60 about 14 %, and none of few tokens is priced as a full product."""
    with (data_directory() / "b200_grouped_products.csv").open() as file:
        rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    profile = load_profile("dgx-b200")
    cost = ComputeCost(profile, "bf16")
    errors = []
    for row in rows:
        e, t, n, k = (int(row[name]) for name in ("experts", "tokens", "width", "depth"))
        for name, (rows_, columns, depth), accumulated in (
            ("forward", (t, n, k), 0), ("input_gradient", (t, k, n), 0), ("weight_gradient", (n, k, t), e * n * k)
        ):  # fmt: skip
            moved = 2 * e * (t * n + n * k + t * k)
            time = cost.duration(Gemm(rows_, columns, depth, e, moved, accumulated, launched=e))
            errors.append(np.log(2 * e * t * n * k / (row[name] * profile.peak("bf16")) / time))
    assert np.abs(errors).mean() < 0.15


def test_messages_of_a_library_take_the_measured_time():
    """HybridEP on GB200: 4096 tokens of 7168 in bf16, 5.4 copies among 8 ranks, 764 GB/s to them."""
    comm = CommCost(load_profile("gb200-nvl72"))
    message = 319e6
    found = comm.dispatched(Dispatch("hybridep", 64, 8, "dispatch"), message, 8)
    assert found == pytest.approx(80e-6 + message / 764 / GB)
    between = [comm.dispatched(Dispatch("hybridep", 64, 8, "dispatch"), message, n) for n in (8, 12, 16, 64)]
    assert between == sorted(between)


def test_over_nodes_a_token_goes_to_each_node_once():
    """Two nodes of H100: nearly all of 8 experts of 128 lie on both, 6.6 ranks have any."""
    comm = CommCost(load_profile("dgx-h100"))
    copies = float(distinct_groups(128, 8, 2) / distinct_groups(128, 8, 16))
    message = 4096 * 6.6 * 4096
    found = comm.dispatched(Dispatch("hybridep", 128, 8, "combine"), message, 16, 2)
    assert found == pytest.approx(160e-6 + message * copies / 68 / GB)
    assert copies == pytest.approx(1.994 / 6.597, rel=1e-3)


def step(plan, hardware="gb200-nvl72", **workload):
    given = {"seq_len": 4096, "global_batch": 16, "precision": "mxfp8", **workload}
    return simulate(Scenario(hardware=hardware, model=Model(**SMALL), plan=plan, workload=given))


def test_a_step_says_which_library_sends():
    found = step("dp=8,ep=8,moe_dispatcher=hybridep")
    calls = {call.algorithm for call in found.collectives if call.collective == "all_to_all"}
    assert calls == {"hybridep"}
    assert found.comm_bytes_per_gpu_by_op["all_to_all"] < step("dp=8,ep=8").comm_bytes_per_gpu_by_op["all_to_all"]


@pytest.mark.parametrize("dispatcher", ["allgather", "deepep", "hybridep"])
@pytest.mark.slow
def test_folded_equals_unfolded(dispatcher):
    plan = f"tp=2,sequence_parallel,dp=4,ep=8,expert_tp=1,moe_dispatcher={dispatcher}"
    given = {"seq_len": 2048, "global_batch": 8, "precision": "mxfp8"}
    case = Scenario(hardware="gb200-nvl72", model=Model(**SMALL), plan=plan, workload=given)
    folded, unfolded = (simulate(case, fold=fold) for fold in (True, False))
    assert (folded.step_time_s, folded.peak_bytes) == (unfolded.step_time_s, unfolded.peak_bytes)


def test_explain_shows_no_kernel_where_the_library_has_it():
    rows = {
        row.operator: row
        for row in explain(Model(**SMALL), "dp=4,ep=4,moe_dispatcher=deepep", {"seq_len": 4096}).operators
    }
    assert [c.collective for c in rows["permute"].communication if c.part == "forward"] == ["all_to_all"]


@pytest.mark.parametrize(
    ("hardware", "plan", "precision", "words"),
    [
        ("dgx-a100-80gb", "dp=8,ep=8,moe_dispatcher=deepep", "bf16", "no dispatchers.deepep.levels.nvlink"),
        ("gb200-nvl72", "dp=8,ep=8,fused_grouped_mlp", "bf16", "for mxfp8 and swiglu only"),
        ("gb200-nvl72", "tp=2,sequence_parallel,dp=8,ep=8,moe_dispatcher=hybridep", "bf16", "use expert_tp=1"),
    ],
)
def test_what_cannot_be_is_one_line(hardware, plan, precision, words):
    with pytest.raises(InputError, match=words):
        step(plan, hardware, precision=precision)


# ------------------------------------------------------------ behind passes of another micro-batch


def test_what_is_left_of_an_exchange():
    """The longer of what kernels of the other micro-batch do not hide and of what they lose, in all passes but the
    first forward and the last backward one.
    """
    plan = "dp=8,ep=8,moe_dispatcher=hybridep,cuda_graphs=full_iteration"
    apart, beside = step(plan, global_batch=64), step(f"{plan},moe_a2a_overlap", global_batch=64)
    micro_batches, share = 8, 32 / 148
    program = layer("dp=8,ep=8,moe_dispatcher=hybridep", precision="mxfp8")
    (to, back), (down, up) = (
        [s.operator for s in steps if isinstance(s, Communication)] for steps in (program.forward, program.backward)
    )
    frame = {(row["operator"], row["part"]): row for row in apart.operator_rows}

    def sent(operator, part):
        row = frame[f"all_to_all for {operator}", part]
        return row["time_ms"] / row["calls"] / 1e3

    parts = {
        (phase, inside): sum(
            frame[s.operator, s.part]["time_ms"] / frame[s.operator, s.part]["calls"] / 1e3
            for s in steps
            if isinstance(s, Compute) and any(s.work) and (s.operator in INSIDE) == inside
        )
        for phase, steps in (("forward", program.forward), ("backward", program.backward))
        for inside in (True, False)
    }
    pairs = [
        (sent(to, "forward"), parts["backward", True]), (sent(back, "forward"), parts["backward", False]),
        (sent(down, "backward"), parts["forward", False]), (sent(up, "backward"), parts["forward", True]),
    ]  # fmt: skip
    saved = sum(c - max(c - k, share * c) for c, k in pairs)
    expected = SMALL["layers"] * (micro_batches - 1) * saved
    assert apart.step_time_s - beside.step_time_s == pytest.approx(expected, rel=1e-3)


INSIDE = {"expert_fc1", "expert_fc1_cast", "expert_fc1_gradient_cast", "expert_swiglu", "expert_fc2", "expert_fc2_cast",
          "expert_fc2_gradient_cast", "permute", "unpermute"}  # fmt: skip
"""Kernels between the exchanges."""


def test_the_host_waits_for_counts_of_tokens_unless_all_is_one_graph():
    """Then tokens on their way to experts have nothing beside them; delayed weight gradients hide no less."""
    plan = "dp=8,ep=8,moe_dispatcher=hybridep"
    apart, eager, graph, late = (
        step(f"{plan}{more}", global_batch=64).step_time_s
        for more in (
            "", ",moe_a2a_overlap", ",moe_a2a_overlap,cuda_graphs=full_iteration",
            ",moe_a2a_overlap,delay_wgrad,cuda_graphs=full_iteration",
        )
    )  # fmt: skip
    assert apart > eager > graph >= late


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        ("dp=8,ep=8,moe_a2a_overlap,recompute=full", "recomputation of experts"),
        ("dp=4,ep=4,pp=2,moe_a2a_overlap", "pp = 2 of one chunk each"),
    ],
)
def test_passes_that_have_none_beside_them(plan, words):
    with pytest.raises(InputError, match=words):
        step(plan)


# ------------------------------------------------------------ loads


def test_the_rank_with_the_most_tokens_paces_the_others():
    """Half as many again: as much more is sent, multiplied and kept of experts, and nothing more of all else."""
    even, uneven = (layer(f"dp=16,ep=16,expert_imbalance={load}") for load in (1.0, 1.5))
    sent = [exchanged(program)[0].message_bytes for program in (even, uneven)]
    assert sent[1] == 1.5 * sent[0]
    work = [{s.operator: s.work[0] for s in program.forward if isinstance(s, Compute)} for program in (even, uneven)]
    assert work[1]["expert_fc1"].m == 1.5 * work[0]["expert_fc1"].m
    assert work[1]["qkv"] == work[0]["qkv"]
    kept = [sum(s.bytes for s in program.saved if "expert" in s.tensor) for program in (even, uneven)]
    assert kept[1] == 1.5 * kept[0]


def test_a_capacity_pads_to_it_whatever_is_picked():
    padded, uneven = (
        layer(f"dp=16,ep=16,{plan}")
        for plan in ("moe_capacity_factor=1.5,expert_concentration=1", "expert_imbalance=1.5")
    )
    assert exchanged(padded)[0].message_bytes == exchanged(uneven)[0].message_bytes


def test_loads_are_drawn_by_seed():
    """Of two experts with evenly drawn shares the larger has 3/4 in the mean, 1.5 times the half; even loads have 1."""
    assert drawn_load(2, 2, 20_000, 1.0, 0) == pytest.approx(1.5, rel=5e-3)
    assert drawn_load(64, 8, 10, 1e6, 0) == pytest.approx(1, abs=1e-2)
    one, again, other = (drawn_load(64, 8, 24, 1.0, seed) for seed in (1, 1, 2))
    assert one == again != other


def test_uneven_loads_cost_time_and_memory_and_say_so():
    even, uneven = (step(f"dp=8,ep=8{more}") for more in ("", ",expert_concentration=1"))
    assert uneven.step_time_s > even.step_time_s
    assert uneven.peak_bytes > even.peak_bytes
    assert any("times the mean, and paces the others" in note for note in uneven.notes)


def test_exchanges_with_experts_are_parts_of_a_step_of_their_own():
    """Beside those of Ulysses, of the same kind."""
    workload = Workload(seq_len=4096, global_batch=8)
    case = Scenario(model=Model(**SMALL), plan="dp=2,ulysses=4,ep=8", workload=workload, hardware="dgx-h100")
    parts = of_step(simulate(case).trace).parts
    assert parts["exposed all-to-all"] > 0
    assert parts["exposed all-to-all with experts"] > 0
    alone = of_step(
        simulate(case.model_copy(update={"plan": parse_plan("dp=8,ep=8"), "workload": workload})).trace
    ).parts
    assert "exposed all-to-all" not in alone


def test_what_tp_overlap_hides_is_around_other_products():
    """Of attention and of shared experts; what goes to experts that are spread over tp stays as it is."""
    plan = "dp=4,tp=2,sequence_parallel,ep=8,expert_tp=1"
    usual, hidden = (layer(f"{plan}{more}", shared_ffn_hidden=512) for more in ("", ",tp_overlap"))

    def kernels(program, experts):
        steps = [step for step in program.instructions if isinstance(step, Compute)]
        return [(step.operator, step.work) for step in steps if ("expert_" in step.operator) == experts]

    def messages(program, axis):
        return [step.message_bytes for step in exchanged(program) if (step.axis == axis)]

    assert kernels(usual, True) == kernels(hidden, True)
    assert len(kernels(usual, False)) < len(kernels(hidden, False))
    for axis in ("ep", "experts"):
        assert messages(usual, axis) == messages(hidden, axis)
    assert len(messages(usual, "tp")) < len(messages(hidden, "tp"))
