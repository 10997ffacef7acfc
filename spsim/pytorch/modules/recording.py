"""Runs a module on fake tensors, forward and backward, and records every operator that torch dispatches.

No memory is allocated for tensors and no kernel runs: parameters and inputs are replaced by fake tensors of
the same shapes, and the module itself is not changed.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.flop_counter import flop_registry

from spsim.errors import InputError
from spsim.pytorch.modules.cuda import cuda_kernels, with_cuda_statistics
from spsim.pytorch.modules.tape import Call, Pass, Tape, Value

QUERIES = frozenset({"device", "layout", "sym_size", "sym_stride", "sym_numel", "sym_storage_offset", "is_contiguous"})
"""Operators that ask about a tensor and compute nothing."""
SAME_DTYPE = {
    "mm": ("self", "mat2"), "addmm": ("mat1", "mat2", "self"), "bmm": ("self", "mat2"),
    "baddbmm": ("batch1", "batch2", "self"), "mv": ("self", "vec"), "addmv": ("mat", "vec", "self"),
    "dot": ("self", "tensor"), "convolution": ("input", "weight", "bias"),
    **dict.fromkeys(
        (f"_scaled_dot_product_{kind}_attention" for kind in ("flash", "efficient")),
        ("query", "key", "value"),
    ),
}  # fmt: skip
"""Operators whose operands must have one dtype, which kernels check and fake tensors may not."""


def record(
    module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, cuda: bool, forward_only: bool = False
) -> Tape:
    """The calls of one forward and backward pass, or `forward_only`; `cuda` takes the kernels of a CUDA device.

    Raises `InputError` where values decide what runs, and where the module itself fails on these inputs.
    """
    name = type(module).__name__
    recorder = _Recorder(module, cuda)
    with _quiet(), ExitStack() as stack:
        if cuda:
            stack.enter_context(cuda_kernels())
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        try:
            return _run(recorder, module, name, args, kwargs, forward_only)
        except InputError:
            raise
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise InputError(
                f"{recorder.place}: {error} makes control flow or a shape depend on values, which fake tensors "
                "do not have; trace the parts of the module on either side of it"
            ) from error
        except Exception as error:
            problem = " ".join(str(error).split())[:300]
            raise InputError(
                f"{recorder.place}: fails on fake tensors of these inputs: {type(error).__name__}: {problem}; "
                "correct the example inputs or the module"
            ) from error


def _run(
    recorder: _Recorder, module: nn.Module, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any],
    forward_only: bool,
) -> Tape:  # fmt: skip
    state = {key: _fake(value) for key, value in (*module.named_parameters(), *module.named_buffers())}
    given = {id(leaf): leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)}
    fakes = {key: _fake(leaf) for key, leaf in given.items()}
    args, kwargs = tree_map(lambda leaf: fakes.get(id(leaf), leaf), (args, dict(kwargs)))
    inputs = list(fakes.values())
    parameters = [value for value in state.values() if value.requires_grad]
    recorder.parameters = {recorder.storage(value): key for key, value in state.items()}
    known = [recorder.value(leaf) for leaf in inputs]

    def passes(own: nn.Module) -> tuple[list[Tensor], list[Tensor], Any]:
        with recorder.watching(), torch.set_grad_enabled(not forward_only):
            found = own(*args, **kwargs)
        leaves = [leaf for leaf in tree_flatten(found)[0] if isinstance(leaf, Tensor)]
        if forward_only:
            _check_elements(name, inputs, leaves)
            return leaves, [], [None] * len(wanted)
        outputs = _differentiable(name, leaves)
        _check_elements(name, inputs, outputs)
        roots = _roots(outputs)
        seeds = [torch.empty_like(leaf) for leaf in roots]
        recorder.phase = "backward"
        with recorder.watching():
            return outputs, seeds, torch.autograd.grad(roots, wanted, seeds, allow_unused=True)

    wanted = [leaf for leaf in inputs if leaf.requires_grad] + parameters
    whole = {f"module.{key}": value for key, value in state.items()}
    outputs, seeds, gradients = torch.func.functional_call(_Passes(module), whole, (passes,))
    by_input = dict(zip(map(id, wanted), gradients, strict=True))
    of_parameters = [gradient for gradient in gradients[len(wanted) - len(parameters) :] if gradient is not None]
    return Tape(
        name=name,
        calls=recorder.calls,
        saved=recorder.saved,
        storages=recorder.sizes,
        parameters=recorder.parameters,
        buffers=frozenset(recorder.storage(state[key]) for key, _ in module.named_buffers()),
        trainable=sum(p.numel() for p in parameters),
        parameter_bytes=sum(p.numel() * p.itemsize for p in state.values()),
        gradient_bytes=sum(g.numel() * g.itemsize for g in of_parameters),
        main_dtype=_main_dtype(parameters + inputs),
        inputs=tuple(known),
        outputs=tuple(recorder.value(leaf) for leaf in outputs),
        output_gradients=tuple(map(recorder.value, seeds)),
        input_gradients=tuple(None if g is None else recorder.value(g) for g in map(by_input.get, map(id, inputs))),
        parameter_gradients=frozenset(recorder.storage(g) for g in of_parameters),
    )


def _differentiable(name: str, leaves: Sequence[Tensor]) -> list[Tensor]:
    """The outputs that need a gradient."""
    outputs = [leaf for leaf in leaves if leaf.requires_grad]
    if not outputs:
        raise InputError(
            f"{name}: no output needs a gradient; give the module parameters or inputs that require one, or trace "
            "it with forward_only=True"
        )
    return outputs


def _check_elements(name: str, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
    if not any(leaf.numel() for leaf in outputs):
        shapes = ", ".join(str(list(leaf.shape)) for leaf in inputs)
        raise InputError(f"{name}: its outputs hold no elements; give inputs that hold some, instead of {shapes}")


class _Passes(nn.Module):
    """A module with both of its passes inside, since checkpointed parts run again in the backward pass, when they
    must still find the fake parameters.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, passes: Callable[[nn.Module], Any]) -> Any:
        """Whatever `passes` returns of the module."""
        return passes(self.module)


