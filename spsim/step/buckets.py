"""Buckets: the weights whose gradients, or new values, travel in one message, as each library puts them together.

Recorded from the libraries on real processes (`tests/data/data_parallel_steps.csv.gz`): Megatron-Core 0.16.1
(`distributed/param_and_grad_buffer.py`), torch 2.13 (`DistributedDataParallel`, `fully_shard`) and DeepSpeed 0.19.8.
All of steps after the first: in the first one, before they know in which order gradients come, Megatron reduces after
the backward pass and DDP in one bucket.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import NamedTuple

from spsim.units import MIB

MEGATRON_ALIGNMENT = 64
"""Elements; where a weight begins in the buffer of the distributed optimizer."""
DDP_BUCKET_BYTES = 25 * MIB
DDP_FIRST_BUCKET_BYTES = MIB
DEEPSPEED_BUCKET_ELEMENTS = 500_000_000


class Parameter(NamedTuple):
    """A weight as a rank holds it while it is used."""

    name: str
    elements: int
    operator: str
    """That makes its gradient: a module, to the libraries."""
    block: int
    """Place of its block in the forward pass of the rank's stage, from 0."""
    shared: bool = False
    """With another pipeline stage, as a tied embedding is."""
    bytes: int | None = None
    """As it rests, where Megatron gathers it so; else of the type of weights."""
    spread: bool = False
    """Of experts that are spread over ranks, so that fewer replicas hold it."""
    summed_over: int = 0
    """Ranks of tp of which each has a summand of its gradient."""


class Bucket(NamedTuple):
    """One message."""

    parameters: tuple[Parameter, ...]
    """In the order in which they are put into it."""
    elements: int
    """With what is padded."""


def megatron_bucket_elements(ranks: int) -> int:
    """At how many elements a bucket closes unless it is said, where gradients are reduced behind the backward pass."""
    return max(40_000_000, 1_000_000 * ranks)


def megatron_buckets(
    parameters: Sequence[Parameter], limit: int | None, *, ranks: int, sharded: bool
) -> tuple[Bucket, ...]:
    """From the last weight registered to the first; a bucket closes once it has `limit` elements, never where that is
    None. `sharded` is for the distributed optimizer over so many ranks: each weight begins at a multiple of 64
    elements, a bucket ends at one of lcm(ranks, 128), and a weight shared with another stage is alone.
    """
    buckets: list[Bucket] = []
    own: list[Parameter] = []
    end = 0
    for parameter in reversed(parameters):
        alone = parameter.shared and sharded
        if alone and own:
            buckets.append(Bucket(tuple(own), padded(end, ranks, sharded=sharded)))
            own, end = [], 0
        own.append(parameter)
        end = _appended(end, parameter, sharded=sharded)
        if alone or (limit is not None and end >= limit):
            buckets.append(Bucket(tuple(own), padded(end, ranks, sharded=sharded)))
            own, end = [], 0
    return (*buckets, Bucket(tuple(own), padded(end, ranks, sharded=sharded))) if own else tuple(buckets)


def unpadded(parameters: Iterable[Parameter], times: Sequence[int], *, sharded: bool) -> int:
    """Elements of one of these buckets up to the end of the last weight that is put into it, where each block comes so
    many times in a row.
    """
    alignment = MEGATRON_ALIGNMENT if sharded else 1
    end = 0
    for block, own in groupby(parameters, key=lambda p: p.block):
        size = 0
        for parameter in own:
            size = _appended(size, parameter, sharded=sharded)
        end = _multiple(end, alignment) + (times[block] - 1) * _multiple(size, alignment) + size
    return end


def _appended(end: int, parameter: Parameter, *, sharded: bool) -> int:
    return _multiple(end, MEGATRON_ALIGNMENT if sharded else 1) + parameter.elements


def padded(elements: int, ranks: int, *, sharded: bool) -> int:
    """Elements of one of these buckets with what fills it up for its ranks."""
    return _multiple(elements, math.lcm(ranks, 128)) if sharded else elements


def ddp_buckets(
    parameters: Sequence[Parameter], itemsize: int, *, limit: int = DDP_BUCKET_BYTES, first: int | None = None
) -> tuple[Bucket, ...]:
    """In the order in which gradients come, which is from the last weight to the first where weights are registered as
    they are used. A bucket closes once it has `limit` bytes, the first one once it has `first`.
    """
    buckets: list[Bucket] = []
    own: list[Parameter] = []
    elements = 0
    for parameter in reversed(parameters):
        own.append(parameter)
        elements += parameter.elements
        if elements * itemsize >= (limit if buckets or first is None else first):
            buckets.append(Bucket(tuple(own), elements))
            own, elements = [], 0
    return (*buckets, Bucket(tuple(own), elements)) if own else tuple(buckets)


def deepspeed_buckets(parameters: Iterable[Parameter], limit: int, *, unit: int = 1) -> tuple[Bucket, ...]:
    """In the order given; a bucket closes before the weight with which it would pass `limit` elements. Each weight is
    padded to a multiple of `unit`: under ZeRO-3, the ranks.
    """
    buckets: list[Bucket] = []
    own: list[Parameter] = []
    elements = 0
    for parameter in parameters:
        size = _multiple(parameter.elements, unit)
        if own and elements + size > limit:
            buckets.append(Bucket(tuple(own), elements))
            own, elements = [], 0
        own.append(parameter)
        elements += size
    return (*buckets, Bucket(tuple(own), elements)) if own else tuple(buckets)


def modules_reversed(parameters: Sequence[Parameter]) -> list[Parameter]:
    """From the last module to the first, the weights of each as registered: gradients under ZeRO-3, whose linear gives
    that of the weight before that of the bias.
    """
    modules = [[*own] for _, own in groupby(parameters, key=lambda p: (p.block, p.operator))]
    return [parameter for own in reversed(modules) for parameter in own]


def fsdp_units(parameters: Sequence[Parameter], root: frozenset[int]) -> tuple[Bucket, ...]:
    """What `fully_shard` gathers at once, in the order of the forward pass: the weights of the blocks of `root`, which
    are not sharded by themselves, and then each other block's.
    """
    own: dict[int, list[Parameter]] = {}
    for parameter in parameters:
        own.setdefault(-1 if parameter.block in root else parameter.block, []).append(parameter)
    return tuple([Bucket(tuple(own[block]), sum(p.elements for p in own[block])) for block in sorted(own)])


def _multiple(number: int, unit: int) -> int:
    """The least multiple of a unit that is not below a number."""
    return -(-number // unit) * unit
