"""Collectives of one layer, and the bytes that a rank sends, against closed forms for every plan.

Notation: E = 2 s b h, the bytes of one activation; K = E max(kv_heads, tp x ulysses) / heads, those of K (and
of V); W = E (heads + 2 kv_heads) / heads, those of Q, K and V together where tp has more ranks than there are KV
heads, so that they are gathered over it, else 0; t, u and r the degrees of tp, ulysses and ring; x(P) = (P - 1) / P.
By ring algorithms a rank sends x(P) of the array for an all-gather or reduce-scatter and twice that for an all-reduce,
and x(P) of its own buffer for an all-to-all (Thakur et al. 2005).
"""

from collections import Counter
from dataclasses import dataclass
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spsim.inputs.plan import Plan
from spsim.program.blocks.transformer import transformer_layer
from spsim.program.instructions import Communication
from spsim.program.mesh import Mesh
from spsim.program.operators import Operand, Operator, Tensor, parse
from tests.cases import compile_program, model, program, result, scenario

random_shapes = settings(max_examples=60, deadline=None, derandomize=True)
SHORT = {
    "AR": "all_reduce",
    "AG": "all_gather",
    "RS": "reduce_scatter",
    "A2A": "all_to_all",
    "SR": "send_receive",
}


def counts(text):
    """Counts from a row of the table: `"2 AG 2 RS"`."""
    words = text.split()
    return {SHORT[name]: int(n) for n, name in zip(words[::2], words[1::2], strict=True) if int(n)}


def communications(steps):
    """The collectives among the steps of a pass."""
    return [step for step in steps if isinstance(step, Communication)]


# ------------------------------------------------------------ counts

UNFUSED = {"attention": "unfused", "dropout": 0.1}

# plan, forward, backward, of which gathers again (tp and ring exchanges alike).
COUNTS = [
    ("", "", "", 0),
    ("tp=4", "2 AR", "2 AR", 0),
    ("tp=4,sequence_parallel", "2 AG 2 RS", "4 AG 2 RS", 2),
    ("tp=4,sequence_parallel,keep_gathered", "2 AG 2 RS", "2 AG 2 RS", 0),
    ("tp=4,recompute=full", "2 AR", "4 AR", 0),
    ("tp=4,sequence_parallel,recompute=full", "2 AG 2 RS", "6 AG 4 RS", 2),
    ("tp=4,recompute=selective", "2 AR", "2 AR", 0),
    ("tp=4,sequence_parallel,recompute=selective", "2 AG 2 RS", "4 AG 2 RS", 2),
    ("ulysses=4", "4 A2A", "4 A2A", 0),
    ("ulysses=4,recompute=selective", "4 A2A", "8 A2A", 0),
    ("ulysses=4,recompute=full", "4 A2A", "8 A2A", 0),
    ("ring=4", "3 SR", "6 SR", 3),
    ("ring=4,ring_cut=contiguous", "3 SR", "6 SR", 3),
    ("ring=4,recompute=selective", "3 SR", "9 SR", 3),
    ("ring=4,recompute=full", "3 SR", "9 SR", 3),
    ("ring=4,ring_kind=all_gather", "2 AG", "2 AG 2 RS", 2),
    ("ring=4,ring_kind=all_gather,recompute=selective", "2 AG", "4 AG 2 RS", 2),
    ("ring=4,ring_gradients=fp32", "3 SR", "7 SR", 3),
    ("ring=4,ring_gradients=fp32,ring_messages=separate", "6 SR", "14 SR", 6),
    ("ring=4,ring_kind=gather_permute", "1 AG", "1 AG 4 SR", 1),
    ("ring=4,ring_kind=gather_permute,recompute=selective", "1 AG", "2 AG 4 SR", 1),
    ("ulysses=4,gathers_position_ids", "1 AG 4 A2A", "4 A2A", 0),
    ("ulysses=2,ring=2,ring_gradients=fp32", "4 A2A 1 SR", "4 A2A 3 SR", 1),
    ("ulysses=2,ring=4", "4 A2A 3 SR", "4 A2A 6 SR", 3),
    ("ulysses=2,ring=2,ring_kind=all_gather", "4 A2A 2 AG", "4 A2A 2 AG 2 RS", 2),
    ("tp=2,ulysses=2", "2 AR 4 A2A", "2 AR 4 A2A", 0),
    ("tp=2,ring=4", "2 AR 3 SR", "2 AR 6 SR", 3),
    ("tp=2,sequence_parallel,ring=4", "2 AG 2 RS 3 SR", "4 AG 2 RS 6 SR", 5),
    ("tp=2,sequence_parallel,ulysses=4", "2 AG 2 RS 4 A2A", "4 AG 2 RS 4 A2A", 2),
    ("tp=2,sequence_parallel,ulysses=2,ring=2", "2 AG 2 RS 4 A2A 1 SR", "4 AG 2 RS 4 A2A 2 SR", 3),
]


