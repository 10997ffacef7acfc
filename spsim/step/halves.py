"""A backward pass in two: what leads to the gradient of the input, and what works out gradients of weights."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Generic, NamedTuple, TypeVar

from spsim.program.instructions import Compute, Instruction, Section

T = TypeVar("T")


class Halves(NamedTuple, Generic[T]):
    """Something of each half."""

    inputs: T
    weights: T


def halved(sections: Sequence[Section]) -> Halves[tuple[Section, ...]]:
    """The sections of both halves, empty ones left out.

    Gradients of weights are products of their own (`wgrad`); what only they read, such as an input that is gathered
    again, moves with them, and what reads theirs. Gradients of norms' weights come out of the kernel that works out
    that of their input (torch runs it twice). What is recomputed runs again in the first half.
    """
    second = _weights([step for section in sections for step in section.instructions])
    assert all(section.count == 1 or not second & {*_ids(section)} for section in sections), "no loop has weights"
    return Halves(tuple(_picked(sections, second, False)), tuple(_picked(sections, second, True)))


def _weights(steps: Sequence[Instruction]) -> set[int]:
    """Which instructions are of the second half."""
    found: set[int] = set()
    written: set[int] = set()
    for step in steps:
        if (isinstance(step, Compute) and step.part == "wgrad") or written.intersection(step.reads):
            found.add(step.id)
            written |= {buffer.id for buffer in step.writes}
    readers: dict[int, list[int]] = defaultdict(list)
    for step in reversed(steps):
        own = [reader for buffer in step.writes for reader in readers[buffer.id]]
        if own and step.part != "recompute" and found.issuperset(own):
            found.add(step.id)
        for buffer in step.reads:
            readers[buffer].append(step.id)
    return found


def _ids(section: Section) -> Iterator[int]:
    return (step.id for step in section.instructions)


def _picked(sections: Sequence[Section], second: set[int], wanted: bool) -> Iterator[Section]:
    for section in sections:
        own = tuple([step for step in section.instructions if (step.id in second) is wanted])
        if own:
            yield replace(section, instructions=own)
