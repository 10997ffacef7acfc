"""The rules among the traits of a model; `ValueError` names value, rule and fix."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from spsim.inputs.model import Model

GATED = ("swiglu", "geglu")


def check_traits(model: Model) -> None:
    """`ValueError` names the first rule that is broken."""
    for check in (_heads, _latents, _window, _experts, _prediction, _activation, _norms):
        check(model)


def _heads(model: Model) -> None:
    if model.kv_heads > model.heads or model.heads % model.kv_heads:
        raise ValueError(f"kv_heads {model.kv_heads} must divide heads {model.heads}; change one")


def _latents(model: Model) -> None:
    if model.kv_lora_rank is None:
        own = {name: getattr(model, name) for name in ("q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim")}
        if given := [name for name, value in own.items() if value is not None]:
            raise ValueError(f"{given[0]} = {own[given[0]]} needs kv_lora_rank, the latent of k and v; give both")
        if model.v_head_dim != model.head_dim:
            raise ValueError(
                f"v_head_dim = {model.v_head_dim} is not head_dim = {model.head_dim}: only heads of latent attention "
                "have two widths; leave it out, or give kv_lora_rank"
            )
        return
    if model.head_dim != (model.qk_nope_head_dim or 0) + (model.qk_rope_head_dim or 0):
        raise ValueError(
            f"head_dim = {model.head_dim} is not qk_nope_head_dim + qk_rope_head_dim = {model.qk_nope_head_dim} + "
            f"{model.qk_rope_head_dim}; leave it out"
        )
    for name, value, only in (
        ("kv_heads", model.kv_heads, model.heads), ("qk_norm", model.qk_norm, False),
        ("qkv_bias", model.qkv_bias, False), ("positions", model.positions, "rope"),
    ):  # fmt: skip
        if value != only:
            raise ValueError(f"{name} = {value!r} with kv_lora_rank: latent attention has {only!r}; leave it out")


def _window(model: Model) -> None:
    if model.sliding_window is not None and not model.causal:
        raise ValueError(f"sliding_window = {model.sliding_window} needs causal = true; leave it out")


def _experts(model: Model) -> None:
    if model.experts is None:
        own = ("dense_layers", "expert_ffn_hidden", "experts_per_token", "mlp_layer_types", "shared_ffn_hidden")
        given = [name for name in own if name in model.model_fields_set and getattr(model, name)]
        if given:
            raise ValueError(f"{given[0]} = {getattr(model, given[0])} needs experts; give how many, or leave it out")
        return
    if model.experts_per_token is None or model.experts_per_token > model.experts:
        raise ValueError(
            f"experts_per_token = {model.experts_per_token} with experts = {model.experts}; give 1 to {model.experts}"
        )
    if all(own.dense for own in model.types) or model.dense_layers >= model.layers:
        raise ValueError(
            f"dense_layers = {model.dense_layers} leaves none of layers = {model.layers} with experts; "
            "use fewer, or a model without experts"
        )


def _prediction(model: Model) -> None:
    for name, value, only in (("positions", model.positions, "rope"), ("head_rows", model.head_rows, model.vocab)):
        if model.mtp_layers and value != only:
            raise ValueError(f"mtp_layers = 1 needs {name} = {only!r}, got {value!r}; leave one out")


def _activation(model: Model) -> None:
    if (model.activation in GATED) != model.gated_mlp:
        raise ValueError(
            f"activation {model.activation!r} and gated_mlp = {model.gated_mlp} exclude each other; change one"
        )


def _norms(model: Model) -> None:
    if model.norm_bias and model.norm == "rmsnorm":
        raise ValueError("norm_bias = true with norm = 'rmsnorm', which has none; leave it out")
    if model.shared_norm and not (model.parallel_residual and model.norms == "pre"):
        raise ValueError("shared_norm = true needs parallel_residual and norms = 'pre'; leave it out")
    if model.parallel_residual and model.norms != "pre":
        raise ValueError(f"parallel_residual with norms = {model.norms!r}: not simulated; use norms = 'pre'")
    if model.norms != "pre" and (model.bias or model.mlp_bias):
        raise ValueError(f"norms = {model.norms!r} with biases of attention or MLP: not simulated; use bias = false")
    if model.qk_norm_over == "heads" and not model.qk_norm:
        raise ValueError("qk_norm_over = 'heads' needs qk_norm = true; leave it out")