@pytest.mark.parametrize("changes", [{}, UNFUSED], ids=["flash", "unfused"])
@pytest.mark.parametrize(("plan", "forward", "backward", "regathers"), COUNTS)
def test_collectives_per_layer(plan, forward, backward, regathers, changes):
    """The published counts; K and V of a ring travel as one message. Unfused attention changes nothing."""
    if changes and "ring" in plan and "all_gather" not in plan:
        changes = {"dropout": 0.1}
    layer = program(plan, **changes)
    found = [Counter(step.collective for step in communications(side)) for side in (layer.forward, layer.backward)]
    assert found == [counts(forward), counts(backward)]
    again = [step for step in communications(layer.backward) if step.purpose == "regather"]
    assert len(again) == regathers


@pytest.mark.parametrize(("plan", "forward", "backward", "_"), COUNTS)
def test_collectives_of_a_gated_layer(plan, forward, backward, _):
    """Rotary positions run on shards, a gated MLP has one more matrix in the same GEMM: the same counts."""
    layer = program(plan, gated_mlp=True, ffn_hidden=512)
    found = [Counter(step.collective for step in communications(side)) for side in (layer.forward, layer.backward)]
    assert found == [counts(forward), counts(backward)]


@pytest.mark.parametrize("plan", ["tp=4,sequence_parallel", "ulysses=2,ring=2", "ring=4,recompute=full"])
def test_the_result_counts_the_same(plan):
    """`collectives_per_layer` of the result, and its spans: layers x micro-batches x ranks of each."""
    found = result(plan, layers=3, global_batch=2)
    reported = Counter()
    for phase in ("forward", "backward"):
        reported.update(found.collectives_per_layer[phase])
    spans = found.spans[found.spans["part"] != "weight_sync"]
    ran = Counter(name for name in spans["collective"] if name)
    assert ran == {name: 3 * 2 * 4 * count for name, count in reported.items()}


@pytest.mark.parametrize("plan", ["ring=4", "tp=2,sequence_parallel,ring=2"])
def test_keeping_gathered_inputs_leaves_a_ring_as_it_is(plan):
    """The option is about the inputs of linears: K and V circulate, nothing of them was gathered to keep."""
    kept, plain = (program(f"{plan}{option}") for option in (",keep_gathered", ""))

    def ring(layer):
        return [(c.collective, c.purpose, c.sent_bytes) for c in communications(layer.instructions) if c.axis == "ring"]

    assert ring(kept) == ring(plain)


def operator(name, kind, signature, inputs, outputs, *, mixes=(), saves=(), owns_gather=()):
    """An operator from its einsum form."""
    left, right = parse(signature)
    return Operator(
        name=name,
        kind=kind,
        inputs=tuple(map(Operand, inputs, left)),
        outputs=tuple(map(Operand, outputs, right)),
        mixes=frozenset(mixes),
        saves=tuple(tensor.name for tensor in saves),
        owns_gather=frozenset(tensor.name for tensor in owns_gather),
    )


