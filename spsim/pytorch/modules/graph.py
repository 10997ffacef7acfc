"""The forward pass of a module as operators on tensors whose dimensions are `Dim`s, before these have names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from spsim.program.operators import TensorKind
from spsim.pytorch.modules.dimensions import Dim, Dims
from spsim.work import KernelClass, KernelName


@dataclass(eq=False)
class Base:
    """A tensor that an operator writes, or that comes from outside; views of it are no tensors of their own."""

    name: str
    dims: Dims
    """In order of memory."""
    itemsize: int
    kind: TensorKind = "activation"
    pieces: list[Piece] = field(default_factory=list)
    """Parts that views select."""


@dataclass(eq=False)
class Piece:
    """A part of a tensor along one of its dimensions: the tensor without it, or with a shorter one."""

    whole: Base
    along: Dim
    remains: Dims
    start: int
    base: Base


@dataclass(frozen=True)
class View:
    """A tensor as a view of its base."""

    base: Base
    dims: tuple[Dims, ...]


@dataclass(eq=False)
class Use:
    """A tensor as one operator reads or writes it, some of its dimensions taken for others."""

    base: Base
    renamed: Mapping[Dim, Dim] = field(default_factory=dict)


@dataclass(eq=False)
class Node:
    """One operator."""

    name: str
    kind: KernelClass
    inputs: list[Use]
    outputs: list[Use]
    mixes: list[Dim] = field(default_factory=list)
    saves: list[Base] = field(default_factory=list)
    owns: list[Base] = field(default_factory=list)
    passthrough: list[Base] = field(default_factory=list)
    contracts: Dims = ()
    """Of a linear: its input features."""
    produces: Dims = ()
    """Of a linear: its output features."""
    kernel: KernelName | None = None
    """What it computes, if a profile may know its rates."""


@dataclass
class Graph:
    """A module in forward order, with what attention says of its dimensions."""

    entry: View
    exit: View
    nodes: list[Node]
    sequences: list[Dim]
    """Positions that attention mixes."""
    heads: list[Dims]
    head_sizes: list[Dims]
    selected: list[Dim]
    """Dimensions that views select from."""
    causal: bool

    def linears(self) -> Iterator[Node]:
        """Products with a weight."""
        return (node for node in self.nodes if node.produces or node.contracts)
