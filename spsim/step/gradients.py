"""Synchronisation of weight gradients at the end of a step: coalesced collectives, one after another."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass, replace

from spsim.engine.recording import TaskInfo
from spsim.inputs.plan import Plan
from spsim.program.instructions import Program
from spsim.program.mesh import Axis
from spsim.program.placement import Collective, sent_bytes

OPTIMIZER_READERS = 3
"""Kernels of AdamW that read a gradient, beside clipping (torch 2.13)."""
GRADIENTS, PARAMETERS = "weight gradients", "parameters"
"""What collectives over weights are called."""
STAGE_AXES: frozenset[Axis] = frozenset({"pp", "embedding"})
NORM, OVERFLOW = "gradient norm", "overflow"
"""What ranks agree on before they update weights."""


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
    name: str = GRADIENTS
    elements: int = 0
    """Beside those of weights."""
    of_each: tuple[tuple[str, int], ...] = ()
    """Block, and the elements that each such block adds."""
    readers: int = 0
    """That sum a gradient, each weight and layer in a message of its own; 0: all in one message."""

    @property
    def message_bytes(self) -> int:
        """Without weights: they count as the elements."""
        return self.elements * (self.itemsize or 0)

    def info(self, message: int) -> TaskInfo:
        """What its task is."""
        part = "optimizer" if self.name in (NORM, OVERFLOW) else "weight_sync"
        return TaskInfo(
            self.name, "communication", part, purpose="weight", collective=self.collective,
            axis=" × ".join(self.axes), message_bytes=message,
            sent_bytes=sent_bytes(self.collective, message, self.ranks),
        )  # fmt: skip

    @property
    def meets(self) -> Axis | None:
        """Along which axis it meets other stages of a pipeline: all of them, or the two ends."""
        return next((axis for axis in self.axes if axis in STAGE_AXES), None)

    @property
    def lane(self) -> str:
        """That of its communicator; the shards of a copy are reduced beside other messages among copies."""
        return "tp" if self.axes == ("tp",) else "shard" if "shard" in self.axes else "dp"


def read_again(syncs: Iterable[Sync]) -> list[Sync]:
    """Sums of gradients that the optimizer repeats, for they stay partial as DTensors."""
    return [replace(sync, readers=OPTIMIZER_READERS) for sync in syncs if sync.readers]


def sums_beside(syncs: Iterable[Sync], summed: Set[str], programs: Mapping[str, Program]) -> list[Sync]:
    """Of the sums over tp those of weights that are not `summed` elsewhere."""

    def weights(sync: Sync) -> set[str]:
        return {programs[block].weight_sync[index].weight for block, index in sync.weights}

    return [sync for sync in syncs if sync.axes == ("tp",) and not weights(sync) <= summed]


def gradient_syncs(programs: Mapping[str, Program], plan: Plan, gradient_bytes: int) -> Iterator[Sync]:
    """One coalesced message per group: first the data-like axes, then tp, unless each reader of a gradient sums what is
    partial over tp: here for clipping, in `read_again` for the optimizer. With sharded optimizer state a
    reduce-scatter, then the updated parameters gathered. Programs are by block, bytes of an element of a gradient.
    """
    members: dict[tuple[tuple[Axis, ...], int], list[tuple[str, int]]] = defaultdict(list)
    for block, program in programs.items():
        for index, sync in enumerate(program.weight_sync):
            members[sync.axes, sync.ranks].append((block, index))
    for (axes, ranks), weights in sorted(members.items(), key=lambda item: "tp" in item[0][0]):
        all_reduce = Sync(axes, ranks, "all_reduce", gradient_bytes, tuple(weights))
        if plan.norm_gradients == "each_reader" and axes == ("tp",):
            yield from (replace(all_reduce, weights=(weight,), readers=1) for weight in weights)
        elif plan.zero_stage and axes != ("tp",):
            yield replace(all_reduce, collective="reduce_scatter")
            yield replace(all_reduce, collective="all_gather", itemsize=None, name=PARAMETERS)
        else:
            yield all_reduce
