"""Synchronisation of weight gradients at the end of a step: coalesced collectives, one after another."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from spsim.engine.recording import TaskInfo
from spsim.engine.tasks import Task
from spsim.inputs.plan import Plan
from spsim.program.instructions import Program
from spsim.program.mesh import Axis
from spsim.program.placement import Collective, sent_bytes
from spsim.step.segments import Call, Segment


@dataclass(frozen=True, slots=True)
class Sync:
    """One coalesced collective over the gradients (or updated parameters) of many weights."""

    axes: tuple[Axis, ...]
    ranks: int
    collective: Collective
    itemsize: int | None
    """Bytes of an element; None of weights, which are gathered as they rest."""
    weights: tuple[tuple[str, int], ...]
    """Block, and index into `Program.weight_sync` of its program."""

    def info(self, message: int) -> TaskInfo:
        """What its task is."""
        name = "parameters" if self.collective == "all_gather" else "weight gradients"
        return TaskInfo(
            name, "communication", "weight_sync", purpose="weight", collective=self.collective,
            axis=" × ".join(self.axes), message_bytes=message,
            sent_bytes=sent_bytes(self.collective, message, self.ranks),
        )  # fmt: skip

    @property
    def lane(self) -> str:
        """That of its communicator."""
        return "tp" if self.axes == ("tp",) else "dp"


def gradient_syncs(programs: Mapping[str, Program], plan: Plan, gradient_bytes: int) -> Iterator[Sync]:
    """One coalesced message per group: first the data-like axes, then tp. With sharded optimizer state a
    reduce-scatter, then the updated parameters gathered. Programs are by block, bytes of an element of
    a gradient.
    """
    members: dict[tuple[tuple[Axis, ...], int], list[tuple[str, int]]] = defaultdict(list)
    for block, program in programs.items():
        for index, sync in enumerate(program.weight_sync):
            members[sync.axes, sync.ranks].append((block, index))
    for (axes, ranks), weights in sorted(members.items(), key=lambda item: "tp" in item[0][0]):
        all_reduce = Sync(axes, ranks, "all_reduce", gradient_bytes, tuple(weights))
        if plan.zero_stage and axes != ("tp",):
            yield replace(all_reduce, collective="reduce_scatter")
            yield replace(all_reduce, collective="all_gather", itemsize=None)
        else:
            yield all_reduce


def sync_segment(syncs: Sequence[Sync]) -> Segment:
    """The synchronisation: each collective waits for the one before it."""
    return Segment(
        name="weight_sync",
        phase="weight_sync",
        tasks=tuple(Task(i, sync.lane, needs=(i - 1,) if i else ()) for i, sync in enumerate(syncs)),
        labels=tuple(sync.info(0) for sync in syncs),
        calls={index: Call(sync.axes) for index, sync in enumerate(syncs)},
    )
