"""A scenario that is written for a library and read back is the scenario; where it is not, a line says so."""

import random
import re
from itertools import islice
from pathlib import Path

import pytest

from spsim import InputError, Plan, Scenario, emit, read_launch
from spsim.cli import main
from spsim.inputs.launch.emission import EMITTED, effective

FILES = Path(__file__).parent / "data" / "launch"
NAMES = {"megatron": "train.sh", "torchtitan": "job.toml", "deepspeed": "ds_config.json"}
MODELS = {
    "megatron": ("gpt-22b", "gpt-175b", "llama-2-7b", "llama-3-8b", "llama-3-70b", "qwen2.5-32b", "nemotron-4-15b"),
    "torchtitan": ("llama-3-8b", "llama-3-70b", "llama-3-405b", "qwen3-8b"),
    "deepspeed": ("llama-3-8b", "qwen3-8b", "mistral-7b"),
}
DEGREES = {
    "megatron": {"tp": (1, 2, 4, 8), "ulysses": (1, 1, 2), "ring": (1, 1, 2, 4), "pp": (1, 1, 2, 4), "dp": (1, 2, 4)},
    "torchtitan": {"tp": (1, 2, 4, 8), "ring": (1, 1, 2, 4), "pp": (1, 1, 2, 4), "dp": (1, 2, 4)},
    "deepspeed": {"ulysses": (1, 2, 4, 8), "tp": (1, 1, 2), "dp": (1, 2, 4)},
}
OPTIONS = {
    "megatron": {
        "sequence_parallel": (True,), "virtual_pp": (2, 4), "pp_group": (8,), "pp_overlap": (False,),
        "pp_warmup_flush": (True,), "distributed_optimizer": (True,), "dp_overlap": (True, "gradients"),
        "bucket_elements": (40_000_000,), "grad_dtype": ("bf16",), "precision_aware_optimizer": (True,),
        "moment_dtype": ("bf16",), "loss_fusion": (True,), "tp_overlap": (True,), "zero": (2, 3),
        "recompute": ("selective", "full"), "recompute_layers": (2, 3), "recompute_method": ("uniform",),
        "recompute_modules": ("mlp+layernorm", "core_attn+mlp"), "cpu_offload_layers": (4,),
        "cuda_graphs": ("per_layer", "full_iteration"),
    },
    "torchtitan": {
        "zero": (2,), "shard_group": (2,), "recompute": ("full",), "virtual_pp": (2,),
        "tp_overlap": (True,), "pp_schedule": ("gpipe", "looped_bfs"),
    },
    "deepspeed": {
        "zero": (1, 2, 3), "bucket_elements": (100_000_000,), "dp_overlap": ("gradients",), "grad_dtype": ("bf16",),
    },
}  # fmt: skip
PRECISIONS = {
    "megatron": ("bf16", "fp16", "fp32", "fp8", "fp8_delayed", "mxfp8", "nvfp4"),
    "torchtitan": ("bf16", "fp32", "fp8", "mxfp8"),
    "deepspeed": ("bf16", "fp16", "fp32"),
}
OF_LIBRARY = {"megatron": "megatron-core", "torchtitan": "torchtitan", "deepspeed": "deepspeed"}


def scenarios(library, seed):
    """Random scenarios that the library can say, without end."""
    source = random.Random(seed)
    while True:
        plan = {name: source.choice(values) for name, values in DEGREES[library].items()}
        options = OPTIONS[library]
        plan |= {
            name: source.choice(options[name])
            for name in source.sample([*options], source.randrange(min(len(options), 7)))
        }
        workload = {
            "seq_len": source.choice((4096, 8192)), "micro_batch": source.choice((1, 2)),
            "precision": source.choice(PRECISIONS[library]),
        }  # fmt: skip
        if plan.get("pp", 1) > 1 or source.random() < 0.5:
            workload["global_batch"] = workload["micro_batch"] * plan["dp"] * source.choice((2, 8, 16))
        model = source.choice(MODELS[library])
        if "gpt" in model:  # with so many positions
            workload["seq_len"] = 2048
        if library == "torchtitan" and source.random() < 0.3:
            model = {"preset": model, "kernels": "compiled"}
        if plan.get("pp_schedule") == "looped_bfs" and "virtual_pp" not in plan:
            continue  # torchtitan has it with several chunks only
        try:
            yield Scenario(
                hardware="dgx-b200", model=model, workload=workload, plan={"library": OF_LIBRARY[library], **plan}
            )
        except InputError:
            continue


