"""Launch files of Megatron-LM, torchtitan and DeepSpeed are read as these libraries read them; nothing is dropped."""

from pathlib import Path

import pytest

import spsim
from spsim import InputError, Plan, read_launch
from spsim.inputs.launch.shell.script import Script

FILES = Path(__file__).parent / "data" / "launch"
MEGATRON = "torchrun --nproc-per-node 8 pretrain_gpt.py {}"
MODEL = (
    "--num-layers 32 --hidden-size 4096 --num-attention-heads 32 --seq-length 4096 --max-position-embeddings 4096 "
    "--micro-batch-size 1 --vocab-size 51200 --bf16"
)
EXPERTS = "--num-experts 16 --disable-bias-linear --expert-model-parallel-size"
EXCHANGED = "--moe-token-dispatcher-type alltoall"
OF_TWO = f"{EXPERTS} 4 --tensor-model-parallel-size 2 --sequence-parallel {EXCHANGED}"
SLOT = "--account-for-{}-in-pipeline-split"


def launch(tmp_path, text, name="train.sh"):
    """A file with a text, read."""
    path = tmp_path / name
    path.write_text(text)
    return read_launch(path)


def megatron(tmp_path, arguments, **settings):
    """The scenario of a plain model with some arguments of Megatron-LM."""
    found = launch(tmp_path, MEGATRON.format(f"{MODEL} {arguments}"))
    return found.scenario(hardware="dgx-h100", **settings)


# ------------------------------------------------------------ files as people have them


def test_a_script_of_megatron_with_arrays_tests_and_defaults():
    found = read_launch(FILES / "train_llama3_8b.sh")
    scenario = found.scenario(hardware="dgx-h100")
    assert scenario.model == spsim.load_model("llama-3-8b")
    assert scenario.plan == Plan(
        tp=4, sequence_parallel=True, pp=2, virtual_pp=4, dp=4, distributed_optimizer=True, dp_overlap=True
    )  # 32 layers on 2 stages in chunks of 4; 32 GPUs
    assert (scenario.workload.seq_len, scenario.workload.global_batch, scenario.nodes) == (8192, 64, None)
    assert scenario.plan.gpus == 32
    assert found.notes == ()
    (unread,) = found.not_read
    assert unread.endswith(":49: ${EXTRA_ARGS}")
    idle = "--rotary-base --lr --clip-grad --train-iters --manual-gc --wandb-project --save --load"
    assert found.no_matter == tuple(idle.split())


def test_a_batch_script_whose_command_is_a_text():
    found = read_launch(FILES / "train_gpt_175b.slurm")
    scenario = found.scenario(hardware="dgx-a100-80gb")
    assert scenario.model.name == "gpt-175b"
    assert scenario.plan == Plan(tp=8, sequence_parallel=True, pp=8, dp=2, recompute="selective")
    assert (scenario.workload.precision, scenario.workload.global_batch, scenario.plan.gpus) == ("bf16", 128, 128)
    assert found.no_matter == ("--split",)
    assert any(":13: log: " in note for note in found.notes)


def test_a_toml_of_torchtitan():
    found = read_launch(FILES / "llama3_70b.toml")
    assert found.settings["workload"]["precision"] == "fp8"
    scenario = found.scenario(hardware="dgx-h100", workload={"precision": "bf16"})
    plan = scenario.plan
    assert scenario.model.name == "llama-3-70b"
    assert (plan.library, plan.tp, plan.dp, plan.shard_group, plan.zero_stage) == ("torchtitan", 8, 8, 4, 3)
    assert (plan.dp_library, plan.sequence_parallel, plan.recompute, plan.tp_overlap) == ("fsdp", True, "full", True)
    assert (scenario.workload.micro_batch, scenario.num_micro_batches) == (2, 4)
    assert [option.split(": ")[1] for option in found.not_read] == [
        "quantize.linear.float8.enable_fsdp_float8_all_gather = true"
    ]
    assert found.no_matter == ("job.dump_folder", "optimizer.lr", "training.steps", "metrics.log_freq")


