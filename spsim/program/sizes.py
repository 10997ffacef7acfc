"""The program of a layer for every workload at once.

Under one plan the structure of a program does not depend on the sequence length s and the micro-batch b, and
every size in it is a polynomial in them, at most quadratic in s and linear in b: dimensions of kernels, bytes
of buffers and messages. A template holds the structure and the coefficients, found by compiling six small
workloads; evaluating it is one small matrix product instead of a compilation.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from spsim.inputs.workload import Workload
from spsim.program.instructions import Compute, Program
from spsim.work import Work

Vector = npt.NDArray[np.int64]

SAMPLES = tuple((x, b) for x in (1, 2, 4) for b in (1, 2))
"""Workloads that a template is fitted to: sequence in units, micro-batch."""


@dataclass(frozen=True, slots=True)
class KernelGroup:
    """Kernels of a kind, which one formula serves as arrays."""

    kind: type[Work]
    constants: dict[str, Any]
    """What the kernels share for every workload, and their flags and names: a tuple where they differ."""
    numbers: dict[str, npt.NDArray[np.intp]]
    """Field -> where the numbers of each kernel stand in the vector of a program."""
    slots: npt.NDArray[np.intp]
    """Where the duration of each kernel goes."""

    def work(self, values: npt.NDArray[np.float64]) -> Work:
        """All kernels of the group as one `Work` of arrays."""
        numbers: dict[str, Any] = {name: values[where] for name, where in self.numbers.items()}
        return self.kind(**self.constants, **numbers)


class Template:
    """Structure and coefficients of one layer under one plan."""

    def __init__(self, compile_layer: Callable[[Workload], Program], unit: int) -> None:
        """`unit` divides every sequence length that the plan admits."""
        self.unit = unit
        programs = [compile_layer(Workload(seq_len=x * unit, micro_batch=b)) for x, b in SAMPLES]
        self.program = programs[0]
        """The structure; its sizes are those of the smallest sample."""
        self.coefficients = _fit(np.array([list(_numbers(program)) for program in programs], dtype=object))
        self.index, members = _index(self.program)
        self.groups = tuple(_group(found, self.coefficients) for found in members)

    def at(self, workload: Workload) -> Numbers:
        """The sizes of the program for a workload."""
        x, b = workload.seq_len // self.unit, workload.micro_batch
        basis = (1, x, x * x, b, x * b, x * x * b)
        number = np.int64 if basis[-1] * self._total < 2**62 else object
        return Numbers(self, self.coefficients.astype(number, copy=False) @ np.array(basis, dtype=number))

    @cached_property
    def _total(self) -> float:
        """Of all coefficients, so that sums of numbers are exact, too."""
        return float(np.abs(self.coefficients.astype(np.float64)).sum())


class Numbers:
    """The sizes of one program, in the order of `_numbers`."""

    def __init__(self, template: Template, values: Vector) -> None:
        self.template = template
        self.values = values

    def at(self, positions: npt.NDArray[np.intp] | slice) -> list[int]:
        """The numbers at some positions."""
        return self.values[positions].tolist()  # type: ignore[no-any-return]

    @property
    def saved(self) -> list[int]:
        """Bytes of each entry of `Program.saved`."""
        return self.at(self.template.index.saved)

    @property
    def weight_sync(self) -> list[int]:
        """Elements of each entry of `Program.weight_sync`."""
        return self.at(self.template.index.weight_sync)

    @property
    def parameters(self) -> int:
        """Parameters of one layer on one rank."""
        return int(self.values[-1])


@dataclass(frozen=True, slots=True)
class Index:
    """Positions in the vector of numbers, and slots in the vector of durations, whose slot 0 is no time."""

    buffers: dict[int, int]
    """Buffer -> position of its bytes."""
    messages: dict[int, int]
    """Communication step -> position of its message."""
    slots: dict[int, tuple[int, ...]]
    """Instruction -> slots of its durations: one, or one per position on the ring."""
    saved: slice
    weight_sync: slice
    num_slots: int


def _numbers(program: Program) -> Iterator[int]:
    """Every size of a program, in one order."""
    for step in program.instructions:
        if isinstance(step, Compute):
            yield from (value for work in step.work if work is not None for value in _sizes(work).values())
        else:
            yield step.message_bytes
        yield from (buffer.bytes for buffer in step.writes)
    yield from (buffer.bytes for buffer in (*program.inputs, *program.output_gradients))
    yield from (saved.bytes for saved in program.saved)
    yield from (sync.elements for sync in program.weight_sync)
    yield program.parameters


def _sizes(work: Work) -> dict[str, int]:
    """The fields of a kernel that are numbers; flags and names are structure."""
    values = {field.name: getattr(work, field.name) for field in fields(work)}
    return {name: value for name, value in values.items() if type(value) is int}


def _fit(samples: npt.NDArray[np.object_]) -> Vector:
    """Exact coefficients of 1, x, x^2, b, xb, x^2 b for each number, from its values at `SAMPLES`."""
    at = dict(zip(SAMPLES, samples, strict=True))
    columns = []
    for slope in (False, True):
        f1, f2, f4 = (at[x, 2] - at[x, 1] if slope else 2 * at[x, 1] - at[x, 2] for x in (1, 2, 4))
        quadratic = (f4 - 3 * f2 + 2 * f1) // 6
        linear = f2 - f1 - 3 * quadratic
        columns += [f1 - linear - quadratic, linear, quadratic]
    return np.stack(columns, axis=1).astype(np.int64)


def _index(program: Program) -> tuple[Index, list[list[Member]]]:
    """Where everything stands, and the kernels of a kind together; mirrors `_numbers`."""
    buffers: dict[int, int] = {}
    messages: dict[int, int] = {}
    slots: dict[int, tuple[int, ...]] = {}
    members: dict[type[Work], list[Member]] = defaultdict(list)
    position, slot = 0, 1
    for step in program.instructions:
        own: list[int] = []
        for work in step.work if isinstance(step, Compute) else ():
            own.append(0 if work is None else slot)
            if work is not None:
                members[type(work)].append((work, position, slot))
                position, slot = position + len(_sizes(work)), slot + 1
        if not isinstance(step, Compute):
            messages[step.id] = position
            own.append(slot)
            position, slot = position + 1, slot + 1
        slots[step.id] = tuple(own)
        for buffer in step.writes:
            buffers[buffer.id] = position
            position += 1
    outside = (*program.inputs, *program.output_gradients)
    buffers |= {buffer.id: position + place for place, buffer in enumerate(outside)}
    saved = slice(position + len(outside), position + len(outside) + len(program.saved))
    sync = slice(saved.stop, saved.stop + len(program.weight_sync))
    index = Index(buffers, messages, slots, saved, sync, slot)
    return index, list(members.values())


Member = tuple[Work, int, int]
"""A kernel, the position of its numbers, and the slot of its duration."""


def _group(members: list[Member], coefficients: Vector) -> KernelGroup:
    """What is equal in all kernels whatever the workload is a constant, all other numbers are positions."""
    kernels = [work for work, _, _ in members]
    starts = np.array([position for _, position, _ in members], dtype=np.intp)
    columns = {field.name: tuple(getattr(work, field.name) for work in kernels) for field in fields(kernels[0])}
    constants: dict[str, Any] = {
        name: values[0] if len(set(values)) == 1 else values for name, values in columns.items()
    }
    numbers = {}
    for offset, name in enumerate(_sizes(kernels[0])):
        rows = coefficients[starts + offset]
        if np.any(rows[:, 1:]) or np.any(rows[:, 0] != rows[0, 0]):
            numbers[name] = starts + offset
            del constants[name]
    slots = np.array([slot for _, _, slot in members], dtype=np.intp)
    return KernelGroup(type(kernels[0]), constants, numbers, slots)
