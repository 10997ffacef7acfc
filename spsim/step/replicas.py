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

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

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
from spsim.step.messages import Group, Message, Reduction, Synchronisation, beside
from spsim.work import FP32_BYTES

PREFETCH_ELEMENTS = 50_000_000
PERSISTENT_ELEMENTS = 100_000
REUSED_ELEMENTS = 1_000_000_000
"""Of ZeRO-3 in DeepSpeed unless changed (`stage3_prefetch_bucket_size`, `stage3_param_persistence_threshold`,
`stage3_max_live_parameters` and `stage3_max_reuse_distance`): of a gather, below which a weight stays whole, and up to
which weights are kept for the backward pass.
"""


def synchronisation(
    parameters: Sequence[Parameter],
    plan: Plan,
    precision: Precision,
    *,
    stage: int = 0,
    chunk: int = 0,
    root: frozenset[int] = frozenset(),
    tied: bool = False,
) -> Synchronisation:
    """Of the weights of a rank in one chunk of a stage, in order of registration. `root` are the blocks that FSDP does
    not shard by themselves unless the plan says so, and they share no weights, as `tied` ones do. Raises `InputError`
    for stages of ZeRO that the library does not have.
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
        return build(_Weights(tuple(parameters), plan, precision, stage, chunk, root, tied))
    shared = tuple(p for p in parameters if not p.spread)
    usual = build(_Weights(shared, plan, precision, stage, chunk, root, tied))
    return beside(usual, build(_Weights(spread, plan, precision, stage, chunk, root, tied, spread=True)), parameters)


@dataclass(frozen=True, slots=True)
class _Weights:
    """What the messages depend on."""

    parameters: tuple[Parameter, ...]
    plan: Plan
    precision: Precision
    stage: int
    chunk: int
    root: frozenset[int]
    tied: bool
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
        own, size = bucket.parameters, self.itemsize
        if self.plan.dp_library == "megatron":
            return Message(PARAMETERS, "all_gather", bucket.elements, itemsize_at_rest(own, size), parameters=own)
        return Message(PARAMETERS, "all_gather", bucket.elements, size, parameters=own)

    def reduce(self, bucket: Bucket, collective: Collective, itemsize: int) -> Message:
        """Of gradients."""
        return Message(GRADIENTS, collective, bucket.elements, itemsize, parameters=bucket.parameters)

    def sum_over_tp(self, parameter: Parameter) -> Message:
        """Of the summands of a gradient."""
        size, own = self.itemsize, (parameter,)
        return Message(GRADIENTS, "all_reduce", parameter.elements, size, "tp", own, parameter.summed_over)

    def scalar(self, what: str, itemsize: int = FP32_BYTES, group: Group = "shard") -> Message:
        """All-reduce of one number."""
        return Message(what, "all_reduce", 1, itemsize, group)

    def norm_of_stages(self, group: Group = "stages") -> tuple[Message, ...]:
        """The norm of a stage's gradients is summed over stages, where there are several."""
        return (self.scalar(NORM, group=group),) if self.plan.pp > 1 else ()


def itemsize_at_rest(parameters: Sequence[Parameter], itemsize: int, times: Sequence[int] | None = None) -> Extent:
    """Bytes of an element of some weights, of which a block has so many or is so often; of an `itemsize` unless they
    rest in another type.
    """
    if all(p.bytes is None for p in parameters):
        return itemsize
    often = [1 if times is None else times[p.block] for p in parameters]
    every = [*zip(parameters, often, strict=True)]
    known = sum(n * (p.elements * itemsize if p.bytes is None else p.bytes) for p, n in every)
    found = Fraction(known, sum(n * p.elements for p, n in every))
    return found.numerator if found.denominator == 1 else found


def parameters_of(programs: Iterable[Program]) -> tuple[Parameter, ...]:
    """The weights of the blocks of a stage, in the order of the forward pass."""
    return tuple([own for block, program in enumerate(programs) for own in _of_block(program, block)])


