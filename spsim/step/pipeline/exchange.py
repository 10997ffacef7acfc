"""When the ranks of a pipeline post their messages and wait for them, as megatron-core 0.16.1 and torch 2.13.0 do."""

from __future__ import annotations

from dataclasses import dataclass

from spsim.inputs.schedules import Library, Schedule
from spsim.step.pipeline import megatron
from spsim.step.pipeline.megatron import Overlap
from spsim.step.pipeline.messages import Instruction, Stages
from spsim.step.pipeline.orders import forwards, one_f_one_b, orders, warm_up
from spsim.step.pipeline.tape import Score, taped
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


def score(
    schedule: Schedule, stages: int, chunks: int, micro_batches: int, group: int | None, exchange: Exchange
) -> Score:
    """What each rank runs, posts and waits for; other parameters are those of `orders`.

    Raises:
        ValueError: the library has no such schedule.
        DeadlockError: torch finds no place for some receives.
    """
    model = Stages(schedule, stages, chunks)
    if exchange.library == "megatron":
        if schedule != "1f1b":
            raise ValueError(f"Megatron-Core has no schedule {schedule}: its exchanges are torch's")
        return _megatron(model, micro_batches, group or stages, exchange)
    rows = orders(schedule, stages, chunks, micro_batches, group)
    if schedule == "gpipe":
        return taped(model, rows, [[*fill_drain(model, rank, row)] for rank, row in enumerate(rows)])
    if schedule == "1f1b" and chunks == 1:
        return taped(model, rows, [[*torch_one_f_one_b(model, rank, row)] for rank, row in enumerate(rows)])
    return taped(model, rows, runtime(model, rows, defer=exchange.defer_pp_recv))


def instructions(
    schedule: Schedule, stages: int, chunks: int, micro_batches: int, group: int | None, exchange: Exchange
) -> tuple[tuple[Instruction, ...], ...]:
    """The same written out, a row for each rank."""
    return score(schedule, stages, chunks, micro_batches, group, exchange).rows()


def _megatron(model: Stages, micro_batches: int, group: int, exchange: Exchange) -> Score:
    order = forwards(model.chunks, micro_batches, group)
    before = [warm_up(model.ranks, rank, model.chunks, micro_batches, group) for rank in range(model.ranks)]
    passes = [one_f_one_b(order, number) for number in before]
    if model.chunks == 1:
        return Score(model, passes, [*megatron.one_f_one_b(model, passes, before)])
    overlap = Overlap(exchange.overlap_p2p_comm, exchange.overlap_p2p_comm_warmup_flush, exchange.awaits_activations)
    tapes = [megatron.interleaved(model, rank, order[0], number, overlap) for rank, number in enumerate(before)]
    return Score(model, passes, tapes)