def read_back(scenario, library, text, tmp_path):
    """What a file with the text of a scenario says."""
    path = tmp_path / NAMES[library]
    path.write_text(text)
    settings = {}
    if library == "deepspeed":  # which has neither
        settings = {"model": scenario.model, "workload": {"seq_len": scenario.workload.seq_len}}
    return read_launch(path).scenario(hardware="dgx-b200", **settings)


def canonical(scenario):
    """The scenario without options that change nothing, which no library has a word for."""
    found = effective(scenario.model, scenario.plan)
    sizes = scenario.workload.model_dump(exclude={"global_batch"})
    return scenario.model, found, sizes, scenario.global_batch, scenario.gpus_per_node, scenario.scope


@pytest.mark.slow
@pytest.mark.parametrize("library", NAMES)
def test_a_round_trip_gives_the_same_scenario(library, tmp_path):
    """200 random plans each, all of what the library can say."""
    equal = 0
    for scenario, _ in zip(scenarios(library, seed=13), range(200), strict=False):
        emission = emit(scenario, library)
        back = read_back(scenario, library, emission.text, tmp_path)
        assert canonical(back) == canonical(scenario), scenario.plan.text
        assert all("configuration; it comes" in line for line in emission.unsaid), scenario.plan.text
        equal += back == scenario
    assert equal > 60  # the others had options without effect


@pytest.mark.parametrize("library", NAMES)
def test_what_does_not_come_back_is_listed(library, tmp_path):
    """Plans of one library written for another: each option that differs has its name in a line."""
    differing = 0
    for origin in NAMES:
        for scenario, _ in zip(scenarios(origin, seed=7), range(15), strict=False):
            emission = emit(scenario, library)
            unsaid = " ".join(emission.unsaid)
            try:
                back = read_back(scenario, library, emission.text, tmp_path)
            except InputError:  # what is left is no plan that runs
                continue
            own, other = effective(scenario.model, scenario.plan), effective(scenario.model, back.plan)
            lost = {name for name in own if name in other and own[name] != other[name]}
            assert all(re.search(rf"\b{name}\b", unsaid) for name in lost), (scenario.plan.text, lost, unsaid)
            differing += bool(lost)
    assert differing > 10


ROUTED = {
    "layers": 8, "hidden": 1024, "ffn_hidden": 4096, "heads": 16, "kv_heads": 4, "vocab": 32768, "gated_mlp": True,
    "experts": 16, "experts_per_token": 4, "expert_ffn_hidden": 512,
}  # fmt: skip
LATENT = {"kv_lora_rank": 128, "qk_nope_head_dim": 64, "qk_rope_head_dim": 32, "v_head_dim": 48}


def routed_scenarios(seed):
    """Random models and plans of experts that Megatron-LM can say, without end."""
    source = random.Random(seed)
    while True:
        model = {**ROUTED, "shared_ffn_hidden": source.choice((0, 512)), "dense_layers": source.choice((0, 1, 3))}
        if source.random() < 0.3:
            turns = ((1, 0), (1, 1, 0, 1), (0, 1))[source.randrange(3)]
            model |= {"dense_layers": 0, "mlp_layer_types": [("sparse", "dense")[turn] for turn in turns]}
        if source.random() < 0.5:
            turns = ((1, 0), (1, 1, 1, 0), (0, 1, 1), (1,))[source.randrange(4)]
            model |= {"sliding_window": 1024, "attention_sinks": source.random() < 0.5}
            model["layer_types"] = [("full_attention", "sliding_attention")[turn] for turn in turns]
        if source.random() < 0.2:
            model["mtp_layers"] = 1
        if source.random() < 0.4:
            model = {**model, **LATENT, "q_lora_rank": source.choice((None, 192)), "kv_heads": 16}
        plan = {"sequence_parallel": True, "distributed_optimizer": source.random() < 0.5}
        plan |= {name: source.choice(values) for name, values in DEGREES["megatron"].items()}
        plan |= {"ep": source.choice((1, 2, 4, 8)), "expert_tp": source.choice((None, 1))}
        plan |= {"moe_a2a_overlap": source.random() < 0.3, "delay_wgrad": source.random() < 0.3}
        plan["moe_capacity_factor"] = source.choice((None, None, 1.25))
        plan["cuda_graphs"] = source.choice(("none", "none", "attn+moe_router", "per_layer"))
        plan["moe_dispatcher"] = source.choice(("alltoall", "allgather", "deepep", "hybridep"))
        modules = source.choice((None, "moe_act", "moe", "shared_experts+core_attn"))
        plan |= {"recompute": "selective", "recompute_modules": modules} if modules else {}
        workload = {"seq_len": 4096, "global_batch": plan["dp"] * 16}
        try:
            yield Scenario(hardware="dgx-b200", model=model, workload=workload, plan=plan)
        except InputError:
            continue


