"""Lowerings: one redistribution and one operator become several steps, program to program.

Ring attention is the gather of K and V, attention, and the reduce-scatter of their gradients, which the
rules derive, carried out in P steps with messages in flight behind them (Liu et al. 2023, arXiv:2310.01889). K and V
go round in P - 1 messages, or are gathered behind the first step, as torch's context parallelism does by default;
`ring_gradients` has the two ways of their gradients. Steps that are equal on all ranks, all but the first and last
ones unless a causal mask meets a contiguous cut, are one section that repeats if they are many.
"""

from __future__ import annotations

from spsim.inputs.plan import Plan
from spsim.program.attention import Attention
from spsim.program.instructions import Buffer, Communication, Compute, Part, Program, Purpose
from spsim.program.lowerings.gathered_attention import GatheredAttention
from spsim.program.lowerings.ring_gradients import Fp32Gradients, ModelDtypeGradients, RingGradients
from spsim.program.lowerings.ring_steps import Message
from spsim.program.mesh import Mesh
from spsim.work import Work

FP32_PER_BF16 = 2
WRITTEN_OUT = 8
"""Equal steps that are written out: a section that repeats is walked until it comes to a steady state, which takes as
long as running about so many steps in a row.
"""


def lower_ring(
    program: Program, plan: Plan, mesh: Mesh, attention: Attention, *, causal: bool, written_out: int = WRITTEN_OUT
) -> Program:
    """Ring attention as steps and messages; `attention` holds the kernels of the core attention operator.

    More equal steps than those `written_out` are one section, so that the size of the program does not depend on their
    number.
    """
    return _RingLowering(program, plan, mesh, attention, causal=causal, written_out=written_out).lowered()


class _RingLowering(GatheredAttention):
    def __init__(
        self, program: Program, plan: Plan, mesh: Mesh, attention: Attention, *, causal: bool, written_out: int
    ) -> None:
        super().__init__(program, plan, mesh, attention, causal=causal, written_out=written_out)
        self.gathers = plan.ring_kind == "gather_permute"
        self.separate = plan.ring_messages == "separate"
        self.gradients: type[RingGradients] = Fp32Gradients if plan.sends_fp32_gradients else ModelDtypeGradients

    def _local_keys(self, gathers: list[Communication]) -> tuple[tuple[int, ...], tuple[Message, ...]]:
        """The local K and V before their gather, and what they are sent in."""
        own = self.local_messages(gathers)
        joint = (Message("key_value", sum(message.bytes for message in own)),)
        return tuple(b for g in gathers for b in g.reads), own if self.separate else joint

    def _next_keys(
        self,
        compute: Compute,
        step: int,
        keys: tuple[int, ...],
        messages: tuple[Message, ...],
        purpose: Purpose,
        part: Part,
    ) -> tuple[int, ...]:
        """K and V of the next step, which are sent when this one starts; all at once where they are gathered."""
        if step == self.degree - 1 or (self.gathers and step > 0):
            return keys
        sent = self.concatenated(compute, messages, keys)
        after = self.issued_after if sent == keys else ()
        return self.move("all_gather" if self.gathers else "send_receive", messages, sent, purpose, part, after)

    def _found(self, keys: tuple[int, ...]) -> tuple[int, ...]:
        """Those of K and V that a step finds from the one before it: what is gathered, all find."""
        return () if self.gathers else keys

    # The two passes

    def forward(self, compute: Compute, gathers: list[Communication]) -> None:
        """P attention steps; each after the first merges its output into the running one, which is kept in
        fp32 and rescaled by the log-sum-exp (the merge of ring-flash-attention and Transformer Engine).
        """
        context, statistics = compute.writes
        running = output = self.buffer(context.tensor, FP32_PER_BF16 * context.bytes)
        keys, messages = self._local_keys(gathers)
        queries = self.but_keys(compute, gathers)
        part: Part = "recompute" if compute.part == "recompute" else "forward"
        work: tuple[Work | None, ...] = ()

        def merge(written: int, *writes: Buffer) -> None:
            traffic = running.bytes + output.bytes + written
            self.elementwise(compute, traffic, (running.id, output.id), writes, work)

        self.issued_after = self.last_kernel()
        for step in self.steps(2):
            arriving = self._next_keys(compute, step, keys, messages, "input", part)
            if step > 1:
                merge(running.bytes)
            output = running if step == 0 else self.buffer(context.tensor, context.bytes)
            work = self.work(compute, step)
            writes = (output, statistics) if step == 0 else (output,)
            self.attention(compute, work, (*queries, *keys), writes)
            keys = arriving
            self.handed_on = (*self._found(keys), output.id)
        merge(context.bytes, context)

    def backward(self, compute: Compute, gathers: list[Communication], homes: tuple[Buffer, ...]) -> None:
        """P steps; the gradients of K and V follow their block around the ring and come home last."""
        keys, messages = self._local_keys(gathers)
        gradients = self.gradients(self, compute, messages, homes)
        others = self.but_keys(compute, gathers)
        self.issued_after = self.last_kernel()
        for step in self.steps(gradients.first_equal):
            arriving = self._next_keys(compute, step, keys, messages, "regather", "backward")
            written = gradients.written(step)
            work = self.work(compute, step)
            self.attention(compute, work, (*others, *keys), written)
            gradients.add(step, work)
            keys = arriving
            self.handed_on = self._found(keys) + gradients.travelling
        gradients.come_home()
