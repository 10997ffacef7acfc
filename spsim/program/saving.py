"""What a block keeps of its forward pass: each tensor once in each layout."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from spsim.program.instructions import Saved
from spsim.program.placed import PlacedOperand, PlacedOperator
from spsim.program.placement import Layout
from spsim.program.recompute import Recomputed
from spsim.program.region import Region


class Saving:
    """What the operators of a region save, less what is recomputed."""

    def __init__(self, region: Region, again: Sequence[Recomputed], *, keep_gathered: bool) -> None:
        self.region = region
        self.keep_gathered = keep_gathered
        self.recomputed = {name: own for own in again for name in own.operators}
        """Operator -> what it is recomputed with."""
        self.inside = {
            output.name: self.recomputed[op.name]
            for op in region.operators
            if op.name in self.recomputed
            for output in op.outputs
        }
        """Tensor -> what it is made again with."""
        self.saved = {op.name: tuple(self._saved_of(op)) for op in region.operators}
        """Operator -> what its backward pass reads, each in the layout that is kept of it."""

    def _saved_of(self, op: PlacedOperator) -> Iterator[tuple[PlacedOperand, Layout]]:
        """What an operator saves, in the layout that is kept: the one that it consumes or leaves, but before its
        trailing all-gathers where it owns the gather.
        """
        owned = op.operator.owns_gather
        if self.keep_gathered and not op.operator.mixes_positions:
            owned = frozenset()
        for operand in op.saved:
            layout = operand.layout
            if operand.name in owned:
                moves = self.region.moves(operand.tensor, self.region.produced[operand.name].layout, layout)
                for move in reversed(moves):
                    if move.collective != "all_gather":
                        break
                    layout = move.source
            yield operand, layout

    def kept(self, *, keep_weights: bool) -> Iterator[Saved]:
        """All that survives the forward pass, with `keep_weights` also what it gathers of weights."""
        seen = set()
        # What casts a gradient hands on what it is given.
        same = {
            op.outputs[0].name: op.inputs[0].name
            for op in self.region.operators
            if op.operator.cast and op.operator.cast.of == "gradient"
        }
        for op in self.region.operators:
            for operand, layout in self._kept_for(op):
                storage = same.get(operand.name, operand.name), layout
                if storage not in seen:
                    seen.add(storage)
                    size = self.region.bytes_of(operand.tensor, layout)
                    kind = operand.tensor.kind
                    category = "activation" if kind == "intermediate" else kind
                    yield Saved(operand.name, layout, size, category, op.name)
            for weight in op.gathered if keep_weights else ():
                yield Saved(weight.name, weight.layout, weight.bytes, "weight", op.name)

    def _kept_for(self, op: PlacedOperator) -> list[tuple[PlacedOperand, Layout]]:
        own = self.recomputed.get(op.name)
        if own is None:
            return [(operand, layout) for operand, layout in self.saved[op.name] if not self.discarded(operand)]
        outside = (o for o in op.handed_over if self.inside.get(o.name) is not own and not self.discarded(o))
        return [(o, self.region.produced[o.name].layout) for o in outside]

    def discarded(self, operand: PlacedOperand) -> bool:
        """Whether nobody keeps a tensor, for it is made again."""
        own = self.inside.get(operand.name)
        return own is not None and own.discards
