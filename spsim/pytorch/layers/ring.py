"""Core attention over a ring: K and V circulated (Liu et al. 2023) or gathered, as context parallelism.

The forward pass keeps the local q, k, v, the output and the log-sum-exp; the backward pass moves K and V again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import Function

from spsim.pytorch.layers.collectives import Pending, start_all_gather, start_exchange, start_reduce_scatter
from spsim.pytorch.layers.flash import Block, OnlineSoftmax, block_backward, block_forward


@dataclass(frozen=True)
class Ring:
    """The ring axis as core attention sees it."""

    group: dist.ProcessGroup
    rank: int
    zigzag: bool
    causal: bool
    order: Tensor
    """Position of each place of the gathered sequence."""
    places: Tensor
    """Place of each position."""
    gathers: bool = False
    """K and V are gathered behind the first step."""
    fp32_gradients: bool = False
    """Those of K and V go all the way round in fp32."""
    sends: int = 1
    """Messages that K and V are sent in."""

    @property
    def degree(self) -> int:
        """Ranks of the ring."""
        return self.group.size()

    def keys(self, message: Tensor) -> Iterator[Tensor]:
        """K and V of each step in turn, from the own ones on, those of the next one under way."""
        if self.gathers:
            yield from self._gathered_keys(message)
            return
        for step in range(self.degree):
            last = step == self.degree - 1
            arriving = Pending(message) if last else start_exchange(message, self.group, self.sends)
            yield message
            message = arriving.wait()

    def _gathered_keys(self, message: Tensor) -> Iterator[Tensor]:
        gathers = [start_all_gather(part, self.group) for part in message.chunk(self.sends)]
        yield message
        wholes = [gather.wait().chunk(self.degree) for gather in gathers]
        for step in range(1, self.degree):
            yield torch.cat([whole[(self.rank - step) % self.degree] for whole in wholes])

    def circulated_block(self, tokens: int, source: int) -> Block | None:
        """What this rank computes with the K and V of another; None: they all come later."""
        every, half = slice(0, tokens), tokens // 2
        if not self.causal or source == self.rank:
            return Block(every, every, self.causal)
        if not self.zigzag:
            return Block(every, every, causal=False) if source < self.rank else None
        if source < self.rank:
            return Block(every, slice(0, half), causal=False)
        return Block(slice(half, tokens), every, causal=False)

    def gathered_blocks(self, tokens: int) -> list[Block]:
        """What this rank computes with the whole K and V in the order of the sequence."""
        if not self.causal:
            return [Block(slice(0, tokens), slice(None), causal=False)]
        chunks = (self.rank, 2 * self.degree - 1 - self.rank) if self.zigzag else (self.rank,)
        size = tokens // len(chunks)
        blocks = []
        for place, chunk in enumerate(chunks):
            rows, start = slice(place * size, (place + 1) * size), chunk * size
            blocks += [Block(rows, slice(0, start), causal=False)] if start else []
            blocks.append(Block(rows, slice(start, start + size), causal=True))
        return blocks

    def gather(self, x: Tensor) -> Tensor:
        """All of x in the order of the sequence."""
        whole = start_all_gather(x, self.group).wait()
        return whole[self.places] if self.zigzag else whole

    def scatter(self, x: Tensor) -> Tensor:
        """This rank's part of the sum of x over all ranks, x in the order of the sequence."""
        return start_reduce_scatter(x[self.order] if self.zigzag else x, self.group).wait()