def test_a_json_of_deepspeed():
    found = read_launch(FILES / "ds_config.json")
    scenario = found.scenario(hardware="dgx-h100", model="llama-3-8b", workload={"seq_len": 16384})
    plan = scenario.plan
    assert (plan.library, plan.ulysses, plan.dp, plan.zero_stage) == ("deepspeed", 4, 2, 3)  # 32 = 2 x 8 x 2
    assert (plan.dp_library, plan.bucket_elements) == ("deepspeed", 200_000_000)
    assert (scenario.num_micro_batches, scenario.workload.seq_len) == (8, 16384)
    unread = {option.split(": ")[1].split(" = ")[0].rpartition(".")[2] for option in found.not_read}
    assert unread == {"fused", "stage3_param_persistence_threshold", "device", "pin_memory"}
    with pytest.raises(InputError, match=r"ds_config.json: DeepSpeed's JSON has no model; give --model"):
        found.scenario(hardware="dgx-h100")


READ = frozenset({
    "account-for-embedding-in-pipeline-split", "account-for-loss-in-pipeline-split",
    "accumulate-allreduce-grads-in-fp32", "add-qkv-bias", "attention-backend", "attention-dropout", "bf16",
    "context-parallel-size", "cp-comm-type", "cpu-offloading-num-layers", "cross-entropy-loss-fusion",
    "cuda-graph-impl", "cuda-graph-scope", "data-parallel-sharding-strategy", "ddp-bucket-size",
    "decoder-first-pipeline-num-layers", "decoder-last-pipeline-num-layers", "disable-bias-linear",
    "enable-cuda-graph", "exp-avg-dtype", "exp-avg-sq-dtype", "external-cuda-graph", "ffn-hidden-size", "fp16",
    "fp4-format", "fp8-format", "fp8-recipe", "global-batch-size", "grad-reduce-in-bf16", "group-query-attention",
    "hidden-dropout", "hidden-size", "hierarchical-context-parallel-sizes", "kv-channels", "main-grads-dtype",
    "make-vocab-size-divisible-by", "max-position-embeddings", "micro-batch-size",
    "microbatch-group-size-per-virtual-pipeline-stage", "no-overlap-p2p-communication", "no-position-embedding",
    "normalization", "num-attention-heads", "num-layers", "num-layers-per-virtual-pipeline-stage",
    "num-query-groups", "num-virtual-stages-per-pipeline-rank", "overlap-grad-reduce",
    "overlap-p2p-communication-warmup-flush", "overlap-param-gather", "padded-vocab-size",
    "pipeline-model-parallel-layout", "pipeline-model-parallel-size", "position-embedding-type", "qk-layernorm",
    "recompute-activations", "recompute-granularity", "recompute-method", "recompute-modules",
    "recompute-num-layers", "seq-length", "sequence-parallel", "squared-relu", "swiglu",
    "tensor-model-parallel-size", "tp-comm-overlap", "untie-embeddings-and-output-weights",
    "use-distributed-optimizer", "use-flash-attn", "use-megatron-fsdp", "use-precision-aware-optimizer",
    "use-rotary-position-embeddings", "use-torch-fsdp2", "use-tp-pp-dp-mapping", "vocab-size", "window-size",
    "delay-wgrad-compute", "num-experts", "overlap-moe-expert-parallel-comm", "expert-model-parallel-size",
    "multi-latent-attention", "mtp-num-layers", "softmax-type",
    "hybrid-override-pattern", "is-hybrid-model",
})  # fmt: skip
"""Arguments of Megatron-LM that say something of a scenario, or refuse it."""
OF_OTHER_MODELS = (
    "moe-", "window-attn", "q-lora", "kv-lora", "qk-head", "qk-pos", "v-head", "rope-type", "rotary-scaling", "mscale",
    "expert-tensor-parallel-size",
)  # fmt: skip
"""Beginnings of those that say nothing of a dense model with attention from hidden states."""


