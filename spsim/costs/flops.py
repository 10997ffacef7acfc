"""FLOPs of a model by the published formulas, which count the full square of attention.

Narayanan et al. 2021 (arXiv:2104.04473, section 3) and Korthikanti et al. 2022, appendix A: a forward pass
of a layer is 24 s b h^2 + 4 s^2 b h for the GPT shape; backward twice that. Model FLOPs (MFU) leave out
what is recomputed, hardware FLOPs (HFU) count it. `causal` halves attention, which is what a causal flash
kernel computes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from spsim.inputs.documents import Documents
from spsim.inputs.model import Model
from spsim.inputs.parameters import of_projections
from spsim.inputs.workload import Workload, Workloads
from spsim.work import smaller


@dataclass(frozen=True, slots=True)
class LayerFlops:
    """FLOPs of one layer for one micro-batch, all ranks together."""

    linear: int
    """Of products with weights, those of the MLP included."""
    attention: int
    mlp: int

    @property
    def forward(self) -> int:
        """Forward pass."""
        return self.linear + self.attention

    def training(self) -> int:
        """Forward and backward, recomputation not counted."""
        return 3 * self.forward

    def executed(self, recomputed: Iterable[str]) -> int:
        """Forward, backward and the modules that are recomputed, by their names in `program.recompute`."""
        again = {"layer": self.forward, "core_attn": self.attention, "mlp": self.mlp}
        return self.training() + sum(again.get(module, 0) for module in recomputed)


def layer_flops(model: Model, workload: Workload | Workloads, *, causal: bool = False) -> LayerFlops:
    """FLOPs of one layer; `causal` counts the half of the square that a causal mask leaves."""
    tokens = workload.seq_len * workload.micro_batch
    of_scores, of_values = model.heads * model.head_dim, model.heads * model.v_head_dim
    width, router = model.ffn_hidden, 0
    if model.experts and model.experts_per_token and model.expert_ffn_hidden:
        width = model.experts_per_token * model.expert_ffn_hidden + model.shared_ffn_hidden
        router = model.hidden * model.experts
    of_mlp = model.hidden * width * (3 if model.gated_mlp else 2) + router
    matrices = of_projections(model) + of_mlp
    pairs = tokens * workload.seq_len
    if model.documents is not None:
        pairs = (
            workload.micro_batch
            * Documents(model.documents, model.sliding_window).of_queries(range(sum(model.documents))).twice_pairs
        )
    elif model.sliding_window is not None:
        pairs = workload.micro_batch * _twice_pairs(workload.seq_len, model.sliding_window)
    attention = 2 * (of_scores + of_values) * (pairs // 2 if causal and model.causal else pairs)
    return LayerFlops(2 * tokens * matrices, attention, 2 * tokens * of_mlp)


def prediction_flops(model: Model, workload: Workload | Workloads, *, causal: bool = False) -> LayerFlops:
    """FLOPs of multi-token prediction: its layer, as the last one, and the projection before it; its head apart."""
    layer = layer_flops(model.of_type(model.type_of(model.layers - 1)), workload, causal=causal)
    projection = 2 * workload.seq_len * workload.micro_batch * 2 * model.hidden**2
    return replace(layer, linear=layer.linear + projection)


def _twice_pairs(tokens: Any, window: int) -> Any:
    """Twice the pairs of a query and a key in its window, of sequences of so many tokens: w (2s - w + 1), or the square
    where the window is no shorter.
    """
    seen = smaller(window, tokens)
    return smaller(seen * (2 * tokens - seen + 1), tokens * tokens)


def serving_flops(model: Model, workload: Workload, *, causal: bool = False) -> int:
    """FLOPs of all layers in a step of inference, for one replica: tokens that pass see all in the cache, or, `causal`,
    those up to their own; under a window what it leaves.
    """
    total = 0
    for kind, layers in model.types.items():
        own = model.of_type(kind)
        for tokens, keys in workload.passages:
            flops = layer_flops(own, workload.model_copy(update={"seq_len": tokens}), causal=causal)
            before = keys - tokens if own.sliding_window is None else min(keys, own.sliding_window) - 1
            widths = 2 * own.heads * (own.head_dim + own.v_head_dim)
            past = 0 if own.sliding_window and tokens == keys else workload.micro_batch * tokens * before
            total += layers * (flops.forward + widths * past)
    return total


@dataclass(frozen=True, slots=True)
class HeadFlops:
    """FLOPs of the output layer for one micro-batch, all ranks together. It has no attention, so that both counts of
    a causal mask are the same, and nobody recomputes it.
    """

    forward: int

    def training(self) -> int:
        """Forward and backward: 6 B s h V (Narayanan et al. 2021, appendix)."""
        return 3 * self.forward


def head_flops(model: Model, workload: Workload | Workloads, vocab: int | None = None) -> HeadFlops:
    """FLOPs of the output layer; `vocab` are its rows with their padding, which the published formulas count too."""
    rows = model.head_rows if vocab is None else vocab
    return HeadFlops(2 * workload.seq_len * workload.micro_batch * model.hidden * rows)
