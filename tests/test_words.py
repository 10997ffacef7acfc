"""Words: figures as reports write them, and what others call the settings of spsim."""

import inspect

import pytest

import spsim
from spsim import InputError, Model, Plan, Scenario, Workload, load_model, load_profile
from spsim.errors import InputError as Error
from spsim.inputs import plan_words, words
from spsim.inputs.plan import parse_plan
from spsim.inputs.presets import PRESETS
from spsim.inputs.profiles import profile_names
from spsim.report.words import figure, size


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.4199, "0.42"), (0.4263, "0.426"), (9.671, "9.67"), (10.04, "10"), (156.4, "156"), (12345.6, "12,346")],
)
def test_small_figures_keep_three_digits(value, text):
    assert figure(value) == text


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0.00 KiB"), (2**10, "1.00 KiB"), (2**20, "1.00 MiB"), (3 * 2**29, "1.50 GiB")]
)
def test_bytes_take_the_unit_that_they_reach(count, text):
    assert size(count) == text


def refused(make):
    """The line of what is refused."""
    with pytest.raises(InputError) as caught:
        make()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ------------------------------------------------------------ plans


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("tp=8,cp=2", "tp=8,ring=2"),
        ("tp=8,sp", "tp=8,sequence_parallel"),
        ("tp=8,sp=true", "tp=8,sequence_parallel"),
        ("tp=8,sequence_parallel,recompute_granularity=selective", "tp=8,sequence_parallel,recompute=selective"),
        ("tp=8,recompute_activations", "tp=8,recompute=selective"),
        ("tp=8,gradient_checkpointing", "tp=8,recompute=full"),
        ("context_parallel_size=8", "ring=8"),
        ("cp=8,cp_comm_type=p2p", "ring=8"),
        ("cp=8,cp_comm_type=allgather", "ring=8,ring_kind=all_gather"),
        ("cp=8,cp_comm_type=all_gather", "ring=8,ring_kind=all_gather"),
        ("cp=8,cp_comm_type=a2a", "ulysses=8"),
        ("ulysses=8,cp_comm_type=a2a", "ulysses=8"),
        (
            "context_parallel_degree=4,context_parallel_rotate_method=allgather",
            "ring=4,ring_kind=gather_permute,ring_gradients=fp32,ring_messages=concatenated",
        ),
        (
            "context_parallel_degree=4,context_parallel_rotate_method=alltoall",
            "ring=4,ring_gradients=fp32,ring_messages=concatenated",
        ),
        ("--tensor-model-parallel-size=8,--sequence-parallel", "tp=8,sequence_parallel"),
        ("tensor_parallel_degree=4,ulysses_sequence_parallel_size=2", "tp=4,ulysses=2"),
        ("ulysses_degree=2,ring_degree=4", "ulysses=2,ring=4"),
        ("tp=8,use_distributed_optimizer", "tp=8,distributed_optimizer"),
        ("TP=8,Recompute=Full", "tp=8,recompute=full"),
        ("ring=8,ring_kind=all-gather", "ring=8,ring_kind=all_gather"),
        ("pp=4,num_virtual_stages_per_pipeline_rank=2,microbatch_group_size_per_virtual_pipeline_stage=8",
         "pp=4,virtual_pp=2,pp_group=8"),
        ("pp=2,--pipeline-model-parallel-layout=Et3/t3L", "pp=2,pp_layout=Et3/t3L"),
        ("pp=4,vpp=2,overlap_p2p_comm,overlap_p2p_comm_warmup_flush", "pp=4,virtual_pp=2,pp_overlap,pp_warmup_flush"),
        ("pp=4,vpp=2,batch_p2p_comm", "pp=4,virtual_pp=2,pp_overlap=false"),
        ("pp=4,--no-overlap-p2p-communication", "pp=4,pp_overlap=false"),
        ("pp=4,deallocate_pipeline_outputs=false", "pp=4,pp_deallocate=false"),
        ("pp=4,pipeline_parallel_schedule=1F1B", "pp=4,pp_sends=torch"),
        ("pp=4,vpp=2,pipeline_parallel_schedule=Interleaved1F1B", "pp=4,virtual_pp=2,pp_sends=torch"),
        ("pp=4,pipeline_parallel_schedule=GPipe", "pp=4,pp_schedule=gpipe"),
        ("pp=4,vpp=2,pp_schedule=ZBVZeroBubble", "pp=4,virtual_pp=2,pp_schedule=zbv"),
        ("dp=8,overlap_grad_reduce", "dp=8,dp_overlap=gradients"),
        ("dp=8,zero=1,--overlap-grad-reduce,--overlap-param-gather", "dp=8,zero=1,dp_overlap"),
        ("dp=8,ddp_bucket_size=40000000,overlap_grad_reduce", "dp=8,bucket_elements=40000000,dp_overlap=gradients"),
        ("dp=8,grad_reduce_in_fp32=false", "dp=8,grad_dtype=bf16"),
        ("dp=8,mixed_precision_reduce=bfloat16", "dp=8,grad_dtype=bf16"),
        ("dp=8,use_distributed_optimizer,use_precision_aware_optimizer,exp_avg_dtype=torch.bfloat16",
         "dp=8,distributed_optimizer,moment_dtype=bf16,precision_aware_optimizer"),
        ("dp=8,data_parallel_sharding_strategy=optim_grads_params", "dp=8,zero=3"),
        ("data_parallel_shard_degree=8", "dp=8,zero=3,dp_library=fsdp"),
        ("data_parallel_replicate_degree=2,data_parallel_shard_degree=8",
         "dp=16,zero=3,dp_library=fsdp,shard_group=8"),
        ("dp_shard=8,fsdp_reshard_after_forward=never", "dp=8,zero=2,dp_library=fsdp"),
        ("data_parallel_replicate_degree=4,data_parallel_shard_degree=1", "dp=4"),
        ("recompute_granularity=full,recompute_method=uniform,recompute_num_layers=2",
         "recompute=full,recompute_layers=2,recompute_method=uniform"),
        ("recompute=selective,recompute_modules=Core-Attn+mlp", "recompute=selective,recompute_modules=core_attn+mlp"),
        ("cross_entropy_loss_fusion,cpu_offloading_num_layers=4", "loss_fusion,cpu_offload_layers=4"),
        ("enable_cuda_graph", "cuda_graphs=per_layer"),
        ("TP8", "tp=8"),
        ("TP8+SP", "tp=8,sequence_parallel"),
        ("tp8+sp, recompute=selective", "tp=8,sequence_parallel,recompute=selective"),
        ("Ulysses 8", "ulysses=8"),
        ("Ulysses 2 × Ring 4", "ulysses=2,ring=4"),
        ("TP2+SP x CP4", "tp=2,sequence_parallel,ring=4"),
        ("TP8+SP × PP8×VP3 × DP4+ZeRO-1", "tp=8,sequence_parallel,pp=8,virtual_pp=3,dp=4,zero=1"),
        ("tp2/pp4/vpp2, DP 8", "tp=2,pp=4,virtual_pp=2,dp=8"),
        ("single GPU", ""),
    ],
)  # fmt: skip
def test_a_plan_in_other_words(text, same):
    assert parse_plan(text) == parse_plan(same)
    assert parse_plan(same).text == same


