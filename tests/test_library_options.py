"""Rings and heads as libraries have them: what they send in closed form, and that every way of simulating agrees.

E = 2 s b h, the bytes of one activation; K = E kv_heads / heads; r and u the degrees of ring and ulysses.
"""

from collections import Counter

import pytest

from spsim import InputError, Scenario, simulate
from spsim.costs.collectives import CommCost
from spsim.inputs.profiles import load_profile
from spsim.program.instructions import Communication, Compute
from spsim.studies.points import Point
from spsim.units import MIB
from tests.cases import A100, H100, model, program, result, scenario
from tests.test_columns import assert_rows
from tests.test_folding import assert_equal

UNIT = 2 * 2 * 256 * 256 // 4
"""Bytes of the K and V of a rank in bf16, in `program`'s layer of hidden 256 and 256 tokens on a ring of 4."""
FP32 = "ring_gradients=fp32"
GATHERED = "ring_kind=gather_permute"


def sent(plan, axis="ring", **changes):
    """(collective, bytes of a message) of an axis, by pass in order of issue."""
    layer = program(plan, **changes)
    passes = (layer.forward, layer.backward)
    return [
        [(s.collective, s.message_bytes) for s in own if isinstance(s, Communication) and s.axis == axis]
        for own in passes
    ]


@pytest.mark.parametrize("cut", ["zigzag", "contiguous"])
@pytest.mark.parametrize("degree", [2, 3, 4, 8])
def test_gradients_in_fp32_travel_home(degree, cut):
    """3P - 1 units backward: P - 1 of K and V, and P of their gradients, twice as wide."""
    forward, backward = sent(f"ring={degree},ring_cut={cut},{FP32}", seq_len=96 * degree)
    unit = 2 * 2 * 96 * 256
    assert forward == [("send_receive", unit)] * (degree - 1)
    assert Counter(backward) == {("send_receive", unit): degree - 1, ("send_receive", 2 * unit): degree}
    assert sum(size for _, size in backward) == (3 * degree - 1) * unit


SLICES = {"seq_len": 512, "heads": 8, "kv_heads": 4}


@pytest.mark.parametrize("stride", [1, 2, 4])
def test_heads_are_gathered_in_slices(stride):
    """ring-flash-attn's form of Llama 3: as many bytes and FLOPs as all at once, in 4 / stride pieces; in the backward
    pass the next K and V are gathered before attention, and its gradients scattered at once. As much is kept.
    """
    plain = "ring=4,ring_kind=all_gather"
    count, plan = 4 // stride, f"{plain},heads_k_stride={stride}"
    forward, backward = sent(plan, **SLICES)
    unit = 2 * 512 * 4 * 32 // count
    assert forward == [("all_gather", unit)] * 2 * count
    gather, scatter = [("all_gather", unit)] * 2, [("reduce_scatter", unit)] * 2
    assert backward == gather + (gather + scatter) * (count - 1) + scatter
    sliced, whole = program(plan, **SLICES), program(plain, **SLICES)
    assert sliced.saved == whole.saved
    flops = [
        sum(s.work[0].flops for s in own.instructions if isinstance(s, Compute) and s.kind == "attention")
        for own in (sliced, whole)
    ]
    assert flops[0] == flops[1]
    if stride == 4:
        assert sliced == whole


def test_slices_hide_gathers_behind_attention():
    """All but the first of a pass end before attention of the slice before, which takes longer."""
    sizes = {"hardware": H100, "seq_len": 65536, "hidden": 4096, "heads": 32, "kv_heads": 8, "layers": 1}
    spans = result("ring=8,ring_kind=all_gather,heads_k_stride=1", **sizes).spans
    own = spans[(spans["rank"] == 0) & (spans["part"] == "forward") & (spans["name"] == "attention")]
    gathers = own[own["collective"] == "all_gather"].sort_values("start_us")
    kernels = own[own["operator_class"] == "attention"].sort_values("start_us")
    assert (len(gathers), len(kernels)) == (2 * 8, 8)
    for place in range(1, 8):
        assert gathers["end_us"].iloc[2 * place + 1] < kernels["end_us"].iloc[place - 1]


@pytest.mark.parametrize(
    ("plan", "changes", "words"),
    [
        ("ring=2,ring_kind=all_gather,heads_k_stride=3", {}, "does not divide the KV heads of each rank, 8"),
        ("ring=2,tp=2,ring_kind=all_gather,heads_k_stride=8", {}, "each rank, 4"),
        ("ring=2,ring_kind=all_gather,heads_k_stride=2", {"attention": "unfused"}, "needs attention = 'flash'"),
    ],
)
def test_slices_that_are_refused(plan, changes, words):
    with pytest.raises(InputError, match=words):
        scenario(plan, **changes)


