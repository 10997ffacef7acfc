"""Windows of attention, layers with and without one, and sinks: pairs counted one by one, measured kernels, FLOPs."""

import csv
import io

import numpy as np
import pytest

from spsim import Model, Scenario, load_model, simulate
from spsim.costs.flops import head_flops, layer_flops
from spsim.costs.kernels import ComputeCost
from spsim.errors import InputError
from spsim.inputs.grid import Grid
from spsim.inputs.model import LayerType
from spsim.inputs.plan import parse_plan
from spsim.inputs.profiles import load_profile
from spsim.inputs.workload import Workload
from spsim.program.assembly import layer_program
from spsim.program.instructions import Compute
from spsim.program.recompute import LayerKind, layer_kinds
from spsim.simulation import simulate_many
from spsim.work import FlashAttention

DENSE = {
    "layers": 6, "hidden": 2880, "ffn_hidden": 2880, "heads": 64, "kv_heads": 8, "head_dim": 64, "gated_mlp": True,
    "vocab": 32000,
}  # fmt: skip
EVERY_SECOND = {**DENSE, "sliding_window": 128, "layer_types": ("sliding_attention", "full_attention")}


def attention(tokens, window=0, *, direction="forward", batch=1, heads=1, dtype=None):
    moved = (1 if direction == "forward" else 2) * batch * tokens * 4 * heads * 64 * 2
    return FlashAttention("cudnn", direction, batch, heads, heads, 64, 64, tokens, tokens, tokens**2, True, moved,
                          dtype=dtype, window=window)  # fmt: skip


@pytest.mark.parametrize("tokens", [1, 7, 64])
def test_pairs_are_those_in_the_window(tokens):
    """Counted one by one, but where the causal half of the square, which leaves half of the diagonal out, is less."""
    for window in range(1, tokens + 3):
        pairs = sum(min(query + 1, window) for query in range(tokens))
        assert attention(tokens, window).twice_pairs_in_window == min(2 * pairs, tokens**2)
    assert attention(tokens).twice_pairs_in_window == tokens**2


MEASURED = """\
hardware,dtype,direction,tokens,time_us
gb200-nvl72,bf16,forward,2048,109
gb200-nvl72,bf16,forward,16384,822
gb200-nvl72,bf16,backward,2048,237
gb200-nvl72,bf16,backward,16384,1818
gb300-nvl72,bf16,forward,2048,104
gb300-nvl72,bf16,forward,16384,790
gb300-nvl72,bf16,backward,2048,227
gb300-nvl72,bf16,backward,16384,1712
gb200-nvl72,fp8,forward,8192,385
gb200-nvl72,fp8,backward,2048,536
gb200-nvl72,fp8,backward,16384,23231
gb300-nvl72,mxfp8,forward,8192,342
gb300-nvl72,mxfp8,backward,2048,581
gb300-nvl72,mxfp8,backward,16384,24996
"""
"""NVIDIA/cudnn-frontend at 3929da2, benchmark/sdpa_benchmark_training/results/gpt_oss: cuDNN 9.22, batch 2, 128 heads
of 64, a window of 128. In 8 bits the backward pass computes all pairs."""


@pytest.mark.parametrize("row", [*csv.DictReader(io.StringIO(MEASURED))], ids=lambda row: "-".join(row.values()))
def test_kernels_with_a_window_take_what_was_measured(row):
    """Nothing is fitted to windows in 16 bits: tiles of the blocks that meet it."""
    dtype = None if row["dtype"] == "bf16" else row["dtype"]
    work = attention(int(row["tokens"]), 128, direction=row["direction"], batch=2, heads=128, dtype=dtype)
    cost = ComputeCost(load_profile(row["hardware"]), "bf16", burst=True)
    assert cost.duration(work) * 1e6 == pytest.approx(float(row["time_us"]), rel=0.17)


def test_a_window_that_holds_the_sequence_changes_nothing():
    cost = ComputeCost(load_profile("dgx-h100"), "bf16")
    for tokens, window in ((4096, 4096), (4096, 9999), (512, 512)):
        assert cost.duration(attention(tokens, window, heads=32)) == cost.duration(attention(tokens, heads=32))


def test_time_grows_with_the_window_and_with_the_sequence():
    cost = ComputeCost(load_profile("dgx-h100"), "bf16")
    for direction in ("forward", "backward"):
        by_window = [cost.duration(attention(32768, w, heads=32, direction=direction)) for w in (128, 1024, 8192, 0)]
        assert by_window == sorted(by_window)
        long, short = (cost.duration(attention(s, 1024, heads=32, direction=direction)) for s in (65536, 32768))
        assert long == pytest.approx(2 * short, rel=0.02)


# ------------------------------------------------------------ layers


def test_layers_take_turns():
    kinds = layer_kinds(parse_plan(""), [Model(**EVERY_SECOND).type_of(layer) for layer in range(5)])
    window, full = LayerKind(), LayerKind(type=LayerType(full=True))
    assert kinds == [(window, 1), (full, 1), (window, 1), (full, 1), (window, 1)]
    local = Model(**{**EVERY_SECOND, "layers": 14, "layer_types": 5 * ("sliding_attention",) + ("full_attention",)})
    assert local.types == {LayerType(): 12, LayerType(full=True): 2}


