"""What stands around the layers: memory, traffic and collectives in closed form, published totals, the optimizer."""

import math
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spsim.costs.flops import head_flops, layer_flops
from spsim.costs.models import cost_models
from spsim.costs.static_memory import dummy_gradients, static_memory
from spsim.inputs.model import Model
from spsim.inputs.plan import Plan, parse_plan
from spsim.inputs.presets import load_model
from spsim.inputs.profiles import load_profile
from spsim.inputs.rules import check_shapes
from spsim.inputs.workload import Workload
from spsim.program.assembly import embedding_program, head_program, layer_program
from spsim.program.blocks.embedding import padded_vocab
from spsim.program.blocks.optimizer import average_gradients, optimizer_step, parameter_state, zero_gradients
from spsim.program.instructions import Communication, Compute
from spsim.program.sizes import Template
from spsim.program.templates import embedding_template, head_template
from spsim.step.prepared import prepared_step
from spsim.work import Gemm, MemoryBound
from tests.cases import H100, model
from tests.test_template import assert_equals_program, layers

T, S, B, H, V = 4, 64, 3, 96, 1000
TOKENS, ROWS = S * B, 1024
"""1000 rows are padded to 1024 for one rank and, to a multiple of 512, for four."""
GPT = {"dropout": 0.1, "max_positions": 80}
LLAMA = {"gated_mlp": True, "ffn_hidden": 96}
TP, SP, ULYSSES, RING = f"tp={T}", f"tp={T},sequence_parallel", f"ulysses={T}", f"ring={T}"


def small(traits):
    return model(hidden=H, heads=8, vocab=V, **traits)


def embedding(plan, traits, **workload):
    return embedding_program(small(traits), parse_plan(plan), Workload(seq_len=S, micro_batch=B, **workload))


def head(plan, traits, *, loss_fusion=False, beside_embedding=False, **workload):
    sizes = Workload(seq_len=S, micro_batch=B, **workload)
    options = {"loss_fusion": loss_fusion, "beside_embedding": beside_embedding}
    return head_program(small(traits), parse_plan(plan), sizes, **options)


def calls(steps):
    """(collective, axis, bytes of the message) in order."""
    found = (step for step in steps if isinstance(step, Communication))
    return [(step.collective, step.axis, step.message_bytes) for step in found]


# ------------------------------------------------------------ collectives

HIDDEN, TOKEN = 2 * TOKENS * H, 4 * TOKENS
"""Bytes of [s b h] in 16 bits, and of a number of each token in fp32."""
LOSS = [("all_reduce", "tp", TOKEN)] * 3
"""Largest logit, logit of the target, sum of exponentials: Shoeybi et al. 2019, section 3."""


def test_collectives_of_an_embedding():
    """Rows of other ranks are zero: a sum, scattered under sequence parallelism unless learned positions are added
    before (Megatron-Core); its gradient is gathered.
    """
    reduce, scatter = ("all_reduce", "tp", HIDDEN), ("reduce_scatter", "tp", HIDDEN)
    gather = ("all_gather", "tp", HIDDEN)
    for traits in (GPT, LLAMA):
        program = embedding(TP, traits)
        assert (calls(program.forward), calls(program.backward)) == ([reduce], [])
        program = embedding(SP, traits)
        assert (calls(program.forward), calls(program.backward)) == ([scatter if traits is LLAMA else reduce], [gather])
        for plan in (ULYSSES, RING):
            assert calls(embedding(plan, traits).instructions) == []


@pytest.mark.parametrize("fused", [False, True])
def test_collectives_of_a_head(fused):
    """The loss has three all-reduces and none backward; fused, one of all three numbers."""
    loss = [("all_reduce", "tp", 3 * TOKEN)] if fused else LOSS
    program = head(TP, GPT, loss_fusion=fused)
    assert (calls(program.forward), calls(program.backward)) == (loss, [("all_reduce", "tp", HIDDEN)])
    program, gather = head(SP, GPT, loss_fusion=fused), ("all_gather", "tp", HIDDEN)
    assert calls(program.forward) == [gather, *loss]
    assert calls(program.backward) == [gather, ("reduce_scatter", "tp", HIDDEN)]
    for plan in (ULYSSES, RING):
        assert calls(head(plan, GPT, loss_fusion=fused).instructions) == []


