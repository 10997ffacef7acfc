"""What is made once: programs are equal whenever their keys are, whatever else differs."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spsim.inputs.model import Model
from spsim.inputs.plan import Plan, parse_plan
from spsim.inputs.workload import Workload
from spsim.program.assembly import compiled_by, layer_program, placed_by, program_in
from spsim.program.blocks.transformer import LAYER_CLASSES, layer_traits, transformer_layer
from spsim.program.mesh import mesh_of
from spsim.program.region import Region
from spsim.program.strategies import split_rules
from spsim.program.templates import layer_template
from tests.cases import model, random_plans

WORKLOAD = Workload(seq_len=512, micro_batch=2)
OTHER_OPTIONS = {
    "mesh_order": "ulysses-tp-ring-dp-pp",
    "pp": 2,
    "virtual_pp": 2,
    "distributed_optimizer": True,
    "zero": 1,
    "tp_backward_overlap": False,
    "tp_overlap": True,
    "tp_scatter": "ring_exchange",
    "dp_overlap": True,
    "fsdp_ends": "units",
    "recompute_reentrant": False,
    "ring_kind": "all_gather",
    "ring_gradients": "fp32",
    "ring_messages": "separate",
    "heads_k_stride": 1,
    "ring_cut": "contiguous",
    "ring_pass": "q",
    "uneven_heads": "by_group",
    "ulysses_few_kv_heads": "refuse",
    "ulysses_gradients": "reverse",
    "gathers_position_ids": True,
    "sequence_parallel": True,
    "keep_gathered": True,
    "recompute": "full",
    "dp": 2,
    "tp": 2,
    "ulysses": 2,
    "ring": 2,
    "pp_schedule": "gpipe",
    "pp_group": 4,
    "pp_layout": "Et/tL",
    "pp_sends": "torch",
    "pp_overlap": True,
    "pp_warmup_flush": True,
    "pp_deallocate": False,
    "dp_library": "fsdp",
    "shard_group": 2,
    "bucket_elements": 1000,
    "grad_dtype": "bf16",
    "moment_dtype": "bf16",
    "precision_aware_optimizer": True,
    "loss_fusion": True,
    "loss_parallel": False,
    "recompute_early_stop": True,
    "recompute_layers": 1,
    "recompute_method": "uniform",
    "recompute_modules": "mlp",
    "cpu_offload_layers": 1,
    "cuda_graphs": "per_layer",
    "ep": 2,
    "expert_tp": 1,
    "moe_dispatcher": "hybridep",
    "moe_capacity_factor": 1.5,
    "expert_imbalance": 1.5,
    "expert_concentration": 2.0,
    "routing_seed": 3,
    "moe_a2a_overlap": True,
    "delay_wgrad": True,
    "fused_grouped_mlp": True,
    "fp8_dot_product_attention": True,
    "fp8_output_proj": True,
    "library": "torchtitan",
    "projections": "separate",
    "input_gradients": "each",
    "few_kv_heads": "replicate",
    "norm_gradients": "each_reader",
    "batch_first": True,
}
OTHER_TRAITS = {
    "name": "another",
    "layers": 7,
    "vocab": 99,
    "max_positions": 3,
    "tied_embeddings": False,
    "hidden": 128,
    "ffn_hidden": 64,
    "heads": 16,
    "kv_heads": 4,
    "head_dim": 16,
    "norm": "rmsnorm",
    "positions": "rope",
    "bias": False,
    "qkv_bias": False,
    "qk_norm": True,
    "parallel_residual": True,
    "attention": "unfused",
    "causal": False,
    "dropout": 0.1,
    "activation": "squared_relu",
    "head_rows": 3,
    "head_bias": True,
    "sliding_window": 4096,
    "left_out": "vision_config",
    "kernels": "eager",
    "composite_norm": True,
    "glu_offset": False,
    "experts": 8,
    "experts_per_token": 2,
    "expert_ffn_hidden": 64,
    "shared_ffn_hidden": 64,
    "dense_layers": 1,
    "repeat_kv": True,
    "norm_bias": False,
    "norms": "both",
    "mlp_bias": False,
    "shared_norm": True,
    "attention_chunk_size": 64,
    "documents": (32, 32),
}


TOGETHER = {
    "q_lora_rank",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
    "layer_types",
    "mlp_layer_types",
    "attention_sinks",
    "mtp_layers",
    "qk_norm_over",
}
"""Traits that are not alone, or have tests of their own."""


def program(plan, layer):
    """The program of a layer, compiled anew."""
    region = Region(transformer_layer(layer, WORKLOAD, plan.dp), split_rules(plan), mesh_of(plan))
    return program_in(region, plan, causal=layer.causal)


@pytest.mark.slow
@settings(max_examples=60, deadline=None, derandomize=True)
@given(random_plans(), st.sampled_from(sorted(OTHER_OPTIONS)))
def test_plans_of_one_key_have_one_program(case, option):
    text, _ = case
    plan = parse_plan(text)
    other = plan.model_copy(update={option: OTHER_OPTIONS[option]})
    if compiled_by(plan) == compiled_by(other):
        assert program(plan, model()) == program(other, model())
    if placed_by(plan) == placed_by(other):
        assert layer_program(model(), plan, WORKLOAD).parameters == layer_program(model(), other, WORKLOAD).parameters


def test_every_option_was_tried():
    assert OTHER_OPTIONS.keys() == Plan.model_fields.keys()
    assert {*OTHER_TRAITS, *TOGETHER, "gated_mlp"} == Model.model_fields.keys()


@pytest.mark.parametrize("trait", sorted(OTHER_TRAITS))
def test_classes_of_a_layer(trait):
    """Rows of sweeps have a column for each, and for no other."""
    layer = transformer_layer(model(dropout=0.1).model_copy(update={trait: OTHER_TRAITS[trait]}), WORKLOAD)
    assert {op.kind for op in layer} <= {*LAYER_CLASSES}


@pytest.mark.parametrize("trait", sorted(OTHER_TRAITS))
def test_models_of_one_key_have_one_layer(trait):
    routed = (
        {"experts": 4, "experts_per_token": 1, "expert_ffn_hidden": 32}
        if "expert" in trait or "shared" in trait
        else {}
    )
    one = model(**routed)
    both = {"v_head_dim": OTHER_TRAITS[trait]} if trait == "head_dim" else {}
    other = one.model_copy(update={trait: OTHER_TRAITS[trait], **both})
    same = layer_traits(one) == layer_traits(other)
    assert same == (transformer_layer(one, WORKLOAD) == transformer_layer(other, WORKLOAD)) or trait == "causal"


@pytest.mark.parametrize("option", ["pp", "zero", "distributed_optimizer", "tp_backward_overlap", "dp_overlap"])
def test_what_the_compiler_does_not_read_does_not_compile_again(option):
    plan = parse_plan("tp=2,sequence_parallel,ring=2")
    other = plan.model_copy(update={option: OTHER_OPTIONS[option]})
    assert layer_template(model(layers=1), plan) is layer_template(model(layers=9, name="named"), other)


@pytest.mark.parametrize("plan", ["", "tp=2,sequence_parallel", "ulysses=2,ring=2,recompute=full"])
def test_replicas_compute_what_one_computes(plan):
    """Under dp = 3 a rank has the micro-batch of its replica; every weight gradient is summed over dp, too."""
    one, three = (layer_program(model(), parse_plan(text), WORKLOAD) for text in (plan, f"{plan},dp=3"))
    assert one.instructions == three.instructions
    assert [(s.tensor, s.bytes) for s in one.saved] == [(s.tensor, s.bytes) for s in three.saved]
    synced = {sync.weight: sync.axes for sync in three.weight_sync if sync.axes != ("tp",)}
    weights = {o.tensor.name for op in transformer_layer(model(), WORKLOAD) for o in op.weights}
    assert synced.keys() == weights
    assert {axes[0] for axes in synced.values()} == {"dp"}
