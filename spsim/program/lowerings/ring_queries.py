"""Queries go round a ring whose ranks keep their keys (pass-Q; Yang et al. 2024, arXiv:2411.01783, section 3.4).

The rules derive "gather Q, attention to the own keys, scatter the sum of its results": P steps with messages of Q in
flight, partial results of the queries of all ranks, and their exchange (`lowerings.partial`).
"""

from __future__ import annotations

from dataclasses import replace

from spsim.inputs.plan import Plan
from spsim.program.attention import Attention
from spsim.program.instructions import Buffer, Communication, Compute, Program, Section
from spsim.program.lowerings.ring import WRITTEN_OUT
from spsim.program.lowerings.ring_steps import Message, RingSteps
from spsim.program.mesh import Mesh


def lower_queries(
    program: Program, plan: Plan, mesh: Mesh, attention: Attention, *, causal: bool, written_out: int = WRITTEN_OUT
) -> Program:
    """The forward pass of a program with each attention that gathers its queries in steps."""
    lowering = _Queries(program, plan, mesh, attention, causal=causal, written_out=written_out)
    return replace(program, forward_sections=lowering.lowered(program))


class _Queries(RingSteps):
    def lowered(self, program: Program) -> tuple[Section, ...]:
        """The sections of the pass."""
        queries = self.kernels.placed.inputs[0].name
        gather: Communication | None = None
        for section in program.forward_sections:
            for step in section.instructions:
                if isinstance(step, Communication) and step.axis == "ring" and step.tensor == queries:
                    gather = step
                elif isinstance(step, Compute) and step.operator == self.name and step.kind == "attention" and gather:
                    self._attend(step, gather)
                    gather = None
                else:
                    self.instructions.append(step)
            self.end_section()
        return tuple(self.sections)

    def _attend(self, compute: Compute, gather: Communication) -> None:
        """P steps of attention, each with the queries of another rank; a view of all results for each of them."""
        message = Message(gather.tensor, gather.message_bytes // self.degree)
        queries = gather.reads
        keys = tuple(buffer for buffer in compute.reads if buffer not in {own.id for own in gather.writes})
        every: tuple[Buffer, ...] = ()
        self.issued_after = self.last_kernel()
        for step in self.steps(1):
            last = step == self.degree - 1
            arriving = queries
            if not last:
                arriving = self.move("send_receive", [message], queries, "input", "forward", self.issued_after)
            made = self._results(compute, every, last=last)
            every = every or made
            self.attention(compute, self.work(compute, step), (*queries, *keys), made)
            queries = self.handed_on = arriving

    def _results(self, compute: Compute, every: tuple[Buffer, ...], *, last: bool) -> tuple[Buffer, ...]:
        """What a step writes: those of `every` rank the first allocates, others fill them, and the last completes what
        is read.
        """
        own = compute.writes
        if last:
            return tuple(replace(result, alias_of=whole.id) for result, whole in zip(own, every, strict=True))
        if not every:
            return tuple(self.buffer(result.tensor, result.bytes) for result in own)
        return tuple(self.buffer(o.tensor, o.bytes, whole.id) for o, whole in zip(own, every, strict=True))
