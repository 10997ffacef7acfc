"""From a placed operator to the kernels it launches: `Work` for forward and backward.

FLOPs and bytes follow from the subscripts and from the kind of the operator; nothing is listed per model or per
strategy. A formula refuses what it cannot read: `InputError` names the operator and the operand.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import replace
from typing import NamedTuple

from spsim.errors import InputError
from spsim.lazy import lazy
from spsim.program.casts import Reading, arriving, casting, casting_again
from spsim.program.mesh import Axis
from spsim.program.placed import PlacedOperand, PlacedOperator
from spsim.program.recipes import HALF, Cast, Recipe
from spsim.work import Gemm, MemoryBound, Work

POSITIONS = frozenset({"s", "j"})


class Kernels:
    """The kernels of one operator on one rank: here of one that takes the time of its memory traffic."""

    def __init__(self, placed: PlacedOperator, gathered: Set[str]) -> None:
        """`gathered` are the tensors, and those whose gradients, are gathered before they are read."""
        self.placed = placed
        self.operator = placed.operator
        self.gathered = gathered

    @lazy
    def bytes_moved(self) -> int:
        """Local bytes of all operands, each in the layout that the operator consumes or produces."""
        return bytes_of(self.placed.inputs + self.placed.outputs)

    @lazy
    def vectors(self) -> tuple[PlacedOperand, ...]:
        """Weights that are added or scaled by, not multiplied: biases and norm weights."""
        contracted = self.operator.contracted
        return tuple([w for w in self.placed.weights if contracted.isdisjoint(w.subscript)])

    @lazy
    def row(self) -> int:
        """Elements that a norm or a softmax reduces together; of others those of a vector of weights, or of a token."""
        if self.operator.kind in ("norm", "softmax"):
            return self._product(self.operator.mixes)
        if self.vectors:
            return max([vector.elements for vector in self.vectors])
        return self._product(dim for dim in self.placed.outputs[0].subscript if dim not in ("s", "b"))

    def forward(self, causal: bool, ring_cut: str) -> tuple[Work | None, ...]:
        """The forward kernel: one entry, or one per position on the ring where ranks differ."""
        return self._forward

    def backward(self, causal: bool, ring_cut: str) -> tuple[Work | None, ...]:
        """The backward kernel; empty where every gradient passes through."""
        return self._backward

    def leading(self, *, backward: bool) -> tuple[Work, ...]:
        """Kernels of a pass before the one that writes what is handed on, where they are several."""
        return ()

    accumulation: tuple[MemoryBound, ...] = ()
    """Kernels that add the gradient of a weight to its main gradient; of most the kernel that makes it adds it, too."""

    before: tuple[MemoryBound, ...] = ()
    """Kernels that only find a scale, before the one that writes."""
    agreed: tuple[Axis, ...] = ()
    """Axes whose ranks agree on that scale."""

    @lazy
    def _forward(self) -> tuple[Work, ...]:
        return (self._streaming(self.bytes_moved),)

    @lazy
    def _backward(self) -> tuple[Work, ...]:
        """It reads the gradient of the output and what was saved, and writes the gradients of the inputs.

        Biases cost one more reading of the gradient they sum; norms sum theirs on the way.
        """
        placed = self.placed
        written = [o for o in placed.activations if o.name not in self.operator.passthrough]
        summed = self.vectors if self.operator.kind != "norm" else ()
        if not written and not summed:
            return ()
        total = bytes_of(written or placed.results) if summed else 0
        if not written:
            return (MemoryBound("elementwise", total, "bias_gradient", row=self.row),)
        gradients = sum([operand.gradient_bytes for operand in (*placed.results, *written)])
        return (self._streaming(total + gradients + bytes_of(placed.saved), backward=True),)

    def _streaming(self, moved: int, *, backward: bool = False) -> MemoryBound:
        kind = self.operator.kind
        if kind == "gemm" or kind == "attention":
            raise AssertionError(f"{self.operator.name} takes the time of its FLOPs")
        return MemoryBound(kind, moved, self.operator.kernel, backward, self.row)

    def _product(self, dims: Iterable[str]) -> int:
        sizes = self.placed.sizes
        return math.ceil(math.prod([sizes[dim] for dim in dims]))

    @property
    def _dtype(self) -> str | None:
        """Of cast operands."""
        return None if self.operator.recipe is None else self.operator.recipe.dtype

    def _refuse(self, what: str) -> InputError:
        return InputError(f"operator {self.operator.name} ({self.operator.subscripts}): {what}")


class Lookup(Kernels):
    """Rows of a table, one for each token id: the rows are read, not the table. Of logits one of each token."""

    @lazy
    def _ids(self) -> tuple[PlacedOperand, ...]:
        return tuple([operand for operand in self.placed.inputs if operand.tensor.kind == "token ids"])

    @lazy
    def _rows(self) -> int:
        """Bytes of the rows."""
        tables = [operand for operand in self.placed.inputs if operand not in self._ids]
        if len(tables) != 1 or not self._ids:
            raise self._refuse("a lookup reads one table and token ids; give the ids the kind 'token ids'")
        (table,) = tables
        if len(self.operator.contracted.intersection(table.subscript)) != 1:
            raise self._refuse(f"{table.name} is not looked up along one dimension, its rows")
        return math.ceil(sum(output.elements for output in self.placed.outputs) * table.tensor.itemsize)

    @lazy
    def bytes_moved(self) -> int:
        """Ids, rows and the result."""
        return self._rows + bytes_of([*self._ids, *self.placed.outputs])

    @lazy
    def _backward(self) -> tuple[Work, ...]:
        """Autograd makes the gradient of the whole table: cleared, then the gradients of the results are added to its
        rows.
        """
        return (self._streaming(self.bytes_moved + self._rows + bytes_of(self.placed.weights), backward=True),)

    @lazy
    def accumulation(self) -> tuple[MemoryBound, ...]:
        """That gradient, added to the main gradient."""
        (table,) = self.placed.weights
        return (MemoryBound("elementwise", table.bytes + 2 * table.gradient_bytes),)


class Casting(Kernels):
    """A cast of the input of a product, or of the gradients of what it makes; the other pass does nothing."""

    @property
    def cast(self) -> Cast:
        """What it casts."""
        assert self.operator.cast is not None
        return self.operator.cast

    @lazy
    def _is_gathered(self) -> bool:
        if self.cast.of == "input":
            return self.placed.outputs[0].name in self.gathered
        return gradient_name(self.placed.inputs[0].name) in self.gathered

    @lazy
    def _casting(self) -> tuple[MemoryBound, ...]:
        elements = sum(operand.elements for operand in self.placed.inputs)
        kernels = casting(self.cast, elements, gathered=self._is_gathered)
        group = self._product("e") if self.operator.group == "launched" else 0
        return tuple([replace(kernel, launched=group) if group else kernel for kernel in kernels])

    @lazy
    def agreed(self) -> tuple[Axis, ...]:
        """Those of tensor parallelism, which gathers what they cast (`amax_reduction_group`)."""
        return ("tp",) if self._is_gathered and self.cast.recipe.tensor_scale else ()

    @lazy
    def before(self) -> tuple[MemoryBound, ...]:
        """The search for the largest value."""
        return self._casting[:-1]

    def _in(self, of: str) -> tuple[Work, ...]:
        return self._casting[-1:] if self.cast.of == of else ()

    @lazy
    def _forward(self) -> tuple[Work, ...]:
        return self._in("input")

    @lazy
    def _backward(self) -> tuple[Work, ...]:
        return self._in("gradient")


class Preparation(NamedTuple):
    """What must be done to an operand before a product reads it: kernels of which the last writes a copy, if it has
    bytes.
    """

    tensor: str
    kernels: tuple[MemoryBound, ...]
    bytes: int


class Product(Kernels):
    """A matrix product: of an activation and weights, or of two activations."""

    def prepared(self, product: Reading) -> tuple[Preparation, ...]:
        """What the operands of one of its products need: the input of the products along rows and of the weight
        gradient, the gradients of what it makes.
        """
        if self.operator.recipe is None:
            return ()
        return tuple(self._preparations(self.operator.recipe, product))

    def _preparations(self, recipe: Recipe, product: Reading) -> Iterator[Preparation]:
        copy = recipe.itemsize if product == "wgrad" and recipe.columns == "transposed" else 0
        for original in self.placed.originals if product == "wgrad" else ():
            size = math.ceil(original.elements * recipe.itemsize)
            yield Preparation(original.name, tuple(casting_again(recipe, original.elements)), size)
        read = self.placed.activations if product != "dgrad" else ()
        made = self.placed.results if product != "forward" else ()
        gathered = [o for o in read if o.name in self.gathered and not self.placed.originals]
        for operand in (*gathered, *(o for o in made if gradient_name(o.name) in self.gathered)):
            if kernels := tuple(arriving(recipe, operand.elements, product)):
                yield Preparation(operand.name, kernels, math.ceil(operand.elements * copy))

    @lazy
    def matrices(self) -> tuple[PlacedOperand, ...]:
        """Weights that are multiplied, not added."""
        return tuple([w for w in self.placed.weights if w not in self.vectors])

    @lazy
    def _forward(self) -> tuple[Work, ...]:
        return (self._gemm,)

    @lazy
    def _gemm(self) -> Gemm:
        return self._linear() if self.matrices else self._product_of_activations()

    def _linear(self) -> Gemm:
        """Dimensions that activation, weight and result share are a batch: one product for each expert."""
        if len(self.operator.activations) != 1:
            raise self._refuse("a product with weights takes one activation")
        contracted, given = self.operator.contracted, self.operator.activations[0].subscript
        shared = [dim for dim in given if dim not in contracted and dim in self.matrices[0].subscript]
        for matrix in self.matrices:
            if not contracted.issubset(matrix.subscript) or {*shared} != {*given} & {*matrix.subscript} - contracted:
                raise self._refuse(f"{matrix.name} is not multiplied along the dimensions of {self.matrices[0].name}")
        batch, k = self._product(shared), self._product(contracted)
        m = self._product(dim for dim in given if dim not in contracted and dim not in shared)
        n = sum([w.elements for w in self.matrices]) // (k * batch)
        launched, grouped = batch * (self.operator.group == "launched"), int(self.operator.group == "kernel")
        return Gemm(m, n, k, batch, self._traffic["forward"], dtype=self._dtype, launched=launched, grouped=grouped)

    @lazy
    def _traffic(self) -> Mapping[Reading, int]:
        """Bytes of operands and result of each of its products."""
        recipe = self.operator.recipe
        if recipe is None:
            return dict.fromkeys(("forward", "dgrad", "wgrad"), self.bytes_moved)
        given, made, weights = self.placed.activations, self.placed.results, self.matrices
        x, y, w = (math.ceil(recipe.itemsize * sum(o.elements for o in own)) for own in (given, made, weights))
        return {
            "forward": x + w + bytes_of([*self.vectors, *made]),
            "dgrad": y + w + sum(operand.gradient_bytes for operand in given),
            "wgrad": x + y + HALF * sum(weight.elements for weight in weights),
        }

    def _product_of_activations(self) -> Gemm:
        if len(self.operator.activations) != 2:
            raise self._refuse("a product without weights takes two activations")
        left, right = (set(operand.subscript) for operand in self.operator.activations)
        out = set(self.operator.results[0].subscript)
        for operand, one, other in zip(self.operator.activations, (left, right), (right, left), strict=True):
            if summed := one - other - out - self.operator.mixes:
                raise self._refuse(f"{operand.tensor.name} is summed over {' '.join(sorted(summed))}, not multiplied")
        return Gemm(
            m=self._product((left & out) - right),
            n=self._product((right & out) - left),
            k=self._product(self.operator.contracted),
            batch=self._product(left & right & out),
            bytes_moved=self.bytes_moved,
        )

    def piece(self, work: Gemm, pieces: int, *, backward: bool) -> Gemm:
        """Of its product, or of the data gradient, cut into pieces along the rows, on streams of their own: each reads
        all weights.
        """
        recipe = self.operator.recipe
        if recipe is None:
            fixed = bytes_of(self.placed.weights)
        else:
            fixed = math.ceil(recipe.itemsize * sum(w.elements for w in self.matrices))
            fixed += 0 if backward else bytes_of(self.vectors)
        moved = fixed + (work.bytes_moved - fixed) // pieces
        return replace(work, m=work.m // pieces, bytes_moved=moved, pieces=pieces)

    @lazy
    def data_gradients(self) -> tuple[tuple[PlacedOperand, Gemm], ...]:
        """One product for the gradient of each activation operand."""
        forward, moved = self._gemm, self._traffic["dgrad"]
        m, n, k, batch = forward.m, forward.n, forward.k, forward.batch
        if self.matrices:
            return ((self.placed.activations[0], replace(forward, n=k, k=n, bytes_moved=moved)),)
        left, right = self.placed.activations
        return (left, Gemm(m, k, n, batch, moved)), (right, Gemm(k, n, m, batch, moved))

    @lazy
    def weight_gradients(self) -> tuple[Work, ...]:
        """The product for the weights, accumulated into fp32 main gradients, and one sum for the biases."""
        if not self.matrices:
            return ()
        forward = self._gemm
        elements = forward.batch * forward.k * forward.n
        moved = self._traffic["wgrad"]
        product = replace(forward, m=forward.k, k=forward.m, bytes_moved=moved, accumulated=elements)
        if not self.vectors:
            return (product,)
        return product, MemoryBound("elementwise", bytes_of(self.placed.results), "bias_gradient", row=self.row)


def gradient_name(tensor: str) -> str:
    """Of the gradient of a tensor."""
    return f"{tensor} gradient"


def bytes_of(operands: Iterable[PlacedOperand]) -> int:
    """Local bytes of some operands."""
    return sum([operand.bytes for operand in operands])
