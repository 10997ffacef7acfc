"""Blocks that no model here has: dimensions that are products, weights that rest sharded, experts with own rules.

Collectives, bytes and memory are worked out by hand, or held against what FSDP2 and Megatron-Core are known to do.
"""

import math
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from types import SimpleNamespace

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spsim.costs.static_memory import static_memory
from spsim.inputs.model import Model
from spsim.inputs.plan import Plan, parse_plan
from spsim.inputs.profiles import load_profile
from spsim.inputs.workload import Workload
from spsim.program.assembly import program_in
from spsim.program.blocks.block import Block
from spsim.program.blocks.transformer import transformer_layer
from spsim.program.compiler import compile_region
from spsim.program.instructions import LAYER, Communication, Compute
from spsim.program.mesh import Mesh, mesh_of
from spsim.program.placement import shard
from spsim.program.region import Region
from spsim.program.sizes import Template, every_workload
from spsim.program.strategies import SplitRule, split_rules
from spsim.results.derived import Amounts
from spsim.simulation import assemble
from spsim.step.itinerary import Run
from spsim.step.preparation import PreparedStep
from spsim.work import Gemm
from tests.test_template import assert_equals_program

TOKENS_OF_AN_EXPERT = "s*b*k/e"
SIZES = {"s": 512, "b": 8, "h": 64, "f": 96, "e": 16, "k": 2, "a": 8, "d": 16, "v": 1000}
WHOLE = SplitRule((), ())
DATA = SplitRule(("b",), ("b",))


def compiled(operators, rules, degrees, *, named=None, plan=None, **options):
    """The program of a block on a mesh; axes without a rule split nothing."""
    mesh = Mesh(degrees)
    region = Region(operators, {axis: rules.get(axis, WHOLE) for axis in mesh.axes}, mesh, complete(named, mesh))
    return compile_region(region, plan or Plan(), causal=True, **options)


def complete(named, mesh):
    """Rules by name, with those of every axis."""
    return {name: {axis: rules.get(axis, WHOLE) for axis in mesh.axes} for name, rules in (named or {}).items()}


def communications(steps):
    return [step for step in steps if isinstance(step, Communication)]


def calls(steps):
    """(collective, axis, tensor, bytes of the message) in order of issue."""
    return [(c.collective, c.axis, c.tensor, c.message_bytes) for c in communications(steps)]


def order(steps):
    """Kernels and collectives in order of issue, for reading."""
    return [f"{s.collective} {s.tensor}" if isinstance(s, Communication) else f"{s.operator} {s.part}" for s in steps]


# ------------------------------------------------------------ dimensions that are products


def routed(block, experts="e", rules="experts"):
    """A layer of experts: each token goes to k of e, whose outputs are summed by weight."""
    x = block.tensor("x", "s b h")
    scores, chosen = block.tensor("scores", "s b e"), block.tensor("chosen", "s b k")
    dealt = block.tensor("dealt", f"e {TOKENS_OF_AN_EXPERT} h")
    inner, active = (block.tensor(name, f"e {TOKENS_OF_AN_EXPERT} f") for name in ("inner", "active"))
    made, out = block.tensor("made", f"e {TOKENS_OF_AN_EXPERT} h"), block.tensor("out", "s b h")
    t = TOKENS_OF_AN_EXPERT
    block.add("router", "gemm", "s b h, h e -> s b e", [x, block.weight("router_weight", "h e")], [scores], saves=[x])
    block.add("top_k", "softmax", "s b e -> s b k", [scores], [chosen], mixes="e k", saves=[scores])
    block.add("dispatch", "elementwise", f"s b h -> e {t} h", [x], [dealt])
    block.add(
        "up", "gemm", f"e {t} h, e h f -> e {t} f", [dealt, block.weight("up_weight", "e h f")], [inner],
        saves=[dealt], rules=rules,
    )  # fmt: skip
    block.add("gelu", "elementwise", f"e {t} f -> e {t} f", [inner], [active], saves=[inner], rules=rules)
    block.add(
        "down", "gemm", f"e {t} f, e f h -> e {t} h", [active, block.weight("down_weight", "e f h")], [made],
        saves=[active], rules=rules,
    )  # fmt: skip
    block.add("combine", "elementwise", f"e {t} h, s b k -> s b h", [made, chosen], [out], saves=[made, chosen])
    return block.operators


