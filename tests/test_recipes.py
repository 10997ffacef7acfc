"""Products in 8 and 4 bits: what is cast, kept, sent and held, by hand; facts of Transformer Engine, Megatron-Core."""

from collections import Counter
from fractions import Fraction

import pytest

from spsim import InputError, Model, Scenario, Workload, explain, load_profile, simulate
from spsim.costs.kernels import ComputeCost
from spsim.costs.models import compute_cost
from spsim.inputs.plan import parse_plan
from spsim.program.assembly import layer_program
from spsim.program.instructions import Communication, Compute
from spsim.program.recipes import program_precision
from spsim.units import GIB
from spsim.work import FlashAttention, Gemm, MemoryBound

S, H, F, A, KV, D, T = 4096, 4096, 14336, 32, 8, 128, 4
"""Sequence, widths and heads of a layer, and the degree of tp."""
LLAMA = Model(
    layers=2, hidden=H, ffn_hidden=F, heads=A, kv_heads=KV, vocab=1024, attention="flash", dropout=0.0, bias=False,
    norm="rmsnorm", activation="swiglu", gated_mlp=True, positions="rope",
)  # fmt: skip
TP = f"tp={T},sequence_parallel"
ITEMSIZE = {
    "fp8": 1, "fp8_delayed": 1, "mxfp8": Fraction(33, 32), "fp8_blockwise": Fraction(33, 32), "nvfp4": Fraction(9, 16)
}  # fmt: skip
"""Values and scales: one byte for 32, four for 128; half a byte and one for 16."""
LINEARS = ("qkv", "projection", "fc1", "fc2")


def program(precision, plan=TP, *, any_layout=False):
    workload = Workload(seq_len=S, precision=precision)
    own = program_precision(precision, any_layout=any_layout)
    return layer_program(LLAMA, parse_plan(plan), workload.model_copy(update={"precision": own}))


def kernels(steps, kind="cast"):
    """(operator, part, name of the kernel) -> bytes."""
    found = Counter()
    for step in steps:
        if isinstance(step, Compute) and step.kind == kind:
            found[step.operator, step.part, step.work[0].kernel] += step.work[0].bytes_moved
    return dict(found)


def sent(steps):
    """(collective, what for) -> bytes of the messages of a pass."""
    found = Counter()
    for step in steps:
        if isinstance(step, Communication):
            found[step.collective, step.purpose] += step.message_bytes
    return dict(found)


# ------------------------------------------------------------ what runs in which type


@pytest.mark.slow
@pytest.mark.parametrize("precision", ITEMSIZE)
def test_products_of_one_input_share_its_cast(precision):
    """Q, K and V apart, gate and up apart: cast, gathered and kept once, as of one product of them all; products and
    casts of gradients are as many bytes in more kernels.
    """
    fused, separate = (program(precision, f"{TP},projections={own}") for own in ("fused", "separate"))
    assert sent(separate.instructions) == sent(fused.instructions)
    assert separate.saved_bytes("activation") == fused.saved_bytes("activation")
    assert separate.weight_bytes == fused.weight_bytes

    def casts(found, ends):
        return [size for (name, part, _), size in kernels(found.instructions).items() if name.endswith(ends)]

    for ends in ("_cast", "_gradient_cast"):
        assert sum(casts(separate, ends)) == sum(casts(fused, ends))
    products = [
        s for s in separate.instructions if isinstance(s, Compute) and s.operator in ("q", "k", "v", "gate", "up")
    ]
    dtype = "fp8" if precision == "fp8_delayed" else precision
    assert {s.work[0].dtype for s in products if s.kind == "gemm"} == {dtype}


