"""What replicas send in a steady step, against steps recorded from Megatron-Core, torch and DeepSpeed on gloo.

The recorded model has 4 pre-norm blocks of width h and an MLP of 4h, a vocabulary of 512, biases, and 2 micro-batches;
`after` is the last mark before a call: `B2(` the beginning of block 2's backward pass, `B2)` its end, F forward.
"""

import csv
import gzip
from collections.abc import Iterator
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import pytest

from spsim.errors import InputError
from spsim.inputs.plan import Plan
from spsim.step.buckets import Parameter, ddp_buckets, megatron_bucket_elements, megatron_buckets
from spsim.step.messages import Message, Synchronisation
from spsim.step.replicas import synchronisation

BLOCKS, VOCABULARY, POSITIONS = 4, 512, 16
SIZES = {"float32": 4, "bfloat16": 2, "float16": 2, "uint8": 1, "float64": 8}
ROOT = frozenset({0, BLOCKS + 1})


class Call(NamedTuple):
    """One collective, recorded or planned."""

    micro_batch: str
    collective: str
    message_bytes: int
    itemsize: int


def recorded() -> dict[str, list[dict[str, str]]]:
    """Case -> its rows."""
    found: dict[str, list[dict[str, str]]] = {}
    with gzip.open(Path(__file__).parent / "data" / "data_parallel_steps.csv.gz", "rt") as file:
        for row in csv.DictReader(file):
            found.setdefault(row["case"], []).append(row)
    return found


RECORDED = recorded()


def calls_of(case: str) -> list[Call]:
    """What a library issued; DeepSpeed's step belongs to no micro-batch here."""
    return [
        Call(
            "-" if row["pass"] == "step" else row["micro_batch"],
            row["collective"], int(row["message_bytes"]), SIZES[row["dtype"]],
        )
        for row in RECORDED[case]
        for _ in range(int(row["count"]))
    ]  # fmt: skip


def linear(name: str, out: int, into: int, block: int) -> list[Parameter]:
    return [Parameter(f"{name}.weight", out * into, name, block), Parameter(f"{name}.bias", out, name, block)]


def norm(name: str, h: int, block: int) -> list[Parameter]:
    return [Parameter(f"{name}.weight", h, name, block), Parameter(f"{name}.bias", h, name, block)]


def torch_model(h: int = 64, *, tied: bool = False) -> list[Parameter]:
    """The weights as a torch module registers them."""
    found = [Parameter("embedding", VOCABULARY * h, "embedding", 0)]
    for block in range(1, BLOCKS + 1):
        found += norm("norm1", h, block) + linear("qkv", 3 * h, h, block) + linear("projection", h, h, block)
        found += norm("norm2", h, block) + linear("fc1", 4 * h, h, block) + linear("fc2", h, 4 * h, block)
    found += norm("final_norm", h, BLOCKS + 1)
    return found if tied else [*found, Parameter("head", VOCABULARY * h, "head", BLOCKS + 1)]


def megatron_model(*, stage: int | None = None, tied: bool = False) -> list[Parameter]:
    """The weights of Megatron's GPTModel, which registers the projection before qkv: all, or of one of two stages."""
    h, shared = 64, tied and stage is not None
    found = []
    if stage in (None, 0):
        table = Parameter("embedding", VOCABULARY * h, "embedding", 0, shared)
        found += [table, Parameter("positions", POSITIONS * h, "positions", 0)]
    for block in {None: (1, 2, 3, 4), 0: (1, 2), 1: (1, 2)}[stage]:
        found += norm("norm1", h, block) + linear("projection", h, h, block) + linear("qkv", 3 * h, h, block)
        found += norm("norm2", h, block) + linear("fc1", 4 * h, h, block) + linear("fc2", h, 4 * h, block)
    if stage in (None, 1):
        last = max(parameter.block for parameter in found) + 1
        found += norm("final_norm", h, last)
        found += [Parameter("head", VOCABULARY * h, "head", last, shared)] if not tied or stage == 1 else []
    return found


# ------------------------------------------------------------ a plan in order


def planned(found: Synchronisation, micro_batches: int = 2) -> list[Call]:
    """All that is issued in a step."""
    return [
        Call(name, message.collective, message.message_bytes, message.itemsize)
        for name, message in _in_order(found, micro_batches)
    ]


def _in_order(found: Synchronisation, micro_batches: int) -> Iterator[tuple[str, Message]]:
    last = str(micro_batches)
    for number in range(1, micro_batches + 1):
        name = str(number)
        if found.forward_in == "every" or number == 1:
            yield from ((name, message) for message in found.forward)
        reducing = found.reductions_in == "every" or name == last
        yield from ((name, message) for message in _backward(found, reducing))
    for message in (*found.before_update, *found.after_update):
        yield last if message.group == "embedding" else "-", message


