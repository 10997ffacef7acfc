"""config.json of Hugging Face transformers: published parameter counts, and one line for what is not simulated."""

import json
from pathlib import Path
from typing import Any

import pytest

from spsim import Scenario, Workload, simulate, sweep
from spsim.cli import main
from spsim.errors import InputError
from spsim.inputs.presets import PRESETS, load_model

# The keys of the released files that say shapes, traits or nothing (rope_theta, torch_dtype, ...).
LLAMA = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "vocab_size": 32000, "max_position_embeddings": 4096, "hidden_act": "silu",
    "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "torch_dtype": "float16", "rope_scaling": None,
}  # fmt: skip
MISTRAL = {
    "model_type": "mistral", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32000, "max_position_embeddings": 32768,
    "hidden_act": "silu", "sliding_window": None, "rope_theta": 1000000.0,
}  # fmt: skip
QWEN2 = {
    "model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
    "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064, "max_position_embeddings": 131072,
    "hidden_act": "silu", "max_window_layers": 28, "sliding_window": 4096, "use_sliding_window": False,
}  # fmt: skip
QWEN3 = {
    "model_type": "qwen3", "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
    "max_position_embeddings": 40960, "hidden_act": "silu", "attention_bias": False, "sliding_window": None,
}  # fmt: skip
GPT2 = {
    "model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_head": 12, "n_ctx": 1024, "n_positions": 1024,
    "vocab_size": 50257, "activation_function": "gelu_new", "attn_pdrop": 0.1, "resid_pdrop": 0.1,
}  # fmt: skip
GPT_NEOX = {
    "model_type": "gpt_neox", "hidden_size": 6144, "intermediate_size": 24576, "num_hidden_layers": 44,
    "num_attention_heads": 64, "vocab_size": 50432, "max_position_embeddings": 2048, "hidden_act": "gelu_fast",
    "rotary_pct": 0.25, "tie_word_embeddings": False, "layer_norm_eps": 1e-5,
}  # fmt: skip
PHI3 = {
    "model_type": "phi3", "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32064, "max_position_embeddings": 131072,
    "hidden_act": "silu", "sliding_window": 262144, "resid_pdrop": 0.0, "rope_scaling": {"type": "longrope"},
}  # fmt: skip
GEMMA = {
    "model_type": "gemma", "hidden_size": 3072, "intermediate_size": 24576, "num_hidden_layers": 28,
    "num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 256, "vocab_size": 256000,
    "max_position_embeddings": 8192, "hidden_act": "gelu",
}  # fmt: skip
NEMOTRON = {
    "model_type": "nemotron", "hidden_size": 6144, "intermediate_size": 24576, "num_hidden_layers": 32,
    "num_attention_heads": 48, "num_key_value_heads": 8, "vocab_size": 256000, "max_position_embeddings": 4096,
    "hidden_act": "relu2", "partial_rotary_factor": 0.5, "norm_eps": 1e-5,
}  # fmt: skip
FAMILIES = [LLAMA, MISTRAL, QWEN2, QWEN3, GPT2, GPT_NEOX, PHI3, GEMMA, NEMOTRON]
FAMILY_NAMES = [config["model_type"] for config in FAMILIES]


def written(tmp_path: Path, config: Any, name: str = "config.json") -> Path:
    """A file with the config: an object, or text as it is."""
    path = tmp_path / name
    path.write_text(config if isinstance(config, str) else json.dumps(config))
    return path


def refused(tmp_path: Path, config: Any) -> str:
    """The line that refuses a config, without the path it begins with."""
    path = written(tmp_path, config)
    with pytest.raises(InputError) as caught:
        load_model(path)
    line = str(caught.value)
    assert "\n" not in line
    assert line.startswith(f"{path}: ")
    return line.removeprefix(f"{path}: ")


# ------------------------------------------------------------ parameters