def synced(program):
    return {sync.weight: (sync.axes, sync.elements) for sync in program.weight_sync}


def test_weights_whose_gradients_are_summed():
    """Under sequence parallelism the final norm's; over a sequence everything's. The table of positions is whole on
    every rank of tp, and all have the same gradient of it.
    """
    assert synced(embedding(SP, GPT)) == synced(embedding(TP, GPT)) == synced(head(TP, GPT)) == {}
    assert synced(head(SP, LLAMA)) == {"final_norm_weight": (("tp",), H)}
    tables = {"embedding_weight": (("ring",), ROWS * H), "position_embedding_weight": (("ring",), 80 * H)}
    assert synced(embedding(RING, GPT)) == tables
    assert synced(head(RING, LLAMA)) == {
        "final_norm_weight": (("ring",), H), "output_layer_weight": (("ring",), ROWS * H)
    }  # fmt: skip


# ------------------------------------------------------------ memory and traffic


def kept(program):
    """Bytes by tensor, of statistics and ids none."""
    return {s.tensor: s.bytes for s in program.saved if s.category not in ("norm statistics", "token ids")}


def test_what_an_embedding_keeps():
    """The mask of its dropout, s b h / t under sequence parallelism (Korthikanti et al. 2022, section 4.3)."""
    assert kept(embedding("", LLAMA)) == {}
    for plan, parts in (("", 1), (TP, 1), (SP, T), (ULYSSES, T), (RING, T)):
        assert kept(embedding(plan, GPT)) == {"embedding_dropout_mask": TOKENS * H // parts}


@pytest.mark.parametrize("fused", [False, True])
def test_what_a_head_keeps(fused):
    """Inputs of norm and output layer, 2 s b h each, and fp32 logits, 4 s b v, with 9 bytes a token: 4 s b h / t under
    sequence parallelism (Korthikanti et al. 2022, section 4.3). Fused the logits are in 16 bits.
    """
    logits = (2 if fused else 4) * TOKENS * ROWS
    for plan, hidden, cut, tokens in (("", 1, 1, 1), (TP, 1, T, 1), (SP, T, T, 1), (ULYSSES, T, T, T), (RING, T, T, T)):
        found = kept(head(plan, LLAMA, loss_fusion=fused))
        assert found.pop("last_hidden") == found.pop("final_norm_out") == HIDDEN // hidden
        assert sum(found.values()) == logits // cut + (0 if fused else 9 * TOKENS // tokens)


@pytest.mark.parametrize("name", ["gpt-22b", "gpt-175b", "gpt-530b", "gpt-1t"])
def test_published_extra_terms(name):
    """s b h / t + 4 s b h / t (1 + v / h) on one stage, with sequence parallelism over 8 ranks (Korthikanti et al.
    2022, section 4.3), which leaves out where the targets are.
    """
    m, plan, workload = load_model(name), parse_plan("tp=8,sequence_parallel"), Workload(seq_len=2048, micro_batch=4)
    first, last = (make(m, plan, workload) for make in (embedding_program, head_program))
    of_head = sum(size for name, size in kept(last).items() if "target" not in name)
    hidden = 2048 * 4 * m.hidden
    assert sum(kept(first).values()) + of_head == (hidden + 4 * hidden + 4 * hidden * m.vocab // m.hidden) // 8


def loss_traffic(program):
    """Bytes of the memory-bound kernels but the norm's."""
    works = [s.work[0] for s in program.instructions if isinstance(s, Compute) and s.operator != "final_norm"]
    return sum(work.bytes_moved for work in works if isinstance(work, MemoryBound))


@pytest.mark.parametrize("plan", ["", TP, ULYSSES])
def test_traffic_of_the_loss(plan):
    """Of a 16-bit logit: a copy in fp32 (6), largest (4), difference (8), exponential (8), sum (4), quotient (8); then
    backward the product (8) and the copy in 16 bits (6): 52. Fused: read, read and write, read and write: 10. In fp32
    there are no copies: 40.
    """
    logits = TOKENS * ROWS // (T if plan else 1)
    for expected, options in ((52, {}), (10, {"loss_fusion": True}), (40, {"precision": "fp32"})):
        found = loss_traffic(head(plan, LLAMA, **options)) / logits
        assert expected < found < expected * 1.02


def test_logits_are_in_memory_once():
    """In fp32, beside the 16-bit ones that the output layer makes and the 16-bit gradient that it reads."""
    program = head("", LLAMA)
    buffers = [buffer for step in program.instructions for buffer in step.writes]
    own = Counter(buffer.bytes for buffer in buffers if buffer.alias_of is None)
    assert (own[4 * TOKENS * ROWS], own[2 * TOKENS * ROWS]) == (1, 2)


def test_an_embedding_makes_the_gradient_of_its_table():
    """Forward ids, rows and hidden states. Backward the 16-bit gradient of the table is cleared, rows are added to it,
    and it is added to the fp32 main gradient: 10 bytes a parameter.
    """
    program = embedding(ULYSSES, LLAMA)
    works = {(s.operator, s.part): s.work[0].bytes_moved for s in program.instructions if isinstance(s, Compute)}
    rows, ids, table = HIDDEN // T, 8 * TOKENS // T, ROWS * H
    assert works["embedding", "forward"] == ids + 2 * rows
    assert works["embedding", "backward"] == ids + 3 * rows + 2 * table
    assert works["embedding", "accumulate"] == 10 * table
    (gradient,) = (b for s in program.backward for b in s.writes if b.tensor == "embedding_weight gradient")
    assert gradient.bytes == 2 * table


def test_products_of_a_head():
    """Three of s b x h x v / t, of which the last adds to the main gradient."""
    works = [s.work[0] for s in head(SP, LLAMA).instructions if isinstance(s, Compute)]
    products = [work for work in works if isinstance(work, Gemm)]
    assert [p.flops for p in products] == [2 * TOKENS * H * ROWS // T] * 3
    assert [p.accumulated for p in products] == [0, 0, H * ROWS // T]


# ------------------------------------------------------------ parameters and FLOPs


def parameters(name, plan=""):
    """Of all ranks of tp, what is whole on each counted once."""
    found, parsed, workload = load_model(name), parse_plan(plan), Workload(seq_len=2048)
    blocks = [
        embedding_program(found, parsed, workload),
        *[layer_program(found, parsed, workload)] * found.layers,
        head_program(found, parsed, workload, beside_embedding=True),
    ]
    return sum(block.parameters for block in blocks)


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("llama-3-8b", 8_030_261_248), ("llama-3-70b", 70_553_706_496), ("llama-3-405b", 405_853_388_800),
        ("llama-2-7b", 6_738_415_616), ("mistral-7b", 7_241_732_096),
    ],
)  # fmt: skip
def test_parameters_of_published_models(name, published):
    """`total_size` of their safetensors over 2 bytes; 128 divides all their vocabularies."""
    assert parameters(name) == published


@pytest.mark.parametrize("name", ["gpt-22b", "gpt-175b", "gpt-530b", "gpt-1t"])
def test_parameters_of_gpt(name):
    """12 l h^2 (1 + 13 / (12 h) + (V + s) / (12 l h)) (Narayanan et al. 2021, equation 2), which leaves out the final
    norm; the head is the embedding.
    """
    m = load_model(name)
    published = 12 * m.layers * m.hidden**2 + 13 * m.layers * m.hidden + (m.vocab + 2048) * m.hidden
    assert parameters(name) == published + 2 * m.hidden


def test_tied_weights_are_there_once_beside_the_embedding():
    """On the last of several stages the head has a copy, which is synchronised."""
    norm = 2 * H
    assert head("", GPT).parameters == norm + ROWS * H
    assert head("", GPT, beside_embedding=True).parameters == norm
    assert set(synced(head(RING, GPT))) == {"final_norm_weight", "final_norm_bias", "embedding_weight"}
    assert set(synced(head(RING, GPT, beside_embedding=True))) == {"final_norm_weight", "final_norm_bias"}
    assert head("", LLAMA, beside_embedding=True).parameters == H + ROWS * H


@pytest.mark.parametrize(
    ("vocab", "tp", "rows"),
    [(50257, 1, 50304), (50257, 8, 51200), (32000, 8, 32768), (128256, 8, 129024), (256, 2, 256)],
)
def test_padding_of_a_vocabulary(vocab, tp, rows):
    """Megatron-LM's 50,304 of GPT-2; 51,200 at tp = 8 as in Korthikanti et al. 2022."""
    assert padded_vocab(vocab, tp) == rows


def test_flops_of_a_whole_model():
    """96 B s l h^2 (1 + s / (6 h) + V / (16 l h)) with full recomputation (Narayanan et al. 2021, equation 3), where
    the head does not run again: three passes of it.
    """
    m, workload = load_model("gpt-175b"), Workload(seq_len=2048, micro_batch=4)
    tokens, l, h = 4 * 2048, m.layers, m.hidden  # noqa: E741
    of_layers = l * layer_flops(m, workload).executed(["layer"])
    assert head_flops(m, workload).training() == 6 * tokens * h * m.vocab
    published = 96 * tokens * l * h**2 * (1 + 2048 / (6 * h) + m.vocab / (16 * l * h))
    assert math.isclose(of_layers + head_flops(m, workload).training(), published, rel_tol=1e-12)
    kernels = head_program(m, Plan(), workload).instructions
    ran = sum(s.work[0].flops for s in kernels if isinstance(s, Compute))
    assert ran == head_flops(m, workload).training()


# ------------------------------------------------------------ templates


@pytest.mark.slow
@settings(max_examples=50, deadline=None, derandomize=True)
@given(layers(), st.integers(1, 40), st.integers(1, 9), st.booleans(), st.booleans(), st.sampled_from(["bf16", "fp32"]))
def test_templates_equal_compilation(layer, units, micro_batch, fused, beside, precision):
    """Random models and plans: number by number."""
    found, plan = layer
    found = found.model_copy(update={"tied_embeddings": beside, "head_bias": fused, "max_positions": 100})
    options = {"loss_fusion": fused, "beside_embedding": beside}
    first, last = embedding_template(found, plan, precision), head_template(found, plan, precision, **options)
    workload = Workload(seq_len=first.unit * units, micro_batch=micro_batch, precision=precision)
    check_shapes(found, plan, workload)
    assert_equals_program(first, workload, embedding_program(found, plan, workload))
    assert_equals_program(last, workload, head_program(found, plan, workload, **options))


@pytest.mark.parametrize("plan", ["", SP, "ulysses=2,ring=2", "ring=4,ring_cut=contiguous"])
def test_a_step_has_them(plan):
    """Both passes of embedding and head, in which ranks of a ring that is cut contiguously are alike."""
    step = prepared_step(small(GPT), parse_plan(plan), True)
    for block in ("embedding", "head"):
        assert list(step.blocks[block]) == ["forward", "backward"]
        parts = [part for own in step.blocks[block].values() for part in own.parts]
        works = [s.work for part in parts for s in part.segment.instructions if isinstance(s, Compute)]
        assert {len(work) for work in works} == {1}


@pytest.mark.parametrize("option", ["recompute=full", "recompute=selective", "ring_kind=all_gather"])
def test_what_concerns_layers_changes_nothing(option):
    """Recomputation is of layers, and rings are of attention: one template serves."""
    plan, other = parse_plan("tp=2"), parse_plan(f"tp=2,{option}")
    assert embedding_template(small(GPT), plan) is embedding_template(small(GPT), other)
    template = head_template(small(GPT), plan)
    assert isinstance(template, Template)
    assert template is head_template(small(GPT), other)
    assert template is not head_template(small(GPT), plan, loss_fusion=True)


# ------------------------------------------------------------ optimizer


def step_bytes(plan="", weight_bytes=2, **options):
    """Bytes a parameter of each kernel of a step."""
    state = parameter_state(parse_plan(plan), weight_bytes)
    kernels = (zero_gradients(1000, state), *optimizer_step(1000, state, **options))
    return {kernel.name: kernel.bytes / 1000 for kernel in kernels}


def test_bytes_of_a_step():
    """Clearing writes 4; the norm reads 4; clipping reads and writes 8; Adam reads gradient, master and two moments and
    writes all but the gradient, 28; the weight is copied from its master, 6: 50. Averaging over replicas is 8 more.
    """
    mixed = {"zero_gradients": 4, "gradient_norm": 4, "clip": 8, "adam": 28, "weights_from_master": 6}
    assert step_bytes() == mixed
    assert list(step_bytes()) == list(mixed)
    assert step_bytes(scaled=True) == {**mixed, "unscale": 8}
    assert average_gradients(1000, parameter_state(Plan(), 2)).bytes == 8000


def test_bytes_of_a_step_by_type():
    """fp32 weights are their own masters. 16-bit gradients are copied to fp32, unless the optimizer reads them; it then
    keeps of the master what the weight leaves, and writes both: 4 bytes as before, and no copy.
    """
    assert step_bytes(weight_bytes=4) == {"zero_gradients": 4, "gradient_norm": 4, "clip": 8, "adam": 28}
    assert step_bytes("grad_dtype=bf16") == {
        "zero_gradients": 2, "gradients_to_fp32": 6, "gradient_norm": 4, "clip": 8, "adam": 28, "weights_from_master": 6
    }  # fmt: skip
    aware = "grad_dtype=bf16,moment_dtype=bf16,precision_aware_optimizer"
    assert step_bytes(aware) == {"zero_gradients": 2, "gradient_norm": 2, "clip": 4, "adam": 2 + 2 * 8}


# Measured on an H100 (torch 2.11, fp32 parameters, gradients and moments): microseconds of 1e9 parameters.
ADAM_US, CLIP_US, ZERO_US, CAST_US = 10620.0, 4600.0, 1552.0, 2458.0


def test_kernels_of_a_step_as_measured():
    """Fused AdamW; norm and clipping in one call; zeroing; the copy from fp32 to bf16. Within 8 %."""
    compute, _ = cost_models(load_profile(H100), "bf16")
    state = parameter_state(Plan(), 2)
    kernels = (zero_gradients(10**9, state), *optimizer_step(10**9, state))
    found = {kernel.name: 1e6 * float(compute.duration(MemoryBound("optimizer", kernel.bytes))) for kernel in kernels}
    assert found["adam"] == pytest.approx(ADAM_US, rel=0.08)
    assert found["gradient_norm"] + found["clip"] == pytest.approx(CLIP_US, rel=0.08)
    assert found["zero_gradients"] == pytest.approx(ZERO_US, rel=0.08)
    assert found["weights_from_master"] == pytest.approx(CAST_US, rel=0.08)


@pytest.mark.parametrize(
    ("plan", "weight", "gradient", "optimizer"),
    [
        ("dp=4", 2, 4, 12),
        ("dp=4,distributed_optimizer", 2, 4, 3),
        ("dp=2,ulysses=2,ring=2,zero=1", 2, 4, 1.5),
        ("dp=4,zero=1,grad_dtype=bf16,dp_library=deepspeed", 2, 2, 3),
        ("dp=4,zero=2,grad_dtype=bf16,dp_library=deepspeed", 2, 0.5, 3),
        ("dp=4,zero=3,grad_dtype=bf16,dp_library=deepspeed", 0.5, 0.5, 3),
        ("dp=4,zero=3,dp_library=fsdp", 1, 1, 2),
        ("dp=4,zero=3,dp_library=fsdp,shard_group=2", 2, 2, 4),
        ("dp=4,zero=1,moment_dtype=bf16", 2, 4, 2),
        ("dp=4,zero=1,moment_dtype=bf16,precision_aware_optimizer", 2, 4, 1.5),
        ("dp=4,dp_library=ddp", 2, 8, 12),
    ],
)
def test_static_memory_by_stage(plan, weight, gradient, optimizer):
    """Bytes a parameter: what each stage shards (Rajbhandari et al. 2020, figure 1). FSDP2 keeps fp32 weights only, of
    which each rank of a group has a part; gradients of DDP stand beside their buckets (torch.nn.parallel,
    `gradient_as_bucket_view`).
    """
    found = static_memory(1000, parse_plan(plan), 2)
    assert (found.weights, found.gradients, found.optimizer) == (1000 * weight, 1000 * gradient, 1000 * optimizer)


# Peak memory of Megatron-LM 23e00ed0 with Transformer Engine 2.11 on B200 in GiB, of layers and hidden size, MLP width,
# heads, KV heads, sequence, tp, ranks of all-to-all context parallelism, dp: SimuMax docs/b200, summary of release 1.2.
PEAKS = [
    (12, 8192, 28672, 64, 8, 4096, 4, 1, 2, 39.07),
    (4, 16384, 53248, 128, 16, 4096, 4, 1, 2, 52.89),
    (12, 8192, 28672, 64, 8, 32768, 2, 4, 1, 68.43),
    (4, 16384, 53248, 128, 16, 32768, 2, 4, 1, 87.03),
    (12, 8192, 28672, 64, 8, 131072, 2, 4, 1, 112.67),
    (4, 16384, 53248, 128, 16, 131072, 2, 4, 1, 118.13),
]


@pytest.mark.parametrize(("layers", "h", "f", "a", "kv", "s", "tp", "cp", "dp", "measured"), PEAKS)
def test_peak_of_one_stage(layers, h, f, a, kv, s, tp, cp, dp, measured):
    """When the head has made its gradients, within 1 %: all that layers keep; 16-bit logits that became their gradient;
    inputs of head and norm; gathered input and its gradient; and of each shape of a weight one dummy gradient.
    """
    plan = Plan(tp=tp, sequence_parallel=True, ulysses=cp, dp=dp, distributed_optimizer=True)
    m = Model(layers=layers, hidden=h, ffn_hidden=f, heads=a, kv_heads=kv, vocab=128256, gated_mlp=True)
    workload = Workload(seq_len=s)
    first, layer = embedding_program(m, plan, workload), layer_program(m, plan, workload)
    last = head_program(m, plan, workload, loss_fusion=True, beside_embedding=True)
    parameters = first.parameters + layers * layer.parameters + last.parameters
    kept = layers * sum(s.bytes for s in layer.saved) + sum(s.bytes for s in last.saved)
    gathered = 2 * 2 * (s // cp) * h
    total = static_memory(parameters, plan, 2).total + dummy_gradients([first, layer, last], 2) + kept + gathered
    assert total / 2**30 == pytest.approx(measured, rel=0.01)


def test_dummy_gradients_are_of_shapes():
    """h x (h + 2 kv d), h x h, h x 2f, f x h and v x h, however many layers: where f = h, the second is the fourth."""
    m, plan, workload = small({"gated_mlp": True, "ffn_hidden": 2 * H}), parse_plan("tp=2"), Workload(seq_len=S)
    programs = [layer_program(m, plan, workload)] * 3 + [head_program(m, plan, workload)]
    assert dummy_gradients(programs, 2) == 2 * (3 * H * H + H * H + 4 * H * H + 2 * H * H + ROWS * H) // 2
    square = [layer_program(small({"gated_mlp": True, "ffn_hidden": H}), plan, workload)]
    assert dummy_gradients(square, 2) == 2 * (3 * H * H + H * H + 2 * H * H) // 2
