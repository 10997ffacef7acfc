"""Backward passes in halves against torch's: which products each half works out."""

from collections import Counter
from typing import Any

import torch
from torch import nn
from torch.distributed.pipelining._backward import stage_backward_input, stage_backward_weight
from torch.utils._python_dispatch import TorchDispatchMode

from spsim.program.instructions import Compute
from spsim.step.halves import halved
from spsim.work import Gemm
from tests.cases import program

HIDDEN, HEADS, FFN, TOKENS = 32, 4, 80, 24
Sizes = Counter[tuple[int, ...]]


class Layer(nn.Module):
    """A layer of linears with biases, as torch has them."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(HIDDEN), nn.LayerNorm(HIDDEN)
        self.qkv, self.projection = nn.Linear(HIDDEN, 3 * HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        self.fc1, self.fc2 = nn.Linear(HIDDEN, FFN), nn.Linear(FFN, HIDDEN)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Of one sequence [s h]."""
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(0, 1) for part in self.qkv(self.norm1(x)).chunk(3, -1))
        attended = nn.functional.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True)[0]
        x = x + self.projection(attended.transpose(0, 1).flatten(1))
        return x + self.fc2(nn.functional.gelu(self.fc1(self.norm2(x))))


class Products(TorchDispatchMode):
    """Sizes of the products that run inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: Sizes = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Of two matrices."""
        if function is torch.ops.aten.mm.default:
            self.sizes[tuple(sorted((*args[0].shape, args[1].shape[1])))] += 1
        return function(*args, **(kwargs or {}))


def test_products_of_each_half() -> None:
    """The first works out the gradient of each linear's input, the second that of its weights, and nothing else."""
    stage = nn.Sequential(Layer(), Layer())
    x = torch.randn(TOKENS, HIDDEN, requires_grad=True)
    y = stage(x)
    with Products() as first:
        _, groups = stage_backward_input([y], [torch.ones_like(y)], [x], iter(stage.parameters()))
    assert all(parameter.grad is None for parameter in stage.parameters())
    with Products() as second:
        stage_backward_weight(iter(stage.parameters()), groups)
    assert all(parameter.grad is not None for parameter in stage.parameters())
    sizes = {"hidden": HIDDEN, "heads": HEADS, "ffn_hidden": FFN, "seq_len": TOKENS}
    halves = halved(program("", **sizes).backward_sections)
    for half, found in zip(halves, (first.sizes, second.sizes), strict=True):
        steps = [step for section in half for step in section.instructions]
        works = [work for step in steps if isinstance(step, Compute) for work in step.work if isinstance(work, Gemm)]
        assert Counter({size: 2 * n for size, n in _sizes(works).items()}) == found


def _sizes(works: list[Gemm]) -> Sizes:
    """Of products with weights; those of biases have one row."""
    return Counter(tuple(sorted((work.m, work.n, work.k))) for work in works)
