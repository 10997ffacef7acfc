"""Instructions of a program as they are issued, and the buffers that they write."""

from __future__ import annotations

from collections.abc import Iterable

from spsim.program.instructions import Buffer, Category, Communication, Compute, Instruction, Part, Purpose
from spsim.program.region import Move
from spsim.work import KernelClass, Work

AT_REST = -1
"""Number of what is no buffer of the program: weights are there for the whole step."""


class Emission:
    """The instructions so far, in order; the numbers of instructions and buffers."""

    def __init__(self) -> None:
        self.part: Part = "forward"
        self.instructions: list[Instruction] = []
        self.num_buffers = 0
        self.num_instructions = 0

    def buffer(self, tensor: str, size: int, category: Category = "temporary", alias_of: int | None = None) -> Buffer:
        """The next one, of so many bytes."""
        self.num_buffers += 1
        return Buffer(self.num_buffers - 1, tensor, size, category, alias_of)

    def _next(self) -> int:
        self.num_instructions += 1
        return self.num_instructions - 1

    def compute(
        self,
        operator: str,
        kind: KernelClass,
        part: Part,
        work: tuple[Work, ...],
        reads: Iterable[Buffer],
        writes: Iterable[Buffer],
    ) -> None:
        """The next kernel."""
        read = tuple(dict.fromkeys([buffer.id for buffer in reads]))
        self.instructions.append(Compute(self._next(), operator, kind, part, work, read, tuple(writes)))

    def communicate(self, move: Move, tensor: str, have: Buffer, purpose: Purpose, operator: str) -> Buffer:
        """One collective; an all-reduce works in place, a slice is a view."""
        collective = move.collective
        if collective is None:
            return have
        in_place = have.id if collective == "all_reduce" else None
        buffer = self.buffer(have.tensor, move.bytes, "communication buffers", in_place)
        self.instructions.append(
            Communication(
                self._next(), operator, tensor, move.axis, collective, move.ranks, move.message_bytes,
                move.sent_bytes, purpose, self.part, () if have.id == AT_REST else (have.id,), (buffer,),
            )
        )  # fmt: skip
        return buffer