@pytest.mark.parametrize(
    "text",
    [
        "", "tp=8", "tp=2,sequence_parallel,ulysses=2,ring=2", "ulysses=4", "ring=8", "pp=4,virtual_pp=2,dp=2",
        "tp=2,pp=4,dp=8,zero=1", "dp=8,zero=3", "ulysses=8,zero=3",
    ],
)  # fmt: skip
def test_a_label_is_a_plan(text):
    plan = parse_plan(text)
    assert parse_plan(plan.label) == plan


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("ring=8,ring_kind=a2a", ["ulysses=8", "ring"]),
        ("ring=8,cp_comm_type=a2a", ["ulysses=8"]),
        ("cp=8,cp_comm_type=a2a+p2p", ["ulysses=N,ring=M"]),
        ("cp=8,cp_comm_type=tree", ["cp_comm_type", "'tree'", "p2p", "a2a"]),
        ("cp_comm_type=a2a", ["add cp=N"]),
        ("cp=4,ring=2", ["ring", "cp", "keep one"]),
        ("tp=8,tensor_parallel_size=8", ["tp", "tensor_parallel_size", "keep one"]),
        ("tp=8,recompute_activations,recompute=full", ["recompute_activations", "keep one"]),
        ("TP8+TP4", ["tp", "twice"]),
        ("tp=8,sp=4", ["sequence_parallel", "ulysses=N", "ring=N"]),
        ("sequence_parallel_size=8", ["sequence_parallel_size", "sequence_parallel", "ulysses=N", "ring=N"]),
        ("fsdp=8", ["dp=N,zero=3"]),
        ("dp=8,data_parallel_shard_degree=8", ["data_parallel_shard_degree = 8", "dp=N,zero=3", "shard_group=M"]),
        ("data_parallel_shard_degree=-1", ["data_parallel_shard_degree = -1", "dp=N,zero=3"]),
        ("dp_shard=8,dp_shard_size=8", ["dp_shard = 8", "dp=N,zero=3"]),
        ("pp=4,num_layers_per_virtual_pipeline_stage=2", ["virtual_pp=N"]),
        ("pp=4,account_for_embedding_in_pipeline_split", ["layers + 2", "pp_layout"]),
        ("pp=4,decoder_first_pipeline_num_layers=11", ["pp_layout", "Et3/t4/t4/t3L"]),
        ("pp=4,overlap_p2p_comm,batch_p2p_comm", ["batch_p2p_comm", "pp_overlap = True", "keep one"]),
        ("pp=4,pipeline_parallel_schedule=chimera", ["'chimera'", "1f1b, interleaved1f1b, gpipe"]),
        ("dp=4,overlap_grad_reduce,dp_overlap=parameters", ["dp_overlap", "keep one"]),
        ("dp=4,zero=2,data_parallel_sharding_strategy=optim", ["zero = 2", "keep one"]),
        ("dp=4,bucket_cap_mb=25", ["bucket_elements=N", "MiB"]),
        ("dp=4,zero_optimization=2", ["zero=2", "dp_library=deepspeed"]),
        ("grad_reduce_in_fp32=1.5", ["grad_reduce_in_fp32 = 1.5", "true, false"]),
        ("gradient_accumulation_steps=8", ["global_batch = micro-batches x micro_batch x dp"]),
        ("cuda_graph_impl=local", ["cuda_graphs=per_layer"]),
        ("tp=8,micro_batch_size=4", ["micro_batch_size", "--micro-batch"]),
        ("squence_parallel", ["squence_parallel", "did you mean sequence_parallel?"]),
        ("tp=8,recompte=full", ["recompte", "did you mean recompute?"]),
        ("tensor=8", ["tensor", "unknown key", "tp, sequence_parallel, ulysses, ring"]),
        ("tp=8 sp", ["tp=8 sp", "commas"]),
        ("recompute", ["recompute", "'selective'", "'full'"]),
    ],
)  # fmt: skip
def test_a_plan_that_is_not_clear_names_the_key(text, parts):
    line = refused(lambda: parse_plan(text))
    for part in parts:
        assert part in line


