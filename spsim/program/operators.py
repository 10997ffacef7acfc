"""Operators with named dimensions: what an operator reads, writes, mixes and keeps for its backward pass.

Subscripts are written as in einsum. A dimension on the left and not on the right is contracted: the
operator is linear along it and may be split there, which leaves a partial sum. A dimension that the
operator *mixes* is never split.

A dimension may be a product of others: `s*b*k/e` are the tokens of one of e experts, of which each of s*b tokens has
k. It is cut where one of its factors is.

A tensor read at `s-k` is read k positions before s, for every k from 0: `s-k b h, k h -> s b h` is a causal
convolution over a window of k positions.

Dimensions: s query positions, j key positions, b micro-batch, h hidden, a heads, d head size, f MLP
width, g gate and up projection, e experts, k experts of a token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Literal, NamedTuple

from spsim.errors import InputError
from spsim.lazy import lazy
from spsim.program.launches import Launches
from spsim.program.mesh import Axis, Mesh
from spsim.program.placement import PARTIAL, REPLICATE, Extent, Layout, Placement, factors, shard
from spsim.program.recipes import Cast, Recipe
from spsim.program.strategies import Rules, SplitRule
from spsim.work import MAIN_GRADIENT_BYTES, AttentionKernel, Decoding, Framework, KernelClass, KernelName

TensorKind = Literal[
    "activation", "token ids", "weight", "constant", "mask", "norm statistics", "log-sum-exp", "statistics", "loss",
    "probabilities", "intermediate", "cache",
]  # fmt: skip
"""`statistics` are handed to other operators as activations are, but have no gradient: what a loss knows of all logits
of a token. A `loss` is handed to nobody: where it is made, the backward pass begins. `probabilities` are kept by it.
An `intermediate` is what an operator of several kernels keeps of those within it; it counts as an activation.
A `cache` holds the keys or values of all tokens so far, for the whole step and beyond.
"""

Grouping = Literal["launched", "kernel", "epilogue"]
HANDED_OVER: tuple[TensorKind, ...] = ("activation", "token ids", "statistics", "cache")
"""Kinds of inputs that come from other operators or from outside."""
Subscripts = tuple[tuple[str, ...], ...]
LAGGED = "s-"
"""Begins the subscript of positions up to a lag behind the own one; the rest names the dimension of the lag."""


class Tensor(NamedTuple):
    """A tensor of the unsplit layer: global sizes. A tuple, as operands are, for compilation makes many."""

    name: str
    dims: tuple[str, ...]
    sizes: tuple[Extent, ...]
    itemsize: Extent
    """A fraction where values share scales."""
    kind: TensorKind = "activation"
    gradient_itemsize: Extent | None = None
    """Of its gradient, where that is of another type."""
    summed_itemsize: Extent | None = None
    """In which partial sums of it are reduced, and its gradient is gathered again, where that is another type."""

    @property
    def gradient(self) -> Tensor:
        """Its gradient: of a weight in fp32, in which it is summed over ranks and micro-batches."""
        if self.kind == "weight":
            return self._replace(itemsize=MAIN_GRADIENT_BYTES)
        return self if self.gradient_itemsize is None else self._replace(itemsize=self.gradient_itemsize)


class Operand(NamedTuple):
    """A tensor as one operator reads or writes it: K is a tensor `s b a d` that attention reads as `j b a d`."""

    tensor: Tensor
    subscript: tuple[str, ...]


@dataclass(frozen=True)
class Operator:
    """One operator of the layer, written once for all plans."""

    name: str
    kind: KernelClass
    inputs: tuple[Operand, ...]
    outputs: tuple[Operand, ...]
    mixes: frozenset[str] = frozenset()
    saves: tuple[str, ...] = ()
    """Names of the inputs and outputs that the backward pass reads."""
    owns_gather: frozenset[str] = frozenset()
    """Inputs that are kept as they were before their all-gather, and gathered again in backward."""
    passthrough: frozenset[str] = frozenset()
    """Inputs whose gradient is the gradient of the output, the same storage; with several outputs that of the first
    input."""
    kernel: KernelName | None = None
    """What a memory-bound operator computes, if a profile may know its rates."""
    attention_kernel: AttentionKernel | Framework | Decoding = "transformer_engine"
    """Which fused kernel computes core attention."""
    window: int | None = None
    """Keys that a query of core attention looks back at, itself included; all unless given."""
    documents: tuple[int, ...] | None = None
    """Of the sequence, within each of which core attention stays."""
    served_experts: Fraction | None = None
    """Share of experts that get a token at all, where there are few; all unless given."""
    launches: Launches | None = None
    """Its kernels, where torch runs it as several."""
    rules: str = ""
    """Name of the rules that it is split by, where those are not the ones of the block: experts."""
    group: Grouping | None = None
    """How what it does for each of the experts of a rank is launched: one by one, in one kernel, or in that of a
    product; None where it is one anyway."""
    in_place: bool = False
    """Its first output is written over its first input, and the gradient of that over what is kept of the output."""
    recipe: Recipe | None = None
    """How the operands of a product are cast, if they are."""
    cast: Cast | None = None
    """What an operator of the kind `cast` casts."""
    originals: tuple[Operand, ...] = ()
    """What a product was given before it was cast, where that is kept for the backward pass, and cast again."""

    def __post_init__(self) -> None:
        """`InputError` for what is no sum of products: where tokens are dealt out to experts, positions are missing on
        the right, but nothing is summed over them.
        """
        if not self.contracted:
            return
        read = _with_factors({dim.partition("-")[0] for operand in self.inputs for dim in operand.subscript})
        for operand in self.outputs:
            if made := [dim for dim in operand.subscript if dim not in read and read.isdisjoint(factors(dim))]:
                raise InputError(
                    f"operator {self.name} ({self.subscripts}): {operand.tensor.name} has dimensions of no input "
                    f"({' '.join(made)}), so that {' '.join(sorted(self.contracted))} cannot be summed over; mix them"
                )

    @lazy
    def extents(self) -> dict[str, Extent]:
        """Global size of each dimension; K and V may have fewer heads than the operator."""
        sizes: dict[str, Extent] = {}
        for operand in self.inputs + self.outputs:
            for dim, size in zip(operand.subscript, operand.tensor.sizes, strict=True):
                if size > sizes.get(dim, 0):
                    sizes[dim] = size
        for dim in [dim for dim in sizes if dim.startswith(LAGGED)]:
            sizes["s"] = max(sizes.pop(dim), sizes.get("s", 0))
        return sizes

    @property
    def mixes_positions(self) -> bool:
        """Core attention: the key positions are among its dimensions."""
        return "j" in self.extents

    @lazy
    def contracted(self) -> frozenset[str]:
        """Dimensions on the left and not on the right, along which the operator is linear."""
        sides = (tuple([operand.subscript for operand in side]) for side in (self.inputs, self.outputs))
        return _contracted(*sides, self.mixes)

    @lazy
    def activations(self) -> tuple[Operand, ...]:
        """Inputs that are activations."""
        return tuple(operand for operand in self.inputs if operand.tensor.kind == "activation")

    @lazy
    def handed_over(self) -> tuple[Operand, ...]:
        """Inputs that other operators or blocks make: activations, and token ids and statistics, which have no
        gradient.
        """
        return tuple(operand for operand in self.inputs if operand.tensor.kind in HANDED_OVER)

    @lazy
    def weights(self) -> tuple[Operand, ...]:
        """Inputs that are weights."""
        return tuple(operand for operand in self.inputs if operand.tensor.kind == "weight")

    @lazy
    def results(self) -> tuple[Operand, ...]:
        """Outputs that other operators read, without masks and statistics."""
        return tuple(operand for operand in self.outputs if operand.tensor.kind == "activation")

    @lazy
    def has_backward(self) -> bool:
        """Whether it has a gradient to pass on: not if all it makes are statistics."""
        return bool(self.results) or any(operand.tensor.kind == "loss" for operand in self.outputs)

    @property
    def subscripts(self) -> str:
        """The einsum form, for people: operands of equal dimensions are named once."""
        made = [operand for operand in self.outputs if operand.tensor.kind in ("activation", "cache")]
        sides = (dict.fromkeys(" ".join(o.subscript) for o in side) for side in (self.inputs, made))
        return " -> ".join(", ".join(side) for side in sides)

    def split(self, rule: SplitRule) -> str | None:
        """The dimension along which a rule splits this operator: the first that it has and does not mix."""
        for dim in rule.position_mixing if self.mixes_positions else rule.token_wise:
            if dim in self.along:
                return dim
        return None

    @lazy
    def along(self) -> Mapping[str, list[str]]:
        """Dimension that it may be split along -> its dimensions that are cut then: that one, and products of it."""
        return _along(tuple(self.extents), self.mixes)


@lru_cache(maxsize=1024)
def _contracted(inputs: Subscripts, outputs: Subscripts, mixes: frozenset[str]) -> frozenset[str]:
    left = {dim for subscript in inputs for dim in subscript if not dim.startswith(LAGGED)}
    right = _with_factors({dim for subscript in outputs for dim in subscript})
    return frozenset([dim for dim in left - right - mixes if right.isdisjoint(factors(dim))])


@lru_cache(maxsize=1024)
def _along(dims: tuple[str, ...], mixes: frozenset[str]) -> Mapping[str, list[str]]:
    found = {dim: [dim] for dim in dims}
    for dim in dims:
        for own in factors(dim) if "*" in dim else ():
            found.setdefault(own, []).append(dim)
    return {own: cut for own, cut in found.items() if mixes.isdisjoint(cut)}


def _with_factors(dims: set[str]) -> set[str]:
    return dims.union(*[factors(dim) for dim in dims if "*" in dim])


Splits = tuple[tuple[Axis, str | None], ...]
"""(axis, dimension or None) for each axis of the mesh, outer to inner."""


@lru_cache(maxsize=4096)
def layouts(dims: tuple[str, ...], subscript: tuple[str, ...], splits: Splits) -> tuple[Layout, Layout]:
    """How an operand arrives and how it leaves: sharded where it has the split dimension.

    Where it has not, an input, or the gradient of an output, must arrive whole. An output leaves as a partial sum, for
    the dimension is contracted; and so does the gradient of an input or weight, which was whole.
    """

    def placement(split: str | None, otherwise: Placement) -> Placement:
        if split is None:
            return REPLICATE
        cut = (dim for dim, read in zip(dims, subscript, strict=True) if split in factors(read))
        return next(map(shard, cut), otherwise)

    arrives, leaves = (
        tuple((axis, placement(split, otherwise)) for axis, split in splits) for otherwise in (REPLICATE, PARTIAL)
    )
    return arrives, leaves


def operator_splits(operator: Operator, rules: Rules, mesh: Mesh) -> Splits:
    """The dimension an operator is split along on each axis of the mesh."""
    return tuple([(axis, operator.split(rules[axis])) for axis in mesh.axes])


@lru_cache(maxsize=1024)
def parse(signature: str) -> tuple[Subscripts, Subscripts]:
    """Input and output subscripts of `"s b h, h -> s b h"`."""
    left, right = (tuple(tuple(part.split()) for part in side.split(",")) for side in signature.split("->"))
    return left, right