def test_the_size_of_a_product_follows():
    """85 tokens and a third for each of 384 experts."""
    block = Block({"s": 4096, "b": 1, "k": 8, "e": 384, "a": 16, "d": 64}, 2)
    assert block.tensor("dealt", "e s*b*k/e").sizes == (384, Fraction(256, 3))
    assert block.tensor("heads", "a*d").sizes == (1024,)


def test_a_product_is_cut_where_its_factors_are():
    """Sequences over dp and positions over ulysses both cut the tokens of an expert."""
    rules = {"dp": DATA, "ulysses": SplitRule(("s",), ("a",))}
    region = Region(routed(Block(SIZES, 2)), rules, Mesh({"dp": 2, "ulysses": 4}))
    placed = {op.name: op for op in region.operators}
    (dealt,) = placed["dispatch"].outputs
    assert dict(dealt.layout) == dict.fromkeys(("dp", "ulysses"), shard(TOKENS_OF_AN_EXPERT))
    assert dealt.elements == 512 * 8 * 2 * 64 // (2 * 4)
    assert placed["up"].sizes[TOKENS_OF_AN_EXPERT] == 512 * 8 * 2 // 16 // 8
    assert {op.splits for op in region.operators} == {(("dp", "b"), ("ulysses", "s"))}


def test_experts_where_the_tokens_are():
    """Without expert parallelism nothing moves, and the gradients of all weights are summed."""
    program = compiled(
        routed(Block(SIZES, 2)), {"dp": DATA, "ulysses": SplitRule(("s",), ("a",))}, {"dp": 2, "ulysses": 4}
    )
    assert calls(program.instructions) == []
    assert {sync.weight: sync.axes for sync in program.weight_sync} == dict.fromkeys(
        ("router_weight", "up_weight", "down_weight"), ("dp", "ulysses")
    )


def test_heads_and_head_size_in_one_dimension():
    """Megatron's tp of projections whose heads are flattened: columns first, then rows."""
    block = Block(SIZES, 2)
    x, heads, out = block.tensor("x", "s b h"), block.tensor("heads", "s b a*d"), block.tensor("out", "s b h")
    final = block.tensor("final", "s b h")
    block.add("q", "gemm", "s b h, h a*d -> s b a*d", [x, block.weight("q_weight", "h a*d")], [heads], saves=[x])
    block.add("o", "gemm", "s b a*d, a*d h -> s b h", [heads, block.weight("o_weight", "a*d h")], [out], saves=[heads])
    block.add("norm", "norm", "s b h -> s b h", [out], [final], mixes="h")
    program = compiled(block.operators, {"tp": SplitRule(("a",), ("a",))}, {"tp": 4})
    message = 2 * 512 * 8 * 64
    assert calls(program.forward) == [("all_reduce", "tp", "out", message)]
    assert calls(program.backward) == [("all_reduce", "tp", "x", message)]
    works = {step.operator: step.work[0] for step in program.forward if isinstance(step, Compute)}
    assert (works["q"].n, works["o"].k) == (8 * 16 // 4, 8 * 16 // 4)
    assert program.parameters == 2 * 64 * 8 * 16 // 4


def test_flops_of_experts():
    """2 s b k h f for each product, whatever the number of experts."""
    program = compiled(routed(Block(SIZES, 2)), {}, {})
    works = {step.operator: step.work[0] for step in program.forward if isinstance(step, Compute)}
    assert works["up"].flops == works["down"].flops == 2 * 512 * 8 * 2 * 64 * 96
    assert (works["up"].batch, works["up"].m) == (16, 512)


EXPERTS = {"experts": {"ep": SplitRule(("e",), ()), "dp": DATA, "tp": SplitRule(("f",), ())}}
MANY = {"dp": 2, "ep": 8, "tp": 2}
MAIN = {"dp": DATA, "ep": DATA, "tp": SplitRule(("a", "f", "s"), ("a",))}


def experts_at(seq_len, micro_batch, experts, chosen):
    """The routed block for a workload of each of 16 replicas."""
    sizes = {**SIZES, "s": seq_len, "b": 16 * micro_batch, "e": experts, "k": chosen}
    return compiled(routed(Block(sizes, 2)), MAIN, MANY, named=EXPERTS)


@pytest.mark.slow
@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(1, 3000), st.integers(1, 9), st.sampled_from([(384, 8), (64, 6), (8, 2), (24, 5), (160, 6)]))
def test_fractions_of_tokens(x, b, routing):
    """A template of one compilation, at sequences that do not divide among the experts: 4096 * 8 / 384 = 85.3 tokens.
    Bytes are those of whole tokens, since all experts of a rank together have a whole number of them.
    """
    experts, chosen = routing
    unit, divisor = 2, experts // math.gcd(experts, chosen)
    every = every_workload(unit * divisor)
    template = Template(experts_at(every.seq_len, every.micro_batch, *routing), unit, divisor)
    workload = Workload(seq_len=unit * x, micro_batch=b)
    program = experts_at(workload.seq_len, b, *routing)
    assert_equals_program(template, workload, program)
    (up,) = (step.work[0] for step in program.forward if isinstance(step, Compute) and step.operator == "up")
    tokens = Fraction(unit * x * 16 * b * chosen, experts * 2)
    assert up.m == math.ceil(tokens)


