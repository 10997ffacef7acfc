"""The program of one block under a plan: kernels and collectives in issue order, without a clock.

What a step depends on is what it reads; memory lives from the step that writes a buffer to its last
reader. `compiler` makes programs, `lowerings` turn the gather of ring attention into an exchange.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from spsim.lazy import lazy
from spsim.program.mesh import Axis
from spsim.program.operators import TensorKind
from spsim.program.placement import Collective, Layout
from spsim.program.routing import Dispatch
from spsim.work import Gemm, KernelClass, MemoryBound, Work

LAYER = "layer"
"""The block that a model has most of, or a traced module."""
Part = Literal["forward", "recompute", "dgrad", "wgrad", "backward", "accumulate"]
Purpose = Literal["input", "regather", "gradient", "weight"]
Category = Literal["activations", "communication buffers", "temporary", "gradients"]
"""What memory is for; gradients of weights stay after the pass that writes them."""


@dataclass(slots=True, unsafe_hash=True)
class Buffer:
    """Memory of one tensor on one rank, from the step that writes it to its last reader."""

    id: int
    tensor: str
    bytes: int
    category: Category
    alias_of: int | None = None
    """The buffer whose memory this is: an all-reduce and a merge work in place, a slice is a view."""

    @property
    def root(self) -> int:
        """The buffer whose memory it is, or itself."""
        return self.id if self.alias_of is None else self.alias_of


@dataclass(slots=True, unsafe_hash=True)
class Compute:
    """A kernel. `work` has one entry, or one per position on the ring; None where that rank has nothing to do."""

    id: int
    operator: str
    kind: KernelClass
    part: Part
    work: tuple[Work | None, ...]
    reads: tuple[int, ...]
    writes: tuple[Buffer, ...]


@dataclass(slots=True, unsafe_hash=True)
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
    step_of: Collective | None = None
    """What it is one of the equal steps of, one fewer than ranks; it takes such a part of its time."""
    share: float | None = None
    """Of the device that it holds; as much as the profile says of a collective unless given."""
    sends_before: int = 0
    """Sends of its group call before it, of its size, whose start it shares."""
    dispatch: Dispatch | None = None
    """Of tokens to experts by a library with kernels of its own, in place of NCCL's."""

    @property
    def timed_as(self) -> Collective:
        """The collective whose time it takes, or a part of it."""
        return self.step_of or self.collective


OFFLOAD = "offload"
"""Purpose of copies between the device and its host."""


@dataclass(slots=True, unsafe_hash=True)
class HostCopy:
    """A copy between the device and the memory of its host: away in the forward pass, back in the backward pass."""

    id: int
    operator: str
    part: Part
    message_bytes: int
    reads: tuple[int, ...]
    writes: tuple[Buffer, ...]


Instruction = Compute | Communication | HostCopy


@dataclass(slots=True, unsafe_hash=True)
class Saved:
    """What the forward pass keeps for the backward pass."""

    tensor: str
    layout: Layout
    bytes: int
    category: TensorKind
    operator: str


@dataclass(slots=True, unsafe_hash=True)
class WeightSync:
    """Weights of one operator whose gradients are partial sums over a group of ranks."""

    weight: str
    axes: tuple[Axis, ...]
    ranks: int
    elements: int
    bytes: int
    """As they rest."""


class Weights(NamedTuple):
    """One tensor of weights at rest; the matrices of a fused product are one, and so are its vectors."""

    name: str
    """Of the first of them."""
    operator: str
    """That reads it first."""
    elements: int
    """On one rank."""
    bytes: int
    """As they rest there."""
    spread: bool = False
    """Of experts that are spread over ranks."""


