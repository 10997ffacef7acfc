"""A scenario for many workloads at once, whose sizes are arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from spsim.inputs.hardware import HardwareProfile
from spsim.inputs.model import Model
from spsim.inputs.plan import Plan
from spsim.inputs.scenario import Scenario
from spsim.inputs.workload import Workloads


@dataclass(frozen=True)
class Grid:
    """A scenario for many workloads, which keep its rules and differ from its own in their sizes only."""

    scenario: Scenario
    workload: Workloads
    global_batch: Any
    """Sequences of a step over all replicas, an array."""

    @classmethod
    def of(cls, scenario: Scenario, sizes: Sequence[tuple[int, int, int | None]]) -> Grid:
        """From the sequence, the micro-batch and the global batch, if one is given, of each workload."""
        columns = [*zip(*sizes, strict=True)] or [()] * 3
        seq_len, micro_batch = (np.array(column, dtype=np.int64) for column in columns[:2])
        given = np.array([batch or 0 for batch in columns[2]], dtype=np.int64)
        global_batch = np.where(given > 0, given, micro_batch * scenario.plan.dp)
        return cls(scenario, Workloads(seq_len, micro_batch, scenario.workload.precision), global_batch)

    def part(self, which: Any) -> Grid:
        """Some of its workloads."""
        own = self.workload
        workload = Workloads(own.seq_len[which], own.micro_batch[which], own.precision)
        return Grid(self.scenario, workload, self.global_batch[which])

    @property
    def hardware(self) -> HardwareProfile:
        """That of the scenario."""
        return self.scenario.hardware

    @property
    def model(self) -> Model:
        """That of the scenario."""
        return self.scenario.model

    @property
    def plan(self) -> Plan:
        """That of the scenario."""
        return self.scenario.plan

    @property
    def gpus_per_node(self) -> int:
        """That of the scenario."""
        return self.scenario.gpus_per_node

    @cached_property
    def num_micro_batches(self) -> npt.NDArray[np.int64]:
        """Micro-batches that one replica accumulates in a step."""
        found: npt.NDArray[np.int64] = self.global_batch // (self.workload.micro_batch * self.plan.dp)
        return found
