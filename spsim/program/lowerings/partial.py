"""Attention whose ranks have other keys: its partial results are exchanged and merged where they are needed.

The rules derive a sum over keys, and so the reduce-scatter of the result; but it is a sum weighted by the log-sum-exp
of each, so that each rank gets all partial results of its part, with that, and merges them in one kernel (Yang et al.
2024, arXiv:2411.01783, section 3.4; Helix, arXiv:2507.07120, section 2.1).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from spsim.program.instructions import Buffer, Communication, Compute, Instruction, Program, Section, next_ids
from spsim.program.placement import sent_bytes
from spsim.work import MemoryBound


def merge_partial_results(program: Program) -> Program:
    """Each reduce-scatter of the result of an attention as an exchange and a merge."""
    steps = [step for section in program.forward_sections for step in section.instructions]
    results = {step.writes[0].id: step for step in steps if isinstance(step, Compute) and step.kind == "attention"}
    merging = _Merging(results, *next_ids(program))
    sections = (replace(own, instructions=tuple(merging.written(own))) for own in program.forward_sections)
    return replace(program, forward_sections=tuple(sections))


class _Merging:
    def __init__(self, results: dict[int, Compute], num_instructions: int, num_buffers: int) -> None:
        self.results = results
        self.num_instructions = num_instructions
        self.num_buffers = num_buffers

    def written(self, section: Section) -> Iterator[Instruction]:
        for step in section.instructions:
            made = self._summed(step)
            if made is not None and isinstance(step, Communication):
                yield from self._merged(step, made)
            else:
                yield step

    def _summed(self, step: Instruction) -> Compute | None:
        """The attention whose partial results a step sums, if it does."""
        sums = isinstance(step, Communication) and step.collective in ("reduce_scatter", "all_reduce")
        return self.results.get(step.reads[0]) if sums else None

    def _merged(self, step: Communication, made: Compute) -> Iterator[Instruction]:
        context, statistics = made.writes
        size = context.bytes + statistics.bytes
        arrived = Buffer(self.num_buffers, context.tensor, size, "communication buffers")
        (merged,) = step.writes
        yield replace(
            step, id=step.id, collective="all_to_all", message_bytes=size,
            sent_bytes=sent_bytes("all_to_all", size, step.ranks), reads=(context.id, statistics.id), writes=(arrived,),
        )  # fmt: skip
        work = (MemoryBound("elementwise", size + merged.bytes),)
        yield Compute(
            self.num_instructions, made.operator, "elementwise", step.part, work, (arrived.id,), (merged,)
        )  # fmt: skip
        self.num_buffers += 1
        self.num_instructions += 1
