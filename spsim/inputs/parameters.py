"""Parameters of a model, as its checkpoint has them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from spsim.inputs.model import Model


def of_model(model: Model) -> int:
    """Of embeddings, layers, final norm and, unless it is the embedding, the head."""
    embeddings = model.vocab * model.hidden
    shared = model.tied_embeddings and model.head_rows == model.vocab
    head = (0 if shared else model.head_rows * model.hidden) + (model.head_rows if model.head_bias else 0)
    positions = model.max_positions * model.hidden if model.positions == "learned" else 0
    layers = sum(count * of_layer(model.of_type(own)) for own, count in model.types.items())
    return embeddings + positions + layers + of_prediction(model) + _of_norm(model, model.hidden) + head


def of_layer(model: Model) -> int:
    """Of one transformer layer, of experts if the model has any."""
    both = 2 if model.norms == "both" else 1
    norms = (2 * both - model.shared_norm) * _of_norm(model, model.hidden)
    width = model.ffn_hidden if model.experts is None else model.shared_ffn_hidden
    mlp = _of_mlp(model, width) if width else 0
    return norms + of_attention(model) + mlp + of_experts(model) + _of_router(model)


def of_attention(model: Model) -> int:
    """Of projections, norms of latents or of q and k, and sinks."""
    widths = model.heads * model.head_dim, model.kv_heads * model.head_dim
    biases = (sum(widths) + widths[1] if model.qkv_bias else 0) + (model.hidden if model.bias else 0)
    normed = widths if model.qk_norm_over == "heads" else (model.head_dim, model.head_dim)
    norms = sum(normed) if model.qk_norm else 0
    norms += sum(_of_norm(model, width) for width in model.latents)
    return of_projections(model) + biases + norms + (model.heads if model.attention_sinks else 0)


def of_projections(model: Model) -> int:
    """Of the matrices of attention."""
    out = model.heads * model.v_head_dim * model.hidden
    of_q = model.heads * model.head_dim
    if model.kv_lora_rank is None:
        return model.hidden * (of_q + 2 * model.kv_heads * model.head_dim) + out
    nope, rope = model.qk_nope_head_dim or 0, model.qk_rope_head_dim or 0
    down = model.hidden * (sum(model.latents) + rope)
    up = (model.q_lora_rank or model.hidden) * of_q
    return down + up + model.kv_lora_rank * model.heads * (nope + model.v_head_dim) + out


def of_experts(model: Model) -> int:
    """Of all experts of a layer."""
    if model.experts is None or model.expert_ffn_hidden is None:
        return 0
    return model.experts * _of_mlp(model, model.expert_ffn_hidden)


def of_prediction(model: Model) -> int:
    """Of multi-token prediction: a layer as the last one, a projection from 2h to h, and three norms."""
    if not model.mtp_layers:
        return 0
    layer = of_layer(model.of_type(model.type_of(model.layers - 1)))
    return layer + 2 * model.hidden**2 + 3 * _of_norm(model, model.hidden)


def _of_mlp(model: Model, width: int) -> int:
    columns = width * (2 if model.gated_mlp else 1)
    return model.hidden * (columns + width) + (columns + model.hidden if model.mlp_bias else 0)


def _of_router(model: Model) -> int:
    return (model.experts or 0) * (model.hidden + model.mlp_bias)


def _of_norm(model: Model, width: int) -> int:
    return width * (2 if model.norm_bias else 1)
