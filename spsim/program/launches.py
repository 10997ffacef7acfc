"""Kernels of an operator that torch runs as several: each by what it reads and writes.

The numbers are those of tensors as large as the operator's result, or of one number a row, so that no size of a model
and no plan stands in a table of them.
"""

from __future__ import annotations

from typing import NamedTuple

from spsim.work import KernelName, MemoryBoundClass


class Launch(NamedTuple):
    """One kernel."""

    narrow: int = 0
    """Tensors of the size of the result that it reads or writes, in the type of the operator's input;"""
    wide: int = 0
    """in fp32;"""
    inputs: int = 0
    """of the size of the operator's input, where that is another;"""
    masks: int = 0
    """of one byte an element."""
    rows: int = 0
    """fp32 numbers that it reads or writes of each row: of what the operator mixes, as norms do."""
    accesses: int = 0
    """Tensors whose elements it reads and writes one by one, for one of them is strided or broadcast; in all or none of
    them, as torch chooses (`MemoryBound.accesses`)."""
    kernel: KernelName | None = None
    gradient: bool = False
    """It is the gradient of the kernel of that name."""
    kind: MemoryBoundClass = "elementwise"


class Launches(NamedTuple):
    """The kernels of both passes, in order."""

    forward: tuple[Launch, ...]
    backward: tuple[Launch, ...]
    """Empty where every gradient passes through."""