def test_a_divisor_that_is_missing_is_noticed():
    """3 does not divide a power of two."""
    every = every_workload(2)
    with pytest.raises(ArithmeticError, match="no polynomial"):
        Template(experts_at(every.seq_len, every.micro_batch, 24, 5), 2)


def test_a_divisor_must_leave_room():
    every = every_workload(2 * 3**20)
    with pytest.raises(ArithmeticError, match="over 63 bits"):
        Template(experts_at(every.seq_len, every.micro_batch, 8, 2), 2, 3**20)


# ------------------------------------------------------------ weights that rest sharded


FSDP = SplitRule(("b",), ("b",), shards_weights=True)
H, F = SIZES["h"], SIZES["f"]
UP, DOWN = 2 * H * F, 2 * F * H
"""Bytes of the two weights."""
X, INNER = 2 * 512 * 2 * H, 2 * 512 * 2 * F
"""Bytes of activations on one of four ranks, each with two sequences."""


def mlp():
    """Two products."""
    block = Block(SIZES, 2)
    x, inner, out = block.tensor("x", "s b h"), block.tensor("inner", "s b f"), block.tensor("out", "s b h")
    block.add("up", "gemm", "s b h, h f -> s b f", [x, block.weight("up_weight", "h f")], [inner], saves=[x])
    block.add("down", "gemm", "s b f, f h -> s b h", [inner, block.weight("down_weight", "f h")], [out], saves=[inner])
    return block.operators