@pytest.mark.parametrize("precision", ITEMSIZE)
def test_linears_run_in_the_type_and_nothing_else_does(precision):
    dtype = "fp8" if precision == "fp8_delayed" else precision
    found = {(s.operator, s.part): s.work[0] for s in program(precision).instructions if isinstance(s, Compute)}
    products = {key: work.dtype for key, work in found.items() if isinstance(work, Gemm)}
    assert products == {(name, part): dtype for name in LINEARS for part in ("forward", "dgrad", "wgrad")}
    others = [w for w in found.values() if not isinstance(w, Gemm | FlashAttention) and w.operator_class != "cast"]
    assert others
    assert {work.dtype for work in others} == {None}


def test_unfused_attention_stays_in_16_bits():
    model = LLAMA.model_copy(update={"attention": "unfused"})
    steps = layer_program(model, parse_plan("tp=2"), Workload(seq_len=512, precision="fp8")).instructions
    types = {s.operator: s.work[0].dtype for s in steps if isinstance(s, Compute) and isinstance(s.work[0], Gemm)}
    assert {name: types[name] for name in ("qk", "av", "qkv", "fc2")} == {
        "qk": None, "av": None, "qkv": "fp8", "fc2": "fp8",
    }  # fmt: skip


def test_bytes_of_products():
    """Operands are read in 8 bits, results written in 16."""
    by_part = {
        (s.operator, s.part): s.work[0].bytes_moved
        for s in program("fp8", "tp=1").instructions
        if isinstance(s, Compute) and isinstance(s.work[0], Gemm)
    }
    assert by_part["fc2", "forward"] == S * F + F * H + 2 * S * H
    assert by_part["fc2", "dgrad"] == S * H + F * H + 2 * S * F
    assert by_part["fc2", "wgrad"] == S * F + S * H + 2 * F * H


# ------------------------------------------------------------ what is kept and sent


@pytest.mark.parametrize("precision", ITEMSIZE)
def test_kept_for_the_backward_pass(precision):
    """Inputs of linears in the type, one copy each; that of the projection stays in 16 bits where attention keeps it
    anyway (`save_original_input`), which delayed scaling cannot.
    """
    size, again = ITEMSIZE[precision], precision == "fp8_delayed"
    residuals = 2 * 2 * S * H
    attention = 2 * S * (H + 2 * KV * D) + 2 * S * H
    linears = size * (2 * S * H + S * F + (S * H if again else 0))
    assert program(precision).saved_bytes("activation") == (residuals + attention + linears + 2 * 2 * S * F) / T


@pytest.mark.parametrize("precision", ITEMSIZE)
def test_sequence_parallel_gathers_casts_and_scatters_16_bits(precision):
    """A gather moves the copy that is read next; of gradients both, where rows and columns have scales of their own.
    Ranks agree on scales of whole tensors.
    """
    size, both = ITEMSIZE[precision], 1 if precision.startswith("fp8") and precision != "fp8_blockwise" else 2
    found = program(precision)
    scales = {"all_reduce": 2 * 4} if precision in ("fp8", "nvfp4") else {}
    assert sent(found.forward) == {
        ("all_gather", "input"): 2 * size * S * H, ("reduce_scatter", "input"): 2 * 2 * S * H,
        **{(collective, "input"): size for collective, size in scales.items()},
    }  # fmt: skip
    assert sent(found.backward) == {
        **{(collective, "gradient"): size for collective, size in scales.items()},
        ("all_gather", "gradient"): 2 * both * size * S * H,
        ("all_gather", "regather"): 2 * size * S * H,
        ("reduce_scatter", "gradient"): 2 * 2 * S * H,
    }  # fmt: skip


@pytest.mark.parametrize("plan", ["tp=4", "ulysses=4", "ring=4", "ring=4,ring_kind=all_gather", "tp=2,ulysses=2"])
def test_other_plans_send_what_they_send_in_16_bits(plan):
    half, eighth = program("bf16", plan), program("fp8", plan)
    assert sent(half.forward) == sent(eighth.forward)
    assert sent(half.backward) == sent(eighth.backward)


# ------------------------------------------------------------ casts


