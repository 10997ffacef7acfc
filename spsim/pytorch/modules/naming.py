"""Names for the dimensions of a graph, in the vocabulary of `operators`: s b h a d f j.

Attention names positions, heads and head size; the input names batch and hidden. The output features of a
linear are a width f, which tensor parallelism may split, unless its input features are split already: then it
is the row-parallel one of a pair, and its output is whole. What the module returns is whole too.
"""

from __future__ import annotations

from collections.abc import Iterable

from spsim.pytorch.modules.dimensions import Dim, Dims, leaves
from spsim.pytorch.modules.graph import Base, Graph

SPLIT = frozenset({"a", "f"})
"""Dimensions that tensor parallelism splits."""


class Names:
    """Dimension -> name; one that nothing names gets a name of its own when asked for."""

    def __init__(self, graph: Graph) -> None:
        self._names: dict[Dim, str] = {}
        self._numbers: dict[str, int] = {}
        self.graph = graph
        self._name_positions()
        self._name_attention()
        self._name_input()
        self._name_widths()

    def __getitem__(self, leaf: Dim) -> str:
        """The name of a dimension."""
        if leaf not in self._names:
            self._names[leaf] = self._numbered("x")
        return self._names[leaf]

    def _numbered(self, letter: str) -> str:
        self._numbers[letter] = self._numbers.get(letter, 0) + 1
        return f"{letter}{self._numbers[letter]}"

    def _name(self, dims: Iterable[Dim], first: str, others: str) -> None:
        """The outermost dimension that has no name yet gets the first, what is inside it numbered names."""
        free = [leaf for leaf in leaves(dims) if leaf not in self._names]
        for index, leaf in enumerate(free):
            self._names[leaf] = self._numbered(others) if index else first

    def _positions(self) -> Dims:
        """What attention mixes; without attention the second of three dimensions of the input, b s h."""
        found = dict.fromkeys(leaf for leaf in leaves(self.graph.sequences))
        if found:
            return tuple(found)
        axes = self.graph.entry.dims
        return axes[1 if len(axes) > 2 else 0] if len(axes) > 1 else ()

    def _name_positions(self) -> None:
        for leaf in leaves(self._positions()):
            taken = "s" in self._names.values()
            self._names[leaf] = self._numbered("s") if taken else "s"
            if leaf.key is not None:
                self._names[leaf.as_key] = self._numbered("j") if taken else "j"

    def _name_attention(self) -> None:
        batch = leaves(dim for dims in self.graph.entry.dims[:-1] for dim in dims)
        for dims in self.graph.heads:
            self._name((leaf for leaf in leaves(dims) if leaf not in batch), "a", "r")
        for dims in self.graph.head_sizes:
            self._name(dims, "d", "d")

    def _name_input(self) -> None:
        *leading, hidden = self.graph.entry.dims
        for leaf in leaves(self.graph.selected):
            self._names[leaf] = self._names.get(leaf) or self._numbered("g")
        self._name((dim for dims in leading for dim in dims), "b", "b")
        self._name(hidden, "h", "h")

    def _name_widths(self) -> None:
        returned = set(leaves(dim for dims in self.graph.exit.dims for dim in dims))
        for node in self.graph.linears():
            row = any(self[leaf] in SPLIT for leaf in leaves(node.contracts))
            for dims in _parts(node.outputs[0].base, node.produces):
                whole = row or bool(returned.intersection(leaves(dims)))
                self._name(dims, self._numbered("o") if whole else "f", "o")


def _parts(base: Base, dims: Dims) -> list[Dims]:
    """The output features, or those of each unequal part that is taken of them."""
    inside = leaves(dims)
    unequal = [piece.remains for piece in base.pieces if piece.remains and piece.along.root in inside]
    return unequal or [dims]
