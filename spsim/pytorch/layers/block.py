"""What real blocks have in common: this rank's slices of seeded weights, and the shards of whole tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from spsim.inputs.model import Model
from spsim.inputs.plan import Plan
from spsim.program.instructions import WeightSync
from spsim.pytorch.layers import elementwise
from spsim.pytorch.layers.groups import Groups
from spsim.pytorch.layers.linears import TensorParallel
from spsim.pytorch.layers.recording import operator
from spsim.pytorch.layers.sequence import SequenceShards
from spsim.pytorch.layers.weights import WeightShape, whole_weight


class ParallelBlock(nn.Module):
    """A block whose parameters are this rank's slices of a whole block's seeded weights."""

    def __init__(
        self,
        model: Model,
        plan: Plan,
        groups: Groups,
        shapes: Mapping[str, WeightShape],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.model, self.plan, self.groups, self.shapes = model, plan, groups, shapes
        self.device = torch.device(device)
        self.shards = SequenceShards(plan, groups, causal=model.causal)
        self.tp = TensorParallel(
            groups.group("tp"), plan.sequence_parallel, plan.tp_backward_overlap, plan.keep_gathered
        )
        for name, shape in shapes.items():
            part = self.local_weight(name, whole_weight(name, shape, seed, dtype))
            self.register_parameter(
                name, nn.Parameter(part.clone(memory_format=torch.contiguous_format).to(self.device))
            )

    # Whole tensors and their parts

    def local_weight(self, name: str, whole: Tensor) -> Tensor:
        """This rank's slice of a weight, or of its gradient."""
        return self.shapes[name].cut(whole, self.groups.coordinate("tp"), self.groups.degree("tp"))

    def local_input(self, whole: Tensor) -> Tensor:
        """This rank's part of a whole input or output [s b h], in the order in which the layer holds it."""
        return self.shards.local(whole)

    def whole_output(self, part: Tensor) -> Tensor:
        """The whole [s b h] of the parts of all ranks; every rank calls it."""
        return self.shards.whole(part)

    def synchronise_gradients(self, syncs: Iterable[WeightSync]) -> None:
        """Sum the gradients of weights over the ranks that hold summands of them: `Program.weight_sync`."""
        for sync in syncs:
            gradient = self.get_parameter(sync.weight).grad
            for axis in sync.axes:
                ranks = sync.ranks if sync.axes == ("tp",) else self.groups.degree(axis)
                dist.all_reduce(gradient, group=self.groups.part(axis, ranks))

    # What blocks are made of

    def weight(self, name: str) -> Tensor:
        """The weight of an operator."""
        return self.get_parameter(f"{name}_weight")

    def bias(self, name: str) -> Tensor | None:
        """Its bias, if it has one."""
        return self._parameters.get(f"{name}_bias")

    def norm(self, name: str, x: Tensor) -> Tensor:
        """RMSNorm, or LayerNorm where there is a bias."""
        with operator(name):
            bias = self.bias(name)
            if bias is None:
                return elementwise.rms_norm(x, self.weight(name))
            return elementwise.layer_norm(x, self.weight(name), bias)

    def table(self, key: str, make: Callable[[], Tensor]) -> Tensor:
        """A constant, made at its first use."""
        name = key.replace(".", "_")
        if name not in self._buffers:
            self.register_buffer(name, make().to(self.device), persistent=False)
        return self.get_buffer(name)
