"""Bytes kept for the backward pass equal the published formulas exactly, for random shapes and degrees.

Notation: s sequence, b micro-batch, h hidden, a heads, t degree; S = s b h, A = a s^2 b, 2-byte elements.
Korthikanti et al. 2022 (arXiv:2205.05198), table 2: one layer sbh(34 + 5as/h), tensor parallel
sbh(10 + 24/t + 5as/(ht)), with sequence parallelism sbh/t (34 + 5as/h), selective sbh(10 + 24/t) and 34sbh/t,
full 2sbh. Sum of 34S: norm inputs 4S, q k v input 2S, Q K^T 4S, V 2S, projection input 2S, fc1 input 2S, GeLU
input 8S, fc2 input 8S, two masks 2S; of 5A: softmax output 2A, dropped probabilities 2A, mask A.
"""

from dataclasses import dataclass, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.cases import program, result

pytestmark = pytest.mark.slow

GPT = {"attention": "unfused", "dropout": 0.1}
FLASH = {"attention": "flash", "dropout": 0.1}
LLAMA = {"gated_mlp": True}


@dataclass(frozen=True)
class Shape:
    """One layer's shape with a degree that divides what a plan may split."""

    t: int
    s: int
    b: int
    a: int
    d: int

    @property
    def h(self):
        return self.a * self.d

    @property
    def S(self):  # noqa: N802
        return self.s * self.b * self.h

    @property
    def A(self):  # noqa: N802
        return self.a * self.s**2 * self.b

    def program(self, plan, **changes):
        """The layer under a plan; `{t}` in the plan is the degree."""
        settings = {"seq_len": self.s, "micro_batch": self.b, "hidden": self.h, "heads": self.a}
        return program(plan.format(t=self.t), **settings, **changes)

    def kept(self, plan, **changes):
        """Activation and mask bytes of one rank."""
        return self.program(plan, **changes).saved_bytes("activation", "mask")


SHAPES = st.builds(
    lambda t, s, b, a, d: Shape(t, 2 * t * s, b, t * a, d),
    st.sampled_from([2, 4, 8]),
    st.integers(1, 12),
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(1, 9),
)
"""Sequences divide by 2t (a zigzag ring), heads by t."""

random_shapes = settings(max_examples=60, deadline=None, derandomize=True)
few_shapes = settings(max_examples=25, deadline=None, derandomize=True)


# ------------------------------------------------------------ published formulas


@random_shapes
@given(SHAPES)
def test_one_gpu(x):
    """sbh(34 + 5as/h) = 34S + 5A; selective 34S; full 2S."""
    assert x.kept("", **GPT) == 34 * x.S + 5 * x.A
    assert x.kept("recompute=selective", **GPT) == 34 * x.S
    assert x.kept("recompute=full", **GPT) == 2 * x.S


@random_shapes
@given(SHAPES)
def test_tensor_parallel(x):
    """sbh(10 + 24/t + 5as/(ht)); selective sbh(10 + 24/t); full 2sbh: the input is whole on each rank."""
    assert x.t * x.kept("tp={t}", **GPT) == (10 * x.t + 24) * x.S + 5 * x.A
    assert x.t * x.kept("tp={t},recompute=selective", **GPT) == (10 * x.t + 24) * x.S
    assert x.kept("tp={t},recompute=full", **GPT) == 2 * x.S


@random_shapes
@given(SHAPES)
def test_tensor_and_sequence_parallel(x):
    """sbh/t (34 + 5as/h); selective 34sbh/t; full 2sbh/t."""
    plan = "tp={t},sequence_parallel"
    assert x.t * x.kept(plan, **GPT) == 34 * x.S + 5 * x.A
    assert x.t * x.kept(f"{plan},recompute=selective", **GPT) == 34 * x.S
    assert x.t * x.kept(f"{plan},recompute=full", **GPT) == 2 * x.S


@random_shapes
@given(SHAPES, st.sampled_from(["ulysses={t}", "ring={t},ring_kind=all_gather"]))
def test_ulysses_and_gathered_ring_unfused(x, plan):
    """Everything is split: (34S + 5A)/P; selective 34S/P; full 2S/P."""
    assert x.t * x.kept(plan, **GPT) == 34 * x.S + 5 * x.A
    assert x.t * x.kept(f"{plan},recompute=selective", **GPT) == 34 * x.S
    assert x.t * x.kept(f"{plan},recompute=full", **GPT) == 2 * x.S