def _backward(found: Synchronisation, reducing: bool) -> list[Message]:
    """Gathers as blocks begin, one ahead; reductions as they end, in order."""
    uses = [max(parameter.block for parameter in message.parameters) for message in found.backward]
    gathers = zip([BLOCKS + 2, *uses], found.backward, strict=False)
    timed = [((-block, 0), [message]) for block, message in gathers]
    if reducing:
        ends = [min(parameter.block for parameter in own.bucket.parameters) for own in found.reductions]
        reduced = zip(accumulate(ends, min), found.reductions, strict=True)
        timed += [((-end, 1), [*own.messages]) for end, own in reduced]
    return [message for _, messages in sorted(timed, key=lambda item: item[0]) for message in messages]


OVERLAP = {"dp_overlap": "gradients"}
OPTIMIZER = {"distributed_optimizer": True}
MEGATRON = {
    "mc_ddp_nooverlap": {},
    "mc_ddp_bf16grads": {"grad_dtype": "bf16"},
    "mc_distopt_nooverlap": OPTIMIZER,
    "mc_distopt_overlap_default_bucket": OPTIMIZER | OVERLAP,
    "mc_distopt_overlap_bucket60k": OPTIMIZER | OVERLAP | {"bucket_elements": 60_000},
    "mc_distopt_p4": OPTIMIZER | OVERLAP | {"bucket_elements": 60_000, "dp": 4},
    "mc_distopt_overlap_ag_bucket60k": OPTIMIZER | {"dp_overlap": True, "bucket_elements": 60_000},
    "mc_distopt_tied": OPTIMIZER | OVERLAP | {"bucket_elements": 60_000},
}
STAGES = {
    "mc_pp2_dp2_untied": {"dp": 2},
    "mc_pp2_dp2_tied": {"dp": 2},
    "mc_pp2_dp1_tied": {"dp": 1},
    "mc_pp2_dp2_tied_bf16grads": {"dp": 2, "grad_dtype": "bf16"},
}


@pytest.mark.parametrize("case", MEGATRON)
def test_megatron(case: str) -> None:
    plan = Plan(**{"dp": 2} | MEGATRON[case])
    found = synchronisation(megatron_model(tied="tied" in case), plan, "bf16")
    assert planned(found) == calls_of(case)
    assert_ready(case, found)


@pytest.mark.parametrize("stage", [0, 1])
@pytest.mark.parametrize("case", STAGES)
def test_stages_of_a_megatron_pipeline(case: str, stage: int) -> None:
    """Later stages have one bucket; a table that two stages hold is alone in its own, and summed once more."""
    plan = Plan(pp=2, bucket_elements=60_000, **OPTIMIZER, **OVERLAP, **STAGES[case])
    found = synchronisation(megatron_model(stage=stage, tied="untied" not in case), plan, "bf16", stage=stage)
    assert planned(found) == calls_of(f"{case}_stage{stage}")


def test_a_scaled_loss_has_one_more_number() -> None:
    found = synchronisation(megatron_model(), Plan(dp=2, **OPTIMIZER), "fp16")
    assert planned(found) == calls_of("mc_fp16_scale16")


DDP = {
    "ddp_h64_default": (64, "fp32", None),
    "ddp_h512_default": (512, "fp32", None),
    "ddp_h64_cap0.25MiB": (64, "fp32", 2**16),
    "ddp_h64_cap0.25MiB_bf16": (64, "bf16", 2**17),
}
"""Width, type and elements of 0.25 MiB."""


@pytest.mark.parametrize("case", DDP)
def test_ddp(case: str) -> None:
    h, precision, limit = DDP[case]
    found = synchronisation(torch_model(h), Plan(dp=2, dp_library="ddp", bucket_elements=limit), precision)
    assert planned(found) == calls_of(case)
    assert_ready(case, found)


def test_ddp_without_no_sync() -> None:
    found = synchronisation(torch_model(), Plan(dp=2, dp_library="ddp", bucket_elements=2**16), "fp32")
    assert planned(replace(found, reductions_in="every")) == calls_of("ddp_no_accum_ctx")


FSDP = {
    "fsdp2_reshardTrue_fp32": ("fp32", {}),
    "fsdp2_tied_reshardTrue_bf16": ("bf16", {}),
    "hsdp2x2_bf16_reduce_fp32_sync_every": ("bf16", {"dp": 4, "shard_group": 2}),
    "hsdp2x2_bf16_reduce_fp32_sync_last": ("bf16", {"dp": 4, "shard_group": 2}),
    "fsdp2_reshardTrue_bf16_reduce_fp32_sync_last": ("bf16", {}),
    "fsdp2_reshardTrue_bf16_reduce_bf16_sync_last": ("bf16", {"grad_dtype": "bf16"}),
    "fsdp2_reshardFalse_bf16_reduce_fp32_sync_last": ("bf16", {"zero": 2}),
}


@pytest.mark.parametrize("case", FSDP)
def test_fully_sharded(case: str) -> None:
    precision, options = FSDP[case]
    plan = Plan(**{"dp": 2, "dp_library": "fsdp", "zero": 3} | options)
    found = synchronisation(torch_model(tied="tied" in case), plan, precision, root=ROOT)
    if case.endswith("sync_last"):
        found = replace(found, reductions_in="last")
    assert planned(found) == calls_of(case)


