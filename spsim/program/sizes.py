"""The program of a block for every workload at once.

Under one plan the structure of a program does not depend on the sequence length s and the micro-batch b, and every
size in it (dimensions of kernels, bytes of buffers and messages) is a polynomial in x = s / unit and b, with the
monomials 1, x, x^2, b, xb, x^2b and coefficients that are natural numbers. So one compilation tells them all
(Kronecker substitution): at x = 2^K and b = 2^3K the coefficients stand beside each other in the bits of a size.
Where tokens are divided, among experts, x stands for s / (unit x divisor): coefficients are fractions then, and sizes
are rounded up to whole numbers.
A template holds the structure and the coefficients; evaluating it is one small matrix product.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, get_args

import numpy as np
import numpy.typing as npt

from spsim.inputs.workload import Precision, Workload
from spsim.program.instructions import Compute, Program
from spsim.units import KIB
from spsim.work import Gemm, Work

Vector = npt.NDArray[np.int64]

MONOMIALS = 6
ONE_THREAD = 2**17
"""Multiplications of a product of matrices that are not worth another thread."""
WORD = 16
"""Bytes of one coefficient, K = 128 bits; half of them stay empty, which tells a polynomial from what is none."""


def every_workload(unit: int, precision: Precision = "bf16") -> Workload:
    """The workload to compile for a `Template`; `unit` divides every sequence length that the plan admits."""
    x, b = 1 << 8 * WORD, 1 << 3 * 8 * WORD
    return Workload.model_construct(seq_len=unit * x, micro_batch=b, precision=precision)


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
        """All kernels of the group as one `Work` of arrays; where `values` of many workloads have a column for each,
        its arrays have a row.
        """
        numbers: dict[str, Any] = {name: values.take(where, axis=0).T for name, where in self.numbers.items()}
        return self.kind(**self.constants, **numbers)


LAYER = "layer"
"""The block that a model has most of, or a traced module."""


class Template:
    """Structure and coefficients of the blocks of a step under one plan: a layer, and what is around it."""

    def __init__(
        self, program: Program, unit: int, divisor: int = 1, *, others: Mapping[str, Program] | None = None
    ) -> None:
        """The program of a layer and those of `others` by the names of their blocks, compiled at
        `every_workload(unit * divisor)`, or programs whose sizes hold for all.

        Raises `ArithmeticError` where a size is no polynomial of the stated form.
        """
        self.program = program
        """The structure of a layer; read its sizes from `at`."""
        self.programs: Mapping[str, Program] = {LAYER: program, **(others or {})}
        self.unit = unit
        """Divides every sequence length."""
        self.divisor = divisor
        reader = _Reader()
        self.indices = {name: reader.index(own) for name, own in self.programs.items()}
        self.index = self.indices[LAYER]
        self.num_slots = reader.num_slots
        groups = reader.groups()
        compiled = _coefficients(reader.positions)
        self.groups = tuple(_with_constants(group, compiled) for group in groups)
        self.coefficients = compiled if divisor == 1 else _undivided(compiled, divisor)
        """Of 1, x, x^2, b, xb and x^2b where x = s / unit, times the square of the divisor."""

    def at(self, workload: Workload) -> Numbers:
        """The sizes of the program for a workload."""
        x, b = workload.seq_len // self.unit, workload.micro_batch
        basis = _monomials(x, b)
        number = np.int64 if basis[-1] * self._total < 2**62 else object
        values = self.coefficients.astype(number, copy=False) @ np.array(basis, dtype=number)
        return Numbers(self, values if self.divisor == 1 else -(-values // self.divisor**2))

    def basis(self, seq_len: npt.NDArray[np.int64], micro_batch: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        """The monomials of many workloads, a column for each: its product with the coefficients is their sizes."""
        found = np.empty((MONOMIALS, len(seq_len)))
        x, b = (seq_len // self.unit).astype(np.float64), micro_batch.astype(np.float64)
        for row, monomial in zip(found, _monomials(x, b), strict=True):
            row[:] = monomial
        return found

    @property
    def nbytes(self) -> int:
        """Memory that it takes, about."""
        slots = sum(len(index.slots) for index in self.indices.values())
        return KIB * slots + 256 * self.num_slots + self.coefficients.nbytes

    @cached_property
    def _total(self) -> float:
        """Of all coefficients, so that sums of numbers are exact, too."""
        return float(self.coefficients.astype(np.float64).sum())


def products(coefficients: npt.NDArray[np.float64], basis: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The sizes of many workloads, exact below 2^53; in parts for each of which one thread is enough, since threads
    would wait for each other longer than they compute.
    """
    step = max(1, ONE_THREAD // coefficients.size)
    if basis.shape[1] <= step:
        return coefficients @ basis
    return np.concatenate([coefficients @ basis[:, at : at + step] for at in range(0, basis.shape[1], step)], axis=1)


def _monomials(x: Any, b: Any) -> tuple[Any, ...]:
    """Of sequence in units and micro-batch."""
    return 1, x, x * x, b, x * b, x * x * b


class Numbers:
    """The sizes of the programs of a template, each different one once."""

    def __init__(self, template: Template, values: Vector) -> None:
        self.template = template
        self.values = values

    def at(self, positions: npt.NDArray[np.intp]) -> list[int]:
        """The numbers at some positions."""
        return self.values[positions].tolist()  # type: ignore[no-any-return]

    @property
    def saved(self) -> list[int]:
        """Bytes of each entry of `Program.saved`."""
        return self.at(self.template.index.saved)

    def weight_sync(self, block: str = LAYER) -> list[int]:
        """Elements of each entry of `Program.weight_sync` of a block."""
        return self.at(self.template.indices[block].weight_sync)

    def parameters(self, block: str = LAYER) -> int:
        """Parameters of one block on one rank."""
        return int(self.values[self.template.indices[block].parameters])


@dataclass(frozen=True, slots=True)
class Index:
    """Of one program: positions in the vector of numbers, slots in the vector of durations, whose slot 0 is no time."""

    buffers: dict[int, int]
    """Buffer -> position of its bytes."""
    messages: dict[int, int]
    """Communication -> position of its message."""
    slots: dict[int, tuple[int, ...]]
    """Instruction -> slots of its durations: one, or one per position on the ring."""
    saved: npt.NDArray[np.intp]
    weight_sync: npt.NDArray[np.intp]
    parameters: int


_NUMBERS = {kind: tuple(field.name for field in fields(kind) if field.type == "int") for kind in get_args(Work)}
"""The fields of kernels that are numbers; flags and names are structure."""


class _Reader:
    """Every size and every kernel of some programs; equal sizes have one position."""

    def __init__(self) -> None:
        self.positions: dict[int, int] = {}
        self.num_slots = 1
        self.kernels: dict[tuple[type[Work], str | None], list[tuple[Work, int]]] = defaultdict(list)
        """Of one kind; of products, of one data type."""
        self._slots: dict[int, int] = {}

    def index(self, program: Program) -> Index:
        """Where the sizes and durations of a program stand."""
        buffers = {b.id: self._position(b.bytes) for b in (*program.inputs, *program.output_gradients)}
        messages: dict[int, int] = {}
        slots: dict[int, tuple[int, ...]] = {}
        for step in (step for section in program.sections for step in section.instructions):
            if isinstance(step, Compute):
                slots[step.id] = tuple([self._kernel(work) if work else 0 for work in step.work])
            else:
                slots[step.id] = (self._slot(),)
                messages[step.id] = self._position(step.message_bytes)
            for buffer in step.writes:
                buffers[buffer.id] = self._position(buffer.bytes)
        return Index(
            buffers, messages, slots, self._places(saved.bytes for saved in program.saved),
            self._places(sync.elements for sync in program.weight_sync), self._position(program.parameters),
        )  # fmt: skip

    def groups(self) -> list[KernelGroup]:
        """All kernels by kind."""
        return [self._group(kind, *zip(*own, strict=True)) for (kind, _), own in self.kernels.items()]

    def _position(self, size: int) -> int:
        return self.positions.setdefault(size, len(self.positions))

    def _places(self, sizes: Iterable[int]) -> npt.NDArray[np.intp]:
        return np.array([self._position(size) for size in sizes], dtype=np.intp)

    def _slot(self) -> int:
        self.num_slots += 1
        return self.num_slots - 1

    def _kernel(self, work: Work) -> int:
        """The slot of a kernel, one for those that are the same object: at most positions of a ring it is."""
        if id(work) not in self._slots:
            self._slots[id(work)] = self._slot()
            dtype = work.dtype if isinstance(work, Gemm) else None
            self.kernels[type(work), dtype].append((work, self._slots[id(work)]))
        return self._slots[id(work)]

    def _group(self, kind: type[Work], kernels: tuple[Work, ...], slots: tuple[int, ...]) -> KernelGroup:
        """Kernels whose numbers all have positions, until it is known which are constants."""
        columns = {field.name: [getattr(work, field.name) for work in kernels] for field in fields(kind)}
        numbers = {name: self._places(columns.pop(name)) for name in _NUMBERS[kind]}
        constants = {name: values[0] if len(set(values)) == 1 else tuple(values) for name, values in columns.items()}
        return KernelGroup(kind, constants, numbers, np.array(slots, dtype=np.intp))


def _coefficients(sizes: Iterable[int]) -> Vector:
    """The coefficients of each size, of 1, x, x^2, b, xb and x^2b, read off its bits."""
    try:
        raw = b"".join([size.to_bytes(MONOMIALS * WORD, "little") for size in sizes])
    except OverflowError:
        raise ArithmeticError("a size is negative, or more than quadratic in s or linear in b") from None
    words = np.frombuffer(raw, dtype="<i8").reshape(-1, MONOMIALS, 2)
    if words[:, :, 1].any() or (words[:, :, 0] < 0).any():
        raise ArithmeticError("a size is no polynomial in s and b, or one of its coefficients has over 63 bits")
    return np.ascontiguousarray(words[:, :, 0], dtype=np.int64)


def _undivided(coefficients: Vector, divisor: int) -> Vector:
    """Those of powers of x / divisor as those of powers of x, times the square of the divisor."""
    if int(coefficients.max(initial=0)) * divisor**2 >= 2**63:
        raise ArithmeticError(f"a coefficient times the square of {divisor} has over 63 bits")
    scales: Vector = np.array(2 * (divisor**2, divisor, 1))
    return coefficients * scales


def _with_constants(group: KernelGroup, coefficients: Vector) -> KernelGroup:
    """What is equal in all kernels whatever the workload becomes a constant."""
    constants, numbers = dict(group.constants), {}
    for name, where in group.numbers.items():
        first = coefficients[where[0]]
        if first[1:].any() or (where != where[0]).any():
            numbers[name] = where
        else:
            constants[name] = int(first[0])
    return KernelGroup(group.kind, constants, numbers, group.slots)
