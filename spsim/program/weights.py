"""The weights of a block: as frameworks hold them, and those whose gradients are partial sums."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from spsim.program.instructions import Weights, WeightSync
from spsim.program.kernels import Kernels, Product
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


def weight_tensors(kernels: Iterable[Kernels], at_rest: Mapping[str, PlacedOperand]) -> Iterator[Weights]:
    """Of operators in order: of a product one tensor for its matrices and one for its vectors, as a fused linear has
    them; of others one each. A weight belongs to the operator that reads it first, and to no block but where it rests.
    """
    seen: set[str] = set()
    for own in kernels:
        weights = [weight for weight in own.placed.weights if weight.name in at_rest.keys() - seen]
        seen |= {weight.name for weight in weights}
        tensors = [[weight] for weight in weights]
        if isinstance(own, Product):
            tensors = [[w for w in weights if (w in own.vectors) == added] for added in (False, True)]
        for tensor in filter(None, tensors):
            resting = [at_rest[weight.name] for weight in tensor]
            elements, size = sum(w.elements for w in resting), sum(w.bytes for w in resting)
            yield Weights(tensor[0].name, own.placed.name, elements, size, _is_spread(tensor[0]))


def _is_spread(weight: PlacedOperand) -> bool:
    """Whether a weight of experts is another one on each rank over which they are spread."""
    return any(placement.dim == "e" for _, placement in weight.layout)


def _copies(weight: PlacedOperand, mesh: Mesh) -> int:
    """Ranks of the tp axis that hold the same heads, where there are fewer heads than ranks."""
    dim = dict(weight.gradient).get("tp", PARTIAL).dim
    if dim is None:
        return 1
    return max(1, mesh.degree("tp") // weight.tensor.sizes[weight.tensor.dims.index(dim)])
