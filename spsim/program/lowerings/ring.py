"""Lowerings: one redistribution and one operator become several steps, program to program.

Ring attention is the gather of K and V, attention, and the reduce-scatter of their gradients, which the
rules derive, carried out in P steps with P - 1 messages in flight behind them (Liu et al. 2023,
arXiv:2310.01889; the exchange of K, V and of dK, dV is Transformer Engine's).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from spsim.inputs.plan import Plan
from spsim.program.instructions import (
    Buffer,
    Category,
    Communication,
    Compute,
    Instruction,
    Part,
    Program,
    Purpose,
    Section,
)
from spsim.program.kernels import Kernels
from spsim.program.mesh import Mesh
from spsim.work import Direction, FlashAttention, MemoryBound, Work

FP32_PER_BF16 = 2


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


def lower_ring(program: Program, plan: Plan, mesh: Mesh, attention: Kernels, *, causal: bool) -> Program:
    """Ring attention as steps and messages; `attention` holds the kernels of the core attention operator."""
    lowering = _RingLowering(program, plan, mesh, attention, causal)
    return replace(
        program,
        forward_sections=(Section(lowering.lower(program.forward)),),
        backward_sections=(Section(lowering.lower(program.backward)),),
    )


class _RingLowering:
    def __init__(self, program: Program, plan: Plan, mesh: Mesh, attention: Kernels, causal: bool) -> None:
        self.degree = mesh.degree("ring")
        self.cut = plan.ring_cut
        self.causal = causal
        self.kernels = attention
        self.name = attention.operator.name
        self.keys_and_values = {operand.tensor.name for operand in attention.operator.inputs[1:]}
        self.num_steps = 1 + max(step.id for step in program.instructions)
        self.num_buffers = 1 + max(
            buffer.id
            for buffer in (
                *program.inputs, *program.output_gradients, *(b for step in program.instructions for b in step.writes)
            )
        )  # fmt: skip
        self.steps: list[Instruction] = []

    def lower(self, steps: Sequence[Instruction]) -> tuple[Instruction, ...]:
        """One phase of the program with each gathered attention replaced."""
        self.steps = []
        gathers: list[Communication] = []
        for step in steps:
            if isinstance(step, Communication) and self._moves_keys(step):
                if step.collective == "all_gather":
                    gathers.append(step)
            elif isinstance(step, Compute) and step.operator == self.name and step.kind == "attention":
                run = self._backward if step.part == "backward" else self._forward
                run(step, gathers, self._scatters(steps))
                gathers = []
            else:
                self.steps.append(step)
        return tuple(self.steps)

    def _moves_keys(self, step: Communication) -> bool:
        return step.axis == "ring" and step.tensor in self.keys_and_values

    def _scatters(self, steps: Sequence[Instruction]) -> list[Communication]:
        return [
            step
            for step in steps
            if isinstance(step, Communication) and self._moves_keys(step) and step.collective == "reduce_scatter"
        ]

    # Building blocks

    def _buffer(self, tensor: str, size: int, alias_of: int | None = None, *, received: bool = False) -> Buffer:
        self.num_buffers += 1
        category: Category = "communication buffers" if received else "temporary"
        return Buffer(self.num_buffers - 1, tensor, size, category, alias_of)

    def _add(self, step: Instruction) -> None:
        self.steps.append(replace(step, id=self.num_steps))
        self.num_steps += 1

    def _exchange(
        self,
        tensor: str,
        size: int,
        reads: tuple[int, ...],
        purpose: Purpose,
        phase: Part,
        after: tuple[int, ...],
    ) -> tuple[int, ...]:
        """Send to the next rank and receive from the previous one; returns what arrived."""
        received = self._buffer(tensor, size, received=True)
        self._add(
            Communication(
                0, self.name, tensor, "ring", "send_receive", self.degree, size, size, purpose, phase, reads,
                (received,), after,
            )
        )  # fmt: skip
        return (received.id,)

    def _last_kernel(self) -> tuple[int, ...]:
        """The kernel before the attention: a message is issued when a step starts, the first with the first."""
        return tuple(step.id for step in self.steps if isinstance(step, Compute))[-1:]

    def _elementwise(
        self,
        compute: Compute,
        traffic: int,
        reads: tuple[int, ...],
        writes: tuple[Buffer, ...],
        active: Sequence[bool],
    ) -> None:
        """A merge or an addition of so many bytes, on the positions that computed a block."""
        kernel = MemoryBound("elementwise", traffic)
        work: tuple[Work | None, ...] = tuple(kernel if here else None for here in active)
        self._add(replace(compute, kind="elementwise", work=work, reads=reads, writes=writes))

    def _work(self, compute: Compute, step: int) -> tuple[Work | None, ...]:
        base = compute.work[0]
        assert isinstance(base, FlashAttention)
        blocks = ring_blocks(base.queries, self.degree, step, causal=self.causal, cut=self.cut)
        return tuple(self._block_work(base.direction, block) for block in blocks)

    def _block_work(self, direction: Direction, block: RingBlock | None) -> FlashAttention | None:
        if block is None:
            return None
        return self.kernels.attention_block(
            direction, block.queries, block.keys, block.twice_pairs, causal=block.causal
        )

    # The two passes

    def _forward(self, compute: Compute, gathers: list[Communication], _: list[Communication]) -> None:
        """P attention steps; each after the first merges its output into the running one, which is kept in
        fp32 and rescaled by the log-sum-exp (the merge of ring-flash-attention and Transformer Engine).
        """
        context, statistics = compute.writes
        running = self._buffer(context.tensor, FP32_PER_BF16 * context.bytes)
        keys, size = self._local_keys(gathers)
        queries = tuple(b for b in compute.reads if b not in {w.id for g in gathers for w in g.writes})
        phase: Part = "recompute" if compute.part == "recompute" else "forward"
        previous = self._last_kernel()
        for step in range(self.degree):
            arriving = keys
            if step < self.degree - 1:
                arriving = self._exchange("key_value", size, keys, "input", phase, previous)
            output = running if step == 0 else self._buffer(context.tensor, context.bytes)
            writes = (output, statistics) if step == 0 else (output,)
            work = self._work(compute, step)
            self._add(replace(compute, work=work, reads=(*queries, *keys), writes=writes))
            previous = (self.num_steps - 1,)
            if step > 0:
                last = step == self.degree - 1
                written = context.bytes if last else running.bytes
                traffic = running.bytes + output.bytes + written
                active = [block is not None for block in work]
                self._elementwise(compute, traffic, (running.id, output.id), (context,) if last else (), active)
            keys = arriving

    def _backward(self, compute: Compute, gathers: list[Communication], scatters: list[Communication]) -> None:
        """P steps; the gradients of K and V follow their block around the ring and come home last."""
        query_gradient, *_ = compute.writes
        running = self._buffer(query_gradient.tensor, query_gradient.bytes)
        keys, size = self._local_keys(gathers)
        others = tuple(b for b in compute.reads if b not in {w.id for g in gathers for w in g.writes})
        previous = self._last_kernel()
        own: tuple[int, ...] = ()
        circulating: tuple[int, ...] = ()
        for step in range(self.degree):
            arriving = keys
            if step < self.degree - 1:
                arriving = self._exchange("key_value", size, keys, "regather", "backward", previous)
            output = running if step == 0 else self._buffer(query_gradient.tensor, query_gradient.bytes)
            block = self._buffer("key_value gradient", size)
            work = self._work(compute, step)
            active = [item is not None for item in work]
            self._add(replace(compute, work=work, reads=(*others, *keys), writes=(output, block)))
            previous = (self.num_steps - 1,)
            if step == 0:
                own = (block.id,)
            else:
                last = step == self.degree - 1
                summed = (replace(query_gradient, alias_of=running.id),) if last else ()
                self._elementwise(compute, 3 * query_gradient.bytes, (running.id, output.id), summed, active)
                circulating = self._pass_on(compute, size, block, circulating, active)
            keys = arriving
        homes = tuple(buffer for step in scatters for buffer in step.writes)
        self._elementwise(compute, 3 * size, own + circulating, homes, [True])

    def _pass_on(
        self, compute: Compute, size: int, block: Buffer, circulating: tuple[int, ...], active: Sequence[bool]
    ) -> tuple[int, ...]:
        """Add this step's dK, dV to those that arrived with the block, and send the sum on."""
        outgoing: tuple[int, ...] = (block.id,)
        if circulating:
            total = self._buffer("key_value gradient", size, alias_of=block.id)
            self._elementwise(compute, 3 * size, (block.id, *circulating), (total,), active)
            outgoing = (total.id,)
        return self._exchange("key_value gradient", size, outgoing, "gradient", "backward", ())

    @staticmethod
    def _local_keys(gathers: list[Communication]) -> tuple[tuple[int, ...], int]:
        """The local K and V before their gather, and their bytes together."""
        ranks = gathers[0].ranks
        return tuple(b for g in gathers for b in g.reads), sum(g.message_bytes // ranks for g in gathers)
