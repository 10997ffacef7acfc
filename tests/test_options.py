"""No option of a plan is ignored in silence: it changes the result, or a note or an error says why it does not."""

from dataclasses import dataclass
from functools import cached_property

import pandas as pd
import pytest

from spsim import Result, Scenario, simulate
from spsim.errors import InputError
from spsim.inputs.plan import Plan, parse_plan
from tests.cases import figures, model, scenario

pytestmark = pytest.mark.slow

PLANS = (
    "", "tp=2", "tp=2,sequence_parallel", "tp=2,sequence_parallel,keep_gathered", "ulysses=2",
    "ring=2,ring_kind=gather_permute", "ring=4,ring_gradients=fp32", "ring=2,ring_kind=all_gather",
    "ring=4,ring_kind=all_gather,ring_cut=contiguous", "tp=2,ulysses=2",
    "tp=2,projections=separate", "tp=8,sequence_parallel",
    "tp=2,sequence_parallel,ring=2", "ulysses=2,ring=2,recompute=full", "tp=2,sequence_parallel,recompute=full",
    "ulysses=2,zero=1", "ring=2,distributed_optimizer",
)  # fmt: skip
MODELS = {
    "gpt": {},
    "llama": {"gated_mlp": True, "ffn_hidden": 704, "kv_heads": 4},
    "not causal": {"causal": False},
    "unfused": {"attention": "unfused", "dropout": 0.1},
}
VALUES = {
    "library": ("megatron-core", "torchtitan"), "projections": ("fused", "separate"),
    "input_gradients": ("summed", "each"), "few_kv_heads": ("gather", "replicate"),
    "norm_gradients": ("coalesced", "each_reader"), "batch_first": (False, True),
    "uneven_heads": ("refuse", "by_group"), "ulysses_few_kv_heads": ("replicate", "refuse"),
    "loss_parallel": (True, False),
    "recompute_early_stop": (False, True), "ulysses_gradients": ("forward", "reverse"),
    "gathers_position_ids": (False, True),
    "tp": (1, 2), "sequence_parallel": (False, True), "ulysses": (1, 2), "ring": (1, 2),
    "ring_kind": ("p2p", "all_gather", "gather_permute"), "ring_gradients": ("model_dtype", "fp32"),
    "ring_messages": ("joint", "concatenated", "separate"), "ring_cut": ("zigzag", "contiguous"), "ring_pass": ("kv",),
    "heads_k_stride": (None, 1), "ep": (1, 2), "expert_tp": (None, 1),
    "moe_dispatcher": ("alltoall", "hybridep"),
    "moe_capacity_factor": (None, 1.5), "expert_imbalance": (1.0, 1.5), "expert_concentration": (None, 2.0),
    "routing_seed": (0, 3), "moe_a2a_overlap": (False, True), "delay_wgrad": (False, True),
    "fused_grouped_mlp": (False, True), "fp8_dot_product_attention": (False, True), "fp8_output_proj": (False, True),
    "pp": (1, 2), "virtual_pp": (1, 2),
    "mesh_order": ("tp-ulysses-ring-dp-pp", "pp-dp-ring-ulysses-tp"),
    "dp": (1, 2), "distributed_optimizer": (False, True), "zero": (0, 1, 2, 3),
    "recompute": ("none", "selective", "full"), "tp_backward_overlap": (True, False), "tp_overlap": (False, True),
    "dp_overlap": (False, True), "keep_gathered": (False, True), "pp_schedule": ("1f1b", "gpipe"),
    "pp_group": (None, 4), "pp_layout": (None, "Et/tL"), "pp_sends": (None, "torch"), "pp_overlap": (None, True),
    "pp_warmup_flush": (False, True), "pp_deallocate": (True, False), "dp_library": ("megatron", "fsdp"),
    "fsdp_ends": ("root", "units"), "recompute_reentrant": (True, False),
    "shard_group": (None, 2), "bucket_elements": (None, 1000), "grad_dtype": ("fp32", "bf16"),
    "moment_dtype": ("fp32", "bf16"), "precision_aware_optimizer": (False, True), "loss_fusion": (False, True),
    "recompute_layers": (None, 1), "recompute_method": ("block", "uniform"), "recompute_modules": (None, "mlp"),
    "cpu_offload_layers": (0, 1), "cuda_graphs": ("none", "per_layer"), "tp_scatter": (None, "ring_exchange"),
}  # fmt: skip


WHOLE = (
    "ulysses=2,dp=2,zero=1", "dp=2,zero=3", "pp=2,virtual_pp=2", "pp=4,pp_sends=torch", "tp=2,pp=2,dp=2,recompute=full",
)  # fmt: skip
"""Plans whose options are tried in a whole step."""
FRAMES = ("spans", "memory_curve")


def outcome(plan, traits, scope="layers", global_batch=None):
    """What a plan gives; nothing where it is refused."""
    workload = {"seq_len": 512, "global_batch": global_batch}
    try:
        case = Scenario(hardware="dgx-h100", model=model(**traits), plan=plan, workload=workload, scope=scope)
    except InputError:
        return None
    return Outcome(case.notes, simulate(case))