def gate_and_up_apart():
    """A norm read by two column-parallel linears, their product, and a row-parallel linear added to the input."""
    sizes = {"s": 8, "b": 1, "h": 16, "f": 32}

    def tensor(name, dims, kind="activation"):
        return Tensor(name, tuple(dims.split()), tuple(sizes[dim] for dim in dims.split()), 2, kind)

    x, normed, out, y = (tensor(name, "s b h") for name in ("x", "normed", "out", "y"))
    gate, up, product = (tensor(name, "s b f") for name in ("gate", "up", "product"))
    scale, down = tensor("scale", "h", "weight"), tensor("down_weight", "f h", "weight")
    first, second = (tensor(name, "h f", "weight") for name in ("gate_weight", "up_weight"))
    owned = {"saves": [normed], "owns_gather": [normed]}
    return [
        operator("norm", "norm", "s b h, h -> s b h", [x, scale], [normed], mixes="h", saves=[x]),
        operator("gate", "gemm", "s b h, h f -> s b f", [normed, first], [gate], **owned),
        operator("up", "gemm", "s b h, h f -> s b f", [normed, second], [up], **owned),
        operator("multiply", "elementwise", "s b f, s b f -> s b f", [gate, up], [product], saves=[gate, up]),
        operator("down", "gemm", "s b f, f h -> s b h", [product, down], [out], saves=[product]),
        operator("add", "elementwise", "s b h, s b h -> s b h", [out, x], [y]),
    ]


def test_consumers_share_a_gather_and_their_gradients_one_scatter():
    """Two linears read one norm: one gather forward, one re-gather, and the two partial gradients are summed
    before one reduce-scatter. The row-parallel linear brings a reduce-scatter and, in backward, a gather.
    """
    plan, mesh = Plan(tp=4, sequence_parallel=True), Mesh({"tp": 4})
    layer = compile_program(gate_and_up_apart(), plan, mesh, causal=True)
    found = [Counter(step.collective for step in communications(side)) for side in (layer.forward, layer.backward)]
    assert found == [counts("1 AG 1 RS"), counts("2 AG 1 RS")]
    sums = [step for step in layer.backward if step.part == "accumulate"]
    assert len(sums) == 2  # of the two linears, and of the residual: n consumers cost n - 1 additions
    assert layer.saved_bytes("activation") == 2 * (2 * 8 * 16 + 3 * 8 * 32) // 4  # x and the norm, gate, up, product


def test_consumers_share_an_all_reduce():
    """Under tp alone: one all-reduce for the output forward, one for the summed gradients backward."""
    layer = compile_program(gate_and_up_apart(), Plan(tp=4), Mesh({"tp": 4}), causal=True)
    found = [Counter(step.collective for step in communications(side)) for side in (layer.forward, layer.backward)]
    assert found == [counts("1 AR"), counts("1 AR")]


# ------------------------------------------------------------ bytes


@dataclass(frozen=True)
class Case:
    """Degrees, and a shape that they divide."""

    tp: int
    ulysses: int
    ring: int
    s: int
    b: int
    heads: int
    kv_heads: int
    d: int

    @property
    def E(self):  # noqa: N802
        """Bytes of one activation."""
        return 2 * self.s * self.b * self.heads * self.d

    @property
    def K(self):  # noqa: N802
        """Bytes of K on all ranks together, fewer heads than ranks replicated."""
        return Fraction(self.E * max(self.kv_heads, self.tp * self.ulysses), self.heads)

    @property
    def W(self):  # noqa: N802
        """Bytes of Q, K and V where they are gathered over tp."""
        few = self.kv_heads < self.tp
        return Fraction(self.E * (self.heads + 2 * self.kv_heads), self.heads) if few else 0

    def sent(self, options=""):
        """Bytes that a rank sends in forward and in backward."""
        plan = f"tp={self.tp},ulysses={self.ulysses},ring={self.ring}{options}"
        layer = program(
            plan,
            seq_len=self.s,
            micro_batch=self.b,
            hidden=self.heads * self.d,
            heads=self.heads,
            kv_heads=self.kv_heads,
        )
        return tuple(sum(c.sent_bytes for c in communications(side)) for side in (layer.forward, layer.backward))


def x(ranks):
    """Share that a rank sends."""
    return Fraction(ranks - 1, ranks)


@st.composite
def cases(draw, tp=(1,), ulysses=(1,), ring=(1,)):
    """A case with the degrees among the given ones, at most 8 ranks, and KV heads of every kind that fits.

    The micro-batch is a multiple of 8, so that whole bytes are sent whatever the degrees.
    """
    t, u, r = draw(st.sampled_from([(t, u, r) for t in tp for u in ulysses for r in ring if t * u * r <= 8]))
    heads = t * u * draw(st.integers(1, 4))
    fits = [k for k in range(1, heads + 1) if heads % k == 0 and (k % (t * u) == 0 or (t * u) % k == 0)]
    s = 2 * t * u * r * draw(st.integers(1, 8))
    kv_heads = draw(st.sampled_from(fits))
    d = draw(st.integers(1, 9)) * (t if kv_heads < t else 1)
    return Case(t, u, r, s, 8 * draw(st.integers(1, 3)), heads, kv_heads, d)