@pytest.mark.parametrize(
    ("config", "published"),
    [
        (LLAMA, 6_738_415_616),
        (MISTRAL, 7_241_732_096),
        (QWEN2, 7_615_616_512),
        (QWEN3, 8_190_735_360),
        (GPT2, 124_439_808),
        (GPT_NEOX, 20_554_567_680),
        (PHI3, 3_821_079_552),
        (GEMMA, 8_537_680_896),
        (NEMOTRON, 15_628_775_424),
    ],
    ids=FAMILY_NAMES,
)
def test_parameters_are_exact(config: dict[str, Any], published: int, tmp_path: Path) -> None:
    """Sums of the tensors of the released checkpoints: meta-llama/Llama-2-7b-hf, mistralai/Mistral-7B-v0.2,
    Qwen/Qwen2.5-7B, Qwen/Qwen3-8B, openai-community/gpt2, EleutherAI/gpt-neox-20b,
    microsoft/Phi-3-mini-128k-instruct, google/gemma-7b. Nemotron-4 15B was not released: by hand it is
    2 v h + 32 (h (48 + 16) 128 + h h + 2 h f + 4 h) + 2 h, and `test_models` compares that with the paper.
    """
    assert load_model(written(tmp_path, config)).parameters == published


@pytest.mark.parametrize("config", FAMILIES, ids=FAMILY_NAMES)
def test_the_layer_has_the_parameters_that_the_model_counts(config: dict[str, Any], tmp_path: Path) -> None:
    """The sum over operators of one layer, against the closed form of `Model`."""
    found = simulate(
        Scenario(hardware="dgx-h100", model=written(tmp_path, config), workload=Workload(seq_len=64, micro_batch=1))
    )
    assert found.program.parameters == found.scenario.model.layer_parameters


@pytest.mark.parametrize(
    ("config", "preset"),
    [(LLAMA, "llama-2-7b"), (MISTRAL, "mistral-7b"), (NEMOTRON, "nemotron-4-15b")],
    ids=["llama", "mistral", "nemotron"],
)
def test_a_config_is_the_preset_of_its_model(config: dict[str, Any], preset: str, tmp_path: Path) -> None:
    """All but the name, and the positions, which are no table under rotary positions."""
    ignored = {"name", "max_positions"}
    found = load_model(written(tmp_path, config)).model_dump(exclude=ignored)
    assert found == PRESETS[preset].model_dump(exclude=ignored)


# ------------------------------------------------------------ traits


def test_traits_of_the_families(tmp_path: Path) -> None:
    found = {config["model_type"]: load_model(written(tmp_path, config)) for config in FAMILIES}

    def those(trait: str, value: Any) -> set[str]:
        return {name for name, model in found.items() if getattr(model, trait) == value}

    assert those("activation", "gelu") == {"gpt2", "gpt_neox"}
    assert those("activation", "squared_relu") == {"nemotron"}
    assert those("activation", "geglu") == {"gemma"}
    assert those("activation", "swiglu") == {"llama", "mistral", "qwen2", "qwen3", "phi3"}
    assert those("norm", "layernorm") == {"gpt2", "gpt_neox", "nemotron"}
    assert those("positions", "learned") == {"gpt2"}
    assert those("positions", "none") == set()
    assert those("bias", True) == {"gpt2", "gpt_neox"}
    assert those("qkv_bias", True) == {"gpt2", "gpt_neox", "qwen2"}
    assert those("qk_norm", True) == {"qwen3"}
    assert those("parallel_residual", True) == {"gpt_neox"}
    assert those("tied_embeddings", True) == {"gpt2", "gemma"}
    assert those("dropout", 0.1) == {"gpt2"}
    assert those("attention", "flash") == set(found)


def test_what_a_file_leaves_out_is_what_the_family_assumes(tmp_path: Path) -> None:
    """No KV heads: as many as heads; n_inner null: 4 x n_embd; Gemma's head size is 256, Qwen3's 128."""
    assert load_model(written(tmp_path, LLAMA)).kv_heads == 32
    assert load_model(written(tmp_path, {**GPT2, "n_inner": None})).ffn_hidden == 3072
    assert load_model(written(tmp_path, {**GPT2, "n_inner": 1000})).ffn_hidden == 1000
    assert load_model(written(tmp_path, {**GEMMA, "head_dim": None})).head_dim == 192
    without = {key: value for key, value in {**GEMMA, "num_attention_heads": 8}.items() if key != "head_dim"}
    assert load_model(written(tmp_path, {**without, "num_key_value_heads": 8})).head_dim == 256
    without = {key: value for key, value in {**QWEN3, "hidden_size": 2048}.items() if key != "head_dim"}
    assert load_model(written(tmp_path, without)).head_dim == 128


