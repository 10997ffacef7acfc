"""The result of a run, simulated or measured: flat spans and memory changes, in integer picoseconds.

Metrics, plots and exports are functions of these records and of nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple


class Span(NamedTuple):
    """One kernel or collective that ran on one lane of one rank."""

    rank: int
    lane: str
    task: int
    """Index of the task in the rank's program, the same on every rank."""
    posted_ps: int
    """When the lane reached it; a collective waits from then for its peers."""
    start_ps: int
    """When work or transfer began."""
    end_ps: int


class MemoryChange(NamedTuple):
    """Bytes allocated (positive) or freed (negative) on a rank."""

    time_ps: int
    rank: int
    bytes: int
    category: str
    tensor: str
    task: int


@dataclass(frozen=True, slots=True)
class TaskInfo:
    """What a task is, for tables and plots."""

    name: str
    operator_class: str
    """gemm, attention, norm, softmax, dropout, elementwise, or communication."""
    part: str
    purpose: str = ""
    layer: int | None = None
    micro_batch: int | None = None
    collective: str = ""
    axis: str = ""
    message_bytes: int = 0
    sent_bytes: int = 0
    flops: int = 0


@dataclass(frozen=True, slots=True)
class Trace:
    """Spans and memory changes of the simulated ranks; `copies` says which ranks each one stands for."""

    spans: Sequence[Span]
    memory: Sequence[MemoryChange]
    tasks: Sequence[TaskInfo]
    copies: dict[int, tuple[int, ...]] = field(default_factory=dict)
    """Simulated rank -> the identical ranks that it stands for, itself included."""
    groups: dict[str, dict[int, tuple[int, ...]]] = field(default_factory=dict)
    """Axis -> rank -> the ranks of its group."""

    @property
    def end_ps(self) -> int:
        """End of the last span."""
        return max((span.end_ps for span in self.spans), default=0)
