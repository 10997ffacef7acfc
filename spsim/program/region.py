"""A block on a mesh: where its tensors are made, how they lie, and what moves them."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal

from spsim.lazy import lazy
from spsim.program.casts import casting_weights
from spsim.program.instructions import Weights, WeightSync
from spsim.program.kernel_kinds import kernels_of
from spsim.program.kernels import Product, gradient_name
from spsim.program.mesh import EXPERT_AXES, Axis, Mesh
from spsim.program.operators import Operand, Operator, Tensor, operator_splits
from spsim.program.placed import PlacedOperand, PlacedOperator
from spsim.program.placement import (
    Collective,
    Extent,
    Layout,
    Redistribution,
    local_bytes,
    message_bytes,
    part,
    redistribute,
    sent_bytes,
)
from spsim.program.recipes import Recipe
from spsim.program.routing import Dispatch, Routed
from spsim.program.strategies import Rules
from spsim.program.weights import weight_syncs, weight_tensors
from spsim.work import MemoryBound

SUMMING: tuple[Collective, ...] = ("all_reduce", "reduce_scatter", "all_gather")
"""Collectives that sum, and those of their gradients."""


@dataclass(slots=True, unsafe_hash=True)
class Move:
    """One step of a tensor from one layout to the next, along one axis."""

    axis: Axis
    collective: Collective | None
    """None: a local slice, free."""
    source: Layout
    target: Layout
    ranks: int
    message_bytes: int
    sent_bytes: int
    """By one rank."""
    bytes: int
    """Of the result on one rank."""
    sorts: Literal["before", "after"] | None = None
    """On which side a rank puts tokens of experts in order: those of its own experts come from each rank apart, and all
    that it hands over have been in their order (`sort_chunks_by_idxs` of Megatron-Core).
    """
    cast_bytes: int = 0
    """Of what a rank gives in the type in which sums are made; 0 where that is the tensor's own."""
    dispatch: Dispatch | None = None
    """Of tokens to experts by a library with kernels of its own."""

    @property
    def to_experts(self) -> bool:
        """An exchange behind which each rank has what its experts read."""
        return any(placement.dim == "e" for _, placement in self.target)


