"""From the recorded calls of a forward pass to a graph of operators with dimensions.

Views move dimensions about and cost nothing. Every other operator that reads an activation becomes a node;
what depends on no activation (masks, position tables) is a constant. An operator without a rule here cannot be
split over GPUs, and is named.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from spsim.errors import InputError
from spsim.program.operators import TensorKind
from spsim.pytorch.modules.costs import ATTENTION, PRODUCTS, SOFTMAX, kernel_of, operator_class
from spsim.pytorch.modules.dimensions import Dim, Dims, UnrelatedDimensionsError, fresh, leaves, unify
from spsim.pytorch.modules.graph import Base, Graph, Node, Use, View
from spsim.pytorch.modules.tape import ALLOCATIONS, Call, Tape
from spsim.pytorch.modules.views import VIEW_RULES, Views
from spsim.work import KernelClass

REDUCTIONS = frozenset({"mean", "sum", "amax", "amin", "var"})
COPIES = frozenset({"clone", "_to_copy"})
SUMS = frozenset({"add", "add_"})


def read_graph(tape: Tape) -> Graph:
    """The graph of a recorded module; `InputError` names the first operator that has no rule."""
    return _Reader(tape).read()


class _Reader:
    """The tensors so far, by how they view their storage."""

    def __init__(self, tape: Tape) -> None:
        self.tape = tape
        self.views = Views(tape)
        self.nodes: list[Node] = []
        self.sequences: list[Dim] = []
        self.heads: list[Dims] = []
        self.head_sizes: list[Dims] = []
        self.causal: set[bool] = set()
        self.names: set[str] = set()

    def read(self) -> Graph:
        """All calls, in order."""
        tape = self.tape
        given = list(zip(tape.inputs, tape.input_gradients, strict=True))
        entries = [value for value, gradient in given if gradient is not None]
        entries = entries or [value for value, _ in given if "float" in value.dtype]
        if not entries:
            raise InputError(f"{tape.name}: has no floating-point input, and {_advice(tape)}")
        if len(entries) != 1 or len(tape.outputs) != 1:
            raise InputError(
                f"{tape.name}: has {len(entries)} floating-point inputs and {len(tape.outputs)} outputs; only a module "
                "of one of each is split over GPUs (inputs without a gradient beside one that needs it do not count)"
            )
        entry = self.views.add(entries[0], "input", [fresh(size) for size in entries[0].shape])
        for call in tape.forward:
            try:
                self._read(call)
            except UnrelatedDimensionsError as reason:
                raise _cannot(call, f"its dimensions cannot be followed ({reason})") from None
        leaving = self.views.known(tape.outputs[0])
        if leaving is None or leaving.base.kind != "activation":
            raise InputError(f"{tape.name}: its output does not depend on its input; there is nothing to split")
        if len(self.causal) > 1:
            raise InputError(f"{tape.name}: mixes causal and full attention; only one of them is split over GPUs")
        return Graph(
            entry, leaving, self.nodes, self.sequences, self.heads, self.head_sizes, self.views.selected,
            causal=True in self.causal,
        )  # fmt: skip

    def _read(self, call: Call) -> None:
        if call.op in ALLOCATIONS:
            return
        if call.view or call.op in VIEW_RULES:
            self.views.follow(call)
        elif any(value.elements for value in call.results) and any(map(self.views.is_activation, call.tensors)):
            for value in call.written:
                if not self.views.is_whole(value):
                    raise _cannot(call, "it writes into a part of a tensor")
            before = [(value, self.views.known(value)) for value in call.written]
            self._rule(call)(call)
            for value, view in before:
                self.views.renew(value, view)

    def _rule(self, call: Call) -> Callable[[Call], None]:
        if call.op in PRODUCTS:
            return self._product
        if call.op.startswith(ATTENTION) and not call.op.endswith("math"):
            return self._attention
        if call.op in ("native_layer_norm", "rms_norm"):
            return self._norm
        if call.op in SOFTMAX:
            return self._softmax
        if call.op in REDUCTIONS:
            return self._reduction
        if call.op == "cat":
            return self._concatenation
        if call.pointwise or call.op in COPIES or call.op == "native_dropout":
            return self._pointwise
        raise _cannot(call, "it has no rule")

    # Nodes

    def _node(
        self,
        call: Call,
        inputs: Sequence[Use],
        outputs: Sequence[Base],
        *,
        mixes: Dims = (),
        owns: Sequence[Base] = (),
        passthrough: Sequence[Base] = (),
        contracts: Dims = (),
        produces: Dims = (),
    ) -> None:
        kept = self.tape.saved.get(call.node, ()) if call.node is not None else ()
        saved = [view.base for view in map(self.views.known, kept) if view is not None]
        own = {use.base for use in inputs} | set(outputs)
        kind: KernelClass = operator_class(call)
        self.nodes.append(
            Node(
                self._unique(call.name), kind, list(inputs), [Use(base) for base in outputs], list(mixes),
                [base for base in dict.fromkeys(saved) if base in own and base.kind not in ("weight", "constant")],
                list(owns), list(passthrough), contracts, produces, kernel_of(call)[0],
            )
        )  # fmt: skip

    def _unique(self, name: str) -> str:
        number, found = 1, name
        while found in self.names:
            number += 1
            found = f"{name} {number}"
        self.names.add(found)
        return found

    def _result(self, call: Call, dims: Sequence[Dims], index: int = 0, kind: TensorKind = "activation") -> Base:
        suffix = {"activation": "output", "norm statistics": f"statistics {index}"}.get(kind, kind)
        return self.views.add(call.results[index], f"{call.name} {suffix}", dims, kind).base

    # Rules

    def _product(self, call: Call) -> None:
        left, right = (self.views.of(call.arguments[name]) for name in PRODUCTS[call.op])
        if call.op == "baddbmm":
            raise _cannot(call, "it has no rule")
        if right.base.kind == "weight" and left.base.kind == "activation":
            self._linear(call, left, right)
        elif left.base.kind == right.base.kind == "activation":
            self._product_of_activations(call, left, right)
        else:
            raise _cannot(call, "it multiplies an activation with something that is neither a parameter nor one")

    def _linear(self, call: Call, x: View, weight: View) -> None:
        unify(x.dims[-1], weight.dims[0])
        uses = [Use(x.base), Use(weight.base)]
        if call.op == "addmm":
            bias = self.views.of(call.arguments["self"])
            unify(bias.dims[-1], weight.dims[1])
            uses.append(Use(bias.base))
        out = self._result(call, [x.dims[0], weight.dims[1]])
        self._node(call, uses, [out], owns=[x.base], contracts=weight.dims[0], produces=weight.dims[1])

    def _product_of_activations(self, call: Call, left: View, right: View) -> None:
        """Scores, where both sides have the same positions; or values, weighted by the scores of the keys."""
        batch = left.dims[:-2]
        for mine, other in zip(batch, right.dims[:-2], strict=True):
            unify(mine, other)
        rows, columns, inner = left.dims[-2], right.dims[-1], right.dims[-2]
        keys: dict[Dim, Dim] = {}
        shared = [leaf for leaf in leaves(columns) if leaf in leaves(rows)]
        if shared:
            unify(left.dims[-1], inner)
            self._attends(batch, rows, inner)
            keys = {leaf: leaf.as_key for leaf in shared}
            columns = tuple(keys.get(leaf, leaf) for leaf in leaves(columns))
        elif [leaf.as_key for leaf in leaves(inner) if leaf.key is not None] == list(leaves(left.dims[-1])) != []:
            keys = {leaf: leaf.as_key for leaf in leaves(inner)}
            self.head_sizes.append(columns)
        else:
            unify(left.dims[-1], inner)
        out = self._result(call, [*batch, rows, columns])
        self._node(call, [Use(left.base), Use(right.base, keys)], [out], owns=[right.base] if keys else [])

    def _attends(self, batch: Sequence[Dims], positions: Dims, head_size: Dims) -> None:
        self.sequences += leaves(positions)
        self.heads.append(tuple(dim for dims in batch for dim in dims))
        self.head_sizes.append(head_size)

    def _attention(self, call: Call) -> None:
        query, key, value = (self.views.of(call.arguments[name]) for name in ("query", "key", "value"))
        for mine, other in zip(key.dims, value.dims, strict=True):
            unify(mine, other)
        unify(query.dims[0], key.dims[0])
        unify(query.dims[3], key.dims[3])
        heads, kv_heads = (call.arguments[name].shape[1] for name in ("query", "key"))
        if kv_heads == 1 < heads:
            raise _cannot(call, "one head of keys serves all heads of queries")
        if heads == kv_heads:
            unify(query.dims[1], key.dims[1])
        positions = leaves(query.dims[2])
        if positions != leaves(key.dims[2]):
            raise _cannot(call, "its keys are not at the positions of its queries")
        self._attends(query.dims[:2], query.dims[2], query.dims[3])
        if heads != kv_heads:
            self.heads.append(key.dims[1])
        self.causal.add(bool(call.arguments.get("is_causal", False)))
        keys = {leaf: leaf.as_key for leaf in positions}
        extra = [self.views.of(v) for v in call.tensors[3:]]
        out = self._result(call, query.dims)
        statistics = self._result(call, query.dims[:3], 1, "log-sum-exp")
        uses = [Use(query.base), Use(key.base, keys), Use(value.base, keys)]
        self._node(
            call, [*uses, *(Use(view.base) for view in extra)], [out, statistics],
            mixes=(*keys.values(), *query.dims[3]), owns=[key.base, value.base],
        )  # fmt: skip

    def _norm(self, call: Call) -> None:
        x = self.views.of(call.arguments["x" if call.op == "rms_norm" else "input"])
        count = len(call.arguments["shape" if call.op == "rms_norm" else "normalized_shape"])
        weights = [self.views.of(value) for value in call.tensors[1:]]
        for weight in weights:
            for mine, other in zip(x.dims[-count:], weight.dims, strict=True):
                unify(mine, other)
        out = self._result(call, x.dims)
        rows = [*x.dims[:-count], *[()] * count]
        statistics = [self._result(call, rows, 1 + i, "norm statistics") for i in range(len(call.results) - 1)]
        mixed = tuple(dim for dims in x.dims[-count:] for dim in dims)
        self._node(call, [Use(x.base), *(Use(w.base) for w in weights)], [out, *statistics], mixes=mixed)

    def _softmax(self, call: Call) -> None:
        x = self.views.of(call.arguments["self"])
        self._node(call, [Use(x.base)], [self._result(call, x.dims)], mixes=x.dims[call.arguments["dim"]])

    def _reduction(self, call: Call) -> None:
        x = self.views.of(call.arguments["self"])
        axes = call.arguments.get("dim")
        axes = range(len(x.dims)) if axes is None else [axes] if isinstance(axes, int) else axes
        reduced = {axis % len(x.dims) for axis in axes} if len(x.dims) else set()
        keep = len(call.results[0].shape) == len(x.dims)
        rows = [() if axis in reduced else dims for axis, dims in enumerate(x.dims) if keep or axis not in reduced]
        mixed = tuple(dim for axis in sorted(reduced) for dim in x.dims[axis])
        self._node(call, [Use(x.base)], [self._result(call, rows)], mixes=mixed)

    def _concatenation(self, call: Call) -> None:
        """Equal parts stand side by side along a dimension of their own; unequal ones become one new dimension. Parts
        that hold nothing add nothing, and one part alone is copied.
        """
        values = [value for value in call.arguments["tensors"] if value.elements]
        parts = [self.views.of(value) for value in values]
        if len(parts) == 1:
            self._node(call, [Use(parts[0].base)], [self._result(call, parts[0].dims)], passthrough=[parts[0].base])
            return
        axis = call.arguments.get("dim", 0) % len(parts[0].dims)
        equal = len({value.shape[axis] for value in values}) == 1
        for part in parts[1:]:
            for index, (mine, other) in enumerate(zip(parts[0].dims, part.dims, strict=True)):
                if index != axis or equal:
                    unify(mine, other)
        dims = list(parts[0].dims)
        dims[axis] = (*fresh(len(parts)), *dims[axis]) if equal else fresh(call.results[0].shape[axis])
        mixed = () if equal else tuple(dim for part in parts for dim in part.dims[axis])
        self._node(call, [Use(part.base) for part in parts], [self._result(call, dims)], mixes=mixed)

    def _pointwise(self, call: Call) -> None:
        shape = call.results[0].shape
        views = [self.views.of(value) for value in call.tensors]
        dims: list[Dims] = [()] * len(shape)
        for view in views:
            offset = len(shape) - len(view.dims)
            for axis, own in enumerate(view.dims, start=offset):
                if own and dims[axis]:
                    unify(dims[axis], own)
                dims[axis] = dims[axis] or own
        whole = [view.base for value, view in zip(call.tensors, views, strict=True) if value.shape == shape]
        passes = call.op in COPIES or (call.op in SUMS and call.arguments.get("alpha", 1) == 1)
        out = [self._result(call, dims)]
        if call.op == "native_dropout":
            out.append(self._result(call, dims, 1, "mask"))
        passthrough = [base for base in whole if passes and base.kind == "activation"]
        self._node(call, [Use(view.base) for view in views], out, passthrough=passthrough)


def _advice(tape: Tape) -> str:
    """What to trace of a module that takes token ids: one of its layers, by the first module with a number."""
    numbered = (re.match(r"(.*?\.)?\d+(?=\.|$)", call.module) for call in tape.forward)
    layer = next((f" ({found[0]} of it)" for found in numbered if found), "")
    return (
        f"a plan splits what runs on hidden states, not on token ids; trace one decoder layer{layer} on hidden states "
        "that need a gradient, or the module on such inputs_embeds, or simulate it on one GPU"
    )


def _cannot(call: Call, reason: str) -> InputError:
    shapes = ", ".join(str(list(value.shape)) for value in call.tensors)
    return InputError(
        f"{call.name} of {shapes}: cannot be split over GPUs: {reason}; simulate the module on one GPU, or trace its "
        "parts that are linears, norms, attention and elementwise operators"
    )
