"""The rule of applicability against torch: run whole and on sequence shards, an operator gives the same exactly
when `applies_alone` says that it may.

Every operator of the layer, and operators that are not in it and come out otherwise. "Without the others" means
that a shard has its own part of every operand, K and V included.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from spsim.program.blocks.transformer import transformer_layer
from spsim.program.mesh import Mesh
from spsim.program.operators import LAGGED, Operand, Operator, layouts, operator_splits, parse
from spsim.program.operators import Tensor as Named
from spsim.program.placement import REPLICATE, shard
from spsim.program.strategies import SplitRule
from spsim.pytorch.layers import elementwise, flash, unfused
from spsim.studies.explanation import Applies, applies_alone
from tests.truth.cases import MODELS, case

SHARDS = 4
S, B, H, WINDOW = 32, 2, 8, 4
KEEP = 0.9

Kernel = Callable[..., Tensor]
"""Takes the inputs of an operator in their order, then its mask: a dropout draws none, so that two runs compare."""


def linear(contracted: int) -> Kernel:
    """x times a weight over the last dimensions of the one and the first of the other."""
    return lambda x, weight: torch.tensordot(x, weight, contracted)


def qkv(x: Tensor, q: Tensor, k: Tensor, v: Tensor, *biases: Tensor) -> Tensor:
    outs = [torch.tensordot(x, weight, 1) for weight in (q, k, v)]
    return torch.cat([out + bias for out, bias in zip(outs, biases or (0, 0, 0), strict=True)], 2)


def norm(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return elementwise.rms_norm(x, weight) if bias is None else elementwise.layer_norm(x, weight, bias)


def dropout(x: Tensor, mask: Tensor) -> Tensor:
    return x * mask / KEEP


def residual(x: Tensor, stream: Tensor, *rest: Tensor) -> Tensor:
    bias, mask = ([r for r in rest if r.dim() == dims] for dims in (1, 3))
    x = x + bias[0] if bias else x
    return stream + (dropout(x, mask[0]) if mask else x)


def rope(x: Tensor, angles: Tensor) -> Tensor:
    return elementwise.rope(x, torch.stack((angles.cos(), angles.sin())))


def activation(name: str) -> Kernel:
    return lambda x, bias=None: elementwise.activation(name, x, bias)


KERNELS: dict[str, Kernel] = {
    "norm1": norm, "norm2": norm, "q_norm": norm, "k_norm": norm,
    "qkv": qkv, "projection": linear(2), "fc1": linear(1), "fc2": linear(1),
    "rope_q": rope, "rope_k": rope,
    "qk": lambda q, k: unfused.scores(q, k, None),
    "softmax": lambda x: unfused.softmax(x, 0.5, None),
    "attention_dropout": dropout,
    "av": lambda weights, v: unfused.context(weights, v, None),
    "attention": lambda q, k, v: flash.attention(q, k, v, causal=False),
    "residual1": residual, "residual2": residual,
    **{name: activation(name) for name in ("gelu", "squared_relu", "swiglu", "geglu")},
}  # fmt: skip


def operators(**model: object) -> tuple[Operator, ...]:
    layer = case("", seq_len=S, micro_batch=B, **model)
    return transformer_layer(layer.model, layer.workload)


CATALOGUE = {(name, op.name): op for name, model in MODELS.items() for op in operators(**model)}


def written(signature: str, *, mixes: str = "", weights: Sequence[str] = ()) -> Operator:
    """An operator by its subscripts: operands are activations unless named by their dimensions among `weights`."""
    sizes = {"s": S, "b": B, "h": H, "k": WINDOW}
    left, right = parse(signature)

    def operand(subscript: tuple[str, ...], name: str) -> Operand:
        dims = tuple("s" if dim.startswith(LAGGED) else dim for dim in subscript)
        kind = "weight" if " ".join(subscript) in weights else "activation"
        return Operand(Named(name, dims, tuple(sizes[d] for d in dims), 2, kind), subscript)

    return Operator(
        "written", "elementwise", tuple(operand(subscript, f"input {i}") for i, subscript in enumerate(left)),
        (operand(right[0], "output"),), mixes=frozenset(mixes.split()),
    )  # fmt: skip


def convolution(x: Tensor, weight: Tensor) -> Tensor:
    """Causal, each channel its own: zeros stand before the first position."""
    rows = functional.pad(x.permute(1, 2, 0), (WINDOW - 1, 0))
    kernel = weight.T.flip(-1).unsqueeze(1)
    return functional.conv1d(rows, kernel, groups=x.shape[-1]).permute(2, 0, 1)


@dataclass(frozen=True)
class Written:
    """An operator that no layer of the catalogue has, its kernel, and what the rule must say."""

    operator: Operator
    kernel: Kernel
    applies: Applies


WRITTEN = {
    "softmax over the sequence": Written(
        written("s b h -> s b h", mixes="s"), lambda x: torch.softmax(x, 0), "no"
    ),
    "batch norm over the sequence": Written(
        written("s b h -> s b h", mixes="s b"),
        lambda x: functional.batch_norm(x.flatten(0, 1), None, None, training=True).view(x.shape),
        "no",
    ),
    "cumulative sum": Written(written("s b h -> s b h", mixes="s"), lambda x: x.cumsum(0), "no"),
    "causal convolution": Written(
        written("s-k b h, k h -> s b h", weights=["k h"]), convolution, "yes, with halo"
    ),
    "learned positions": Written(
        written("s b h, s h -> s b h", weights=["s h"]), lambda x, table: x + table[:, None],
        "yes, with position offset",
    ),
    "sum over the sequence": Written(written("s b h -> b h"), lambda x: x.sum(0), "yes"),
}  # fmt: skip


# ------------------------------------------------------------ whole and on shards


def values(operator: Operator) -> list[Tensor]:
    """Random inputs, and a random mask where the operator draws one."""
    generator = torch.Generator().manual_seed(3)
    masks = [o.tensor for o in operator.outputs if o.tensor.kind == "mask"]
    tensors = [o.tensor for o in operator.inputs] + masks
    drawn = [torch.randn(t.sizes, generator=generator, dtype=torch.float64) for t in tensors]
    return [(x > -1).double() if t in masks else x for t, x in zip(tensors, drawn, strict=True)]


def is_position_table(operator: Operator, index: int) -> bool:
    """An input that depends on the position alone."""
    inputs = operator.inputs
    return index < len(inputs) and inputs[index].tensor.kind != "activation" and "s" in inputs[index].tensor.dims


def on_shards(operator: Operator, kernel: Kernel, inputs: list[Tensor], *, offset: bool) -> Tensor | None:
    """What the shards give together; None where their parts do not even fit each other.

    Without its offset a shard takes itself for the beginning of the sequence.
    """
    masks = [o.tensor.dims for o in operator.outputs if o.tensor.kind == "mask"]
    dims = [o.tensor.dims for o in operator.inputs] + masks
    outs = []
    for place in range(SHARDS):
        own = [
            x.chunk(SHARDS, d.index("s"))[place if offset or not is_position_table(operator, i) else 0]
            if "s" in d
            else x
            for i, (x, d) in enumerate(zip(inputs, dims, strict=True))
        ]
        try:
            outs.append(kernel(*own))
        except RuntimeError:
            return None
    result = operator.results[0].subscript
    return torch.cat(outs, result.index("s")) if "s" in result else torch.stack(outs).sum(0)


def with_halo(kernel: Kernel, inputs: list[Tensor], halo: int) -> Tensor:
    """Each shard has so many positions of the end of the one before it."""
    x, *rest = inputs
    padded = torch.cat((torch.zeros_like(x[:halo]), x))
    size = S // SHARDS
    return torch.cat([kernel(padded[i * size : (i + 1) * size + halo], *rest)[halo:] for i in range(SHARDS)])


def same(found: Tensor | None, expected: Tensor) -> bool:
    return found is not None and found.shape == expected.shape and torch.allclose(found, expected, rtol=1e-9)


def check(operator: Operator, kernel: Kernel) -> None:
    """Equal exactly when the rule says so."""
    applies, why = applies_alone(operator)
    inputs = values(operator)
    whole = kernel(*inputs)
    alone, placed = (same(on_shards(operator, kernel, inputs, offset=offset), whole) for offset in (False, True))
    assert alone == (applies == "yes"), why
    assert placed == (applies in ("yes", "yes, with position offset")), why


@pytest.mark.parametrize(("model", "name"), CATALOGUE)
def test_operators_of_the_layer(model: str, name: str) -> None:
    check(CATALOGUE[model, name], KERNELS[name])


@pytest.mark.parametrize("name", WRITTEN)
def test_operators_outside_of_it(name: str) -> None:
    one = WRITTEN[name]
    assert applies_alone(one.operator)[0] == one.applies
    check(one.operator, one.kernel)


def test_a_convolution_needs_the_halo_that_the_rule_names_and_no_less() -> None:
    one = WRITTEN["causal convolution"]
    inputs = values(one.operator)
    assert applies_alone(one.operator)[1] == f"reads the {WINDOW - 1} positions before its own too"
    assert same(with_halo(one.kernel, inputs, WINDOW - 1), one.kernel(*inputs))
    assert not same(with_halo(one.kernel, inputs, WINDOW - 2), one.kernel(*inputs))


def test_every_answer_occurs_in_the_catalogue() -> None:
    """The tests above are not all of one kind."""
    answers = {name: applies_alone(op)[0] for (_, name), op in CATALOGUE.items()}
    assert {name for name, answer in answers.items() if answer == "no"} == {"attention", "qk", "av"}
    assert {name for name, answer in answers.items() if "offset" in answer} == {"rope_q", "rope_k"}
    assert len(answers) == len(KERNELS)


def test_what_attention_lacks_on_a_shard_is_the_other_keys() -> None:
    """The rule names K and V; with all of them, a shard of queries gives its part of the whole."""
    op, kernel = CATALOGUE["gpt-sdpa", "attention"], KERNELS["attention"]
    q, k, v = values(op)
    shards = torch.cat([kernel(part, k, v) for part in q.chunk(SHARDS)])
    assert same(shards, kernel(q, k, v))


def test_softmax_may_run_on_queries_but_not_on_keys() -> None:
    op, kernel = CATALOGUE["gpt", "softmax"], KERNELS["softmax"]
    (scores,) = values(op)
    assert "not on a shard of keys" in applies_alone(op)[1]
    assert same(torch.cat([kernel(part) for part in scores.chunk(SHARDS, 2)], 2), kernel(scores))
    assert not same(torch.cat([kernel(part) for part in scores.chunk(SHARDS, 3)], 3), kernel(scores))


@pytest.mark.parametrize(
    "name", ["softmax over the sequence", "batch norm over the sequence", "cumulative sum", "causal convolution"]
)
def test_the_compiler_agrees(name: str) -> None:
    """A rule that splits along the sequence leaves those alone that mix it, and has the window of a convolution
    gathered: there is no exchange of halos.
    """
    operator = WRITTEN[name].operator
    splits = operator_splits(operator, {"ring": SplitRule(("s",), ("s",))}, Mesh({"ring": 2}))
    convolves = name == "causal convolution"
    assert dict(splits) == {"ring": "s" if convolves else None}
    read, written = operator.inputs[0], operator.outputs[0]
    arriving, _ = layouts(read.tensor.dims, read.subscript, splits)
    _, leaving = layouts(written.tensor.dims, written.subscript, splits)
    assert dict(arriving) == {"ring": REPLICATE}
    assert dict(leaving) == {"ring": shard("s") if convolves else REPLICATE}