@dataclass(slots=True, unsafe_hash=True)
class Section:
    """Instructions in a row that run `count` times, such as the equal steps of a ring."""

    instructions: tuple[Instruction, ...]
    count: int = 1
    carried: tuple[tuple[int, int], ...] = ()
    """(buffer that a run finds, buffer that it leaves in its place): the next run finds the latter as the former, and
    what comes after the last run reads the latter.
    """
    layer: int = 0
    """Of the block, from 0, that it belongs to."""


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
    """Of the inputs that have one: token ids have none."""
    from_host: tuple[Buffer, ...] = ()
    """Of what stands among the output gradients, what the block before copies back from its host."""
    weights: tuple[Weights, ...] = ()
    """In the order in which they are read."""
    weight_bytes: int = 0
    """Of the parameters, all copies of those that products read cast."""
    weight_casts: tuple[MemoryBound, ...] = ()
    """Kernels that make these copies, once a step."""
    cache_token_bytes: int = 0
    """Of the cache, on one rank, for one token of one sequence."""

    @property
    def sections(self) -> tuple[Section, ...]:
        """Forward and backward, in order of issue."""
        return self.forward_sections + self.backward_sections

    @property
    def forward(self) -> tuple[Instruction, ...]:
        """Of the forward pass in order of issue, sections that repeat written out."""
        return self._written_out[0]

    @property
    def backward(self) -> tuple[Instruction, ...]:
        """The same of the backward pass."""
        return self._written_out[1]

    @property
    def instructions(self) -> tuple[Instruction, ...]:
        """Forward and backward, in order of issue."""
        return self.forward + self.backward

    @lazy
    def _written_out(self) -> tuple[tuple[Instruction, ...], tuple[Instruction, ...]]:
        return unrolled(self)

    @lazy
    def accumulated(self) -> dict[tuple[int, ...], int]:
        """Shapes of weights whose gradients products add to main gradients, each once, and their elements."""
        steps = [step for section in self.backward_sections for step in section.instructions]
        works = [work for step in steps if isinstance(step, Compute) for work in step.work]
        products = [work for work in works if isinstance(work, Gemm) and work.accumulated]
        return {(product.m, product.n, product.batch): product.accumulated for product in products}

    def saved_bytes(self, *categories: TensorKind) -> int:
        """Bytes kept per block and micro-batch on one rank, of the given categories."""
        return sum(saved.bytes for saved in self.saved if saved.category in categories)


def next_ids(program: Program) -> tuple[int, int]:
    """The first numbers that no instruction and no buffer of a program has."""
    instructions = [step for section in program.sections for step in section.instructions]
    outside = (*program.inputs, *program.output_gradients)
    buffers = (*outside, *(buffer for step in instructions for buffer in step.writes))
    return (
        1 + max([step.id for step in instructions], default=-1),
        1 + max([buffer.id for buffer in buffers], default=-1),
    )


def unrolled(program: Program) -> tuple[tuple[Instruction, ...], tuple[Instruction, ...]]:
    """Both passes in order of issue. Each run of a section that repeats has instructions and buffers of its own, of
    which the first run has those of the section.
    """
    unrolling = _Unrolling(program)
    return unrolling.write(program.forward_sections), unrolling.write(program.backward_sections)


class _Unrolling:
    def __init__(self, program: Program) -> None:
        self.num_instructions, self.num_buffers = next_ids(program)
        self.now: dict[int, int] = {}
        """Buffer of a section -> the one that stands for it where it is not itself."""

    def write(self, sections: Sequence[Section]) -> tuple[Instruction, ...]:
        """The instructions of one pass."""
        written: list[Instruction] = []
        for section in sections:
            if section.count == 1 and not self.now:
                written += section.instructions
                continue
            for run in range(section.count):
                written += self._run(section, written, first=run == 0)
                self.now |= {found: self.now.get(left, left) for found, left in section.carried}
            for found, _ in section.carried:
                del self.now[found]
        return tuple(written)

    def _run(self, section: Section, before: Sequence[Instruction], *, first: bool) -> Iterator[Instruction]:
        """One run. A message that waits for nothing in its run waits for the last kernel before it."""
        kernel = next(((step.id,) for step in reversed(before) if isinstance(step, Compute)), ())
        own = {buffer.id for step in section.instructions for buffer in step.writes}
        ids: dict[int, int] = {}
        for step in section.instructions:
            ids[step.id] = step.id if first else self._instruction()
            reads = tuple(self.now.get(buffer, buffer) for buffer in step.reads)
            writes = tuple(map(self._over_now if first else self._another, step.writes))
            if not isinstance(step, Communication):
                yield replace(step, id=ids[step.id], reads=reads, writes=writes)
            else:
                after = tuple(ids.get(other, other) for other in step.issued_after)
                if section.count > 1 and not after and own.isdisjoint(step.reads):
                    after = kernel
                yield replace(step, id=ids[step.id], reads=reads, writes=writes, issued_after=after)

    def _instruction(self) -> int:
        self.num_instructions += 1
        return self.num_instructions - 1

    def _another(self, buffer: Buffer) -> Buffer:
        """The same of another run."""
        self.now[buffer.id] = self.num_buffers
        self.num_buffers += 1
        return replace(self._over_now(buffer), id=self.now[buffer.id])

    def _over_now(self, buffer: Buffer) -> Buffer:
        """A buffer in the memory of one that a run left."""
        alias = buffer.alias_of
        return buffer if alias not in self.now else replace(buffer, alias_of=self.now[alias])
