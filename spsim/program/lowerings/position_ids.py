"""Position ids gathered before the heads are exchanged, once for each run of attention.

DeepSpeed's Ulysses for transformers models (`runtime/sequence_parallel/ulysses_sp.py`) gathers the ids of all tokens in
every layer, before the all-to-all of Q, and hands them to attention. They have no gradient.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace

from spsim.program.instructions import Buffer, Communication, Compute, Instruction, Part, Program, Section, next_ids
from spsim.program.placement import sent_bytes
from spsim.program.region import Region

ID_BYTES = 8
"""Of an int64."""


def gather_position_ids(program: Program, region: Region) -> Program:
    """A program whose attention, where it has some, gets the position ids that it gathers over `ulysses` first."""
    starts = [op for op in region.operators if op.operator.mixes_positions and "j" not in op.inputs[0].subscript]
    if not starts:
        return program
    sizes = {op.name: ID_BYTES * math.ceil(op.sizes["s"] * op.sizes["b"]) for op in starts}
    inserting = _Inserting(program, sizes, region.mesh.degree("ulysses"))
    return replace(
        program,
        forward_sections=tuple(map(inserting.section, program.forward_sections)),
        backward_sections=tuple(map(inserting.section, program.backward_sections)),
    )


class _Inserting:
    def __init__(self, program: Program, sizes: Mapping[str, int], ranks: int) -> None:
        """`sizes` are the bytes of the ids, by operator that begins an attention."""
        self.num_instructions, self.num_buffers = next_ids(program)
        self.sizes = sizes
        self.ranks = ranks
        self.missing: set[tuple[str, Part]] = {(name, part) for name in sizes for part in ("forward", "recompute")}
        """Operators and parts whose ids are yet to be gathered; the gradients of attention need none."""
        self.awaited: dict[int, int] = {}
        """What the exchange brings -> the ids that its reader gets too."""

    def section(self, section: Section) -> Section:
        """With the gather before the first exchange."""
        kernel: tuple[int, ...] = ()
        steps: list[Instruction] = []
        for step in section.instructions:
            if isinstance(step, Communication) and step.axis == "ulysses":
                steps += self._gathered(step, kernel)
            if isinstance(step, Compute):
                kernel = (step.id,)
                ids = tuple([self.awaited.pop(buffer) for buffer in step.reads if buffer in self.awaited])
                step = replace(step, reads=step.reads + ids) if ids else step
            steps.append(step)
        return replace(section, instructions=tuple(steps))

    def _gathered(self, exchange: Communication, kernel: tuple[int, ...]) -> Iterator[Communication]:
        """The ids before the first exchange of an attention, behind the last kernel, as all that a stream is given."""
        if (exchange.operator, exchange.part) not in self.missing:
            return
        size = self.sizes[exchange.operator]
        ids = Buffer(self.num_buffers, "position_ids", size, "communication buffers")
        self.num_instructions, self.num_buffers = self.num_instructions + 1, self.num_buffers + 1
        self.missing.remove((exchange.operator, exchange.part))
        self.awaited[exchange.writes[0].id] = ids.id
        yield Communication(
            self.num_instructions - 1, exchange.operator, ids.tensor, "ulysses", "all_gather", self.ranks, size,
            sent_bytes("all_gather", size, self.ranks), "input", exchange.part, (), (ids,), kernel,
        )  # fmt: skip
