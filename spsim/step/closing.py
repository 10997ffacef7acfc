"""What follows the last micro-batch: gradients are summed over ranks, and the optimizer steps.

Weights are cast after both, for products in 8 or 4 bits: once a step, whatever micro-batches there are.
Without an optimizer the sums of gradients, and with sharded state the gather of weights, are one segment.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

from spsim.engine.pieces import Pass
from spsim.engine.recording import COMPUTE_LANE, TaskInfo
from spsim.engine.tasks import Task
from spsim.inputs.plan import Plan
from spsim.inputs.workload import ELEMENT_BYTES, Precision
from spsim.lazy import lazy
from spsim.program.blocks.optimizer import (
    OptimizerKernel,
    average_gradients,
    expert_shard_ranks,
    optimizer_step,
    parameter_state,
    shard_ranks,
    zero_gradients,
)
from spsim.program.instructions import Program
from spsim.program.mesh import Axis, Mesh
from spsim.step.gradients import NORM, Sync, gradient_syncs, read_again
from spsim.step.groups import Groups, meets, sync_of
from spsim.step.messages import Message, Synchronisation
from spsim.step.segments import Call, Segment
from spsim.work import KernelName, MemoryBound

PARAMETER_GATHER = "parameter_gather"
"""The segment that gathers updated weights."""


@dataclass(frozen=True)
class Closing:
    """A segment after the last micro-batch, of collectives and kernels one after another."""

    segment: Segment
    steps: tuple[Sync | str, ...]
    """What its tasks are: collectives, or kernels of the optimizer by their names."""

    @lazy
    def meetings(self) -> tuple[tuple[int, Axis], ...]:
        """Its collectives in which stages of a pipeline meet, and whether all (`pp`) or the two ends (`embedding`)."""
        own = [(place, step.meets) for place, step in enumerate(self.steps) if isinstance(step, Sync)]
        return tuple([(place, axis) for place, axis in own if axis])

    def infos(self, messages: Mapping[Sync, int]) -> list[TaskInfo]:
        """What its tasks are with the bytes of their messages."""
        return [
            label if isinstance(step, str) else step.info(messages[step])
            for step, label in zip(self.steps, self.segment.labels, strict=True)
        ]


@dataclass(frozen=True)
class StageClosings:
    """Those of one of several pipeline stages."""

    closings: tuple[Closing, ...]
    reductions: tuple[int, ...]
    """Collectives that sum the gradients of each chunk, the last chunk first: they come before all others. Empty where
    they do not run behind passes.
    """
    gathers: tuple[int, ...]
    """Gathers of the weights of each chunk, which come last; empty where they do not run before passes."""


class Update(Protocol):
    """How a step updates the parameters of a rank."""

    @property
    def names(self) -> tuple[str, ...]:
        """Of its kernels, in order."""
        ...

    @property
    def rates(self) -> tuple[KernelName | None, str | None]:
        """Kernel and type that a profile may know rates of; else it is timed as its class."""
        ...

    def sizes(self, parameters: int, spread: int = 0) -> list[int]:
        """Bytes that each kernel of a rank with so many parameters moves, `spread` of them of experts that are spread
        over ranks.
        """
        ...


@dataclass(frozen=True)
class Optimizer:
    """Mixed-precision Adam under a plan."""

    plan: Plan
    precision: Precision

    @property
    def rates(self) -> tuple[KernelName | None, str | None]:
        """Of the class."""
        return None, None

    def sizes(self, parameters: int, spread: int = 0) -> list[int]:
        """Bytes that each kernel of a rank with so many parameters moves, in order. The buffer is cleared for the next
        step; Megatron does so before that begins.
        """
        return [size for _, size in self._kernels(parameters, spread)]

    @lazy
    def names(self) -> tuple[str, ...]:
        """Of its kernels."""
        return tuple(name for name, _ in self._kernels(1))

    def _kernels(self, parameters: int, spread: int = 0) -> list[OptimizerKernel]:
        state, shard = parameter_state(self.plan, ELEMENT_BYTES[self.precision]), parameters
        if self.plan.zero_stage:
            shard = -(-(parameters - spread) // shard_ranks(self.plan)) + -(-spread // expert_shard_ranks(self.plan))
        average = [average_gradients(parameters, state)] if self.plan.dp > 1 else []
        steps = optimizer_step(shard, state, scaled=self.precision == "fp16")
        return [*average, *steps, zero_gradients(parameters, state)]


def closings(
    programs: Mapping[str, Program],
    plan: Plan,
    mesh: Mesh,
    gradient_bytes: int,
    optimizer: Update | None,
) -> tuple[Closing, ...]:
    """The segments after the last micro-batch, in order; programs are by block, bytes of an element of a gradient."""
    syncs = tuple(gradient_syncs(programs, plan, gradient_bytes))
    if optimizer is None:
        return (_closing("weight_sync", "weight_sync", syncs),) if syncs else ()
    sums = tuple(sync for sync in syncs if sync.collective != "all_gather")
    gathers = tuple(sync for sync in syncs if sync.collective == "all_gather")
    found = [_closing("weight_sync", "weight_sync", sums)] if sums else []
    norm = _norm(programs, plan, mesh, gradient_bytes)
    found.append(_closing("optimizer", "optimizer", tuple(_optimizer(optimizer, norm, sums))))
    found += [_closing(PARAMETER_GATHER, "weight_sync", gathers)] if gathers else []
    return *found, *_casts(programs)


def _casts(programs: Mapping[str, Program]) -> list[Closing]:
    """The casts of weights, if there are any."""
    casts = weight_casts([(1, cast) for program in programs.values() for cast in program.weight_casts])
    return [_closing("weight_casts", "optimizer", tuple(cast.name for cast in casts))] if casts else []


class WeightCast(NamedTuple):
    """A kernel that casts weights."""

    name: str
    work: MemoryBound


def weight_casts(casts: Sequence[tuple[int, MemoryBound]]) -> tuple[WeightCast, ...]:
    """Kernels of casts of weights, each so many times, as one of each sort."""
    total: Counter[tuple[KernelName | None, str | None]] = Counter()
    for times, cast in casts:
        total[cast.kernel, cast.dtype] += times * cast.bytes_moved
    return tuple(
        WeightCast(f"{kernel}_weights", MemoryBound("cast", moved, kernel, dtype=dtype))
        for (kernel, dtype), moved in total.items()
    )


def replica_closings(
    sync: Synchronisation,
    groups: Groups,
    programs: Mapping[str, Program],
    others: Sequence[Sync],
    optimizer: Optimizer,
) -> tuple[Closing, ...]:
    """The segments after the last micro-batch, as a library closes a step: gradients that were not reduced behind the
    backward pass, the sums of `others`, the optimizer with what its ranks agree on, and the gathers of weights.
    """

    def syncs(messages: Iterable[Message]) -> list[Sync]:
        return [sync_of(message, groups) for message in messages if meets(message, groups)]

    reductions = () if sync.behind_backward else syncs(m for own in sync.reductions for m in own.messages)
    shared = syncs(message for message in sync.before_update if message.group == "embedding")
    sums = (*reductions, *others, *shared)
    found = [_closing("weight_sync", "weight_sync", sums)] if sums else []
    kernels: list[Sync | str] = [*optimizer.names]
    at = kernels.index("clip")
    agreed = syncs(message for message in sync.before_update if message.group != "embedding")
    kernels[at : at + 1] = [*agreed, "clip", *read_again(others)]
    found.append(_closing("optimizer", "optimizer", tuple(kernels)))
    gathers = tuple(syncs(sync.after_update))
    found += [_closing(PARAMETER_GATHER, "weight_sync", gathers)] if gathers else []
    return *found, *_casts(programs)


def _norm(programs: Mapping[str, Program], plan: Plan, mesh: Mesh, gradient_bytes: int) -> Sync:
    """That of all gradients, summed over all ranks; of DTensors, some of them partial, that of each weight, in the type
    of gradients.
    """
    norm = Sync(mesh.axes, mesh.ranks, "all_reduce", 4, (), name=NORM, elements=1)
    if plan.norm_gradients != "each_reader" or not plan.sequence_parallel:
        return norm
    of_each = tuple((block, len(own.weights)) for block, own in programs.items())
    return replace(norm, itemsize=gradient_bytes, elements=0, of_each=of_each)


def _optimizer(optimizer: Update, norm: Sync, sums: Sequence[Sync]) -> Sequence[Sync | str]:
    """Names of the kernels; before gradients are clipped the norm, behind that the sums that are repeated."""
    found: list[Sync | str] = [*optimizer.names]
    if "clip" in found:
        at = found.index("clip")
        found[at : at + 1] = [*([norm] if norm.axes else []), "clip", *read_again(sums)]
    return found


def _closing(name: str, phase: Pass, steps: tuple[Sync | str, ...]) -> Closing:
    lanes = [COMPUTE_LANE if isinstance(step, str) else step.lane for step in steps]
    labels = (TaskInfo(s, "optimizer", "optimizer") if isinstance(s, str) else s.info(s.message_bytes) for s in steps)
    segment = Segment(
        name=name,
        phase=phase,
        tasks=tuple(Task(i, lane, needs=(i - 1,) if i else ()) for i, lane in enumerate(lanes)),
        labels=tuple(labels),
        calls={index: Call(step.axes) for index, step in enumerate(steps) if not isinstance(step, str)},
        joins=frozenset({"dp", "shard", "tp"}),
    )
    return Closing(segment, steps)