DEGREES = (2, 4, 8)


@pytest.mark.slow
@random_shapes
@given(cases(tp=DEGREES))
def test_tensor_parallel(case):
    """Two all-reduces each way: 4E x(t); few KV heads: Q, K and V gathered, their gradients scattered, W x(t) each."""
    one, few = case.E * x(case.tp), case.W * x(case.tp)
    assert case.sent() == (4 * one + few, 4 * one + few)
    assert case.sent(",recompute=full") == (4 * one + few, 8 * one + 2 * few)
    assert case.sent(",few_kv_heads=replicate") == (4 * one, 4 * one)


@pytest.mark.slow
@random_shapes
@given(cases(tp=DEGREES))
def test_tensor_and_sequence_parallel(case):
    """The same forward; two gathers more in backward, 6E x(t)."""
    one, few = case.E * x(case.tp), case.W * x(case.tp)
    assert case.sent(",sequence_parallel") == (4 * one + few, 6 * one + few)
    assert case.sent(",sequence_parallel,keep_gathered") == (4 * one + few, 4 * one + few)
    assert case.sent(",sequence_parallel,recompute=full") == (4 * one + few, 10 * one + 2 * few)


@pytest.mark.slow
@random_shapes
@given(cases(ulysses=DEGREES))
def test_ulysses(case):
    """Q, K, V and the output: (2E + 2K)/u x(u) each way."""
    one_way = (2 * case.E + 2 * case.K) / case.ulysses * x(case.ulysses)
    assert case.sent() == (one_way, one_way)
    assert case.sent(",recompute=selective") == (one_way, 2 * one_way)


@pytest.mark.slow
@random_shapes
@given(cases(ring=DEGREES), st.sampled_from(["zigzag", "contiguous"]))
def test_ring(case, cut):
    """r - 1 messages of K and V, 2K/r each: 2K x(r); backward the same again, and dK and dV: 4K x(r)."""
    expected = (2 * case.K * x(case.ring), 4 * case.K * x(case.ring))
    assert case.sent(f",ring_cut={cut}") == expected
    assert case.sent(f",ring_cut={cut},ring_kind=all_gather") == expected


@pytest.mark.slow
@random_shapes
@given(cases(ulysses=(2, 4), ring=(2, 4)), st.sampled_from(["p2p", "all_gather"]))
def test_usp(case, kind):
    """(2E + 2K)/(ur) x(u) each way, and 2K/u x(r), twice in backward."""
    u, r = case.ulysses, case.ring
    first = (2 * case.E + 2 * case.K) / (u * r) * x(u)
    second = 2 * case.K / u * x(r)
    assert case.sent(f",ring_kind={kind}") == (first + second, first + 2 * second)


@pytest.mark.slow
@random_shapes
@given(cases(tp=(2, 4), ring=(2, 4)))
def test_tensor_and_sequence_parallel_with_ring(case):
    """The terms of tp with E/r, the terms of the ring with K/t."""
    one, ring = case.E / Fraction(case.ring) * x(case.tp), 2 * case.K / case.tp * x(case.ring)
    few = case.W / Fraction(case.ring) * x(case.tp)
    assert case.sent(",sequence_parallel") == (4 * one + few + ring, 6 * one + few + 2 * ring)
    assert case.sent() == (4 * one + few + ring, 4 * one + few + 2 * ring)


@pytest.mark.slow
@random_shapes
@given(cases(tp=(2, 4), ulysses=(2, 4)))
def test_tensor_and_sequence_parallel_with_ulysses(case):
    """The terms of tp with E/u, the terms of Ulysses with E/t and K/t."""
    one = case.E / Fraction(case.ulysses) * x(case.tp)
    exchange = (2 * case.E + 2 * case.K) / (case.tp * case.ulysses) * x(case.ulysses)
    few = case.W / Fraction(case.ulysses) * x(case.tp)
    assert case.sent(",sequence_parallel") == (4 * one + few + exchange, 6 * one + few + exchange)
    assert case.sent() == (4 * one + few + exchange, 4 * one + few + exchange)


