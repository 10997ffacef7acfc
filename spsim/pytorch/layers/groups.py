"""Process groups of the mesh axes of a plan."""

from __future__ import annotations

import torch.distributed as dist

from spsim.errors import InputError
from spsim.inputs.plan import Plan
from spsim.program.mesh import Axis, mesh_of


class Groups:
    """The groups that this rank belongs to; ranks are numbered as in the simulator, tp innermost.

    Making groups is collective: every rank of the default group makes the same ones in the same order.
    """

    def __init__(self, plan: Plan, rank: int) -> None:
        self.mesh = mesh_of(plan)
        self.rank = rank
        self._groups: dict[tuple[Axis, int], dist.ProcessGroup] = {}
        for axis in self.mesh.axes:
            self.part(axis, self.mesh.degree(axis))

    @classmethod
    def create(cls, plan: Plan) -> Groups:
        """Groups over the default group of torch.distributed; none is needed for a plan of one rank."""
        ranks = mesh_of(plan).ranks
        if ranks == 1:
            return cls(plan, 0)
        running = dist.get_world_size() if dist.is_initialized() else 1
        if running != ranks:
            raise InputError(
                f"plan: {plan.label} needs {ranks} processes, but {running} run; start {ranks} with torchrun"
            )
        return cls(plan, dist.get_rank())

    def degree(self, axis: Axis) -> int:
        """Ranks along an axis."""
        return self.mesh.degree(axis)

    def coordinate(self, axis: Axis) -> int:
        """Position of this rank along an axis."""
        return self.mesh.coordinate(self.rank, axis)

    def group(self, axis: Axis) -> dist.ProcessGroup | None:
        """The group along an axis; None where the axis has one rank and nothing is to be sent."""
        return self._groups.get((axis, self.degree(axis)))

    def part(self, axis: Axis, ranks: int) -> dist.ProcessGroup:
        """The group of `ranks` neighbours along an axis."""
        if (axis, ranks) not in self._groups:
            lines = self.mesh.groups((axis,))
            parts = [list(line[i : i + ranks]) for line in lines for i in range(0, len(line), ranks)]
            own, _ = dist.new_subgroups_by_enumeration(parts)
            self._groups[axis, ranks] = own
        return self._groups[axis, ranks]

    def axis_of(self, group: dist.ProcessGroup) -> Axis:
        """The axis that a group lies along."""
        names = {own.group_name: axis for (axis, _), own in self._groups.items()}
        return names[group.group_name]