def test_every_argument_that_is_not_read_is_listed(tmp_path):
    """Of all that the training script of Megatron-LM takes."""
    lines = [line.split() for line in (FILES / "megatron_arguments.txt").read_text().splitlines() if line[:2] == "--"]
    rest = {name: " 7" * len(value) for name, *value in lines if name.removeprefix("--") not in READ}
    found = launch(tmp_path, MEGATRON.format(MODEL + "".join(f" {name}{value}" for name, value in rest.items())))
    unread = {option.split(": ")[1].split(" ")[0] for option in found.not_read}
    of_other_models = {name for name in rest if name[2:].startswith(OF_OTHER_MODELS)}
    assert unread | {*found.no_matter} | of_other_models == rest.keys()
    assert not unread & {*found.no_matter}
    assert {"--rampup-batch-size", "--fp8-param-gather", "--transformer-impl", "--use-nccl-ub"} <= unread
    assert {"--lr", "--save", "--seed", "--tokenizer-type", "--log-interval", "--clip-grad"} <= {*found.no_matter}
    assert found.settings == launch(tmp_path, MEGATRON.format(MODEL)).settings


def test_every_key_that_is_not_read_is_listed(tmp_path):
    """Of all that torchtitan's configuration has; the tables of experts and quantisation say nothing by themselves."""
    keys = [key for key in (FILES / "torchtitan_keys.txt").read_text().splitlines() if "." in key and key[0] != "#"]
    read = {
        "model.name", "model.flavor", "model.converters", "training.local_batch_size", "training.global_batch_size",
        "training.seq_len", "training.mixed_precision_param", "activation_checkpoint.mode",
        "activation_checkpoint.selective_ac_option", "activation_checkpoint.early_stop",
        "parallelism.data_parallel_replicate_degree",
        "parallelism.data_parallel_shard_degree", "parallelism.fsdp_reshard_after_forward",
        "parallelism.tensor_parallel_degree", "parallelism.enable_async_tensor_parallel",
        "parallelism.disable_loss_parallel",
        "parallelism.pipeline_parallel_degree", "parallelism.module_fqns_per_model_part",
        "parallelism.pipeline_parallel_first_stage_less_layers", "parallelism.pipeline_parallel_last_stage_less_layers",
        "parallelism.pipeline_parallel_layers_per_stage", "parallelism.pipeline_parallel_schedule",
        "parallelism.pipeline_parallel_microbatch_size", "parallelism.context_parallel_degree",
        "parallelism.context_parallel_rotate_method", "parallelism.expert_parallel_degree",
        "parallelism.expert_tensor_parallel_degree", "compile.enable",
    }  # fmt: skip
    rest = [key for key in keys if key not in read and not key.startswith(("quantize.", "compile."))]
    text = "".join(f"{key} = 'other'\n" for key in rest)
    found = launch(tmp_path, text, "job.toml")
    unread = {option.split(": ")[1].split(" ")[0] for option in found.not_read}
    assert unread | {*found.no_matter} == {*rest}
    assert {"training.dtype", "training.enable_cpu_offload", "parallelism.expert_parallel_comm_backend"} <= unread
    assert {"training.steps", "optimizer.lr", "checkpoint.interval", "debug.seed"} <= {*found.no_matter}