BUCKETS = {"bucket_elements": 100_000}
DEEPSPEED = {
    "ds_zero0_bf16": {},
    "ds_zero1_bf16": {"zero": 1},
    "ds_zero1_tied": {"zero": 1},
    "ds_zero1_bucket100k": {"zero": 1} | BUCKETS,
    "ds_zero1_overlap_comm_bucket100k": {"zero": 1, "dp_overlap": True} | BUCKETS,
    "ds_zero2_bf16": {"zero": 2},
    "ds_zero2_bucket100k": {"zero": 2} | BUCKETS,
    "ds_zero2_no_reduce_scatter": {"zero": 2} | BUCKETS,
    "ds_zero2_h64_p4": {"zero": 2, "dp": 4} | BUCKETS,
    "ds_zero3_bf16": {"zero": 3},
    "ds_zero3_h512_default": {"zero": 3},
}


@pytest.mark.parametrize("case", DEEPSPEED)
def test_deepspeed(case: str) -> None:
    plan = Plan(**{"dp": 2, "dp_library": "deepspeed"} | DEEPSPEED[case])
    found = synchronisation(torch_model(512 if "h512" in case else 64, tied="tied" in case), plan, "bf16")
    assert planned(found) == calls_of(case)
    assert_ready(case, found)


def assert_ready(case: str, found: Synchronisation) -> None:
    """Each reduction was issued in the backward pass of the block that the plan says, or after the whole of it."""
    rows = [
        row
        for row in RECORDED[case]
        if row["micro_batch"] == "2"
        and row["pass"] in ("backward", "forward/backward", "finalize")
        and row["collective"] in ("all_reduce", "reduce_scatter")
    ]
    assert len(rows) == len(found.reductions)
    for row, (message, *_) in zip(rows, found.reductions, strict=True):
        block = min(parameter.block for parameter in message.parameters) if found.behind_backward else 0
        assert row["after"] == {0: "B0)", BLOCKS + 1: "F3)"}.get(block, f"B{block - 1}(")


# ------------------------------------------------------------ by hand


def test_buckets_of_equal_weights() -> None:
    """Ten weights of 3: Megatron closes at 6 or above, DDP's first at 3 elements of 4 bytes."""
    weights = [Parameter(f"w{i}", 3, "op", i) for i in range(10)]
    assert [len(b.parameters) for b in megatron_buckets(weights, 5, ranks=2, sharded=False)] == [2] * 5
    assert [len(b.parameters) for b in ddp_buckets(weights, 4, limit=25, first=12)] == [1, 3, 3, 3]
    padded = megatron_buckets(weights, 5, ranks=3, sharded=True)
    # One weight ends at 3, the next begins at 64 and is above the limit; lcm(3, 128) = 384.
    assert [(len(b.parameters), b.elements) for b in padded] == [(2, 384)] * 5


def test_the_default_bucket_grows_with_the_ranks() -> None:
    assert [megatron_bucket_elements(ranks) for ranks in (1, 40, 41, 512)] == [40e6, 40e6, 41e6, 512e6]


@pytest.mark.parametrize(("library", "zero"), [("ddp", 1), ("ddp", 3), ("fsdp", 0), ("fsdp", 1)])
def test_stages_that_a_library_does_not_have(library: str, zero: int) -> None:
    with pytest.raises(InputError, match=f"zero = {zero} with dp_library = '{library}'.*use one of them"):
        synchronisation(torch_model(), Plan(dp=2, dp_library=library, zero=zero), "bf16")


def test_weights_of_8_bits_are_gathered_as_they_rest() -> None:
    """Two of 64 elements, one of a byte each: a bucket of 128 is 192 bytes; its gradients are not smaller."""
    weights = [Parameter("w1", 64, "op", 0, bytes=64), Parameter("w2", 64, "op", 0, bytes=128)]
    found = synchronisation(weights, Plan(dp=2, distributed_optimizer=True), "bf16")
    assert [message.message_bytes for message in found.after_update] == [192]
    assert [own.bucket.message_bytes for own in found.reductions] == [512]
    units = synchronisation(weights, Plan(dp=2, zero=3, dp_library="fsdp"), "bf16")
    assert [message.message_bytes for message in units.forward] == [256]


@pytest.mark.parametrize("zero", [2, 3])
def test_megatron_fsdp(zero: int) -> None:
    """Units of `fully_shard` with one number as the norm; of zero 2 gathered once, after the update."""
    own = synchronisation(torch_model(), Plan(dp=2, zero=zero), "bf16", root=ROOT)
    units = synchronisation(torch_model(), Plan(dp=2, zero=zero, dp_library="fsdp"), "bf16", root=ROOT)
    assert (own.reductions, own.reductions_in, own.backward) == (units.reductions, "every", units.backward)
    assert own.forward + own.after_update == units.forward
    assert bool(own.after_update) == (zero == 2)
    assert [message.message_bytes for message in own.before_update] == [4]