@random_shapes
@given(SHAPES)
def test_flash_attention(x):
    """No 5A: 34S on one GPU, (10 + 24/t)S under tp, 34S/t with sequence parallelism."""
    assert x.kept("", **FLASH) == 34 * x.S
    assert x.t * x.kept("tp={t}", **FLASH) == (10 * x.t + 24) * x.S
    assert x.t * x.kept("tp={t},sequence_parallel", **FLASH) == 34 * x.S


@random_shapes
@given(SHAPES, st.sampled_from(["p2p", "all_gather"]), st.sampled_from(["zigzag", "contiguous"]))
def test_flash_attention_on_a_ring(x, kind, cut):
    """34S/r: the local K and V are kept and circulated, or gathered, again."""
    assert x.t * x.kept(f"ring={{t}},ring_kind={kind},ring_cut={cut}", **FLASH) == 34 * x.S


@random_shapes
@given(SHAPES)
def test_flash_attention_under_ulysses_keeps_its_output_twice(x):
    """36S/u: split by heads for attention's backward, and by sequence for the projection's."""
    assert x.t * x.kept("ulysses={t}", **FLASH) == 36 * x.S
    assert x.t * x.kept("ulysses={t},recompute=full", **FLASH) == 2 * x.S


@random_shapes
@given(SHAPES, st.sampled_from([(2, 2), (2, 4), (4, 2)]), st.sampled_from(["zigzag", "contiguous"]))
def test_flash_attention_under_usp(shape, degrees, cut):
    """The same 36S over the product of both degrees."""
    ulysses, ring = degrees
    x = replace(shape, s=16 * shape.s, a=4 * shape.a)
    kept = x.kept(f"ulysses={ulysses},ring={ring},ring_cut={cut}", **FLASH)
    assert ulysses * ring * kept == 36 * x.S


@random_shapes
@given(SHAPES)
def test_without_dropout(x):
    """A dropout of 0 is not in the program: two masks of S less, and of 5A only the softmax output 2A."""
    bare = {"attention": "unfused", "dropout": 0.0}
    assert x.kept("", **bare) == 32 * x.S + 2 * x.A
    assert x.t * x.kept("tp={t},sequence_parallel", **bare) == 32 * x.S + 2 * x.A
    assert x.t * x.kept("tp={t}", **bare) == (8 * x.t + 24) * x.S + 2 * x.A


@random_shapes
@given(SHAPES)
def test_masks_are_one_byte_an_element(x):
    """S for each of two hidden dropouts, A for attention; split like their operators."""
    assert x.program("", **GPT).saved_bytes("mask") == 2 * x.S + x.A
    assert x.t * x.program("tp={t},sequence_parallel", **GPT).saved_bytes("mask") == 2 * x.S + x.A
    assert x.t * x.program("tp={t}", **GPT).saved_bytes("mask") == 2 * x.t * x.S + x.A


# ------------------------------------------------------------ statistics


@random_shapes
@given(SHAPES)
def test_norm_statistics_stand_apart(x):
    """fp32 mean and deviation, 8sb for each of two LayerNorms; RMSNorm 4sb; split over sequence shards."""
    tokens = x.s * x.b
    assert x.program("", **GPT).saved_bytes("norm statistics") == 16 * tokens
    assert x.program("tp={t}", **GPT).saved_bytes("norm statistics") == 16 * tokens
    for plan in ("tp={t},sequence_parallel", "ulysses={t}", "ring={t},ring_kind=all_gather"):
        assert x.t * x.program(plan, **GPT).saved_bytes("norm statistics") == 16 * tokens
    assert x.program("", norm="rmsnorm", **GPT).saved_bytes("norm statistics") == 8 * tokens


@random_shapes
@given(SHAPES)
def test_log_sum_exp_of_flash_attention(x):
    """One fp32 number per head and query, 4asb, split over heads or queries; none in unfused attention."""
    total = 4 * x.a * x.s * x.b
    assert x.program("", **FLASH).saved_bytes("log-sum-exp") == total
    for plan in ("tp={t}", "tp={t},sequence_parallel", "ulysses={t}", "ring={t}"):
        assert x.t * x.program(plan, **FLASH).saved_bytes("log-sum-exp") == total
    assert x.program("", **GPT).saved_bytes("log-sum-exp") == 0