def test_the_order_of_a_ring_in_fp32():
    """Keys of the next step, then the gradients of this one."""
    _, backward = sent(f"ring=4,{FP32}")
    assert [size // UNIT for _, size in backward] == [1, 2, 1, 2, 1, 2, 2]


@pytest.mark.parametrize(
    ("plan", "forward", "backward"),
    [
        (GATHERED, [("all_gather", 4)], [("all_gather", 4)] + [("send_receive", 2)] * 4),
        (f"{GATHERED},recompute=full", [("all_gather", 4)], [("all_gather", 4)] * 2 + [("send_receive", 2)] * 4),
        (f"{GATHERED},ring_messages=separate", [("all_gather", 2)] * 2,
         [("all_gather", 2)] * 2 + [("send_receive", 1)] * 8),
        ("ring_messages=separate", [("send_receive", 0.5)] * 6, [("send_receive", 0.5)] * 12),
        (f"{FP32},ring_messages=separate", [("send_receive", 0.5)] * 6, [("send_receive", 0.5), ("send_receive", 0.5),
         ("send_receive", 1), ("send_receive", 1)] * 3 + [("send_receive", 1)] * 2),
    ],
)  # fmt: skip
def test_what_a_ring_of_four_sends(plan, forward, backward):
    """In units of the K and V of a rank: one gather, and permutes in fp32; two messages of half the size."""
    found = sent(f"ring=4,{plan}")
    assert [[(name, size / UNIT) for name, size in own] for own in found] == [forward, backward]


def test_llama_of_32k_on_a_ring_of_eight():
    """(3P - 1) / 2(P - 1) = 23/14 of the traffic of the backward pass, (4P - 2) / 3(P - 1) = 10/7 of both."""
    settings = {"hardware": H100, "model": "llama-3-8b", "workload": {"seq_len": 32768}}
    found = [
        simulate(Scenario(**settings, plan=f"ring=8,library={name}")) for name in ("ring-flash-attn", "megatron-core")
    ]
    both = [one.comm_bytes_per_gpu_by_op["send_receive"] for one in found]
    assert both[0] * 7 == both[1] * 10
    forward = 7 * 32 * (2 * 2 * 4096 * 1024)
    assert (both[0] - forward) * 14 == (both[1] - forward) * 23
    assert [one.collectives_per_layer["backward"] for one in found] == [{"send_receive": 30}, {"send_receive": 14}]


def test_kernels_between_the_messages():
    """Casts read 2 bytes and write 4 of an element, sums read and write fp32 and read bf16, copies read and write."""
    q = kv = UNIT // 2  # heads of Q are those of K
    for messages, copies in (("separate", 0), ("concatenated", 1)):
        layer = program(f"ring=2,{FP32},ring_messages={messages}", seq_len=128)
        kernels = [s for s in layer.backward if isinstance(s, Compute) and s.operator == "attention"]
        moved = [s.work[0].bytes_moved for s in kernels if s.kind == "elementwise"]
        keys, sums = [2 * 2 * kv] * copies, [2 * 4 * kv] * copies
        first, later = [3 * q, 3 * 2 * kv, *sums], [5 * q, 5 * 2 * kv, *sums]
        assert moved == [*keys, *first, *later, 3 * q, 3 * 2 * kv]


def test_memory_of_gradients_in_fp32():
    """dQ, and dK and dV in twice the bytes, beside those of a block in bf16 that the kernels write."""
    layer = program(f"ring=4,{FP32}")
    buffers = {}
    for step in layer.backward:
        if step.operator == "attention":
            buffers |= {b.id: b for b in step.writes}
    wide = [b.bytes // UNIT for b in buffers.values() if b.tensor == "key_value gradient"]
    # Of each of four steps a block and a sum, of which all but the first are in the place of what arrived; four arrive.
    assert Counter(wide) == {1: 4, 2: 8}
    assert sum(b.alias_of is not None for b in buffers.values()) == 3


# ------------------------------------------------------------ a batch of two sends


@pytest.mark.parametrize("hardware", [H100, A100, "mi300x-8"])
@pytest.mark.parametrize("mib", [0.25, 0.75, 4, 32])
def test_two_sends_of_a_batch_start_once(hardware, mib):
    """As long as one message of both on the channels of one: equal where these are equal, else slower."""
    cost, message = CommCost(load_profile(hardware)), int(mib * MIB)
    both = cost.duration("send_receive", message, 8) + cost.batched_duration(message, 8, before=1)
    assert both == pytest.approx(cost.duration("send_receive", 2 * message, 8), rel=1e-12)


def test_two_sends_get_the_channels_of_one():
    """Among eight a send of 48 MiB has 4 channels of 21 GB/s, one of 96 MiB has 8."""
    cost, message = CommCost(load_profile(H100)), 48 * MIB
    both = cost.duration("send_receive", message, 8) + cost.batched_duration(message, 8, before=1)
    assert both == pytest.approx(9e-6 + 22e-6 + 2 * message / 84e9, rel=0.1)
    assert both > 1.6 * cost.duration("send_receive", 2 * message, 8)


def test_a_table_counts_both_sends():
    """Of half the size, with the mean time of the batch."""
    joint, separate = (
        result(f"ring=4{option}", seq_len=65536, hardware=H100) for option in ("", ",ring_messages=separate")
    )
    one, two = (found.collectives[0] for found in (joint, separate))
    assert (two.calls, two.message_bytes) == (2 * one.calls, one.message_bytes // 2)
    assert two.time_s == pytest.approx(one.time_s / 2)
    assert joint.comm_bytes_per_gpu_by_op == separate.comm_bytes_per_gpu_by_op


# ------------------------------------------------------------ Ulysses


UNEVEN = {"hidden": 192, "heads": 6, "kv_heads": 3}


@pytest.mark.parametrize(
    ("heads", "kv_heads", "ulysses", "most"),
    [(6, 3, 2, (4, 2)), (7, 7, 4, (2, 2)), (40, 10, 4, (12, 3)), (12, 4, 3, (6, 2))],
)
def test_groups_are_dealt_out_whole(heads, kv_heads, ulysses, most):
    """`uneven_heads_all2all` of DeepSpeed: of kv_heads = q u + r groups the first r ranks have one more. The rank that
    has most attends with them. Of Q, K and V it gives its part of the sequence of all heads, of the output all of the
    sequence of its own; backward the other way round.
    """
    shape = {"hidden": 16 * heads, "heads": heads, "kv_heads": kv_heads, "seq_len": 240}
    plan = f"ulysses={ulysses},uneven_heads=by_group"
    head = 2 * 240 * 16
    given, held = ([n * head // parts for n in own] for own, parts in (((heads, kv_heads), ulysses), (most, 1)))
    forward, backward = ([size for _, size in found] for found in sent(plan, "ulysses", **shape))
    assert forward == [given[0], given[1], given[1], held[0]]
    assert sorted(backward) == sorted([given[0], held[0], held[1], held[1]])
    kernels = [s.work[0] for s in program(plan, **shape).forward if isinstance(s, Compute) and s.kind == "attention"]
    assert [(kernel.heads, kernel.kv_heads) for kernel in kernels] == [most]
    told = f"have {most[0]} heads, the others {most[0] - heads // kv_heads}"
    assert any(told in note for note in scenario(plan, **shape).notes)


def test_an_exchange_takes_what_the_fullest_rank_gives_or_gets():
    """Of 6 heads on two ranks the first gives its half of the sequence of all and gets 4 heads of the whole."""
    found = result("ulysses=2,uneven_heads=by_group", seq_len=65536, hardware=H100, **UNEVEN)
    times = {call.message_bytes: call.time_s for call in found.collectives if call.axis == "ulysses"}
    cost, head = CommCost(found.scenario.hardware), 2 * 65536 * 32
    longest = cost.duration("all_to_all", 4 * head, 2)
    assert times[3 * head] == times[4 * head] == longest
    spans = found.spans[(found.spans["collective"] == "all_to_all") & (found.spans["message_bytes"] >= 3 * head)]
    assert spans["duration_us"].to_numpy() == pytest.approx(1e6 * longest, rel=1e-6)


@pytest.mark.parametrize(
    ("plan", "shape", "words"),
    [
        ("ulysses=2", UNEVEN, ["kv_heads = 3", "uneven_heads=by_group"]),
        ("ulysses=4,uneven_heads=by_group", UNEVEN, ["heads = 6"]),
        ("ulysses=4,ulysses_few_kv_heads=refuse", {"kv_heads": 2}, ["ulysses = 4", "KV heads, 2"]),
        ("library=deepspeed,ulysses=4", {"kv_heads": 2}, ["ulysses_few_kv_heads=replicate", "deepspeed"]),
        ("library=yunchang,ulysses=4", {"kv_heads": 2}, ["ulysses_few_kv_heads=replicate", "yunchang"]),
        ("tp=4,uneven_heads=by_group", UNEVEN, ["heads = 6"]),
        ("ring=2,ring_kind=gather_permute", {"attention": "unfused"}, ["'gather_permute'", "flash"]),
    ],
)  # fmt: skip
def test_refused_in_one_line(plan, shape, words):
    with pytest.raises(InputError) as error:
        scenario(plan, **shape)
    assert "\n" not in str(error.value)
    assert all(word in str(error.value) for word in words)


def test_deepspeed_deals_out_heads_and_megatron_refuses_them():
    assert simulate(scenario("library=deepspeed,ulysses=2", scope="step", **UNEVEN)).step_time_s > 0
    (note,) = scenario("ulysses=4", kv_heads=2).notes
    assert "K and V are replicated" in note


def test_the_gathering_ring_of_ring_flash_attn_says_which_stride_it_is():
    notes = scenario("library=ring-flash-attn,ring=2,ring_kind=all_gather", scope="step").notes
    assert [("heads_k_stride = KV heads" in note) for note in notes].count(True) == 1
    assert scenario("ring=2,ring_kind=all_gather").notes == ()


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_position_ids_are_gathered_once_a_run_of_attention(recompute):
    """8 bytes for each of s b tokens of a position on the ring, before the exchange of Q; again where it runs again."""
    found = sent(f"ulysses=2,ring=2,gathers_position_ids,recompute={recompute}", "ulysses", micro_batch=3)
    ids = ("all_gather", 8 * 3 * 256 // 2)
    exchange = ("all_to_all", 2 * 3 * 256 // 2 * 256 // 2)
    again = [ids, *[exchange] * 4] if recompute != "none" else []
    assert found == [[ids, *[exchange] * 4], [*again, *[exchange] * 4]]


@pytest.mark.parametrize(("option", "back"), [("", "oqkv"), (",ulysses_gradients=reverse", "ovkq")])
@pytest.mark.parametrize("attention", ["flash", "unfused"])
def test_gradients_of_q_k_and_v_go_back_in_order_or_the_last_first(option, back, attention):
    layer = program(f"ulysses=2{option}", kv_heads=2, attention=attention)
    names = {"q": "q", "k": "k", "v": "v", "context": "o"}
    moved = [step.tensor.partition("_")[0] for step in layer.backward if isinstance(step, Communication)]
    assert [names[name] for name in moved] == list(back if attention == "flash" else back.replace("qkv", "vqk"))


# ------------------------------------------------------------ every way to simulate

PLANS = [
    (f"ring=4,{FP32}", {"kv_heads": 2}, "step"),
    (f"ring=12,{FP32},ring_messages=concatenated", {}, "layers"),
    (f"ring=4,{FP32},ring_messages=separate,ring_cut=contiguous", {}, "layers"),
    (f"ring=12,{GATHERED}", {"kv_heads": 2}, "layers"),
    (f"ring=4,{GATHERED},ring_messages=separate,ring_cut=contiguous,recompute=full", {}, "step"),
    (
        f"tp=2,sequence_parallel,ulysses=2,ring=2,{GATHERED},ring_messages=concatenated,gathers_position_ids",
        {},
        "layers",
    ),
    ("ring=4,ring_messages=separate,recompute=selective", {}, "step"),
    ("ulysses=2,uneven_heads=by_group,gathers_position_ids", UNEVEN, "step"),
    (f"ulysses=2,ring=2,uneven_heads=by_group,{FP32},recompute=full", UNEVEN, "layers"),
    ("ulysses=2,ring=2,ring_kind=all_gather,heads_k_stride=1,recompute=full", {"kv_heads": 4}, "step"),
    ("ring=4,ring_kind=all_gather,heads_k_stride=2,ring_cut=contiguous", {}, "layers"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("plan", "changes", "scope"), PLANS)
def test_folded_equals_unfolded(plan, changes, scope):
    settings = {"hardware": H100, "global_batch": 2, "scope": scope, "seq_len": 768, **changes}
    assert_equal(result(plan, **settings), result(plan, fold=False, **settings))


@pytest.mark.parametrize(("plan", "changes"), [case[:2] for case in PLANS if "contiguous" not in case[0]])
def test_rows_of_many_workloads(plan, changes):
    """Sizes are polynomials, and columns are what the engine finds."""
    settings = {"hardware": H100, "model": dict(model(**changes)), "plan": plan}
    sizes = [{"seq_len": 768 * n, "micro_batch": b} for n in (1, 3, 64, 128) for b in (1, 2, 3)]
    assert_rows([Point({**settings, "workload": size}) for size in sizes])


@pytest.mark.slow
def test_ranks_of_a_pipeline_too():
    """Stages of rings as torch and ring-flash-attn run them."""
    for plan in (f"ring=2,{FP32},ring_messages=separate,pp=2", f"ring=2,{GATHERED},pp=2"):
        settings = {"hardware": H100, "global_batch": 4, "scope": "step"}
        folded, unfolded = (result(plan, fold=fold, **settings) for fold in (True, False))
        assert_equal(folded, unfolded)
