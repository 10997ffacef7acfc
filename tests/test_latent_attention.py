"""Latent attention: parameters by hand, what tp gathers, what is kept and made again, FLOPs of two widths."""

import pytest

from spsim import Model, explain
from spsim.costs.flops import layer_flops
from spsim.errors import InputError
from spsim.inputs.plan import parse_plan
from spsim.inputs.rules import check_shapes
from spsim.inputs.workload import Workload
from spsim.program.assembly import layer_program
from spsim.program.instructions import Communication, Compute
from spsim.work import FlashAttention

HIDDEN, HEADS, Q, KV, NOPE, ROPE, V, FFN = 7168, 128, 1536, 512, 128, 64, 128, 18432
DEEPSEEK = {
    "layers": 4, "hidden": HIDDEN, "ffn_hidden": FFN, "heads": HEADS, "vocab": 129280, "gated_mlp": True,
    "q_lora_rank": Q, "kv_lora_rank": KV, "qk_nope_head_dim": NOPE, "qk_rope_head_dim": ROPE, "v_head_dim": V,
}  # fmt: skip
"""A dense layer of DeepSeek-V3."""
TOKENS = 4096
WORKLOAD = Workload(seq_len=TOKENS)


def program(plan, **changes):
    return layer_program(Model(**{**DEEPSEEK, **changes}), parse_plan(plan), WORKLOAD)


def messages(plan):
    """(pass, collective, tensor, elements a token) of attention, in order."""
    return [
        (step.part, step.collective, step.tensor, step.message_bytes / 2 / TOKENS)
        for step in program(plan).instructions
        if isinstance(step, Communication) and step.tensor in ("q_norm_out", "kv_norm_out", "k_rope")
    ]


def test_parameters_of_a_layer():
    """187,107,328 of attention (DeepSeek-V3), 3 x 7168 x 18432 of the MLP, two norms."""
    attention = HIDDEN * Q + Q + Q * HEADS * (NOPE + ROPE) + HIDDEN * (KV + ROPE) + KV
    attention += KV * HEADS * (NOPE + V) + HEADS * V * HIDDEN
    assert attention == 187_107_328
    assert Model(**DEEPSEEK).layer_parameters == attention + 3 * HIDDEN * FFN + 2 * HIDDEN
    from_hidden = Model(**{**DEEPSEEK, "q_lora_rank": None}).layer_parameters
    assert from_hidden - Model(**DEEPSEEK).layer_parameters == HIDDEN * HEADS * 192 - (HIDDEN + HEADS * 192 + 1) * Q


@pytest.mark.parametrize("plan", ["", "tp=2,sequence_parallel"])
def test_weights_of_a_rank(plan):
    """Products down are duplicated, those up and the projection cut by heads."""
    halved = Q * HEADS * (NOPE + ROPE) + KV * HEADS * (NOPE + V) + HEADS * V * HIDDEN + 3 * HIDDEN * FFN
    whole = HIDDEN * (Q + KV + ROPE) + Q + KV + 2 * HIDDEN
    assert program(plan).parameters == whole + halved // (2 if plan else 1)


def test_tp_gathers_latents_and_sums_their_gradients():
    """MLASelfAttention: each rank has the latents of its part of the sequence; products up and keys read all."""
    assert messages("tp=4,sequence_parallel") == [
        ("forward", "all_gather", "q_norm_out", Q), ("forward", "all_gather", "kv_norm_out", KV),
        ("forward", "all_gather", "k_rope", ROPE),
        ("backward", "reduce_scatter", "k_rope", ROPE),
        ("backward", "all_gather", "kv_norm_out", KV), ("backward", "reduce_scatter", "kv_norm_out", KV),
        ("backward", "all_gather", "q_norm_out", Q), ("backward", "reduce_scatter", "q_norm_out", Q),
    ]  # fmt: skip
    summed = {sync.weight for sync in program("tp=4,sequence_parallel").weight_sync}
    assert {"q_down_weight", "kv_down_weight", "k_rope_weight", "q_norm_weight", "kv_norm_weight"} < summed
    assert {"q_up_weight", "k_up_weight", "v_up_weight"}.isdisjoint(summed)