def _roots(outputs: list[Tensor]) -> list[Tensor]:
    """What the backward pass begins from: the loss, where a module returns one beside its logits, else all outputs."""
    scalars = [leaf for leaf in outputs if leaf.dim() == 0]
    return scalars if len(scalars) == 1 else outputs


def _has_kernel(func: Any) -> bool:
    """Whether a device runs an operator as it is, though it could be composed of others: silu_backward."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CPU")


def _fake(leaf: Tensor) -> Tensor:
    """A fake tensor of the same shape."""
    made = torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device="cpu")
    return made.requires_grad_(leaf.requires_grad)


def _main_dtype(tensors: list[Tensor]) -> str:
    """The floating-point dtype of most elements."""
    elements: dict[str, int] = defaultdict(int)
    for tensor in tensors:
        if tensor.is_floating_point():
            elements[str(tensor.dtype).removeprefix("torch.")] += tensor.numel()
    return max(elements, key=elements.__getitem__)


@contextmanager
def _quiet() -> Iterator[None]:
    """torch logs the failures of fake tensors with a stack; they become one line here."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


class _Recorder(TorchDispatchMode):
    """Sees every operator below autograd, and what autograd keeps."""

    def __init__(self, module: nn.Module, cuda: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.module = module
        self.names = {id(child): name for name, child in module.named_modules()}
        self.cuda = cuda
        self.phase: Pass = "forward"
        self.calls: list[Call] = []
        self.saved: dict[int, list[Value]] = defaultdict(list)
        self.parameters: dict[int, str] = {}
        self.sizes: list[int] = []
        self.modules: list[str] = []
        self.module_of: dict[int, str] = {}
        self._numbers: dict[int, int] = {}
        self._alive: list[Tensor] = []
        self._nodes = torch._C._autograd._get_sequence_nr()

    @property
    def where(self) -> str:
        """The module that runs, by its path."""
        return self.modules[-1] if self.modules else ""

    @property
    def place(self) -> str:
        """The module that runs, for people: its path and class."""
        return f"{self.where or 'the module'} ({type(self.module.get_submodule(self.where)).__name__})"

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Record operators, modules and saved tensors."""
        enter = register_module_forward_pre_hook(lambda module, _: self._enter(module))
        leave = register_module_forward_hook(lambda module, _, output: self._leave(module))
        try:
            with torch.autograd.graph.saved_tensors_hooks(self._keep, lambda kept: kept), self:
                yield
        finally:
            enter.remove()
            leave.remove()

    def _enter(self, module: nn.Module) -> None:
        if id(module) in self.names:
            self.modules.append(self.names[id(module)])

    def _leave(self, module: nn.Module) -> None:
        if id(module) in self.names:
            self.modules.pop()

    def _keep(self, tensor: Tensor) -> Tensor:
        """A node is numbered when it is made, before it saves."""
        self.saved[torch._C._autograd._get_sequence_nr() - 1].append(self.value(tensor))
        return tensor

    def storage(self, tensor: Tensor) -> int:
        """The number of the storage that a tensor lives in; it is kept, so that no other takes its address."""
        memory = tensor.untyped_storage()
        if memory._cdata not in self._numbers:
            self._numbers[memory._cdata] = len(self.sizes)
            self.sizes.append(memory.nbytes())
            self._alive.append(tensor.detach())
        return self._numbers[memory._cdata]

    def value(self, tensor: Tensor) -> Value:
        """A tensor without torch."""
        shape, stride = tuple(map(int, tensor.shape)), tuple(map(int, tensor.stride()))
        dtype = str(tensor.dtype).removeprefix("torch.")
        return Value(self.storage(tensor), shape, stride, int(tensor.storage_offset()), tensor.itemsize, dtype)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[-1]
        if name in QUERIES:
            return func(*args, **kwargs)
        bound = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs
        self._check_dtypes(name, bound)
        if func._overloadpacket not in flop_registry and not _has_kernel(func):
            with self:
                decomposed = func.decompose(*args, **kwargs)
            if decomposed is not NotImplemented:
                return decomposed
        results = func(*args, **kwargs)
        if self.cuda:
            if "mkldnn" in name:
                raise InputError(
                    f"{self.place}: {name} runs on CPUs only, and what CUDA runs instead is not known; trace "
                    "the module without it, or with device='cpu'"
                )
            results = with_cuda_statistics(name, results)
        count = flop_registry.get(func._overloadpacket)
        flops = int(count(*args, **kwargs, out_val=results)) if count else 0
        self._note(func, name, bound, results, flops)
        return results

    def _check_dtypes(self, name: str, bound: Mapping[str, Any]) -> None:
        found = {key: bound[key].dtype for key in SAME_DTYPE.get(name, ()) if isinstance(bound.get(key), Tensor)}
        if len(set(found.values())) > 1:
            dtypes = ", ".join(f"{key} {str(dtype).removeprefix('torch.')}" for key, dtype in found.items())
            raise InputError(f"{self.place}: operands of {name} differ in dtype ({dtypes}); convert them to one")

    def _note(self, func: Any, name: str, bound: Mapping[str, Any], results: Any, flops: int) -> None:
        schema = func._schema.arguments
        node = self._node()
        if node is not None and self.phase == "forward":
            self.module_of[node] = self.where
        self.calls.append(
            Call(
                op=name,
                arguments={key: self._without_torch(value) for key, value in bound.items()},
                results=tuple(self.value(leaf) for leaf in tree_flatten(results)[0] if isinstance(leaf, Tensor)),
                phase=self.phase,
                module=self.where if self.phase == "forward" else self.module_of.get(-1 if node is None else node, ""),
                node=node,
                flops=flops,
                mutated=tuple(a.name for a in schema if a.alias_info is not None and a.alias_info.is_write),
                view=func.is_view,
                pointwise=torch.Tag.pointwise in func.tags,
            )
        )

    def _without_torch(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self.value(value)
        if isinstance(value, list | tuple):
            return [self._without_torch(item) for item in value]
        return value

    def _node(self) -> int | None:
        """The node of the operator: the newest where one was made for it, in backward the one that runs."""
        if self.phase == "backward":
            running = torch._C._current_autograd_node()
            return None if running is None else running._sequence_nr()
        before, self._nodes = self._nodes, torch._C._autograd._get_sequence_nr()
        return self._nodes - 1 if self._nodes > before else None
