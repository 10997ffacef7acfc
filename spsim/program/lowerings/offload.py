"""Activations that wait in host memory between the passes of their layer (`cpu_offload_layers`; Transformer Engine's
`get_cpu_offload_context`).

A layer copies what its backward pass reads once its kernels have written it, and has that memory until the copy ends.
The layer before it in the backward pass copies it back, behind its own kernels, into memory that is there from then on.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from spsim.program.instructions import Buffer, HostCopy, Instruction, Program, Section, next_ids

ACTIVATIONS = "activations"


def offload(program: Program, *, leaves: bool, fetches: bool) -> Program:
    """A block whose activations leave the device, or which fetches those of an equal block for the next backward pass,
    or both.
    """
    kept = _kept(program)
    size = sum(buffer.bytes for buffer in kept.values())
    instructions, buffers = next_ids(program)
    if fetches:
        fetched = Buffer(buffers, ACTIVATIONS, size, "activations")
        copy = HostCopy(instructions, ACTIVATIONS, "backward", size, (), (fetched,))
        first, *rest = program.backward_sections
        program = replace(
            program,
            backward_sections=(replace(first, instructions=(copy, *first.instructions)), *rest),
            input_gradients=(*program.input_gradients, fetched),
        )
    if leaves:
        found = Buffer(buffers + 1, ACTIVATIONS, size, "activations")
        copy = HostCopy(instructions + 1, ACTIVATIONS, "forward", size, (*kept,), ())
        *before, last = program.forward_sections
        program = replace(
            program,
            forward_sections=(*before, replace(last, instructions=(*last.instructions, copy))),
            backward_sections=_reading(program, kept.keys(), found.id),
            output_gradients=(*program.output_gradients, found),
            from_host=(found,),
            saved=(),
        )
    return program


def _kept(program: Program) -> dict[int, Buffer]:
    """Buffers of the forward pass that the backward pass reads, by their memory."""
    buffers = {b.id: b for b in (*program.inputs, *_written(program.forward_sections))}
    read = [number for s in program.backward_sections for step in s.instructions for number in step.reads]
    return {root: buffers[root] for root in dict.fromkeys(_root(n, buffers) for n in read if n in buffers)}


def _reading(program: Program, kept: Collection[int], found: int) -> tuple[Section, ...]:
    """The backward pass with what it reads of the forward pass in one buffer."""
    buffers = {b.id: b for b in (*program.inputs, *_written(program.forward_sections))}

    def moved(step: Instruction) -> Instruction:
        own = (found if n in buffers and _root(n, buffers) in kept else n for n in step.reads)
        return replace(step, reads=tuple(dict.fromkeys(own)))

    return tuple(
        replace(section, instructions=tuple(map(moved, section.instructions))) for section in program.backward_sections
    )


def _written(sections: Sequence[Section]) -> list[Buffer]:
    return [buffer for section in sections for step in section.instructions for buffer in step.writes]


def _root(number: int, buffers: Mapping[int, Buffer]) -> int:
    """The buffer whose memory it is."""
    while (alias := buffers[number].alias_of) is not None:
        number = alias
    return number
