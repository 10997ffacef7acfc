"""The program of one block under a plan: kernels and collectives in issue order, without a clock.

What a step depends on is what it reads; memory lives from the step that writes a buffer to its last
reader. `compiler` makes programs, `lowering` turns the gather of ring attention into an exchange.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from spsim.lazy import lazy
from spsim.program.mesh import Axis
from spsim.program.operators import OperatorKind, TensorKind
from spsim.program.placement import Collective, Layout
from spsim.work import Work

Part = Literal["forward", "recompute", "dgrad", "wgrad", "backward", "accumulate"]
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
    part: Part
    reads: tuple[int, ...]
    writes: tuple[Buffer, ...]
    issued_after: tuple[int, ...] = ()
    """Steps that must have ended, beyond those whose buffers it reads."""


Instruction = Compute | Communication


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
class Section:
    """Instructions in a row that run `count` times, such as the equal steps of a ring."""

    instructions: tuple[Instruction, ...]
    count: int = 1
    carried: tuple[tuple[int, int], ...] = ()
    """(buffer that a run finds, buffer that it leaves in its place): the next run finds the latter as the former, and
    what comes after the last run reads the latter.
    """


@dataclass(frozen=True)
class Program:
    """One block, one micro-batch: equal blocks chain from `outputs` to the next `inputs`, gradients back."""

    forward_sections: tuple[Section, ...]
    backward_sections: tuple[Section, ...]
    saved: tuple[Saved, ...]
    weight_sync: tuple[WeightSync, ...]
    parameters: int
    """Of one block on one rank."""
    inputs: tuple[Buffer, ...]
    outputs: tuple[Buffer, ...]
    output_gradients: tuple[Buffer, ...]
    input_gradients: tuple[Buffer, ...]

    @lazy
    def forward(self) -> tuple[Instruction, ...]:
        """Of the forward pass in order of issue, sections that repeat written out."""
        return unrolled(self.forward_sections)

    @lazy
    def backward(self) -> tuple[Instruction, ...]:
        """The same of the backward pass."""
        return unrolled(self.backward_sections)

    @property
    def instructions(self) -> tuple[Instruction, ...]:
        """Forward and backward, in order of issue."""
        return self.forward + self.backward

    def saved_bytes(self, *categories: TensorKind) -> int:
        """Bytes kept per block and micro-batch on one rank, of the given categories."""
        return sum(saved.bytes for saved in self.saved if saved.category in categories)


def unrolled(sections: tuple[Section, ...]) -> tuple[Instruction, ...]:
    """The instructions of sections in order of issue."""
    return tuple(instruction for section in sections for instruction in section.instructions)
