"""What takes the place of an attention whose K and V the rules gather, and whose gradients of them they scatter."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import replace

from spsim.inputs.plan import Plan
from spsim.program.attention import Attention
from spsim.program.instructions import Buffer, Communication, Compute, Instruction, Program, Section
from spsim.program.lowerings.ring_steps import Message, RingSteps
from spsim.program.mesh import Mesh


class GatheredAttention(RingSteps):
    """Replaces each gathered attention of a program."""

    def __init__(
        self, program: Program, plan: Plan, mesh: Mesh, attention: Attention, *, causal: bool, written_out: int
    ) -> None:
        super().__init__(program, plan, mesh, attention, causal=causal, written_out=written_out)
        self.program = program
        self.keys_and_values = {operand.name for operand in attention.placed.inputs[1:]}

    def lowered(self) -> Program:
        """Both passes of the program."""
        return replace(
            self.program,
            forward_sections=self._lower(self.program.forward_sections),
            backward_sections=self._lower(self.program.backward_sections),
        )

    @abstractmethod
    def forward(self, compute: Compute, gathers: list[Communication]) -> None:
        """In place of an attention and the gathers of its K and V."""

    @abstractmethod
    def backward(self, compute: Compute, gathers: list[Communication], homes: tuple[Buffer, ...]) -> None:
        """In place of its backward pass; `homes` is where the gradients of the own K and V go."""

    def _lower(self, sections: Sequence[Section]) -> tuple[Section, ...]:
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
                        self.backward(step, gathers, homes)
                    else:
                        self.forward(step, gathers)
                    gathers = []
                else:
                    self.instructions.append(step)
            self.end_section()
        return tuple(self.sections)

    def _moves_keys(self, step: Communication) -> bool:
        return step.axis == "ring" and step.tensor in self.keys_and_values

    def _homes(self, steps: Iterable[Instruction]) -> tuple[Buffer, ...]:
        """Where the gradients of the own K and V go: what their reduce-scatters would write."""
        moves = (step for step in steps if isinstance(step, Communication) and self._moves_keys(step))
        return tuple(buffer for step in moves if step.collective == "reduce_scatter" for buffer in step.writes)

    def local_messages(self, gathers: Sequence[Communication]) -> tuple[Message, ...]:
        """The local K and V before their gather."""
        return tuple([Message(gather.tensor, gather.message_bytes // self.degree) for gather in gathers])

    @staticmethod
    def but_keys(compute: Compute, gathers: list[Communication]) -> tuple[int, ...]:
        """What the attention kernel reads beside gathered K and V."""
        gathered = {buffer.id for gather in gathers for buffer in gather.writes}
        return tuple([buffer for buffer in compute.reads if buffer not in gathered])
