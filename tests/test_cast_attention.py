"""Core attention and the output layer in 8 bits: what Transformer Engine casts, keeps and runs, by hand."""

from fractions import Fraction

import pytest

from spsim import InputError, Scenario, load_profile, simulate
from spsim.costs.kernels import ComputeCost
from spsim.inputs.plan import parse_plan
from spsim.inputs.workload import Workload
from spsim.program.assembly import head_program
from spsim.program.instructions import Compute
from spsim.work import FlashAttention, Gemm
from tests.test_recipes import KV, LLAMA, TP, A, D, H, S, T, kernels, program

LOW = f"{TP},fp8_dot_product_attention"
BYTES = {"fp8": Fraction(1), "mxfp8": 2 * Fraction(33, 32)}
"""Of an element of Q, K and V: one copy, or one along the head and one along the sequence, with their scales."""
KEPT = S * (A + 2 * KV) * D // T
"""Elements of Q, K and V of a rank."""


def attention(steps):
    return {s.part: s.work[0] for s in steps if isinstance(s, Compute) and isinstance(s.work[0], FlashAttention)}


@pytest.mark.parametrize("precision", BYTES)
def test_queries_keys_and_values_are_cast_and_kept_so(precision):
    """`FusedAttnFunc` keeps Q, K and V in 8 bits and its result in 16, which the projection reads."""
    low, high = program(precision, LOW), program(precision)
    assert high.saved_bytes("activation") - low.saved_bytes("activation") == (2 - BYTES[precision]) * KEPT
    found = attention(low.instructions)
    assert {part: work.dtype for part, work in found.items()} == {"forward": precision, "backward": precision}
    assert [w.flops for w in found.values()] == [w.flops for w in attention(high.instructions).values()]


@pytest.mark.parametrize("precision", BYTES)
def test_casts_of_attention(precision):
    """Each tensor is read in 16 bits and written in all its copies; forward, and of the gradient of the result."""
    name = "quantize" if precision == "fp8" else "quantize_both"
    added = kernels(program(precision, LOW).instructions).items() - kernels(program(precision).instructions).items()
    elements = {"q": A, "k": KV, "v": KV}
    moved = {(own, kernel, size) for (own, _, kernel), size in added if kernel != "amax"}
    rotated = {"q": "q_rotated", "k": "k_rotated", "v": "v"}
    assert moved == {
        *((f"attention_{rotated[x]}_cast", name, (2 + BYTES[precision]) * S * n * D // T) for x, n in elements.items()),
        ("attention_gradient_cast", name, (2 + BYTES[precision]) * S * A * D // T),
    }
    searched = sum(size for (_, _, kernel), size in added if kernel == "amax")
    assert searched == (2 * (KEPT + S * A * D // T) if precision == "fp8" else 0)


def test_recomputed_attention_keeps_16_bits():
    """What is checkpointed keeps what it is given: casts are inside."""
    low, high = (program("mxfp8", f"{plan},recompute=selective") for plan in (LOW, TP))
    assert low.saved_bytes("activation") == high.saved_bytes("activation")
    again = [s.operator for s in low.instructions if isinstance(s, Compute) and s.part == "recompute"]
    assert again == ["attention_q_rotated_cast", "attention_k_rotated_cast", "attention_v_cast", "attention"]


@pytest.mark.parametrize(("dtype", "least", "most"), [("fp8", 1.2, 1.8), ("mxfp8", 1.1, 1.8)])
def test_its_rates_are_the_measured_ones(dtype, least, most):
    """Forward on GB300, head size 128 under a causal mask at 8,192: cuDNN 9.22 is 1.4 to 1.8 times as fast."""
    cost = ComputeCost(load_profile("gb300-nvl72"), "bf16", burst=True)
    n = 8192
    half, low = (
        cost.duration(FlashAttention("transformer_engine", "forward", 2, 64, 8, D, D, n, n, n * n, True, 0, dtype=own))
        for own in (None, dtype)
    )
    assert least < half / low < most


def test_the_output_layer_under_mxfp8():
    """Products in the type, both copies of the weight for the whole step; the loss still reads logits of 16 bits."""
    workload, plan = Workload(seq_len=S, precision="mxfp8"), parse_plan(f"{TP},fp8_output_proj")
    low, high = (head_program(LLAMA, own, workload) for own in (plan, parse_plan(TP)))
    products = [s.work[0] for s in low.instructions if isinstance(s, Compute) and isinstance(s.work[0], Gemm)]
    assert [p.dtype for p in products] == ["mxfp8"] * 3
    logits = [b.bytes for s in low.instructions for b in s.writes if b.tensor.startswith("logits")]
    assert logits[0] == 2 * S * LLAMA.vocab // T
    weight = LLAMA.vocab * H // T
    assert low.weight_bytes - high.weight_bytes == (2 * Fraction(33, 32) - 2) * weight


@pytest.mark.parametrize("plan", ["tp=2", "tp=2,sequence_parallel,recompute=full", "pp=2,virtual_pp=1", "tp=2,dp=2"])
def test_folded_equals_unfolded(plan):
    plan += ",fp8_dot_product_attention,fp8_output_proj"
    scenario = Scenario(
        hardware="gb300-nvl72", model=LLAMA, plan=plan,
        workload={"seq_len": 512, "micro_batch": 1, "global_batch": 4, "precision": "mxfp8"},
    )  # fmt: skip
    folded, whole = simulate(scenario), simulate(scenario, fold=False)
    assert (folded.step_time_s, folded.peak_bytes) == (whole.step_time_s, whole.peak_bytes)


@pytest.mark.parametrize(("plan", "precision", "message"), [
    ("fp8_dot_product_attention", "bf16", "simulated under fp8 and mxfp8 only"),
    ("fp8_dot_product_attention", "nvfp4", "simulated under fp8 and mxfp8 only"),
    ("fp8_dot_product_attention,ring=2", "mxfp8", "ring or ulysses: not simulated yet"),
    ("fp8_output_proj", "fp8", "casts the output layer under mxfp8 only"),
    ("fp8_multi_head_attention", "fp8", "use fp8_dot_product_attention"),
])  # fmt: skip
def test_refusals(plan, precision, message):
    with pytest.raises(InputError, match=message):
        Scenario(hardware="gb300-nvl72", model=LLAMA, plan=plan, workload={"seq_len": S, "precision": precision})


def test_a_device_without_such_a_kernel_says_so():
    scenario = Scenario(
        hardware="dgx-h100", model=LLAMA, plan="fp8_dot_product_attention", workload={"seq_len": S, "precision": "fp8"}
    )
    with pytest.raises(InputError, match=r"attention in fp8: .* has no rates"):
        simulate(scenario)
