"""What was recorded of a module: the calls of operators, forward and backward, without torch.

Tensors are known by the storage they live in, numbered in order of appearance, and by how they view it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

Pass = Literal["forward", "backward"]

ALLOCATIONS = frozenset({"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"})
"""Operators that reserve memory and launch nothing."""
VIEWS = frozenset({"_unsafe_view", "_reshape_alias", "lift_fresh"})
"""Operators that launch nothing although torch does not declare them views."""


@dataclass(frozen=True, slots=True)
class Value:
    """A tensor as a view of a storage."""

    storage: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    itemsize: int
    dtype: str

    @property
    def elements(self) -> int:
        """Distinct elements: an expanded dimension repeats them."""
        return math.prod(size for size, step in zip(self.shape, self.stride, strict=True) if step or size == 0)

    @property
    def bytes(self) -> int:
        """Bytes of the distinct elements."""
        return self.elements * self.itemsize


@dataclass(frozen=True, slots=True)
class Call:
    """One operator that ran; `arguments` by the names of its schema, tensors as `Value`."""

    op: str
    """The name without overload: `addmm`."""
    arguments: Mapping[str, Any]
    results: tuple[Value, ...]
    phase: Pass
    module: str
    node: int | None
    """Number of the autograd node that it belongs to."""
    flops: int
    """By the registry of `torch.utils.flop_counter`."""
    mutated: tuple[str, ...] = ()
    """Arguments that it writes."""
    view: bool = False
    pointwise: bool = False

    @property
    def name(self) -> str:
        """Module and operator, for people."""
        op = self.op.removeprefix("_scaled_dot_product_")
        return f"{self.module}.{op}" if self.module else op

    @property
    def tensors(self) -> tuple[Value, ...]:
        """Tensors among the arguments, lists of tensors included."""
        return tuple(values_in(self.arguments.values()))

    @property
    def written(self) -> tuple[Value, ...]:
        """Tensors that it writes in place."""
        return tuple(values_in(self.arguments[name] for name in self.mutated))

    @property
    def launches(self) -> bool:
        """Whether a kernel runs: views, reservations of memory and what writes tensors that hold nothing are free."""
        if self.view or self.op in VIEWS or self.op in ALLOCATIONS:
            return False
        made = (*self.results, *self.written)
        return not made or any(value.elements for value in made)


def values_in(items: Any) -> Iterator[Value]:
    """The tensors among some arguments, lists included."""
    for item in items:
        if isinstance(item, Value):
            yield item
        elif isinstance(item, list | tuple):
            yield from values_in(item)


@dataclass(frozen=True)
class Tape:
    """A module, recorded: forward, then backward from the gradients of its outputs."""

    name: str
    calls: Sequence[Call]
    saved: Mapping[int, Sequence[Value]]
    """Node -> the tensors that it keeps for its backward pass, parameters included."""
    storages: Sequence[int]
    """Bytes of each storage."""
    parameters: Mapping[int, str]
    """Storage -> name of the parameter or buffer that lives in it."""
    buffers: frozenset[int]
    """Storages of the buffers among them."""
    trainable: int
    """Number of elements of the parameters that have gradients."""
    parameter_bytes: int
    gradient_bytes: int
    """Of the gradients of the parameters."""
    main_dtype: str
    """Floating-point dtype of most parameters."""
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    output_gradients: tuple[Value, ...]
    input_gradients: tuple[Value | None, ...]
    parameter_gradients: frozenset[int]
    """Storages of the gradients of the parameters."""

    @property
    def forward(self) -> list[Call]:
        """Calls of the forward pass."""
        return [call for call in self.calls if call.phase == "forward"]

    @property
    def backward(self) -> list[Call]:
        """Calls of the backward pass."""
        return [call for call in self.calls if call.phase == "backward"]

    @property
    def dtype(self) -> str:
        """The dtype in which most FLOPs are done, which under autocast is not that of the parameters."""
        flops: Counter[str] = Counter()
        for call in self.calls:
            if call.flops:
                flops[call.results[0].dtype] += call.flops
        return flops.most_common(1)[0][0] if flops else self.main_dtype

    @cached_property
    def kept(self) -> Mapping[int, int]:
        """Storage -> node that keeps it first, for the backward pass; parameters excluded."""
        found: dict[int, int] = {}
        for node, values in self.saved.items():
            for value in values:
                if value.storage not in self.parameters:
                    found.setdefault(value.storage, node)
        return found

    @property
    def saved_bytes(self) -> int:
        """Bytes of the distinct storages kept for the backward pass."""
        return sum(self.storages[storage] for storage in self.kept)