@pytest.mark.slow
def test_layers_that_differ_come_back(tmp_path):
    seen = set()
    for scenario, _ in zip(routed_scenarios(seed=3), range(40), strict=False):
        emission = emit(scenario, "megatron")
        back = read_back(scenario, "megatron", emission.text, tmp_path)
        own = scenario.model.model_copy(update={"name": "train"})
        assert canonical(back) == (own, *canonical(scenario)[1:]), scenario.plan.text
        assert emission.unsaid == ()
        seen |= {(scenario.plan.ep > 1, scenario.plan.expert_tp == 1 < scenario.plan.tp, "moe" in emission.text)}
    assert len(seen) > 2


@pytest.mark.parametrize("library", ["torchtitan", "deepspeed", "transformers"])
def test_a_library_without_a_word_for_experts_says_so(library):
    plan = "dp=8,ep=8"
    case = Scenario(hardware="dgx-h100", model="mixtral-8x7b", plan=plan, workload={"seq_len": 4096})
    emission = emit(case, library)
    named = any(line.startswith("plan.ep = 8 has no counterpart") for line in emission.unsaid)
    assert named is not ("expert_parallel_degree = 8" in emission.text)


def test_arguments_are_those_of_the_library(tmp_path):
    """Names and whether a value follows, as the training script of Megatron-LM declares them."""
    lines = (FILES / "megatron_arguments.txt").read_text().splitlines()
    declared = {name: bool(value) for name, *value in map(str.split, lines) if name.startswith("--")}
    found = {}
    every = (*islice(scenarios("megatron", seed=5), 60), *islice(routed_scenarios(seed=5), 10))
    for scenario in every:
        words = emit(scenario, "megatron").text.partition("pretrain_gpt.py")[2].replace("\\\n", " ").split()
        options = [number for number, word in enumerate(words) if word.startswith("--")]
        for number in options:
            found[words[number]] = number + 1 < len(words) and number + 1 not in options
    assert len(found) > 45
    assert {name: declared.get(name) for name in found} == found


def test_keys_are_those_of_the_library():
    declared = {*(FILES / "torchtitan_keys.txt").read_text().splitlines()}
    for scenario, _ in zip(scenarios("torchtitan", seed=5), range(60), strict=False):
        table = ""
        for line in emit(scenario, "torchtitan").text.splitlines():
            table = line.strip("[]") if line.startswith("[") else table
            if " = " in line and not line.startswith("#"):
                assert f"{table}.{line.split(' = ')[0]}" in declared


LLAMA = {"hardware": "dgx-h100", "model": "llama-3-8b", "workload": {"seq_len": 8192, "global_batch": 16}}


def test_every_second_layer_of_torchtitan_is_as_many_layers(tmp_path):
    """Which of them are recomputed is not said here, only how many."""
    scenario = Scenario(**LLAMA, plan="library=torchtitan,dp=2,recompute=full,recompute_layers=16")
    emission = emit(scenario, "torchtitan")
    assert 'selective_ac_option = "2"' in emission.text
    assert read_back(scenario, "torchtitan", emission.text, tmp_path).plan == scenario.plan
    (line,) = emission.unsaid
    assert line.endswith("simulated as the first 16 layers of a chunk, not each nth")


def test_the_script_of_megatron_says_all_of_a_known_plan():
    plan = "tp=8,sequence_parallel,pp=2,virtual_pp=2,dp=2,distributed_optimizer,dp_overlap"
    emission = emit(Scenario(**LLAMA, plan=plan), "megatron")
    words = " ".join(emission.text.replace("\\\n", " ").split())
    assert emission.unsaid == ()
    for part in (
        "torchrun --nnodes 4 --nproc-per-node 8 pretrain_gpt.py", "--num-layers 32", "--ffn-hidden-size 14336",
        "--group-query-attention --num-query-groups 8", "--swiglu", "--normalization RMSNorm",
        "--untie-embeddings-and-output-weights", "--padded-vocab-size 128256", "--tensor-model-parallel-size 8",
        "--pipeline-model-parallel-size 2", "--num-virtual-stages-per-pipeline-rank 2", "--sequence-parallel",
        "--use-distributed-optimizer", "--overlap-grad-reduce --overlap-param-gather", "--global-batch-size 16",
        "export CUDA_DEVICE_MAX_CONNECTIONS=1",
    ):  # fmt: skip
        assert part in words, part


