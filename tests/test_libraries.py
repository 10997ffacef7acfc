"""A plan says whose implementation it is: a library is the defaults of a plan's options, and nothing else."""

from typing import get_args

import pytest

from spsim import simulate
from spsim.errors import InputError
from spsim.inputs.libraries import LIBRARIES, LibraryName
from spsim.inputs.plan import Plan, parse_plan
from spsim.inputs.workload import Workload
from spsim.program.assembly import head_program
from spsim.program.instructions import Communication
from spsim.program.placement import COLLECTIVE_SHORT
from spsim.studies.points import Point
from tests.cases import H100, model, program, result, scenario
from tests.test_columns import assert_rows
from tests.test_folding import assert_equal

NAMES = get_args(LibraryName)


def test_every_library_has_a_record_of_options_of_a_plan():
    """Each value is one that the option takes."""
    assert tuple(LIBRARIES) == NAMES
    for name, record in LIBRARIES.items():
        plan = Plan(library=name)
        assert {option: getattr(plan, option) for option in record.options} == record.options
        assert Plan(**record.options).unlike({}) == record.options, "no default stands in a record twice"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("options", [{}, {"tp": 8}, {"dp": 4}, {"ulysses": 2, "keep_gathered": False}])
def test_what_is_not_given_is_as_in_the_library(name, options):
    """And the text says what is given alone, from which the same plan comes."""
    plan = Plan(library=name, **options)
    for option in Plan.model_fields.keys() - {"library", *options}:
        usual = LIBRARIES[name].options.get(option, Plan.model_fields[option].default)
        assert getattr(plan, option) == usual
    assert parse_plan(plan.text) == plan
    assert len(plan.text.split(",")) <= 1 + len(options)


@pytest.mark.parametrize("name", ["torchtitan", "torch"])
def test_stages_keep_what_is_gathered(name):
    """Unless it is said."""
    staged = Plan(library=name, pp=2, dp=2)
    assert (staged.zero, Plan(library=name, dp=2).zero) == (2, 3)
    assert staged.text == f"library={name},pp=2,dp=2"
    assert parse_plan(staged.text) == staged
    with pytest.raises(InputError, match="zero = 3 with pp = 2"):
        scenario(f"{staged.text},zero=3", global_batch=4)


def test_megatron_core_is_what_a_plan_is_without_a_library():
    assert Plan(library="megatron-core", tp=8) == Plan(tp=8)
    assert Plan(library="megatron-core", tp=8).text == "tp=8"
    assert Plan(tp=8).label == "TP8"


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("library=TorchTitan,tp=8", "library=torchtitan,tp=8"),
        ("tp=8,library=ring_flash_attn", "library=ring-flash-attn,tp=8"),
        ("library=megatron,tp=8", "tp=8"),
        ("TP8+SP (torchtitan)", "library=torchtitan,tp=8"),
        ("TP8 (transformers), recompute=full", "library=transformers,tp=8,recompute=full"),
        ("single GPU (torch)", "library=torch"),
    ],
)
def test_a_library_in_other_words(text, same):
    assert parse_plan(text) == parse_plan(same)
    assert parse_plan(text).text == same


@pytest.mark.parametrize("text", ["library=torchtitan,tp=8", "library=torchtitan,dp=8", "library=deepspeed,ulysses=8"])
def test_labels_say_the_library(text):
    plan = parse_plan(text)
    assert plan.library in plan.label
    assert parse_plan(plan.label) == plan


@pytest.mark.parametrize("text", ["library=jax", "library=5", "TP8 (jax)"])
def test_an_unknown_library_gets_the_known_names(text):
    with pytest.raises(InputError) as error:
        parse_plan(text)
    assert all(name in str(error.value) for name in NAMES)
    assert "\n" not in str(error.value)


def test_a_result_says_what_is_done_as_the_library_does():
    """What the user chose is not the library's choice, and what has no effect is not said."""
    assert scenario("tp=2").notes == ()
    note, *_ = scenario("library=transformers,tp=2").notes
    assert "transformers 5.24.0" in note
    assert "projections = 'separate'" in note
    assert "dp_library" not in note
    note, *_ = scenario("library=transformers,tp=2,projections=fused").notes
    assert "projections" not in note