def test_modules_may_be_a_list():
    plan = Plan(recompute="selective", recompute_modules=["core_attn", "mlp"])
    assert plan.recomputed_modules == ("core_attn", "mlp")
    assert Plan(recompute="selective").recomputed_modules == ("core_attn",)
    assert "recompute_modules" in refused(lambda: Plan(recompute="selective", recompute_modules=[1]))


def test_words_of_a_plan_are_the_same_in_tables_and_objects():
    assert Plan(cp=2, sp=True, tp=4) == Plan(tp=4, sequence_parallel=True, ring=2)
    case = Scenario(hardware="dgx-h100", model="llama-3-8b", plan={"cp": 8}, workload={"seq_length": "64K"})
    assert (case.plan.ring, case.workload.seq_len) == (8, 65536)


def test_every_word_stands_for_a_setting():
    """And for one only; `cp` is a ring or Ulysses."""
    assert set(plan_words.PLAN) - {"cp"} <= set(Plan.model_fields)
    assert set(words.WORKLOAD) <= set(Workload.model_fields)
    assert set(words.MODEL) <= set(Model.model_fields)
    for table, known in ((plan_words.PLAN, Plan), (words.WORKLOAD, Workload), (words.MODEL, Model)):
        others = [other for names in table.values() for other in names]
        assert len(others) == len({*others} - {*known.model_fields})
    others = {other for names in plan_words.PLAN.values() for other in names}
    assert not others & {*plan_words.ADVICE, *plan_words.READINGS}
    assert not {*plan_words.ADVICE} & {*plan_words.READINGS}
    for values in plan_words.READINGS.values():
        assert all(Plan(**given) for given in values.values())