def test_layers_that_are_alike_need_no_types():
    same = Model(**{**EVERY_SECOND, "layer_types": ("full_attention",)})
    assert (same.sliding_window, same.layer_types) == (None, None)
    assert same == Model(**DENSE)
    every = Model(**{**EVERY_SECOND, "layer_types": ("sliding_attention",)})
    assert (every.sliding_window, every.layer_types) == (128, None)


def step(model, plan="", tokens=8192, **further):
    workload = {"seq_len": tokens, "global_batch": 4 * parse_plan(plan).dp}
    return simulate(Scenario(hardware="dgx-h100", model=model, plan=plan, workload=workload), **further)


def test_a_step_is_its_layers():
    """Half of the layers with a window save half of what all would save; FLOPs of a micro-batch by hand."""
    mixed, full, window = (
        step(Model(**{**EVERY_SECOND, "layer_types": types}))
        for types in (EVERY_SECOND["layer_types"], ("full_attention",), ("sliding_attention",))
    )
    assert 2 * mixed.step_ps == pytest.approx(full.step_ps + window.step_ps, rel=1e-3)  # the power limit is no sum
    pairs = 3 * (8192**2 + 128 * (2 * 8192 - 127)) // 2
    other = 3 * 2 * 8192 * 6 * (Model(**DENSE).layer_parameters - 2 * 2880)
    head = 3 * 2 * 8192 * 2880 * 32000
    assert mixed.amounts.causal == 3 * 4 * 64 * 64 * pairs + other + head
    assert layer_flops(Model(**EVERY_SECOND), Workload(seq_len=64), causal=True).attention == 4 * 64 * 64 * 64**2 // 2


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["ulysses=2", "ring=2,ring_kind=all_gather", "pp=4,tp=2,sequence_parallel"])
def test_folded_is_unfolded(plan):
    one, other = (step(EVERY_SECOND, plan, fold=fold) for fold in (True, False))
    assert one.step_ps == other.step_ps
    assert one.peak_bytes == other.peak_bytes


def test_many_workloads_at_once():
    scenario = Scenario(hardware="dgx-h100", model=EVERY_SECOND, plan="tp=2", workload={"seq_len": 512})
    sizes = [(64, 1, 2), (512, 2, 2), (4096, 1, 4)]
    found = simulate_many(Grid.of(scenario, sizes))
    alone = [
        simulate(Scenario(hardware="dgx-h100", model=EVERY_SECOND, plan="tp=2",
                          workload={"seq_len": s, "micro_batch": b, "global_batch": g})) for s, b, g in sizes
    ]  # fmt: skip
    assert np.asarray(found.step_ps).tolist() == [result.step_ps for result in alone]
    assert np.asarray(found.mfu_causal).tolist() == [result.mfu_causal for result in alone]


def test_blocks_of_keys_are_not_sent_round_under_a_window():
    """As Transformer Engine refuses it; where the window holds the sequence it is none."""
    with pytest.raises(InputError, match=r"ring = 2 with sliding_window = 128.*use ring_kind=all_gather or ulysses"):
        step(EVERY_SECOND, "ring=2")
    assert step(EVERY_SECOND, "ring=2", tokens=128).step_ps == step(DENSE, "ring=2", tokens=128).step_ps


def test_units_of_layers_that_are_not_alike_are_refused():
    with pytest.raises(InputError, match="a unit of layers 0 to 1, which are not alike"):
        step(EVERY_SECOND, "recompute=full,recompute_layers=2,recompute_method=uniform")
    step(EVERY_SECOND, "recompute=full,recompute_layers=1,recompute_method=uniform")


@pytest.mark.parametrize(("plan", "held"), [("", 64), ("tp=4,sequence_parallel", 16), ("ulysses=4", 16)])
def test_sinks_are_a_number_a_head(plan, held):
    models = Model(**{**DENSE, "attention_sinks": True}), Model(**DENSE)
    assert models[0].layer_parameters - models[1].layer_parameters == 64
    own, without = (layer_program(model, parse_plan(plan), Workload(seq_len=4096)) for model in models)
    assert own.parameters - without.parameters == held
    works = [[s.work for s in program.instructions if isinstance(s, Compute)] for program in (own, without)]
    assert works[0] == works[1]
    with_ring = layer_program(models[0], parse_plan("ring=2"), Workload(seq_len=4096))
    assert [sync.axes for sync in with_ring.weight_sync if sync.weight == "sinks"] == [("ring",)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_types": ("sliding_attention",)}, "sliding_attention needs sliding_window"),
        ({"layer_types": ()}, "layer_types"),
        ({"sliding_window": 128, "causal": False}, "sliding_window = 128 needs causal"),
        ({"layer_types": ("chunked_attention",)}, "layer_types"),
    ],
)
def test_what_does_not_fit_is_refused(changes, message):
    with pytest.raises(InputError, match=message):
        Model(**{**DENSE, **changes})


def test_flops_of_gpt_oss_are_as_published():
    """32.63 GFLOP a token of 4096 (NVIDIA-NeMo/Megatron-Bridge at 067f987d, docs/performance-summary.md from 26.06 on):
    three matrices of an expert, windows counted; the router is not.
    """
    model = load_model("gpt-oss-120b")
    workload = Workload(seq_len=4096)
    layers = sum(
        count * layer_flops(model.of_type(own), workload, causal=True).training() for own, count in model.types.items()
    )
    found = (layers + head_flops(model, workload).training()) / 4096 / 1e9
    assert found == pytest.approx(32.63, rel=0.005)
    assert found - 6 * 36 * 2880 * 128 / 1e9 == pytest.approx(32.63, abs=0.005)
