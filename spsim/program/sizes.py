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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, get_args

import numpy as np
import numpy.typing as npt

from spsim.inputs.workload import Precision, Workload
from spsim.lazy import lazy
from spsim.program.instructions import LAYER, Communication, Compute, Program
from spsim.units import KIB
from spsim.work import MemoryBound, Work

Vector = npt.NDArray[np.int64]

MONOMIALS = 6
ONE_THREAD = 2**17
"""Multiplications of a product of matrices that are not worth another thread."""
WORD = 16
"""Bytes of one coefficient, K = 128 bits; half of them stay empty, which tells a polynomial from what is none."""


def every_workload(unit: int, precision: Precision = "bf16", *, single: bool = False) -> Workload:
    """The workload to compile for a `Template`; `unit` divides every sequence length that the plan admits. Programs of
    a `single` sequence may be others than those of several.
    """
    x, b = 1 << 8 * WORD, 1 if single else 1 << 3 * 8 * WORD
    return Workload.model_construct(seq_len=unit * x, micro_batch=b, precision=precision)


@dataclass(frozen=True, slots=True)
class KernelGroup:
    """Kernels of a kind, which one formula serves as arrays."""

    kind: type[Work]
    constants: dict[str, Any]
    """What no workload changes. Where kernels differ, flags and names are a tuple, numbers an array."""
    numbers: tuple[str, ...]
    """The other fields,"""
    positions: npt.NDArray[np.intp]
    """and where they stand in the vector of a program: a row for each field, a column for each kernel."""
    slots: npt.NDArray[np.intp]
    """Where the duration of each kernel goes."""
    of_each: Sequence[Mapping[str, Any]]
    """The constants of each kernel."""

    def each(self, values: npt.NDArray[np.float64]) -> Iterator[Work]:
        """Kernel by kernel as a `Work` of numbers, for one workload."""
        for constants, own in zip(self.of_each, values.take(self.positions).T.tolist(), strict=True):
            yield self.kind(**constants, **dict(zip(self.numbers, own, strict=True)))

    def work(self, values: npt.NDArray[np.float64]) -> Work:
        """All kernels of the group as one `Work` of arrays; where `values` of many workloads have a column for each,
        its arrays have a row.
        """
        found: Any = values.take(self.positions, axis=0).swapaxes(1, -1)
        return self.kind(**self.constants, **dict(zip(self.numbers, found, strict=True)))


