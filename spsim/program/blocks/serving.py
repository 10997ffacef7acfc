"""Blocks of inference: layers that keep keys and values of all tokens, and the head that makes the next token.

Some tokens of each sequence pass, the last of those that its cache holds then: s are those that pass, j all of them.
"""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction

from spsim.inputs.model import Model
from spsim.inputs.workload import Passage, Workload
from spsim.program.blocks.embedding import TOKEN_BYTES
from spsim.program.blocks.head import Head
from spsim.program.blocks.transformer import Layer, Projections, operators_of
from spsim.program.operators import Operator, Tensor
from spsim.program.routing import USUAL, Routing
from spsim.program.strategies import EXPERTS, WHOLE_SEQUENCE, WHOLE_VOCABULARY
from spsim.work import AttentionKernel, Framework

PARTS = 2**16
"""Of a share of experts, which is rounded so that sizes are small fractions."""


def seen(model: Model, passage: Passage) -> int:
    """Keys that are read: of one token those in its window."""
    window = model.sliding_window
    return passage.keys if window is None or passage.tokens > 1 else min(window, passage.keys)


class _CachedLayer(Layer):
    """A layer whose core attention reads keys and values from the cache."""

    def __init__(
        self, model: Model, workload: Workload, passage: Passage, replicas: int, projections: Projections,
        routing: Routing,
    ) -> None:  # fmt: skip
        super().__init__(model, workload, replicas, projections, routing)
        self.sizes |= {"s": passage.tokens, "j": seen(model, passage)}
        self.decodes = workload.phase == "decode"
        self.cache_bytes = workload.cache_bytes

    def fused_attention(self, kernel: AttentionKernel | Framework, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Core attention to the cache. Ranks that have other keys make partial results, which are merged: a sum over
        j, weighted by the log-sum-exp of each (Dao et al. 2023, flash-decoding).
        """
        if self.model.kv_lora_rank is not None:
            self.cache_latents()
            return super().fused_attention(kernel, q, k, v)
        context = super().fused_attention(kernel, q, *self.cached(k, v))
        (*_, last) = self.operators
        picked = "flash_decoding" if self.decodes and kernel == "transformer_engine" else kernel
        self.operators[-1] = replace(last, mixes=last.mixes - {"j"}, attention_kernel=picked)
        return context

    def cached(self, *new: Tensor) -> list[Tensor]:
        """The cache with new keys and values in it. Of one token any rank may have the place where cached tokens are
        spread over ranks; tokens of a prompt stay on the ranks that have passed them.
        """
        kept = [self.cache(own) for own in new]
        read, mixes = ("s b a d", "s") if self.decodes else ("j b a d", "")
        sides = (", ".join([own] * len(new)) for own in (read, "j b a d"))
        self.add("kv_cache", "elementwise", " -> ".join(sides), new, kept, mixes=mixes)
        return kept

    def cache_latents(self) -> None:
        """Of latent attention the latent of keys and values behind its norm, and the rotated part of k, once for all
        heads (`concat_and_cache_mla` of vLLM); a prefill attends to the keys and values that it has made of them.
        """
        made = {operand.tensor.dims[2:]: operand.tensor for op in self.operators for operand in op.results}
        new = [made["l",], made["r",]]
        kept = [self.tensor(f"{own.name}_cache", f"j b {own.dims[2]}", "cache", self.cache_bytes) for own in new]
        self.add("kv_cache", "elementwise", "j b l, j b r -> j b l, j b r", new, kept)

    def cache(self, new: Tensor) -> Tensor:
        """Of keys or of values."""
        return self.tensor(f"{new.name}_cache", "j b a d", "cache", itemsize=self.cache_bytes, heads=new.sizes[2])


def cached_layer(
    model: Model,
    workload: Workload,
    passage: Passage,
    replicas: int = 1,
    projections: Projections = "fused",
    routing: Routing = USUAL,
    tokens: Fraction = Fraction(1),
) -> tuple[Operator, ...]:
    """The operators of one layer for some tokens of each sequence, as `transformer_layer`; so many `tokens` at a time
    are dealt out to all experts, of a decode.
    """
    made = operators_of(_CachedLayer(model, workload, passage, replicas, projections, routing))
    if model.experts is None or model.experts_per_token is None:
        return made
    # Engines have one kernel for the products of all experts (`fused_moe` of vLLM).
    made = tuple([replace(op, group="kernel") if op.group == "launched" else op for op in made])
    if workload.phase != "decode":
        return made
    none = (1 - Fraction(model.experts_per_token, model.experts)) ** math.ceil(tokens)
    share = 1 - Fraction(round(none * PARTS), PARTS)
    served = (replace(op, served_experts=share) if op.rules == EXPERTS and op.kind == "gemm" else op for op in made)
    return tuple(served)


def next_token(
    model: Model, workload: Workload, passage: Passage, replicas: int = 1, *, vocab: int
) -> tuple[Operator, ...]:
    """From the output of the last layer [s b h] to the id of the next token of each sequence, in forward order.

    The final norm is of all tokens that pass; of a prompt the hidden state of its last token is picked out behind it,
    a sum over positions of which all others count nothing. Logits are gathered, and one of them is taken (vLLM).
    """
    block = Head(model, workload.model_copy(update={"seq_len": passage.tokens}), replicas, v=vocab)
    x = block.norm("final_norm", block.tensor("last_hidden", "s b h"))
    tokens = "s b"
    if workload.phase == "prefill":
        tokens, last = "b", block.tensor("last_positions", "b", "token ids", itemsize=TOKEN_BYTES)
        picked = block.tensor("last_token", "b h")
        block.add("last_token", "embedding", "b, s b h -> b h", [last, x], [picked], rules=WHOLE_SEQUENCE)
        x = picked
    logits = block.output_layer(x, tokens)
    chosen = block.tensor("next_token", tokens, "token ids", itemsize=TOKEN_BYTES)
    block.add("sample", "elementwise", f"{tokens} v -> {tokens}", [logits], [chosen], mixes="v", rules=WHOLE_VOCABULARY)
    return tuple(block.operators)