def test_a_sequential_gpt_neox_and_a_llama_with_biases(tmp_path: Path) -> None:
    assert not load_model(written(tmp_path, {**GPT_NEOX, "use_parallel_residual": False})).parallel_residual
    assert load_model(written(tmp_path, {**LLAMA, "attention_bias": True, "mlp_bias": True})).bias


def test_a_file_a_directory_and_their_names(tmp_path: Path) -> None:
    """A config.json is named after its directory, any other file after itself."""
    directory = tmp_path / "my-llama"
    directory.mkdir()
    written(directory, LLAMA)
    assert load_model(directory).name == load_model(str(directory / "config.json")).name == "my-llama"
    assert load_model(written(tmp_path, LLAMA, "other.json")).name == "other"


# ------------------------------------------------------------ heads


@pytest.mark.parametrize(
    ("config", "architecture", "head"),
    [
        (MISTRAL, "MistralForCausalLM", 32000 * 4096),
        (MISTRAL, "MistralModel", 0),
        (LLAMA, "LLaMAForCausalLM", 32000 * 4096),
        (GPT2, "GPT2LMHeadModel", 0),
        (GPT2, "GPT2Model", 0),
        (GPT2, "GPT2ForSequenceClassification", 2 * 768),
        ({**LLAMA, "num_labels": 1}, "LlamaForSequenceClassification", 4096),
        ({**LLAMA, "id2label": {"0": "LABEL_0"}}, "LlamaForSequenceClassification", 4096),
        ({**LLAMA, "id2label": {"0": "bad", "1": "good", "2": "best"}}, "LlamaForSequenceClassification", 3 * 4096),
        (LLAMA, "LlamaForSequenceClassification", 2 * 4096),
        (LLAMA, "LlamaForRewardModel", 4096),
        ({**LLAMA, "num_labels": 2}, "LlamaForTokenClassification", 2 * 4096 + 2),
        (LLAMA, "LlamaForQuestionAnswering", 2 * 4096 + 2),
        ({**GEMMA, "num_labels": 1}, "GemmaForSequenceClassification", 3072),
    ],
)
def test_the_class_decides_about_the_head(config: dict[str, Any], architecture: str, head: int, tmp_path: Path) -> None:
    """Bodies have none; a tied head is the embedding; a classifier has a row a label, two where none are named."""
    body = load_model(written(tmp_path, {**config, "architectures": ["Model"]}))
    assert (
        load_model(written(tmp_path, {**config, "architectures": [architecture]})).parameters - body.parameters == head
    )


def test_published_counts_without_a_head(tmp_path: Path) -> None:
    """Tensors of intfloat/e5-mistral-7b-instruct, and of Skywork/Skywork-Reward-Llama-3.1-8B (one row of 4096)."""
    assert load_model(written(tmp_path, {**MISTRAL, "architectures": ["MistralModel"]})).parameters == 7_110_660_096
    reward = {
        **LLAMA, "intermediate_size": 14336, "num_key_value_heads": 8, "vocab_size": 128256, "num_labels": 1,
        "architectures": ["LlamaForSequenceClassification"],
    }  # fmt: skip
    assert load_model(written(tmp_path, reward)).parameters == 7_504_928_768


def test_a_file_without_a_class_has_the_head_of_a_language_model(tmp_path: Path) -> None:
    for absent in (None, []):
        found = load_model(written(tmp_path, {**LLAMA, "architectures": absent}))
        assert found.parameters == PRESETS["llama-2-7b"].parameters


# ------------------------------------------------------------ more families

GENERAL = {
    "hidden_size": 256, "intermediate_size": 640, "num_hidden_layers": 3, "num_attention_heads": 8,
    "num_key_value_heads": 2, "vocab_size": 1000,
}  # fmt: skip
OLD = {"n_embd": 256, "n_layer": 3, "n_head": 8, "n_positions": 512, "vocab_size": 1000}


