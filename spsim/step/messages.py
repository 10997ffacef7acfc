"""What ranks that hold the same weights send each other, as messages: `replicas` makes them as each library does."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from spsim.program.placement import Collective, Extent
from spsim.step.buckets import Parameter

Group = Literal["shard", "replicate", "world", "model", "tp", "stages", "embedding", "experts"]
"""Who takes part: the ranks that share one copy of what is sharded, those that hold the same shard, all, those of one
replica, of it those of one stage, those at the same place of all stages, of the first and the last stage, those that
hold the same experts.
"""
When = Literal["every", "first", "last"]
"""Micro-batch."""


class Message(NamedTuple):
    """One collective; it moves the whole of its elements, as `message_bytes` counts."""

    what: str
    collective: Collective
    elements: int
    itemsize: Extent
    group: Group = "shard"
    parameters: tuple[Parameter, ...] = ()
    """Whose gradients or values it moves."""
    ranks: int | None = None
    """Neighbours of the group, where it is not all of it."""

    @property
    def message_bytes(self) -> int:
        """Of all-gathers the result, of reduce-scatters the input."""
        return math.ceil(self.elements * self.itemsize)


class Reduction(NamedTuple):
    """Of the gradients of a bucket, with what stands before and behind it on its ranks."""

    bucket: Message
    before: tuple[Message, ...] = ()
    """Sums of single gradients, for which the kernels that follow wait."""
    after: tuple[Message, ...] = ()

    @property
    def messages(self) -> tuple[Message, ...]:
        """In order of issue."""
        return *self.before, self.bucket, *self.after


@dataclass(frozen=True, slots=True)
class Synchronisation:
    """What one rank of a stage sends for its weights in a steady step, each field in order of issue."""

    forward: tuple[Message, ...] = ()
    """Weights gathered for the forward pass. The first is issued before it, each other one when the one before it is
    waited for, which is at the first use of one of its weights.
    """
    by_module: bool = False
    """Whether that is where the pass of their block begins, by hooks of the module."""
    forward_in: When = "every"
    backward: tuple[Message, ...] = ()
    """Weights gathered again for the backward pass of each micro-batch, in the same way."""
    reductions: tuple[Reduction, ...] = ()
    """Of gradients, in order of issue."""
    reductions_in: When = "last"
    behind_backward: bool = True
    """Whether a reduction is issued once its last gradient is there, and those before it are; else after the pass."""
    before_update: tuple[Message, ...] = ()
    after_update: tuple[Message, ...] = ()
    sharded: bool = False
    """Whether what is gathered for a pass is freed after its last use."""
    gradient_bytes: int = 0
    """Of an element of a gradient that is freed once it is reduced; 0 where gradients have a buffer for the step."""

    @property
    def summed_over_tp(self) -> frozenset[str]:
        """Weights whose gradients are summed over tp before they are reduced."""
        return frozenset(p.name for own in self.reductions for message in own.before for p in message.parameters)


def beside(usual: Synchronisation, of_experts: Synchronisation, parameters: Sequence[Parameter]) -> Synchronisation:
    """Buckets of experts that are spread are apart from all others (`expert_parallel_buffers` of Megatron-Core), each
    moved as its weights come; what ranks agree on they agree on once. `parameters` are in order of registration.
    """
    place = {parameter: at for at, parameter in enumerate(parameters)}

    def first(message: Message) -> int:
        return min(place[parameter] for parameter in message.parameters)

    def in_turn(messages: Iterable[Message], others: Iterable[Message], *, back: bool = False) -> tuple[Message, ...]:
        return tuple(sorted([*messages, *map(_among_experts, others)], key=first, reverse=back))

    rows = [row._replace(bucket=_among_experts(row.bucket)) for row in of_experts.reductions]
    return replace(
        usual,
        forward=in_turn(usual.forward, of_experts.forward),
        backward=in_turn(usual.backward, of_experts.backward, back=True),
        reductions=tuple(sorted([*usual.reductions, *rows], key=lambda row: first(row.bucket), reverse=True)),
        after_update=(*usual.after_update, *map(_among_experts, of_experts.after_update)),
    )


def _among_experts(message: Message) -> Message:
    return message._replace(group="experts")