@pytest.mark.parametrize(
    ("plan", "told"),
    [
        ("tp=2,sequence_parallel,keep_gathered", ["keep_gathered", "megatron-core"]),
        ("library=torchtitan,tp=2,norm_gradients=coalesced", ["norm_gradients = 'coalesced'", "torchtitan"]),
        ("library=torchtitan,tp=2,input_gradients=each", []),  # as DTensor without PrepareModuleInput
        ("tp=2,projections=separate,input_gradients=each", []),  # as transformers
        ("library=torchtitan,tp=2,sequence_parallel=false,keep_gathered=false", []),  # of what is gathered there
        ("tp=2,keep_gathered", []),
        ("library=torch,ring=2,norm_gradients=coalesced", []),
    ],
)
def test_a_combination_that_no_library_has_is_noted(plan, told):
    """As far as it has an effect."""
    found = [note for note in scenario(plan).notes if note.startswith("no library")]
    assert len(found) == bool(told)
    assert all(part in note for note in found for part in told)


# ------------------------------------------------------------ collectives of one layer, as recorded of real ones


LLAMA = {"gated_mlp": True, "ffn_hidden": 704, "kv_heads": 4}


def collectives(plan, **settings):
    """Collectives over tp of a layer's forward and backward pass, in order, each with the bytes of its message."""
    layer = program(plan, **{**LLAMA, **settings})
    sides = (layer.forward, layer.backward)
    return tuple(
        [(COLLECTIVE_SHORT[s.collective], s.message_bytes) for s in side if isinstance(s, Communication)]
        for side in sides
    )


E = 2 * 256 * 2 * 256
"""Bytes of one activation of 256 tokens, 2 sequences and 256 columns."""
SIZES = {"seq_len": 256, "micro_batch": 2}


@pytest.mark.parametrize(
    ("plan", "forward", "backward"),
    [
        ("tp=2", "AR AR", "AR AR"),
        ("tp=2,sequence_parallel", "AG RS AG RS", "AG AG RS AG AG RS"),
        ("library=torchtitan,tp=2", "AG RS AG RS", "AG RS AG RS"),
        ("library=transformers,tp=2", "AR AR", "AR AR AR AR AR"),
        ("library=torch,tp=2", "AR AR", "AR AR AR AR AR"),
        ("library=torch,tp=2,input_gradients=summed", "AR AR", "AR AR"),
        ("library=transformers,tp=2,projections=fused", "AR AR", "AR AR"),
    ],
)
def test_collectives_of_tensor_parallelism(plan, forward, backward):
    """Seen of megatron-core 0.16.1, transformers 5.24.0, DTensor of torch 2.13 with and without `PrepareModuleInput`,
    as torchtitan 0.2.2 applies it: each moves a whole activation.
    """
    expected = tuple([(kind, E) for kind in side.split()] for side in (forward, backward))
    assert collectives(plan, **SIZES) == expected


def test_each_reader_reduces_its_own_gradient_behind_its_products():
    """Of gate and up: the data gradient and that of the weight, then the all-reduce, which the next product awaits."""
    layer = program("library=transformers,tp=2", **LLAMA)
    order = ["AR" if isinstance(s, Communication) else (s.operator, s.part) for s in layer.backward]
    place = order.index(("up", "dgrad"))
    assert order[place : place + 6] == [
        ("up", "dgrad"), ("up", "wgrad"), "AR", ("gate", "dgrad"), ("gate", "wgrad"), "AR"
    ]  # fmt: skip