@pytest.mark.parametrize(
    ("family", "keys", "parameters"),
    [
        ("llama", GENERAL, 2_479_872),
        ("granite", GENERAL, 2_479_872),
        ("granite", {**GENERAL, "tie_word_embeddings": True}, 2_223_872),
        ("granite", {**GENERAL, "attention_bias": True, "mlp_bias": True}, 2_486_400),
        ("internlm2", {**GENERAL, "bias": False}, 2_479_872),
        ("internlm3", GENERAL, 3_954_432),
        ("internlm3", {**GENERAL, "qkv_bias": True, "bias": True}, 3_964_416),
        ("minicpm", {**GENERAL, "scale_emb": 12}, 2_479_872),
        ("Yi", GENERAL, 2_479_872),
        ("exaone", {**{k: v for k, v in GENERAL.items() if k != "num_hidden_layers"}, "num_layers": 3}, 2_479_872),
        ("xverse", GENERAL, 2_479_872),
        ("aquila", GENERAL, 2_479_872),
        ("hunyuan_v1_dense", {**GENERAL, "head_dim": 32}, 2_480_064),
        ("glm", GENERAL, 3_959_040),
        ("seed_oss", GENERAL, 3_959_040),
        ("seed_oss", {**GENERAL, "attention_bias": False}, 3_954_432),
        ("ministral3", GENERAL, 3_954_432),
        ("ernie4_5", GENERAL, 3_698_432),
        ("arcee", GENERAL, 1_988_352),
        ("stablelm", GENERAL, 2_481_664),
        ("stablelm", {**GENERAL, "use_qkv_bias": True}, 2_482_816),
        ("starcoder2", GENERAL, 1_738_752),
        ("gpt_bigcode", OLD, 2_411_456),
        ("gpt_bigcode", {**OLD, "multi_query": False}, 2_756_864),
    ],
)
def test_small_models_count_as_those_of_transformers(
    family: str, keys: dict[str, Any], parameters: int, tmp_path: Path
) -> None:
    """Parameters of `AutoModelForCausalLM.from_config` on the meta device, transformers 5.24; those of InternLM2,
    MiniCPM, XVERSE, Aquila and Yi, whose code is beside their weights, are Llama's.
    """
    assert load_model(written(tmp_path, {"model_type": family, **keys})).parameters == parameters


def test_gpt2_under_the_general_names(tmp_path: Path) -> None:
    general = {
        "model_type": "gpt2", "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
        "max_position_embeddings": 1024, "vocab_size": 50257,
    }  # fmt: skip
    assert load_model(written(tmp_path, general)) == load_model(written(tmp_path, GPT2))
    assert refused(tmp_path, {**general, "hidden_size": "768"}).startswith("hidden_size: ")
    line = refused(tmp_path, {**GPT2, "hidden_size": 1024})
    assert "n_embd and hidden_size are the same and differ" in line


def test_the_first_llama_files_have_no_positions(tmp_path: Path) -> None:
    first = {key: value for key, value in LLAMA.items() if key != "max_position_embeddings"}
    old = {**first, "max_sequence_length": 2048, "architectures": ["LLaMAForCausalLM"]}
    assert load_model(written(tmp_path, old)).parameters == 6_738_415_616


def test_an_embedding_model_may_look_at_all_positions(tmp_path: Path) -> None:
    assert not load_model(written(tmp_path, {**QWEN2, "is_causal": False})).causal


@pytest.mark.parametrize("key", ["qk_layernorm", "use_parallel_residual"])
def test_what_a_family_may_ask_for_and_is_not_simulated(key: str, tmp_path: Path) -> None:
    assert f"{key} is not simulated yet" in refused(tmp_path, {"model_type": "stablelm", **GENERAL, key: True})


# ------------------------------------------------------------ multimodal files

