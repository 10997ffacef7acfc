"""From a graph with named dimensions to the operators that `compiler.compile_region` takes, placed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from spsim.errors import InputError
from spsim.program.operators import Operand, Operator, Tensor
from spsim.pytorch.modules.dimensions import Dim, Dims, leaves
from spsim.pytorch.modules.graph import Base, Graph, Node, Piece, Use
from spsim.pytorch.modules.naming import SPLIT, Names

OUTPUT = "output"
"""The operator after the last, which takes the output of the module in the layout of its input."""


def operators_of(graph: Graph) -> tuple[Operator, ...]:
    """The operators of a graph in forward order.

    Raises `InputError` where two dimensions of an operator cannot be told apart.
    """
    end = Base("module output", graph.exit.base.dims, graph.exit.base.itemsize)
    last = Node(OUTPUT, "elementwise", [Use(graph.exit.base)], [Use(end)], passthrough=[graph.exit.base])
    needed = _needed([*graph.nodes, last], end)
    names = Names(graph)
    nodes = _with_row_biases_apart(needed, names)
    emission = _Emission(graph.entry.base, nodes, names)
    return tuple(emission.operator(node) for node in nodes)


def _needed(nodes: Sequence[Node], end: Base) -> list[Node]:
    """Nodes that the output depends on."""
    wanted: set[Base] = {end}
    found = []
    for node in reversed(nodes):
        if any(base in wanted for use in node.outputs for base in _with_pieces(use.base)):
            wanted |= {use.base for use in node.inputs}
            found.append(node)
    return found[::-1]


def _with_pieces(base: Base) -> Iterator[Base]:
    yield base
    for piece in base.pieces:
        yield from _with_pieces(piece.base)


def _with_row_biases_apart(nodes: Sequence[Node], names: Names) -> list[Node]:
    """A bias must not be added to every summand of a row-parallel product: the elementwise operator that alone
    reads the product adds it, as in Megatron, or one of its own.
    """
    found: list[Node] = []
    for node in nodes:
        found.append(node)
        if len(node.inputs) < 3 or not any(names[leaf] in SPLIT for leaf in leaves(node.contracts)):
            continue
        bias, out = node.inputs.pop(), node.outputs[0].base
        readers = [(other, use.base) for other in nodes for use in other.inputs if use.base in _with_pieces(out)]
        reader, base = readers[0]
        if len(readers) == 1 and base is out and reader.kind in ("elementwise", "dropout") and reader.name != OUTPUT:
            reader.inputs.append(bias)
        else:
            partial = Base(f"{out.name} without bias", out.dims, out.itemsize)
            node.outputs = [Use(partial)]
            adds = Node(f"{node.name} bias", "elementwise", [Use(partial), bias], [Use(out)], passthrough=[partial])
            found.append(adds)
    return found


class _Emission:
    """Tensors by their base; a tensor that is read in parts only is written as its parts."""

    def __init__(self, entry: Base, nodes: Sequence[Node], names: Names) -> None:
        self.names = names
        self.read = {use.base for node in nodes for use in node.inputs}
        self.whole = self.read | {entry}
        self.parents = {p.base: p for node in nodes for use in node.outputs for p in _all_pieces(use.base)}
        self.parents |= {piece.base: piece for piece in _all_pieces(entry)}
        self.tensors: dict[Base, Tensor] = {}
        self.taken: set[str] = set()

    def operator(self, node: Node) -> Operator:
        """One operator."""
        mixes = list(leaves(node.mixes))
        inputs, outputs = self._inputs(node, mixes), self._outputs(node, mixes)
        operator = Operator(
            node.name, node.kind, tuple(inputs), tuple(outputs), frozenset(self.names[leaf] for leaf in mixes),
            saves=self._names_of(node.saves),
            owns_gather=frozenset(self._names_of(node.owns)),
            passthrough=frozenset(self._names_of(base for base in node.passthrough if self._whole_of(base) is base)),
            kernel=node.kernel,
            attention_kernel="torch",
        )  # fmt: skip
        for operand in operator.inputs + operator.outputs:
            if len(set(operand.subscript)) < len(operand.subscript):
                raise InputError(
                    f"{node.name}: cannot be split over GPUs: two dimensions of a tensor would be split alike "
                    f"({' '.join(operand.subscript)}); simulate the module on one GPU"
                )
        return operator

    def _tensor(self, base: Base) -> Tensor:
        if base not in self.tensors:
            dims = leaves(base.dims)
            name, number = base.name, 1
            while name in self.taken:
                number += 1
                name = f"{base.name} {number}"
            self.taken.add(name)
            subscript = tuple(self.names[leaf] for leaf in dims)
            self.tensors[base] = Tensor(name, subscript, tuple(d.size for d in dims), base.itemsize, base.kind)
        return self.tensors[base]

    # Parts of tensors

    def _apart(self, base: Base) -> bool:
        """Whether nothing reads a tensor but parts of it."""
        return bool(base.pieces) and base not in self.whole

    def _written(self, base: Base) -> list[Base]:
        """What an operator writes for a tensor: the parts that are read, or all of it."""
        if not self._apart(base):
            return [base]
        return [own for piece in base.pieces for own in self._written(piece.base) if own in self.read]

    def _whole_of(self, base: Base) -> Base:
        """The tensor that a part is read from, where it is written as a whole."""
        piece = self.parents.get(base)
        if piece is None or self._apart(piece.whole):
            return base
        return self._whole_of(piece.whole)

    def _names_of(self, bases: Iterable[Base]) -> tuple[str, ...]:
        found = (own for base in bases for own in self._written(self._whole_of(base)))
        return tuple(dict.fromkeys(self._tensor(base).name for base in found))

    # Operands

    def _inputs(self, node: Node, mixes: list[Dim]) -> list[Operand]:
        written = {leaf for use in node.outputs for leaf in leaves(use.base.dims)}
        clashing = written.intersection(leaves(node.contracts))
        operands: list[Operand] = []
        for use in node.inputs:
            base = self._whole_of(use.base)
            mixes += _selected(self.parents, use.base, base)
            for tensor, subscript in self._read(node, base, use, clashing):
                operands.append(Operand(tensor, subscript))
        once = node.kind not in ("gemm", "attention")
        return list(dict.fromkeys(operands)) if once else operands

    def _read(self, node: Node, base: Base, use: Use, clashing: set[Dim]) -> Iterator[tuple[Tensor, tuple[str, ...]]]:
        """A tensor and its subscript; the weight of a linear in parts where its output is in unequal parts.

        Where input and output features of a linear are the same dimension, the contracted one gets another name.
        """
        renamed = {
            old: new
            for before, after in use.renamed.items()
            for old, new in zip(leaves((before,)), leaves((after,)), strict=True)
        }
        contracted = [dim in node.contracts or base.kind != "weight" for dim in base.dims for _ in leaves((dim,))]
        subscript = tuple(
            self.names[renamed.get(leaf, leaf)] + ("'" if leaf in clashing and inner else "")
            for leaf, inner in zip(leaves(base.dims), contracted, strict=True)
        )
        pieces = [p for own in node.outputs for p in own.base.pieces if p.remains and self._apart(own.base)]
        along = pieces[0].along.root if pieces and node.produces else None
        if base.kind != "weight" or along not in leaves(base.dims):
            yield self._tensor(base), subscript
            return
        for piece in pieces:
            yield self._part_of_weight(base, piece)

    def _part_of_weight(self, base: Base, piece: Piece) -> tuple[Tensor, tuple[str, ...]]:
        own = [
            d for leaf in leaves(base.dims) for d in (leaves(piece.remains) if leaf is piece.along.root else (leaf,))
        ]
        subscript, sizes = tuple(self.names[leaf] for leaf in own), tuple(leaf.size for leaf in own)
        return Tensor(f"{base.name} [{piece.start}:]", subscript, sizes, base.itemsize, "weight"), subscript

    def _outputs(self, node: Node, mixes: list[Dim]) -> list[Operand]:
        operands = []
        for use in node.outputs:
            for base in self._written(use.base):
                unequal = any(p.remains for p in use.base.pieces) and bool(node.produces)
                mixes += () if unequal else _selected(self.parents, base, use.base)
                tensor = self._tensor(base)
                operands.append(Operand(tensor, tensor.dims))
        return operands


def _all_pieces(base: Base) -> Iterator[Piece]:
    for piece in base.pieces:
        yield piece
        yield from _all_pieces(piece.base)


def _selected(parents: dict[Base, Piece], part: Base, whole: Base) -> Dims:
    """Dimensions along which a part was taken of the whole."""
    found: list[Dim] = []
    while part is not whole:
        piece = parents[part]
        found += leaves((piece.along,))
        part = piece.whole
    return tuple(found)