# ------------------------------------------------------------ workloads and models


@pytest.mark.parametrize(
    ("given", "tokens"), [("64K", 65536), ("64k", 65536), ("1M", 2**20), ("2K", 2048), (4096, 4096)]
)
def test_thousands_of_tokens_are_binary(given, tokens):
    assert Workload(seq_len=given).seq_len == tokens


@pytest.mark.parametrize("given", ["2048", "K", "1.5K", "-1K", "0K", "64KB", "9999999M", 8.0, True, None])
def test_other_texts_are_no_tokens(given):
    assert "seq_len" in refused(lambda: Workload(seq_len=given))


def test_a_workload_and_a_model_in_other_words():
    workload = Workload(seq_length=2048, micro_batch_size=4, global_batch_size=8, dtype="bfloat16")
    assert workload == Workload(seq_len=2048, micro_batch=4, global_batch=8, precision="bf16")
    model = Model(num_layers=2, hidden_size=64, num_attention_heads=4, num_query_groups=2, vocab_size=100)
    assert model == Model(layers=2, hidden=64, heads=4, kv_heads=2, vocab=100)
    assert "did you mean hidden?" in refused(lambda: Model(layers=2, hiden=64, heads=4, vocab=100))
    assert "are the same" in refused(lambda: Model(layers=2, num_layers=2, hidden=64, heads=4, vocab=100))


def test_a_preset_with_changes():
    """What followed from others in the preset follows from the changes; what was given stays."""

    def model(**table):
        return Scenario(hardware="dgx-h100", model=table, workload={"seq_len": 8}).model

    assert model(preset="gpt-22b") == PRESETS["gpt-22b"]
    flash = model(preset="gpt-22b", attention="flash", num_layers=4)
    assert flash.name == "gpt-22b (attention = flash, layers = 4)"
    update = {"attention": "flash", "layers": 4, "name": flash.name}
    assert flash == PRESETS["gpt-22b"].model_copy(update=update)
    wider = model(preset="gpt-22b", hidden=8192)
    assert (wider.ffn_hidden, wider.head_dim, wider.kv_heads, wider.dropout) == (32768, 128, 64, 0.1)
    more = model(preset="llama-3-8b", heads=64, vocab=1000)
    assert (more.kv_heads, more.head_dim, more.ffn_hidden, more.head_rows) == (8, 64, 14336, 1000)
    assert "ffn_hidden is missing" in refused(lambda: model(preset="gpt-22b", gated_mlp=True))
    assert "did you mean layers?" in refused(lambda: model(preset="gpt-22b", layrs=4))
    assert "unknown model 'gpt-5b'" in refused(lambda: model(preset="gpt-5b"))
    assert "model 3 is neither" in refused(lambda: model(preset=3))


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_without_changes_is_itself(name):
    changed = Scenario(hardware="dgx-h100", model={"preset": name, "layers": 6}, workload={"seq_len": 8}).model
    own = PRESETS[name].model_dump(exclude={"name", "layers"})
    assert changed.model_dump(exclude={"name", "layers"}) == own


# ------------------------------------------------------------ names


@pytest.mark.parametrize(
    ("given", "name"), [("mistral", "mistral-7b"), ("Llama-3-8B", "llama-3-8b"), ("llama3-8b", "llama-3-8b"),
                        ("22b", "gpt-22b"), ("GPT_22B", "gpt-22b"), ("405b", "llama-3-405b")],
)  # fmt: skip
def test_a_model_by_a_part_that_no_other_has(given, name):
    assert load_model(given) == PRESETS[name]


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("h200", "dgx-h200"),
        ("l40s", "l40s-8"),
        ("B200", "dgx-b200"),
        ("gb200", "gb200-nvl72"),
        ("B300", "dgx-b300"),
        ("gb300", "gb300-nvl72"),
        ("DGX-H100", "dgx-h100"),
    ],
)
def test_hardware_by_a_part_that_no_other_has(given, name):
    assert load_profile(given) is load_profile(name)