MISTRAL_SMALL = {
    "architectures": ["Mistral3ForConditionalGeneration"], "model_type": "mistral3",
    "text_config": {
        "model_type": "mistral", "head_dim": 128, "hidden_size": 5120, "intermediate_size": 32768,
        "num_hidden_layers": 40, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 131072,
        "max_position_embeddings": 131072, "sliding_window": None,
    },
    "vision_config": {"model_type": "pixtral", "hidden_size": 1024},
}  # fmt: skip
LLAVA = {
    "architectures": ["LlavaForConditionalGeneration"], "model_type": "llava",
    "text_config": {"model_type": "llama", "max_position_embeddings": 4096, "vocab_size": 32064},
    "vision_config": {"model_type": "clip_vision_model", "hidden_size": 1024},
}  # fmt: skip
PALIGEMMA = {
    "architectures": ["PaliGemmaForConditionalGeneration"], "model_type": "paligemma",
    "text_config": {
        "model_type": "gemma", "hidden_size": 2048, "intermediate_size": 16384, "num_attention_heads": 8,
        "num_hidden_layers": 18, "num_key_value_heads": 1, "vocab_size": 257216,
    },
    "vision_config": {"model_type": "siglip_vision_model", "hidden_size": 1152},
}  # fmt: skip
QWEN2_VL = {
    **QWEN2, "model_type": "qwen2_vl", "architectures": ["Qwen2VLForConditionalGeneration"],
    "vision_config": {"embed_dim": 1280, "hidden_size": 3584, "model_type": "qwen2_vl"},
}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "parameters"),
    [
        (MISTRAL_SMALL, 23_572_403_200),
        ({**MISTRAL_SMALL, "architectures": ["Mistral3Model"]}, 23_572_403_200 - 131072 * 5120),
        (LLAVA, 6_738_939_904),
        ({**LLAVA, "architectures": ["LlavaModel"]}, 6_738_939_904 - 32064 * 4096),
        (PALIGEMMA, 2_508_662_784),
        (QWEN2_VL, 7_615_616_512),
    ],
    ids=["mistral3", "mistral3 body", "llava", "llava body", "paligemma", "qwen2_vl"],
)
def test_the_language_model_of_a_multimodal_file(config: dict[str, Any], parameters: int, tmp_path: Path) -> None:
    """Tensors of the language models of mistralai/Mistral-Small-3.1-24B-Base-2503, llava-hf/llava-1.5-7b-hf (whose
    table leaves out what is equal to the first Llama), google/paligemma-3b-pt-224 and Qwen/Qwen2-VL-7B; a note says so.
    """
    found = load_model(written(tmp_path, config))
    assert found.parameters == parameters
    scenario = Scenario(hardware="dgx-h100", model=found, workload=Workload(seq_len=64))
    assert [note for note in scenario.notes if "the language model alone: vision_config is left out" in note]
    assert simulate(scenario).to_json()["notes"] == list(scenario.notes)


@pytest.mark.parametrize("command", ["run", "compare", "explain"])
def test_every_command_says_what_is_left_out(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plans = ["--plan", "tp=2", "--plan", "ulysses=2"] if command == "compare" else ["--plan", "tp=2"]
    path = str(written(tmp_path, PALIGEMMA))
    with pytest.raises(SystemExit) as ended:
        main([command, "--model", path, "--hardware", "dgx-h100", "--seq-len", "1K", *plans])
    assert ended.value.code == 0
    assert "the language model alone: vision_config is left out" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("table", "parameters"),
    [
        ({"model_type": "llama"}, 666_914_816),
        ({"model_type": "llama", "num_attention_heads": 64}, 666_914_816),
        ({"model_type": "mistral", "sliding_window": None}, 698_372_096),
        ({"model_type": "granite"}, 666_914_816),
        ({"model_type": "qwen2"}, 1_919_987_712),
        ({"model_type": "gemma"}, 1_340_095_488),
    ],
)
def test_what_the_table_of_a_language_model_leaves_out(table: dict[str, Any], parameters: int, tmp_path: Path) -> None:
    """The language models of `LlavaConfig` with two layers, on the meta device, transformers 5.24."""
    config = {"model_type": "llava", "text_config": {**table, "num_hidden_layers": 2}, "vision_config": {}}
    assert load_model(written(tmp_path, config)).parameters == parameters


def test_sizes_are_left_out_of_tables_alone(tmp_path: Path) -> None:
    """And only of families whose first sizes are known."""
    assert "num_hidden_layers: required" in refused(tmp_path, {"model_type": "llama"})
    assert "text_config: num_hidden_layers: required" in refused(tmp_path, {"text_config": {"model_type": "minicpm"}})