# ------------------------------------------------------------ arguments one by one


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        ("", {"dp": 8}),
        ("--tensor-model-parallel-size 4 --sequence-parallel", {"tp": 4, "sequence_parallel": True, "dp": 2}),
        ("--tensor-model-parallel-size=2 --context-parallel-size 4", {"tp": 2, "ring": 4}),
        ("--context-parallel-size 4 --cp-comm-type a2a", {"ulysses": 4, "dp": 2}),
        ("--context-parallel-size 4 --cp-comm-type all_gather", {"ring": 4, "ring_kind": "all_gather", "dp": 2}),
        (
            "--context-parallel-size 8 --cp-comm-type a2a+p2p --hierarchical-context-parallel-sizes 2 4",
            {"ulysses": 2, "ring": 4},
        ),
        ("--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 4 --global-batch-size 16",
         {"pp": 2, "virtual_pp": 4, "dp": 4}),
        ("--pipeline-model-parallel-size 4 --num-layers-per-virtual-pipeline-stage 2 --global-batch-size 16",
         {"pp": 4, "virtual_pp": 4, "dp": 2}),
        ("--pipeline-model-parallel-size 4 --decoder-first-pipeline-num-layers 5 --decoder-last-pipeline-num-layers 7",
         {"pp": 4, "pp_layout": "Et5/t10/t10/t7L", "dp": 2}),
        ("--pipeline-model-parallel-size 4 --pipeline-model-parallel-layout 'Et*7|(tttttttt|)*2,t*9,L'",
         {"pp": 4, "pp_layout": "Et7/t8/t8/t9L", "dp": 2}),
        (f"--num-layers 30 --pipeline-model-parallel-size 4 {SLOT.format('embedding')} {SLOT.format('loss')}",
         {"pp": 4, "dp": 2}),
        (f"--num-layers 31 --pipeline-model-parallel-size 4 {SLOT.format('embedding')}",
         {"pp": 4, "pp_layout": "Et7/t8/t8/t8L", "dp": 2}),
        ("--use-distributed-optimizer --overlap-grad-reduce",
         {"distributed_optimizer": True, "dp_overlap": "gradients", "dp": 8}),
        ("--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather --ddp-bucket-size 1000000",
         {"distributed_optimizer": True, "dp_overlap": True, "bucket_elements": 1_000_000, "dp": 8}),
        ("--use-megatron-fsdp --data-parallel-sharding-strategy optim_grads_params", {"zero": 3, "dp": 8}),
        ("--use-torch-fsdp2 --untie-embeddings-and-output-weights", {"zero": 3, "dp_library": "fsdp", "dp": 8}),
        ("--use-torch-fsdp2 --torch-fsdp2-no-reshard-after-forward", {"zero": 2, "dp_library": "fsdp", "dp": 8}),
        ("--grad-reduce-in-bf16", {"grad_dtype": "bf16", "dp": 8}),
        ("--use-distributed-optimizer --use-precision-aware-optimizer --exp-avg-dtype bf16 --exp-avg-sq-dtype bf16",
         {"distributed_optimizer": True, "precision_aware_optimizer": True, "moment_dtype": "bf16", "dp": 8}),
        ("--recompute-activations", {"recompute": "selective", "dp": 8}),
        ("--recompute-granularity selective --recompute-modules mlp layernorm",
         {"recompute": "selective", "recompute_modules": "mlp+layernorm", "dp": 8}),
        ("--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
         {"recompute": "full", "dp": 8}),
        ("--recompute-granularity full --recompute-method block --recompute-num-layers 4",
         {"recompute": "full", "recompute_layers": 4, "dp": 8}),
        ("--cuda-graph-impl local --cuda-graph-scope full_iteration", {"cuda_graphs": "full_iteration", "dp": 8}),
        ("--cuda-graph-impl transformer_engine", {"cuda_graphs": "per_layer", "dp": 8}),
        ("--cuda-graph-impl transformer_engine --cuda-graph-scope attn mlp", {"cuda_graphs": "attn+mlp", "dp": 8}),
        (f"{EXPERTS} 8 {EXCHANGED} --moe-expert-capacity-factor 2 --moe-pad-expert-input-to-capacity",
         {"ep": 8, "moe_capacity_factor": 2.0, "dp": 8}),
        (f"{EXPERTS} 8 {EXCHANGED} --overlap-moe-expert-parallel-comm --delay-wgrad-compute",
         {"ep": 8, "moe_a2a_overlap": True, "delay_wgrad": True, "dp": 8}),
        (f"{EXPERTS} 8", {"ep": 8, "moe_dispatcher": "allgather", "dp": 8}),
        (f"{EXPERTS} 8 --moe-token-dispatcher-type flex", {"ep": 8, "moe_dispatcher": "deepep", "dp": 8}),
        (f"{EXPERTS} 8 --moe-token-dispatcher-type flex --moe-flex-dispatcher-backend hybridep",
         {"ep": 8, "moe_dispatcher": "hybridep", "dp": 8}),
        (f"{OF_TWO} --expert-tensor-parallel-size 1",
         {"tp": 2, "sequence_parallel": True, "ep": 4, "expert_tp": 1, "dp": 4}),
        (f"{OF_TWO} --expert-tensor-parallel-size 2", {"tp": 2, "sequence_parallel": True, "ep": 4, "dp": 4}),
    ],
)  # fmt: skip
def test_arguments_of_megatron_are_options_of_a_plan(arguments, options, tmp_path):
    assert megatron(tmp_path, arguments).plan == Plan(**options)


