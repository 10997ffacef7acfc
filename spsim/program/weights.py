"""The weights of a block whose gradients are partial sums."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from spsim.program.instructions import WeightSync
from spsim.program.mesh import Mesh
from spsim.program.placed import PlacedOperand
from spsim.program.placement import PARTIAL


def weight_syncs(weights: Iterable[PlacedOperand], mesh: Mesh) -> Iterator[WeightSync]:
    """Of weights at rest: those used whole by a split operator, and KV weights replicated over part of the tp axis."""
    for weight in weights:
        partial = [axis for axis, placement in weight.gradient if placement == PARTIAL]
        outer = tuple([axis for axis in partial if axis != "tp"])
        if outer:
            yield WeightSync(weight.name, outer, mesh.size(outer), weight.elements, weight.bytes)
        copies = mesh.degree("tp") if "tp" in partial else _copies(weight, mesh)
        if copies > 1:
            yield WeightSync(weight.name, ("tp",), copies, weight.elements, weight.bytes)


def _copies(weight: PlacedOperand, mesh: Mesh) -> int:
    """Ranks of the tp axis that hold the same heads, where there are fewer heads than ranks."""
    dim = dict(weight.gradient).get("tp", PARTIAL).dim
    if dim is None:
        return 1
    return max(1, mesh.degree("tp") // weight.tensor.sizes[weight.tensor.dims.index(dim)])