def test_casts_of_per_tensor_scales_on_hopper():
    """A norm finds the scale that its reader needs, other inputs are read once more for it. What is gathered is cast
    along rows and transposed afterwards, all else cast both ways.
    """
    found = program("fp8")
    assert kernels(found.forward) == {
        ("qkv_cast", "forward", "quantize"): 3 * S * H / T,
        ("projection_cast", "forward", "amax"): 2 * S * H / T,
        ("projection_cast", "forward", "quantize"): 3 * S * H / T,
        ("fc1_cast", "forward", "quantize"): 3 * S * H / T,
        ("fc2_cast", "forward", "amax"): 2 * S * F / T,
        ("fc2_cast", "forward", "quantize_both"): 4 * S * F / T,
    }  # fmt: skip
    qkv = S * (H + 2 * KV * D) / T
    assert kernels(found.backward) == {
        ("fc2_gradient_cast", "backward", "amax"): 2 * S * H / T,
        ("fc2_gradient_cast", "backward", "quantize"): 3 * S * H / T,
        ("fc2", "wgrad", "transpose"): 2 * S * H,
        ("fc1_gradient_cast", "backward", "amax"): 2 * 2 * S * F / T,
        ("fc1_gradient_cast", "backward", "quantize_both"): 4 * 2 * S * F / T,
        ("fc1", "wgrad", "transpose"): 2 * S * H,
        ("projection_gradient_cast", "backward", "amax"): 2 * S * H / T,
        ("projection_gradient_cast", "backward", "quantize"): 3 * S * H / T,
        ("projection", "wgrad", "amax"): 2 * S * H / T,
        ("projection", "wgrad", "quantize_both"): 4 * S * H / T,
        ("projection", "wgrad", "transpose"): 2 * S * H,
        ("qkv_gradient_cast", "backward", "amax"): 2 * qkv,
        ("qkv_gradient_cast", "backward", "quantize_both"): 4 * qkv,
        ("qkv", "wgrad", "transpose"): 2 * S * H,
    }  # fmt: skip


def test_blackwell_reads_any_layout():
    """One copy, no transpose (`is_non_tn_fp8_gemm_supported`)."""
    found = program("fp8", any_layout=True)
    assert {name for _, _, name in kernels(found.instructions)} == {"amax", "quantize"}
    assert kernels(found.forward)["fc2_cast", "forward", "quantize"] == 3 * S * F / T


def test_delayed_scaling_casts_in_the_norm():
    """No pass for a scale; the norm writes one byte an element and has no cast behind it."""
    found, half = program("fp8_delayed", "tp=1"), program("bf16", "tp=1")
    assert {operator for operator, *_ in kernels(found.forward)} == {"projection_cast", "fc2_cast"}
    assert {name for _, _, name in kernels(found.instructions)} == {"quantize_both", "transpose"}
    norms = [kernels(own.forward, "norm") for own in (half, found)]
    assert {key: norms[0][key] - own for key, own in norms[1].items()} == dict.fromkeys(norms[0], S * H)
    assert kernels(found.backward, "norm") == kernels(half.backward, "norm")


@pytest.mark.parametrize("precision", ["mxfp8", "fp8_blockwise"])
def test_blocks_are_cast_both_ways_at_once(precision):
    """No pass for a scale; the input of the projection, which is kept in 16 bits, along columns later."""
    size, found = ITEMSIZE[precision], kernels(program(precision, "tp=1").instructions)
    assert found["fc2_cast", "forward", "quantize_both"] == (2 + 2 * size) * S * F
    assert found["projection_cast", "forward", "quantize"] == (2 + size) * S * H
    assert found["projection", "wgrad", "quantize_columnwise"] == (2 + size) * S * H
    assert {name for _, _, name in found} == {"quantize", "quantize_both", "quantize_columnwise"}


