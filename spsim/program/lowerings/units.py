"""Layers that are recomputed together: of a unit only the first input is kept, and before its backward pass all of its
layers run forward again (Chen et al. 2016, arXiv:1604.06174; `recompute_method = uniform`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

from spsim.program.categories import categorise
from spsim.program.instructions import (
    Buffer,
    Category,
    Communication,
    Compute,
    Instruction,
    Part,
    Program,
    Section,
    next_ids,
)


def unit_of(program: Program, repeated: Program, layers: int) -> Program:
    """So many layers in a row as one block, from the program of a layer that keeps what its backward pass needs, and
    that of one that is `repeated` as a whole and keeps its input only.

    Each layer has sections of its own: forward, once more before the backward pass, and backward in reverse order.
    """
    copies = [_Copy(program, number) for number in range(2 * layers)]
    forward, again = copies[:layers], copies[layers:]
    again[0].finds(program.inputs, forward[0], program.inputs)
    for before, layer in (*pairwise(forward), *pairwise(again)):
        layer.finds(program.inputs, before, program.outputs)
    for after, layer in pairwise(reversed(again)):
        layer.finds(program.output_gradients, after, program.input_gradients)
    first_pass = [layer.section(own, n) for n, layer in enumerate(forward) for own in program.forward_sections]
    second_pass = [
        layer.section(own, n, "recompute") for n, layer in enumerate(again) for own in program.forward_sections
    ]
    backward = [again[n].section(own, n) for n in reversed(range(layers)) for own in program.backward_sections]
    unit = replace(
        program,
        forward_sections=tuple(first_pass),
        backward_sections=(*second_pass, *backward),
        saved=repeated.saved,
        weight_sync=layers * program.weight_sync,
        parameters=layers * program.parameters,
        weights=layers * program.weights,
        weight_bytes=layers * program.weight_bytes,
        weight_casts=layers * program.weight_casts,
        inputs=forward[0].buffers(program.inputs),
        outputs=forward[-1].buffers(program.outputs),
        output_gradients=again[-1].buffers(program.output_gradients),
        input_gradients=again[0].buffers(program.input_gradients),
    )
    return categorise(unit)


class _Copy:
    """One run of a layer, with numbers of its own for what the program numbers."""

    def __init__(self, program: Program, number: int) -> None:
        instructions, buffers = next_ids(program)
        self.first_instruction, self.first_buffer = number * instructions, number * buffers
        self.found: dict[int, int] = {}
        """Buffer of the program -> the one of another run that is there in its place."""

    def finds(self, own: Sequence[Buffer], other: _Copy, left: Sequence[Buffer]) -> None:
        """Its buffers `own` are those that another run leaves."""
        self.found |= {mine.id: other.number(theirs.id) for mine, theirs in zip(own, left, strict=True)}

    def number(self, buffer: int) -> int:
        """Of a buffer in the unit."""
        return self.found.get(buffer, self.first_buffer + buffer)

    def buffers(self, own: Sequence[Buffer]) -> tuple[Buffer, ...]:
        """Buffers with their numbers in the unit."""
        return tuple(
            replace(b, id=self.number(b.id), alias_of=None if b.alias_of is None else self.number(b.alias_of))
            for b in own
        )

    def section(self, section: Section, layer: int, part: Part | None = None) -> Section:
        """A section of the program in the unit, as another part if one is given."""
        steps = tuple(self._instruction(step, part or step.part) for step in section.instructions)
        carried = tuple((self.number(found), self.number(left)) for found, left in section.carried)
        return Section(steps, section.count, carried, layer)

    def _instruction(self, step: Instruction, part: Part) -> Instruction:
        number, reads = self.first_instruction + step.id, tuple(map(self.number, step.reads))
        # What is kept for the backward pass is found anew.
        usual: Category = "temporary" if isinstance(step, Compute) else "communication buffers"
        own = (replace(b, category=usual) if b.category == "activations" else b for b in step.writes)
        found = replace(step, id=number, part=part, reads=reads, writes=self.buffers(tuple(own)))
        if not isinstance(found, Communication):
            return found
        return replace(found, issued_after=tuple(self.first_instruction + other for other in found.issued_after))