class Region:
    """The operators of a block on one mesh, each under the rules of its kind, and their tensors as they lie and move.

    Nothing here depends on what is recomputed, kept or overlapped, so that plans of the same degrees share it.
    """

    def __init__(
        self,
        operators: Sequence[Operator],
        rules: Rules,
        mesh: Mesh,
        named: Mapping[str, Rules] = MappingProxyType({}),
        elsewhere: Set[str] = frozenset(),
        routed: Routed | None = None,
        joined: Collection[Axis] = (),
    ) -> None:
        """`rules` are those of the block, `named` those of operators that name theirs. Weights that another block of
        the same rank has are `elsewhere`: counted and synchronised there. Tokens are `routed` to experts by a library
        with kernels of its own. Sums and gathers along all axes that are `joined` are one among all their ranks,
        `model`.
        """
        self.routed = routed
        self.mesh = mesh
        self._elsewhere = elsewhere
        self._joined = joined
        own = [named.get(op.rules, rules) for op in operators]
        self.operators = tuple([_placed(op, by, mesh) for op, by in zip(operators, own, strict=True)])
        # What blocks hand to each other comes first.
        self.entries = tuple(sorted(_from_outside(operators), key=lambda entry: entry.kind == "token ids"))
        self.exits = tuple(_to_outside(operators))
        # What comes from outside is placed as any output of an operator that does not mix positions.
        sources = (Operator(entry.name, "elementwise", (), (Operand(entry, entry.dims),)) for entry in self.entries)
        outside = [_placed(source, rules, mesh) for source in sources]
        every = (*outside, *self.operators)
        self.produced = {output.name: output for op in every for output in op.outputs}
        """Tensor -> as its producer leaves it."""
        # Every rank loads the token ids that their first reader needs.
        read = (operand for op in self.operators[::-1] for operand in op.handed_over)
        self.produced |= {operand.name: operand for operand in read if operand.tensor.kind == "token ids"}
        self.producers = {output.name: op.name for op in every for output in op.outputs}
        self.resting = {weight.name: weight for op in self.operators[::-1] for weight in op.resting}
        """Weights that rest in another layout than they are used in, as they rest."""
        self.produced |= self.resting
        self.producers |= {weight.name: op.name for op in self.operators for weight in op.resting}
        gathered = frozenset(self._gathered())
        self.kernels = {op.name: kernels_of(op, gathered) for op in self.operators}
        self.last_summand = {o.name: op for op in self.operators[::-1] for o in op.differentiated}
        """Tensor -> the operator that reads it first, whose gradient of it is the last."""
        self._moves: dict[tuple[str, Layout, Layout, bool], tuple[Move, ...]] = {}
        self._bytes: dict[tuple[str, Extent, Layout], int] = {}

    def _gathered(self) -> Iterator[str]:
        """Cast tensors that a product reads whole and their producer leaves cut; the same of gradients. A norm that
        casts leaves rows only, which is all that can be gathered.
        """
        casts = {op.name for op in self.operators if op.operator.cast}
        for op in self.operators:
            for operand in op.activations if op.operator.recipe else ():
                moved = operand.layout != self.produced[operand.name].layout
                if moved or self.producers[operand.name] not in casts:
                    yield operand.name
            for operand in op.activations if op.operator.cast else ():
                if operand.gradient != self.produced[operand.name].gradient:
                    yield gradient_name(operand.name)

    def moves(self, tensor: Tensor, source: Layout, target: Layout, *, backward: bool = False) -> tuple[Move, ...]:
        """From one layout of a tensor to another."""
        if source == target:
            return ()
        key = (tensor.name, source, target, backward)
        if key not in self._moves:
            steps = self._of_model(self._of_experts(redistribute(source, target, backward=backward)))
            self._moves[key] = self._with_sorting(tensor, [self._move(tensor, step) for step in steps])
        return self._moves[key]

    def _with_sorting(self, tensor: Tensor, moves: list[Move]) -> tuple[Move, ...]:
        """Tokens of several experts of one rank, from where they lie by the rank that they come from."""
        dealt = any(dim.endswith("/e") for dim in tensor.dims) and self.routed is None
        if dealt and moves and part(tensor.sizes[tensor.dims.index("e")], self.mesh.size(self.mesh.of_experts)) > 1:
            if moves[0].collective == "all_gather" or (moves[-1].to_experts and moves[0].collective == "all_to_all"):
                moves[-1] = replace(moves[-1], sorts="after")
            else:
                moves[0] = replace(moves[0], sorts="before")
        return tuple(moves)

    def _of_experts(self, steps: Sequence[Redistribution]) -> Sequence[Redistribution]:
        """Of one kind along all axes over which experts are spread: one among all their ranks."""
        spread = self.mesh.of_experts
        for collective in ("all_to_all", "reduce_scatter", "all_gather") if len(spread) > 1 else ():
            own = [step for step in steps if step.collective == collective and step.axis in spread]
            if len(own) == len(spread):
                at = steps.index(own[0])
                joined = replace(own[0], axis="experts", target=own[-1].target)
                steps = [*steps[:at], joined, *steps[at + len(own) :]]
        return steps

    def _of_model(self, steps: Sequence[Redistribution]) -> Sequence[Redistribution]:
        """Equal collectives along all axes along which weights are cut are one among all their ranks."""
        axes, kinds = [step.axis for step in steps], {step.collective for step in steps}
        alike = len(kinds) == 1 and kinds <= {"all_reduce", "all_gather"}
        if not self._joined or {*axes} != {*self._joined} or not alike:
            return steps
        return [replace(steps[0], axis="model", target=steps[-1].target)]

    def _move(self, tensor: Tensor, step: Redistribution) -> Move:
        cast = 0
        if tensor.summed_itemsize not in (None, tensor.itemsize) and step.collective in SUMMING:
            tensor = tensor._replace(itemsize=tensor.summed_itemsize)
            cast = self.bytes_of(tensor, step.source)
        ranks, message = self.mesh.degree(step.axis), message_bytes(step, tensor, self.mesh)
        size, collective = self.bytes_of(tensor, step.target), step.collective
        if collective == "all_gather" and size == self.bytes_of(tensor, step.source):
            collective = None  # heads fewer than ranks, of which these have the same
        sent = sent_bytes(collective, message, ranks) if collective else 0
        move = Move(step.axis, collective, step.source, step.target, ranks, message, sent, size, None, cast)
        if not self.routed or step.collective != "all_to_all" or step.axis not in EXPERT_AXES:
            return move
        way: Literal["dispatch", "combine"] = "dispatch" if move.to_experts else "combine"
        return replace(move, dispatch=Dispatch(*self.routed, way))

    def bytes_of(self, tensor: Tensor, layout: Layout) -> int:
        """Bytes of a tensor on one rank."""
        key = (tensor.name, tensor.itemsize, layout)
        if key not in self._bytes:
            self._bytes[key] = local_bytes(tensor, layout, self.mesh)
        return self._bytes[key]

    @lazy
    def weights(self) -> dict[str, PlacedOperand]:
        """At rest, each once, however many operators use it."""
        found = {weight.name: weight for op in self.operators for weight in op.weights} | self.resting
        return {name: weight for name, weight in found.items() if name not in self._elsewhere}

    @lazy
    def weight_tensors(self) -> tuple[Weights, ...]:
        """The weights of a rank as frameworks hold them."""
        return tuple(weight_tensors(self.kernels.values(), self.weights))

    @lazy
    def weight_syncs(self) -> tuple[WeightSync, ...]:
        """Weights whose gradients are partial sums."""
        return tuple(weight_syncs(self.weights.values(), self.mesh))

    @lazy
    def parameters(self) -> int:
        """Of the block, on one rank."""
        return sum(weight.elements for weight in self.weights.values())

    @lazy
    def weight_bytes(self) -> int:
        """Of them, for the whole step: all copies of those that products read cast."""
        copies = {matrix.name: recipe.resident_bytes for recipe, matrix in self._cast_weights}
        return sum(math.ceil(copies.get(n, w.tensor.itemsize) * w.elements) for n, w in self.weights.items())

    @lazy
    def weight_casts(self) -> tuple[MemoryBound, ...]:
        """Kernels that make those copies, once a step."""
        return tuple(
            kernel for recipe, matrix in self._cast_weights for kernel in casting_weights(recipe, matrix.elements)
        )

    @property
    def cache_token_bytes(self) -> int:
        """Of what the block keeps of one token of one sequence, on one rank."""
        kept = (output for op in self.operators for output in op.outputs if output.tensor.kind == "cache")
        return sum(local_bytes(_of_one_token(own.tensor), own.layout, self.mesh) for own in kept)

    @property
    def _cast_weights(self) -> Iterator[tuple[Recipe, PlacedOperand]]:
        for op in self.operators:
            kernels = self.kernels[op.name]
            if op.operator.recipe and isinstance(kernels, Product):
                for matrix in kernels.matrices:
                    yield op.operator.recipe, matrix


def _of_one_token(tensor: Tensor) -> Tensor:
    """The part of a tensor that is of one token of one sequence."""
    sizes = zip(tensor.dims, tensor.sizes, strict=True)
    return tensor._replace(sizes=tuple([1 if dim in ("s", "j", "b") else size for dim, size in sizes]))


def _placed(operator: Operator, rules: Rules, mesh: Mesh) -> PlacedOperator:
    sharding = [axis for axis in mesh.axes if rules[axis].shards_weights]
    return PlacedOperator(operator, operator_splits(operator, rules, mesh), mesh, sharding)


def _from_outside(operators: Sequence[Operator]) -> Iterator[Tensor]:
    """Activations and token ids that no operator makes, in the order in which they are read."""
    seen = {output.tensor.name for op in operators for output in op.outputs}
    for operand in (operand for op in operators for operand in op.handed_over):
        if operand.tensor.name not in seen:
            seen.add(operand.tensor.name)
            yield operand.tensor


def _to_outside(operators: Sequence[Operator]) -> Iterator[Tensor]:
    """Activations that no operator reads."""
    read = {operand.tensor.name for op in operators for operand in op.inputs}
    return (o.tensor for op in operators for o in op.results if o.tensor.name not in read)
