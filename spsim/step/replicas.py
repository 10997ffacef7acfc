"""What the ranks that hold the same weights send each other in a step, as each library issues it.

| library, zero | before forward | before backward | gradients | around the update |
|---|---|---|---|---|
| megatron, 0 | | | all-reduce, last micro-batch | norm |
| megatron, 1 | all-gather, first micro-batch | | reduce-scatter, last micro-batch | norm, all-gather |
| megatron, 2 | | | reduce-scatter | norm, all-gather |
| megatron, 3 | all-gather | all-gather | reduce-scatter | norm |
| ddp, 0 | | | all-reduce, last micro-batch | |
| fsdp, 2 | all-gather | | reduce-scatter | norm |
| fsdp, 3 | all-gather | all-gather | reduce-scatter | norm |
| deepspeed, 0 | | | all-reduce, last micro-batch | |
| deepspeed, 1 | | | all-reduce, last micro-batch | overflow, norm, all-gather |
| deepspeed, 2 | | | all-reduce | overflow, norm, all-gather |
| deepspeed, 3 | all-gather | all-gather of large models | reduce-scatter | norm, all-gather of what stays whole |

The distributed optimizer gathers before forward with `dp_overlap` of parameters, else after the update. Of steps after
the first; sources as of `buckets`, but for megatron 2 and 3: Megatron-FSDP as its documentation says.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Literal, NamedTuple

from spsim.errors import InputError
from spsim.inputs.plan import Plan
from spsim.inputs.workload import ELEMENT_BYTES, Precision
from spsim.program.blocks.optimizer import expert_shard_ranks, shard_ranks
from spsim.program.instructions import Program
from spsim.program.placement import Collective, Extent
from spsim.step.buckets import (
    DDP_BUCKET_BYTES,
    DDP_FIRST_BUCKET_BYTES,
    DEEPSPEED_BUCKET_ELEMENTS,
    Bucket,
    Parameter,
    ddp_buckets,
    deepspeed_buckets,
    fsdp_units,
    megatron_bucket_elements,
    megatron_buckets,
    modules_reversed,
)
from spsim.step.gradients import GRADIENTS, NORM, OVERFLOW, PARAMETERS
from spsim.work import FP32_BYTES

Group = Literal["shard", "replicate", "world", "model", "stages", "embedding", "experts"]
"""Who takes part: the ranks that share one copy of what is sharded, those that hold the same shard, all, those of one
replica, those at the same place of all stages, of the first and the last stage, those that hold the same experts.
"""
When = Literal["every", "first", "last"]
"""Micro-batch."""
PREFETCH_ELEMENTS = 50_000_000
PERSISTENT_ELEMENTS = 100_000
REUSED_ELEMENTS = 1_000_000_000
"""Of ZeRO-3 in DeepSpeed unless changed (`stage3_prefetch_bucket_size`, `stage3_param_persistence_threshold`,
`stage3_max_live_parameters` and `stage3_max_reuse_distance`): of a gather, below which a weight stays whole, and up to
which weights are kept for the backward pass.
"""


class Message(NamedTuple):
    """One collective; it moves the whole of its elements, as `message_bytes` counts."""

    what: str
    collective: Collective
    elements: int
    itemsize: Extent
    group: Group = "shard"
    parameters: tuple[Parameter, ...] = ()
    """Whose gradients or values it moves."""

    @property
    def message_bytes(self) -> int:
        """Of all-gathers the result, of reduce-scatters the input."""
        return math.ceil(self.elements * self.itemsize)


@dataclass(frozen=True, slots=True)
class Synchronisation:
    """What one rank of a stage sends for its weights in a steady step, each field in order of issue."""

    forward: tuple[Message, ...] = ()
    """Weights gathered for the forward pass. The first is issued before it, each other one when the one before it is
    waited for, which is at the first use of one of its weights.
    """
    forward_in: When = "every"
    backward: tuple[Message, ...] = ()
    """Weights gathered again for the backward pass of each micro-batch, in the same way."""
    reductions: tuple[tuple[Message, ...], ...] = ()
    """Of gradients, each with what follows it at once."""
    reductions_in: When = "last"
    behind_backward: bool = True
    """Whether a reduction is issued once its last gradient is there, and those before it are; else after the pass."""
    before_update: tuple[Message, ...] = ()
    after_update: tuple[Message, ...] = ()
    sharded: bool = False
    """Whether what is gathered for a pass is freed after its last use."""
    gradient_bytes: int = 0
    """Of an element of a gradient that is freed once it is reduced; 0 where gradients have a buffer for the step."""


def synchronisation(
    parameters: Sequence[Parameter],
    plan: Plan,
    precision: Precision,
    *,
    stage: int = 0,
    chunk: int = 0,
    root: frozenset[int] = frozenset(),
) -> Synchronisation:
    """Of the weights of a rank in one chunk of a stage, in order of registration. `root` are the blocks that FSDP does
    not shard by themselves. Raises `InputError` for stages of ZeRO that the library does not have.
    """
    builders = _STAGES[plan.dp_library]
    if plan.zero_stage not in builders:
        known = " or ".join(str(zero) for zero in builders)
        raise InputError(
            f"plan: zero = {plan.zero_stage} with dp_library = {plan.dp_library!r}: that library has "
            f"zero = {known} only; use one of them or another dp_library"
        )
    build, spread = builders[plan.zero_stage], tuple(p for p in parameters if p.spread)
    if not spread:
        return build(_Weights(tuple(parameters), plan, precision, stage, chunk, root))
    shared = tuple(p for p in parameters if not p.spread)
    usual = build(_Weights(shared, plan, precision, stage, chunk, root))
    return _beside(usual, build(_Weights(spread, plan, precision, stage, chunk, root, spread=True)), parameters)


def _beside(usual: Synchronisation, of_experts: Synchronisation, parameters: Sequence[Parameter]) -> Synchronisation:
    """Buckets of experts that are spread are apart from all others (`expert_parallel_buffers`), each moved as its
    weights come; what ranks agree on they agree on once.
    """
    place = {parameter: at for at, parameter in enumerate(parameters)}

    def among(messages: Iterable[Message]) -> list[Message]:
        return [message._replace(group="experts") for message in messages]

    def first(message: Message) -> int:
        return min(place[parameter] for parameter in message.parameters)

    rows = [tuple(among(row)) for row in of_experts.reductions]
    return replace(
        usual,
        forward=tuple(sorted([*usual.forward, *among(of_experts.forward)], key=first)),
        backward=tuple(sorted([*usual.backward, *among(of_experts.backward)], key=first, reverse=True)),
        reductions=tuple(sorted([*usual.reductions, *rows], key=lambda row: first(row[0]), reverse=True)),
        after_update=(*usual.after_update, *among(of_experts.after_update)),
    )


@dataclass(frozen=True, slots=True)
class _Weights:
    """What the messages depend on."""

    parameters: tuple[Parameter, ...]
    plan: Plan
    precision: Precision
    stage: int
    chunk: int
    root: frozenset[int]
    spread: bool = False
    """Whether they are of experts that are spread over ranks."""

    @property
    def itemsize(self) -> int:
        """Of a weight."""
        return ELEMENT_BYTES[self.precision]

    @property
    def gradient_itemsize(self) -> int:
        """As the plan accumulates them; no more than fp32."""
        return FP32_BYTES if self.plan.grad_dtype == "fp32" else self.itemsize

    @property
    def ranks(self) -> int:
        """That share one copy of what is sharded."""
        return expert_shard_ranks(self.plan) if self.spread else shard_ranks(self.plan)

    def gather(self, bucket: Bucket) -> Message:
        """Of weights: of 8 bits and fewer as they rest in Megatron, padded as the others of a bucket."""
        own, itemsize = bucket.parameters, Fraction(self.itemsize)
        if self.plan.dp_library == "megatron":
            known = sum(p.elements * self.itemsize if p.bytes is None else p.bytes for p in own)
            itemsize = Fraction(known, sum(p.elements for p in own))
        size = itemsize.numerator if itemsize.denominator == 1 else itemsize
        return Message(PARAMETERS, "all_gather", bucket.elements, size, parameters=own)

    def reduce(self, bucket: Bucket, collective: Collective, itemsize: int) -> Message:
        """Of gradients."""
        return Message(GRADIENTS, collective, bucket.elements, itemsize, parameters=bucket.parameters)

    def scalar(self, what: str, itemsize: int = FP32_BYTES, group: Group = "shard") -> Message:
        """All-reduce of one number."""
        return Message(what, "all_reduce", 1, itemsize, group)

    def norm_of_stages(self, group: Group = "stages") -> tuple[Message, ...]:
        """The norm of a stage's gradients is summed over stages, where there are several."""
        return (self.scalar(NORM, group=group),) if self.plan.pp > 1 else ()


