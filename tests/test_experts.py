"""Mixture of experts: parameters as published, exchanges and gradients by hand, times and memory by closed forms."""

import json

import pytest

from spsim import Model, Scenario, explain, load_model, simulate
from spsim.errors import InputError
from spsim.inputs.model import LayerType
from spsim.inputs.plan import parse_plan
from spsim.inputs.workload import Workload
from spsim.program.assembly import layer_program
from spsim.program.instructions import Communication, Compute
from spsim.program.mesh import mesh_of, world_of
from spsim.units import MIB
from spsim.work import Gemm

LLAMA = {"gated_mlp": True, "vocab": 151936}
QWEN3_30B = {
    "name": "qwen3-30b-a3b", "layers": 48, "hidden": 2048, "ffn_hidden": 6144, "heads": 32, "kv_heads": 4,
    "head_dim": 128, "qk_norm": True, "experts": 128, "experts_per_token": 8, "expert_ffn_hidden": 768, **LLAMA,
}  # fmt: skip
QWEN3_235B = {
    **QWEN3_30B, "layers": 94, "hidden": 4096, "ffn_hidden": 12288, "heads": 64, "expert_ffn_hidden": 1536,
}  # fmt: skip
MIXTRAL_8X7B = {
    "name": "mixtral", "layers": 32, "hidden": 4096, "ffn_hidden": 14336, "heads": 32, "kv_heads": 8, "experts": 8,
    "experts_per_token": 2, "gated_mlp": True, "vocab": 32000,
}  # fmt: skip
SMALL = {**QWEN3_30B, "layers": 6, "shared_ffn_hidden": 768, "dense_layers": 2}


@pytest.mark.parametrize(
    ("fields", "published"),
    [
        (QWEN3_30B, 30_532_122_624),
        (QWEN3_235B, 235_093_634_560),
        (MIXTRAL_8X7B, 46_702_792_704),
    ],
)
def test_parameters_are_those_of_the_checkpoints(fields, published):
    """`num_parameters` of transformers' models of these configurations."""
    assert Model(**fields).parameters == published


QWEN3_FILE = {  # of Qwen/Qwen3-30B-A3B, and what it says of experts
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_size": 2048,
    "intermediate_size": 6144, "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4,
    "head_dim": 128, "vocab_size": 151936, "tie_word_embeddings": False, "num_experts": 128,
    "num_experts_per_tok": 8, "moe_intermediate_size": 768, "decoder_sparse_step": 1, "mlp_only_layers": [],
}  # fmt: skip
MIXTRAL_FILE = {
    "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "hidden_size": 4096, "sliding_window": None,
    "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "vocab_size": 32000, "num_local_experts": 8, "num_experts_per_tok": 2,
}  # fmt: skip