def test_a_weight_that_rests_sharded():
    """FSDP2 of each product, `reshard_after_forward`: gathered before forward and before backward, the gradient
    reduced and scattered after, in fp32.
    """
    program = compiled(mlp(), {"dp": FSDP}, {"dp": 4})
    assert order(program.forward) == ["all_gather up_weight", "up forward", "all_gather down_weight", "down forward"]
    assert order(program.backward) == [
        "all_gather down_weight", "down dgrad", "down wgrad", "reduce_scatter down_weight",
        "all_gather up_weight", "up dgrad", "up wgrad", "reduce_scatter up_weight",
    ]  # fmt: skip
    assert [c.message_bytes for c in communications(program.forward)] == [UP, DOWN]
    assert [c.message_bytes for c in communications(program.backward)] == [DOWN, 2 * DOWN, UP, 2 * UP]
    assert [c.sent_bytes for c in communications(program.forward)] == [UP * 3 // 4, DOWN * 3 // 4]
    assert program.weight_sync == ()


def test_what_a_rank_holds_of_them():
    """18 bytes of each of a quarter of the parameters; a gathered weight is there for its kernels alone."""
    program = compiled(mlp(), {"dp": FSDP}, {"dp": 4})
    assert program.parameters == 2 * H * F // 4
    assert static_memory(program.parameters, Plan(), 2).total == 18 * 2 * H * F // 4
    whole = compiled(mlp(), {"dp": DATA}, {"dp": 4})
    assert static_memory(whole.parameters, Plan(), 2).total == 18 * 2 * H * F
    assert program.saved == whole.saved
    readers = {
        buffer.tensor: [order([step]) for step in program.forward if buffer.id in step.reads]
        for collective in communications(program.forward)
        for buffer in collective.writes
    }
    assert readers == {"up_weight": [["up forward"]], "down_weight": [["down forward"]]}


def test_a_weight_that_is_kept():
    """`reshard_after_forward=False`: no gather in backward, and the whole weight is there until then."""
    rules, degrees = {"dp": FSDP}, {"dp": 4}
    program = compiled(mlp(), rules, degrees, keep_weights=True)
    assert [c.collective for c in communications(program.forward)] == ["all_gather"] * 2
    assert [c.collective for c in communications(program.backward)] == ["reduce_scatter"] * 2
    assert program.saved_bytes("weight") == UP + DOWN
    assert program.saved_bytes("activation") == compiled(mlp(), rules, degrees).saved_bytes("activation")
    categories = {buffer.tensor: buffer.category for step in program.forward for buffer in step.writes}
    assert categories["up_weight"] == categories["down_weight"] == "communication buffers"
    assert categories["inner"] == "activations"


def test_recomputation_gathers_once_more_for_both():
    """As FSDP2 around a checkpoint: what runs again finds the weights that the backward pass gathers anyway."""
    program = compiled(mlp(), {"dp": FSDP}, {"dp": 4}, plan=Plan(recompute="full"))
    assert order(program.backward) == [
        "all_gather up_weight", "up recompute", "all_gather down_weight", "down recompute",
        "down dgrad", "down wgrad", "reduce_scatter down_weight", "up dgrad", "up wgrad", "reduce_scatter up_weight",
    ]  # fmt: skip


def test_weights_on_two_axes():
    """Columns and rows over tp, what is left of each over dp: f is cut by both."""
    program = compiled(mlp(), {"dp": FSDP, "tp": SplitRule(("f",), ())}, {"dp": 2, "tp": 4})
    weights = [call for call in calls(program.instructions) if call[1] == "dp"]
    gathers = [("all_gather", "dp", "up_weight", UP // 4), ("all_gather", "dp", "down_weight", DOWN // 4)]
    assert weights == [
        *gathers, gathers[1], ("reduce_scatter", "dp", "down_weight", DOWN // 2),
        gathers[0], ("reduce_scatter", "dp", "up_weight", UP // 2),
    ]  # fmt: skip
    assert program.parameters == 2 * H * F // 8


def written_by(steps, collective):
    """What computes the gradient that a collective moves."""
    (read,) = collective.reads
    return next(step for step in steps if read in {buffer.id for buffer in step.writes})


@pytest.mark.parametrize("rule", [FSDP, SplitRule((), (), shards_weights=True)])
def test_a_weight_that_two_operators_use(rule):
    """It is gathered once in each pass, and its gradients are summed before they move. Where all ranks compute the same
    the gradient is whole on each, and a part of it is taken.
    """
    block = Block(SIZES, 2)
    x, once, twice = (block.tensor(name, "s b h") for name in ("x", "once", "twice"))
    weight = block.weight("weight", "h")
    block.add("one", "norm", "s b h, h -> s b h", [x, weight], [once], mixes="h", saves=[x])
    block.add("two", "norm", "s b h, h -> s b h", [once, weight], [twice], mixes="h", saves=[once])
    program = compiled(block.operators, {"dp": rule}, {"dp": 4})
    assert order(program.forward) == ["all_gather weight", "one forward", "two forward"]
    expected = ["all_gather weight", "two backward", "one backward", "weight gradient accumulate"]
    assert order(program.backward) == expected + ["reduce_scatter weight"] * (rule is FSDP)
    gathered, two, one, total, *_ = program.backward
    assert {buffer.id for buffer in gathered.writes} <= {*two.reads} & {*one.reads}
    assert [buffer.bytes for buffer in total.writes] == [4 * H]
    assert [call[-1] for call in calls(program.backward)] == [2 * H] + [4 * H] * (rule is FSDP)
    assert program.parameters == H // 4


def test_the_gradient_of_a_bias():
    """It is there when the kernel that sums it has run, after the product of the weight."""
    block = Block(SIZES, 2)
    x, out = block.tensor("x", "s b h"), block.tensor("out", "s b f")
    weights = [block.weight("weight", "h f"), block.weight("bias", "f")]
    block.add("linear", "gemm", "s b h, h f, f -> s b f", [x, *weights], [out], saves=[x])
    program = compiled(block.operators, {"dp": FSDP}, {"dp": 4})
    writers = {
        c.tensor: written_by(program.backward, c).work[0]
        for c in communications(program.backward)
        if c.collective == "reduce_scatter"
    }
    assert isinstance(writers["weight"], Gemm)
    assert writers["bias"].kernel == "bias_gradient"


def llama():
    """Norms, biases of q, k and v, fused products."""
    return Model(
        layers=1, hidden=64, heads=8, kv_heads=4, ffn_hidden=96, vocab=512, gated_mlp=True, qkv_bias=True, bias=True,
        norm="layernorm", dropout=0.1,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize(
    "plan", ["dp=4", "dp=2,tp=2,sequence_parallel", "dp=2,ulysses=2", "dp=2,ring=2,ring_kind=all_gather"]
)
def test_every_weight_of_a_layer(plan, recompute):
    """Each is gathered once in each pass and reduced once; nothing else changes but what is left for the end of the
    step, of shards and over the other axes.
    """
    plan = parse_plan(f"{plan},recompute={recompute}")
    mesh, plain = mesh_of(plan), split_rules(plan)
    operators = transformer_layer(llama(), Workload(seq_len=512, micro_batch=1), plan.dp)
    weights = {weight.tensor.name: weight.tensor for op in operators for weight in op.weights}
    programs = [compiled(operators, {**plain, "dp": rule}, mesh.degrees, plan=plan) for rule in (FSDP, DATA)]
    (forward, backward), (plain_forward, plain_backward) = (
        (Counter(calls(program.forward)), Counter(calls(program.backward))) for program in programs
    )
    local = {name: math.prod(weight.sizes) for name, weight in weights.items()}
    for sync in programs[1].weight_sync:
        if "dp" in sync.axes:
            local[sync.weight] = sync.elements
    gathers = Counter({("all_gather", "dp", name, 2 * local[name]): 1 for name in weights})
    scatters = Counter({("reduce_scatter", "dp", name, 4 * local[name]): 1 for name in weights})
    assert forward == plain_forward + gathers
    assert backward == plain_backward + gathers + scatters
    assert programs[0].saved == programs[1].saved
    assert programs[0].parameters == programs[1].parameters // plan.dp
    left = {
        (sync.weight, tuple(axis for axis in sync.axes if axis != "dp"), sync.elements // plan.dp)
        for sync in programs[1].weight_sync
        if sync.axes != ("dp",)
    }
    assert {(sync.weight, sync.axes, sync.elements) for sync in programs[0].weight_sync} == left


# ------------------------------------------------------------ experts by rules of their own


T = 512 * 8 * 2
"""Tokens that all experts get."""
AWAY = {"experts": {"dp": SplitRule(("e",), ())}}


def test_experts_over_the_replicas():
    """Expert parallelism over dp: tokens go to their experts and come back, and so do the gradients. A rank sends three
    quarters of its tokens; expert weights are its own, and those of the router are summed.
    """
    program = compiled(routed(Block(SIZES, 2)), {"dp": DATA}, {"dp": 4}, named=AWAY)
    own = 2 * T * H // 4
    assert calls(program.forward) == [("all_to_all", "dp", "dealt", own), ("all_to_all", "dp", "made", own)]
    assert calls(program.backward) == [("all_to_all", "dp", "made", own), ("all_to_all", "dp", "dealt", own)]
    assert {c.sent_bytes for c in communications(program.instructions)} == {own * 3 // 4}
    assert {c.operator for c in communications(program.forward)} == {"up", "combine"}
    assert program.parameters == H * 16 + 2 * 16 * H * F // 4
    assert [(sync.weight, sync.axes) for sync in program.weight_sync] == [("router_weight", ("dp",))]
    works = {step.operator: step.work[0] for step in program.forward if isinstance(step, Compute)}
    assert (works["up"].batch, works["up"].m) == (4, T // 16)


def test_experts_over_a_part_of_the_replicas():
    """Eight replicas, experts over four of them: an axis of its own inside dp. The rest of dp sums expert gradients."""
    rules, degrees = {"dp": DATA, "ep": DATA}, {"dp": 2, "ep": 4}
    named = {"experts": {"dp": DATA, "ep": SplitRule(("e",), ())}}
    program = compiled(routed(Block(SIZES, 2)), rules, degrees, named=named)
    own = 2 * T * H // 8
    assert calls(program.forward) == [("all_to_all", "ep", "dealt", own), ("all_to_all", "ep", "made", own)]
    synced = {sync.weight: (sync.axes, sync.elements) for sync in program.weight_sync}
    each = 16 * H * F // 4
    assert synced == {
        "router_weight": (("dp", "ep"), 16 * H), "up_weight": (("dp",), each), "down_weight": (("dp",), each)
    }  # fmt: skip
    assert Mesh(degrees).group(5, ("ep",)) == (4, 5, 6, 7)


def test_experts_cut_by_tp():
    """Megatron-Core's all-to-all dispatcher with sequence parallelism: all-to-all, then the gather over tp; back the
    reduce-scatter over tp, then the all-to-all; backward the same in reverse. What is smaller travels between experts.
    """
    degrees = {"ep": 4, "tp": 2}
    program = compiled(routed(Block(SIZES, 2)), MAIN, degrees, named=EXPERTS)
    own, gathered = 2 * T * H // 8, 2 * T * H // 4
    there = [("all_to_all", "ep", "dealt", own), ("all_gather", "tp", "dealt", gathered)]
    back = [("reduce_scatter", "tp", "made", gathered), ("all_to_all", "ep", "made", own)]
    assert calls(program.forward) == there + back
    mirrored = [("all_to_all", "ep", "made", own), ("all_gather", "tp", "made", gathered)]
    assert calls(program.backward) == [
        *mirrored, ("reduce_scatter", "tp", "dealt", gathered), ("all_to_all", "ep", "dealt", own)
    ]  # fmt: skip
    assert program.parameters == H * 16 + 2 * 16 * H * F // 8
    works = {step.operator: step.work[0] for step in program.forward if isinstance(step, Compute)}
    assert (works["up"].batch, works["up"].m, works["up"].n) == (4, T // 16, F // 2)


def test_experts_over_tp():
    """Experts over tp as well: two all-to-alls, and whole experts on each rank."""
    named = {"experts": {"ep": SplitRule(("e",), ()), "tp": SplitRule(("e",), ())}}
    program = compiled(routed(Block(SIZES, 2)), MAIN, {"ep": 4, "tp": 2}, named=named)
    own = 2 * T * H // 8
    assert [call[:2] for call in calls(program.forward)] == [("all_to_all", axis) for axis in ("tp", "ep", "tp", "ep")]
    assert {call[3] for call in calls(program.instructions)} == {own}
    assert [sync.weight for sync in program.weight_sync] == ["router_weight"] * 2


def test_tokens_gathered_instead():
    """The all-gather dispatcher: every rank has all tokens and leaves the sum over its own experts."""
    everywhere = SplitRule(("e", "b"), ())
    named = {name: {"ep": everywhere} for name in ("experts", "movers")}
    operators = [
        op if op.name not in ("dispatch", "combine") else replace(op, rules="movers") for op in routed(Block(SIZES, 2))
    ]
    after = Block(SIZES, 2)
    after.add("norm", "norm", "s b h -> s b h", [after.tensor("out", "s b h")], [after.tensor("normed", "s b h")])
    program = compiled([*operators, *after.operators], {"ep": DATA}, {"ep": 4}, named=named)
    whole = 2 * 512 * 8 * H
    assert ("all_gather", "ep", "x", whole) in calls(program.forward)
    assert ("reduce_scatter", "ep", "out", whole) in calls(program.forward)
    assert not [call for call in calls(program.instructions) if call[0] == "all_to_all"]


def test_experts_that_rest_sharded():
    """FSDP of experts over the replicas that share them, as Megatron-Core's expert data-parallel group."""
    degrees = {"dp": 2, "ep": 4}
    named = {"experts": {"dp": FSDP, "ep": SplitRule(("e",), ())}}
    program = compiled(routed(Block(SIZES, 2)), {"dp": DATA, "ep": DATA}, degrees, named=named)
    weight = 16 * H * F // 4
    assert calls(program.forward)[:2] == [
        ("all_to_all", "ep", "dealt", 2 * T * H // 8), ("all_gather", "dp", "up_weight", 2 * weight)
    ]  # fmt: skip
    assert ("reduce_scatter", "dp", "up_weight", 4 * weight) in calls(program.backward)
    assert program.parameters == H * 16 + 2 * weight // 2
    assert [sync.weight for sync in program.weight_sync] == ["router_weight"]


def test_what_is_cut_already_rests_as_it_is_used():
    """On an axis over which experts are spread nothing is gathered, whatever its rule says of weights."""
    named = {"experts": {"dp": SplitRule(("e",), (), shards_weights=True)}}
    program = compiled(routed(Block(SIZES, 2)), {"dp": DATA}, {"dp": 4}, named=named)
    assert program == compiled(routed(Block(SIZES, 2)), {"dp": DATA}, {"dp": 4}, named=AWAY)


# ------------------------------------------------------------ on the engine


def simulated(operators, rules, *, fold=True, named=None, **options):
    """Three equal blocks and two micro-batches on four replicas."""
    return on_engine(compiled(operators, rules, {"dp": 4}, named=named, **options), Plan(dp=4), fold=fold)


def on_engine(program, plan, *, fold):
    """The same of a program."""
    template = Template(program, 1)
    prepared = PreparedStep(template, plan, lambda _: {LAYER: program}, fold=fold)
    scenario = SimpleNamespace(
        hardware=load_profile("dgx-h100"), model=SimpleNamespace(name="made up", layers=3), plan=plan,
        workload=SimpleNamespace(precision="bf16"), num_micro_batches=2, gpus_per_node=8, notes=(), summary=(),
        network="closed_form",
    )  # fmt: skip
    numbers = template.at(Workload(seq_len=1))
    static = static_memory(3 * numbers.parameters(), plan, 2)
    return assemble("blocks", scenario, prepared, [Run(LAYER, 3)], numbers, Amounts(1, 1, 1.0, None), static, fold=fold)


@pytest.mark.parametrize("keep", [False, True])
def test_sharded_weights_fold(keep):
    """Gathers and reductions beside the kernels of their layers, folded and not: the same spans and bytes."""
    whole, folded = (simulated(mlp(), {"dp": FSDP}, fold=fold, keep_weights=keep) for fold in (False, True))
    assert folded.step_time_s == whole.step_time_s
    assert folded.peak_memory_gib == whole.peak_memory_gib
    pd.testing.assert_frame_equal(whole.spans, folded.spans)
    pd.testing.assert_frame_equal(whole.memory_curve, folded.memory_curve)


def test_a_gather_runs_behind_the_kernel_before():
    """The second weight is gathered as soon as the first is; its kernel waits for it, and the kernel before."""
    spans = simulated(mlp(), {"dp": FSDP}).spans
    gathered, up, ahead, down = spans[spans["rank"] == 0].head(4).itertuples()
    assert (up.start_us, ahead.start_us) == (gathered.end_us, gathered.end_us)
    assert (gathered.collective, ahead.collective) == ("all_gather", "all_gather")
    assert down.start_us == max(up.end_us, ahead.end_us)


def test_what_memory_holds_at_most():
    """A quarter at rest. At the peak the gradient of a whole weight, in fp32, beside what data parallelism holds."""
    sharded, whole = (simulated(mlp(), {"dp": rule}) for rule in (FSDP, DATA))
    assert sharded.static.total == whole.static.total // 4
    tasks = [round(result.peak_memory_gib * 2**30) - result.static.total for result in (sharded, whole)]
    assert tasks[0] - tasks[1] == 2 * DOWN


def test_experts_fold():
    """Dispatch and combine on the lane of the axis that they move along."""
    rules = {"dp": DATA}
    whole, folded = (simulated(routed(Block(SIZES, 2)), rules, fold=fold, named=AWAY) for fold in (False, True))
    pd.testing.assert_frame_equal(whole.spans, folded.spans)
    assert set(folded.spans[folded.spans["collective"] == "all_to_all"]["lane"]) == {"dp"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "plan",
    ["dp=2,ring=4", "dp=2,ring=8", "dp=2,ulysses=2,recompute=selective", "dp=2,tp=2,sequence_parallel,recompute=full"],
)
def test_sharded_weights_of_a_layer_fold(plan):
    """Beside every other strategy; a gather is waited for in another step of a ring than it is issued in."""
    plan = parse_plan(plan)
    operators = transformer_layer(llama(), Workload(seq_len=4096, micro_batch=1), plan.dp)
    region = Region(operators, {**split_rules(plan), "dp": FSDP}, mesh_of(plan))
    program = program_in(region, plan, causal=True)
    whole, folded = (on_engine(program, plan, fold=fold) for fold in (False, True))
    assert folded.step_time_s == whole.step_time_s
    pd.testing.assert_frame_equal(whole.memory_curve, folded.memory_curve)