def test_scales_are_put_in_order_after_a_gather():
    """A byte for 32 values, read and written: of inputs forward and backward, of gradients for both products."""
    found = kernels(program("mxfp8").instructions)
    ordered = {key: size for key, size in found.items() if key[2] == "swizzle_scales"}
    scales = 2 * S * H / 32
    assert ordered == {
        (name, part, "swizzle_scales"): scales
        for name, part in [
            ("qkv", "forward"), ("qkv", "wgrad"), ("fc1", "forward"), ("fc1", "wgrad"),
            ("projection", "dgrad"), ("projection", "wgrad"), ("fc2", "dgrad"), ("fc2", "wgrad"),
        ]
    }  # fmt: skip


def test_full_recomputation_casts_again():
    """Forward casts run once more, and nothing cast is kept."""
    found = program("fp8", f"{TP},recompute=full")
    again = {key[:1] + key[2:]: size for key, size in kernels(found.backward).items() if key[1] == "recompute"}
    assert again == {key[:1] + key[2:]: size for key, size in kernels(found.forward).items()}
    assert found.saved_bytes("activation") == 2 * S * H / T


def test_a_discarded_norm_takes_its_cast_along():
    """`recompute_modules=layernorm`: neither the result of the norm nor its copy in 8 bits is kept."""
    plan = f"{TP},recompute=selective,recompute_modules=layernorm"
    assert program("fp8").saved_bytes("activation") - program("fp8", plan).saved_bytes("activation") == 2 * S * H / T


# ------------------------------------------------------------ weights

LINEAR_WEIGHTS = (H * (H + 2 * KV * D) + H * H + 3 * H * F) // T
RESIDENT = {"fp8": 2, "fp8_delayed": 2, "mxfp8": 2 * Fraction(33, 32), "fp8_blockwise": 2 + 2 * Fraction(33, 32)}
GATHERED = {"fp8": 1, "fp8_delayed": 1, "mxfp8": 2, "fp8_blockwise": 2, "nvfp4": 2}
"""Bytes a weight: Megatron-Core gathers what per-tensor scales have cast, and 16 bits of blocks."""


@pytest.mark.parametrize("precision", RESIDENT)
def test_weights_rest_in_the_copies_that_products_read(precision):
    found = program(precision)
    assert found.weight_bytes == RESIDENT[precision] * LINEAR_WEIGHTS + 2 * 2 * H
    assert found.parameters == LINEAR_WEIGHTS + 2 * H


@pytest.mark.parametrize("precision", GATHERED)
def test_the_gather_of_parameters_has_the_type_of_the_recipe(precision):
    syncs = program(precision, "ulysses=4").weight_sync
    total = sum(sync.bytes for sync in syncs)
    assert total == GATHERED[precision] * LINEAR_WEIGHTS * T + 2 * 2 * H


def test_weights_are_cast_once_a_step():
    """Two of the layer's weights a byte each to the transposes; from 16 bits to both copies of blocks."""
    moved = {
        own: sum(k.bytes_moved for k in program(own).weight_casts) for own in ("fp8", "mxfp8", "fp8_blockwise", "nvfp4")
    }
    assert moved == {
        "fp8": 2 * LINEAR_WEIGHTS,
        "mxfp8": (2 + 2 * Fraction(33, 32)) * LINEAR_WEIGHTS,
        "fp8_blockwise": (2 + 2 * Fraction(33, 32)) * LINEAR_WEIGHTS,
        "nvfp4": (2 + 2 + 2 * Fraction(9, 16)) * LINEAR_WEIGHTS,
    }
    assert program("fp8", any_layout=True).weight_casts == ()


def result(precision, *, plan=TP, fold=True, **options):
    workload = {"seq_len": 2048, "precision": precision, **options.pop("workload", {})}
    options = {"scope": "layers", **options}
    return simulate(Scenario(hardware="dgx-h100", model=LLAMA, plan=plan, workload=workload, **options), fold=fold)