def parameters_of(programs: Iterable[Program]) -> tuple[Parameter, ...]:
    """The weights of the blocks of a stage, in the order of the forward pass."""
    return tuple([
        Parameter(weights.name, weights.elements, weights.operator, block, bytes=weights.bytes, spread=weights.spread)
        for block, program in enumerate(programs)
        for weights in program.weights
    ])  # fmt: skip


def _megatron(weights: _Weights) -> Synchronisation:
    """One buffer of all gradients, cut into buckets where they are reduced behind the backward pass: on the first
    stage and in its first chunk only. Later ones have time, as their passes end before those of the first.
    """
    plan, sharded = weights.plan, weights.plan.zero_stage > 0
    behind = plan.dp_overlap in (True, "gradients")
    limit = None
    if behind and weights.stage == 0 and weights.chunk == 0:
        limit = plan.bucket_elements or megatron_bucket_elements(weights.ranks)
    buckets = megatron_buckets(weights.parameters, limit, ranks=weights.ranks, sharded=sharded)
    collective: Collective = "reduce_scatter" if sharded else "all_reduce"
    gathers = tuple(weights.gather(bucket) for bucket in buckets if sharded)
    prefetched = plan.dp_overlap in (True, "parameters")
    return Synchronisation(
        forward=gathers[::-1] if prefetched else (),
        forward_in="first",
        reductions=tuple((weights.reduce(bucket, collective, weights.gradient_itemsize),) for bucket in buckets),
        behind_backward=behind,
        before_update=(
            *(_tied(p, weights, weights.gradient_itemsize) for p in weights.parameters if p.shared),
            *_scaled(weights, "world" if sharded else "model"),
            weights.scalar(NORM, group="world" if sharded else "model"),
        ),
        after_update=() if prefetched else gathers,
    )


