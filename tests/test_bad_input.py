"""A user's mistake is one line that names the value, the rule and the fix, with exit status 2."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from spsim.cli import main

pytestmark = pytest.mark.slow

RUN = ["run", "--model", "gpt-22b", "--hardware", "dgx-a100-80gb", "--seq-len", "2048"]
CASE = """
hardware = "dgx-a100-80gb"
[model]
layers = 2
hidden = 1024
heads = 16
vocab = 1000
[plan]
tp = 8
[workload]
seq_len = 2048
"""

FAILING_FIGURES = """
import spsim

SETTINGS = {"model": "gpt-22b", "hardware": "dgx-h100", "plan": "tp=8", "workload": {"seq_len": 2048}}


def figures(rows):
    return rows['absent']


def build():
    return spsim.Experiment(name="mine", title="Mine", points=[spsim.Point(SETTINGS)], figures=figures)
"""


def command(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of one command line."""
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    captured = capsys.readouterr()
    return int(stop.value.code or 0), captured.out, captured.err


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The single line of a refused command."""
    status, out, err = command(arguments, capsys)
    assert status == 2, (status, out, err)
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    return err


def with_plan(plan: str) -> list[str]:
    return [*RUN, "--plan", plan]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "--model", "gpt-3", "--hardware", "dgx-h100", "--seq-len", "8"], ["gpt-3", "gpt-22b"]),
        (["run", "--model", "gpt-22b", "--hardware", "dgx-x", "--seq-len", "8"], ["dgx-x", "dgx-h100"]),
        (["run", "--model", "gpt-22b", "--hardware", "dgx-h100"], ["--seq-len", "missing"]),
        (["run", "--model", "config.json", "--hardware", "dgx-h100", "--seq-len", "8"], ["config.json: no such file"]),
        ([*RUN, "--micro-batch", "0"], ["micro_batch", "0"]),
        ([*RUN, "--micro-batch", "-1"], ["micro_batch", "-1"]),
        ([*RUN, "--micro-batch", "1.5"], ["--micro-batch"]),
        ([*RUN[:-1], "0"], ["seq_len", "0"]),
        ([*RUN[:-1], "99999999999"], ["seq_len", "99999999999"]),
        ([*RUN[:-1], "many"], ["--seq-len"]),
        ([*RUN, "--micro-batch", "4", "--global-batch", "6"], ["global_batch = 6", "4"]),
        ([*RUN, "--precision", "int3"], ["precision", "int3", "bf16"]),
        ([*RUN, "--precision", "nvfp4"], ["nvfp4", "no such peak"]),
        ([*RUN, "--phase", "decode", "--plan", "tp=8,sequence_parallel"], ["decode", "no sequence to shard"]),
        ([*RUN, "--phase", "decode", "--plan", "ulysses=8"], ["decode", "no sequence to shard"]),
        ([*RUN, "--phase", "prefill", "--plan", "recompute=full"], ["recompute", "prefill", "of training"]),
        ([*RUN, "--phase", "prefill", "--plan", "pp=2"], ["pp = 2", "prefill", "not simulated yet"]),
        ([*RUN, "--phase", "prefill", "--scope", "layers", "--set", "model.attention=flash"], ["layers", "prefill"]),
        ([*RUN, "--phase", "prefill", "--set", "workload.chunk_tokens=1000", "--plan", "tp=8,sequence_parallel,ring=2"],
         ["chunk_tokens", "1000", "32"]),
        ([*RUN, "--set", "workload.chunk_tokens=1024"], ["chunk_tokens", "inference"]),
        ([*RUN, "--plan", "ring=2,ring_pass=q"], ["ring_pass", "prefill"]),
        (with_plan("tp=0"), ["tp", "0"]),
        (with_plan("tp=-8"), ["tp", "-8"]),
        (with_plan("tp=nan"), ["tp", "nan"]),
        (with_plan("tp=2.0"), ["tp", "2.0"]),
        (with_plan("tp=eight"), ["tp", "eight"]),
        (with_plan("tp=true"), ["tp", "True"]),
        (with_plan("tp=8,tp=4"), ["tp", "twice"]),
        (with_plan("=8"), ["=8"]),
        (with_plan("tp="), ["tp="]),
        (with_plan("tensor=8"), ["tensor", "unknown key"]),
        (with_plan("tp=3"), ["tp x ulysses = 3", "heads = 64"]),
        (with_plan("sequence_parallel=maybe"), ["sequence_parallel", "maybe"]),
        (with_plan("recompute=most"), ["recompute", "most", "selective"]),
        (with_plan("ring=8"), ["unfused", "flash"]),
        (["run", "--model", "llama-3-8b", "--hardware", "dgx-h100", "--seq-len", "65536", "--plan",
          "ring=512,ring_cut=contiguous"], ["ring = 512", "contiguous", "at most 256", "zigzag"]),
        ([*RUN, "--hardware", "l40s-8", "--plan", "tp=16"], ["16 GPUs", "several nodes", "l40s-8", "at most 8"]),
        (["run", "--model", "gpt-22b", "--hardware", "dgx-h100", "--seq-len", "2304", "--plan",
          "tp=4,ring=3,ring_kind=all_gather"], ["tp = 4", "blocks of 4 ranks", "nodes of 6", "unevenly"]),
        (with_plan("zero=4"), ["zero", "4"]),
        (["run", "--model", "gpt-22b", "--hardware", "dgx-h100", "--seq-len", "2050", "--plan", "ulysses=8"],
         ["2050", "2048 or 2056"]),
        (["run", "--model", "llama-3-8b", "--hardware", "dgx-h100", "--seq-len", "2056", "--plan", "ring=8"],
         ["2056", "16", "2048 or 2064"]),
        (["run", "--model", "llama-3-8b", "--hardware", "dgx-h100", "--seq-len", "1", "--plan", "ulysses=8"],
         ["seq_len = 1", "use 8"]),
        (["explain", "--model", "nobody"], ["nobody"]),
        (["explain", "--model", "gpt-22b", "--plan", "tp=7"], ["7", "heads"]),
        (["explain"], ["--model"]),
        (["list", "gpus"], ["gpus"]),
        (["simulate"], ["simulate"]),
        (["run", "--frobnicate"], ["--frobnicate"]),
        (["missing.py"], ["missing.py", "no such file"]),
        (["validate", "missing.csv"], ["missing.csv", "no such file"]),
        (["run", "missing.toml"], ["missing.toml", "no such file"]),
    ],
)  # fmt: skip
def test_refused(arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(arguments, capsys)
    for word in words:
        assert word in line


def with_batch(plan: str, global_batch: int) -> list[str]:
    return [*with_plan(plan), "--global-batch", str(global_batch)]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        # stages and layers
        (with_plan("pp=64"), ["pp x virtual_pp = 64", "layers + 2 = 50", "at most 50"]),
        (with_plan("pp=16,virtual_pp=4"), ["64 chunks", "at most 50"]),
        (with_plan("virtual_pp=2"), ["virtual_pp = 2 without pp", "add pp=N"]),
        (with_plan("pp=2,pp_layout=Et24/t23L"), ["has 47 layers", "the model has 48"]),
        (with_plan("pp=4,pp_layout=Et24/t24L"), ["has 2 chunks", "pp x virtual_pp = 4"]),
        (with_plan("pp=2,pp_layout=Et12/t12/t12/t12L"), ["has 4 chunks", "virtual_pp=2"]),
        (with_plan("pp=2,pp_layout=Et24/t24"), ["chunk 2", "end the last with L"]),
        (with_plan("pp=3,pp_layout=Et24//t24L"), ["chunk 2 holds nothing"]),
        (with_plan("pp=2,pp_layout=Et24/t24mL"), ["mtp_layers = 0", "write as many"]),
        # orders and micro-batches
        (with_batch("pp=4,virtual_pp=2", 6), ["PP4×VP2 with 6 micro-batches", "leave 2", "stages divide"]),
        (with_plan("pp=4,virtual_pp=2"), ["1 micro-batches", "group of 4"]),
        (with_batch("pp=4,virtual_pp=2,pp_group=6", 8), ["groups of 6 leave 2"]),
        (with_batch("pp=4,virtual_pp=2,pp_group=2", 8), ["group of 2", "the 4 pipeline stages"]),
        (with_batch("pp=4,virtual_pp=2,pp_sends=torch", 11), ["11 micro-batches", "2 rounds", "torch"]),
        (with_batch("pp=4,pp_sends=torch", 3), ["3 micro-batches", "3 for 4", "torch"]),
        (with_batch("pp=4,virtual_pp=2,pp_schedule=dualpipev", 7), ["7 micro-batches", "8, not 7"]),
        (with_batch("pp=4,pp_schedule=zbv", 8), ["zbv", "2 chunks", "virtual_pp=2"]),
        (with_batch("pp=4,virtual_pp=3,pp_schedule=dualpipev", 8), ["not 3", "virtual_pp=2"]),
        (with_batch("pp=4,virtual_pp=2,pp_schedule=gpipe", 8), ["gpipe", "not 2", "looped_bfs"]),
        (with_batch("pp=4,virtual_pp=2,pp_schedule=zbv,pp_sends=megatron", 8), ["Megatron-Core", "zbv"]),
        (with_plan("pp=4,pp_schedule=zero_bubble"), ["pp_schedule", "zero_bubble", "zbv"]),
        # messages between stages
        (with_batch("pp=4,pp_overlap", 8), ["pp_overlap = True", "1F1B", "leave it out"]),
        (with_batch("pp=2,virtual_pp=2,pp_overlap=false", 8), ["pp_overlap = False", "2 stages", "swapped"]),
        (with_batch("pp=4,pp_warmup_flush", 8), ["pp_warmup_flush", "virtual_pp"]),
        (with_batch("pp=4,virtual_pp=2,pp_overlap=false,pp_warmup_flush", 8), ["pp_warmup_flush", "pp_overlap=false"]),
        # replicas
        (with_batch("dp=4", 6), ["global_batch = 6", "micro_batch x dp = 4"]),
        (with_batch("dp=8", 4), ["global_batch = 4", "micro_batch x dp = 8"]),
        (with_plan("dp=2,zero=3,distributed_optimizer"), ["distributed_optimizer", "zero = 3", "keep one"]),
        (with_plan("pp=2,dp=2,zero=2"), ["zero = 2 with pp = 2", "'megatron'", "zero=1"]),
        (with_plan("pp=2,dp=2,zero=3,dp_library=deepspeed"), ["zero = 3 with pp = 2", "'deepspeed'"]),
        (with_plan("dp=2,zero=2,dp_library=ddp"), ["zero = 2", "'ddp'", "dp_library=fsdp"]),
        (with_plan("dp=2,zero=1,dp_library=ddp"), ["zero = 1", "'ddp'", "dp_library=megatron"]),
        (with_plan("dp=4,zero=3,shard_group=2,dp_library=deepspeed"), ["shard_group = 2", "'deepspeed'"]),
        (with_plan("dp=2,dp_library=fsdp"), ["'fsdp' with zero = 0", "zero=3"]),
        (with_plan("dp=4,zero=3,shard_group=3"), ["shard_group = 3", "dp = 4", "divisor"]),
        (with_plan("dp=4,distributed_optimizer,shard_group=2"), ["shard_group = 2", "add zero=3"]),
        (with_plan("dp=2,dp_overlap=parameters"), ["'parameters'", "add distributed_optimizer"]),
        (with_plan("dp=2,dp_overlap=sometimes"), ["dp_overlap", "sometimes"]),
        (with_plan("dp=2,bucket_elements=0"), ["bucket_elements", "0"]),
        (with_plan("tp=8,pp=64,dp=4096"), ["2,097,152 GPUs", "1,048,576"]),
        # gradients and the optimizer
        ([*with_plan("grad_dtype=bf16"), "--precision", "fp32"], ["grad_dtype = 'bf16'", "fp32"]),
        (with_plan("grad_dtype=fp16"), ["grad_dtype", "fp16", "bf16"]),
        (with_plan("dp=2,moment_dtype=bf16,distributed_optimizer"), ["moment_dtype", "precision_aware_optimizer"]),
        (with_plan("dp=2,precision_aware_optimizer"), ["precision_aware_optimizer", "add distributed_optimizer"]),
        # recomputation, overlap and the host
        (with_plan("recompute_layers=2"), ["recompute_layers = 2", "recompute=full"]),
        (with_plan("pp=4,recompute=full,recompute_layers=13"), ["recompute_layers = 13", "12 layers", "at most 12"]),
        (with_plan("recompute=full,recompute_method=uniform"), ["'uniform'", "recompute_layers"]),
        (with_plan("recompute=full,recompute_modules=mlp"), ["recompute_modules", "recompute=selective"]),
        (with_plan("recompute=selective,recompute_modules=mlp+attn"), ["'attn'", "core_attn, layernorm, mla_up"]),
        (with_plan("recompute=selective,recompute_modules=mlp+mlp"), ["'mlp+mlp'", "twice"]),
        (with_plan("recompute=selective,recompute_modules=moe_act"), ["moe_act", "has no experts"]),
        (with_plan("tp=8,tp_overlap"), ["tp_overlap", "add sequence_parallel"]),
        (with_plan("pp=2,cpu_offload_layers=4"), ["cpu_offload_layers = 4 with pp = 2", "recompute"]),
        (with_plan("cpu_offload_layers=48"), ["cpu_offload_layers = 48", "at most 47"]),
        (with_plan("cpu_offload_layers=4,cuda_graphs=per_layer"), ["cpu_offload_layers = 4", "'per_layer'"]),
    ],
)  # fmt: skip
def test_options_of_the_whole_step_that_exclude_each_other(
    arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused(arguments, capsys)
    for word in words:
        assert word in line


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("layers = 2", "layers = 0", ["layers", "0"]),
        ("layers = 2", "layers = 100000", ["layers", "100000"]),
        ("layers = 2", 'layers = "two"', ["layers", "two"]),
        ("layers = 2", "layers = 2.5", ["layers", "2.5"]),
        ("layers = 2", "layers = true", ["layers", "True"]),
        ("hidden = 1024", "hidden = 1000", ["1000", "heads 16"]),
        ("hidden = 1024", "", ["hidden", "missing"]),
        ("heads = 16", "heads = 16\nkv_heads = 3", ["kv_heads 3", "16"]),
        ("heads = 16", "heads = 16\nkv_heads = 32", ["kv_heads 32"]),
        ("vocab = 1000", "vocab = 1000\ndropout = 1.0", ["dropout", "1.0"]),
        ("vocab = 1000", "vocab = 1000\ndropout = nan", ["dropout", "nan"]),
        ("vocab = 1000", "vocab = 1000\nffn_hidden = 100", ["100", "tp"]),
        ("vocab = 1000", "vocab = 1000\nexperts = 8", ["experts_per_token", "1 to 8"]),
        ("vocab = 1000", "vocab = 1000\ngated_mlp = true", ["ffn_hidden", "missing"]),
        ("tp = 8", "tp = 8\nsp = 8", ["sequence_parallel = 8", "ulysses=N", "ring=N"]),
        ("[workload]", "[load]", ["load: unknown key", "did you mean workload?"]),
        ("layers = 2", "layers = " + "[" * 5000, ["nested"]),
        ("vocab = 1000", 'vocab = 1000\nname = "[/red]"\nffn_hidden = 100', ["100", "tp"]),
        ("seq_len = 2048", "", ["seq_len", "missing"]),
        ("seq_len = 2048", "seq_len = inf", ["seq_len", "inf"]),
        ("[plan]", "[plan", ["not valid TOML", "line"]),
        ('hardware = "dgx-a100-80gb"', "hardware = 8", ["hardware"]),
    ],
)
def test_case_file_refused(
    old: str, new: str, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "case.toml"
    path.write_text(CASE.replace(old, new))
    line = refused(["run", str(path), "--out", str(tmp_path / "out")], capsys)
    for word in words:
        assert word in line
    assert not (tmp_path / "out").exists()


def test_binary_directory_and_empty_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    binary = tmp_path / "binary.toml"
    binary.write_bytes(b"\xff\xfe\x00\x01")
    assert "not a text file" in refused(["run", str(binary)], capsys)
    assert "directory" in refused(["run", str(tmp_path)], capsys)
    empty = tmp_path / "empty.toml"
    empty.write_text("")
    assert "hardware" in refused(["run", str(empty)], capsys)


def test_names_in_brackets_are_not_markup(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "case.toml"
    path.write_text(CASE.replace("layers = 2", 'name = "[bold]mine[/bold]"\nlayers = 2'))
    status, out, err = command(["run", str(path)], capsys)
    assert (status, err) == (0, "")
    assert "[bold]mine[/bold]" in out


def test_a_byte_order_mark_is_accepted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "case.toml"
    path.write_bytes(b"\xef\xbb\xbf" + CASE.encode())
    assert command(["run", str(path), "--json"], capsys)[0] == 0


def test_model_file_whose_model_is_no_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "model.toml"
    path.write_text('model = "gpt-22b"\n')
    line = refused(["run", "--model", str(path), "--hardware", "dgx-h100", "--seq-len", "2048"], capsys)
    assert "table" in line


def test_outputs_all_or_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One output that can't be written leaves none behind."""
    out = tmp_path / "out"
    (out / "spans.csv").mkdir(parents=True)
    assert "spans.csv" in refused([*with_plan("tp=8"), "--out", str(out)], capsys)
    assert [path.name for path in out.iterdir()] == ["spans.csv"]