@pytest.mark.parametrize(
    ("arguments", "traits"),
    [
        ("", {"ffn_hidden": 16384, "norm": "layernorm", "positions": "learned", "bias": True, "dropout": 0.1}),
        ("--swiglu --disable-bias-linear --add-qkv-bias", {"ffn_hidden": 10880, "bias": False, "qkv_bias": True}),
        ("--group-query-attention --num-query-groups 4 --qk-layernorm", {"kv_heads": 4, "qk_norm": True}),
        ("--squared-relu --normalization RMSNorm", {"activation": "squared_relu", "norm": "rmsnorm"}),
        ("--attention-backend unfused --hidden-dropout 0.0 --attention-dropout 0.0",
         {"attention": "unfused", "dropout": 0.0}),
        ("--attention-backend fused", {"attention": "cudnn"}),
        ("--use-rotary-position-embeddings --untie-embeddings-and-output-weights",
         {"positions": "rope", "tied_embeddings": False}),
        ("--vocab-size 50257", {"vocab": 50304}),  # GPT-2's, in 128s
        ("--vocab-size 50257 --tensor-model-parallel-size 8", {"vocab": 51200}),  # as of Megatron's published runs
        ("--padded-vocab-size 50400", {"vocab": 50400}),
        ("--window-size 8191,0", {"sliding_window": 8192}),
        ("--num-experts 0 --moe-router-topk 3 --kv-lora-rank 7", {"experts": None, "experts_per_token": None}),
        ("--num-experts 16", {
            "experts": 16, "experts_per_token": 2, "expert_ffn_hidden": 16384, "shared_ffn_hidden": 0, "dense_layers": 0
        }),
        (("--num-experts 16 --moe-router-topk 4 --moe-ffn-hidden-size 1408 --moe-shared-expert-intermediate-size 2816 "
         "--moe-layer-freq '([0]*3+[1]*29)'"), {
            "experts_per_token": 4, "expert_ffn_hidden": 1408, "shared_ffn_hidden": 2816, "dense_layers": 3
        }),
        ("--num-experts 16 --moe-layer-freq \"'([1]*16)*2'\"", {"dense_layers": 0}),  # as quoted twice
        ("--num-experts 16 --moe-layer-freq 2", {"dense_layers": 0, "mlp_layer_types": ("sparse", "dense")}),
        ("--window-size 127,0 --window-attn-skip-freq 2 --softmax-type learnable", {
            "sliding_window": 128, "layer_types": ("sliding_attention", "full_attention"), "attention_sinks": True,
        }),
        ("--window-size 127,0 --window-attn-skip-freq [0]*4+[1]*28", {
            "layer_types": 4 * ("full_attention",) + 28 * ("sliding_attention",),
        }),
        ("--use-rotary-position-embeddings --mtp-num-layers 1", {"mtp_layers": 1}),
        (("--multi-latent-attention --kv-lora-rank 512 --q-lora-rank 1536 --qk-layernorm --kv-channels 7 "
         "--use-rotary-position-embeddings"), {
            "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
            "v_head_dim": 128, "head_dim": 192, "kv_heads": 32, "qk_norm": False, "qkv_bias": False,
        }),
    ],
)  # fmt: skip
def test_arguments_of_megatron_are_traits_of_a_model(arguments, traits, tmp_path):
    found = megatron(tmp_path, arguments).model
    assert {name: getattr(found, name) for name in traits} == traits
    assert found.name == "train"


def test_what_experts_are_simulated_as_is_said(tmp_path):
    """Defaults of Megatron-LM that are not simulated, and arguments that are not."""
    found = launch(tmp_path, MEGATRON.format(MODEL + " --num-experts 8 --moe-expert-capacity-factor 1.5"))
    assert [note.partition(": ")[2] for note in found.notes] == [
        "--moe-grouped-gemm is missing: products of experts are simulated as grouped",
        "--moe-permute-fusion is missing: simulated as a fused kernel",
        "--moe-router-dtype is missing: the router is simulated in fp32",
    ]
    assert [option.split(": ")[1] for option in found.not_read] == ["--moe-expert-capacity-factor 1.5"]


