"""What the steps of a ring are made of: kernels on blocks of keys, messages and sections that repeat."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from spsim.inputs.documents import Documents, parts_of
from spsim.inputs.plan import Plan
from spsim.program.attention import Attention
from spsim.program.cached import CachedAttention
from spsim.program.instructions import (
    Buffer,
    Communication,
    Compute,
    Instruction,
    Part,
    Program,
    Purpose,
    Section,
    next_ids,
)
from spsim.program.mesh import Mesh
from spsim.program.placement import Collective, sent_bytes
from spsim.work import FlashAttention, MemoryBound, Work


@dataclass(frozen=True, slots=True)
class RingBlock:
    """One step of the ring: queries and keys of the kernel and twice the pairs that it computes."""

    queries: int
    keys: int
    twice_pairs: int
    causal: bool


def ring_blocks(tokens: int, degree: int, step: int, *, causal: bool, cut: str) -> tuple[RingBlock | None, ...]:
    """The block of each ring position at a step, or one block where all positions do the same.

    `tokens` is the local sequence length; a zigzag rank owns half-chunks r and 2P - 1 - r, so that every
    step computes half of its square. A contiguous rank has nothing to do while the keys are of a later one.
    """
    whole = RingBlock(tokens, tokens, 2 * tokens * tokens, causal=False)
    diagonal = RingBlock(tokens, tokens, tokens * tokens, causal=True)
    if not causal:
        return (whole,)
    if step == 0:
        return (diagonal,)
    if cut == "zigzag":
        return (RingBlock(tokens, tokens // 2, tokens * tokens, causal=False),)
    return tuple(whole if step <= position else None for position in range(degree))


class Message(NamedTuple):
    """What a rank sends at once: a tensor, or K and V in one."""

    tensor: str
    bytes: int
    """Of one rank."""


class RingSteps:
    """Collects the instructions of a pass of a ring, whose equal steps are one section if they are many."""

    def __init__(
        self, program: Program, plan: Plan, mesh: Mesh, attention: Attention, *, causal: bool, written_out: int
    ) -> None:
        self.degree = mesh.degree("ring")
        self.cut = plan.ring_cut
        self.concatenates = plan.ring_messages == "concatenated"
        self.causal = causal
        self.equal = (not causal or plan.ring_cut == "zigzag") and attention.documents is None
        self.written_out = written_out
        self.kernels = attention
        self.itemsize = math.ceil(attention.placed.inputs[1].tensor.itemsize)
        self.name = attention.operator.name
        self.num_instructions, self.num_buffers = next_ids(program)
        self.sections: list[Section] = []
        self.instructions: list[Instruction] = []
        self.issued_after: tuple[int, ...] = ()
        """The kernel that the next message of K and V waits for."""
        self.handed_on: tuple[int, ...] = ()
        """Buffers that a step of the ring finds from the one before."""

    def end_section(self, count: int = 1, carried: tuple[tuple[int, int], ...] = ()) -> None:
        """What has been collected is a section that runs so many times."""
        self.sections.append(Section(tuple(self.instructions), count, carried))
        self.instructions = []
        # What waits for nothing in its section waits for the last kernel before it.
        self.issued_after = ()

    def steps(self, first_equal: int) -> Iterator[int]:
        """The steps to write down: those from `first_equal` to the last but one are equal; many are written once."""
        last = self.degree - 1
        if not self.equal or last - first_equal <= self.written_out:
            yield from range(self.degree)
            return
        yield from range(first_equal)
        self.end_section()
        found = self.handed_on
        yield first_equal
        self.end_section(last - first_equal, tuple(zip(found, self.handed_on, strict=True)))
        yield last

    def buffer(self, tensor: str, size: int, alias_of: int | None = None, *, received: bool = False) -> Buffer:
        """A new buffer, of a message that is `received` or of results."""
        self.num_buffers += 1
        return Buffer(
            self.num_buffers - 1, tensor, size, "communication buffers" if received else "temporary", alias_of
        )  # fmt: skip

    def _next(self) -> int:
        self.num_instructions += 1
        return self.num_instructions - 1

    def move(
        self,
        collective: Collective,
        messages: Sequence[Message],
        reads: tuple[int, ...],
        purpose: Purpose,
        part: Part,
        after: tuple[int, ...] = (),
    ) -> tuple[int, ...]:
        """Gather messages from all ranks, sum and scatter those of all, or send them to the next rank in one group call
        and receive as many from the previous one; returns what arrived.
        """
        ranks = 1 if collective == "send_receive" else self.degree
        held = ranks if collective == "all_gather" else 1
        arrived = [self.buffer(message.tensor, message.bytes * held, received=True) for message in messages]
        for place, (message, buffer) in enumerate(zip(messages, arrived, strict=True)):
            size = message.bytes * ranks
            self.instructions.append(
                Communication(
                    self._next(), self.name, message.tensor, "ring", collective, self.degree, size,
                    sent_bytes(collective, size, self.degree), purpose, part, reads, (buffer,), after,
                    sends_before=place if collective == "send_receive" else 0,
                )
            )  # fmt: skip
        return tuple([buffer.id for buffer in arrived])

    def concatenated(self, of: Compute, messages: Sequence[Message], reads: tuple[int, ...]) -> tuple[int, ...]:
        """What is sent: what is read, or a copy of it in one message."""
        if not self.concatenates:
            return reads
        (message,) = messages
        copy = self.buffer(message.tensor, message.bytes, received=True)
        self.elementwise(of, 2 * message.bytes, reads, (copy,), [True])
        return (copy.id,)

    def last_kernel(self) -> tuple[int, ...]:
        """The kernel before the attention: a message is issued when a step starts, the first with the first."""
        return next(((step.id,) for step in reversed(self.instructions) if isinstance(step, Compute)), ())

    def attention(
        self, of: Compute, work: tuple[Work | None, ...], reads: tuple[int, ...], writes: tuple[Buffer, ...]
    ) -> None:
        """The kernel of a step."""
        self.instructions.append(Compute(self._next(), self.name, "attention", of.part, work, reads, writes))
        self.issue_after_this()

    def issue_after_this(self) -> None:
        """The next message of K and V waits for the kernel that was added last."""
        self.issued_after = (self.num_instructions - 1,)

    def elementwise(
        self,
        of: Compute,
        traffic: int,
        reads: tuple[int, ...],
        writes: tuple[Buffer, ...],
        active: Sequence[object],
    ) -> None:
        """A merge, an addition, a cast or a copy of so many bytes, on the positions that computed a block."""
        kernel = MemoryBound("elementwise", traffic)
        work = tuple([kernel if here else None for here in active])
        self.instructions.append(Compute(self._next(), self.name, "elementwise", of.part, work, reads, writes))

    def work(self, compute: Compute, step: int) -> tuple[FlashAttention | None, ...]:
        """The kernel of each position on the ring that has one; those of a step are equal."""
        base = compute.work[0]
        assert isinstance(base, FlashAttention)
        if isinstance(self.kernels, CachedAttention) and self.equal:
            return (self.kernels.step_of_ring(self.degree, step, causal=self.causal),)
        if self.kernels.documents is not None:
            return tuple([self._of_documents(base, self.kernels.documents, step, rank) for rank in range(self.degree)])
        blocks = ring_blocks(base.queries, self.degree, step, causal=self.causal, cut=self.cut)
        block = next(filter(None, blocks))
        kernel = self.kernels.block(base.direction, block.queries, block.keys, block.twice_pairs, causal=block.causal)
        return tuple([kernel if own else None for own in blocks])

    def _of_documents(self, base: FlashAttention, documents: Documents, step: int, rank: int) -> FlashAttention | None:
        """The kernel of a position on the keys of the one that many before it; none where nothing is seen of them."""
        places = rank, (rank - step) % self.degree
        own, other = (parts_of(documents.tokens, self.degree, place, self.cut) for place in places)
        seen = documents.between(own, other)
        return self.kernels.within(base.direction, base.queries, base.queries, seen) if seen.twice_pairs else None
