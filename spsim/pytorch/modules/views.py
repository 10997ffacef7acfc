"""Which tensor, and which of its dimensions, every view of a storage shows."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from spsim.program.operators import TensorKind
from spsim.pytorch.modules.dimensions import Dim, Dims, UnrelatedDimensionsError, fresh, leaves, regroup, size_of
from spsim.pytorch.modules.graph import Base, Piece, View
from spsim.pytorch.modules.tape import Call, Tape, Value

Key = tuple[int, tuple[int, ...], tuple[int, ...], int]


class Views:
    """The views that are known; the latest tensor written to a storage is the one that its views show."""

    def __init__(self, tape: Tape) -> None:
        self.tape = tape
        self.selected: list[Dim] = []
        self._views: dict[Key, View] = {}

    @staticmethod
    def _key(value: Value) -> Key:
        return value.storage, value.shape, value.stride, value.offset

    def known(self, value: Value) -> View | None:
        """The view, if anything is known of it."""
        return self._views.get(self._key(value))

    def is_activation(self, value: Value) -> bool:
        """Whether it depends on the input of the module."""
        view = self.known(value)
        return view is not None and view.base.kind == "activation"

    def of(self, value: Value) -> View:
        """The view; a parameter or a constant at its first use."""
        view = self.known(value)
        if view is None:
            name = self.tape.parameters.get(value.storage, f"constant {value.storage}")
            weight = value.storage in self.tape.parameters and value.storage not in self.tape.buffers
            dims = [() if step == 0 else fresh(n) for n, step in zip(value.shape, value.stride, strict=True)]
            view = self.add(value, name, dims, "weight" if weight else "constant")
        return view

    def add(self, value: Value, name: str, dims: Sequence[Dims], kind: TensorKind = "activation") -> View:
        """A new tensor; its dimensions in the order of the value."""
        base = Base(name, tuple(dim for group in dims for dim in group), value.itemsize, kind)
        view = View(base, tuple(dims))
        self._views[self._key(value)] = view
        return view

    def is_whole(self, value: Value) -> bool:
        """Whether it shows all of its storage, and no part of that was taken before."""
        view = self.known(value)
        return value.bytes == self.tape.storages[value.storage] and (view is None or not view.base.pieces)

    def renew(self, value: Value, before: View | None) -> None:
        """What a storage held was written in place: all views of it show the new tensor."""
        now = self.known(value)
        for key, view in list(self._views.items()):
            if now is not None and before is not None and key[0] == value.storage and view.base is before.base:
                self._views[key] = View(now.base, view.dims)

    def follow(self, call: Call) -> None:
        """The results of a view, where its operand is an activation or a parameter."""
        source = call.tensors[0]
        if self.known(source) is None and source.storage not in self.tape.parameters:
            return
        view = self.of(source)
        for index, result in enumerate(call.results):
            if result.elements == 0:
                continue  # a part that holds nothing is nobody's
            rule = VIEW_RULES.get(call.op)
            if rule is None:
                raise UnrelatedDimensionsError("a view without a rule")
            self._views[self._key(result)] = rule(self, call, view, index)

    def piece(self, view: View, axis: int, start: int, length: int, *, equal: bool = True) -> View:
        """A part of a tensor along one axis of a view; `equal` where it is one of equal parts, side by side."""
        total = size_of(leaves(view.dims[axis]))
        if length == total:
            return view
        along, remains, index = _cut(view.dims[axis], start, length, equal)
        dims = (*view.dims[:axis], remains, *view.dims[axis + 1 :])
        inside = leaves(view.base.dims)
        if along not in inside:
            return View(view.base, dims)
        self.selected.append(along)
        for known in view.base.pieces:
            if known.along.root is along and known.start == index:
                return View(known.base, dims)
        position = inside.index(along)
        replaced = () if equal else remains
        own = (*inside[:position], *replaced, *inside[position + 1 :])
        base = Base(f"{view.base.name} [{start}:{start + length}]", own, view.base.itemsize, view.base.kind)
        if view.base.kind == "activation":
            view.base.pieces.append(Piece(view.base, along, replaced, index, base))
        return View(base, dims)


def _cut(dims: Dims, start: int, length: int, equal: bool) -> tuple[Dim, Dims, int]:
    """(dimension that is selected from, what remains of the axis, position): one of equal parts, or a range."""
    if equal:
        outer, inner = regroup([dims], [size_of(leaves(dims)) // length, length])
        if len(outer) != 1:
            raise UnrelatedDimensionsError("a part of a dimension that is cut into factors")
        return leaves(outer)[0], inner, start // length
    found = leaves(dims)
    if len(found) != 1:
        raise UnrelatedDimensionsError("a part of a dimension that is cut into factors")
    return found[0], fresh(length), start


# One rule per view: (views, call, view of the operand, index of the result) -> view of the result


def _same(_: Views, call: Call, view: View, index: int) -> View:
    return view


def _reshape(_: Views, call: Call, view: View, index: int) -> View:
    return View(view.base, tuple(regroup(view.dims, call.results[0].shape)))


def _permute(_: Views, call: Call, view: View, index: int) -> View:
    order = list(range(len(view.dims)))
    if call.op == "permute":
        order = [axis % len(order) for axis in call.arguments["dims"]]
    else:
        one, other = (0, -1) if call.op == "t" else (call.arguments["dim0"], call.arguments["dim1"])
        order[one], order[other] = order[other], order[one]
    return View(view.base, tuple(view.dims[axis] for axis in order))


def _unsqueeze(_: Views, call: Call, view: View, index: int) -> View:
    axis = call.arguments["dim"] % (len(view.dims) + 1)
    return View(view.base, (*view.dims[:axis], (), *view.dims[axis:]))


def _squeeze(_: Views, call: Call, view: View, index: int) -> View:
    axes = call.arguments.get("dim", range(len(view.dims)))
    dropped = {axis % len(view.dims) for axis in ([axes] if isinstance(axes, int) else axes)}
    return View(view.base, tuple(d for axis, d in enumerate(view.dims) if axis not in dropped or leaves(d)))


def _expand(_: Views, call: Call, view: View, index: int) -> View:
    """A repeated dimension belongs to the view alone."""
    shape = call.results[0].shape
    padded = (*[()] * (len(shape) - len(view.dims)), *view.dims)
    return View(view.base, tuple(own or fresh(size) for own, size in zip(padded, shape, strict=True)))


def _select(views: Views, call: Call, view: View, index: int) -> View:
    axis = call.arguments.get("dim", 0) % len(view.dims)
    total = call.tensors[0].shape[axis]
    part = views.piece(view, axis, call.arguments["index"] % total, 1)
    return View(part.base, (*part.dims[:axis], *part.dims[axis + 1 :]))


def _slice(views: Views, call: Call, view: View, index: int) -> View:
    axis = call.arguments.get("dim", 0) % len(view.dims)
    total, length = call.tensors[0].shape[axis], call.results[0].shape[axis]
    if call.arguments.get("step", 1) != 1:
        raise UnrelatedDimensionsError("a slice with a step")
    start = call.arguments.get("start") or 0
    start += total if start < 0 else 0
    return views.piece(view, axis, start, length, equal=total % length == 0 and start % length == 0)


def _split(views: Views, call: Call, view: View, index: int) -> View:
    axis = call.arguments.get("dim", 0) % len(view.dims)
    lengths = [result.shape[axis] for result in call.results]
    return views.piece(view, axis, sum(lengths[:index]), lengths[index], equal=len(set(lengths)) == 1)


def _unbind(views: Views, call: Call, view: View, index: int) -> View:
    axis = call.arguments.get("dim", 0) % len(view.dims)
    part = views.piece(view, axis, index, 1)
    return View(part.base, (*part.dims[:axis], *part.dims[axis + 1 :]))


VIEW_RULES: dict[str, Callable[[Views, Call, View, int], View]] = {
    **dict.fromkeys(("view", "_unsafe_view", "_reshape_alias"), _reshape),
    **dict.fromkeys(("detach", "alias", "lift_fresh"), _same),
    **dict.fromkeys(("t", "transpose", "permute"), _permute),
    **dict.fromkeys(("split", "split_with_sizes"), _split),
    "unsqueeze": _unsqueeze, "squeeze": _squeeze, "expand": _expand, "select": _select, "slice": _slice,
    "unbind": _unbind,
}  # fmt: skip
