"""Kernels of core attention: over all keys, over those of a window, or within documents."""

from __future__ import annotations

import math
from dataclasses import replace

from spsim.inputs.documents import Documents, Visible, parts_of
from spsim.lazy import lazy
from spsim.program.kernels import POSITIONS, Kernels
from spsim.program.placed import PlacedOperand
from spsim.work import Direction, FlashAttention, Work


class Attention(Kernels):
    """Core attention in one kernel: `s b a d, j b a d, j b a e -> s b a e`, where e is often d again."""

    def forward(self, causal: bool, ring_cut: str) -> tuple[Work, ...]:
        """One kernel, or one per position on the ring."""
        return self.over_gathered_keys("forward", causal, ring_cut)

    def backward(self, causal: bool, ring_cut: str) -> tuple[Work, ...]:
        """The same of the gradients of queries, keys and values."""
        return self.over_gathered_keys("backward", causal, ring_cut)

    def over_gathered_keys(self, direction: Direction, causal: bool, ring_cut: str) -> tuple[FlashAttention, ...]:
        """Over all keys; under a contiguous cut later ranks see more of the square."""
        queries, keys = self._product("s"), self._product("j")
        degree = self.placed.mesh.degree("ring") if ("ring", "s") in self.placed.splits else 1
        if not causal:
            return (self.block(direction, queries, keys, 2 * queries * keys, causal=False),)
        if self.documents:
            cut = ring_cut if degree > 1 else "contiguous"
            every = [parts_of(self.documents.tokens, degree, rank, cut) for rank in range(degree)]
            own = (self.documents.of_queries(*parts) for parts in every)
            return tuple([self.within(direction, queries, keys, seen) for seen in own])
        if window := self.operator.window:  # of ranks of a ring those whose queries all have a full one
            return (self.block(direction, queries, keys, queries * keys, causal=True, window=window),)
        if self.operator.extents["s"] != self.operator.extents["j"]:
            return (self.block(direction, queries, keys, self._twice_last_pairs(degree), causal=True),)
        if degree == 1 or ring_cut == "zigzag":
            return (self.block(direction, queries, keys, queries * keys, causal=True),)
        pairs = (queries * queries * (2 * rank + 1) for rank in range(degree))
        return tuple(self.block(direction, queries, keys, twice, causal=True) for twice in pairs)

    @lazy
    def documents(self) -> Documents | None:
        """Within which queries stay."""
        lengths = self.operator.documents
        return Documents(lengths, self.operator.window) if lengths else None

    def within(self, direction: Direction, queries: int, keys: int, seen: Visible) -> FlashAttention:
        """One flash kernel of what queries see of their documents."""
        window = self.operator.window or 0
        work = self.block(direction, queries, keys, seen.twice_pairs, causal=True, window=window)
        return replace(work, documents=seen.documents, longest=seen.longest)

    def _twice_last_pairs(self, degree: int) -> int:
        """Of queries at the last of the positions of the keys: the first of them sees all keys but those after it."""
        queries, keys = (math.ceil(self.operator.extents[dim]) for dim in "sj")
        if degree > 1 or queries > keys:
            raise self._refuse(f"a causal mask of {queries} queries on {keys} keys needs no ring and enough keys")
        return queries * (2 * keys - queries + 1)

    def block(
        self, direction: Direction, queries: int, keys: int, twice_pairs: int, *, causal: bool, window: int = 0
    ) -> FlashAttention:
        """One flash kernel of `queries` x `keys`, of which `twice_pairs` / 2 are computed, or what a window leaves."""
        if len(self.placed.handed_over) != 3 or len(self.placed.results) != 1:
            raise self._refuse("attention takes queries, keys and values, and makes one result")
        of_queries, of_keys, of_values = self.placed.handed_over
        batch, width, value_width = self._batch, self._width(of_queries), self._width(of_values)
        heads = self._product(self._heads)
        kv_heads = of_keys.elements // (self.placed.sizes["j"] * batch * width)
        passes = 1 if direction == "forward" else 2
        (result,) = self.placed.results
        of_query = width * of_queries.tensor.itemsize + value_width * result.tensor.itemsize
        of_key = width * of_keys.tensor.itemsize + value_width * of_values.tensor.itemsize
        moved = passes * batch * (queries * heads * of_query + keys * kv_heads * of_key)
        return FlashAttention(
            kernel=self.operator.attention_kernel, direction=direction, batch=batch, heads=heads, kv_heads=kv_heads,
            head_dim=width, value_dim=value_width, queries=queries, keys=keys, twice_pairs=twice_pairs, causal=causal,
            bytes_moved=math.ceil(moved), window=window, dtype=self._dtype,
        )  # fmt: skip

    @lazy
    def _batch(self) -> int:
        return self._product(self.placed.sizes.keys() & {"b"})

    @lazy
    def _heads(self) -> frozenset[str]:
        """Dimensions that queries and result share, but positions, batch and what is mixed."""
        queries, result = self.placed.inputs[0].subscript, self.placed.results[0].subscript
        return frozenset(queries).intersection(result) - self.operator.mixes - POSITIONS - {"b"}

    def _width(self, operand: PlacedOperand) -> int:
        """Elements of a head of an operand."""
        return self._product(dim for dim in operand.subscript if dim not in self._heads | POSITIONS | {"b"})
