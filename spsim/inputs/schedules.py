"""Pipeline schedules by name, and what the libraries refuse of them (as megatron-core 0.16.1 and torch 2.13.0 do)."""

from __future__ import annotations

from typing import Literal, get_args

Schedule = Literal["1f1b", "gpipe", "looped_bfs", "interleaved_zero_bubble", "zbv", "dualpipev"]
"""With several chunks a rank, 1f1b is the interleaved one."""
Library = Literal["megatron", "torch"]
"""Whose schedule runs: the orders are the same, what is refused and when a rank waits are not."""

SCHEDULES: tuple[Schedule, ...] = get_args(Schedule)
V_SHAPED: frozenset[Schedule] = frozenset({"zbv", "dualpipev"})
"""Two chunks a rank: the first going down the ranks, the second coming back up."""
GROUPED: frozenset[Schedule] = frozenset({"1f1b", "interleaved_zero_bubble"})
"""Where a chunk runs a group of micro-batches before the next chunk takes over."""

HALVED: frozenset[Schedule] = frozenset({"interleaved_zero_bubble", "zbv", "dualpipev"})
"""Where backward passes run in halves: the gradient of the input, and later those of the weights."""


def torch_rounds(stages: int, micro_batches: int) -> int:
    """In how many rounds torch cuts the micro-batches of an interleaved schedule."""
    return max(1, micro_batches // stages)


def torch_group(stages: int, micro_batches: int) -> int:
    """Micro-batches that a chunk runs before the next takes over, in torch: not an option there."""
    return micro_batches // torch_rounds(stages, micro_batches)


def refused_schedule(
    schedule: Schedule, library: Library, stages: int, chunks: int, micro_batches: int, group: int | None
) -> str | None:
    """Why a library would not run a schedule, or None; `group` None is what the library takes by itself."""
    found = _refused_chunks(schedule, library, chunks)
    if found is None and library == "torch":
        return _refused_by_torch(schedule, stages, chunks, micro_batches, group)
    if found is None and chunks > 1:
        return _refused_by_megatron(stages, micro_batches, stages if group is None else group)
    return found


def _refused_chunks(schedule: Schedule, library: Library, chunks: int) -> str | None:
    if library == "megatron" and schedule != "1f1b":
        return f"Megatron-Core has no schedule {schedule}; use 1f1b, or torch's way to send"
    if schedule in V_SHAPED and chunks != 2:
        return f"{schedule} has exactly 2 chunks a rank, not {chunks}; use virtual_pp=2"
    if schedule == "gpipe" and chunks != 1:
        return f"gpipe has one chunk a rank, not {chunks}; use looped_bfs, which has several"
    return None


def _refused_by_megatron(stages: int, micro_batches: int, group: int) -> str | None:
    """Of its interleaved schedule."""
    if not stages <= group <= micro_batches:
        return (
            f"a group of {group} micro-batches is not between the {stages} pipeline stages and the "
            f"{micro_batches} micro-batches, as interleaving needs it; use a larger batch, or another group"
        )
    rest = micro_batches % group
    if 0 < rest < stages:
        return (
            f"{micro_batches} micro-batches in groups of {group} leave {rest}, fewer than the {stages} pipeline "
            "stages; use a number of micro-batches that the stages divide"
        )
    return None


def _refused_by_torch(
    schedule: Schedule, stages: int, chunks: int, micro_batches: int, group: int | None
) -> str | None:
    grouped = schedule == "interleaved_zero_bubble" or (schedule == "1f1b" and chunks > 1)
    own = torch_group(stages, micro_batches)
    if schedule == "1f1b" and chunks == 1 and micro_batches < stages:
        return f"torch's 1F1B needs at least as many micro-batches as stages: {micro_batches} for {stages}; use more"
    if grouped and micro_batches % torch_rounds(stages, micro_batches):
        return (
            f"torch runs {micro_batches} micro-batches on {stages} stages in {torch_rounds(stages, micro_batches)} "
            "rounds, which must divide them; use a multiple"
        )
    if grouped and group not in (None, own):
        return (
            f"torch takes groups of {own} micro-batches here, which is no option of its own, not {group}; leave it out"
        )
    if schedule == "dualpipev" and micro_batches < 2 * stages:
        return f"dualpipev needs 2 micro-batches a rank: {2 * stages}, not {micro_batches}; use a larger batch"
    return None


def refused_exchange(chunks: int, stages: int, *, overlap: bool, batched: bool) -> str | None:
    """Why Megatron's options of communication between stages exclude each other, or None.

    With two stages, an activation and a gradient to the same peer in one grouped call are taken for one another: both
    have one shape, and receives match in the order of posting. The guard stands in Megatron-LM's training script.
    """
    if overlap and chunks == 1:
        return "overlap_p2p_comm needs interleaving: without it no exchange of 1F1B can be hidden; leave it out"
    if overlap and batched:
        return (
            "overlap_p2p_comm and batch_p2p_comm exclude each other: batched exchanges are waited for at once; keep one"
        )
    if batched and chunks > 1 and stages == 2:
        return "interleaving over 2 stages needs overlap_p2p_comm: batched, activation and gradient are swapped; use it"
    return None
