"""Lowerings: one redistribution and one operator become several steps, program to program.

Ring attention is the gather of K and V, attention, and the reduce-scatter of their gradients, which the
rules derive, carried out in P steps with P - 1 messages in flight behind them (Liu et al. 2023,
arXiv:2310.01889; the exchange of K, V and of dK, dV is Transformer Engine's). Steps that are equal on all ranks,
all but the first and last ones unless a causal mask meets a contiguous cut, are one section that repeats if they are
many.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from spsim.inputs.plan import Plan
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
from spsim.program.kernels import Attention
from spsim.program.mesh import Mesh
from spsim.work import FlashAttention, MemoryBound, Work

FP32_PER_BF16 = 2
WRITTEN_OUT = 8
"""Equal steps that are written out: a section that repeats is walked until it comes to a steady state, which takes as
long as running about so many steps in a row.
"""


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


def lower_ring(
    program: Program, plan: Plan, mesh: Mesh, attention: Attention, *, causal: bool, written_out: int = WRITTEN_OUT
) -> Program:
    """Ring attention as steps and messages; `attention` holds the kernels of the core attention operator.

    More equal steps than those `written_out` are one section, so that the size of the program does not depend on their
    number.
    """
    lowering = _RingLowering(program, plan, mesh, attention, causal=causal, written_out=written_out)
    return replace(
        program,
        forward_sections=lowering.lower(program.forward_sections),
        backward_sections=lowering.lower(program.backward_sections),
    )


class _RingLowering:
    def __init__(
        self, program: Program, plan: Plan, mesh: Mesh, attention: Attention, *, causal: bool, written_out: int
    ) -> None:
        self.degree = mesh.degree("ring")
        self.cut = plan.ring_cut
        self.causal = causal
        self.equal = not causal or plan.ring_cut == "zigzag"
        self.written_out = written_out
        self.kernels = attention
        self.name = attention.operator.name
        self.keys_and_values = {operand.name for operand in attention.placed.inputs[1:]}
        self.num_instructions, self.num_buffers = next_ids(program)
        self.sections: list[Section] = []
        self.instructions: list[Instruction] = []
        self.issued_after: tuple[int, ...] = ()
        """The kernel that the next message of K and V waits for."""
        self.handed_on: tuple[int, ...] = ()
        """Buffers that a step of the ring finds from the one before."""

    def lower(self, sections: Sequence[Section]) -> tuple[Section, ...]:
        """One pass of the program with each gathered attention replaced."""
        self.sections = []
        homes = self._homes(step for section in sections for step in section.instructions)
        gathers: list[Communication] = []
        for section in sections:
            if section.count > 1:  # of another attention
                self.sections.append(section)
                continue
            for step in section.instructions:
                if isinstance(step, Communication) and self._moves_keys(step):
                    gathers += [step] if step.collective == "all_gather" else []
                elif isinstance(step, Compute) and step.operator == self.name and step.kind == "attention":
                    if step.part == "backward":
                        self._backward(step, gathers, homes)
                    else:
                        self._forward(step, gathers)
                    gathers = []
                else:
                    self.instructions.append(step)
            self._end_section()
        return tuple(self.sections)

    def _moves_keys(self, step: Communication) -> bool:
        return step.axis == "ring" and step.tensor in self.keys_and_values

    def _homes(self, steps: Iterable[Instruction]) -> tuple[Buffer, ...]:
        """Where the gradients of the own K and V go: what their reduce-scatters would write."""
        moves = (step for step in steps if isinstance(step, Communication) and self._moves_keys(step))
        return tuple(buffer for step in moves if step.collective == "reduce_scatter" for buffer in step.writes)

    # Building blocks

    def _end_section(self, count: int = 1, carried: tuple[tuple[int, int], ...] = ()) -> None:
        self.sections.append(Section(tuple(self.instructions), count, carried))
        self.instructions = []
        # What waits for nothing in its section waits for the last kernel before it.
        self.issued_after = ()

    def _steps(self, first_equal: int) -> Iterator[int]:
        """The steps to write down: those from `first_equal` to the last but one are equal; many are written once."""
        last = self.degree - 1
        if not self.equal or last - first_equal <= self.written_out:
            yield from range(self.degree)
            return
        yield from range(first_equal)
        self._end_section()
        found = self.handed_on
        yield first_equal
        self._end_section(last - first_equal, tuple(zip(found, self.handed_on, strict=True)))
        yield last

    def _buffer(self, tensor: str, size: int, alias_of: int | None = None, *, received: bool = False) -> Buffer:
        self.num_buffers += 1
        return Buffer(
            self.num_buffers - 1, tensor, size, "communication buffers" if received else "temporary", alias_of
        )  # fmt: skip

    def _next(self) -> int:
        self.num_instructions += 1
        return self.num_instructions - 1

    def _exchange(
        self, tensor: str, size: int, reads: tuple[int, ...], purpose: Purpose, part: Part, after: tuple[int, ...]
    ) -> tuple[int, ...]:
        """Send to the next rank and receive from the previous one; returns what arrived."""
        received = self._buffer(tensor, size, received=True)
        self.instructions.append(
            Communication(
                self._next(), self.name, tensor, "ring", "send_receive", self.degree, size, size, purpose, part,
                reads, (received,), after,
            )
        )  # fmt: skip
        return (received.id,)

    def _last_kernel(self) -> tuple[int, ...]:
        """The kernel before the attention: a message is issued when a step starts, the first with the first."""
        return next(((step.id,) for step in reversed(self.instructions) if isinstance(step, Compute)), ())

    def _attention(
        self, of: Compute, work: tuple[Work | None, ...], reads: tuple[int, ...], writes: tuple[Buffer, ...]
    ) -> None:
        self.instructions.append(Compute(self._next(), self.name, "attention", of.part, work, reads, writes))
        self.issued_after = (self.num_instructions - 1,)

    def _elementwise(
        self,
        of: Compute,
        traffic: int,
        reads: tuple[int, ...],
        writes: tuple[Buffer, ...],
        active: Sequence[object],
    ) -> None:
        """A merge or an addition of so many bytes, on the positions that computed a block."""
        kernel = MemoryBound("elementwise", traffic)
        work = tuple([kernel if here else None for here in active])
        self.instructions.append(Compute(self._next(), self.name, "elementwise", of.part, work, reads, writes))

    def _work(self, compute: Compute, step: int) -> tuple[FlashAttention | None, ...]:
        """The kernel of each position on the ring that has one; those of a step are equal."""
        base = compute.work[0]
        assert isinstance(base, FlashAttention)
        blocks = ring_blocks(base.queries, self.degree, step, causal=self.causal, cut=self.cut)
        block = next(filter(None, blocks))
        kernel = self.kernels.block(base.direction, block.queries, block.keys, block.twice_pairs, causal=block.causal)
        return tuple([kernel if own else None for own in blocks])

    # The two passes

    def _forward(self, compute: Compute, gathers: list[Communication]) -> None:
        """P attention steps; each after the first merges its output into the running one, which is kept in
        fp32 and rescaled by the log-sum-exp (the merge of ring-flash-attention and Transformer Engine).
        """
        context, statistics = compute.writes
        running = output = self._buffer(context.tensor, FP32_PER_BF16 * context.bytes)
        keys, size = self._local_keys(gathers)
        queries = tuple(b for b in compute.reads if b not in {w.id for g in gathers for w in g.writes})
        part: Part = "recompute" if compute.part == "recompute" else "forward"
        work: tuple[Work | None, ...] = ()

        def merge(written: int, *writes: Buffer) -> None:
            traffic = running.bytes + output.bytes + written
            self._elementwise(compute, traffic, (running.id, output.id), writes, work)

        self.issued_after = self._last_kernel()
        for step in self._steps(2):
            arriving = keys
            if step < self.degree - 1:
                arriving = self._exchange("key_value", size, keys, "input", part, self.issued_after)
            if step > 1:
                merge(running.bytes)
            output = running if step == 0 else self._buffer(context.tensor, context.bytes)
            work = self._work(compute, step)
            writes = (output, statistics) if step == 0 else (output,)
            self._attention(compute, work, (*queries, *keys), writes)
            keys = arriving
            self.handed_on = (*keys, output.id)
        merge(context.bytes, context)

    def _backward(self, compute: Compute, gathers: list[Communication], homes: tuple[Buffer, ...]) -> None:
        """P steps; the gradients of K and V follow their block around the ring and come home last."""
        query_gradient, *_ = compute.writes
        running = self._buffer(query_gradient.tensor, query_gradient.bytes)
        keys, size = self._local_keys(gathers)
        others = tuple(b for b in compute.reads if b not in {w.id for g in gathers for w in g.writes})
        own: tuple[int, ...] = ()
        circulating: tuple[int, ...] = ()
        self.issued_after = self._last_kernel()
        for step in self._steps(3):
            last = step == self.degree - 1
            arriving = keys
            if not last:
                arriving = self._exchange("key_value", size, keys, "regather", "backward", self.issued_after)
            output = running if step == 0 else self._buffer(query_gradient.tensor, query_gradient.bytes)
            block = self._buffer("key_value gradient", size)
            work = self._work(compute, step)
            self._attention(compute, work, (*others, *keys), (output, block))
            if step == 0:
                own = (block.id,)
            else:
                summed = (replace(query_gradient, alias_of=running.id),) if last else ()
                self._elementwise(compute, 3 * query_gradient.bytes, (running.id, output.id), summed, work)
                circulating = self._pass_on(compute, size, block, circulating, work)
            keys = arriving
            self.handed_on = keys + circulating
        self._elementwise(compute, 3 * size, own + circulating, homes, [True])

    def _pass_on(
        self, compute: Compute, size: int, block: Buffer, circulating: tuple[int, ...], active: Sequence[object]
    ) -> tuple[int, ...]:
        """Add this step's dK, dV to those that arrived with the block, and send the sum on."""
        outgoing = (block.id,)
        if circulating:
            total = self._buffer("key_value gradient", size, alias_of=block.id)
            self._elementwise(compute, 3 * size, (block.id, *circulating), (total,), active)
            self.issued_after = (self.num_instructions - 1,)
            outgoing = (total.id,)
        return self._exchange("key_value gradient", size, outgoing, "gradient", "backward", ())

    @staticmethod
    def _local_keys(gathers: list[Communication]) -> tuple[tuple[int, ...], int]:
        """The local K and V before their gather, and their bytes together."""
        ranks = gathers[0].ranks
        return tuple(b for g in gathers for b in g.reads), sum(g.message_bytes // ranks for g in gathers)
