"""A mistake in a launch file is one line that names file, option and fix; what it leaves open is asked."""

import json
import random
from pathlib import Path

import pytest

from spsim import InputError, read_launch
from spsim.cli import main

FILES = Path(__file__).parent / "data" / "launch"

ARGUMENTS = (
    "--num-layers 32 --hidden-size 4096 --num-attention-heads 32 --seq-length 4096 --micro-batch-size 1 "
    "--vocab-size 51200 --max-position-embeddings 4096 --bf16"
)
SCRIPT = f"torchrun --nproc-per-node 8 pretrain_gpt.py {ARGUMENTS}"
TITAN = '[model]\nname = "llama3"\nflavor = "8B"\n[parallelism]\ndata_parallel_shard_degree = 8\n'
DEEPSPEED = {
    "train_batch_size": 8, "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1,
    "bf16": {"enabled": True},
}  # fmt: skip


def deepspeed(**changes):
    """A small configuration with some keys of its own."""
    return json.dumps({**DEEPSPEED, **changes})


def run(tmp_path, capsys, name, text, *options):
    """(status, last line on stderr, stdout) of a run from a file with a text."""
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(SystemExit) as stop:
        main(["run", "--from", str(path), "--hardware", "dgx-h100", *options])
    captured = capsys.readouterr()
    return stop.value.code, captured.err.strip().rpartition("\n")[2], captured.out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.sh", SCRIPT + " --tensor-model-parallel-size eight",
         "a.sh:1: --tensor-model-parallel-size eight: expected a whole"),
        ("a.sh", SCRIPT + " --tensor-model-parallel-size", "--tensor-model-parallel-size: expected a whole number"),
        ("a.sh", SCRIPT + " --tensor-model-parallel-size 0", "0: expected a whole number from 1 to 2^40"),
        ("a.sh", SCRIPT + " --tensor-model-parallel-size 2 4", "2 4: expected a whole number"),
        ("a.sh", SCRIPT + " --sequence-parallel yes", "--sequence-parallel yes: expected true or false"),
        ("a.sh", SCRIPT + " --is-hybrid-model", "--is-hybrid-model: hybrid models are not read"),
        ("a.sh", SCRIPT + " --expert-model-parallel-size 2", "--expert-model-parallel-size 2: expected 1 without"),
        ("a.sh", SCRIPT + " --num-experts 8 --moe-layer-freq 1 --num-layers 99999999999", "model: layers: Input"),
        ("a.sh", SCRIPT + " --mtp-num-layers 2", "model: mtp_layers: Input should be less than or equal to 1, got 2"),
        ("a.sh", SCRIPT + " --num-experts 8 --moe-layer-freq '[1]*9'", "[1]*9: expected a number, or a list such as"),
        ("a.sh", SCRIPT + " --num-experts 8 --moe-layer-freq 'open(1)'", "open(1): expected a number, or a list such"),
        ("a.sh", SCRIPT + " --num-experts 8 --moe-layer-freq '[1]*9**99'", "expected a number, or a list such as"),
        ("a.sh", SCRIPT + " --multi-latent-attention", "model: positions = 'learned' with kv_lora_rank"),
        ("a.sh", SCRIPT + " --position-embedding-type mrope", "mrope: expected one of learned_absolute, rope, none"),
        ("a.sh", SCRIPT + " --normalization L2Norm", "L2Norm: expected one of LayerNorm, RMSNorm"),
        ("a.sh", SCRIPT + " --attention-backend magic", "magic: expected one of auto, fused, flash, unfused, local"),
        ("a.sh", SCRIPT + " --context-parallel-size 4 --cp-comm-type smoke",
         "smoke: expected one of p2p, all_gather"),
        ("a.sh", SCRIPT + " --context-parallel-size 4 --cp-comm-type p2p a2a", "p2p a2a: layers that communicate in"),
        ("a.sh", SCRIPT + " --context-parallel-size 4 --cp-comm-type a2a+p2p", "whose product is 4"),
        ("a.sh", SCRIPT + " --window-size 100", "--window-size 100: expected keys to the left and 0, as 4095,0"),
        ("a.sh", SCRIPT + " --fp16", "--fp16: expected one of --bf16 and --fp16"),
        ("a.sh", SCRIPT + " --hidden-dropout high", "--hidden-dropout high: expected a number such as 0.1"),
        ("a.sh", SCRIPT + " --hidden-dropout 1.5", "model: dropout"),
        ("a.sh", SCRIPT + " --pipeline-model-parallel-size 3 --account-for-loss-in-pipeline-split --num-layers 33",
         "33 layers and 1 slots of embedding and loss are not divisible by the 3 chunks"),
        ("a.sh", SCRIPT + " --pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 5",
         "--num-layers-per-virtual-pipeline-stage 5: expected a divisor of the 16 of a stage"),
        ("a.sh", SCRIPT + " --pipeline-model-parallel-size 2 --pipeline-model-parallel-layout 'Ex|L'",
         "expected a layout: 'x' is no part of a model"),
        ("a.sh", SCRIPT + " --pipeline-model-parallel-size 4 --decoder-first-pipeline-num-layers 7",
         "--decoder-first-pipeline-num-layers 7: expected a rest of 32 layers that the stages divide"),
        ("a.sh", SCRIPT + " --recompute-granularity some", "some: expected one of selective, full"),
        ("a.sh", SCRIPT + " --recompute-granularity selective --recompute-modules magic",
         "'magic' is none; use core_attn"),
        ("a.sh", SCRIPT + " --swiglu $MLP --ffn-hidden-size $WIDTH",
         "$WIDTH is not known without running the script"),
        ("a.sh", SCRIPT + " --use-distributed-optimizer --exp-avg-dtype fp7", "fp7: expected one of fp32, bf16"),
        ("a.sh", "echo hello", "a.sh: no launch of Megatron-LM is found (no command has its arguments)"),
        ("a.sh", f"if test -d /x; then {SCRIPT}; fi",
         "(FILE:1: if: what it tests is not known; its branches are not"),
        ("a.sh", f"{SCRIPT}\n{SCRIPT}", "launches Megatron-LM several times (lines 1, 2)"),
        ("a.sh", SCRIPT + ' --save "x', 'a.sh:1: a quote " is not closed; close it'),
        ("a.sh", SCRIPT + " --save ${x", "a.sh:1: a bracket { is not closed; close it"),
        ("a.sh", f"A=(\n{SCRIPT}", "a.sh:1: an array is not closed; close it"),
        ("a.sh", f"if true; then\n{SCRIPT}", "elif or else or fi is missing at the end of the script"),
        ("a.sh", "A=x; " + "A=$A$A; " * 40 + SCRIPT, "a word becomes over 1,048,576 characters"),
        ("a.sh", "A='bash -c \"$A\"'; bash -c \"$A\"; " + SCRIPT, "a.sh:1: runs 8 shells in one another"),
        ("a.sh", "$(" * 5000 + SCRIPT, "is nested too deeply; give a plain script"),
        ("a.sh", b"\xff\xfe\x00", "is not a text file (UTF-8)"),
        ("a.yaml", "tensor_parallel: 8",
         "is neither a shell script nor the TOML of torchtitan nor the JSON of DeepSpeed"),
        ("a.toml", TITAN + "tensor_parallel_degree = \"8\"",
         "tensor_parallel_degree = \"8\": expected a whole number"),
        ("a.toml", TITAN + "tensor_parallel_degree = true", "tensor_parallel_degree = true: expected a whole number"),
        ("a.toml", TITAN + "context_parallel_rotate_method = \"ring\"", "expected one of allgather, alltoall"),
        ("a.toml", TITAN + "pipeline_parallel_schedule = \"Fast\"", "expected one of 1F1B, Interleaved1F1B"),
        ("a.toml", TITAN + "pipeline_parallel_degree = 2\npipeline_parallel_layers_per_stage = 12",
         "pipeline_parallel_layers_per_stage = 12: expected what hands 32 layers to a multiple of the 2"),
        ("a.toml", TITAN + "pipeline_parallel_degree = 99999999", "at most 34 chunks, with embedding and output"),
        ("a.toml", TITAN + "pipeline_parallel_degree = 2\nmodule_fqns_per_model_part = 3", "expected a list of names"),
        ("a.sh", SCRIPT + " --pipeline-model-parallel-size 99999999999999", "expected a whole number from 1 to 2^40"),
        ("a.toml", TITAN.replace("8B", "9B"), "model.flavor: llama3 9B is none of llama3 8B"),
        ("a.toml", TITAN.replace("llama3", "deepseek_v3"), "deepseek_v3 8B is none of llama3 8B"),
        ("a.toml", TITAN + "[activation_checkpoint]\nmode = \"most\"", "mode = \"most\": expected one of none, full"),
        ("a.toml", TITAN + "[parallelism]", "not valid TOML"),
        ("a.toml", TITAN.replace("= 8", "= 0.5"), "data_parallel_shard_degree = 0.5: expected a whole number"),
        ("a.toml", TITAN + "[training]\nlocal_batch_size = 0",
         "local_batch_size = 0: expected a whole number from 1"),
        ("a.toml", TITAN.replace("[par", "converters = [\"int4\"]\n[par"),
         "converters = [\"int4\"]: expected quantize"),
        ("a.toml", "[parallelism", "not valid TOML"),
        ("a.json", "[1, 2]", "not a configuration; expected a JSON object"),
        ("a.json", "{", "not valid JSON"),
        ("a.json", deepspeed(zero_optimization={"stage": 5}),
         "zero_optimization.stage = 5: expected one of 0, 1, 2, 3"),
        ("a.json", deepspeed(fp16={"enabled": True}), "fp16.enabled = true: expected one of bf16 and fp16"),
        ("a.json", deepspeed(train_batch_size=7, train_micro_batch_size_per_gpu=2), "a multiple of micro-batch x"),
        ("a.json", deepspeed(sequence_parallel_size="four"),
         "sequence_parallel_size = \"four\": expected a whole number"),
        ("a.json", deepspeed(bf16={"enabled": "yes"}), "bf16.enabled = \"yes\": expected true or false"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line(name, text, words, tmp_path, capsys):
    options = ["--model", "llama-3-8b", "--seq-len", "2048"] if name == "a.json" else []
    status, line, out = run(tmp_path, capsys, name, text, *options)
    assert (status, out) == (2, "")
    assert line.startswith("error: ")
    assert words.replace("FILE", str(tmp_path / "a.sh")) in line


@pytest.mark.parametrize(
    ("name", "text", "words", "answer"),
    [
        ("a.sh", f"python pretrain_gpt.py {ARGUMENTS}", "how many GPUs it runs on is not said; give the replicas",
         ["--set", "plan.dp=4"]),
        ("a.sh", SCRIPT.replace("node 8", "node $N"), "--nproc-per-node $N: $N is not known",
         ["--set", "plan.dp=4"]),
        ("a.sh", SCRIPT + " --tensor-model-parallel-size $TP", "$TP is not known without running the script; give",
         ["--set", "plan.tp=2", "--set", "plan.dp=4"]),
        ("a.sh", SCRIPT + " --tensor-model-parallel-size 3", "8 GPUs are not divisible by tp x pp x cp = 3",
         ["--set", "plan.tp=2", "--set", "plan.dp=4"]),
        ("a.sh", SCRIPT.replace("--vocab-size 51200", ""), "--vocab-size is missing, it comes from the tokenizer",
         ["--set", "model.vocab=51200"]),
        ("a.sh", SCRIPT.replace("--num-layers 32", ""), "--num-layers is missing", ["--set", "model.layers=4"]),
        ("a.sh", SCRIPT.replace("--seq-length 4096", ""), "--seq-length is missing", ["--seq-len", "4K"]),
        ("a.toml", TITAN.replace("= 8", "= -1"), "data_parallel_shard_degree = -1: the ranks that are left are not",
         ["--set", "plan.dp=8"]),
        ("a.json", deepspeed(), "DeepSpeed's JSON has no model; give --model MODEL",
         ["--model", "llama-3-8b", "--seq-len", "2K"]),
        ("a.json", deepspeed(train_batch_size="auto"), "the replicas follow from train_batch_size",
         ["--model", "llama-3-8b", "--seq-len", "2K", "--set", "plan.dp=2"]),
    ],
)  # fmt: skip
def test_what_a_file_leaves_open_is_asked_and_can_be_given(name, text, words, answer, tmp_path, capsys):
    status, line, out = run(tmp_path, capsys, name, text, "--json")
    assert (status, out) == (2, "")
    assert words in line
    status, _, out = run(tmp_path, capsys, name, text, "--json", *answer)
    assert status == 0
    assert json.loads(out)["step_time_s"] > 0


@pytest.mark.slow
def test_damaged_files_are_refused_or_read(tmp_path):
    """Whatever is taken out, put in or swapped: a launch, or one line."""
    source = random.Random(2)
    pieces = [
        "'",
        '"',
        "$",
        "(",
        ")",
        "{",
        "}",
        "[",
        "]",
        "|",
        "&",
        ";",
        "<<E",
        "\\",
        "\n",
        "if ",
        "fi",
        "for ",
        "1e9",
        "null",
    ]
    outcomes = set()
    for _ in range(200):
        name = source.choice(("train_llama3_8b.sh", "train_gpt_175b.slurm", "llama3_70b.toml", "ds_config.json"))
        text = (FILES / name).read_text()
        for _ in range(source.randrange(1, 5)):
            place = source.randrange(len(text))
            gap = source.choice((0, 0, 1, 7))
            text = text[:place] + source.choice(pieces) * source.randrange(2) + text[place + gap :]
        (tmp_path / name).write_text(text)
        try:
            outcomes.add(bool(read_launch(tmp_path / name).lines))
        except InputError:
            outcomes.add("refused")
    assert outcomes == {True, "refused"}


def test_a_file_that_is_not_there(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["run", "--from", str(tmp_path / "none.sh"), "--hardware", "dgx-h100"])
    assert stop.value.code == 2
    assert "none.sh: no such file; check the path" in capsys.readouterr().err


def test_hardware_is_in_no_launch_file(tmp_path, capsys):
    (tmp_path / "a.sh").write_text(SCRIPT)
    with pytest.raises(SystemExit) as stop:
        main(["run", "--from", str(tmp_path / "a.sh")])
    assert stop.value.code == 2
    assert "a.sh: says no hardware; give --hardware" in capsys.readouterr().err


def test_a_case_file_and_a_launch_file_exclude_each_other(tmp_path, capsys):
    status, line, _ = run(tmp_path, capsys, "a.sh", SCRIPT, str(tmp_path / "case.toml"))
    assert status == 2
    assert "both say the scenario; give one" in line