@pytest.mark.parametrize(
    ("library", "plan", "lines"),
    [
        ("megatron", "ring=2,ring_cut=contiguous", ["plan.ring_cut = 'contiguous' has no counterpart in Megatron-LM"]),
        ("megatron", "tp=2,tp_backward_overlap=false", ["plan.tp_backward_overlap = False has no counterpart"]),
        ("megatron", "dp=2,dp_library=ddp", ["plan.dp_library = 'ddp' has no counterpart"]),
        ("torchtitan", "library=torchtitan,ulysses=2", ["plan.ulysses = 2 has no counterpart in torchtitan"]),
        ("torchtitan", "library=torchtitan,recompute=selective", ["plan.recompute = 'selective' has no counterpart"]),
        ("torchtitan", "tp=2,sequence_parallel", [
            "model.kernels = 'fused' has no counterpart in torchtitan, which has 'eager'",
            "plan.library = 'megatron-core', but torchtitan is 'torchtitan', which has ",
        ]),
        ("transformers", "library=transformers,tp=2,recompute=full", []),
        ("transformers", "library=transformers,dp=2,grad_dtype=bf16", ["plan.grad_dtype = 'bf16' has no counterpart"]),
    ],
)  # fmt: skip
def test_what_a_library_has_no_word_for_is_said(library, plan, lines):
    unsaid = emit(Scenario(**LLAMA, plan=plan), library).unsaid
    own = [line for line in unsaid if "configuration; it comes" not in line]
    assert len(own) == len(lines)
    for line, beginning in zip(own, lines, strict=True):
        assert line.startswith(beginning)


def test_the_snippet_of_transformers_is_python_that_names_the_settings():
    plan = "library=transformers,tp=2,ring=2,dp=4,zero=3,dp_library=fsdp,recompute=full"
    text = emit(Scenario(**LLAMA, plan=plan), "transformers").text
    compile(text, "snippet.py", "exec")
    for part in (
        'DistributedConfig(tp_plan="auto", tp_size=2)', "ParallelismConfig(dp_shard_size=4, tp_size=2, cp_size=2",
        "per_device_train_batch_size=1", "gradient_accumulation_steps=4", "gradient_checkpointing=True", "bf16=True",
    ):  # fmt: skip
        assert part in text


def test_an_unknown_library_is_refused():
    with pytest.raises(InputError, match="is no library that a plan is written for; use one of megatron, torchtitan"):
        emit(Scenario(**LLAMA), "jax")


def said(capsys, *arguments):
    """Exit status and both outputs of a command."""
    with pytest.raises(SystemExit) as stop:
        main([*arguments])
    return stop.value.code, *capsys.readouterr()


@pytest.mark.parametrize("library", EMITTED)
def test_the_command_prints_the_text_alone(library, capsys):
    line = "run --model llama-3-8b --hardware dgx-h100 --seq-len 8K --plan tp=8,sequence_parallel --emit"
    code, out, err = said(capsys, *line.split(), library)
    plan = Plan(tp=8, sequence_parallel=True)
    emission = emit(Scenario(hardware="dgx-h100", model="llama-3-8b", plan=plan, workload={"seq_len": 8192}), library)
    assert (code, out) == (0, emission.text)
    assert err.splitlines() == [f"note: {line}" for line in emission.unsaid]


def test_a_launch_file_is_translated(capsys):
    """From one library to another, over the scenario."""
    script = str(FILES / "train_llama3_8b.sh")
    code, out, err = said(capsys, "run", "--from", script, "--hardware", "dgx-h100", "--emit", "torchtitan")
    assert code == 0
    assert 'flavor = "8B"' in out
    assert "tensor_parallel_degree = 4" in out
    assert "${EXTRA_ARGS}: not read" in err
    assert "plan.library = 'megatron-core', but torchtitan is 'torchtitan'" in err


def test_the_emission_is_no_result(capsys):
    line = "run --model llama-3-8b --hardware dgx-h100 --seq-len 8K --emit megatron --json"
    code, out, err = said(capsys, *line.split())
    assert (code, out) == (2, "")
    assert "--emit prints a configuration, not a result" in err


@pytest.mark.slow
def test_a_launch_file_is_compared_with_another_plan(capsys):
    script = str(FILES / "train_gpt_175b.slurm")
    plan = "TP8 × PP8 × DP2"
    code, out, err = said(capsys, "compare", "--from", script, "--hardware", "dgx-a100-80gb", "--plan", plan)
    assert code == 0
    assert "TP8+SP × PP8 × DP2" in out
    assert "--split" in err
