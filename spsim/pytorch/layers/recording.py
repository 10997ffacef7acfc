"""What torch really does: the collectives it issues, and the tensors it keeps for the backward pass.

Both are seen from below the layers: collectives where torch dispatches them to the process group, saved
tensors in autograd's hooks. A layer only names its operators.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import record_function
from torch.utils._python_dispatch import TorchDispatchMode

from spsim.program.instructions import Part
from spsim.program.mesh import Axis
from spsim.program.operators import TensorKind
from spsim.program.placement import Collective
from spsim.pytorch.layers.groups import Groups

_operator: ContextVar[str] = ContextVar("operator", default="")
_recomputing: ContextVar[bool] = ContextVar("recomputing", default=False)


@contextmanager
def operator(name: str) -> Iterator[None]:
    """What runs inside belongs to this operator of the layer, here and in torch's profiler."""
    token = _operator.set(name)
    try:
        with record_function(name):
            yield
    finally:
        _operator.reset(token)


@contextmanager
def recomputation() -> Iterator[None]:
    """What runs inside is the forward pass again, if the backward pass is under way."""
    token = _recomputing.set(torch._C._current_graph_task_id() != -1)
    try:
        yield
    finally:
        _recomputing.reset(token)


def _phase() -> Part:
    if _recomputing.get():
        return "recompute"
    return "forward" if torch._C._current_graph_task_id() == -1 else "backward"


# Collectives


@dataclass(frozen=True, slots=True)
class CollectiveCall:
    """A collective as this rank issued it, with the bytes of `placement.message_bytes`: the whole array of
    the group, or what one rank sends of an all-to-all and of an exchange.
    """

    collective: Collective
    axis: Axis
    message_bytes: int
    ranks: int
    phase: Part


_COLLECTIVES: dict[str, Collective] = {
    "allreduce_": "all_reduce",
    "_allgather_base_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "alltoall_base_": "all_to_all",
    "send": "send_receive",
}
"""Operators of torch's c10d library; `recv_` is the other side of a neighbour's send."""


class _CollectiveRecorder(TorchDispatchMode):
    def __init__(self, groups: Groups) -> None:
        super().__init__()
        self.groups = groups
        self.calls: list[CollectiveCall] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self._note(func._schema.name.split("::")[1], args)
        return func(*args, **(kwargs or {}))

    def _note(self, name: str, args: Sequence[Any]) -> None:
        if name == "recv_":
            return
        tensors, group = _tensors(args), _group(args)
        message = max(t.numel() * t.element_size() for t in tensors)
        axis = self.groups.axis_of(group)
        self.calls.append(CollectiveCall(_COLLECTIVES[name], axis, message, group.size(), _phase()))


def _tensors(args: Sequence[Any]) -> list[Tensor]:
    flat = [item for arg in args for item in (arg if isinstance(arg, list | tuple) else (arg,))]
    return [item for item in flat if isinstance(item, Tensor)]


def _group(args: Sequence[Any]) -> dist.ProcessGroup:
    handles = (arg for arg in args if isinstance(arg, torch.ScriptObject))
    return dist.ProcessGroup.unbox(next(handle for handle in handles if "ProcessGroup" in str(handle._type())))


@contextmanager
def record_collectives(groups: Groups) -> Iterator[list[CollectiveCall]]:
    """The collectives that torch dispatches inside, in issue order."""
    with _CollectiveRecorder(groups) as recorder:
        yield recorder.calls


# Saved tensors


@dataclass(frozen=True, slots=True)
class SavedTensor:
    """A storage kept for the backward pass."""

    operator: str
    category: TensorKind
    shape: tuple[int, ...]
    dtype: torch.dtype
    bytes: int
    """Of the whole storage: a view keeps all of it."""


@dataclass
class SavedTensors:
    """Each storage once, by the first operator that keeps it."""

    tensors: list[SavedTensor] = field(default_factory=list)

    def bytes(self, *categories: TensorKind) -> int:
        """Bytes of some categories, or of all."""
        return sum(t.bytes for t in self.tensors if not categories or t.category in categories)


def _category(tensor: Tensor) -> TensorKind:
    """Masks, and maps of where rows go, are no floating-point numbers; statistics are, of a norm, one number a row, and
    of attention [b a s] without a width. A loss keeps probabilities and where the targets are, an embedding its ids.
    """
    if tensor.dtype == torch.int64 and "embedding" in _operator.get():
        return "token ids"
    if _operator.get() == "cross_entropy":
        return "probabilities" if tensor.is_floating_point() else "mask"
    if not tensor.is_floating_point():
        return "mask"
    if "norm" in _operator.get() and tensor.shape[-1] == 1:
        return "norm statistics"
    if _operator.get() == "attention" and tensor.dim() == 3:
        return "log-sum-exp"
    return "activation"


def _is_random_state(tensor: Tensor) -> bool:
    """Fused attention on a GPU keeps seed and offset of its dropout, used or not: two numbers, no data."""
    return _operator.get() == "attention" and tensor.dim() < 2 and tensor.dtype in (torch.uint64, torch.int64)


@contextmanager
def record_saved(*modules: nn.Module) -> Iterator[SavedTensors]:
    """What autograd keeps of a forward pass inside, without the parameters and buffers of the modules.

    Storages are held until the recorder ends, so that no two are at one address.
    """
    record = SavedTensors()
    held: dict[int, torch.UntypedStorage] = {}

    def excluded() -> set[int]:
        own = (t for module in modules for t in (*module.parameters(), *module.buffers()))
        return {t.untyped_storage()._cdata for t in own}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if _is_random_state(tensor):
            return tensor
        if storage._cdata not in held and storage._cdata not in excluded():
            held[storage._cdata] = storage
            shape = tuple(tensor.shape)
            record.tensors.append(
                SavedTensor(_operator.get(), _category(tensor), shape, tensor.dtype, storage.nbytes())
            )
        return tensor

    with saved_tensors_hooks(pack, _unchanged):
        yield record


def _unchanged(tensor: Tensor) -> Tensor:
    return tensor