@pytest.mark.parametrize("sequence", ["", ",sequence_parallel"])
def test_few_kv_heads_are_gathered_with_all_of_q_k_and_v(sequence):
    """megatron-core 0.16: one message of s b (h + 2 g d) elements more each way, of all positions, with and without
    sequence parallelism; nothing is replicated, so that no weight is synchronised but norms and row biases.
    """
    plain, few = (collectives(f"tp=8{sequence}", kv_heads=heads, **SIZES) for heads in (8, 2))
    width = (256 + 2 * 2 * 32) * E // 256
    more = tuple([found for found in side if found[1] == width] for side in few)
    assert more == ([("AG", width)], [("RS", width)])
    assert tuple([found for found in side if found[1] != width] for side in few) == plain
    names = {sync.weight for sync in program(f"tp=8{sequence}", **{**LLAMA, "kv_heads": 2}).weight_sync}
    assert names == ({"norm1_weight", "norm2_weight"} if sequence else set())


@pytest.mark.parametrize("positions", ["none", "rope"])
@pytest.mark.parametrize(
    "plan", ["ring=2", "sequence_parallel,ring=2,ring_kind=all_gather", "ulysses=2", "recompute=selective"]
)
def test_gathered_qkv_fold(plan, positions):
    """Beside every step that a layer is lowered to: a folded step is the step written out."""
    settings = {"kv_heads": 2, "positions": positions, "seq_len": 1024, "layers": 4}
    folded, whole = (result(f"tp=4,{plan}", fold=fold, **settings) for fold in (True, False))
    assert (folded.step_time_s, folded.peak_memory_gib) == (whole.step_time_s, whole.peak_memory_gib)


@pytest.mark.parametrize(
    ("plan", "parts"),
    [
        ("library=transformers,tp=8", ["kv_heads = 4", "'refuse'", "transformers", "few_kv_heads=replicate"]),
        ("tp=8,projections=separate", ["kv_heads = 4", "projections=fused", "few_kv_heads=replicate"]),
    ],
)
def test_what_a_library_refuses_of_few_kv_heads(plan, parts):
    with pytest.raises(InputError) as error:
        program(plan, **LLAMA)
    assert all(part in str(error.value) for part in parts)
    scenario(f"{plan},few_kv_heads=replicate", **LLAMA)


def test_separate_projections_are_the_same_work():
    """Seven products instead of four, of the same weights, FLOPs, and bytes kept."""
    fused, separate = (program(f"tp=2{own}", **LLAMA) for own in ("", ",projections=separate"))
    assert separate.parameters == fused.parameters
    products = [[s for s in own.forward if getattr(s, "kind", "") == "gemm"] for own in (fused, separate)]
    assert [len(own) for own in products] == [4, 7]
    assert len({sum(work.flops for step in own for work in step.work) for own in products}) == 1
    assert separate.saved_bytes("activation") == fused.saved_bytes("activation")


# ------------------------------------------------------------ time and messages of a step


BIG = {"hidden": 4096, "heads": 32, "kv_heads": 8, "gated_mlp": True, "ffn_hidden": 14336}


def long_layers(plan, scope="layers"):
    """Two layers of 8K tokens."""
    return simulate(scenario(plan, seq_len=8192, hardware="dgx-h100", scope=scope, **BIG))


@pytest.mark.slow
@pytest.mark.parametrize("library", ["torchtitan", "transformers", "torch"])
def test_what_is_run_eagerly_hides_no_communication(library):
    """All-gather, wait, all products, reduce-scatter, wait: no kernel runs beside a message, as some do in Megatron."""
    found = {name: hidden_us(long_layers(f"{name},tp=8").spans) for name in (f"library={library}", "sequence_parallel")}
    assert found[f"library={library}"] == 0
    assert found["sequence_parallel"] > 100


def hidden_us(spans):
    """Time of messages within the passes during which kernels run on the same rank."""
    spans = spans[spans["part"] != "weight_sync"]
    messages, kernels = (spans[(spans["lane"] == "compute") == own] for own in (False, True))
    return sum(
        max(0.0, min(message.end_us, kernel.end_us) - max(message.start_us, kernel.start_us))
        for message in messages.itertuples()
        for kernel in kernels.itertuples()
        if kernel.start_us < message.end_us and message.start_us < kernel.end_us
    )


