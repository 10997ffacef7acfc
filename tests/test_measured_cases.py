"""Rows of published measurements as scenarios: every column that decides a step, and why a row is skipped."""

import csv

import pytest

from spsim import InputError, Plan
from spsim.inputs.resources import measured_cases
from spsim.studies import measured_cases as studied
from spsim.studies.measured_cases import MeasuredCase, load_cases
from spsim.studies.validation import validate

PLAIN, WIDE = ([*csv.DictReader(path.read_text().splitlines())] for path in measured_cases())


def case(changes=(), rows=WIDE, case_id="bridge_2604_gb200_llama3_70b_fp8-cs"):
    """A shipped row, changed."""
    row = next(row for row in rows if row["case_id"] == case_id)
    return MeasuredCase.model_validate({**row, **dict(changes)})


def plan_of(found):
    """The plan of a row, whatever of it is simulated."""
    return Plan(**found._plan())


def test_a_fully_sharded_row():
    """Llama 3 70B on 64 GB200, Megatron FSDP over all, activations of 40 layers on the host."""
    assert plan_of(case()) == Plan(
        dp=64, zero=3, dp_library="fsdp", cpu_offload_layers=40, dp_overlap=True, grad_dtype="bf16", loss_fusion=True,
        bucket_elements=2**27, tp_backward_overlap=False,
    )  # fmt: skip
    assert plan_of(case({"fsdp": "16"})).shard_group == 16


def test_a_row_of_a_pipeline():
    """Llama 3.1 405B on 256 GB300: embedding and loss take a slot each."""
    found = case(case_id="bridge_2604_gb300_llama31_405b_nvfp4")
    assert plan_of(found) == Plan(
        tp=4, sequence_parallel=True, pp=8, virtual_pp=4, dp=8, distributed_optimizer=True, dp_overlap=True,
        grad_dtype="bf16", loss_fusion=True, bucket_elements=2**27,
    )  # fmt: skip
    assert found.precision_recipe == "nvfp4"


@pytest.mark.parametrize(
    ("changes", "options"),
    [
        ({"grad_reduce_overlap": "0", "param_gather_overlap": "0"}, {"dp_overlap": False}),
        ({"grad_reduce_overlap": "1", "param_gather_overlap": "0"}, {"dp_overlap": "gradients"}),
        ({"grad_reduce_overlap": "0", "param_gather_overlap": "1"}, {"dp_overlap": "parameters"}),
        ({"grad_reduce_overlap": "", "param_gather_overlap": "", "dp_overlap": "0"}, {"dp_overlap": False}),
        ({"grad_reduce_dtype": "fp32"}, {"grad_dtype": "fp32"}),
        ({"grad_reduce_dtype": ""}, {"grad_dtype": "bf16"}),  # as Megatron-Bridge has it
        ({"grad_reduce_dtype": "", "software": "Megatron-LM 2022"}, {"grad_dtype": "fp32", "loss_fusion": False}),
        ({"grad_reduce_dtype": "", "software": "NeMo recipe v24.11.1"}, {"grad_dtype": "bf16", "loss_fusion": False}),
        ({"userbuffers": "1", "tp_overlap": "0"}, {"tp_overlap": True}),
        ({"cuda_graphs": "full_iteration"}, {"cuda_graphs": "full_iteration"}),
        ({"recompute": "selective", "recompute_modules": "mlp+layernorm"}, {"recompute_modules": "mlp+layernorm"}),
        ({"pp_layout": "Ettt/tttt"}, {"pp_layout": "Ettt/tttt"}),
        ({"optimizer": "Adam; precision-aware (bf16 master remainder), fp32 moments"},
         {"precision_aware_optimizer": True, "moment_dtype": "fp32"}),
        ({"optimizer": "Adam; precision-aware: fp32 master, bf16 main grads, bf16 moments"}, {"moment_dtype": "bf16"}),
        ({"fsdp": "0"}, {"zero": 0, "distributed_optimizer": True, "dp_library": "megatron"}),
    ],
)  # fmt: skip
def test_columns_are_options(changes, options):
    plan = plan_of(case(changes))
    assert {name: getattr(plan, name) for name in options} == options