def test_whether_the_embeddings_of_a_language_model_are_tied(tmp_path: Path) -> None:
    """Its own table says it, else the file, else its family."""
    head = 32064 * 4096
    whole = load_model(written(tmp_path, LLAVA)).parameters
    assert load_model(written(tmp_path, {**LLAVA, "tie_word_embeddings": True})).parameters == whole - head
    inner = {**LLAVA["text_config"], "tie_word_embeddings": False}
    both = {**LLAVA, "text_config": inner, "tie_word_embeddings": True}
    assert load_model(written(tmp_path, both)).parameters == whole


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({**LLAVA, "text_config": "llama"}, ["text_config: must be a table", "'llama'"]),
        ({**LLAVA, "text_config": {}}, ["text_config: model_type: required"]),
        ({**LLAVA, "text_config": {"model_type": "mpt"}}, ["text_config: model_type 'mpt' is not simulated yet"]),
        ({**LLAVA, "text_config": {**LLAMA, "hidden_size": [1]}}, ["text_config: hidden_size: ", "integer"]),
        ({**LLAVA, "text_config": {**LLAMA, "num_experts": 8}}, ["mixture of experts (num_experts)"]),
        ({**LLAVA, "quantization_config": {"bits": 4}}, ["quantised weights (quantization_config)"]),
        ({**LLAMA, "architectures": "LlamaModel"}, ["architectures: ", "list"]),
        ({**LLAMA, "architectures": [3]}, ["architectures.0: ", "string", "3"]),
        ({**LLAMA, "architectures": ["LlamaWithGate"]}, ["architectures: the head of 'LlamaWithGate'", "ForCausalLM"]),
        ({**LLAMA, "num_labels": "two"}, ["num_labels: ", "integer", "'two'"]),
        ({**LLAMA, "id2label": ["bad", "good"]}, ["id2label: "]),
        ({**LLAMA, "is_causal": "no"}, ["is_causal: ", "'no'"]),
        ({**QWEN3, "layer_types": ["full_attention"] * 4}, ["layer_types: names 4 layers", "num_hidden_layers is 36"]),
    ],
)
def test_a_value_of_the_wrong_kind_is_named(config: dict[str, Any], words: list[str], tmp_path: Path) -> None:
    line = refused(tmp_path, config)
    for word in words:
        assert word in line


# ------------------------------------------------------------ windows

