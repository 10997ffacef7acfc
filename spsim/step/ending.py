"""What follows the last micro-batch on ranks that run some chunks: bytes and times, prepared for any workload."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np

from spsim.costs.collectives import CommCost
from spsim.costs.kernels import ComputeCost
from spsim.lazy import Cache
from spsim.program.instructions import Program
from spsim.program.sizes import Numbers, Template
from spsim.step.closing import Closing, Update, weight_casts
from spsim.step.gradients import Sync
from spsim.step.itinerary import Chunk
from spsim.units import picoseconds
from spsim.work import MemoryBound

Times = list[tuple[Closing, list[int]]]
"""Picoseconds of each task."""
Nodes = Callable[..., int]
"""(axes, ranks, GPUs per node) -> nodes that so many neighbours along them span."""


KEPT = 16
"""Times of an ending."""


class Ending:
    """Of ranks that run different chunks, priced together."""

    def __init__(
        self, template: Template, optimizer: Update | None, ends: Sequence[tuple[Chunk, Sequence[Closing]]]
    ) -> None:
        self._optimizer = optimizer
        self._known: Cache[list[Times]] = Cache(KEPT, lambda _: 1)
        """By costs and sums: weights are the same whatever the workload."""
        self._sums = _Sums(template)
        self._ends = [_End(template, self._sums, optimizer, *own) for own in ends]

    @property
    def syncs(self) -> list[tuple[Sync, ...]]:
        """The collectives of each chunk, of which several may be alike."""
        return [own.syncs for own in self._ends]

    def calls(self, numbers: Numbers) -> list[dict[Sync, tuple[int, int]]]:
        """Bytes of a message of each collective, and how many messages it is."""
        sums = self._sums.of(numbers)
        return [
            {
                sync: (total // count, count)
                for sync, count, total in zip(own.syncs, own.counts, sums[own.first + 1 :], strict=False)
            }
            for own in self._ends
        ]

    def messages(self, numbers: Numbers) -> list[dict[Sync, int]]:
        """Bytes of each collective, of all its messages."""
        return [{sync: size * count for sync, (size, count) in own.items()} for own in self.calls(numbers)]

    def times(
        self, numbers: Numbers, compute: ComputeCost, comm: CommCost, nodes: Nodes, gpus_per_node: int
    ) -> list[Times]:
        """Picoseconds of each task after the last micro-batch."""
        sums = self._sums.of(numbers)
        key = (compute, comm, gpus_per_node, *sums)
        return self._known.get(
            key, lambda: self._priced(sums, compute, comm, partial(nodes, gpus_per_node=gpus_per_node))
        )

    def _priced(self, sums: Sequence[int], compute: ComputeCost, comm: CommCost, nodes: Nodes) -> list[Times]:
        kernels = self._kernels([(sums[own.first], own.spread) for own in self._ends], compute)
        known: dict[tuple[object, ...], int] = {}

        def sent(sync: Sync, total: int, count: int) -> int:
            own = sync.collective, total // count, sync.ranks, nodes(sync.axes, sync.ranks)
            if (count, own) not in known:
                known[count, own] = picoseconds(count * comm.duration(*own))
            return known[count, own]

        found = []
        for own, times in zip(self._ends, kernels, strict=True):
            times += [picoseconds(float(compute.duration(work))) for work in own.casts]
            totals = sums[own.first + 1 :]
            times += [sent(*made) for made in zip(own.syncs, totals, own.counts, strict=False)]
            found.append([(made, [times[place] for place in places]) for made, places in own.steps])
        return found

    def _kernels(self, parameters: Sequence[tuple[int, int]], compute: ComputeCost) -> list[list[int]]:
        """Picoseconds of the kernels of the optimizer, of ranks with so many parameters, and of spread experts."""
        if self._optimizer is None:
            return [[] for _ in parameters]
        sizes = np.array([self._optimizer.sizes(*own) for own in parameters], dtype=np.float64)
        kernel, dtype = self._optimizer.rates
        work = MemoryBound("optimizer", sizes.ravel(), kernel, dtype=dtype)  # type: ignore[arg-type]
        seconds = compute.duration(work)
        return [[*map(picoseconds, row)] for row in np.asarray(seconds).reshape(sizes.shape).tolist()]


class _End:
    """Of one chunk."""

    def __init__(
        self, template: Template, sums: _Sums, optimizer: Update | None, chunk: Chunk, closings: Sequence[Closing]
    ) -> None:
        counts: Counter[str] = Counter()
        for run in chunk:
            counts[run.block] += run.count
        self.spread = sum(spread_parameters(template.programs[block]) * count for block, count in counts.items())
        casts = weight_casts([(run.count, cast) for run in chunk for cast in template.programs[run.block].weight_casts])
        self.casts = [kernel.work for kernel in casts] if optimizer else []
        self.syncs = syncs_of(closings)
        self.counts = [sync.readers * sum(counts[b] for b in {b for b, _ in sync.weights}) or 1 for sync in self.syncs]
        """How many messages each is."""
        self.first = sums.add_parameters(counts)
        """Place of its parameters among the sums; its messages follow."""
        for sync in self.syncs:
            sums.add_message(sync, counts)
        names = [*optimizer.names, *(kernel.name for kernel in casts)] if optimizer else []
        places = {name: place for place, name in enumerate(names)}
        collectives = iter(range(len(names), len(names) + len(self.syncs)))
        self.steps = [
            (made, [places[step] if isinstance(step, str) else next(collectives) for step in made.steps])
            for made in closings
        ]
        """Place of each task among kernels of the optimizer, casts and collectives."""


def spread_parameters(program: Program) -> int:
    """Parameters of a block that are of experts spread over ranks."""
    return sum(weights.elements for weights in program.weights if weights.spread)


class _Sums:
    """Sums of multiples of the numbers of a template, in whole numbers of any length."""

    def __init__(self, template: Template) -> None:
        self._template = template
        self._places: dict[int, int] = {}
        """Of the numbers that are read, by their position."""
        self._rows: list[tuple[int, list[tuple[int, int]]]] = []
        """What is added to each sum, and its numbers with their multiples."""

    def of(self, numbers: Numbers) -> list[int]:
        """All sums, for one workload."""
        values = numbers.at(np.array([*self._places], dtype=np.intp))
        return [more + sum([times * values[place] for place, times in terms]) for more, terms in self._rows]

    def add_parameters(self, counts: Mapping[str, int]) -> int:
        """Parameters of so many of each block; the place of the sum."""
        self._rows.append((0, [(self._place(self._template.indices[b].parameters), n) for b, n in counts.items()]))
        return len(self._rows) - 1

    def add_message(self, sync: Sync, counts: Mapping[str, int]) -> None:
        """Bytes of a collective over weights of so many of each block, of all its messages."""
        times = sync.readers or 1
        own = [(block, weight, times * counts[block]) for block, weight in sync.weights if block in counts]
        programs, indices = self._template.programs, self._template.indices
        if sync.itemsize is None:
            at_rest = sum(count * programs[block].weight_sync[weight].bytes for block, weight, count in own)
            self._rows.append((sync.message_bytes + at_rest, []))
            return
        terms = [(self._place(int(indices[block].weight_sync[w])), count * sync.itemsize) for block, w, count in own]
        of_blocks = sum(counts.get(block, 0) * elements for block, elements in sync.of_each)
        self._rows.append((sync.message_bytes + sync.itemsize * of_blocks, terms))

    def _place(self, position: int) -> int:
        return self._places.setdefault(int(position), len(self._places))


def syncs_of(own: Sequence[Closing]) -> tuple[Sync, ...]:
    """The collectives of some closings."""
    return tuple([step for made in own for step in made.steps if isinstance(step, Sync)])
