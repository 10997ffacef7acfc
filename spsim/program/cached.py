"""The kernels of inference on a cache of keys and values: what writes it, and attention of few tokens to all of it."""

from __future__ import annotations

import math
from dataclasses import replace

from spsim.lazy import lazy
from spsim.program.attention import Attention
from spsim.program.kernels import Kernels, Product, bytes_of
from spsim.work import Direction, FlashAttention, Gemm, MemoryBound, Work


class CacheWrite(Kernels):
    """Keys and values of new tokens, read as they are and written in the type of the cache
    (`reshape_and_cache_flash` of vLLM); what the cache holds already stays where it is.
    """

    @lazy
    def _forward(self) -> tuple[Work, ...]:
        (cache, *_), new = self.placed.outputs, self.placed.inputs
        moved = sum([own.bytes + math.ceil(own.elements * cache.tensor.itemsize) for own in new])
        return (MemoryBound("elementwise", moved, "copy"),)

    @property
    def row(self) -> int:
        """Of a copy none."""
        return 0


class FewTokens(Product):
    """A product of experts of which only some get a token: weights of the others are not read."""

    def _linear(self) -> Gemm:
        """Of those that do, each with its mean of tokens."""
        share = self.operator.served_experts
        assert share is not None
        every, (activation,) = super()._linear(), self.placed.activations
        tokens = activation.elements / (every.batch * share * every.k)
        unread = (1 - share) * bytes_of(self.placed.weights)
        batch = math.ceil(every.batch * share)
        return replace(
            every, m=math.ceil(tokens), batch=batch,
            bytes_moved=every.bytes_moved - math.floor(unread),
        )  # fmt: skip


class CachedAttention(Attention):
    """The last of the positions in the cache see all of it up to their own."""

    @property
    def degree(self) -> int:
        """Ranks along which queries or keys are cut by position, so that each has its part of the pairs."""
        return math.prod(self.placed.mesh.degree(axis) for axis, dim in self.placed.splits if dim in ("s", "j"))

    def over_gathered_keys(self, direction: Direction, causal: bool, ring_cut: str) -> tuple[FlashAttention, ...]:
        """A rank's queries on the keys that it reads; of a prompt whose every token passes, as in training."""
        new, every = (math.ceil(self.operator.extents[dim]) for dim in "sj")
        if new == every and (self.operator.window or ("ring", "s") in self.placed.splits):
            return super().over_gathered_keys(direction, causal, ring_cut)
        queries, keys = self._product("s"), self._product("j")
        pairs = twice_pairs(new, every) if causal else 2 * new * every
        return (self.block(direction, queries, keys, -(-pairs // self.degree), causal=causal and new > 1),)

    def step_of_ring(self, degree: int, step: int, *, causal: bool) -> FlashAttention:
        """A block of the own queries on keys of one rank, all cut in pairs of chunks, first and last (`zigzag`): of
        new tokens the first step computes the lower half of the square, later steps half of it; of all before them
        each the whole.
        """
        new, every = (math.ceil(self.operator.extents[dim]) // degree for dim in "sj")
        if not causal:
            return self.block("forward", new, every, 2 * new * every, causal=False)
        before = every - new
        keys = before + (new if step == 0 else new // 2)
        return self.block("forward", new, keys, 2 * new * before + new * new, causal=step == 0)


def twice_pairs(new: int, every: int) -> int:
    """Twice the pairs that a causal mask leaves of the last `new` of `every` positions; of all of them half the square,
    as kernels are charged.
    """
    return new * every if new == every else new * (2 * every - new + 1)