@few_shapes
@given(SHAPES)
def test_recomputation_keeps_no_statistics_of_what_it_repeats(x):
    """Selective repeats core attention only, full the norms too."""
    selective, full = (x.program(f"recompute={kind}", **FLASH) for kind in ("selective", "full"))
    assert selective.saved_bytes("log-sum-exp") == 0
    assert selective.saved_bytes("norm statistics") == 16 * x.s * x.b
    assert full.saved_bytes("norm statistics", "log-sum-exp", "mask") == 0


# ------------------------------------------------------------ options


@random_shapes
@given(SHAPES)
def test_keeping_the_gathered_inputs(x):
    """DTensor's habit: q k v and fc1 keep 2S instead of 2S/t each, + 4S(1 - 1/t), and gather no more."""
    plan = "tp={t},sequence_parallel"
    extra = x.t * (x.kept(f"{plan},keep_gathered", **GPT) - x.kept(plan, **GPT))
    assert extra == 4 * x.S * (x.t - 1)
    for option, gathers in (("", 4), (",keep_gathered", 2)):
        steps = x.program(plan + option, **GPT).backward
        assert [getattr(step, "collective", None) for step in steps].count("all_gather") == gathers


# ------------------------------------------------------------ other shapes of layer


@st.composite
def grouped_shapes(draw):
    """A shape, its KV heads (a divisor of the heads that divides the degree or is divided by it), MLP width."""
    x = draw(SHAPES)
    fits = [k for k in range(1, x.a + 1) if x.a % k == 0 and (k % x.t == 0 or x.t % k == 0)]
    kv_heads = draw(st.sampled_from(fits))
    x = replace(x, d=x.t * x.d) if kv_heads < x.t else x  # Q, K and V are cut evenly
    return x, kv_heads, x.t * draw(st.integers(1, 50))


@random_shapes
@given(grouped_shapes())
def test_grouped_query_attention(case):
    """GPT with flash attention and k KV heads: of 34S, the q k v tensors keep 2S + 4 s b k d instead of 6S.

    Split over heads a rank holds max(k, t) / t heads of K and V: fewer heads than ranks are replicated.
    Under Ulysses K and V are kept after the all-to-all, so replicated heads are kept by each rank.
    """
    x, k, _ = case
    head = x.s * x.b * x.d
    assert x.kept("", kv_heads=k, **FLASH) == 30 * x.S + 4 * k * head
    local = max(k, x.t)
    assert x.t * x.kept("tp={t}", kv_heads=k, **FLASH) == (10 * x.t + 20) * x.S + 4 * local * head
    assert x.t * x.kept("tp={t},sequence_parallel", kv_heads=k, **FLASH) == 30 * x.S + 4 * local * head
    assert x.t * x.kept("ulysses={t}", kv_heads=k, **FLASH) == 32 * x.S + 4 * local * head
    assert x.t * x.kept("ring={t}", kv_heads=k, **FLASH) == 30 * x.S + 4 * k * head


@random_shapes
@given(grouped_shapes())
def test_gated_mlp(case):
    """Llama: no dropout, RoPE keeps nothing (attention keeps the rotated q and k, the same size), f free.

    Norm inputs 4S, q k v and fc1 inputs 4S, q and the output (shared with the projection) 4S: 12S. K and V:
    4 s b k d. SwiGLU keeps gate and up, 4 s b f, fc2 its input, 2 s b f. Under tp the first 8S are whole.
    """
    x, k, f = case
    head, mlp = x.s * x.b * x.d, 6 * x.s * x.b * f
    changes = {"kv_heads": k, "ffn_hidden": f, **LLAMA}
    local = max(k, x.t)
    assert x.kept("", **changes) == 12 * x.S + 4 * k * head + mlp
    assert x.t * x.kept("tp={t}", **changes) == (8 * x.t + 4) * x.S + 4 * local * head + mlp
    assert x.t * x.kept("tp={t},sequence_parallel", **changes) == 12 * x.S + 4 * local * head + mlp
    assert x.t * x.kept("ring={t}", **changes) == 12 * x.S + 4 * k * head + mlp
    assert x.t * x.kept("ulysses={t}", **changes) == 14 * x.S + 4 * local * head + mlp


