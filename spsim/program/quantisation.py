"""Operators of a block whose products run in a lower precision: operators to operators, no plan and no rank.

Before each product that a recipe names stands a cast of its input, behind it one of the gradients of its outputs. They
are operators as any other, so that the rules of placement cast a shard and gather the result: what Megatron-Core sends
in 8 bits, and what is kept in 8 bits and gathered again, follows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from spsim.program.operators import Operand, Operator, Tensor
from spsim.program.recipes import Cast, Recipe


def quantised(operators: Sequence[Operator], recipe: Recipe) -> tuple[Operator, ...]:
    """The operators of a block with the casts of a recipe; products that it does not name stay as they are. What
    several read is cast once, before the first (`PrepareFloat8ModuleInput` of torchao).
    """
    found: dict[str, Operator] = {}
    makers: dict[str, Operator] = {}
    casts: dict[str, Tensor] = {}
    for op in operators:
        if op.kind == "gemm" and op.name in recipe.operators and op.weights:
            x = op.activations[0].tensor
            around = _around(op, recipe, makers.get(x.name), casts.get(x.name))
            found |= {operator.name: operator for operator in around}
            casts.setdefault(x.name, _cast_for(op, recipe))
        else:
            found[op.name] = op
        makers |= {output.tensor.name: op for output in op.outputs}
    return tuple(found.values())


def with_cast_attention(operators: Sequence[Operator], recipe: Recipe) -> tuple[Operator, ...]:
    """The operators of a block with core attention in the type of a recipe: queries, keys and values are cast before it
    and kept so, the gradient of its result behind it; the result and all other gradients stay in 16 bits
    (`fp8_dot_product_attention` of Megatron-Core).
    """
    return tuple([own for op in operators for own in _around_attention(op, recipe.of_attention)])


def _around_attention(op: Operator, recipe: Recipe) -> Iterator[Operator]:
    if op.kind != "attention":
        yield op
        return
    itemsize = recipe.copies * recipe.itemsize
    given, made = op.activations, op.results[0].tensor
    cast = {
        x.tensor.name: x.tensor._replace(
            name=f"{op.name}_{x.tensor.name}", itemsize=itemsize, gradient_itemsize=x.tensor.itemsize
        )
        for x in given
    }
    for x in given:
        yield Operator(
            name=f"{cast[x.tensor.name].name}_cast", kind="cast", inputs=(_plain(x.tensor),),
            outputs=(_plain(cast[x.tensor.name]),), passthrough=frozenset({x.tensor.name}),
            cast=Cast(recipe, "input", of_attention=True),
        )  # fmt: skip
    result = made._replace(name=f"{made.name}_made", gradient_itemsize=itemsize)
    names = {name: own.name for name, own in cast.items()} | {made.name: result.name}
    yield replace(
        op,
        inputs=tuple(x._replace(tensor=cast.get(x.tensor.name, x.tensor)) for x in op.inputs),
        outputs=tuple(o._replace(tensor=result) if o.tensor == made else o for o in op.outputs),
        saves=tuple(names.get(name, name) for name in op.saves),
        owns_gather=frozenset(names.get(name, name) for name in op.owns_gather),
        recipe=recipe,
    )
    yield Operator(
        name=f"{op.name}_gradient_cast", kind="cast", inputs=(_plain(result),), outputs=(_plain(made),),
        cast=Cast(recipe, "gradient", of_attention=True),
    )  # fmt: skip


def _cast_for(op: Operator, recipe: Recipe) -> Tensor:
    """The input of a product, cast."""
    x = op.activations[0].tensor
    return x._replace(name=f"{op.name}_input", itemsize=recipe.itemsize, gradient_itemsize=x.itemsize)


def _around(op: Operator, recipe: Recipe, maker: Operator | None, known: Tensor | None) -> Iterator[Operator]:
    """A product between the casts of its input, unless that is `known`, and of the gradients of its outputs."""
    (given,) = op.activations
    casting, again = known or _cast_for(op, recipe), op.name in recipe.keeps_input
    if known is None:
        yield _caster(op, casting, recipe, maker, again=again)
    product, made = _product(op, given, casting, recipe, again=again)
    yield product
    yield Operator(
        name=f"{op.name}_gradient_cast", kind="cast", inputs=tuple(map(_plain, made)),
        outputs=tuple(_plain(o.tensor) for o in op.outputs), cast=Cast(recipe, "gradient"), rules=op.rules,
        group=op.group,
    )  # fmt: skip


def _caster(op: Operator, casting: Tensor, recipe: Recipe, maker: Operator | None, *, again: bool) -> Operator:
    """What makes the cast input of a product: the norm that makes the input, if it casts, else a cast."""
    x = op.activations[0].tensor
    of_norm = maker is not None and maker.kind == "norm"
    if maker is not None and of_norm and recipe.norm == "casts":
        return replace(maker, outputs=tuple(o._replace(tensor=casting) if o.tensor == x else o for o in maker.outputs))
    return Operator(
        name=f"{op.name}_cast", kind="cast", inputs=(_plain(x),), outputs=(_plain(casting),),
        passthrough=frozenset({x.name}), cast=Cast(recipe, "input", of_norm, rows_only=again), rules=op.rules,
        group=op.group,
    )  # fmt: skip


def _product(
    op: Operator, given: Operand, cast: Tensor, recipe: Recipe, *, again: bool
) -> tuple[Operator, list[Tensor]]:
    """The product of the cast input, and what it makes, whose gradients arrive cast."""
    itemsize = recipe.gathered * recipe.itemsize
    made = [o.tensor._replace(name=f"{o.tensor.name}_made", gradient_itemsize=itemsize) for o in op.outputs]
    matrices = {w.tensor.name for w in op.weights if not op.contracted.isdisjoint(w.subscript)}
    kept = given.tensor.name if again else cast.name
    renamed = {given.tensor.name: kept}

    def read(operand: Operand) -> Operand:
        tensor = operand.tensor
        if operand is given:
            return operand._replace(tensor=cast)
        return (
            operand._replace(tensor=tensor._replace(itemsize=recipe.weight_bytes))
            if tensor.name in matrices
            else operand
        )

    product = replace(
        op,
        inputs=tuple(map(read, op.inputs)),
        outputs=tuple(o._replace(tensor=tensor) for o, tensor in zip(op.outputs, made, strict=True)),
        saves=tuple(renamed.get(name, name) for name in op.saves),
        owns_gather=frozenset(renamed.get(name, name) for name in op.owns_gather),
        recipe=recipe,
        originals=(given,) if again else (),
    )
    return product, made


def _plain(tensor: Tensor) -> Operand:
    return Operand(tensor, tensor.dims)
