"""The weights of one layer: seeded whole, so that every plan has slices of the same."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import torch
from torch import Tensor

from spsim.inputs.model import Model
from spsim.program.blocks.head import is_tied


@dataclass(frozen=True, slots=True)
class WeightShape:
    """A whole weight, output dimensions first, and the dimension that tensor parallelism cuts."""

    sizes: tuple[int, ...]
    tp_dim: int | None = None
    scale: float = 0.1
    mean: float = 0.0

    def cut(self, whole: Tensor, rank: int, ranks: int) -> Tensor:
        """A rank's part; KV heads fewer than ranks are repeated."""
        if self.tp_dim is None:
            return whole
        size = whole.shape[self.tp_dim]
        return whole.narrow(self.tp_dim, rank * size // ranks, max(1, size // ranks))


def weight_shapes(model: Model) -> dict[str, WeightShape]:
    """By the simulator's names, which synchronisation of gradients refers to."""
    h, a, kv, d, f = model.hidden, model.heads, model.kv_heads, model.head_dim, model.ffn_hidden
    inner = (2, f) if model.gated_mlp else (f,)
    shapes = {
        "q_weight": WeightShape((a, d, h), 0, h**-0.5),
        "k_weight": WeightShape((kv, d, h), 0, h**-0.5),
        "v_weight": WeightShape((kv, d, h), 0, h**-0.5),
        "projection_weight": WeightShape((h, a, d), 1, (a * d) ** -0.5),
        "fc1_weight": WeightShape((*inner, h), len(inner) - 1, h**-0.5),
        "fc2_weight": WeightShape((h, f), 1, f**-0.5),
    }
    if model.qkv_bias:
        shapes |= {f"{name}_bias": WeightShape((n, d), 0) for name, n in (("q", a), ("k", kv), ("v", kv))}
    if model.bias:
        shapes |= {"fc1_bias": WeightShape(inner, len(inner) - 1)}
        shapes |= {f"{name}_bias": WeightShape((h,)) for name in ("residual1", "residual2")}
    if model.qk_norm:
        shapes |= {f"{name}_weight": WeightShape((d,), mean=1.0) for name in ("q_norm", "k_norm")}
    for norm in ("norm1", "norm2"):
        shapes[f"{norm}_weight"] = WeightShape((h,), mean=1.0)
        if model.norm == "layernorm":
            shapes[f"{norm}_bias"] = WeightShape((h,))
    return shapes


def embedding_shapes(model: Model, rows: int) -> dict[str, WeightShape]:
    """Of the embedding, its vocabulary padded to so many rows."""
    shapes = {"embedding_weight": WeightShape((rows, model.hidden), 0)}
    if model.positions == "learned":
        shapes["position_embedding_weight"] = WeightShape((model.max_positions, model.hidden))
    return shapes


def head_shapes(model: Model, rows: int) -> dict[str, WeightShape]:
    """Of final norm and output layer."""
    shapes = {"final_norm_weight": WeightShape((model.hidden,), mean=1.0)}
    if model.norm == "layernorm":
        shapes["final_norm_bias"] = WeightShape((model.hidden,))
    name = "embedding" if is_tied(model) else "output_layer"
    shapes[f"{name}_weight"] = WeightShape((rows, model.hidden), 0)
    if model.head_bias:
        shapes["output_layer_bias"] = WeightShape((rows,), 0)
    return shapes


def whole_weight(name: str, shape: WeightShape, seed: int, dtype: torch.dtype) -> Tensor:
    """Normal numbers that depend on the seed and the name alone."""
    generator = torch.Generator().manual_seed(seed + zlib.crc32(name.encode()))
    return torch.randn(shape.sizes, generator=generator).mul_(shape.scale).add_(shape.mean).to(dtype)
