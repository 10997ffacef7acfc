"""What the backward pass runs again: modules of a layer, whole layers, or units of several layers.

Modules are those of Megatron-Core (`recompute_modules`), told by the dimensions of their operators. One that is
checkpointed keeps what it reads, and its result is kept by whoever needs it (Korthikanti et al. 2022, section 5). Of
others the result is discarded, too, and made again before the gradient of their sublayer (`CheckpointWithoutOutput`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from typing import NamedTuple

from spsim.inputs.model import LayerType, Model
from spsim.inputs.plan import Plan
from spsim.program.operators import Operator

SHARED_OUT, SHARED_SUM = "shared_out", "add_shared"
"""What shared experts make, as it is added, and what others make for a token added to it."""
MODULES: Mapping[str, Callable[[Operator], bool]] = {
    "layer": lambda op: True,
    "core_attn": lambda op: op.mixes_positions or (op.cast is not None and op.cast.of_attention),
    "mla_up_proj": lambda op: _of_latents(op) and not MODULES["core_attn"](op),
    "mlp": lambda op: "f" in op.extents,
    "mlp_act": lambda op: "f" in op.extents and op.kind != "gemm",
    "moe": lambda op: not {"e", "u"}.isdisjoint(op.extents) or op.name in (SHARED_OUT, SHARED_SUM),
    "moe_act": lambda op: "m" in op.extents and op.kind != "gemm",
    "shared_experts": lambda op: "u" in op.extents,
    "layernorm": lambda op: (op.kind == "norm" and "h" in op.mixes) or (op.cast is not None and op.cast.of_norm),
}
"""Module, or all of a layer -> whether an operator is in it; those in a row are recomputed together. What is part of
another one comes after it.
"""
DISCARDED = ("mlp_act", "moe_act", "layernorm", "mla_up_proj")
"""Modules whose results nobody keeps."""


def _of_latents(op: Operator) -> bool:
    """Whether an operator stands between the latents of attention and its core: their norms, which Transformer Engine
    has in the products up, those products, and rotations.
    """
    return not {"c", "n"}.isdisjoint(op.extents) or (op.kind != "gemm" and not {"q", "l"}.isdisjoint(op.extents))


class LayerKind(NamedTuple):
    """Layers that run alike: what of them is recomputed, and how many of them together."""

    recomputed: tuple[str, ...] = ()
    """Modules, in the order of `MODULES`."""
    layers: int = 1
    """Of a unit of which the first input is kept only; all of it is recomputed before its backward pass."""
    leaves: bool = False
    """Its activations wait in host memory between its passes."""
    fetches: bool = False
    """It copies those of the layer below back, for the next backward pass."""
    type: LayerType = LayerType()


def usual_kind(plan: Plan) -> LayerKind:
    """Of the layers that a plan recomputes."""
    if plan.recompute == "full":
        return LayerKind(("layer",))
    given = plan.recomputed_modules
    return LayerKind(tuple([name for name in MODULES if name in given]) if given else ())


@lru_cache(maxsize=1024)
def kinds_of(model: Model, plan: Plan, layers: range) -> Sequence[tuple[LayerKind, int]]:
    """Some layers of a model in a row by kind."""
    return layer_kinds(plan, model.each_type[layers.start : layers.stop])


def layer_kinds(plan: Plan, types: Sequence[LayerType]) -> list[tuple[LayerKind, int]]:
    """The kinds of the layers of a chunk in order, each with how many of it follow each other, by their `types`.

    With `recompute_layers` = n the first n layers of a chunk are recomputed (block), or all in units of n layers, the
    last of which may be smaller (uniform), as Megatron-Core's `TransformerBlock` does. Where the first layers
    are offloaded, the one above them fetches the first that comes back.
    """
    kind, own, away, layers = usual_kind(plan), plan.recompute_layers, plan.cpu_offload_layers, len(types)
    if away:
        gone = kind._replace(leaves=True)
        found = [(gone, 1), (gone._replace(fetches=True), away - 1)]
        found += [(kind._replace(fetches=True), 1), (kind, layers - away - 1)]
    elif own is None or not kind.recomputed:
        found = [(kind, layers)]
    elif plan.recompute_method == "block":
        found = [(kind, min(own, layers)), (LayerKind(), layers - own)]
    else:
        found = [(kind._replace(layers=own), layers // own), (kind._replace(layers=layers % own), 1)]
    return list(_by_type([(kind, count) for kind, count in found if count > 0 and kind.layers > 0], types))


def _by_type(kinds: Sequence[tuple[LayerKind, int]], types: Sequence[LayerType]) -> Iterator[tuple[LayerKind, int]]:
    """Layers of a unit are of one type."""
    place = 0
    for kind, count in kinds:
        for own, alike in groupby(types[place : place + count * kind.layers : kind.layers]):
            yield kind._replace(type=own), sum(1 for _ in alike)
        place += count * kind.layers


@dataclass(frozen=True, slots=True)
class Recomputed:
    """Operators that run again together."""

    operators: frozenset[str]
    discards: bool
    """Nobody keeps their results."""
    before: frozenset[str]
    """Operators of which the first to get the gradient of its output waits for it."""


def recomputed(operators: Sequence[Operator], kind: LayerKind) -> tuple[Recomputed, ...]:
    """What runs again in the backward pass of a layer. Before the same gradient discarded results come first, the last
    of them before the others, as their hooks are run; then whole modules.
    """
    found: list[tuple[int, Recomputed]] = []
    for module in kind.recomputed:
        for first, end, own in _runs(operators, MODULES[module]):
            names = frozenset(op.name for op in own)
            if any(names <= other.operators for _, other in found):
                continue
            discards = module in DISCARDED
            last = own[-1]
            if discards:
                last = _end_of_core(operators, end) if module == "mla_up_proj" else _end_of_readers(operators, end, own)
            found.append((-first if discards else len(operators), Recomputed(names, discards, names | {last.name})))
    return tuple(own for _, own in sorted(found, key=lambda item: item[0]))


class _Run(NamedTuple):
    """Operators in a row that are inside a module; what reads nothing of theirs may stand between them."""

    first: int
    end: int
    """The place behind the last."""
    own: tuple[Operator, ...]


def _runs(operators: Sequence[Operator], inside: Callable[[Operator], bool]) -> Iterator[_Run]:
    run: _Run | None = None
    made: set[str] = set()
    for place, op in enumerate(operators):
        if inside(op):
            run = _Run(run.first if run else place, place + 1, (*(run.own if run else ()), op))
            made.update(operand.tensor.name for operand in op.outputs)
        elif run and not made.isdisjoint(operand.tensor.name for operand in op.inputs):
            yield run
            run, made = None, set()
    if run:
        yield run


def _end_of_readers(operators: Sequence[Operator], place: int, own: Sequence[Operator]) -> Operator:
    """The end of the sublayer behind a place, or of a later one that reads what some operators make, too."""
    made = {output.tensor.name for op in own for output in op.outputs}
    last = _end_of_sublayer(operators, place)
    read = [at for at, op in enumerate(operators) if not made.isdisjoint(x.tensor.name for x in op.handed_over)]
    return _end_of_sublayer(operators, read[-1]) if read and read[-1] > operators.index(last) else last


def _end_of_sublayer(operators: Sequence[Operator], place: int) -> Operator:
    """The last operator before the next one that adds to the residual stream."""
    behind = enumerate(operators[place:], place)
    added = (index for index, op in behind if op.passthrough and len(op.activations) > 1)
    return operators[next(added, len(operators)) - 1]


def _end_of_core(operators: Sequence[Operator], place: int) -> Operator:
    """The last operator of core attention behind a place."""
    return [op for op in operators[place:] if op.mixes_positions][-1]


def needed(operators: Sequence[Operator]) -> int:
    """How many of some operators in a row have to run for all that their backward passes read: one that keeps only what
    it reads itself need not.
    """
    for place in reversed(range(len(operators))):
        saved = set(operators[place].saves)
        if saved:
            return place + (not saved.isdisjoint(output.tensor.name for output in operators[place].outputs))
    return 0