@pytest.mark.parametrize(
    ("arguments", "precision", "gradients"),
    [
        ("", "bf16", "fp32"), ("--fp8-format hybrid", "fp8_delayed", "fp32"),
        ("--fp8-format hybrid --fp8-recipe tensorwise", "fp8", "fp32"),
        ("--fp8-format e4m3 --fp8-recipe mxfp8 --main-grads-dtype bf16", "mxfp8", "bf16"),
        ("--fp4-format e2m1 --fp4-recipe nvfp4", "nvfp4", "fp32"),
    ],
)  # fmt: skip
def test_arguments_of_megatron_are_a_precision(arguments, precision, gradients, tmp_path):
    found = launch(tmp_path, MEGATRON.format(f"{MODEL} {arguments}")).scenario(hardware="dgx-b200")
    assert (found.workload.precision, found.plan.grad_dtype) == (precision, gradients)
    half = MODEL.replace("--bf16", "--fp16")
    found = launch(tmp_path, MEGATRON.format(half)).scenario(hardware="dgx-b200")
    assert (found.workload.precision, found.plan.grad_dtype) == ("fp16", "bf16")  # in 16 bits unless asked for


def test_a_preset_that_a_run_changes_keeps_its_name(tmp_path):
    """Megatron pads the vocabulary to 128 x tp: that of Llama 3 to 129,024 under tp = 8."""
    text = (FILES / "train_llama3_8b.sh").read_text().replace("TP=4", "TP=8").replace("-by 64", "-by 128")
    found = launch(tmp_path, text).scenario(hardware="dgx-h100")
    assert found.model.name == "llama-3-8b (vocab = 129024)"
    assert found.model.head_rows == 129024


@pytest.mark.parametrize(
    ("launcher", "gpus", "nodes"),
    [
        ("torchrun --nproc-per-node 4 --nnodes 2", 8, 2), ("torchrun --nproc_per_node=8", 8, None),
        ("srun -N 2 --ntasks-per-node=8 python", 16, None), ("mpirun -np 16 python", 16, None),
        ("python -m torch.distributed.run --nproc-per-node 8 --nnodes 1", 8, None),
    ],
)  # fmt: skip
def test_the_launcher_says_how_many_gpus(launcher, gpus, nodes, tmp_path):
    """Nodes that hold fewer than they could are those of the scenario, too."""
    found = launch(tmp_path, f"{launcher} pretrain_gpt.py {MODEL}").scenario(hardware="dgx-h100")
    assert (found.plan.gpus, found.nodes) == (gpus, nodes)


def test_machines_of_a_launcher_are_not_those_of_another_plan(tmp_path):
    found = launch(tmp_path, f"torchrun --nproc-per-node 4 --nnodes 2 pretrain_gpt.py {MODEL}")
    assert found.scenario(hardware="dgx-h100", plan={"dp": 4}).nodes is None
    assert found.scenario(hardware="dgx-h100", nodes=4).nodes == 4


COPIES = "[parallelism]\ndata_parallel_replicate_degree = 4\ndata_parallel_shard_degree = 1\n"
RING = """[parallelism]
data_parallel_shard_degree = 2
fsdp_reshard_after_forward = "never"
context_parallel_degree = 4
context_parallel_rotate_method = "alltoall"
"""
EVEN = "pipeline_parallel_first_stage_less_layers = 0\npipeline_parallel_last_stage_less_layers = 0\n"
LOOPED = 'pipeline_parallel_schedule = "Interleaved1F1B"\n'
TITAN = '[model]\nname = "llama3"\nflavor = "8B"\n[training]\nseq_len = 4096\n'


@pytest.mark.parametrize(
    ("text", "options", "sequences"),
    [
        ("[parallelism]\ndata_parallel_shard_degree = 8", {"dp": 8, "recompute": "full", "recompute_layers": 16}, 64),
        ('[parallelism]\ndata_parallel_shard_degree = 8\n[activation_checkpoint]\nmode = "none"', {"dp": 8}, 64),
        (f'{COPIES}[activation_checkpoint]\nmode = "full"',
         {"dp": 4, "zero": 0, "dp_library": "ddp", "recompute": "full"}, 32),
        (f'{RING}[activation_checkpoint]\nmode = "none"', {"dp": 2, "zero": 2, "ring": 4, "ring_kind": "p2p"}, 16),
    ],
)  # fmt: skip
def test_tables_of_torchtitan_are_options_of_a_plan(text, options, sequences, tmp_path):
    """Eight sequences a rank and half of the layers recomputed, unless said otherwise."""
    found = launch(tmp_path, TITAN + text, "job.toml").scenario(hardware="dgx-h100")
    assert found.plan == Plan(library="torchtitan", **options)
    assert (found.global_batch, found.workload.micro_batch) == (sequences, 8)


