"""Attention over gathered K and V, some heads at a time, as `llama3_flash_attn_varlen_func` of ring-flash-attn has it.

K and V of the next heads are gathered behind attention of the ones at hand (`heads_k_stride`), in the backward pass
again, and their gradients reduced and scattered at once. What is cut along heads is copied into a row before it moves,
and copied to its place behind (ring-flash-attn 0.1.8, `llama3_flash_attn_varlen.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from spsim.errors import InputError
from spsim.inputs.plan import Plan
from spsim.program.attention import Attention
from spsim.program.instructions import Buffer, Communication, Compute, Part, Program, Purpose
from spsim.program.lowerings.gathered_attention import GatheredAttention
from spsim.program.lowerings.ring_steps import Message
from spsim.program.mesh import Mesh
from spsim.work import FlashAttention, Work


def lower_heads(program: Program, plan: Plan, mesh: Mesh, attention: Attention, *, causal: bool) -> Program:
    """Gathered attention in slices of `heads_k_stride` KV heads; `attention` holds the kernels of the core attention
    operator. `InputError` where that does not divide the heads of a rank.
    """
    work, *_ = attention.over_gathered_keys("forward", causal, plan.ring_cut)
    slices, rest = divmod(work.kv_heads, plan.heads_k_stride or work.kv_heads)
    if rest:
        raise InputError(f"plan: heads_k_stride = {plan.heads_k_stride} does not divide {work.kv_heads} KV heads")
    return program if slices == 1 else _HeadSlices(program, plan, mesh, attention, slices, causal=causal).lowered()


class _InPieces(NamedTuple):
    """A result of which each slice writes its heads."""

    memory: Buffer
    result: Buffer
    """What others wait for: the last slice completes it."""
    slices: int

    def reads(self, place: int) -> tuple[int, ...]:
        """What a slice finds."""
        return (self.memory.id,) if place else ()

    def writes(self, place: int) -> tuple[Buffer, ...]:
        """What it leaves."""
        begun = () if place else (self.memory,)
        return (*begun, self.result) if place == self.slices - 1 else begun


class _HeadSlices(GatheredAttention):
    def __init__(
        self, program: Program, plan: Plan, mesh: Mesh, attention: Attention, slices: int, *, causal: bool
    ) -> None:
        super().__init__(program, plan, mesh, attention, causal=causal, written_out=slices)
        self.slices = slices

    def forward(self, compute: Compute, gathers: list[Communication]) -> None:
        """Results of all slices are joined at the end."""
        context, statistics = compute.writes
        others, work = self.but_keys(compute, gathers), self._slice(compute)
        part: Part = "recompute" if compute.part == "recompute" else "forward"
        made: list[Buffer] = []
        following = self._gathered(compute, gathers, "input", part)
        for place in range(self.slices):
            keys = following
            if place < self.slices - 1:
                following = self._gathered(compute, gathers, "input", part)
            own = [self.buffer(whole.tensor, whole.bytes // self.slices) for whole in (context, statistics)]
            self.attention(compute, work, (*others, *keys), tuple(own))
            made += own
        size = 2 * (context.bytes + statistics.bytes)
        self.elementwise(compute, size, tuple([buffer.id for buffer in made]), (context, statistics), work)

    def backward(self, compute: Compute, gathers: list[Communication], homes: tuple[Buffer, ...]) -> None:
        """The gradient of Q is written in place, those of K and V are summed in a cleared buffer, scattered and copied
        to their place.
        """
        others, work = self.but_keys(compute, gathers), self._slice(compute)
        of_query, *of_keys = [self._in_pieces(whole) for whole in (compute.writes[0], *homes)]
        messages = [Message(f"{tensor} gradient", size // self.slices) for tensor, size in self.local_messages(gathers)]
        following = self._gathered(compute, gathers, "regather", "backward")
        for place in range(self.slices):
            keys = following
            cleared = [self.buffer(message.tensor, message.bytes * self.degree) for message in messages]
            self.elementwise(compute, sum(buffer.bytes for buffer in cleared), (), tuple(cleared), work)
            if place < self.slices - 1:
                following = self._gathered(compute, gathers, "regather", "backward")
            found = tuple([buffer.id for buffer in cleared])
            sums = tuple([self.buffer(buffer.tensor, buffer.bytes, buffer.id) for buffer in cleared])
            reads = (*others, *keys, *found, *of_query.reads(place))
            self.attention(compute, work, reads, (*of_query.writes(place), *sums))
            for message, own, result in zip(messages, sums, of_keys, strict=True):
                arrived = self.move("reduce_scatter", (message,), (own.id,), "gradient", "backward")
                reads = (*arrived, *result.reads(place))
                self.elementwise(compute, 2 * message.bytes, reads, result.writes(place), work)

    def _in_pieces(self, result: Buffer) -> _InPieces:
        memory = self.buffer(result.tensor, result.bytes)
        return _InPieces(memory, replace(result, alias_of=memory.id), self.slices)

    def _slice(self, compute: Compute) -> tuple[Work | None, ...]:
        """The kernel of one slice, by position on the ring."""
        return tuple([self._of_slice(work) for work in compute.work])

    def _of_slice(self, work: Work | None) -> Work:
        assert isinstance(work, FlashAttention)
        heads, kv_heads = work.heads // self.slices, work.kv_heads // self.slices
        return replace(work, heads=heads, kv_heads=kv_heads, bytes_moved=work.bytes_moved // self.slices)

    def _gathered(
        self, compute: Compute, gathers: Sequence[Communication], purpose: Purpose, part: Part
    ) -> tuple[int, ...]:
        """K and V of some heads, each copied and then gathered."""
        arrived: tuple[int, ...] = ()
        for gather, (tensor, size) in zip(gathers, self.local_messages(gathers), strict=True):
            own = Message(tensor, size // self.slices)
            copy = self.buffer(*own)
            self.elementwise(compute, 2 * own.bytes, gather.reads, (copy,), compute.work)
            arrived += self.move("all_gather", (own,), (copy.id,), purpose, part)
        return arrived
