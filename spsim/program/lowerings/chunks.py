"""Tensor-parallel communication in chunks behind the products that need it or make it: userbuffers of Transformer
Engine (`tp_comm_overlap` of Megatron-Core).

A product that follows a gather runs once for each shard, its own first, while the shards go round from rank to rank. A
product before a reduce-scatter runs in pieces, each scattered while the next one is made: four whole reduce-scatters
(`pipeline`, usual in 16 bits), or one piece for each rank, sent to it and added up at the end (`ring_exchange`, usual
in 8 bits since 2025). What is gathered again behind a data gradient, or scattered behind a weight gradient, stays one
message and holds fewer SMs. Pieces run on three streams (`num_max_streams` of Transformer Engine), so that where one
leaves a wave half empty the next begins.

Bytes, FLOPs and what is kept stay what they are: the gathered tensor exists as a whole, and pieces of a result are
views of it. Methods and SMs: Megatron-Bridge 067f987df, `training/comm_overlap.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Literal

from spsim.program.instructions import (
    Buffer,
    Category,
    Communication,
    Compute,
    Instruction,
    Program,
    Purpose,
    Section,
    next_ids,
)
from spsim.program.kernels import Product
from spsim.program.placement import Collective
from spsim.program.region import Region
from spsim.work import Gemm, MemoryBound, Work

PIPELINE_PIECES = 4
"""Of a product before a reduce-scatter in 16 bits (`num_splits`); `inputs.rules` sees that they are equal."""
SMS = 132
"""Of the device (H100) that the shares are of."""
RING_SHARE, PIPELINE_SHARE, GATHER_SHARE, SCATTER_SHARE = 1 / SMS, 20 / SMS, 4 / SMS, 14 / SMS
"""Of the device that a communication holds: a step of a ring, a piece of a reduce-scatter, and what stays whole,
gathered or scattered. Means of the tables for H100 and B200, which have 8 to 32, 2 to 16 and 2 to 32 SMs for the latter
three.
"""


Scatter = Literal["ring_exchange", "pipeline", "pipeline_fp8"]
"""How Transformer Engine calls the two ways to scatter in pieces; the last with what products in 8 bits make in 8 bits
(`fp8_buf`), half of the bytes.
"""


def lower_chunks(program: Program, region: Region, scatter: Scatter | None = None) -> Program:
    """A program whose tensor-parallel gathers and reduce-scatters run in chunks; unless `scatter` says how the latter,
    they do so from rank to rank in 8 or 4 bits, and as four whole ones else.
    """
    lowering = _Lowering(program, region, scatter)
    return replace(
        program,
        forward_sections=tuple(map(lowering.section, program.forward_sections)),
        backward_sections=tuple(map(lowering.section, program.backward_sections)),
    )


class _Lowering:
    def __init__(self, program: Program, region: Region, scatter: Scatter | None) -> None:
        self.scatter = scatter
        self.products = {name: own for name, own in region.kernels.items() if isinstance(own, Product) and own.matrices}
        self.num_instructions, self.num_buffers = next_ids(program)
        self.instructions: list[Instruction] = []

    def section(self, section: Section) -> Section:
        """One section with what it runs in chunks."""
        self.instructions = []
        steps, place = section.instructions, 0
        while place < len(steps):
            place += self._lower(steps[place:])
        return replace(section, instructions=tuple(self.instructions))

    def _lower(self, steps: Sequence[Instruction]) -> int:
        """Write down what comes next, and say how many instructions that were."""
        first = steps[0]
        if isinstance(first, Communication) and first.axis == "tp":
            own = _gathered(first, steps)
            if own:
                self._gather(first, own)
                return 1 + len(own)
            first = _whole(first)
        elif isinstance(first, Compute) and first.operator in self.products and len(steps) > 1:
            scatter = steps[1]
            if _scatters(first, scatter):
                assert isinstance(scatter, Communication)
                self._scatter(first, scatter)
                return 2
        self.instructions.append(first)
        return 1

    # Gather, then the product

    def _gather(self, gather: Communication, kernels: Sequence[Compute]) -> None:
        """Each shard as it arrives, the own one at once: all but the last are sent on."""
        (shard,), (whole,), ranks = gather.reads, gather.writes, gather.ranks
        arrivals = [*self._views(whole, ranks - 1)]
        written = {made.id: [*self._views(made, ranks)] for step in kernels for made in step.writes}
        found = shard
        for piece in range(ranks):
            here = found
            if piece < ranks - 1:
                self._exchange(gather, "all_gather", (here,), (arrivals[piece],), RING_SHARE)
                found = arrivals[piece].id
            own = {whole.id: here, **{made: views[piece].id for made, views in written.items()}}
            for step in kernels:
                reads = tuple(own.get(buffer, buffer) for buffer in step.reads)
                self._kernel(step, ranks, reads, tuple(written[made.id][piece] for made in step.writes))

    # Product, then the reduce-scatter

    def _scatter(self, step: Compute, scatter: Communication) -> None:
        (made,), (result,) = step.writes, scatter.writes
        low = self.products[step.operator].operator.recipe is not None
        ring = (self.scatter or ("ring_exchange" if low else "pipeline")) == "ring_exchange"
        cut = PIPELINE_PIECES * (2 if low and self.scatter == "pipeline_fp8" else 1)
        pieces = scatter.ranks if ring else PIPELINE_PIECES
        views = [*self._views(made, pieces)]
        if ring:
            self._pairwise(step, scatter, views)
            return
        results = [*self._views(result, pieces)]
        for view, part in zip(views, results, strict=True):
            self._kernel(step, pieces, step.reads, (view,))
            self.instructions.append(
                replace(
                    scatter, id=self._next(), reads=(view.id,), writes=(part,), share=PIPELINE_SHARE,
                    message_bytes=scatter.message_bytes // cut, sent_bytes=scatter.sent_bytes // cut,
                )
            )  # fmt: skip

    def _pairwise(self, step: Compute, scatter: Communication, views: Sequence[Buffer]) -> None:
        """A piece for each rank, the own one last; those that arrive stand beside each other until all are added."""
        (result,), size = scatter.writes, scatter.message_bytes // scatter.ranks
        others = self._buffer(result.tensor, size * (scatter.ranks - 1))
        arrivals = [*self._views(others, scatter.ranks - 1)]
        for view, arrival in zip(views, arrivals, strict=False):
            self._kernel(step, scatter.ranks, step.reads, (view,))
            self._exchange(scatter, "reduce_scatter", (view.id,), (arrival,), RING_SHARE)
        self._kernel(step, scatter.ranks, step.reads, (views[-1],))
        added = MemoryBound("elementwise", size * (scatter.ranks + 1), "add")
        reads = (*(arrival.id for arrival in arrivals), views[-1].id)
        usual: Category = "temporary" if result.category == "communication buffers" else result.category
        self._compute(replace(step, kind="elementwise"), (added,), reads, (replace(result, category=usual),))

    # Building blocks

    def _next(self) -> int:
        self.num_instructions += 1
        return self.num_instructions - 1

    def _buffer(self, tensor: str, size: int) -> Buffer:
        self.num_buffers += 1
        return Buffer(self.num_buffers - 1, tensor, size, "communication buffers")

    def _views(self, whole: Buffer, count: int) -> Iterator[Buffer]:
        """A buffer that is written piece by piece: with the first piece it is there, with the last it is complete."""
        first = whole
        for piece in range(count - 1):
            self.num_buffers += 1
            view = replace(whole, id=self.num_buffers - 1)
            if piece == 0:
                first = view
            yield view if piece == 0 else replace(view, alias_of=first.id)
        yield whole if count == 1 else replace(whole, alias_of=first.id)

    def _kernel(self, step: Compute, pieces: int, reads: tuple[int, ...], writes: tuple[Buffer, ...]) -> None:
        """One piece of a kernel."""
        self._compute(step, tuple(self._piece(step, work, pieces) for work in step.work), reads, writes)

    def _piece(self, step: Compute, work: Work | None, pieces: int) -> Work | None:
        if isinstance(work, Gemm):
            return self.products[step.operator].piece(work, pieces, backward=step.part == "dgrad")
        assert isinstance(work, MemoryBound), "what stands between a gather and its product casts"
        return replace(work, bytes_moved=work.bytes_moved // pieces)

    def _compute(
        self, step: Compute, work: tuple[Work | None, ...], reads: tuple[int, ...], writes: tuple[Buffer, ...]
    ) -> None:
        self.instructions.append(replace(step, id=self._next(), work=work, reads=reads, writes=writes))

    def _exchange(
        self,
        of: Communication,
        collective: Collective,
        reads: tuple[int, ...],
        writes: tuple[Buffer, ...],
        share: float,
    ) -> None:
        """One step of a collective: a shard to one rank, and one from another."""
        size = of.message_bytes // of.ranks
        self.instructions.append(
            replace(
                of, id=self._next(), collective="send_receive", step_of=collective, message_bytes=size, sent_bytes=size,
                reads=reads, writes=writes, share=share,
            )
        )  # fmt: skip


def _gathered(step: Communication, steps: Sequence[Instruction]) -> list[Compute]:
    """The kernels up to the product for which a tensor is gathered, if that comes next."""
    found: list[Compute] = []
    if step.collective != "all_gather" or step.purpose == "regather":
        return []
    for other in steps[1:]:
        if not isinstance(other, Compute) or step.writes[0].id not in other.reads:
            return []
        found.append(other)
        if isinstance(other.work[0], Gemm):
            return found
    return []


def _scatters(step: Compute, other: Instruction) -> bool:
    """Whether a reduce-scatter over tp follows a product."""
    return (
        isinstance(other, Communication)
        and (other.axis, other.collective) == ("tp", "reduce_scatter")
        and isinstance(step.work[0], Gemm)
        and other.reads == tuple(made.id for made in step.writes)
    )


def _whole(step: Communication) -> Communication:
    """A message behind a product of another operand, with its share of the device."""
    shares: dict[tuple[Collective, Purpose], float] = {
        ("all_gather", "regather"): GATHER_SHARE, ("reduce_scatter", "gradient"): SCATTER_SHARE
    }  # fmt: skip
    return replace(step, share=shares.get((step.collective, step.purpose)))