WINDOWS = [
    ({**MISTRAL, "sliding_window": 4096}, 4096),
    ({k: v for k, v in MISTRAL.items() if k != "sliding_window"}, 4096),
    ({**MISTRAL, "sliding_window": 32768}, 32768),
    ({**PHI3, "sliding_window": 2047}, 2047),
    ({**QWEN2, "use_sliding_window": True, "max_window_layers": 27}, 4096),
    ({**QWEN2, "use_sliding_window": True, "max_window_layers": 28}, None),
    ({**QWEN2, "use_sliding_window": True}, None),
    ({**QWEN2, "use_sliding_window": True, "num_hidden_layers": 29}, 4096),
    ({**QWEN2, "use_sliding_window": False, "max_window_layers": 0}, None),
    ({**QWEN3, "use_sliding_window": True, "sliding_window": 4096}, 4096),
    ({**QWEN3, "use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 36}, None),
    ({**QWEN3, "layer_types": ["full_attention"] * 36}, None),
    ({**QWEN3, "use_sliding_window": True, "sliding_window": 64, "layer_types": ["full_attention"] * 36}, None),
    (
        {**QWEN3, "use_sliding_window": True, "sliding_window": 4096,
         "layer_types": ["full_attention", "sliding_attention"] * 18},
        4096,
    ),
]  # fmt: skip


@pytest.mark.parametrize(("config", "window"), WINDOWS)
def test_the_window_of_any_layer(config: dict[str, Any], window: int | None, tmp_path: Path) -> None:
    """Qwen's layers have it from `max_window_layers` on, 28 unless given; `layer_types` decides where it is given."""
    assert load_model(written(tmp_path, config)).sliding_window == window


def test_a_window_bites_where_the_sequence_is_longer(tmp_path: Path) -> None:
    """Mistral 7B v0.1 at no more than 4096 tokens is the preset, to the bit."""
    found = load_model(written(tmp_path, {**MISTRAL, "sliding_window": 4096}))

    def simulated(model: Any, seq_len: int) -> Any:
        document = simulate(Scenario(hardware="dgx-h100", model=model, workload=Workload(seq_len=seq_len))).to_json()
        return {**document, "model": None}

    assert simulated(found, 4096) == simulated("mistral-7b", 4096)
    assert simulated(found, 65536)["step_time_s"] < 0.7 * simulated("mistral-7b", 65536)["step_time_s"]


def test_a_window_bites_in_a_sweep(tmp_path: Path) -> None:
    path = written(tmp_path, {**MISTRAL, "sliding_window": 4096})
    grid = [{"hardware": "dgx-h100", "model": path, "workload": {"seq_len": seq_len}} for seq_len in (1024, 4096, 8192)]
    rows = sweep(grid)
    assert list(rows["error"]) == ["", "", ""]
    around = sweep([{**point, "plan": "ring=2"} for point in grid])
    assert list(around["error"][:2]) == ["", ""]
    assert "sliding_window = 4096" in around["error"][2]


def test_other_attention_is_refused(tmp_path: Path) -> None:
    line = refused(tmp_path, {**QWEN3, "layer_types": ["linear_attention"] * 36})
    assert "layer_types: 'linear_attention' is not simulated yet" in line


# ------------------------------------------------------------ what is not simulated


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({**QWEN2, "model_type": "qwen2_moe", "num_experts": 60}, ["mixture of experts (num_experts)"]),
        ({**LLAMA, "moe_intermediate_size": 1408}, ["mixture of experts (moe_intermediate_size)"]),
        ({**LLAMA, "model_type": "minicpm3", "kv_lora_rank": 256}, ["latent attention (kv_lora_rank)"]),
        ({**LLAMA, "quantization_config": {"quant_method": "gptq"}}, ["quantised weights (quantization_config)"]),
        ({**GPT2, "add_cross_attention": True}, ["cross attention (add_cross_attention)"]),
        ({**LLAMA, "model_type": "bloom"}, ["bloom", "positions as biases of scores"]),
        ({**GEMMA, "model_type": "gemma3_text", "use_bidirectional_attention": True}, ["windows to both sides"]),
        ({**LLAMA, "model_type": "cohere", "use_qk_norm": True}, ["use_qk_norm"]),
        ({**LLAMA, "model_type": "llama4_text", "num_local_experts": 16}, ["use_qk_norm"]),
        ({**LLAMA, "model_type": "deepseek_v3", "attention_bias": True}, ["attention_bias = True"]),
        ({**LLAMA, "model_type": "opt", "ffn_dim": 64, "word_embed_proj_dim": 7}, ["word_embed_proj_dim = 7"]),
        ({**LLAMA, "model_type": "falcon", "alibi": True}, ["alibi"]),
        ({**LLAMA, "model_type": "mamba2"}, ["model_type 'mamba2'", "gpt_neox", "qwen3"]),
        ({**LLAMA, "hidden_act": "relu"}, ["activation 'relu'", "silu"]),
        ({**NEMOTRON, "hidden_act": "silu"}, ["activation 'silu'", "relu2"]),
    ],
    ids=lambda value: value["model_type"] if isinstance(value, dict) else "",
)  # fmt: skip
def test_what_is_not_simulated_is_named(config: dict[str, Any], words: list[str], tmp_path: Path) -> None:
    line = refused(tmp_path, config)
    for word in [*words, "not simulated"]:
        assert word in line


RECORDED = json.loads((Path(__file__).parent / "data" / "transformers_parameters.json").read_text())


@pytest.mark.parametrize("row", RECORDED["models"], ids=lambda row: row["config"]["model_type"])
def test_parameters_are_those_of_transformers(row: dict[str, Any], tmp_path: Path) -> None:
    """To the last one, of the defaults of each family and of what its files change."""
    assert load_model(written(tmp_path, row["config"])).parameters == row["parameters"]


@pytest.mark.slow
@pytest.mark.parametrize("row", RECORDED["models"], ids=lambda row: row["config"]["model_type"])
def test_recorded_parameters_are_still_those_of_transformers(row: dict[str, Any]) -> None:
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    own = {key: value for key, value in row["config"].items() if key not in ("model_type", "architectures")}
    config = transformers.AutoConfig.for_model(row["config"]["model_type"], **own)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    assert sum(weight.numel() for weight in model.parameters()) == row["parameters"]


@pytest.mark.parametrize(
    ("name", "config"),
    [("deepseek-v3", "deepseek_v3"), ("gpt-oss-120b", "gpt_oss"), ("gemma-3-27b", "gemma3_text")],
)
def test_presets_are_what_files_say(name: str, config: str, tmp_path: Path) -> None:
    file = [row["config"] for row in RECORDED["models"] if row["config"]["model_type"] == config][-1]
    apart = {"name", "max_positions"}
    found = load_model(written(tmp_path, file))
    assert found.model_dump(exclude=apart) == load_model(name).model_dump(exclude=apart)