def test_without_sequence_parallelism_gradients_of_latents_are_all_reduced():
    sizes = {"k_rope": ROPE, "kv_norm_out": KV, "q_norm_out": Q}
    assert messages("tp=4") == [("backward", "all_reduce", *item) for item in sizes.items()]


@pytest.mark.parametrize("degree", [1, 4])
def test_what_is_kept(degree):
    """Of a token: latents twice, Q, K, V and context of the heads of a rank; or the latents and the rotated part."""
    plan = f"tp={degree},sequence_parallel" if degree > 1 else ""
    again = f"{plan},recompute=selective,recompute_modules=mla_up_proj".strip(",")
    heads = HEADS * (2 * (NOPE + ROPE) + V)

    def of_attention(plan):
        own = ("q_latent", "q_norm_out", "kv_latent", "kv_norm_out", "k_rope", "q_rotated", "k", "v")
        return sum(saved.bytes for saved in program(plan).saved if saved.tensor in own) / 2 / TOKENS * degree

    assert of_attention(plan) == 2 * (Q + KV) + heads
    assert of_attention(again) == Q + KV + ROPE


def test_up_projections_run_again_before_the_gradient_of_core_attention():
    """`discard_output_and_register_recompute(core_attn_out)`: behind the gradients of the projection."""
    steps = [s for s in program("recompute=selective,recompute_modules=mla_up_proj").backward if isinstance(s, Compute)]
    again = [step.operator for step in steps if step.part == "recompute"]
    assert again == ["q_norm", "q_up", "kv_norm", "kv_up", "rope_q", "rope_k"]
    order = [step.operator for step in steps]
    assert order.index("projection") < order.index("q_norm") < order.index("attention")


def test_core_attention_of_two_widths():
    """Forward 2 (192 + 128) FLOPs a pair and head, backward 2 (3 x 192 + 2 x 128)."""
    works = [s.work[0] for s in program("").instructions if isinstance(s, Compute) and s.operator == "attention"]
    assert all(isinstance(w, FlashAttention) and (w.head_dim, w.value_dim) == (192, 128) for w in works)
    pairs = HEADS * TOKENS * TOKENS // 2
    assert [work.flops for work in works] == [2 * pairs * (192 + 128), 2 * pairs * (3 * 192 + 2 * 128)]
    assert layer_flops(Model(**DEEPSEEK), WORKLOAD, causal=True).attention == 2 * pairs * (192 + 128)


def test_ulysses_and_rings_move_whole_heads():
    sizes = {
        step.tensor: step.message_bytes * 2 / 2 / TOKENS
        for step in program("ulysses=2").forward
        if isinstance(step, Communication)
    }
    assert sizes == {"q_rotated": HEADS * 192, "k": HEADS * 192, "v": HEADS * 128, "context": HEADS * 128}
    (around,) = (s for s in program("ring=2").forward if isinstance(s, Communication))
    assert around.message_bytes == 2 * HEADS * (192 + 128) * TOKENS // 2


def test_explain_names_the_dimensions():
    found = explain(model=DEEPSEEK, plan="tp=2,sequence_parallel", workload={"seq_len": TOKENS})
    assert "s b q, q a c -> s b a c" in [row.subscripts for row in found.operators]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kv_lora_rank": None}, "q_lora_rank = 1536 needs kv_lora_rank"),
        ({"qk_rope_head_dim": None}, "kv_lora_rank needs qk_nope_head_dim and qk_rope_head_dim"),
        ({"kv_heads": 8}, "kv_heads = 8 with kv_lora_rank: latent attention has 128"),
        ({"head_dim": 128}, "head_dim = 128 is not qk_nope_head_dim"),
    ],
)
def test_what_does_not_fit_is_refused(changes, message):
    with pytest.raises(InputError, match=message):
        Model(**{**DEEPSEEK, **changes})


def test_its_module_needs_latents():
    plan = parse_plan("recompute=selective,recompute_modules=mla_up_proj")
    with pytest.raises(InputError, match="has no latent attention"):
        check_shapes(Model(layers=2, hidden=64, heads=4, vocab=128), plan, Workload(seq_len=64))