def _tied(parameter: Parameter, weights: _Weights, itemsize: int) -> Message:
    """The gradients of a weight that two stages hold are summed whole, although a rank needs its shard only."""
    return Message("shared gradients", "all_reduce", parameter.elements, itemsize, "embedding", (parameter,))


def _scaled(weights: _Weights, group: Group) -> tuple[Message, ...]:
    """With a scaled loss ranks agree on whether a gradient was infinite."""
    return (weights.scalar(OVERFLOW, group=group),) if weights.precision == "fp16" else ()


def _ddp(weights: _Weights) -> Synchronisation:
    """Gradients are of the type of weights. With `no_sync` for all micro-batches but the last, as torch's pipeline
    stages do it, too.
    """
    size, given = weights.itemsize, weights.plan.bucket_elements
    if given:
        buckets = ddp_buckets(weights.parameters, size, limit=given * size)
    else:
        buckets = ddp_buckets(weights.parameters, size, limit=DDP_BUCKET_BYTES, first=DDP_FIRST_BUCKET_BYTES)
    reductions = tuple((weights.reduce(bucket, "all_reduce", size),) for bucket in buckets)
    return Synchronisation(reductions=reductions, before_update=weights.norm_of_stages())


def _fsdp(weights: _Weights) -> Synchronisation:
    """A unit a block, and the root, which is gathered first, stays whole until the backward pass has ended, and is
    reduced last. Each micro-batch reduces, unless `set_requires_gradient_sync` says otherwise. Zero 2 keeps what is
    gathered for the backward pass (`reshard_after_forward` off).

    Torch's pipeline stages keep weights gathered, and gradients whole, from the first micro-batch to the last, and
    reduce them when all have passed, root first (`perform_reduce_grad` of `pipelining/stage.py`).
    """
    units = fsdp_units(weights.parameters, weights.root)
    first, own = (units[:1], units[1:]) if weights.root else ((), units)
    gathers, staged = tuple(map(weights.gather, own)), weights.plan.pp > 1
    return Synchronisation(
        forward=(*map(weights.gather, first), *gathers),
        forward_in="first" if staged else "every",
        backward=gathers[::-1] if weights.plan.zero == 3 else (),
        reductions=tuple(tuple(_hybrid(unit, weights)) for unit in (units if staged else (*own[::-1], *first))),
        reductions_in="last" if staged else "every",
        behind_backward=not staged,
        before_update=(
            Message(NORM, "all_reduce", len(weights.parameters), FP32_BYTES), *weights.norm_of_stages()
        ),
        sharded=not staged,
        gradient_bytes=0 if staged else weights.itemsize,
    )  # fmt: skip


