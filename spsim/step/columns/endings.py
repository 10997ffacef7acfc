"""What follows the last micro-batch in many plans at once, where nothing of it runs behind passes.

Which kernels and collectives close a step on stages that run the same blocks is found for one plan of those whose
groups lie along the same axes (`staged_replicas`). Bytes of a bucket hang on the number of its ranks as its padding
does; all else is the same. What takes time is priced for all plans together, equal ones once.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from spsim.costs.collectives import CommCost
from spsim.costs.kernels import ComputeCost
from spsim.inputs.plan import Plan
from spsim.inputs.workload import ELEMENT_BYTES, Precision
from spsim.lazy import Cache
from spsim.program.blocks.optimizer import expert_shard_ranks, shard_ranks
from spsim.program.mesh import nodes_of, world_of
from spsim.program.placement import Collective, Extent
from spsim.program.sizes import Numbers, Template
from spsim.step.buckets import padded, unpadded
from spsim.step.closing import PARAMETER_GATHER, Closing, Optimizer, weight_casts
from spsim.step.columns.closing import Part, parts_of
from spsim.step.ending import Ending, spread_parameters
from spsim.step.groups import Members, replica_groups
from spsim.step.itinerary import Chunk
from spsim.step.messages import Group, Message
from spsim.step.replicas import itemsize_at_rest
from spsim.step.staged_replicas import StageSync, shares_embedding, weight_numbers
from spsim.step.stages import Stages
from spsim.units import PS_PER_S, picoseconds
from spsim.work import MemoryBound

KEPT = 4096
"""Of what closes a step on stages of one kind, and of groups of plans."""


@dataclass(frozen=True, slots=True)
class _Bucket:
    """A message of gradients or weights, whose padding hangs on its ranks."""

    group: Group
    collective: Collective
    elements: int
    """Without it."""
    itemsize: Extent
    sharded: bool
    times: int = 1

    def size(self, plan: Plan) -> int:
        """Bytes of it."""
        ranks = expert_shard_ranks(plan) if self.group == "experts" else shard_ranks(plan)
        return math.ceil(padded(self.elements, ranks, sharded=self.sharded) * self.itemsize)


class _Send(NamedTuple):
    """Another collective, over weights or of what ranks agree on."""

    group: Group | int
    """Or so many neighbours of tp."""
    collective: Collective
    bytes: int
    """Of a message,"""
    times: int
    """of so many."""

    def size(self, plan: Plan) -> int:
        """Bytes of a message."""
        return self.bytes


_Task = int | MemoryBound | _Bucket | _Send
"""A kernel of the optimizer by its place, a cast, or a collective."""


class _Form(NamedTuple):
    """What closes a step on stages of one kind."""

    parameters: int
    spread: int
    """Of these, those of experts that are spread over ranks."""
    closings: Sequence[Closing]
    tasks: Sequence[Sequence[_Task]]
    """Of each closing."""


Key = tuple[dict[int, int], int]
"""Picoseconds by bytes, and bytes."""


class Asked(NamedTuple):
    """What closes the step of a plan on stages of one kind."""

    form: _Form
    tasks: Sequence[Sequence[Key]]

    @property
    def parts(self) -> list[Part]:
        """With its times, once they are known."""
        times = [[known[size] for known, size in own] for own in self.tasks]
        return parts_of([*zip(self.form.closings, times, strict=True)])


class Endings:
    """Of many plans on one profile: asked for one by one, and priced together."""

    def __init__(self, compute: ComputeCost, comm: CommCost, precision: Precision) -> None:
        self._compute, self._comm, self._precision = compute, comm, precision
        self._sends: dict[tuple[Collective, int, int, int], dict[int, int]] = {}
        """By collective, ranks, nodes and number of messages: picoseconds of each size."""
        self._kernels: dict[int, int] = {}
        """Of the optimizer."""
        self._kinds: dict[tuple[Template, Stages], list[_Kind]] = {}

    def ask(self, numbers: Numbers, plan: Plan, stages: Stages, gpus_per_node: int) -> list[Asked]:
        """What closes the step of a plan of several stages, or whose ranks share weights: for each kind of stages."""
        optimizer = Optimizer(plan, self._precision)
        groups = _groups_of(plan, gpus_per_node)
        key = numbers.template, stages
        if key not in self._kinds:
            self._kinds[key] = [*_kinds_of(numbers, stages)]
        asked = []
        for kind in self._kinds[key]:
            form = _form_of(kind, numbers, plan, optimizer, stages, groups)
            sizes = optimizer.sizes(form.parameters, form.spread)
            self._kernels.update(dict.fromkeys(sizes, 0))
            asked.append(Asked(form, [[self._key(task, plan, sizes, groups) for task in own] for own in form.tasks]))
        return asked

    def _key(self, task: _Task, plan: Plan, sizes: Sequence[int], groups: _Groups) -> Key:
        if isinstance(task, int):
            return self._kernels, sizes[task]
        if isinstance(task, MemoryBound):
            return {0: picoseconds(float(self._compute.duration(task)))}, 0
        known = self._sends.setdefault((task.collective, *groups.members(task.group), task.times), {})
        size = task.size(plan)
        known[size] = 0
        return known, size

    def price(self) -> None:
        """All that has been asked for."""
        sizes = np.array([*self._kernels], dtype=np.float64)
        seconds = self._compute.duration(MemoryBound("optimizer", sizes))  # type: ignore[arg-type]
        self._kernels.update(zip([*self._kernels], _ps(seconds), strict=True))
        for (collective, ranks, nodes, times), own in self._sends.items():
            seconds = self._comm.duration(collective, np.array([*own], dtype=np.int64), ranks, nodes)
            own.update(zip([*own], _ps(times * seconds), strict=True))


def _ps(seconds: Any) -> list[int]:
    found: list[int] = np.rint(np.asarray(seconds) * PS_PER_S).astype(np.int64).tolist()
    return found


class _Groups:
    """Who takes part in messages of each group of a plan."""

    def __init__(self, plan: Plan, gpus_per_node: int) -> None:
        self._world, self._gpus_per_node = world_of(plan), gpus_per_node
        self._groups = replica_groups(plan)
        self._members: dict[Group | int, tuple[int, int]] = {}
        self.meeting = tuple([group for group, members in self._groups.items() if members.ranks > 1])
        """Those of more than one rank."""

    def members(self, group: Group | int) -> tuple[int, int]:
        """Ranks of a group, or of so many neighbours of tp, and the nodes that they span."""
        if group not in self._members:
            axes, ranks = Members(("tp",), group) if isinstance(group, int) else self._groups[group]
            self._members[group] = ranks, nodes_of(self._world, axes, self._gpus_per_node, ranks)
        return self._members[group]


_groups: Cache[_Groups] = Cache(KEPT, lambda _: 1)


def _groups_of(plan: Plan, gpus_per_node: int) -> _Groups:
    key = (
        plan.pp, plan.dp, plan.shard_group, plan.ring, plan.ulysses, plan.tp, plan.ep, plan.expert_tp, plan.mesh_order,
        gpus_per_node,
    )  # fmt: skip
    return _groups.get(key, lambda: _Groups(plan, gpus_per_node))


class _Kind(NamedTuple):
    """Stages that run the same."""

    number: int
    """The first of them."""
    weights: Hashable
    """Of the blocks of each chunk,"""
    counts: tuple[tuple[int, ...], ...]
    """and how many of each there are."""
    parameters: int


def _kinds_of(numbers: Numbers, stages: Stages) -> Iterator[_Kind]:
    names = weight_numbers(numbers.template)
    shared = shares_embedding(numbers.template, stages)
    for kind, runs in enumerate(stages.kinds):
        number = stages.kind_of.index(kind)
        chunks = [chunk.runs for chunk in stages[number]]
        weights = tuple([tuple([(names[run.block], run.numbered) for run in own]) for own in chunks])
        counts = tuple([tuple([run.count for run in own]) for own in chunks])
        parameters = sum(run.count * numbers.parameters(run.block) for run in runs)
        yield _Kind(number, (weights, shared), counts, parameters)


_forms: Cache[_Form] = Cache(KEPT, lambda _: 1)
_closed: Cache[_Closed] = Cache(KEPT, lambda _: 1)


def _form_of(kind: _Kind, numbers: Numbers, plan: Plan, optimizer: Optimizer, stages: Stages, groups: _Groups) -> _Form:
    """That of a kind of stages of a plan, kept for plans that have ranks to meet in the same groups."""
    key = kind.weights, _options(plan), optimizer.precision, groups.meeting

    def made() -> _Form:
        closed = _closed.get(key, lambda: _closed_by(numbers.template, plan, optimizer, stages, kind.number))
        return _made(closed, numbers, plan, optimizer, [chunk.runs for chunk in stages[kind.number]], kind.parameters)

    return _forms.get((key, kind.counts, kind.parameters), made)


def _options(plan: Plan) -> Hashable:
    """What is read of a plan beside the number of its ranks."""
    return (
        plan.zero_stage, plan.grad_dtype, plan.moment_dtype, plan.precision_aware_optimizer, plan.norm_gradients,
        plan.sequence_parallel, plan.dp > 1, plan.expert_axes,
    )  # fmt: skip


class _Closed(NamedTuple):
    """What closes the step on a stage, whatever the number of its layers."""

    closings: Sequence[Closing]
    messages: Sequence[Sequence[tuple[int, Message]]]
    """Of each closing, those that are no sums over tp, with the chunk of which they are buckets, or below 0."""


def _closed_by(template: Template, plan: Plan, optimizer: Optimizer, stages: Stages, number: int) -> _Closed:
    chunks = [chunk._replace(runs=[replace(run, count=1) for run in chunk.runs]) for chunk in stages[number]]
    runs = tuple(run for chunk in chunks for run in chunk.runs)
    sync = StageSync(template, plan, optimizer, stages)
    closings = sync.closings(number, runs, chunks).closings
    reduced, gathered, agreed = sync.messages(number, runs, chunks)
    shared = [(-1, message) for message in agreed if message.group == "embedding"]
    numbers = [(-1, message) for message in agreed if message.group != "embedding"]
    own = {"weight_sync": [*reduced, *shared], "optimizer": numbers, PARAMETER_GATHER: gathered}
    return _Closed(closings, [own.get(closing.segment.name, ()) for closing in closings])


def _made(
    closed: _Closed, numbers: Numbers, plan: Plan, optimizer: Optimizer, chunks: Sequence[Chunk], parameters: int
) -> _Form:
    """With so many layers as the chunks of a stage have."""
    template, runs = numbers.template, [run for chunk in chunks for run in chunk]
    calls = Ending(template, optimizer, [(runs, closed.closings)]).calls(numbers)[0]
    casts = weight_casts([(run.count, cast) for run in runs for cast in template.programs[run.block].weight_casts])
    kernels: dict[str, int | MemoryBound] = {name: place for place, name in enumerate(optimizer.names)}
    kernels |= {cast.name: cast.work for cast in casts}
    counts = [[run.count for run in chunk] for chunk in chunks]
    tasks = []
    for closing, messages in zip(closed.closings, closed.messages, strict=True):
        own: list[_Task] = []
        left = iter(messages)
        for step in closing.steps:
            if isinstance(step, str):
                own.append(kernels[step])
            elif step.weights:
                own.append(_Send(step.ranks, step.collective, *calls[step]))
            else:
                chunk, message = next(left)
                own.append(_sent(message, plan, optimizer, counts[chunk] if chunk >= 0 else None))
        tasks.append(own)
    spread = sum(spread_parameters(template.programs[run.block]) * run.count for run in runs)
    return _Form(parameters, spread, closed.closings, tasks)


def _sent(message: Message, plan: Plan, optimizer: Optimizer, times: Sequence[int] | None) -> _Bucket | _Send:
    """A message, or a bucket of blocks that are there so many times."""
    if times is None:
        return _Send(message.group, message.collective, message.message_bytes, 1)
    sharded, itemsize = plan.zero_stage > 0, message.itemsize
    if message.collective == "all_gather":
        itemsize = itemsize_at_rest(message.parameters, ELEMENT_BYTES[optimizer.precision], times)
    return _Bucket(
        message.group, message.collective, unpadded(message.parameters, times, sharded=sharded), itemsize, sharded
    )