@dataclass
class Outcome:
    """What a plan gives."""

    notes: tuple[str, ...]
    result: Result

    @cached_property
    def figures(self):
        """All but the notes."""
        return {key: value for key, value in figures(self.result).items() if key != "notes"}


def alike(one, other):
    """Whether two outcomes have the same figures, spans and memory; the first of them differ in most that do not."""
    first = [(found.result.step_time_s, found.result.device_memory_gib) for found in (one, other)]
    frames = (pd.DataFrame.equals(getattr(one.result, name), getattr(other.result, name)) for name in FRAMES)
    return first[0] == first[1] and one.figures == other.figures and all(frames)


def test_every_option_is_tried():
    assert VALUES.keys() == Plan.model_fields.keys()


PAIRS = [
    (plan, model)
    for place, plan in enumerate(PLANS)
    for turn, model in enumerate(MODELS)
    if turn in (0, 1 + place % (len(MODELS) - 1))
]
"""Each plan on the first model and on another, in turn."""


@pytest.mark.parametrize(("plan", "model"), PAIRS)
def test_an_option_does_something_or_says_why_not(plan, model):
    """One option changed at a time: where that changes nothing the notes differ, and a note about it is right."""
    check_options(plan, lambda changed: outcome(changed, MODELS[model]))


@pytest.mark.parametrize("plan", WHOLE)
def test_an_option_of_a_whole_step_does_something_or_says_why_not(plan):
    assert outcome(plan, {"layers": 4}, "step", 4) is not None
    check_options(plan, lambda changed: outcome(changed, {"layers": 4}, "step", 4))


def check_options(plan, tried):
    """Every other value of every option, one at a time."""
    here = tried(plan)
    if here is None:
        return
    parsed = parse_plan(plan)
    for name, values in VALUES.items():
        for value in set(values) - {getattr(parsed, name)}:
            there = tried(parsed.model_copy(update={name: value}))
            if there is None:
                continue
            if alike(here, there):
                assert here.notes != there.notes, f"{name} = {value} is ignored"
            else:
                assert name not in [note.split()[0] for note in here.notes + there.notes], (
                    f"{name} = {value} has an effect"
                )


@pytest.mark.parametrize(
    ("degree", "seq_len", "line"),
    [
        (8, 65536, ""),
        (16, 65536, "tp x ulysses = 16 does not divide heads = 40"),
        (40, 65536, "seq_len = 65536 is not divisible by 40"),
        (40, 65560, ""),
    ],
)
def test_degrees_of_ulysses_where_keys_have_fewer_heads(degree, seq_len, line):
    """Qwen2.5-14B has 40 heads and 8 KV heads: degrees that divide 40 work, KV heads repeated where they are fewer."""
    traits = {"hidden": 5120, "heads": 40, "kv_heads": 8, "gated_mlp": True, "ffn_hidden": 13824}
    settings = {"seq_len": seq_len, "hardware": "dgx-h100", **traits}
    if line:
        with pytest.raises(InputError, match=line):
            scenario(f"ulysses={degree}", **settings)
    else:
        assert simulate(scenario(f"ulysses={degree}", **settings)).step_time_s > 0


@pytest.mark.parametrize(
    ("plan", "traits", "notes"),
    [
        ("dp_overlap", {}, ["dp_overlap has no effect with one rank along dp x ulysses x ring"]),
        ("sequence_parallel", {}, ["sequence_parallel has no effect with tp = 1"]),
        ("tp_backward_overlap=false", {}, ["tp_backward_overlap = False has no effect with tp = 1"]),
        ("ring_kind=all_gather,ring_cut=contiguous", {}, [
            "ring_kind = 'all_gather' has no effect without ring", "ring_cut = 'contiguous' has no effect without ring",
        ]),
        ("ring=2,ring_cut=contiguous", {"causal": False}, [
            "ring_cut = 'contiguous' has no effect without a causal mask",
        ]),
        ("tp=2,keep_gathered", {}, ["keep_gathered has no effect without sequence_parallel over tp"]),
        ("tp=2,zero=1", {}, ["zero = 1 has no effect with one rank along dp x ulysses x ring"]),
        ("ulysses=2,zero=1,distributed_optimizer", {}, [
            "distributed_optimizer has no effect beside zero, which shards the optimizer too",
        ]),
        ("tp=2,sequence_parallel,keep_gathered,tp_backward_overlap=false,ring=2,ring_cut=contiguous", {}, [
            "no library that is known here does keep_gathered with all else as in megatron-core",
        ]),
    ],
)  # fmt: skip
def test_notes(plan, traits, notes):
    assert list(scenario(plan, **traits).notes) == notes


def test_layers_alone_are_of_one_stage():
    """An option of embedding or head has no effect on them, and stages are refused."""
    layers = {
        "hardware": "dgx-h100",
        "model": model(),
        "workload": {"seq_len": 256, "global_batch": 4},
        "scope": "layers",
    }
    assert Scenario(plan="loss_fusion", **layers).notes == ("loss_fusion has no effect with scope = 'layers'",)
    with pytest.raises(InputError, match=r"scope = 'layers' with pp = 2.*use scope = 'step'"):
        Scenario(plan="pp=2", **layers)
    assert Scenario(plan="pp=2,loss_fusion", **{**layers, "scope": "step"}).notes == ()