@pytest.mark.parametrize(("config", "name"), [(QWEN3_FILE, "qwen3-30b-a3b"), (MIXTRAL_FILE, "mixtral-8x7b")])
def test_configurations_are_the_presets(config, name, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    read, preset = load_model(path), load_model(name)
    apart = {"name", "max_positions"}
    assert read.model_dump(exclude=apart) == preset.model_dump(exclude=apart)


def test_dense_layers_come_first():
    model = Model(**SMALL)
    dense, routed = model.of_type(LayerType(dense=True)).layer_parameters, model.layer_parameters
    assert routed - dense == 3 * 2048 * (128 * 768 + 768 - 6144) + 2048 * 128
    embedding = 2 * 151936 * 2048 + 2048
    assert model.parameters == 2 * dense + 4 * routed + embedding


@pytest.mark.parametrize("config", [QWEN3_FILE, {"model_type": "gemma3_text", "_sliding_window_pattern": 10**12}])
def test_no_configuration_takes_for_ever(config, tmp_path):
    """As many layers as no model has are refused before they are written out."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**config, "num_hidden_layers": 10**12}))
    with pytest.raises(InputError, match="should be less than or equal to 10000"):
        load_model(path)


def test_layers_of_each_sort_are_said_in_one_way():
    """Lists, as files have them, of whatever length: their shortest form, and what only the first are as a number."""
    base = {name: value for name, value in SMALL.items() if name != "dense_layers"}
    said = [{"dense_layers": 2}, {"mlp_layer_types": ["dense"] * 2 + ["sparse"] * 4}]
    assert len({Model(**base, **own) for own in said}) == 1
    turns = Model(**base, mlp_layer_types=["sparse", "dense"] * 3, sliding_window=8, layer_types=["full_attention"] * 2)
    assert (turns.dense_layers, turns.mlp_layer_types, turns.layer_types) == (0, ("sparse", "dense"), None)


# ------------------------------------------------------------ what a layer sends


def exchanges(plan, fields=QWEN3_30B, tensors=("expert_input", "expert_out")):
    """(pass, collective, axis, tensor, MiB of the message) of what experts are sent and send."""
    program = layer_program(Model(**fields), parse_plan(plan), Workload(seq_len=4096, micro_batch=1))
    return [
        (step.part, step.collective, step.axis, step.tensor, step.message_bytes / MIB)
        for step in program.instructions
        if isinstance(step, Communication) and step.tensor in tensors
    ]


def test_each_token_goes_to_its_experts_and_back():
    """4096 tokens of 2048 numbers of 2 bytes, eight times: 128 MiB, dispatched and combined in both passes."""
    assert exchanges("dp=8,ep=8") == [
        ("forward", "all_to_all", "ep", "expert_input", 128),
        ("forward", "all_to_all", "ep", "expert_out", 128),
        ("backward", "all_to_all", "ep", "expert_out", 128),
        ("backward", "all_to_all", "ep", "expert_input", 128),
    ]


def test_one_exchange_among_all_ranks_that_hold_experts():
    """Over tp, a ring and replicas at once, each rank with its part of the tokens."""
    plan = "tp=2,sequence_parallel,ring=2,dp=2,ep=8,expert_tp=1"
    assert {(kind, axis, size) for _, kind, axis, _, size in exchanges(plan)} == {("all_to_all", "experts", 32)}
    assert mesh_of(parse_plan(plan)).group(5, ("experts",)) == tuple(range(8))


def test_experts_split_over_tp_gather_their_tokens():
    """Megatron-Core's default, `expert_tensor_parallel_size` = tp: exchanged over ep, then gathered over tp; summed in
    fp32, the type of the probabilities of its router.
    """
    assert exchanges("tp=2,sequence_parallel,dp=4,ep=4")[:4] == [
        ("forward", "all_to_all", "ep", "expert_input", 64),
        ("forward", "all_gather", "tp", "expert_input", 128),
        ("forward", "reduce_scatter", "tp", "expert_out", 256),
        ("forward", "all_to_all", "ep", "expert_out", 64),
    ]


def test_all_experts_on_each_rank_send_nothing():
    assert exchanges("dp=8") == []


def test_grouped_products_have_all_tokens_of_their_experts():
    """Of 128 experts a rank of eight has 16, each with 8 x 4096 x 8 / 128 tokens."""
    program = layer_program(Model(**QWEN3_30B), parse_plan("dp=8,ep=8"), Workload(seq_len=4096, micro_batch=1))
    works = {s.operator: s.work[0] for s in program.forward if isinstance(s, Compute)}
    assert isinstance(works["expert_fc1"], Gemm)
    assert [(w.batch, w.m, w.n, w.k) for w in (works["expert_fc1"], works["expert_fc2"])] == [
        (16, 2048, 2 * 768, 2048), (16, 2048, 2048, 768)
    ]  # fmt: skip
    assert sum(w.flops for w in (works["expert_fc1"], works["expert_fc2"])) == 6 * 4096 * 8 * 2048 * 768


def test_tokens_are_sorted_on_the_side_of_the_experts():
    """What comes from eight ranks is put in the order of 16 experts before the products, and back behind them."""
    program = layer_program(Model(**QWEN3_30B), parse_plan("dp=8,ep=8"), Workload(seq_len=4096, micro_batch=1))
    order = [
        step.tensor if isinstance(step, Communication) else step.operator
        for step in program.forward
        if (isinstance(step, Communication) and step.tensor.startswith("expert")) or "expert" in step.operator
    ]
    large = [name for name in order if not name.startswith("expert_probabilities")]
    assert large == [
        "expert_input", "expert_input copy", "expert_fc1", "expert_swiglu", "expert_fc2", "expert_out copy",
        "expert_out",
    ]  # fmt: skip


def test_ranks_that_hold_the_same_experts_are_few():
    """EP 4 of eight replicas: 64 ranks, of which stage 0 has the first 32; rank 0's experts are on ranks 0 and 16."""
    world = world_of(parse_plan("tp=4,sequence_parallel,dp=8,ep=4,pp=2"))
    assert world.group(0, ("ep",)) == (0, 4, 8, 12)
    assert world.group(0, ("dp",)) == (0, 16)


# ------------------------------------------------------------ whole steps


def step(plan, fields=SMALL, *, fold=True, hardware="dgx-h100", batch=16, **workload):
    given = {"seq_len": 2048, "micro_batch": 1, "global_batch": batch, **workload}
    return simulate(Scenario(hardware=hardware, model=Model(**fields), plan=plan, workload=given), fold=fold)


@pytest.mark.parametrize(
    "plan",
    [
        "dp=4,ep=4,distributed_optimizer",
        "dp=8,ep=4,distributed_optimizer,dp_overlap",
        "tp=2,sequence_parallel,dp=2,ep=4,expert_tp=1,recompute=full",
        "tp=2,sequence_parallel,dp=2,ring=2,ep=4,recompute=selective,recompute_modules=moe_act",
        "dp=2,ep=2,pp=2",
    ],
)
@pytest.mark.slow
def test_folded_equals_unfolded(plan):
    folded, unfolded = (step(plan, fold=fold) for fold in (True, False))
    assert folded.step_time_s == unfolded.step_time_s
    assert folded.peak_bytes == unfolded.peak_bytes


def test_gradients_of_experts_are_summed_over_those_that_hold_them():
    """Reduced bytes of a step: all other weights over eight replicas, experts over two, in fp32."""
    found = step("dp=8,ep=4,distributed_optimizer", batch=8)
    model = Model(**SMALL)
    experts = 4 * model.expert_parameters // 4
    others = model.parameters - 4 * model.expert_parameters
    sums = {call.ranks: call.message_bytes for call in found.collectives if call.collective == "reduce_scatter"}
    assert sums == pytest.approx({8: 4 * others, 2: 4 * experts}, rel=1e-5)
    gathers = {call.ranks: call.message_bytes for call in found.collectives if call.collective == "all_gather"}
    assert gathers == pytest.approx({8: 2 * others, 2: 2 * experts}, rel=1e-5)


def test_optimizer_state_of_experts_is_shared_by_those_that_hold_them():
    """12 bytes a parameter, over eight ranks or two."""
    held = step("dp=8,ep=4,distributed_optimizer", batch=8).static
    model = Model(**SMALL)
    experts = 4 * model.expert_parameters // 4
    others = model.parameters - 4 * model.expert_parameters
    assert held.optimizer == pytest.approx(12 * (others / 8 + experts / 2), rel=1e-6)
    assert held.weights == pytest.approx(2 * (others + experts), rel=1e-2)


def test_flops_of_a_step():
    """6 FLOPs a token and active parameter, 12 h s of attention: embeddings, norms and what is not active left out."""
    found = step("dp=8,ep=8", QWEN3_30B, hardware="dgx-b200", batch=8, seq_len=4096)
    attention_weights = 2048 * 128 * (32 + 2 * 4) + 32 * 128 * 2048
    active = 48 * (attention_weights + 3 * 8 * 2048 * 768 + 2048 * 128) + 2048 * 151936 + 2048 * 64  # padded vocabulary
    per_token = 6 * active + 48 * 12 * 32 * 128 * 4096
    tokens = 8 * 4096
    assert found.amounts.model == pytest.approx(per_token * tokens, rel=1e-3)


def test_without_experts_options_of_them_have_no_effect():
    with pytest.raises(InputError, match=r"ep = 2 with .* which has no experts"):
        Scenario(hardware="dgx-h100", model="llama-3-8b", plan="dp=2,ep=2", workload={"seq_len": 2048})
    case = Scenario(hardware="dgx-h100", model="llama-3-8b", plan="tp=2,expert_tp=1", workload={"seq_len": 2048})
    assert "expert_tp = 1 has no effect without experts" in case.notes


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        ("dp=8,ep=3", "ep = 3 does not divide experts = 128"),
        ("dp=2,ep=4", "ep = 4 is not a divisor of dp = 2, over which experts are spread; use another ep or dp$"),
        ("tp=4,sequence_parallel,ep=4", "or expert_tp=1, which spreads them over tp too"),
        ("tp=2,dp=2,ep=2", "without sequence_parallel"),
        ("tp=4,sequence_parallel,ep=2,dp=2,expert_tp=1", "ep = 2 is not tp = 4 times a divisor of dp"),
        ("tp=4,sequence_parallel,dp=2,ep=2,expert_tp=2", "expert_tp = 2 with tp = 4"),
        ("dp=8,ep=8,zero=3", "not simulated yet"),
        ("dp=8,ep=8,moe_capacity_factor=17", "each expert has room for all tokens; use at most that"),
        ("dp=8,ep=8,expert_imbalance=8.5", "where all tokens go to one rank it has 8 times the mean"),
        ("tp=4,sequence_parallel,dp=2,expert_tp=1", "experts that are whole on each rank of tp are not simulated yet"),
        ("dp=2,recompute=selective,recompute_modules=moe+mla_up_proj", "has no latent attention"),
    ],
)
def test_what_cannot_be_is_one_line(plan, words):
    with pytest.raises(InputError, match=words) as refused:
        step(plan)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"experts": 8}, "experts_per_token = None with experts = 8"),
        ({"experts": 8, "experts_per_token": 9}, "give 1 to 8"),
        ({"experts_per_token": 2}, "experts_per_token = 2 needs experts"),
        ({"experts": 8, "experts_per_token": 2, "dense_layers": 6}, "leaves none"),
    ],
)
def test_models_that_cannot_be(fields, words):
    base = {key: value for key, value in SMALL.items() if "expert" not in key and key not in ("dense_layers",)}
    base.pop("shared_ffn_hidden")
    with pytest.raises(InputError, match=words):
        Model(**{**base, **fields})


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"expert_ffn_hidden": 100, "shared_ffn_hidden": 0}, "do not divide expert_ffn_hidden / expert_tp = 100"),
        ({"shared_ffn_hidden": 200}, "do not divide shared_ffn_hidden / tp = 200"),
        ({"kv_lora_rank": 64, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "kv_heads": 32, "qk_norm": False,
          "head_dim": 48}, r"do not divide kv_lora_rank \+ qk_rope_head_dim = 80"),
    ],
)  # fmt: skip
def test_blocks_of_a_cast_are_whole(fields, words):
    """32 of a row and of a column of what a product reads."""
    with pytest.raises(InputError, match=words):
        step("dp=2", {**SMALL, **fields}, hardware="dgx-b200", precision="mxfp8")