def test_weights_may_be_stored_in_fewer_bits(tmp_path: Path) -> None:
    """What a checkpoint is stored in says nothing of how it is trained."""
    stored = {**LLAMA, "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    assert load_model(written(tmp_path, stored)).parameters == load_model(written(tmp_path, LLAMA)).parameters


def test_a_key_without_experts_asks_for_nothing(tmp_path: Path) -> None:
    dense = {**LLAMA, "num_local_experts": 0, "moe_layer_freq": None, "q_lora_rank": None, "is_encoder_decoder": False}
    assert load_model(written(tmp_path, dense)).parameters == PRESETS["llama-2-7b"].parameters


# ------------------------------------------------------------ mistakes


REQUIRED = {
    "llama": "hidden_size intermediate_size num_hidden_layers num_attention_heads vocab_size",
    "mistral": "hidden_size num_key_value_heads",
    "qwen2": "num_key_value_heads",
    "qwen3": "num_key_value_heads vocab_size",
    "gpt2": "n_embd n_layer n_head n_positions vocab_size",
    "gpt_neox": "intermediate_size hidden_act",
    "phi3": "intermediate_size",
    "gemma": "num_key_value_heads",
    "nemotron": "hidden_size",
}


@pytest.mark.parametrize("config", FAMILIES, ids=FAMILY_NAMES)
def test_a_missing_key_is_named(config: dict[str, Any], tmp_path: Path) -> None:
    for key in REQUIRED[config["model_type"]].split():
        less = {name: value for name, value in config.items() if name != key}
        assert refused(tmp_path, less) == f"{key}: required, but missing; add it"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden_size": "4096"}, ["hidden_size", "integer", "'4096'"]),
        ({"hidden_size": 4096.0}, ["hidden_size", "integer", "4096.0"]),
        ({"hidden_size": -1}, ["hidden_size", "greater", "-1"]),
        ({"num_hidden_layers": True}, ["num_hidden_layers", "integer", "True"]),
        ({"num_attention_heads": None}, ["num_attention_heads", "integer"]),
        ({"vocab_size": [32000]}, ["vocab_size", "integer"]),
        ({"hidden_act": 3}, ["hidden_act", "string", "3"]),
        ({"tie_word_embeddings": "no"}, ["tie_word_embeddings", "boolean", "'no'"]),
        ({"sliding_window": 0}, ["sliding_window", "greater", "0"]),
        ({"resid_pdrop": 1.0}, ["resid_pdrop", "less", "1.0"]),
        ({"resid_pdrop": float("nan")}, ["resid_pdrop", "nan"]),
        ({"layer_types": "full_attention"}, ["layer_types", "list"]),
        ({"num_key_value_heads": 5}, ["kv_heads 5", "heads 32"]),
        ({"num_attention_heads": 33}, ["hidden 4096", "heads 33"]),
        ({"hidden_size": 2**40}, ["hidden", str(2**40)]),
        ({"model_type": None}, ["model_type", "required", "None"]),
        ({"model_type": ["llama"]}, ["model_type", "['llama']"]),
    ],
)
def test_a_wrong_value_is_named(change: dict[str, Any], words: list[str], tmp_path: Path) -> None:
    line = refused(tmp_path, {**LLAMA, **change})
    for word in words:
        assert word in line


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["not valid JSON"]),
        ("{'hidden_size': 8}", ["not valid JSON", "line 1"]),
        ('{"hidden_size": 8,\n "vocab_size"}', ["not valid JSON", "line 2"]),
        (f'{{"hidden_size": {"9" * 5000}}}', ["not valid JSON"]),
        ("[]", ["JSON object"]),
        ('"llama"', ["JSON object"]),
        ("{}", ["model_type", "required"]),
    ],
)
def test_malformed_json_is_one_line(text: str, words: list[str], tmp_path: Path) -> None:
    line = refused(tmp_path, text)
    for word in words:
        assert word in line


def test_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"config\.json: no such file"):
        load_model(tmp_path)
    with pytest.raises(InputError, match=r"absent\.json: no such file"):
        load_model(tmp_path / "absent.json")
    with pytest.raises(InputError, match="unknown model"):
        load_model("x" * 5000)
    (tmp_path / "config.json").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="not a text file"):
        load_model(tmp_path)
