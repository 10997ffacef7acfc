"""How the gradients of K and V come home on a ring: added up as they pass each rank that has computed some of them.

Transformer Engine sends them in the model's dtype; the own part waits at home, so that P - 1 trips suffice.
ring-flash-attn, yunchang and torch add up in fp32 what goes all P trips round with its block, the own part first.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace

from spsim.program.instructions import Buffer, Compute
from spsim.program.lowerings.ring_steps import Message, RingSteps
from spsim.work import FP32_BYTES, Work


class RingGradients(ABC):
    """Gradients of Q, which stays, and of K and V, which travel."""

    first_equal: int
    """The first of the steps that are equal but for the last."""

    def __init__(
        self, ring: RingSteps, compute: Compute, messages: Sequence[Message], homes: tuple[Buffer, ...]
    ) -> None:
        """`messages` are those of K and V, `homes` where the gradients of the own K and V go."""
        self.ring, self.compute, self.homes = ring, compute, homes
        self.of_query, *_ = compute.writes
        self.messages = tuple([Message(f"{tensor} gradient", size) for tensor, size in messages])
        self.size = sum(message.bytes for message in messages)
        self.travelling: tuple[int, ...] = ()
        """The buffers that have arrived."""

    def _of_block(self) -> tuple[Buffer, ...]:
        """The gradients of K and V that a kernel writes."""
        return tuple([self.ring.buffer(*message) for message in self.messages])

    @abstractmethod
    def written(self, step: int) -> tuple[Buffer, ...]:
        """What the attention kernel of a step writes."""

    @abstractmethod
    def add(self, step: int, active: Sequence[Work | None]) -> None:
        """What follows that kernel, on the positions that ran it."""

    @abstractmethod
    def come_home(self) -> None:
        """What follows the last step."""


class ModelDtypeGradients(RingGradients):
    """In the dtype of the kernels."""

    first_equal = 3

    def __init__(
        self, ring: RingSteps, compute: Compute, messages: Sequence[Message], homes: tuple[Buffer, ...]
    ) -> None:
        super().__init__(ring, compute, messages, homes)
        self.running = self.output = ring.buffer(self.of_query.tensor, self.of_query.bytes)
        self.block: tuple[Buffer, ...] = ()
        self.own: tuple[int, ...] = ()

    def written(self, step: int) -> tuple[Buffer, ...]:
        """See `RingGradients`: the first dQ is the running sum."""
        of_query = self.of_query
        self.output = self.running if step == 0 else self.ring.buffer(of_query.tensor, of_query.bytes)
        self.block = self._of_block()
        return self.output, *self.block

    def add(self, step: int, active: Sequence[Work | None]) -> None:
        """See `RingGradients`: this step's dK, dV to those that arrived with the block, and the sum is sent on."""
        ring, block = self.ring, tuple([buffer.id for buffer in self.block])
        if step == 0:
            self.own = block
            return
        summed = (replace(self.of_query, alias_of=self.running.id),) if step == ring.degree - 1 else ()
        ring.elementwise(self.compute, 3 * self.of_query.bytes, (self.running.id, self.output.id), summed, active)
        if self.travelling:
            total = tuple([ring.buffer(*sent, alias_of=own) for sent, own in zip(self.messages, block, strict=True)])
            ring.elementwise(self.compute, 3 * self.size, (*block, *self.travelling), total, active)
            ring.issue_after_this()
            block = tuple([buffer.id for buffer in total])
        sent = ring.concatenated(self.compute, self.messages, block)
        self.travelling = ring.move("send_receive", self.messages, sent, "gradient", "backward")

    def come_home(self) -> None:
        """See `RingGradients`: the own part is added last."""
        self.ring.elementwise(self.compute, 3 * self.size, (*self.own, *self.travelling), self.homes, [True])


class Fp32Gradients(RingGradients):
    """In fp32, into which the first block is cast; the kernels write the model's dtype."""

    first_equal = 1

    def __init__(
        self, ring: RingSteps, compute: Compute, messages: Sequence[Message], homes: tuple[Buffer, ...]
    ) -> None:
        super().__init__(ring, compute, messages, homes)
        self.wide = FP32_BYTES // ring.itemsize
        self.running = ring.buffer(self.of_query.tensor, self.wide * self.of_query.bytes)
        self.sent = tuple([Message(tensor, self.wide * size) for tensor, size in self.messages])
        self.output, self.block = self.running, self._of_block()[:0]

    def written(self, step: int) -> tuple[Buffer, ...]:
        """See `RingGradients`."""
        self.output, self.block = self.ring.buffer(self.of_query.tensor, self.of_query.bytes), self._of_block()
        return self.output, *self.block

    def add(self, step: int, active: Sequence[Work | None]) -> None:
        """See `RingGradients`: read in one dtype and written in the other; later sums over what has arrived."""
        ring, block = self.ring, tuple([buffer.id for buffer in self.block])
        moved = 1 + (self.wide if step == 0 else 2 * self.wide)
        found, made = ((), (self.running,)) if step == 0 else ((self.running.id,), ())
        ring.elementwise(self.compute, moved * self.of_query.bytes, (*found, self.output.id), made, active)
        over = self.travelling or [None] * len(block)
        total = tuple([ring.buffer(*sent, alias_of=own) for sent, own in zip(self.sent, over, strict=True)])
        ring.elementwise(self.compute, moved * self.size, (*block, *self.travelling), total, active)
        sent = ring.concatenated(self.compute, self.sent, tuple([buffer.id for buffer in total]))
        ring.issue_after_this()
        self.travelling = ring.move("send_receive", self.sent, sent, "gradient", "backward")

    def come_home(self) -> None:
        """See `RingGradients`: cast back."""
        ring, moved = self.ring, 1 + self.wide
        ring.elementwise(self.compute, moved * self.of_query.bytes, (self.running.id,), (self.of_query,), [True])
        ring.elementwise(self.compute, moved * self.size, self.travelling, self.homes, [True])
