"""Exchanges of torch's schedules (`torch.distributed.pipelining.schedules`, 2.13.0)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from spsim.step.pipeline.messages import (
    DeadlockError,
    Instruction,
    Message,
    Post,
    Run,
    Stages,
    Wait,
    awaited,
    exchanged,
    posted,
)
from spsim.step.pipeline.orders import Action, Row, pairs

Unit = tuple[Action, ...]
"""Passes whose sends leave together; empty where FSDP or the gradients' reduction takes a slot, which moves nothing."""
Step = Unit | Post
"""Of a rank: passes, or one message."""
PREFETCHED = 3
"""Chunks whose parameters are gathered ahead, were they sharded."""


def fill_drain(model: Stages, rank: int, row: Sequence[Action]) -> Iterator[Instruction]:
    """GPipe: receives are waited for at once, the sends of a phase at its end."""
    underway: list[Message] = []
    for action, following in zip(row, [*row[1:], None], strict=True):
        yield from exchanged(model.needed(rank, action))
        yield Run(action)
        sent = model.sent(rank, action)
        yield from posted(sent)
        underway += [sent] if sent else []
        if following is None or action.kind != following.kind:
            yield from awaited(*underway)
            underway.clear()


def torch_one_f_one_b(model: Stages, rank: int, row: Sequence[Action]) -> Iterator[Instruction]:
    """Schedule1F1B: as Megatron's in the steady state, but a send of warm-up and cool-down is waited for only after the
    next pass.
    """
    underway: Message | None = None
    yield from exchanged(model.needed(rank, row[0]))
    for action, following in zip(row, [*row[1:], None], strict=True):
        yield Run(action)
        yield from awaited(underway)
        underway = None
        sent = model.sent(rank, action)
        needed = model.needed(rank, following) if following else None
        if following and action.kind != following.kind:
            yield from exchanged(sent, needed)
        else:
            yield from posted(sent)
            yield from exchanged(needed)
            underway = sent
    yield from awaited(underway)


def runtime(model: Stages, rows: Sequence[Row], *, defer: bool) -> tuple[tuple[Instruction, ...], ...]:
    """All other schedules: a receive is waited for just before use, sends at the end of the step."""
    steps = _placed(model, [[*_units(model, rank, row)] for rank, row in enumerate(rows)])
    if defer:
        steps = [[*_deferred(model, rank, own)] for rank, own in enumerate(steps)]
    return tuple(tuple(_written(model, rank, own)) for rank, own in enumerate(steps))


def _written(model: Stages, rank: int, steps: Sequence[Step]) -> Iterator[Instruction]:
    sent: list[Message] = []
    for step in steps:
        if isinstance(step, Post):
            yield step
            sent += [message for message in step.messages if message.sender == rank]
            continue
        for action in step:
            yield from awaited(model.needed(rank, action))
            yield Run(action)
    if sent:
        yield Wait(tuple(sent))


def _units(model: Stages, rank: int, row: Row) -> Iterator[Unit]:
    """The row with a slot for each gather and release of a chunk's parameters, which torch plans for every model,
    sharded or not, and one for the reduction of a chunk's gradients.
    """
    units = [*pairs(model.schedule, model.ranks, rank, row)]
    gathered: set[int] = set()
    ends = {chunk: max(place for place, own in enumerate(row) if own.chunk == chunk) for chunk in range(model.chunks)}
    place = 0
    for unit, wanted in zip(units, _chunks_to_come(units), strict=True):
        slots = len(gathered - wanted) + len(wanted - gathered)
        gathered = wanted
        yield from [()] * slots
        yield unit
        for action in unit:
            if place == ends[action.chunk]:
                yield ()
            place += 1


def _chunks_to_come(units: Sequence[Unit]) -> list[set[int]]:
    """At each unit, the next chunks that run."""
    order: list[int] = []
    found: list[set[int]] = []
    for unit in reversed(units):
        own = [action.chunk for action in unit]
        order = [*own, *(chunk for chunk in order if chunk not in own)]
        found.append({*order[:PREFETCHED]})
    return found[::-1]


def _placed(model: Stages, units: Sequence[Sequence[Unit]]) -> list[list[Step]]:
    """Sends behind the passes that make them; each receive where the send comes if all ranks run one slot at a time."""
    steps: list[list[Step]] = [[] for _ in units]
    places = [0] * len(units)
    made: set[Message | None] = {None}
    while waiting := [rank for rank, own in enumerate(units) if places[rank] < len(own)]:
        before = sum(places)
        for rank in waiting:
            unit = units[rank][places[rank]]
            if any(model.needed(rank, action) not in made for action in unit):
                continue
            places[rank] += 1
            steps[rank].append(unit)
            for message in [message for action in unit if (message := model.sent(rank, action))]:
                made.add(message)
                steps[rank].append(Post((message,)))
                steps[message.receiver].append(Post((message,)))
        if sum(places) == before:
            raise DeadlockError(waiting)
    return [[step for step in own if step] for own in steps]


def _deferred(model: Stages, rank: int, steps: Sequence[Step]) -> Iterator[Step]:
    """Each receive as late as its use; before a send to a higher rank, what that rank sends is received first."""
    waiting: dict[Message, Post] = {}
    for step in steps:
        if not isinstance(step, Post):
            for action in step:
                message = model.needed(rank, action)
                if message in waiting:
                    yield waiting.pop(message)
        elif step.messages[0].receiver == rank:
            waiting[step.messages[0]] = step
            continue
        elif rank < (peer := step.messages[0].receiver):
            for message in [message for message in waiting if message.sender == peer]:
                yield waiting.pop(message)
        yield step