def test_compiled_models_of_torchtitan_have_compiled_kernels(tmp_path):
    text = f"{TITAN}[parallelism]\ndata_parallel_shard_degree = 8\n[compile]\nenable = {{}}\n"
    found = [launch(tmp_path, text.format(value), "job.toml") for value in ("true", "false")]
    kernels = [one.scenario(hardware="dgx-h100").model.kernels for one in found]
    assert kernels == ["compiled", "eager"]
    assert found[0].not_read == found[1].not_read == ()


@pytest.mark.parametrize(
    ("keys", "layers", "chunks"),
    [
        ("", (8, 9, 8, 7), 1),  # 32 + 2 over 4: 9 9 8 8, of which embedding and output are one each
        (EVEN, (8,) * 4, 1),
        (f"{LOOPED}{EVEN}pipeline_parallel_layers_per_stage = 4\n", (4,) * 8, 2),
        (LOOPED, (4, 5, 4, 4, 4, 4, 4, 3), 2),
    ],
)  # fmt: skip
def test_stages_of_torchtitan_are_chunks(keys, layers, chunks, tmp_path):
    """As `generate_llm_fqn_per_model_part` hands them out."""
    text = f"{TITAN}[parallelism]\ndata_parallel_shard_degree = 1\npipeline_parallel_degree = 4\n{keys}\n"
    found = launch(tmp_path, text, "job.toml")
    plan = Plan(**found.settings["plan"])
    stages = spsim.inputs.stages.all_chunks(spsim.load_model("llama-3-8b"), plan)
    assert tuple(len(chunk.layers) for chunk in stages) == layers
    assert (plan.virtual_pp, plan.pp_sends, found.settings["workload"]["micro_batch"]) == (chunks, "torch", 1)


# ------------------------------------------------------------ bash


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("A=1; echo $A ${A} \"$A\" '$A'", "1 1 1 $A"), ("A=(x 'y z'); echo ${A[@]}", "x y z"),
        ("A=(x); A+=(y); echo ${#A[@]} ${A[1]} $A", "2 y x"), ("echo ${A:-b} ${A-c} ${B:+d} e", "b c e"),
        ("A=4; B=$((A * 8 + 3)); echo $B $((B / 2)) $((-B % 4))", "35 17 1"),
        ("echo one \\\n  two # three\n", "one two"), ("A='x y'; echo a$A", "ax y"), ("echo a > b 2>&1 < c", "a"),
        ("if [ 1 -eq 2 ]; then echo a; elif [[ x == x && -n y ]]; then echo b; else echo c; fi", "b"),
        ("A=; [[ -z $A ]] && A=5; echo $A", "5"), ("A=3; [ $A -gt 5 ] && A=9; echo $A", "3"),
        ("true || echo a; echo b", "b"), ("{ A=1; }; (B=2); echo $A$B", "12"), ("eval echo x; bash -c 'echo y'", "x y"),
        ("cat <<EOF\necho a\nEOF\necho b", "b"), ("export A=1 B=2; local C=$A; echo $C$B", "12"),
        ("for a in 1 2; do A=$a; done; echo $A", "$A"), ("if test -f x; then A=1; fi; echo $A", "$A"),
        ("echo `date` $(pwd) $HOME $1", "`date` $(pwd) $HOME $1"), ("f() { A=1; }; echo ${A:-2}", "$A"),
    ],
)  # fmt: skip
def test_a_script_is_followed_as_bash_would(text, words):
    """What only a run of it would tell stays as it is written."""
    commands = [command for command in Script.of(text, "x.sh").commands if command.fields[0].text == "echo"]
    assert " ".join(field.text for command in commands for field in command.fields[1:]) == words


def test_nothing_of_a_script_is_run(tmp_path):
    text = f"touch {tmp_path}/a; A=$(touch {tmp_path}/b); eval touch {tmp_path}/c; `touch {tmp_path}/d`\n"
    launch(tmp_path, text + MEGATRON.format(MODEL))
    assert [path.name for path in tmp_path.iterdir()] == ["train.sh"]