class _CirculatedAttention(Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, ring: Ring) -> Tensor:
        message = torch.stack((k, v))
        running = OnlineSoftmax(q)
        for step, arrived in enumerate(ring.keys(message)):
            block = ring.circulated_block(q.shape[0], (ring.rank - step) % ring.degree)
            if block is not None:
                k, v = arrived[:, block.keys]
                running.merge(block.queries, *block_forward(q[block.queries], k, v, block.causal))
        out, log_sum_exp = running.result()
        ctx.ring = ring
        ctx.save_for_backward(q, message, out, log_sum_exp)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        ring: Ring = ctx.ring
        q, message, out, log_sum_exp = ctx.saved_tensors
        exact = torch.promote_types(q.dtype, torch.float32) if ring.fp32_gradients else q.dtype
        of_q, of_keys = torch.zeros_like(q, dtype=exact), _Travelling(ring, exact)
        for step, arrived in enumerate(ring.keys(message)):
            found = torch.zeros_like(arrived)
            block = ring.circulated_block(q.shape[0], (ring.rank - step) % ring.degree)
            if block is not None:
                rows, keys = block.queries, block.keys
                k, v = arrived[:, keys]
                of_block = block_backward(
                    gradients[0][rows], q[rows], k, v, out[rows], log_sum_exp[:, :, rows], block.causal
                )
                of_q[rows] += of_block[0]
                found[:, keys] = torch.stack(of_block[1:])
            of_keys.add(step, found)
        of_k, of_v = of_keys.home().to(q.dtype)
        return of_q.to(q.dtype), of_k, of_v, None


class _Travelling:
    """Gradients of K and V, which follow their block round the ring: all of them in fp32, all but the own part else."""

    def __init__(self, ring: Ring, dtype: torch.dtype) -> None:
        self.ring, self.dtype = ring, dtype
        self.own: Tensor | None = None
        self.under_way: Pending | None = None

    def add(self, step: int, found: Tensor) -> None:
        """This step's part to what has arrived, and the sum is sent on."""
        if step == 0 and not self.ring.fp32_gradients:
            self.own = found
            return
        total = found.to(self.dtype) if self.under_way is None else self.under_way.wait() + found
        self.under_way = start_exchange(total, self.ring.group, self.ring.sends)

    def home(self) -> Tensor:
        """Their sum over all ranks, of the own K and V."""
        assert self.under_way is not None, "a ring has two ranks at least"
        arrived = self.under_way.wait()
        return arrived if self.own is None else self.own + arrived


class _GatheredAttention(Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, ring: Ring) -> Tensor:
        keys, values = ring.gather(k), ring.gather(v)
        running = OnlineSoftmax(q)
        for block in ring.gathered_blocks(q.shape[0]):
            of_block = block_forward(q[block.queries], keys[block.keys], values[block.keys], block.causal)
            running.merge(block.queries, *of_block)
        out, log_sum_exp = running.result()
        ctx.ring = ring
        ctx.save_for_backward(q, k, v, out, log_sum_exp)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        ring: Ring = ctx.ring
        q, k, v, out, log_sum_exp = ctx.saved_tensors
        keys, values = ring.gather(k), ring.gather(v)
        of_q, of_keys, of_values = torch.zeros_like(q), torch.zeros_like(keys), torch.zeros_like(values)
        for block in ring.gathered_blocks(q.shape[0]):
            rows = block.queries
            of_block = block_backward(
                gradients[0][rows], q[rows], keys[block.keys], values[block.keys], out[rows],
                log_sum_exp[:, :, rows], block.causal,
            )  # fmt: skip
            of_q[rows] += of_block[0]
            of_keys[block.keys] += of_block[1]
            of_values[block.keys] += of_block[2]
        return of_q, ring.scatter(of_keys), ring.scatter(of_values), None


def circulated(q: Tensor, k: Tensor, v: Tensor, ring: Ring) -> Tensor:
    """P steps with exchanges of K and V in flight behind them, or one gather; back, those of their gradients too."""
    out: Tensor = _CirculatedAttention.apply(q, k, v, ring)
    return out


def gathered(q: Tensor, k: Tensor, v: Tensor, ring: Ring) -> Tensor:
    """K and V gathered before, their gradients scattered after; both gathered again in backward."""
    out: Tensor = _GatheredAttention.apply(q, k, v, ring)
    return out
