"""What follows the last micro-batch in many plans at once, where nothing of it runs behind passes.

Which kernels and collectives close a step on stages that run the same blocks is found for one plan of those whose
groups lie along the same axes (`staged_replicas`). Bytes of a bucket hang on the number of its ranks as its padding
does; all else is the same. What takes time is priced for all plans together, equal ones once.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from spsim.costs.collectives import CommCost
from spsim.costs.kernels import ComputeCost
from spsim.inputs.plan import Plan
from spsim.inputs.workload import ELEMENT_BYTES, Precision
from spsim.lazy import Cache
from spsim.program.blocks.optimizer import expert_shard_ranks, shard_ranks
from spsim.program.mesh import Axis, Mesh, nodes_of, world_of
from spsim.program.placement import Collective, Extent
from spsim.program.sizes import Numbers, Template
from spsim.step.buckets import padded, unpadded
from spsim.step.closing import PARAMETER_GATHER, Closing, Optimizer, weight_casts
from spsim.step.columns.closing import Part, parts_of
from spsim.step.ending import Ending, spread_parameters
from spsim.step.gradients import Sync
from spsim.step.itinerary import Chunk
from spsim.step.messages import Message
from spsim.step.replicas import itemsize_at_rest
from spsim.step.staged_replicas import StageSync, shares_embedding, weight_numbers
from spsim.step.stages import Stages
from spsim.units import PS_PER_S, picoseconds
from spsim.work import MemoryBound

KEPT = 4096
"""Of what closes a step on stages of one kind, and of groups over nodes."""


@dataclass(frozen=True, slots=True)
class _Bucket:
    """A message of gradients or weights, whose padding hangs on its ranks."""

    axes: tuple[Axis, ...]
    collective: Collective
    elements: int
    """Without it."""
    itemsize: Extent
    sharded: bool
    spread: bool
    """Whether it is of experts that are spread over ranks."""
    times: int = 1

    def message(self, plan: Plan) -> int:
        """Its bytes."""
        ranks = expert_shard_ranks(plan) if self.spread else shard_ranks(plan)
        return math.ceil(padded(self.elements, ranks, sharded=self.sharded) * self.itemsize)


class _Send(NamedTuple):
    """Another collective, over weights or of what ranks agree on."""

    axes: tuple[Axis, ...]
    collective: Collective
    ranks: int | None
    """All along the axes unless given."""
    size: int
    """Bytes of a message,"""
    times: int
    """of so many."""


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

    def ask(self, numbers: Numbers, plan: Plan, stages: Stages, gpus_per_node: int) -> list[Asked]:
        """What closes the step of a plan of several stages, or whose ranks share weights: for each kind of stages."""
        optimizer = Optimizer(plan, self._precision)
        world = world_of(plan)
        return [
            self._asked(_form_of(numbers, plan, optimizer, stages, kind, world), plan, optimizer, world, gpus_per_node)
            for kind in range(len(stages.kinds))
        ]

    def _asked(self, form: _Form, plan: Plan, optimizer: Optimizer, world: Mesh, per_node: int) -> Asked:
        sizes = optimizer.sizes(form.parameters, form.spread)
        self._kernels.update(dict.fromkeys(sizes, 0))

        def key(task: _Task) -> Key:
            if isinstance(task, int):
                return self._kernels, sizes[task]
            if isinstance(task, MemoryBound):
                return {0: picoseconds(float(self._compute.duration(task)))}, 0
            return self._sent(task, plan, world, per_node)

        return Asked(form, [[key(task) for task in own] for own in form.tasks])

    def _sent(self, task: _Bucket | _Send, plan: Plan, world: Mesh, per_node: int) -> Key:
        own = task.ranks if isinstance(task, _Send) else None
        ranks = world.size(task.axes) if own is None else own
        known = self._sends.setdefault(
            (task.collective, ranks, _nodes(world, task.axes, ranks, per_node), task.times), {}
        )
        size = task.message(plan) if isinstance(task, _Bucket) else task.size
        known.setdefault(size, 0)
        return known, size

    def price(self) -> None:
        """All that has been asked for."""
        sizes = np.array([*self._kernels], dtype=np.float64)
        seconds = self._compute.duration(MemoryBound("optimizer", sizes))  # type: ignore[arg-type]
        self._kernels.update(zip([*self._kernels], _ps(seconds), strict=True))
        for (collective, ranks, nodes, count), own in self._sends.items():
            seconds = self._comm.duration(collective, np.array([*own], dtype=np.int64), ranks, nodes)
            own.update(zip([*own], _ps(count * seconds), strict=True))


def _ps(seconds: Any) -> list[int]:
    found: list[int] = np.rint(np.asarray(seconds) * PS_PER_S).astype(np.int64).tolist()
    return found


def _nodes(world: Mesh, axes: tuple[Axis, ...], ranks: int, per_node: int) -> int:
    """Nodes that so many neighbours along some axes span."""
    key = tuple(world.steps(world.axes)), world.axes, world.expert_axes, axes, ranks, per_node
    return _known_nodes.get(key, lambda: nodes_of(world, axes, per_node, ranks))


_known_nodes: Cache[int] = Cache(KEPT, lambda _: 1)
_forms: Cache[_Form] = Cache(KEPT, lambda _: 1)
_closed: Cache[_Closed] = Cache(KEPT, lambda _: 1)


def _form_of(numbers: Numbers, plan: Plan, optimizer: Optimizer, stages: Stages, kind: int, world: Mesh) -> _Form:
    """That of a kind of stages of a plan, kept for plans whose groups lie along the same axes."""
    names, number = weight_numbers(numbers.template), stages.kind_of.index(kind)
    chunks = [chunk.runs for chunk in stages[number]]
    weights = tuple([tuple([(names[run.block], run.numbered) for run in runs]) for runs in chunks])
    counts = tuple([tuple([run.count for run in runs]) for runs in chunks])
    parameters = sum(run.count * numbers.parameters(run.block) for run in stages.kinds[kind])
    shared = shares_embedding(numbers.template, stages)
    key = weights, _options(plan), optimizer.precision, world.axes, shared
    return _forms.get(
        (key, counts, parameters),
        lambda: _made(
            _closed.get(key, lambda: _closed_by(numbers.template, plan, optimizer, stages, number)),
            numbers, plan, optimizer, chunks, parameters,
        ),
    )  # fmt: skip


def _options(plan: Plan) -> Hashable:
    """What is read of a plan beside the number of its ranks."""
    return (
        plan.zero_stage, plan.grad_dtype, plan.moment_dtype, plan.precision_aware_optimizer, plan.norm_gradients,
        plan.sequence_parallel, plan.dp > 1, plan.expert_axes,
    )  # fmt: skip


class _Closed(NamedTuple):
    """What closes the step on a stage, whatever the number of its layers."""

    closings: Sequence[Closing]
    reduced: Sequence[tuple[int, Message]]
    """Messages of gradients with the chunk that each is of,"""
    gathered: Sequence[tuple[int, Message]]
    """and of updated weights; of one layer where there are several in a row."""


def _closed_by(template: Template, plan: Plan, optimizer: Optimizer, stages: Stages, number: int) -> _Closed:
    chunks = [chunk._replace(runs=[replace(run, count=1) for run in chunk.runs]) for chunk in stages[number]]
    sync = StageSync(template, plan, optimizer, stages)
    closings = sync.closings(number, tuple(run for chunk in chunks for run in chunk.runs), chunks).closings
    return _Closed(closings, *sync.buckets(number, chunks))


def _made(
    closed: _Closed, numbers: Numbers, plan: Plan, optimizer: Optimizer, chunks: Sequence[Chunk], parameters: int
) -> _Form:
    """With so many layers as the chunks of a stage have."""
    template, runs = numbers.template, [run for chunk in chunks for run in chunk]
    calls = Ending(template, optimizer, [(runs, closed.closings)]).calls(numbers)[0]
    casts = weight_casts([(run.count, cast) for run in runs for cast in template.programs[run.block].weight_casts])
    kernels: dict[str, int | MemoryBound] = {name: place for place, name in enumerate(optimizer.names)}
    kernels |= {cast.name: cast.work for cast in casts}
    tasks = []
    for closing in closed.closings:
        gathers = closing.segment.name == PARAMETER_GATHER
        buckets = iter(closed.gathered if gathers else closed.reduced if closing.segment.phase == "weight_sync" else ())
        own: list[_Task] = []
        for step in closing.steps:
            if isinstance(step, str):
                own.append(kernels[step])
                continue
            chunk, message = next(buckets, (0, None))
            if message is None:
                own.append(
                    _Send(step.axes, step.collective, step.ranks if step.axes == ("tp",) else None, *calls[step])
                )
            else:
                own.append(_bucket(step, message, plan, optimizer, [run.count for run in chunks[chunk]]))
        tasks.append(own)
    spread = sum(spread_parameters(template.programs[run.block]) * run.count for run in runs)
    return _Form(parameters, spread, closed.closings, tasks)


def _bucket(sync: Sync, message: Message, plan: Plan, optimizer: Optimizer, times: Sequence[int]) -> _Bucket:
    """Of blocks that are there so many times."""
    sharded = plan.zero_stage > 0
    itemsize = message.itemsize
    if sync.collective == "all_gather":
        itemsize = itemsize_at_rest(message.parameters, ELEMENT_BYTES[optimizer.precision], times)
    elements = unpadded(message.parameters, times, sharded=sharded)
    return _Bucket(sync.axes, sync.collective, elements, itemsize, sharded, message.group == "experts")
