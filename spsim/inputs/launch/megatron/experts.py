"""Arguments of Megatron-LM for experts (`megatron/core/transformer/moe`), both ways.

Without `--num-experts` the others say nothing. Experts are as wide as the dense MLP and two of them are picked for each
token unless said otherwise; they are split over tp as all else is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from spsim.inputs.launch.draft import Draft
from spsim.inputs.launch.megatron.patterns import layers_of, list_of
from spsim.inputs.launch.options import Options

if TYPE_CHECKING:
    from spsim.inputs.model import Model
    from spsim.inputs.plan import Plan

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
    sparse = layers_of(options, "moe_layer_freq", model.get("layers"), lambda layer, every: layer % every == 0)
    if not all(sparse):
        model["mlp_layer_types"] = ["sparse" if own else "dense" for own in sparse]
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
    elif options.flag("moe_pad_expert_input_to_capacity"):
        factor = options.take("moe_expert_capacity_factor")
        if isinstance(factor, bool) or not isinstance(factor, int | float):
            raise options.wrong("moe_expert_capacity_factor", "a number such as 1.5")
        if factor > 0:
            draft.plan["moe_capacity_factor"] = float(factor)
    for name, (value, text) in _USUAL.items():
        if name not in options:
            options.aside.append(f"{options.where}: --{name.replace('_', '-')} is missing: {text}")
        options.leave(name, (value,))
    options.leave("moe_router_fusion", (True,))


def expert_arguments(model: Model, plan: Plan) -> dict[str, Any]:
    """Names and values; none for a dense model."""
    if model.experts is None:
        return {}
    sparse = [not model.type_of(layer).dense for layer in range(model.layers)]
    return {
        "num_experts": model.experts,
        "moe_router_topk": model.experts_per_token,
        "moe_ffn_hidden_size": model.expert_ffn_hidden,
        "moe_shared_expert_intermediate_size": model.shared_ffn_hidden or None,
        "moe_layer_freq": None if all(sparse) else list_of(sparse),
        "expert_model_parallel_size": plan.ep if plan.ep > 1 else None,
        "expert_tensor_parallel_size": plan.expert_tp if plan.expert_tp != plan.tp else None,
        **_dispatcher(plan),
        "moe_expert_capacity_factor": plan.moe_capacity_factor,
        "moe_pad_expert_input_to_capacity": plan.moe_capacity_factor is not None,
        "moe_grouped_gemm": True,
        "moe_permute_fusion": True,
        "moe_router_fusion": True,
        "moe_router_dtype": "fp32",
    }


def _dispatcher(plan: Plan) -> dict[str, str]:
    if plan.moe_dispatcher in ("alltoall", "allgather"):
        return {"moe_token_dispatcher_type": plan.moe_dispatcher}
    return {"moe_token_dispatcher_type": "flex", "moe_flex_dispatcher_backend": plan.moe_dispatcher}