def _of_block(program: Program, block: int) -> Iterator[Parameter]:
    over_tp = {sync.weight: sync.ranks for sync in program.weight_sync if sync.axes == ("tp",)}
    for own in program.weights:
        summed_over = over_tp.get(own.name, 0)
        yield Parameter(
            own.name, own.elements, own.operator, block, bytes=own.bytes, summed_over=summed_over, spread=own.spread
        )


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
        reductions=tuple(Reduction(weights.reduce(b, collective, weights.gradient_itemsize)) for b in buckets),
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
    reductions = tuple(Reduction(weights.reduce(bucket, "all_reduce", size)) for bucket in buckets)
    return Synchronisation(reductions=reductions, before_update=weights.norm_of_stages())


def _fsdp(weights: _Weights) -> Synchronisation:
    """A unit a block, and the root, which is gathered first, stays whole until the backward pass has ended, and is
    reduced last. Where the ends of the model are units, too, the last stays whole from its forward to its backward
    pass, which follows at once (torchtitan). Each micro-batch reduces, unless `set_requires_gradient_sync` says
    otherwise. Zero 2 keeps what is gathered for the backward pass (`reshard_after_forward` off).

    Torch's pipeline stages keep weights gathered, and gradients whole, from the first micro-batch to the last, and
    reduce them when all have passed, root first (`perform_reduce_grad` of `pipelining/stage.py`).
    """
    apart = weights.plan.fsdp_ends == "units" and not weights.tied
    units = fsdp_units(weights.parameters, frozenset() if apart else weights.root)
    first, own = (units[:1], units[1:]) if weights.root and not apart else ((), units)
    gathers, staged = tuple(map(weights.gather, own)), weights.plan.pp > 1
    again = gathers[:-1] if apart and units[-1].parameters[0].block in weights.root else gathers
    return Synchronisation(
        forward=(*map(weights.gather, first), *gathers),
        forward_in="first" if staged else "every",
        by_module=True,
        backward=again[::-1] if weights.plan.zero == 3 else (),
        reductions=tuple(_of_unit(unit, weights) for unit in (units if staged else (*own[::-1], *first))),
        reductions_in="last" if staged else "every",
        behind_backward=not staged,
        before_update=(*_norms(weights), *weights.norm_of_stages()),
        sharded=not staged,
        gradient_bytes=0 if staged else weights.itemsize,
    )  # fmt: skip


def _norms(weights: _Weights) -> Iterator[Message]:
    """Of each weight, summed over its shards: along each axis of a mesh of DTensors."""
    groups: tuple[Group, ...] = ("shard", "tp") if weights.plan.tp > 1 else ("shard",)
    return (Message(NORM, "all_reduce", len(weights.parameters), FP32_BYTES, group) for group in groups)


def _megatron_fsdp(weights: _Weights) -> Synchronisation:
    """Units as those of FSDP; of zero 2 (`optim_grads`) the weights stay whole and are gathered after the update."""
    units = _fsdp(weights)
    norm = (*_scaled(weights, "world"), weights.scalar(NORM, group="world"))
    if weights.plan.zero == 3:
        return replace(units, before_update=norm)
    return replace(units, forward=(), before_update=norm, after_update=units.forward)


def _of_unit(unit: Bucket, weights: _Weights) -> Reduction:
    """Reduced over the ranks that share a copy, then its shards over the copies (HSDP). Before, what each reader of a
    gradient would sum over tp, FSDP2 being the first, each in the type of weights (`_get_grad_inner_tensor`).
    """
    scattered = weights.reduce(unit, "reduce_scatter", weights.gradient_itemsize)
    partial = [p for p in unit.parameters if p.summed_over and weights.plan.norm_gradients == "each_reader"]
    sums = tuple([weights.sum_over_tp(parameter) for parameter in partial])
    if weights.plan.shard_group in (None, weights.plan.dp):
        return Reduction(scattered, sums)
    shard = -(-unit.elements // weights.ranks)
    return Reduction(scattered, sums, (scattered._replace(collective="all_reduce", elements=shard, group="replicate"),))


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
        reductions=tuple(Reduction(weights.reduce(bucket, "all_reduce", weights.itemsize)) for bucket in buckets),
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
        reductions=tuple(Reduction(weights.reduce(bucket, "reduce_scatter", weights.itemsize)) for bucket in buckets),
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