def test_recomputing_experts_keeps_less():
    """`moe_act` of Megatron-Core keeps no result of the activation; `moe` nothing of the layer but what it reads."""
    peaks = [
        step(f"dp=8,ep=8,recompute=selective,recompute_modules={modules}", batch=8).peak_bytes
        for modules in ("core_attn", "moe_act", "moe")
    ]
    assert peaks == sorted(peaks, reverse=True)
    assert peaks[0] > peaks[1] > peaks[2]


def test_explain_shows_where_experts_lie():
    found = explain("qwen3-30b-a3b", "ulysses=2,dp=4,ep=8", {"seq_len": 4096})
    rows = {row.operator: row for row in found.operators}
    assert (rows["router"].placed["ulysses"], rows["expert_fc1"].placed["ulysses"]) == ("s", "e")
    assert [c.collective for c in rows["combine"].communication if c.part == "forward"] == ["all_to_all"]


def test_times_with_experts_have_bands_of_their_own():
    """Of published steps of such models, which are farther off."""
    found = step("dp=8,ep=8")
    assert "with experts" in found.prior_band.of
    dense = simulate(Scenario(hardware="dgx-h100", model="llama-3-8b", plan="dp=8", workload={"seq_len": 2048}))
    assert found.prior_band.percent > dense.prior_band.percent
    assert any("what the host takes" in note for note in found.notes)


@pytest.mark.parametrize(("name", "published"), [("qwen3-30b-a3b", 23.01e9), ("qwen3-235b-a22b", 148.03e9)])
def test_flops_of_a_token_as_nvidia_counts_them(name, published):
    """Megatron-Bridge's pages at 4096 tokens: products of blocks and head, half of the square of attention."""
    plan = "dp=8,ep=8"
    work = {"seq_len": 4096, "micro_batch": 1, "global_batch": 8}
    found = simulate(Scenario(hardware="gb300-nvl72", model=name, plan=plan, workload=work))
    model = load_model(name)
    router = 6 * model.layers * model.hidden * model.experts
    half = 6 * model.layers * model.heads * model.head_dim * work["seq_len"]
    assert found.amounts.model / (8 * 4096) - router - half == pytest.approx(published, rel=5e-3)
