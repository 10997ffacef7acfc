"""The program of one layer under a plan: kernels and collectives in issue order, without a clock.

What a step depends on is what it reads; memory lives from the step that writes a buffer to its last
reader. `compiler` makes programs, `lowering` turns the gather of ring attention into an exchange.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from spsim.program.mesh import Axis
from spsim.program.operators import OperatorKind, TensorKind
from spsim.program.placement import Collective, Layout
from spsim.work import Work

Part = Literal["forward", "recompute", "dgrad", "wgrad", "backward", "accumulate"]
Phase = Literal["forward", "recompute", "backward"]
Purpose = Literal["input", "regather", "gradient", "weight"]
Category = Literal["activations", "communication buffers", "temporary"]


@dataclass(frozen=True, slots=True)
class Buffer:
    """Memory of one tensor on one rank, from the step that writes it to its last reader."""

    id: int
    tensor: str
    bytes: int
    category: Category
    alias_of: int | None = None
    """The buffer whose memory this is: an all-reduce and a merge work in place, a slice is a view."""


@dataclass(frozen=True, slots=True)
class Compute:
    """A kernel. `work` has one entry, or one per position on the ring; None where that rank has nothing to do."""

    id: int
    operator: str
    kind: OperatorKind
    part: Part
    work: tuple[Work | None, ...]
    reads: tuple[int, ...]
    writes: tuple[Buffer, ...]


@dataclass(frozen=True, slots=True)
class Communication:
    """A collective, or one exchange of a ring, for the operator that needs it."""

    id: int
    operator: str
    tensor: str
    axis: Axis
    collective: Collective
    ranks: int
    message_bytes: int
    sent_bytes: int
    purpose: Purpose
    part: Phase
    reads: tuple[int, ...]
    writes: tuple[Buffer, ...]
    issued_after: tuple[int, ...] = ()
    """Steps that must have ended, beyond those whose buffers it reads."""


Step = Compute | Communication


@dataclass(frozen=True, slots=True)
class Saved:
    """What the forward pass keeps for the backward pass."""

    tensor: str
    layout: Layout
    bytes: int
    category: TensorKind
    operator: str


@dataclass(frozen=True, slots=True)
class WeightSync:
    """Weights of one operator whose gradients are partial sums over a group of ranks."""

    weight: str
    axes: tuple[Axis, ...]
    ranks: int
    elements: int


@dataclass(frozen=True, slots=True)
class Program:
    """One layer, one micro-batch: layers chain from `output` to the next `input`, gradients back."""

    forward: tuple[Step, ...]
    backward: tuple[Step, ...]
    saved: tuple[Saved, ...]
    weight_sync: tuple[WeightSync, ...]
    parameters: int
    """Of one layer on one rank."""
    input: Buffer
    output: Buffer
    output_gradient: Buffer
    input_gradient: Buffer

    @property
    def steps(self) -> tuple[Step, ...]:
        """Forward and backward, in issue order."""
        return self.forward + self.backward

    def saved_bytes(self, *categories: TensorKind) -> int:
        """Bytes kept per layer and micro-batch on one rank, of the given categories."""
        return sum(saved.bytes for saved in self.saved if saved.category in categories)
