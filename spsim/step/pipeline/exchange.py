"""When the ranks of a pipeline post their messages and wait for them, as megatron-core 0.16.1 and torch 2.13.0 do."""

from __future__ import annotations

from dataclasses import dataclass

from spsim.inputs.schedules import Library, Schedule
from spsim.step.pipeline.megatron import interleaved, one_f_one_b
from spsim.step.pipeline.messages import Instruction, Stages
from spsim.step.pipeline.orders import orders, warm_up
from spsim.step.pipeline.torch_runtime import fill_drain, runtime, torch_one_f_one_b


@dataclass(frozen=True, slots=True)
class Exchange:
    """Whose communication it is, and its options by the library's names."""

    library: Library = "megatron"
    overlap_p2p_comm: bool = False
    """Megatron, interleaved: exchanges run behind the pass that follows, in the steady state."""
    overlap_p2p_comm_warmup_flush: bool = False
    """The same in warm-up and cool-down; needs `overlap_p2p_comm`."""
    awaits_activations: bool = False
    """An activation that is sent behind a pass is waited for before that pass: versions of Megatron-Core after 0.16.1
    do so (pull request 4047) where they free the output that is sent, `deallocate_pipeline_outputs`.
    """
    defer_pp_recv: bool = False
    """torch, schedules of several chunks: receives are posted just before use."""


def instructions(
    schedule: Schedule, stages: int, chunks: int, micro_batches: int, group: int | None, exchange: Exchange
) -> tuple[tuple[Instruction, ...], ...]:
    """What each rank runs, posts and waits for, a row for each; other parameters are those of `orders`."""
    rows = orders(schedule, stages, chunks, micro_batches, group)
    model = Stages(schedule, stages, chunks)
    if exchange.library == "torch":
        if schedule == "gpipe":
            return tuple(tuple(fill_drain(model, rank, row)) for rank, row in enumerate(rows))
        if schedule == "1f1b" and chunks == 1:
            return tuple(tuple(torch_one_f_one_b(model, rank, row)) for rank, row in enumerate(rows))
        return runtime(model, rows, defer=exchange.defer_pp_recv)
    before = [warm_up(stages, rank, chunks, micro_batches, group or stages) for rank in range(stages)]
    if chunks == 1:
        return tuple(tuple(one_f_one_b(model, rank, row, before[rank])) for rank, row in enumerate(rows))
    options = {
        "overlap": exchange.overlap_p2p_comm,
        "flush": exchange.overlap_p2p_comm_warmup_flush,
        "awaits": exchange.awaits_activations,
    }
    return tuple(tuple(interleaved(model, rank, row, before[rank], **options)) for rank, row in enumerate(rows))
