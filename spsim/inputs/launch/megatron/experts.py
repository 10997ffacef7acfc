"""Arguments of Megatron-LM for experts (`megatron/core/transformer/moe`), both ways.

Without `--num-experts` the others say nothing. Experts are as wide as the dense MLP and two of them are picked for each
token unless said otherwise; they are split over tp as all else is.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from spsim.inputs.launch.draft import Draft
from spsim.inputs.launch.options import Options

if TYPE_CHECKING:
    from spsim.inputs.model import Model
    from spsim.inputs.plan import Plan

MOST_LAYERS = 10_000
_USUAL = {
    "moe_grouped_gemm": (True, "products of experts are simulated as grouped"),
    "moe_permute_fusion": (True, "simulated as a fused kernel"),
    "moe_router_dtype": ("fp32", "the router is simulated in fp32"),
}
"""Arguments that are simulated whether they are given or not, with that value -> what is said where they are not."""


def read_experts(options: Options, draft: Draft) -> None:
    """Experts of the model and how they are spread."""
    count = options.number("num_experts", 0, least=0)
    spread = options.number("expert_model_parallel_size", 1)
    sharing = options.number("expert_tensor_parallel_size", None)
    own = [name for name in options.items if name.startswith("moe_")]
    if not count:
        if spread > 1:
            raise options.wrong("expert_model_parallel_size", "1 without --num-experts")
        for name in own:
            options.ignore(name)
        return
    model, plan = draft.model, draft.plan
    model |= {"experts": count, "experts_per_token": options.number("moe_router_topk", 2)}
    for name, field in (("moe_ffn_hidden_size", "expert_ffn_hidden"),
                        ("moe_shared_expert_intermediate_size", "shared_ffn_hidden")):  # fmt: skip
        width = options.number(name, None)
        if width is not None:
            model[field] = width
    if (first := _dense_layers(options, model.get("layers"))) > 0:
        model["dense_layers"] = first
    if spread > 1:
        plan["ep"] = spread
    if sharing is not None and sharing != plan.get("tp", 1):
        plan["expert_tp"] = sharing
    _read_dispatch(options, draft)


def _read_dispatch(options: Options, draft: Draft) -> None:
    """How tokens get to experts, and the kernels on the way."""
    kinds = {"allgather": "allgather", "alltoall": "alltoall", "flex": None}
    backends = {"deepep": "deepep", "hybridep": "hybridep"}
    kind = options.choice("moe_token_dispatcher_type", kinds, "allgather")
    if kind is None:
        options.leave("moe_enable_deepep", (True,))
        kind = options.choice("moe_flex_dispatcher_backend", backends, "deepep")
    if draft.plan.get("ep", 1) > 1 and kind != "alltoall":
        draft.plan["moe_dispatcher"] = kind
    fused = options.items.get("use_transformer_engine_op_fuser")
    if draft.workload.get("precision") == "mxfp8" and draft.model.get("gated_mlp") and fused is not None:
        draft.plan["fused_grouped_mlp"] = options.flag("use_transformer_engine_op_fuser")
    if "moe_expert_capacity_factor" not in options:
        options.ignore("moe_pad_expert_input_to_capacity")
    for name, (value, text) in _USUAL.items():
        if name not in options:
            options.aside.append(f"{options.where}: --{name.replace('_', '-')} is missing: {text}")
        options.leave(name, (value,))
    options.leave("moe_router_fusion", (True,))


def _dense_layers(options: Options, layers: int | None) -> int:
    """First layers without experts; all others must have them."""
    name = "moe_layer_freq"
    value = options.take(name, 1)
    pattern = value if isinstance(value, int) else _pattern(str(value))
    if isinstance(pattern, int) and pattern > 0 and layers is not None:
        pattern = [int(layer % pattern == 0) for layer in range(layers)]
    if not isinstance(pattern, list) or not {*pattern} <= {0, 1} or (layers is not None and len(pattern) != layers):
        if name not in options or layers is None:
            return 0
        raise options.wrong(name, f"a number, or a list such as [0]*1+[1]*{layers - 1} of {layers} layers")
    first = pattern.index(1) if 1 in pattern else len(pattern)
    if 0 in pattern[first:]:
        raise options.refuse(name, "dense layers behind layers with experts are not simulated yet")
    return first


def _pattern(text: str) -> Any:
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
            found = _value(left) + _value(right)
        case ast.BinOp(left, ast.Mult(), right):
            one, other = _value(left), _value(right)
            count, size = (len(own) if isinstance(own, list) else own for own in (one, other))
            if count * size > MOST_LAYERS:
                raise ValueError
            found = one * other
        case _:
            raise ValueError
    return found


def expert_arguments(model: Model, plan: Plan) -> dict[str, Any]:
    """Names and values; none for a dense model."""
    if model.experts is None:
        return {}
    return {
        "num_experts": model.experts,
        "moe_router_topk": model.experts_per_token,
        "moe_ffn_hidden_size": model.expert_ffn_hidden,
        "moe_shared_expert_intermediate_size": model.shared_ffn_hidden or None,
        **dict(_layer_frequency(model)),
        "expert_model_parallel_size": plan.ep if plan.ep > 1 else None,
        "expert_tensor_parallel_size": plan.expert_tp if plan.expert_tp != plan.tp else None,
        **_dispatcher(plan),
        "moe_grouped_gemm": True,
        "moe_permute_fusion": True,
        "moe_router_fusion": True,
        "moe_router_dtype": "fp32",
    }


def _dispatcher(plan: Plan) -> dict[str, str]:
    if plan.moe_dispatcher in ("alltoall", "allgather"):
        return {"moe_token_dispatcher_type": plan.moe_dispatcher}
    return {"moe_token_dispatcher_type": "flex", "moe_flex_dispatcher_backend": plan.moe_dispatcher}


def _layer_frequency(model: Model) -> Iterator[tuple[str, str]]:
    if model.dense_layers:
        yield "moe_layer_freq", f"[0]*{model.dense_layers}+[1]*{model.layers - model.dense_layers}"