@pytest.mark.parametrize(
    ("load", "given", "parts"),
    [
        (load_profile, "h100", ["dgx-h100", "h100-pcie-8", "give one of them"]),
        (load_profile, "a100", ["dgx-a100-40gb", "dgx-a100-80gb", "a100-pcie-8"]),
        (load_profile, "dgx-h10", ["did you mean dgx-h100?"]),
        (load_profile, "tpu", ["unknown hardware 'tpu'", *profile_names()]),
        (load_profile, "", ["unknown hardware ''"]),
        (load_profile, None, ["hardware None is neither a name nor a path"]),
        (load_model, "llama", ["llama-2-7b", "llama-3-405b", "give one of them"]),
        (load_model, "lama-3-8b", ["did you mean llama-3-8b?"]),
        (load_model, "", ["unknown model ''"]),
        (load_model, 3, ["model 3 is neither a name nor a path"]),
    ],
)
def test_a_name_that_is_not_clear_lists_what_it_may_be(load, given, parts):
    line = refused(lambda: load(given))
    for part in parts:
        assert part in line


# ------------------------------------------------------------ Python


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        (lambda: Scenario("dgx-h100", "llama-3-8b"), ["by name", "'dgx-h100'", "hardware=", "workload="]),
        (lambda: Scenario(hardware="dgx-h100", model="llama-3-8b"), ["workload", "missing"]),
        (lambda: Scenario(hardwar="dgx-h100"), ["hardwar", "did you mean hardware?"]),
        (lambda: Scenario(hardware=3, model="llama-3-8b", workload={"seq_len": 8}), ["hardware", "3"]),
        (lambda: Scenario(hardware="dgx-h100", model="llama-3-8b", workload=8), ["workload", "8"]),
        (lambda: Plan(8), ["Plan", "by name", "tp=8"]),
        (lambda: Plan("tp=8"), ["Plan", "by name", "'tp=8'"]),
        (lambda: Workload(8192), ["Workload", "by name", "seq_len="]),
        (lambda: Workload(), ["seq_len", "missing"]),
        (lambda: Model("llama-3-8b"), ["Model", "by name", "layers="]),
        (lambda: Scenario(hardware="dgx-h100", model={1: 2}, workload={"seq_len": 8}), ["model", "1", "no key"]),
        (lambda: Scenario(hardware="dgx-h100", model="gpt-22b", plan={1: 2}, workload={}), ["plan", "1", "no key"]),
        (lambda: spsim.simulate("x"), ["simulate", "'x'", "Scenario("]),
        (lambda: spsim.simulate(None), ["simulate", "None"]),
        (lambda: spsim.simulate({"hardware": "dgx-h100"}), ["simulate", "Scenario("]),
        (lambda: spsim.compare(5, hardware="dgx-h100", model="gpt-22b", workload={"seq_len": 8}), ["5", "plans"]),
        (lambda: spsim.compare([3, 4], hardware="dgx-h100", model="gpt-22b", workload={"seq_len": 8}), ["3", "plan"]),
        (lambda: spsim.explain(5, "tp=8", {"seq_len": 8}), ["scenario: model", "5"]),
        (lambda: spsim.explain("gpt-22b", "tp=8", 2048), ["workload", "2048"]),
    ],
    ids=lambda value: inspect.getsource(value).strip()[:60] if callable(value) else "",
)  # fmt: skip
def test_python_says_what_is_wrong_in_one_line(make, parts):
    line = refused(make)
    for part in parts:
        assert part in line


@pytest.mark.parametrize(
    ("text", "shown"),
    [("a\x1b[31mb", "a\\x1b[31mb"), ("a\nb\tc", "a b c"), ("a\x00b", "a\\x00b"), ("a\u202eb", "a\\u202eb"),
     ("a\ud800b", "a\\ud800b"), ("µs × 3 – é", "µs × 3 – é")],
)  # fmt: skip
def test_a_message_is_one_line_of_what_can_be_seen(text, shown):
    assert str(Error(text)) == shown


def test_names_are_shown_without_control_characters():
    assert Model(name="a\x1b[31m\nb", layers=1, hidden=8, heads=1, vocab=8).name == "a\\x1b[31m\\nb"