def test_bytes_of_a_step_are_those_of_its_layers():
    """3 layers x 2 micro-batches of 2K x(r) + 4K x(r), K = 2 x 256 x 256, and the weights once: 4 bytes each."""
    found = result("ring=4", layers=3, global_batch=2)
    key = 2 * 256 * 256
    assert found.comm_bytes_per_gpu_by_op["send_receive"] == 3 * 2 * 6 * key * 3 // 4
    weights = found.scenario.model.layer_parameters
    assert found.comm_bytes_per_gpu_by_op["all_reduce"] == 2 * (4 * 3 * weights) * 3 // 4


# ------------------------------------------------------------ strategies that coincide


def compiled(degrees, plan):
    """The program of the small model on a mesh given by degrees, ring attention not lowered."""
    checked = scenario("")
    operators = transformer_layer(checked.model, checked.workload)
    return compile_program(operators, plan, Mesh(degrees), causal=True)


@pytest.mark.parametrize("option", ["", ",recompute=selective", ",recompute=full"])
def test_usp_of_one_ring_rank_is_ulysses(option):
    """With ring 1, whatever the options of the ring, the program is that of Ulysses."""
    plans = [
        f"ulysses=4,ring_kind={kind},ring_cut={cut}{option}"
        for kind in ("p2p", "all_gather")
        for cut in ("zigzag", "contiguous")
    ]
    assert len({program(plan) for plan in plans}) == 1
    assert compiled({"ring": 1, "ulysses": 4}, Plan(ulysses=4)) == compiled({"ulysses": 4}, Plan(ulysses=4))


@pytest.mark.parametrize("kind", ["p2p", "all_gather"])
def test_usp_of_one_ulysses_rank_is_ring(kind):
    """With ulysses 1 there is no all-to-all, and its mesh axis leaves no trace."""
    plan = Plan(ring=4, ring_kind=kind)
    assert compiled({"ring": 4, "ulysses": 1}, plan) == compiled({"ring": 4}, plan)
    assert not [c for c in communications(program(plan).instructions) if c.axis != "ring"]


ONE_RANK = [
    "sequence_parallel",
    "sequence_parallel,keep_gathered",
    "ring_kind=all_gather",
    "ring_cut=contiguous",
    "tp_backward_overlap=false",
    "distributed_optimizer",
    "zero=1",
]


@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("plan", ONE_RANK)
def test_degree_one_is_the_single_gpu(plan, recompute):
    """Every strategy at degree 1 gives the document of one GPU, apart from the plan and its notes."""

    def document(text):
        found = result(f"{text},recompute={recompute}".strip(","), **UNFUSED).to_json()
        return {key: value for key, value in found.items() if key not in ("plan", "notes")}

    assert document(plan) == document("")


# ------------------------------------------------------------ weight gradients


NORMS_AND_ROW_BIASES = {
    "norm1_weight",
    "norm1_bias",
    "norm2_weight",
    "norm2_bias",
    "residual1_bias",
    "residual2_bias",
}


def synced(plan, **changes):
    """{axes: weights} of the synchronisation."""
    groups = {}
    for sync in program(plan, **changes).weight_sync:
        groups.setdefault(sync.axes, set()).add(sync.weight)
    return groups


def every_weight():
    """Names of the weights of the small layer."""
    checked = scenario("")
    operators = transformer_layer(checked.model, checked.workload)
    return {weight.tensor.name for op in operators for weight in op.weights}


def test_nothing_is_synced_without_need():
    """On one GPU and under tp alone every weight gradient is whole."""
    assert synced("") == {}
    assert synced("tp=4") == {}


def test_tp_with_sequence_parallel_syncs_norms_and_row_biases():
    """Those operators see a shard of the sequence; column biases and matrices see it whole."""
    assert synced("tp=4,sequence_parallel") == {("tp",): NORMS_AND_ROW_BIASES}
    assert synced("tp=4,sequence_parallel", bias=False, norm="rmsnorm") == {("tp",): {"norm1_weight", "norm2_weight"}}