def test_comparison_outputs_all_or_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    (out / "comparison.json").mkdir(parents=True)
    arguments = ["compare", *RUN[1:], "--plan", "tp=8", "--plan", "ulysses=8", "--out", str(out)]
    assert "comparison.json" in refused(arguments, capsys)
    assert [path.name for path in out.iterdir()] == ["comparison.json"]


def test_empty_out(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--out is empty" in refused([*with_plan("tp=8"), "--out", ""], capsys)


@pytest.mark.parametrize("name", ["run", "compare", "explain"])
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--set", "model.attention"], ["--set 'model.attention'", "setting=value"]),
        (["--set", "=flash"], ["--set '=flash'", "setting=value"]),
        (["--set", "attention=flash"], ["attention is no setting", "model.attention=flash"]),
        (["--set", "modle.attention=flash"], ["modle.attention is no setting"]),
        (["--set", "model.attnetion=flash"], ["attnetion: unknown key", "did you mean attention?"]),
        (["--set", "model.attention=fast"], ["attention", "'flash', 'unfused', 'flash_attention_2'", "fast"]),
        (["--set", "plan.recompute=most"], ["recompute", "most", "selective"]),
        (["--set", "plan.squence_parallel=true"], ["did you mean sequence_parallel?"]),
        (["--set", "workload.seq_len=0"], ["seq_len", "0"]),
        (["--set", "hardware.overlap_slowdown=0"], ["hardware.overlap_slowdown", "copy of the file"]),
        (["--set", "nodes=3"], ["nodes = 3"]),
        (["--seq-len", "64KB"], ["--seq-len", "64KB", "64K"]),
        (["--nodes", "3"], ["nodes = 3"]),
        (["--hardware", "h100"], ["dgx-h100, h100-pcie-8"]),
    ],
)  # fmt: skip
def test_changes_refused(
    name: str, arguments: list[str], words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same in every command that takes a scenario."""
    path = tmp_path / "case.toml"
    path.write_text(CASE)
    more = ["--plan", "tp=4"] if name == "compare" else []
    line = refused([name, str(path), *more, *arguments], capsys)
    for word in words:
        assert word in line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([*RUN, "--plan", "tp=8", "--plan", "ulysses=8"], ["--plan is given 2 times", "compare"]),
        (["compare", *RUN[1:], "--plan", "tp=8", "--plan", "TP8"], ["TP8", "twice"]),
        (["compare", "--hardware", "dgx-h100", "--plan", "tp=8"], ["compare: --model is missing"]),
        (["explain", "--model", "gpt-22b", "--nodes", "2"], ["explain: --hardware is missing"]),
    ],
)
def test_options_that_do_not_go_together(
    arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused(arguments, capsys)
    for word in words:
        assert word in line


def test_what_is_no_regular_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Devices and pipes are not opened: they may have no end, or never begin."""
    os.mkfifo(tmp_path / "pipe.toml")
    for path in ("/dev/zero", str(tmp_path / "pipe.toml")):
        assert "no regular file" in refused(["run", path], capsys)
        assert "no regular file" in refused(["validate", path], capsys)
    assert "no regular file" in refused([*RUN, "--model", str(tmp_path / "pipe.toml")], capsys)
    (tmp_path / "config.json").symlink_to("/dev/zero")
    assert "no regular file" in refused([*RUN, "--model", str(tmp_path)], capsys)


def test_a_file_that_is_too_large(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(2**40)
    assert "has over 64 MiB" in refused([*RUN, "--model", str(tmp_path)], capsys)


def test_control_characters_are_written_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In messages and in names, of files, keys and values."""
    path = tmp_path / "case.toml"
    path.write_text(CASE.replace("layers = 2", 'layers = 2\nname = "a\\u001b[31mb"'))
    status, out, _ = command(["run", str(path)], capsys)
    assert (status, "\x1b" in out, "a\\x1b[31mb on" in out) == (0, False, True)
    path.write_text(CASE.replace("layers = 2", 'layers = 2\n"\\u001b[31m" = 1'))
    assert "\\x1b[31m: unknown key" in refused(["run", str(path)], capsys)
    for arguments in (with_plan("tp=8,\x1b[31m"), ["run", "\x1b[31m.toml"], ["\x1b[31m"], ["run", "--\x1b[31m"]):
        line = refused(arguments, capsys)
        assert "\\x1b[31m" in line
        assert "\x1b" not in line


def test_profile_with_a_wrong_unit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`gbps` is ambiguous and no key of the schema."""
    from spsim.inputs.resources import profiles_directory

    text = (profiles_directory() / "dgx-h100.toml").read_text()
    path = tmp_path / "wrong.toml"
    path.write_text(text.replace("bandwidth_gb_per_s = { value = 3350", "bandwidth_gbps = { value = 3350"))
    line = refused(["run", "--model", "gpt-22b", "--hardware", str(path), "--seq-len", "2048"], capsys)
    assert "bandwidth_gb" in line


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("def build(:\n", ["line 1", "SyntaxError"]),
        ("raise RuntimeError('broken')\n", ["RuntimeError", "broken"]),
        ("x = 1\n", ["build()"]),
        ("def build():\n    return 3\n", ["Experiment"]),
        ("def build():\n    return 1 / 0\n", ["line 2", "ZeroDivisionError"]),
        ("import spsim\ndef build():\n    return spsim.Experiment('e', 'E', [])\n", ["no points"]),
    ],
)
def test_experiment_file_refused(
    text: str, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "broken.py"
    path.write_text(text)
    line = refused([str(path), "--out", str(tmp_path / "results")], capsys)
    for word in words:
        assert word in line
    assert not (tmp_path / "results").exists()


def test_experiment_whose_figures_fail(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The rows that were simulated stay."""
    path = tmp_path / "mine.py"
    path.write_text(FAILING_FIGURES)
    status, _, err = command([str(path), "--out", str(tmp_path / "results")], capsys)
    assert status == 2
    assert "line 8: KeyError" in err
    assert err.count("\n") == 1
    assert len((tmp_path / "results" / "mine" / "rows.jsonl").read_text().splitlines()) == 1


def test_damaged_rows_are_simulated_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "mine.py"
    path.write_text(FAILING_FIGURES.replace("rows['absent']", "{}"))
    rows = tmp_path / "mine" / "rows.jsonl"
    rows.parent.mkdir()
    rows.write_bytes(b'\xff\xfe\n{"key": "k"}\n[1]\n' + b"[" * 100_000 + b"\n{")
    with pytest.raises(SystemExit) as stop:
        main([str(path), "--out", str(tmp_path)])
    assert stop.value.code == 0, capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["column"]),
        ("case_id,family\nx,y\n", ["column", "hardware"]),
        (f'case_id,"{"x" * 200_000}', ["line 1", "quotation marks"]),
        ("case_id\rx\n", ["column", "family"]),
    ],
)
def test_measured_file_refused(text: str, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "measured.csv"
    path.write_text(text)
    line = refused(["validate", str(path)], capsys)
    for word in words:
        assert word in line


def test_measured_value_that_is_no_number(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from spsim.inputs.resources import measured_cases

    header, first, *_ = measured_cases()[0].read_text().splitlines()
    columns = header.split(",")
    cells = first.split(",")
    cells[columns.index("tp")] = "eight"
    path = tmp_path / "measured.csv"
    path.write_text("\n".join([header, ",".join(cells)]))
    line = refused(["validate", str(path)], capsys)
    assert "line 2" in line
    assert "tp" in line


@pytest.mark.parametrize(
    "arguments",
    [
        [*RUN, "--json"],
        [*with_plan("tp=8,sequence_parallel"), "--micro-batch", "4", "--global-batch", "8", "--json"],
        [*with_plan("tp=1,sequence_parallel"), "--json"],
        [*with_plan("ring=8,ring_kind=all_gather"), "--json"],
        ["run", "--model", "llama-3-8b", "--hardware", "dgx-h100", "--seq-len", "2048", "--plan", "ring=8", "--json"],
        ["run", "--model", "llama-3-8b", "--hardware", "cpu-2", "--seq-len", "128", "--plan", "tp=2", "--json"],
        ["explain", "--model", "gpt-22b", "--plan", "tp=8", "--json"],
        ["list", "hardware"],
        ["validate", "--json"],
    ],
)  # fmt: skip
def test_accepted(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = command(arguments, capsys)
    assert (status, err) == (0, "")
    assert out


def test_the_installed_entry_point_says_the_same() -> None:
    """The real process: one line on stderr, nothing on stdout, status 2."""
    done = subprocess.run(
        [sys.executable, "-m", "spsim", *with_plan("tp=3")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "command_line", [["explain", "--model", "gpt-22b", "--plan", "tp=8"], [*RUN, "--plan", "tp=8"]]
)
def test_standard_output_of_another_encoding(command_line: list[str]) -> None:
    """What it does not have is spelled in ASCII."""
    usual, *others = (
        subprocess.run(
            [sys.executable, "-m", "spsim", *command_line],
            capture_output=True,
            env={**os.environ, "PYTHONIOENCODING": name},
        )
        for name in ("utf-8", "cp1252", "latin-1", "ascii")
    )
    for done in others:
        assert (done.returncode, done.stderr) == (0, b"")
        assert done.stdout.count(b"?") == usual.stdout.count(b"?")
        if "explain" in command_line:
            assert b"s b h, h -> s b h" in done.stdout


@pytest.mark.parametrize("more", [[], ["--json"]])
def test_standard_output_that_is_closed(more: list[str]) -> None:
    arguments = " ".join([sys.executable, "-m", "spsim", *RUN, "--plan", "tp=8", *more])
    done = subprocess.run(["sh", "-c", f"{arguments} >&-"], stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2
    assert done.stderr == "error: standard output is closed; redirect it to a file or to /dev/null\n"
