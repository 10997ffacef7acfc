"""What the buffers of a program are to whoever looks at memory: kept for the backward pass or not."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import replace

from spsim.program.instructions import Buffer, Communication, Compute, HostCopy, Instruction, Program, Section


def categorise(program: Program, weights: Set[str] = frozenset()) -> Program:
    """Forward buffers that the backward pass reads are activations, and so is the chain of block inputs. Those of
    `weights` are not: they stay what they are.
    """
    kept = {buffer for step in program.backward for buffer in step.reads}
    kept |= {b.alias_of for step in program.forward for b in step.writes if b.id in kept and b.alias_of is not None}
    if weights:
        kept -= {b.id for step in program.forward for b in step.writes if b.tensor in weights}
    if any(entry.id in kept for entry in program.inputs):
        kept |= {output.id for output in program.outputs}
    return replace(
        program,
        forward_sections=tuple(_of_section(section, kept) for section in program.forward_sections),
        inputs=tuple(_of_buffer(entry, kept) for entry in program.inputs),
        outputs=tuple(_of_buffer(output, kept) for output in program.outputs),
    )


def _of_section(section: Section, kept: set[int]) -> Section:
    instructions = tuple([_of_instruction(step, kept) for step in section.instructions])
    return Section(instructions, section.count, section.carried, section.layer)


def _of_instruction(step: Instruction, kept: set[int]) -> Instruction:
    """Written out, for `replace` takes several times as long and this is done for every instruction."""
    if not any(buffer.id in kept for buffer in step.writes):
        return step
    writes = tuple([_of_buffer(buffer, kept) for buffer in step.writes])
    if isinstance(step, HostCopy):
        return replace(step, writes=writes)
    if isinstance(step, Compute):
        return Compute(step.id, step.operator, step.kind, step.part, step.work, step.reads, writes)
    return Communication(
        step.id, step.operator, step.tensor, step.axis, step.collective, step.ranks, step.message_bytes,
        step.sent_bytes, step.purpose, step.part, step.reads, writes, step.issued_after, step.step_of, step.share,
        step.sends_before, step.dispatch,
    )  # fmt: skip


def _of_buffer(buffer: Buffer, kept: set[int]) -> Buffer:
    if buffer.id not in kept:
        return buffer
    return Buffer(buffer.id, buffer.tensor, buffer.bytes, "activations", buffer.alias_of)