def test_a_row_of_experts():
    """Qwen3 235B on 256 GB300, experts over 32 of them, in its last form."""
    found = case(case_id="bridge_2608_gb300_qwen3_235b_a22b_mxfp8")
    plan = plan_of(found)
    assert (plan.ep, plan.pp, plan.virtual_pp, plan.moe_dispatcher) == (32, 4, 12, "hybridep")
    assert all((plan.moe_a2a_overlap, plan.delay_wgrad, plan.fused_grouped_mlp, plan.fp8_dot_product_attention))
    assert found.settings()["model"].qk_norm
    older = plan_of(case(case_id="bridge_2604_gb300_qwen3_235b_a22b_mxfp8"))
    assert (older.cuda_graphs, older.moe_a2a_overlap) == ("attn+moe_router+moe_preprocess", False)


@pytest.mark.parametrize(
    ("software", "model", "hardware", "attention", "precision"),
    [
        ("NeMo recipe v24.11.1", "GPT3 175B", "dgx-h100", "flash_attention_2", "fp8_delayed"),
        ("NeMo recipe v24.11.1", "Llama3 70B", "dgx-h100", "cudnn_2024", "fp8_delayed"),
        ("MLPerf Training v3.1", "GPT3 175B", "dgx-h100", "flash_attention_2", "fp8_delayed"),
        ("NeMo recipe v25.05.05", "Llama3 405B", "gb200-nvl72", "flash", "fp8_delayed"),
        ("MLPerf Training v4.1", "GPT3 175B", "dgx-b200", "flash", "fp8_delayed"),  # whose profile has no such kernel
        ("NeMo 25.09 (Megatron-Bridge 0.1.0rc)", "Llama3 70B", "dgx-h100", "flash", "fp8"),
    ],
)
def test_kernels_and_recipes_are_those_of_the_day(software, model, hardware, attention, precision):
    changes = {"software": software, "model": model, "hardware": hardware, "precision": "fp8"}
    row = case(changes, PLAIN, "dgxc_v24.11.1_gpt3_175b_bf16_128gpu")
    assert row._model()["attention"] == attention
    assert row.settings()["workload"].precision == precision


def test_sizes_and_scope():
    layer = case(rows=PLAIN, case_id="kort22_t4_22B_base_none")
    assert (layer.scope, layer.scenario().scope) == ("layers", "layers")
    assert case().scope == "step"
    qwen = case({"head_dim": "64", "experts": "0"}, case_id="bridge_2602_b200_qwen3_235b_a22b_mxfp8")
    assert qwen._model()["head_dim"] == 64
    assert "head_dim" not in case({"head_dim": ""})._model()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"precision": "int3"}, "precision"),
        ({"recompute": "most"}, "recompute"),
        ({"attention": "linear"}, "attention"),
        ({"norm": "batchnorm"}, "norm"),
        ({"hardware": "tpu"}, "unknown hardware 'tpu'"),
        ({"gpus": "9"}, "gpus = 9"),
        ({"tp": "3", "gpus": "3"}, "does not divide heads"),
    ],
)
def test_a_row_that_cannot_be_simulated_is_skipped_and_its_file_is_not(changes, reason):
    row = next(row for row in PLAIN if row["case_id"] == "kort22_t4_22B_sp")
    good, bad = validate([MeasuredCase.model_validate(row), MeasuredCase.model_validate({**row, **changes})]).cases
    assert good.predicted
    assert bad.predicted is None
    assert reason in bad.skipped


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"experts": "128"}, "experts = 128 of Llama3 70B, which has None"),
        ({"experts": "64", "model": "Qwen3 30B-A3B"}, "layers = 80 of Qwen3 30B-A3B, which has 48"),
        ({"token_drop": "1"}, "tokens that are dropped and padded are not simulated yet"),
        ({"fp8_lm_head": "1"}, "fp8_output_proj with precision = 'fp8'"),
        ({"cuda_graphs": "te:attn+everything"}, "'everything' is none of none, per_layer"),
    ],
)
def test_parts_that_are_not_simulated_have_a_reason(changes, reason):
    sizes = {"dp": "8", "gpus": "8", "fsdp": "0", "cpu_offload_layers": "0"}
    with pytest.raises(InputError, match=reason):
        case({**sizes, **changes}).scenario()


def test_files_are_read_by_their_columns(tmp_path):
    path = tmp_path / "mine.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, WIDE[0])
        writer.writeheader()
        writer.writerow(WIDE[0])
    assert [found.case_id for found in load_cases(path)] == [WIDE[0]["case_id"]]
    assert len(load_cases()) == len(PLAIN) + len(WIDE)
    required = {name for name, field in studied.MeasuredCase.model_fields.items() if field.is_required()}
    assert required <= {*PLAIN[0]} & {*WIDE[0]}
