"""One layer under a plan, prepared: all that depends neither on the workload nor on the hardware.

Made once per (model, plan, precision); a simulation then evaluates sizes and durations as arrays and runs the engine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache

import numpy as np
import numpy.typing as npt

from spsim.costs.collectives import CommCost
from spsim.costs.kernels import ComputeCost
from spsim.engine.recording import Integers
from spsim.engine.trace import Phase
from spsim.inputs.model import Model
from spsim.inputs.plan import Plan
from spsim.inputs.workload import ELEMENT_BYTES, Precision
from spsim.program.assembly import layer_template
from spsim.program.instructions import Communication
from spsim.program.mesh import Axis, mesh_of, nodes_of
from spsim.program.placement import Collective
from spsim.program.sizes import Numbers, Template
from spsim.step.schedule import schedule_layer
from spsim.units import PS_PER_S, picoseconds

PASSES: tuple[Phase, ...] = ("forward", "backward")


@lru_cache(maxsize=1024)
def prepared_layer(model: Model, plan: Plan, fold: bool, precision: Precision = "bf16") -> PreparedLayer:
    """The layer of a model under a plan; `fold` simulates identical ranks once."""
    return PreparedLayer(layer_template(model, plan, precision), plan, fold, ELEMENT_BYTES[precision])


class PreparedLayer:
    """Template, schedule, and where the sizes and durations of each task stand."""

    def __init__(self, template: Template, plan: Plan, fold: bool, weight_bytes: int = ELEMENT_BYTES["bf16"]) -> None:
        self.template = template
        self.schedule = schedule_layer(
            self.template.program, plan, mesh_of(plan), fold=fold, weight_bytes=weight_bytes
        )  # fmt: skip
        self.communications = [s for s in self.template.program.instructions if isinstance(s, Communication)]
        self.mesh = mesh_of(plan)
        self._nodes: dict[tuple[tuple[Axis, ...], int, int], int] = {}

    @cached_property
    def _slots(self) -> dict[Phase, dict[int, npt.NDArray[np.intp]]]:
        """Phase -> simulated rank -> slot of the duration of each task."""
        slots = self.template.index.slots

        def of_rank(steps: Sequence[int], position: int) -> npt.NDArray[np.intp]:
            own = (slots[step] for step in steps)
            return np.array([s[position] if len(s) > 1 else s[0] for s in own], dtype=np.intp)

        positions = self.schedule.ring_positions
        passes = {"forward": self.schedule.forward, "backward": self.schedule.backward}
        return {
            phase: {rank: of_rank([s.id for s in passes[phase].steps], place) for rank, place in positions.items()}
            for phase in PASSES
        }

    @cached_property
    def _buffer_positions(self) -> dict[Phase, npt.NDArray[np.intp]]:
        where = self.template.index.buffers
        passes = {"forward": self.schedule.forward, "backward": self.schedule.backward}
        return {phase: np.array([where[b] for b in passes[phase].ids], dtype=np.intp) for phase in PASSES}

    @cached_property
    def _messages(self) -> list[tuple[Communication, int, npt.NDArray[np.intp]]]:
        """One communication of each sort, with the position of its message, and the slots of all that are alike."""
        index = self.template.index
        found: dict[tuple[Collective | Axis | int, ...], tuple[Communication, int, list[int]]] = {}
        for step in self.communications:
            position = index.messages[step.id]
            sort = (step.collective, step.axis, step.ranks, *self.template.coefficients[position].tolist())
            found.setdefault(sort, (step, position, []))[2].extend(index.slots[step.id])
        return [(step, position, np.array(slots, dtype=np.intp)) for step, position, slots in found.values()]

    def sizes(self, numbers: Numbers) -> dict[Phase, Integers]:
        """Bytes of the buffers of each pass."""
        sizes: dict[Phase, Integers] = {phase: numbers.values[where] for phase, where in self._buffer_positions.items()}
        return {**sizes, "weight_sync": np.zeros(0, dtype=np.int64)}

    def sync_messages(self, numbers: Numbers, layers: int) -> list[int]:
        """Bytes of the messages that synchronise the weight gradients of all layers."""
        elements = numbers.weight_sync
        return [layers * s.itemsize * sum(elements[w] for w in s.weights) for s in self.schedule.syncs]

    def nodes(self, axes: tuple[Axis, ...], ranks: int, gpus_per_node: int) -> int:
        """Nodes that `ranks` neighbours along some axes span."""
        key = (axes, ranks, gpus_per_node)
        if key not in self._nodes:
            self._nodes[key] = nodes_of(self.mesh, axes, gpus_per_node, ranks)
        return self._nodes[key]

    def durations(
        self,
        numbers: Numbers,
        compute: ComputeCost,
        comm: CommCost,
        *,
        gpus_per_node: int,
        sync_messages: Sequence[int],
    ) -> dict[Phase, Mapping[int, list[int]]]:
        """Picoseconds of each task, by phase and simulated rank."""
        seconds = np.zeros(self.template.index.num_slots)
        floats = numbers.values.astype(np.float64)
        for group in self.template.groups:
            seconds[group.slots] = compute.duration(group.work(floats))
        for step, position, slots in self._messages:
            nodes = self.nodes((step.axis,), step.ranks, gpus_per_node)
            seconds[slots] = comm.duration(step.collective, int(numbers.values[position]), step.ranks, nodes)
        ps = np.rint(seconds * PS_PER_S)
        ps = (
            ps.astype(np.int64) if np.maximum.reduce(ps) < 2**62 else np.array([int(time) for time in ps], dtype=object)
        )
        syncs = [
            picoseconds(
                comm.duration(sync.collective, message, sync.ranks, self.nodes(sync.axes, sync.ranks, gpus_per_node))
            )
            for sync, message in zip(self.schedule.syncs, sync_messages, strict=True)
        ]
        found: dict[Phase, Mapping[int, list[int]]] = {
            phase: {rank: ps[slots].tolist() for rank, slots in by_rank.items()}
            for phase, by_rank in self._slots.items()
        }
        return {**found, "weight_sync": dict.fromkeys(self.schedule.copies, syncs)}
