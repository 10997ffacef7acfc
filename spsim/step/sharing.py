"""What the transfers of a step put on links: for a network on which they share them.

Ranks that are simulated run the whole step as one program, since a segment by itself does not know what else is under
way. Each of them stands for all its like, whose transfers go over the same links or over links of their own.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

from spsim.costs.collectives import CommCost
from spsim.costs.links import Edge, Routes, Sent, Wiring, sent
from spsim.engine.flows import RateChange, Use, flow_network
from spsim.engine.network import MakeNetwork, Transfer
from spsim.inputs.hardware import HardwareProfile
from spsim.inputs.perturbations import SlowLink
from spsim.program.instructions import Communication
from spsim.program.mesh import Axis
from spsim.program.sizes import Numbers
from spsim.step.gradients import Sync
from spsim.step.itinerary import Chunk
from spsim.step.perturbed import FOR_EVER
from spsim.step.pipeline.messages import Message
from spsim.step.preparation import PreparedStep
from spsim.step.segments import Segment
from spsim.units import picoseconds


class Traffic(NamedTuple):
    """Of one task, what its rank sends."""

    axes: tuple[Axis, ...]
    """Along which it meets others; none of messages between stages."""
    sent: Sent
    exchange: bool = False
    """With its neighbours, not with all of its group."""


@lru_cache(maxsize=8)
def _routes(prepared: PreparedStep, profile: HardwareProfile, gpus_per_node: int) -> Routes:
    """Of a plan, kept since finding them takes longer than a step of few micro-batches."""
    ranks, world, wiring = prepared.ranks, prepared.world, Wiring(profile, gpus_per_node)
    if ranks.number == prepared.mesh.ranks:
        return Routes(wiring, world)
    return Routes(wiring, world, lambda rank: ranks.on_stage(world.coordinate(rank, "pp"), ranks.representative(rank)))


class Sharing:
    """The links of a step of one workload, and what its tasks put on them."""

    def __init__(
        self, prepared: PreparedStep, numbers: Numbers, comm: CommCost, chunks: tuple[Chunk, ...], *, gpus_per_node: int
    ) -> None:
        """`chunks` are the blocks that ranks run, of each kind of stages."""
        self.prepared, self.numbers, self.comm = prepared, numbers, comm
        self.gpus_per_node = gpus_per_node
        self.stride = prepared.mesh.strides["pp"]
        self.routes = _routes(prepared, comm.profile, gpus_per_node)
        self._segments: dict[int, Sequence[Traffic | None]] = {}
        """By the identity of their outlines."""
        stages, calls = prepared.of_stages, prepared.ending(chunks).calls(numbers)
        for chunk, own in zip(chunks, calls, strict=True):
            for made in stages[chunk].closings if stages else prepared.closings:
                self._segments[id(made.segment.outline)] = [
                    self._sync(step, *own[step]) if isinstance(step, Sync) else None for step in made.steps
                ]
        self._uses: dict[tuple[Traffic, Hashable], Use] = {}

        self._changes: list[RateChange] = []

    def slow(self, slow: SlowLink, users: Iterable[int]) -> None:
        """A link of some ranks is slow or down: their ports in the node, or their adapters."""
        begin, end = picoseconds(slow.from_s), FOR_EVER if slow.to_s is None else picoseconds(slow.to_s)
        rate = 1 / slow.factor if slow.factor else 0.0
        for port in self.routes.links_of(users, inside=slow.link.gpu is not None):
            self._changes.append(RateChange(port, begin, end, rate))

    # What tasks send

    def of(self, segment: Segment) -> Sequence[Traffic | None]:
        """Of each task of a segment."""
        key = id(segment.outline)
        if key not in self._segments:
            added = {task: self._sync(sync, sync.message_bytes, 1) for task, sync in segment.added.items()}
            self._segments[key] = segment.woven(self._instructions(segment), added)
        return self._segments[key]

    def message(self, size: int) -> Traffic:
        """From one stage of a pipeline to another."""
        return Traffic((), Sent(size, size), exchange=True)

    def _instructions(self, segment: Segment) -> Iterator[Traffic | None]:
        index, template = self.prepared.index_of(segment), self.prepared.template
        for step in segment.instructions:
            if isinstance(step, Communication):
                yield self._communication(step, int(self.numbers.values[template.pacing(step, index)]))
            else:
                yield None

    def _communication(self, step: Communication, message: int) -> Traffic:
        axes = (step.axis,)
        if step.collective == "send_receive":
            return Traffic(axes, Sent(message, message), exchange=True)
        nodes = self.prepared.nodes(axes, step.ranks, self.gpus_per_node)
        return Traffic(axes, sent(self.comm, step.collective, message, step.ranks, nodes))

    def _sync(self, sync: Sync, message: int, count: int) -> Traffic:
        """Several messages one after another are as one."""
        nodes = self.prepared.nodes(sync.axes, sync.ranks, self.gpus_per_node)
        own = sent(self.comm, sync.collective, message, sync.ranks, nodes)
        return Traffic(sync.axes, own._replace(inside=own.inside * count, across=own.across * count))

    # What transfers put on links

    def network(self, traffic: Mapping[int, Sequence[Traffic | None]]) -> MakeNetwork:
        """Of the ranks that are simulated, what each task sends."""

        def uses(transfer: Transfer) -> Use | None:
            rank, task = transfer.tasks[0]
            own = traffic[rank][task]
            return None if own is None else self._use(own, transfer)

        return flow_network(uses, self._changes)

    def _use(self, own: Traffic, transfer: Transfer) -> Use:
        ranks: Hashable = frozenset(rank for rank, _ in transfer.tasks)
        edge = self._edge(transfer) if own.exchange else None
        key = own, edge or ranks
        if key not in self._uses:
            routes = self.routes
            if edge is not None:
                ports = routes.edge((own.axes, *self._stages(edge)), lambda: self._edges(own.axes, edge), edge)
            else:
                ports = routes.group(own.axes, frozenset(r for r, _ in transfer.tasks), pairwise=own.sent.pairwise)
            self._uses[key] = routes.use(ports, own.sent)
        return self._uses[key]

    def _edge(self, transfer: Transfer) -> Edge:
        """From which rank to which, as its meeting says: two places of stages, or of a ring on one."""
        if isinstance(transfer.key[0], Message):
            message, rank = transfer.key
            ranks = self.prepared.ranks
            return ranks.on_stage(message.sender, rank), ranks.on_stage(message.receiver, rank)
        *stage, communicator, _ = transfer.key
        first = sum(stage) * self.stride
        return first + communicator[-2], first + communicator[-1]

    def _stages(self, edge: Edge) -> tuple[int, int]:
        world = self.prepared.world
        return world.coordinate(edge[0], "pp"), world.coordinate(edge[1], "pp")

    def _edges(self, axes: tuple[Axis, ...], edge: Edge) -> Iterator[Edge]:
        """All that are like one: between its stages, or from each rank of its stage to the next along an axis."""
        stages, world = self._stages(edge), self.prepared.world
        for rank in self.prepared.mesh.numbers:
            one = rank + stages[0] * self.stride
            yield one, world.neighbours(one, axes[0])[1] if axes else rank + stages[1] * self.stride
