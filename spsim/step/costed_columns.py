"""A step of several pipeline stages for many workloads at once, with the times that a profile gives it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from spsim.costs.collectives import CommCost
from spsim.inputs.plan import Plan
from spsim.program.mesh import world_of
from spsim.step.columns.fill import Floats, Places
from spsim.step.columns.stages import StagedColumns
from spsim.step.columns.step import RanPasses
from spsim.step.costed_pipeline import boundary_position, exchange_of, nodes_between
from spsim.step.ending import Times
from spsim.step.pipeline.clock import Clock
from spsim.step.pipeline.orders import Numbers
from spsim.step.preparation import PreparedStep
from spsim.step.stages import Stages
from spsim.units import picoseconds


class Sends(NamedTuple):
    """What messages between stages take."""

    prepared: PreparedStep
    numbers: Floats
    """Of the different workloads."""
    comm: CommCost
    gpus_per_node: int

    def times(self, plan: Plan) -> Numbers:
        """Picoseconds of a message of each different workload, within a node and between two."""
        nodes = {*nodes_between(world_of(plan), self.gpus_per_node).values()}
        found = np.zeros((2, self.numbers.shape[1]), np.int64)
        for row, message in enumerate(self.numbers[boundary_position(self.prepared)].tolist()):
            for number in nodes:
                found[number - 1, row] = picoseconds(self.comm.duration("send_receive", int(message), 2, number))
        return found


def staged_columns(
    ran: RanPasses,
    columns: Places,
    stages: Stages,
    plan: Plan,
    micro_batches: Numbers,
    closings: Sequence[Times],
    statics: Floats,
    sends: Sends,
) -> StagedColumns:
    """The workloads of one plan, which are `columns` of the different ones that ran."""
    exchange = exchange_of(plan)
    clocks = [
        Clock(plan.pp_schedule, plan.pp, plan.virtual_pp, number, plan.pp_group, exchange)
        for number in micro_batches.tolist()
    ]
    times, nodes = sends.times(plan), nodes_between(world_of(plan), sends.gpus_per_node)
    message_ps = [
        times[[nodes[sender, receiver] - 1 for sender, receiver, _ in clock.lanes], column]
        for clock, column in zip(clocks, columns.tolist(), strict=True)
    ]
    return StagedColumns(ran, columns, stages, clocks, message_ps, micro_batches, closings, statics)