def test_static_memory():
    half, eighth = result("bf16"), result("fp8_delayed")
    assert half.static.weights == eighth.static.weights
    assert half.static.optimizer == eighth.static.optimizer
    assert result("fp8").memory_curve["weights_gib"].iloc[0] * GIB == 2 * (2 * LINEAR_WEIGHTS + 2 * 2 * H)


def test_casts_of_weights_follow_the_optimizer_whatever_the_micro_batches():
    """Two micro-batches take twice the time of one beyond what a step has once."""
    one, two = (result("fp8", scope="step", workload={"global_batch": n}) for n in (1, 2))
    names = [task.name for task in two.trace.tasks]
    assert names.count("transpose_weights") == 1
    assert names.index("transpose_weights") > names.index("adam")
    casts = LLAMA.layers * 2 * LINEAR_WEIGHTS
    rate = load_profile("dgx-h100").memory_bandwidth
    spans = [span for span in one.trace.spans if one.trace.tasks[span.task].name == "transpose_weights"]
    assert casts / rate < (spans[0].end_ps - spans[0].start_ps) * 1e-12 < 2 * casts / rate + 1e-5


# ------------------------------------------------------------ times


def test_attention_takes_the_time_of_16_bits():
    work = FlashAttention("cudnn", "forward", 1, 8, 8, 128, 128, 4096, 4096, 4096**2, True, 4 * 8 * 4096 * 128 * 2)
    profile = load_profile("dgx-h100")
    assert compute_cost(profile, "fp8").duration(work) == compute_cost(profile, "bf16").duration(work)


@pytest.mark.parametrize(
    ("m", "n", "k", "tflops"),
    [
        (8192, 8192, 8192, 1290.1),
        (16384, 16384, 16384, 1377.3),
        (6144, 12288, 12288, 1351.4),
    ],
)
def test_fp8_products_of_an_h100(m, n, k, tflops):
    """cuBLASLt on random data, 10,000 warm-ups (Azure/AI-benchmarking-guide, ND_H100_v5_results.md at 8fd0c6e): at the
    power limit, as long runs are.
    """
    work = Gemm(m, n, k, 1, m * k + k * n + 2 * m * n, dtype="fp8")
    predicted = work.flops / float(ComputeCost(load_profile("dgx-h100"), "bf16").duration(work)) / 1e12
    assert predicted == pytest.approx(tflops, rel=0.08)


def test_a_product_names_its_type():
    """The same product in the type that it names and on a device that is asked for that type."""
    work = Gemm(4096, 4096, 4096, 1, 3 * 4096**2)
    named = Gemm(4096, 4096, 4096, 1, 3 * 4096**2, dtype="fp8")
    profile = load_profile("dgx-h100")
    assert ComputeCost(profile, "bf16").duration(named) == ComputeCost(profile, "fp8").duration(work)
    assert ComputeCost(profile, "bf16").coefficients_of(named)[1] == "gemm.fraction.fp8"


@pytest.mark.parametrize(
    ("kernel", "copies", "measured_us"),
    [("quantize", 1, 34.8), ("quantize_columnwise", 1, 39.6), ("quantize_both", 2, 52.3)],
)
def test_casts_of_transformer_engine_on_b200(kernel, copies, measured_us):
    """8192 x 8192 from bf16 to mxfp8 (ROCm/TransformerEngine pull request 598): the bytes that a recipe counts move at
    the rates of the profile.
    """
    moved = int((2 + copies * Fraction(33, 32)) * 8192**2)
    cost = compute_cost(load_profile("dgx-b200"), "mxfp8")
    predicted = float(cost.duration(MemoryBound("cast", moved, kernel, dtype="mxfp8"))) * 1e6
    assert predicted == pytest.approx(measured_us, rel=0.1)


