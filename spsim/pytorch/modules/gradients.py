"""Gradients of weights as torch has them: made by the backward pass, or kept and added to.

After `zero_grad(set_to_none=True)`, the default, a gradient does not exist before the backward pass writes it; then it
stays. Gradients that are kept are there all the time, and what a pass writes is added to them, a kernel for each, and
let go (`torch/csrc/autograd/functions/accumulate_grad.h`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

from spsim.program.instructions import Buffer, Compute, Instruction, Program, Section, next_ids
from spsim.work import MemoryBound

Gradients = Literal["set_to_none", "kept"]
GRADIENTS: tuple[Gradients, ...] = ("set_to_none", "kept")


def with_gradients(program: Program, sizes: Mapping[str, int]) -> Program:
    """The program of a split module with gradients as buffers: bytes by operator, written by the last of its kernels
    that sums gradients of weights.
    """
    steps = list(program.backward)
    _, buffer = next_ids(program)
    for operator, size in sizes.items():
        sums = [place for place, step in enumerate(steps) if _sums(step, operator)]
        if sums and size:
            written = Buffer(buffer, f"{operator} weight gradient", size, "gradients")
            steps[sums[-1]] = replace(steps[sums[-1]], writes=(*steps[sums[-1]].writes, written))
            buffer += 1
    return replace(program, backward_sections=(Section(tuple(steps)),))


def _sums(step: Instruction, operator: str) -> bool:
    return isinstance(step, Compute) and step.operator == operator and step.part in ("wgrad", "backward")


def added(program: Program) -> Program:
    """The program of which gradients are kept: each that is written is added to what is there."""
    steps = list(program.backward)
    made = {buffer.id: buffer for step in steps for buffer in step.writes if buffer.category == "gradients"}
    last = {
        number: place for place, step in enumerate(steps) for number in (*step.reads, *(b.id for b in step.writes))
    }  # fmt: skip
    after: dict[int, list[Buffer]] = {}
    for number, buffer in made.items():
        after.setdefault(last[number], []).append(buffer)
    instruction, _ = next_ids(program)
    found: list[Instruction] = []
    for place, step in enumerate(steps):
        found.append(_let_go(step))
        for buffer in after.get(place, ()):
            found.append(_addition(instruction, step, buffer))
            instruction += 1
    return replace(program, backward_sections=(Section(tuple(found)),))


def _let_go(step: Instruction) -> Instruction:
    writes = [replace(b, category="temporary") if b.category == "gradients" else b for b in step.writes]
    return replace(step, writes=tuple(writes))


def _addition(number: int, step: Instruction, buffer: Buffer) -> Compute:
    """Reads both gradients and writes one."""
    work = MemoryBound("elementwise", 3 * buffer.bytes, "add")
    return Compute(number, step.operator, "elementwise", "accumulate", (work,), (buffer.id,), ())


def gradient_sizes(steps: Sequence[Instruction]) -> tuple[int, ...]:
    """Bytes of each gradient that some steps make."""
    return tuple(buffer.bytes for step in steps for buffer in step.writes if buffer.category == "gradients")
