"""Weights that rest sharded against `torch.distributed.fsdp.fully_shard`: collectives, bytes, order, elements at rest.

A fake process group: torch issues all collectives of one rank, which move nothing.
"""

from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from spsim.inputs.plan import Plan
from spsim.program.blocks.block import Block
from spsim.program.compiler import compile_region
from spsim.program.instructions import Communication, Instruction, Program
from spsim.program.mesh import Mesh
from spsim.program.region import Region
from spsim.program.strategies import SplitRule

RANKS, TOKENS, WIDTHS = 4, 8, (64, 96, 32)
NAMES = {"_allgather_base_": "all_gather", "_reduce_scatter_base_": "reduce_scatter", "mm": "product"}


class Calls(TorchDispatchMode):
    """Collectives, with the bytes of the whole tensor, and products."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = NAMES.get(func.overloadpacket.__name__)
        if name == "product":
            self.found.append((name, 0))
        elif name:
            self.found.append((name, max(t.nbytes for t in args if isinstance(t, torch.Tensor))))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def ranks() -> Iterator[None]:
    dist.init_process_group("fake", rank=0, world_size=RANKS, store=FakeStore())
    yield
    dist.destroy_process_group()


def observed(dtype: torch.dtype, *, reshard: bool) -> tuple[list[tuple[str, int]], int]:
    """What torch issues for linears in a row, each sharded by itself, and the elements of a rank at rest."""
    mesh = init_device_mesh("cpu", (RANKS,))
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    model = nn.Sequential(*(nn.Linear(a, b, bias=False) for a, b in pairwise(WIDTHS)))
    for linear in model:
        fully_shard(linear, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)
    with Calls() as calls:
        model(torch.ones(TOKENS, WIDTHS[0], dtype=dtype, requires_grad=True)).sum().backward()
    return calls.found, sum(p.to_local().numel() for p in model.parameters())


def derived(dtype: torch.dtype, *, reshard: bool) -> Program:
    """The same linears, tokens over the ranks."""
    sizes = {"b": RANKS, "s": TOKENS, **{f"w{i}": width for i, width in enumerate(WIDTHS)}}
    block = Block(sizes, dtype.itemsize)
    x = block.tensor("x", "s b w0")
    for i in range(1, len(WIDTHS)):
        out = block.tensor(f"out{i}", f"s b w{i}")
        weight = block.weight(f"weight{i}", f"w{i - 1} w{i}")
        block.add(f"linear{i}", "gemm", f"s b w{i - 1}, w{i - 1} w{i} -> s b w{i}", [x, weight], [out], saves=[x])
        x = out
    rules = {"dp": SplitRule(("b",), ("b",), shards_weights=True)}
    region = Region(block.operators, rules, Mesh({"dp": RANKS}))
    return compile_region(region, Plan(), causal=False, keep_weights=not reshard)


def named(step: Instruction) -> tuple[str, int]:
    return (step.collective, step.message_bytes) if isinstance(step, Communication) else ("product", 0)


@pytest.mark.parametrize("reshard", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_linears_that_are_fully_sharded(ranks: None, dtype: torch.dtype, reshard: bool) -> None:
    """Gathered in their type before forward and, unless kept, before backward; reduced in fp32 after backward."""
    calls, at_rest = observed(dtype, reshard=reshard)
    program = derived(dtype, reshard=reshard)
    assert list(map(named, program.instructions)) == calls
    assert program.parameters == at_rest