def test_explain_shows_the_casts():
    found = explain(LLAMA, TP, {"seq_len": S, "precision": "fp8"})
    rows = {row.operator: row for row in found.operators}
    assert rows["qkv_cast"].bytes_moved == 3 * S * H / T
    assert rows["fc2_gradient_cast"].bytes_moved == 0
    assert [c.collective for c in rows["fc2_gradient_cast"].communication] == ["reduce_scatter", "all_reduce"]


def test_a_layer_in_fp8():
    """Products about as much faster as their rates are, the rest as before, casts of a twentieth of the time."""
    sizes = {"workload": {"seq_len": 8192}, "model": "llama-3-70b"}
    half, eighth = (
        simulate(
            Scenario(
                hardware="dgx-h100",
                plan=TP,
                scope="layers",
                **sizes | {"workload": {"seq_len": 8192, "precision": own}},
            )
        )
        for own in ("bf16", "fp8")
    )
    assert half.compute_ps["elementwise"] == eighth.compute_ps["elementwise"]
    assert half.compute_ps["norm"] == eighth.compute_ps["norm"]
    assert 1.6 < half.compute_ps["gemm"] / eighth.compute_ps["gemm"] < 2
    assert "cast" not in half.compute_ps or not half.compute_ps["cast"]
    assert 0.03 < eighth.compute_ps["cast"] * 1e-12 / eighth.step_time_s < 0.08
    assert eighth.mfu == pytest.approx(
        eighth.tflops_per_gpu * 1e12 / load_profile("dgx-h100").peak("fp8")
    )  # utilisation of the peak of the products


@pytest.mark.parametrize("plan", [TP, "ulysses=4", "ring=2,tp=2", f"{TP},recompute=full"])
@pytest.mark.parametrize("precision", ["fp8", "fp8_delayed"])
def test_folded_equals_unfolded(plan, precision):
    folded, unfolded = (result(precision, plan=plan, fold=fold) for fold in (True, False))
    assert folded.step_ps == unfolded.step_ps
    assert folded.peak_memory_gib == unfolded.peak_memory_gib


# ------------------------------------------------------------ words and refusals


@pytest.mark.parametrize(
    ("word", "precision"),
    [
        ("fp8-cs", "fp8"), ("tensorwise", "fp8"), ("Float8CurrentScaling", "fp8"), ("DelayedScaling", "fp8_delayed"),
        ("fp8-blockwise", "fp8_blockwise"), ("Float8BlockScaling", "fp8_blockwise"), ("MXFP8BlockScaling", "mxfp8"),
        ("NVFP4BlockScaling", "nvfp4"), ("bf16_with_mxfp8_mixed", "mxfp8"),
    ],
)  # fmt: skip
def test_words_of_other_tools(word, precision):
    assert Workload(seq_len=128, precision=word).precision == precision


@pytest.mark.parametrize(
    ("hardware", "precision", "sizes", "said"),
    [
        ("dgx-a100-80gb", "fp8", {}, r"precision 'fp8': .*A100.* no such peak; choose one of .*bf16"),
        ("dgx-h100", "nvfp4", {}, r"precision 'nvfp4': .*H100.* no such peak"),
        ("dgx-h100", "fp8", {"hidden": 4104, "head_dim": 128}, "blocks of 16.* hidden = 4104; use bf16 or sizes"),
        ("dgx-h100", "fp8", {"ffn_hidden": 14344}, "ffn_hidden / tp = 3586"),
    ],
)
def test_what_cannot_be_cast_is_refused(hardware, precision, sizes, said):
    model = LLAMA.model_copy(update=sizes)
    with pytest.raises(InputError, match=said):
        Scenario(hardware=hardware, model=model, plan=TP, workload={"seq_len": 2048, "precision": precision})


def test_tokens_of_a_rank_are_whole_blocks():
    with pytest.raises(InputError, match="sequence shards = 8; use bf16"):
        Scenario(hardware="dgx-h100", model=LLAMA, plan=TP, workload={"seq_len": 32, "precision": "fp8"})