def _megatron_fsdp(weights: _Weights) -> Synchronisation:
    """Units as those of FSDP; of zero 2 (`optim_grads`) the weights stay whole and are gathered after the update."""
    units = _fsdp(weights)
    norm = (*_scaled(weights, "world"), weights.scalar(NORM, group="world"))
    if weights.plan.zero == 3:
        return replace(units, before_update=norm)
    return replace(units, forward=(), before_update=norm, after_update=units.forward)


def _hybrid(unit: Bucket, weights: _Weights) -> Sequence[Message]:
    """Of a unit: reduced over the ranks that share a copy, then its shards over the copies (HSDP)."""
    scattered = weights.reduce(unit, "reduce_scatter", weights.gradient_itemsize)
    if weights.plan.shard_group in (None, weights.plan.dp):
        return (scattered,)
    shard = -(-unit.elements // weights.ranks)
    return scattered, scattered._replace(collective="all_reduce", elements=shard, group="replicate")


def _deepspeed(weights: _Weights) -> Synchronisation:
    """Stages 0 to 2 reduce whole buckets in the type of weights; of stages 1 and 2 each rank keeps its part, updates
    it, and all gather. Without `overlap_comm`, which its pipeline switches off, stages 0 and 1 reduce after the
    backward pass, as weights are registered. A tied table is summed over pipeline stages in the type of weights.
    """
    plan, stage = weights.plan, weights.plan.zero_stage
    behind = stage == 2 or (stage == 1 and plan.dp_overlap in (True, "gradients") and plan.pp == 1)
    ordered = weights.parameters[::-1] if behind else weights.parameters
    buckets = deepspeed_buckets(ordered, plan.bucket_elements or DEEPSPEED_BUCKET_ELEMENTS)
    all_reduced = Synchronisation(
        reductions=tuple((weights.reduce(bucket, "all_reduce", weights.itemsize),) for bucket in buckets),
        reductions_in="every" if stage == 2 else "last",
        behind_backward=behind,
    )
    tied = tuple(_tied(parameter, weights, weights.itemsize) for parameter in weights.parameters if parameter.shared)
    if stage == 0:
        return replace(all_reduced, before_update=(*tied, *weights.norm_of_stages("model")))
    whole = Bucket(weights.parameters, sum(parameter.elements for parameter in weights.parameters))
    numbers = (weights.scalar(OVERFLOW, itemsize=1), weights.scalar(NORM))
    return replace(
        all_reduced,
        before_update=(*tied, *numbers, *weights.norm_of_stages("model")),
        after_update=(weights.gather(whole),),
    )


def _deepspeed_3(weights: _Weights) -> Synchronisation:
    """Small weights stay whole, each gathered after its update. Gathers of the others are cut where DeepSpeed
    prefetches by its trace of modules, here where a gather would pass the prefetch bucket; gathered once for both
    passes where all can be kept.
    """
    plan, ranks = weights.plan, weights.ranks
    small = [p for p in weights.parameters if p.elements <= PERSISTENT_ELEMENTS]
    large = [p for p in weights.parameters if p.elements > PERSISTENT_ELEMENTS]
    gathers = tuple(map(weights.gather, deepspeed_buckets(large, PREFETCH_ELEMENTS, unit=ranks)))
    kept = sum(parameter.elements for parameter in large) <= REUSED_ELEMENTS
    limit = plan.bucket_elements or DEEPSPEED_BUCKET_ELEMENTS
    buckets = deepspeed_buckets(modules_reversed(weights.parameters), limit, unit=ranks)
    return Synchronisation(
        forward=gathers,
        backward=() if kept else gathers[::-1],
        reductions=tuple((weights.reduce(bucket, "reduce_scatter", weights.itemsize),) for bucket in buckets),
        reductions_in="every",
        before_update=(weights.scalar(NORM, itemsize=8),),
        after_update=tuple(map(weights.gather, deepspeed_buckets(small, 0, unit=ranks))),
        sharded=True,
        gradient_bytes=weights.itemsize,
    )


_STAGES: dict[str, dict[int, Callable[[_Weights], Synchronisation]]] = {
    "megatron": {0: _megatron, 1: _megatron, 2: _megatron_fsdp, 3: _megatron_fsdp},
    "ddp": {0: _ddp},
    "fsdp": {2: _fsdp, 3: _fsdp},
    "deepspeed": {0: _deepspeed, 1: _deepspeed, 2: _deepspeed, 3: _deepspeed_3},
}
"""Library and stage of ZeRO."""