def test_norm_gradients_are_reduced_by_each_that_reads_them():
    """Of two layers with two norms each and the last one, 4 all-reduces of h fp32 gradients: clipping, and three of
    AdamW; else one message of all. Of the norm of all gradients a number of each of 9 weights a layer, of embedding,
    last norm and output; else one number. Their time adds up.
    """
    each, once = (long_layers(f"library=torchtitan,tp=8{own}", "step") for own in ("", ",norm_gradients=coalesced"))
    found = {call.message_bytes: call for call in each.collectives if call.collective == "all_reduce"}
    assert found[4096 * 4].calls == 4 * (2 * 2 + 1)
    names = [task.name for task in each.trace.tasks if task.part in ("weight_sync", "optimizer")]
    clip, adam = (names.index(name) for name in ("clip", "adam"))
    assert [place for place, name in enumerate(names) if name == "weight gradients"] == [
        0,
        1,
        2,
        *range(clip + 1, adam),
    ]
    whole = next(call for call in once.collectives if call.message_bytes == 5 * 4096 * 4)
    assert whole.calls == 1
    one = next(call for call in once.collectives if call.message_bytes == 4)
    more = 20 * found[4096 * 4].time_s - whole.time_s + found[4 * (2 * 9 + 3)].time_s - one.time_s
    assert each.step_time_s - once.step_time_s == pytest.approx(more, rel=1e-6)


def test_transformers_costs_what_its_further_all_reduces_take():
    """Five instead of two, none of them hidden, and products that are smaller: beyond 3 all-reduces of a layer."""
    megatron, transformers = (long_layers(plan) for plan in ("tp=8", "library=transformers,tp=8"))
    one = next(call.time_s for call in megatron.collectives if call.collective == "all_reduce")
    assert transformers.step_time_s - megatron.step_time_s > 2 * 3 * one


@pytest.mark.parametrize("micro_batch", [1, 2, 4])
def test_batch_first_copies_what_collectives_cut_and_join(micro_batch):
    """torch does both along the first dimension: before a reduce-scatter along the sequence the tensor is read and
    written once more, and behind a gather unless it is of one sequence, whose parts follow each other.
    """
    sizes = {"seq_len": 256, "micro_batch": micro_batch}
    plain, copied = (program(f"tp=2,sequence_parallel{own}", **LLAMA, **sizes) for own in ("", ",batch_first"))
    for one, other in ((plain.forward, copied.forward), (plain.backward, copied.backward)):
        more = {place for place, step in enumerate(other) if getattr(step, "operator", "").endswith(" copy")}
        assert [step for place, step in enumerate(other) if place not in more and isinstance(step, Communication)]
        assert {work.bytes_moved for place in more for work in other[place].work} == {micro_batch * E}
        assert len(other) == len(one) + len(more)
        kinds = {place: step.collective for place, step in enumerate(other) if isinstance(step, Communication)}
        before = {place - 1 for place, kind in kinds.items() if kind == "reduce_scatter"}
        behind = {place + 1 for place, kind in kinds.items() if kind == "all_gather" and micro_batch > 1}
        assert more == before | behind


def test_gathered_logits_are_joined_along_the_vocabulary():
    """Of one sequence, too."""
    for batch_first in (False, True):
        plan = parse_plan(f"tp=2,loss_parallel=false,batch_first={str(batch_first).lower()}")
        head = head_program(model(), plan, Workload(seq_len=256))
        copies = [step for step in head.forward if step.operator == "logits copy"]
        assert [work.bytes_moved for step in copies for work in step.work] == [2 * 256 * 512 * 2] * batch_first


def test_rows_of_one_sequence_and_of_several():
    """Their programs differ."""
    settings = {"hardware": H100, "model": dict(model(layers=2)), "plan": "library=torchtitan,tp=2"}
    sizes = [{"seq_len": 256 * n, "micro_batch": b} for n in (1, 4) for b in (1, 2, 3)]
    assert_rows([Point({**settings, "workload": size}) for size in sizes])
    for micro_batch in (1, 2):
        own = {"seq_len": 256, "micro_batch": micro_batch, "global_batch": 2 * micro_batch, "hardware": H100}
        assert_equal(*(result("library=torchtitan,tp=2", fold=fold, **own) for fold in (True, False)))