class Template:
    """Structure and coefficients of the blocks of a step under one plan: a layer, and what is around it."""

    def __init__(
        self,
        program: Program,
        unit: int,
        divisor: int = 1,
        *,
        others: Mapping[str, Program] | None = None,
        layers: Mapping[str, int] | None = None,
    ) -> None:
        """The program of a layer and those of `others` by the names of their blocks, compiled at
        `every_workload(unit * divisor)`, or programs whose sizes hold for all; where layers are of several types, how
        many `layers` run each of their blocks.

        Raises `ArithmeticError` where a size is no polynomial of the stated form.
        """
        self.program = program
        """The structure of a layer; read its sizes from `at`."""
        self.programs: Mapping[str, Program] = {LAYER: program, **(others or {})}
        self.layers: Mapping[str, int] = layers if layers and len(layers) > 1 else {LAYER: 1}
        self.unit = unit
        """Divides every sequence length."""
        self.divisor = divisor
        reader = _Reader()
        self.indices = {name: reader.index(own) for name, own in self.programs.items()}
        self.index = self.indices[LAYER]
        self.num_slots = reader.num_slots
        places = reader.places()
        self.compiled = _coefficients(reader.positions)
        """Of 1, x, x^2, b, xb and x^2b where x = s / (unit divisor)."""
        self.groups = tuple(reader.groups(places, self.compiled))
        self.coefficients = self.compiled if divisor == 1 else _undivided(self.compiled, divisor)
        """The same where x = s / unit, times the square of the divisor."""

    def at(self, workload: Workload) -> Numbers:
        """The sizes of the program for a workload."""
        x, b = workload.seq_len // self.unit, workload.micro_batch
        basis = _monomials(x, b)
        number = np.int64 if basis[-1] * self._total < 2**62 else object
        values = self.coefficients.astype(number, copy=False) @ np.array(basis, dtype=number)
        return Numbers(self, values if self.divisor == 1 else -(-values // self.divisor**2))

    def basis(self, seq_len: npt.NDArray[np.int64], micro_batch: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        """The monomials of many workloads whose tokens the divisor divides, a column for each: its product with the
        `compiled` coefficients is their sizes.
        """
        found = np.empty((MONOMIALS, len(seq_len)))
        x, b = (seq_len // (self.unit * self.divisor)).astype(np.float64), micro_batch.astype(np.float64)
        for row, monomial in zip(found, _monomials(x, b), strict=True):
            row[:] = monomial
        return found

    def pacing(self, step: Communication, index: Index) -> int:
        """Position of the bytes that the time of a communication follows: of an all-to-all those that a rank gives or
        gets, whichever are more.
        """
        message = index.messages[step.id]
        if step.collective != "all_to_all":
            return message
        got = index.buffers[step.writes[0].id]
        return max(message, got, key=lambda position: int(self.coefficients[position].sum()))

    @property
    def nbytes(self) -> int:
        """Memory that it takes, about."""
        slots = sum(len(index.slots) for index in self.indices.values())
        return KIB * slots + 256 * self.num_slots + self.coefficients.nbytes

    @lazy
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


Sort = tuple[type[Work], str | None]
"""The kind of kernels and, of products, their data type."""


class _Reader:
    """Every size and every kernel of some programs; equal sizes have one position."""

    def __init__(self) -> None:
        self.positions: dict[int, int] = {}
        self.num_slots = 1
        self.kernels: dict[Sort, list[tuple[Work, int]]] = defaultdict(list)
        self._slots: dict[Work, int] = {}

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

    def places(self) -> dict[Sort, dict[str, npt.NDArray[np.intp]]]:
        """Sort -> field -> where the numbers of its kernels stand."""
        return {
            sort: {name: self._places([getattr(work, name) for work, _ in own]) for name in _NUMBERS[sort[0]]}
            for sort, own in self.kernels.items()
        }

    def _position(self, size: int) -> int:
        return self.positions.setdefault(size, len(self.positions))

    def _places(self, sizes: Iterable[int]) -> npt.NDArray[np.intp]:
        return np.array([self._position(size) for size in sizes], dtype=np.intp)

    def _slot(self) -> int:
        self.num_slots += 1
        return self.num_slots - 1

    def _kernel(self, work: Work) -> int:
        """The slot of a kernel, one for those that are alike."""
        slot = self._slots.get(work)
        if slot is None:
            slot = self._slots[work] = self._slot()
            self.kernels[type(work), None if isinstance(work, MemoryBound) else work.dtype].append((work, slot))
        return slot

    def groups(
        self, placed: Mapping[Sort, Mapping[str, npt.NDArray[np.intp]]], coefficients: Vector
    ) -> Iterator[KernelGroup]:
        """The kernels of each sort, whose numbers stand at `placed` among sizes with `coefficients`."""
        varies = np.asarray(coefficients[:, 1:].any(axis=1))
        for (kind, dtype), own in self.kernels.items():
            kernels, slots = zip(*own, strict=True)
            places = placed[kind, dtype]
            numbers = tuple(name for name, where in places.items() if varies[where].any())
            positions = np.array([places[name] for name in numbers], dtype=np.intp).reshape(-1, len(kernels))
            constants: dict[str, Any] = {}
            of_each: list[dict[str, Any]] = [{} for _ in kernels]
            for name in (field.name for field in fields(kind) if field.name not in numbers):
                values = [getattr(work, name) for work in kernels]
                for known, value in zip(of_each, values, strict=True):
                    known[name] = value
                if len(set(values)) == 1:
                    constants[name] = values[0]
                else:
                    constants[name] = np.array(values, dtype=np.float64) if name in places else tuple(values)
            yield KernelGroup(kind, constants, numbers, positions, np.array(slots, dtype=np.intp), of_each)


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
