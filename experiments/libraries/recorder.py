"""What a library really does in a step: the collectives that it issues, and what it keeps for the backward pass.

Both are seen from below the library. Collectives are seen where torch dispatches them: `c10d` holds what
`torch.distributed` is asked for in place, `_c10d_functional` what DTensor and other functional code asks for. Kept
memory is seen where autograd saves tensors, by storage: two views of one storage are kept once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass(frozen=True)
class Call:
    """A collective as this rank issued it.

    `message_bytes` is the whole array of the group for an all-gather, a reduce-scatter and an all-reduce, what one rank
    gives of an all-to-all, its own part included, and of a send. A `permute` is an all-to-all that gives all to one
    rank.
    """

    phase: str
    collective: str
    message_bytes: int
    dtype: str


@dataclass(frozen=True)
class Kept:
    """A storage kept for the backward pass: in which module of which class, and the shape of the view that it kept."""

    module: str
    layer: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int


RESULT = -1
OPERATORS: dict[str, tuple[str, int]] = {
    "c10d::allreduce_": ("all_reduce", 0),
    "c10d::allreduce_coalesced_": ("all_reduce", 0),
    "c10d::broadcast_": ("broadcast", 0),
    "c10d::allgather_": ("all_gather", 0),
    "c10d::_allgather_base_": ("all_gather", 0),
    "c10d::reduce_scatter_": ("reduce_scatter", 1),
    "c10d::_reduce_scatter_base_": ("reduce_scatter", 1),
    "c10d::alltoall_": ("all_to_all", 1),
    "c10d::alltoall_base_": ("all_to_all", 1),
    "c10d::send": ("send_receive", 0),
    "_c10d_functional::all_reduce": ("all_reduce", 0),
    "_c10d_functional::all_gather_into_tensor": ("all_gather", RESULT),
    "_c10d_functional::reduce_scatter_tensor": ("reduce_scatter", 0),
    "_c10d_functional::all_to_all_single": ("all_to_all", 0),
    "deepspeed::dim_zero_all_to_all": ("all_to_all", 0),
}
"""Which argument is the message, or the result. Of a message between two ranks the sender's side is noted. An operator
of DeepSpeed's own hides what it calls.
"""
SILENT = {"c10d::recv_", "c10d::barrier", "_c10d_functional::wait_tensor", "_c10d_functional::_wrap_tensor_autograd"}
"""The other side of a send, and what moves no data."""


class Recorder(TorchDispatchMode):
    """Notes the calls of one rank; `phase` says in which part of a step they are."""

    def __init__(self, root: nn.Module, shared: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.kept: list[Kept] = []
        self.phase = "forward"
        self._names = {id(module): name for name, module in root.named_modules()}
        self._running: list[nn.Module] = []
        self._root = root
        self._shared = tuple(shared)
        self._held: dict[int, torch.UntypedStorage] = {}

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Collectives inside are noted, and which module runs."""
        with ExitStack() as stack:
            for handle in (
                nn.modules.module.register_module_forward_pre_hook(self._enter),
                nn.modules.module.register_module_forward_hook(self._leave, always_call=True),
            ):
                stack.callback(handle.remove)
            stack.enter_context(self)
            yield

    def keeping(self) -> saved_tensors_hooks:
        """What autograd saves inside is noted, without the parameters and buffers of the root and what is shared."""
        return saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # DTensor asks for collectives of the local tensors, which come here next
        result = func(*args, **(kwargs or {}))
        name = func._schema.name
        if name in OPERATORS or (func.namespace in ("c10d", "_c10d_functional") and name not in SILENT):
            collective, place = OPERATORS[name]
            if collective == "all_to_all" and _to_one_rank(name, args):
                collective = "permute"
            self._note(collective, tree_leaves(result if place == RESULT else args[place]))
        return result

    def _note(self, collective: str, leaves: Sequence[Any]) -> None:
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        message = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        # A module that runs in the backward pass runs again what the forward pass has run.
        phase = "recompute" if self.phase == "backward" and self._running else self.phase
        self.calls.append(Call(phase, collective, message, dtype_name(tensors[0].dtype)))

    def _enter(self, module: nn.Module, args: Any) -> None:
        self._running.append(module)

    def _leave(self, module: nn.Module, args: Any, result: Any) -> None:
        self._running.pop()

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = _storage(tensor)
        # Asked anew each time: FSDP puts gathered parameters in the place of its shards while a module runs.
        elsewhere = {_storage(x)._cdata for x in (*self._root.parameters(), *self._root.buffers(), *self._shared)}
        if storage._cdata not in self._held and storage._cdata not in elsewhere:
            self._held[storage._cdata] = storage  # held, so that no other storage comes to its address
            module = self._running[-1] if self._running else None
            name, local = self._names.get(id(module), ""), _local(tensor)
            self.kept.append(
                Kept(name, type(module).__name__, tuple(local.shape), dtype_name(local.dtype), storage.nbytes())
            )
        return tensor


def dtype_name(dtype: torch.dtype) -> str:
    """As spsim calls it."""
    short = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
    name = str(dtype).removeprefix("torch.")
    return short.get(name, name)


def _local(tensor: Tensor) -> Tensor:
    """The memory of this rank behind tensors that stand for more."""
    if isinstance(tensor, DTensor):
        tensor = tensor._local_tensor
    return tensor.elem if isinstance(tensor, AsyncCollectiveTensor) else tensor


def _storage(tensor: Tensor) -> torch.UntypedStorage:
    return _local(tensor).untyped_storage()


INPUT_SIZES = {"_c10d_functional::all_to_all_single": 2, "c10d::alltoall_base_": 4}
"""Which argument of an all-to-all says how much each rank is given."""


def _to_one_rank(name: str, args: Sequence[Any]) -> bool:
    """Whether an all-to-all gives all to one rank of several."""
    sizes = args[INPUT_SIZES[name]] if name in INPUT_SIZES else ()
    return len(sizes) > 1 and sum(size > 0 for size in sizes) == 1
