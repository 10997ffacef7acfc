"""Arguments of Megatron-LM that say of each layer whether it is of a sort: a number, or a list such as
`([0]*3+[1]*58)` (`moe_freq_type`).
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

from spsim.inputs.launch.options import Options

MOST_LAYERS = 10_000


def layers_of(options: Options, name: str, layers: int | None, of_number: Callable[[int, int], bool]) -> list[bool]:
    """Whether each layer is of the sort, all where nothing is said, or of no model how many layers; `of_number` tells
    it of a layer, from 0, and a number.
    """
    value = options.take(name)
    if value is None or layers is None or layers > MOST_LAYERS:
        return [True]
    found = value if isinstance(value, int) else _evaluated(str(value))
    if isinstance(found, int) and not isinstance(found, bool) and found > 0:
        return [of_number(layer, found) for layer in range(layers)]
    if not isinstance(found, list) or len(found) != layers or not {*found} <= {0, 1}:
        raise options.wrong(name, f"a number, or a list such as [0]*1+[1]*{layers - 1} of {layers} layers")
    return [bool(own) for own in found]


def list_of(layers: Sequence[bool]) -> str:
    """The list as an argument has it."""
    return "+".join(f"[{int(own)}]*{len([*run])}" for own, run in groupby(layers))


def _evaluated(text: str) -> Any:
    """The value of a sum and product of lists and numbers; None of anything else."""
    try:
        return _value(ast.parse(text.strip("'\" "), mode="eval").body)
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        return None


def _value(node: ast.expr) -> Any:
    match node:
        case ast.Constant(int(number)) if 0 <= number <= MOST_LAYERS:
            return number
        case ast.List(elements) if len(elements) <= MOST_LAYERS:
            return [_value(element) for element in elements]
        case ast.BinOp(left, ast.Add(), right):
            return _value(left) + _value(right)
        case ast.BinOp(left, ast.Mult(), right):
            one, other = _value(left), _value(right)
            count, size = (len(own) if isinstance(own, list) else own for own in (one, other))
            if count * size <= MOST_LAYERS:
                return one * other
    raise ValueError
