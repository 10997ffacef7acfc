"""Steps of several pipeline stages for many plans and workloads at once, with the times that a profile gives them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache
from typing import NamedTuple

import numpy as np

from spsim.costs.collectives import CommCost
from spsim.inputs.plan import Plan
from spsim.inputs.schedules import Schedule
from spsim.program.mesh import world_of
from spsim.step.columns.fill import Floats
from spsim.step.columns.replay import Times
from spsim.step.costed_pipeline import boundary_position, exchange_of, nodes_between
from spsim.step.pipeline.clock import Clock
from spsim.step.pipeline.exchange import Exchange
from spsim.step.pipeline.messages import Stages as Messages
from spsim.step.preparation import PreparedStep
from spsim.units import picoseconds


class Pipelining(NamedTuple):
    """How stages follow each other: what a clock reads of a plan."""

    schedule: Schedule
    stages: int
    chunks: int
    group: int | None
    exchange: Exchange

    @classmethod
    def of(cls, plan: Plan) -> Pipelining:
        """That of a plan."""
        return cls(plan.pp_schedule, plan.pp, plan.virtual_pp, plan.pp_group, exchange_of(plan))

    @property
    def clock_of(self) -> Callable[[int], Clock]:
        """The clock of a number of micro-batches."""

        @cache
        def clock(micro_batches: int) -> Clock:
            return Clock(self.schedule, self.stages, self.chunks, micro_batches, self.group, self.exchange)

        return clock


class Sends:
    """What messages between stages take for the different workloads of some blocks."""

    def __init__(self, prepared: PreparedStep, numbers: Floats, comm: CommCost) -> None:
        self._messages: list[int] = [*map(int, numbers[boundary_position(prepared)].tolist())]
        self._comm = comm
        self._known: dict[tuple[int, int], int] = {}

    def times(self, nodes: frozenset[int]) -> Times:
        """Picoseconds of a message of each workload, within a node and between two, as far as they are asked for."""
        found = np.zeros((2, len(self._messages)), np.int64)
        for number in nodes:
            found[number - 1] = [self._time(message, number) for message in self._messages]
        return found

    def _time(self, message: int, nodes: int) -> int:
        key = message, nodes
        if key not in self._known:
            self._known[key] = picoseconds(self._comm.duration("send_receive", message, 2, nodes))
        return self._known[key]


def nodes_of_lanes(plan: Plan, gpus_per_node: int) -> tuple[int, ...]:
    """Of each lane of a plan's clock: 0 where its messages stay within a node, 1 where they do not."""
    nodes = nodes_between(world_of(plan), gpus_per_node)
    lanes = _lanes(plan.pp_schedule, plan.pp, plan.virtual_pp)
    return tuple([nodes[way] - 1 for way in lanes])


@lru_cache(maxsize=256)
def _lanes(schedule: Schedule, stages: int, chunks: int) -> tuple[tuple[int, int], ...]:
    """Sender and receiver of each lane."""
    return tuple([lane[:2] for lane in Messages(schedule, stages, chunks).lanes])