@pytest.mark.parametrize(
    ("plan", "axes"),
    [("ulysses=4", ("ulysses",)), ("ring=4", ("ring",)), ("ulysses=2,ring=2", ("ring", "ulysses"))],
)
def test_sequence_axes_sync_every_weight(plan, axes):
    """Once, over the merged group."""
    assert len(every_weight()) == 16
    assert synced(plan) == {axes: every_weight()}


def test_products_sync_over_both():
    """Every weight over ring and ulysses, norms and row biases over tp apart."""
    expected = {("ring", "ulysses"): every_weight(), ("tp",): NORMS_AND_ROW_BIASES}
    assert synced("tp=2,sequence_parallel,ulysses=2,ring=2") == expected
    assert synced("tp=2,ulysses=2") == {("ulysses",): every_weight()}


def test_gathered_qkv_have_no_copies_of_weights():
    """2 KV heads over tp 8: a rank has an eighth of the columns of Q, K and V together, whatever heads that cuts."""
    layer = program("tp=8", kv_heads=2)
    assert layer.weight_sync == ()
    copied = program("tp=8,few_kv_heads=replicate", kv_heads=2)
    columns = (256 + 2 * 2 * 32) // 8, 32 + 2 * 32
    assert copied.parameters - layer.parameters == (columns[1] - columns[0]) * (256 + 1)


def test_replicated_kv_weights_are_synced_among_their_copies():
    """2 KV heads over tp 8: K and V weights and biases of 4 ranks are the same."""
    layer = program("tp=8,few_kv_heads=replicate", kv_heads=2)
    assert {sync.weight for sync in layer.weight_sync} == {"k_weight", "v_weight", "k_bias", "v_bias"}
    assert {(sync.axes, sync.ranks) for sync in layer.weight_sync} == {(("tp",), 4)}
    assert {s.elements for s in layer.weight_sync if s.weight == "k_weight"} == {256 * 32}


def sync_messages(plan, **settings):
    """{(collective, axis): bytes} of the messages at the end of a step, one each."""
    tasks = [task for task in result(plan, **settings).trace.tasks if task.part == "weight_sync"]
    messages = {(task.collective, task.axis): task.message_bytes for task in tasks}
    assert len(messages) == len(tasks)
    return messages


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_one_coalesced_message_per_group(micro_batches):
    """fp32 gradients of all layers, once a step: 6h under tp + SP; all parameters of a rank over ring."""
    settings = {"layers": 3, "global_batch": micro_batches}
    row = 3 * 6 * 256 * 4
    assert sync_messages("tp=4,sequence_parallel", **settings) == {("all_reduce", "tp"): row}
    parameters = model().layer_parameters
    assert sync_messages("ring=4", **settings) == {("all_reduce", "ring"): 3 * parameters * 4}
    # Under tp 2 a rank has half of the matrices and column biases, and all of norms (4h) and row biases (2h).
    local = (parameters - 6 * 256) // 2 + 6 * 256
    assert sync_messages("tp=2,sequence_parallel,ulysses=2,ring=2", **settings) == {
        ("all_reduce", "ring × ulysses"): 3 * local * 4,
        ("all_reduce", "tp"): row,
    }


@pytest.mark.parametrize("option", ["distributed_optimizer", "zero=1"])
def test_distributed_optimizer_scatters_and_gathers(option):
    """fp32 gradients are reduce-scattered, bf16 parameters gathered, over the data-like group only."""
    parameters = model().layer_parameters
    assert sync_messages(f"ulysses=2,ring=2,{option}") == {
        ("reduce_scatter", "ring × ulysses"): 2 * parameters * 4,
        ("all_gather", "ring × ulysses"): 2 * parameters * 2,
    }
    assert set(sync_messages(f"tp=4,sequence_parallel,{option}")) == {("all_reduce", "tp")}


def test_local_parameters():
    """Matrices and column biases are split over tp, norms and row biases are not; sequence axes split none."""
    parameters = model().layer_parameters
    assert program("").parameters == parameters
    assert program("ulysses=2,ring=4").parameters == parameters
    assert program("tp=4").parameters == (parameters - 6 * 256) // 4 + 6 * 256