@few_shapes
@given(SHAPES)
def test_a_layer_without_biases_or_positions_keeps_the_same(x):
    """Biases and positions are no activations."""
    assert x.kept("", bias=False, **GPT) == x.kept("", **GPT)
    assert x.kept("", positions="rope", **FLASH) == x.kept("", **FLASH)


PLANS_WITHOUT_REPLICATION = [
    "tp={t},sequence_parallel",
    "ulysses={t}",
    "ring={t},ring_kind=p2p",
    "ring={t},ring_kind=all_gather",
    "tp={t},sequence_parallel,recompute=selective",
    "ulysses={t},recompute=full",
]


@few_shapes
@given(st.integers(1, 6), st.integers(1, 3), st.integers(1, 8), st.sampled_from(PLANS_WITHOUT_REPLICATION))
def test_bytes_times_degree_do_not_depend_on_the_degree(s, b, d, plan):
    """Where nothing is replicated the ranks share a fixed total, statistics included."""
    totals = set()
    for t in (2, 4, 8):
        layer = Shape(t, 16 * s, b, 8, d).program(plan, **FLASH)
        totals.add(t * layer.saved_bytes("activation", "mask", "norm statistics", "log-sum-exp"))
    assert len(totals) == 1


# ------------------------------------------------------------ what the engine holds


ENGINE_PLANS = [
    "",
    "tp=4",
    "tp=4,sequence_parallel",
    "tp=4,sequence_parallel,keep_gathered",
    "ulysses=4",
    "ring=4",
    "ring=4,ring_cut=contiguous",
    "ring=4,ring_kind=all_gather",
    "ring=4,ring_kind=all_gather,keep_gathered",
    "ulysses=2,ring=2",
    "tp=2,ulysses=2",
    "tp=2,ring=2",
    "tp=2,sequence_parallel,ulysses=2,ring=2",
]
LAYERS = 3


def held_after_forward(found):
    """Bytes that each simulated rank has written in the forward pass and that only backward tasks free."""
    last = LAYERS * len(found.program.forward) - 1
    held = dict.fromkeys(found.trace.copies, 0)
    for change in found.trace.memory:
        held[change.rank] += change.bytes if change.task <= last else 0
    return held


MODELS = {"gpt": GPT, "flash": FLASH, "bare": {}, "llama": {"kv_heads": 2, "ffn_hidden": 704, **LLAMA}}
ENGINE_CASES = [
    (plan, name)
    for plan in ENGINE_PLANS
    for name in MODELS
    if name != "gpt" or "ring" not in plan or "all_gather" in plan  # an unfused softmax cannot circulate
]


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize(("plan", "name"), ENGINE_CASES)
def test_the_engine_holds_what_the_formulas_say(plan, name, recompute):
    """After L layers L times the saved bytes, statistics included, are live, and nothing else.

    The chain of layer outputs: the input of layer n + 1 is the output of layer n, one storage, counted as
    the input. The output of the last layer belongs to what follows the layers, and nobody reads it here:
    it is freed when written. The input of the first layer counts as its layer's.
    """
    text = ",".join(filter(None, [plan, f"recompute={recompute}"]))
    found = result(text, layers=LAYERS, fold=False, **MODELS[name])
    categories = ("activation", "mask", "norm statistics", "log-sum-exp")
    expected = LAYERS * found.program.saved_bytes(*categories)
    assert held_after_forward(found) == dict.fromkeys(range(found.scenario.plan.gpus), expected)


@pytest.mark.parametrize(
    "plan", ["tp=4", "tp=4,sequence_parallel", "ulysses=4", "ring=4,ring_kind=all_gather", "ring=4"]
)
def test_what_a_collective_writes(plan):
    """An all-reduce works in place; the others write what arrives: a gather the whole array, a scatter its
    P-th part, an all-to-all and a message as much as they send out of.
    """
    found = result(plan)
    tasks = found.trace.tasks
    written = dict.fromkeys((i for i, task in enumerate(tasks) if task.purpose not in ("", "weight")), 0)
    for change in found.trace.memory:
        if change.rank == 0 and change.bytes > 0 and change.task in written:
            written[change.task] += change.bytes
    parts = {"all_reduce": 0, "all_gather": 4, "reduce_scatter": 1, "all_to_all": 4, "send_receive": 4}
    assert written
    for task, size in written.items():
        assert 4 * size == parts[tasks[task].collective] * tasks[task].message_bytes
