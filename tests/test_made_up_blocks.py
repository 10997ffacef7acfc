"""Blocks that no model here has: dimensions that are products, weights that rest sharded, experts by rules of their own.

Collectives, bytes and memory are worked out by hand, or held against what FSDP2 and Megatron-Core are known to do.
"""

import math
from collections import Counter
from fractions import Fraction
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spsim.costs.static_memory import static_memory
from spsim.inputs.model import Model
from spsim.inputs.plan import Plan, parse_plan
from spsim.inputs.workload import Workload
from spsim.program.blocks.block import Block
from spsim.program.blocks.transformer import transformer_layer
from spsim.program.compiler import compile_region
from spsim.program.instructions import Communication, Compute
from spsim.program.mesh import Mesh, mesh_of
from spsim.program.placement import shard
from spsim.program.region import Region
from spsim.program.sizes import Template, every_workload
from spsim.program.strategies import SplitRule, split_rules
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
    return [
        f"{s.collective} {s.tensor}" if isinstance(s, Communication) else f"{s.operator} {s.part}" for s in steps
    ]


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
    assert {op.name: dict(op.splits) for op in region.operators} == dict.fromkeys(placed, {"dp": "b", "ulysses": "s"})


def test_experts_where_the_tokens_are():
    """Without expert parallelism nothing moves, and the gradients of all weights are summed."""
    program = compiled(routed(Block(SIZES, 2)), {"dp": DATA, "ulysses": SplitRule(("s",), ("a",))}, {"dp": 2, "ulysses": 4})
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


def test_a_weight_that_two_operators_use():
    """It is gathered once in each pass, and its gradients are summed before they move."""
    block = Block({**SIZES, "o": H}, 2)
    x, once, twice = (block.tensor(name, "s b h") for name in ("x", "once", "twice"))
    weight = block.weight("weight", "h")
    block.add("one", "norm", "s b h, h -> s b h", [x, weight], [once], mixes="h", saves=[x])
    block.add("two", "norm", "s b h, h -> s b h", [once, weight], [twice], mixes="h", saves=[once])
    program = compiled(block.operators, {"dp": FSDP}, {"dp": 4})
    assert order(program.forward) == ["all_gather weight", "one forward", "two forward"]
    assert order(program.backward) == [
        "all_gather weight", "two backward", "one backward", "weight gradient accumulate", "reduce_scatter weight",
    ]  # fmt: skip
    assert calls(program.backward)[-1][-1] == 4 * H


def llama():
    """Norms, biases of q, k and v, fused products."""
    return Model(
        layers=1, hidden=64, heads=8, kv_heads=4, ffn_hidden=96, vocab=512, gated_mlp=True, qkv_bias=True, bias=True,
        norm="layernorm", dropout=0.1,
    )  # fmt: skip


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("plan", ["dp=4", "dp=2,tp=2,sequence_parallel", "dp=2,ulysses=2", "dp=2,ring=2,ring_kind=all_gather"])
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
