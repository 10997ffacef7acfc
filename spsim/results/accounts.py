"""Where the time of one rank goes: each picosecond of a window belongs to one part.

| on that rank | part |
|---|---|
| a kernel runs | the class of its operator, or `recomputation` |
| ... while communication is posted | what it loses of that time: `slowed by communication`; the rest as above |
| no kernel runs, a collective transfers | `exposed <kind>`, or `exposed several kinds` at once |
| ... and it takes tokens to experts or back | `exposed <kind> with experts` |
| ... and it synchronises weight gradients | `weight synchronisation` |
| neither, a communication waits for a rank of the same stage | `waiting for peers` |
| ... or for one of another stage | `waiting for another stage` |
| nothing of these | `idle` |
| in the window of a pass: a task of another layer or pass, if none of its own is at the same | `other layers` |

A piece of the trace reaches from the end of the kernels before it to the end of its own; what outlasts it is known to
the next piece as a flight. So the account of a step is that of each recording times its pieces, and what outlasts the
last. What a part loses to communication is rounded once, over all of a window.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from spsim.engine.lives import ENDED, POSTED, STARTED, Integers
from spsim.engine.pieces import Pass, Piece
from spsim.engine.recording import COMPUTE_LANE, Recording
from spsim.engine.trace import Trace, Wait
from spsim.program.mesh import EXPERT_AXES

RECOMPUTATION, SLOWED, SYNC = "recomputation", "slowed by communication", "weight synchronisation"
SEVERAL = "exposed several kinds"
PEERS, STAGES, IDLE, OTHER = "waiting for peers", "waiting for another stage", "idle", "other layers"
PIPELINE_LANES = "pp"
"""How lanes between the stages of a pipeline begin."""

USUAL = -1.0
"""The share that kernels lose beside a communication, as the run says."""
Shares = frozenset[float]
"""Of all communications that are posted."""
KERNEL, TRANSFER, PEER, STAGE = range(4)
"""What a rank does, the first of these that applies."""


class Activity(NamedTuple):
    """Something that a rank does from `start` to `end`."""

    start: int
    end: int
    level: int
    part: str
    share: float = USUAL
    """That kernels lose beside it."""


@dataclass(frozen=True, slots=True)
class Account:
    """Picoseconds by part; of those of kernels, how many while communication is posted, at the usual loss or at others
    by part and shares.
    """

    parts: Counter[str] = field(default_factory=Counter)
    contended: Counter[str] = field(default_factory=Counter)
    shared: Counter[tuple[str, Shares]] = field(default_factory=Counter)

    def add(self, other: Account, times: int = 1) -> None:
        """Add so many of another."""
        for mine, others in ((self.parts, other.parts), (self.contended, other.contended)):
            for part, length in others.items():
                mine[part] += times * length
        for key, length in other.shared.items():
            self.shared[key] += times * length

    def charged(self, slowdown: float) -> Counter[str]:
        """The parts, with what kernels lose to communication as one of its own: `slowdown`, or the share of what is
        posted, the largest of several.
        """
        losses = {part: length * slowdown for part, length in self.contended.items()}
        for (part, shares), length in self.shared.items():
            share = max(slowdown if own == USUAL else own for own in shares)
            losses[part] = losses.get(part, 0) + length * share
        lost = {part: round(loss) for part, loss in losses.items()}
        found = Counter(self.parts)
        found.subtract(lost)
        found[SLOWED] += sum(lost.values())
        return found


def is_exposed(part: str) -> bool:
    """Whether it is a kind of communication that no kernel hides."""
    return part.startswith("exposed")


# Windows


def of_piece(recording: Recording, rank: int) -> Account:
    """From the end of the kernels before a piece to the end of its own."""
    activities = [*_tasks(recording, rank), *_flights(recording, rank)]
    return account(activities, recording.begins.get(rank, 0), recording.kernels_end(rank))


def levels(recording: Recording, ranks: Sequence[int]) -> dict[int, list[int]]:
    """Picoseconds of the same by what each of some ranks does: those of `KERNEL`, `TRANSFER`, `PEER` and `STAGE`."""
    own = [(rank, recording.times[rank]) for rank in ranks]
    if own and not recording.flights:
        return _levels(recording, recording.outline.lanes, own)
    found: dict[int, list[int]] = {}
    for rank, times in own:
        flights = recording.flights.get(rank, ())
        moments = np.concatenate([times, [flight[1:4] for flight in flights]]) if flights else times
        lanes = [*recording.outline.lanes, *(flight.lane for flight in flights)]
        found |= _levels(recording, lanes, [(rank, moments)])
    return found


def _levels(recording: Recording, lanes: Sequence[str], own: Sequence[tuple[int, Integers]]) -> dict[int, list[int]]:
    """Of some ranks at once, whose moments on some lanes are given."""
    at = {lane: KERNEL if lane.startswith(COMPUTE_LANE) else _waits_at(lane) for lane in {*lanes}}
    does, times = np.array([at[lane] for lane in lanes]), np.stack([moments for _, moments in own])
    works, waits = times[..., [STARTED, ENDED]], times[..., [POSTED, STARTED]]
    spans = [works[:, does == KERNEL], works[:, does != KERNEL], waits[:, does == PEER], waits[:, does == STAGE]]
    begin, end = np.array(
        [(recording.begins.get(rank, 0), recording.kernels_end(rank)) for rank, _ in own], dtype=times.dtype
    ).T[..., None]
    covered = [_covered(spans[0], begin, end)]
    for level in (TRANSFER, PEER, STAGE):
        more = spans[level].size
        covered.append(_covered(np.concatenate(spans[: level + 1], axis=1), begin, end) if more else covered[-1])
    found = np.diff(np.array(covered), axis=0, prepend=0)
    return {rank: row for (rank, _), row in zip(own, found.T.tolist(), strict=True)}


def _covered(spans: Integers, begin: Integers, end: Integers) -> Integers:
    """How much of a time lies in any of some spans, of each of some ranks."""
    begins, ends = spans[..., 0], spans[..., 1]
    if (begins[:, 1:] < begins[:, :-1]).any():
        order = begins.argsort(axis=1, kind="stable")  # lanes are in order each
        begins, ends = (np.take_along_axis(edge, order, axis=1) for edge in (begins, ends))
    begins, ends = (np.minimum(np.maximum(edge, begin), end) for edge in (begins, ends))
    begins[:, 1:] = np.maximum(begins[:, 1:], np.maximum.accumulate(ends, axis=1)[:, :-1])
    found: Integers = np.maximum(ends - begins, 0).sum(axis=1)
    return found


def of_step(trace: Trace) -> Account:
    """The whole step, on the rank that ends last."""
    found = Account()
    last = {rank: trace.last_of(rank) for rank in trace.copies}
    ends = {rank: piece.shift_ps + piece.recording.delayed(piece.late).busy_until(rank) for rank, piece in last.items()}
    rank = _last_rank(ends, ((recording, count) for recording, (_, count) in trace.recordings.items()))
    for recording, (_, count) in trace.recordings.items():
        if rank in recording.times:
            found.add(of_piece(recording, rank), count)
    for wait in (wait for wait in trace.waits if wait.rank == rank):
        found.add(of_wait(wait))
    recording, shift = last[rank].recording.delayed(last[rank].late), last[rank].shift_ps
    outlasting = [*_tasks(recording, rank), *_flights(recording, rank)]
    found.add(account(outlasting, recording.kernels_end(rank), trace.end_ps - shift))
    return found


def of_wait(wait: Wait) -> Account:
    """Between two pieces."""
    activities = [activity for flight in wait.flights for activity in _communication(*flight)]
    return account(activities, wait.start_ps, wait.end_ps)


def of_pass(trace: Trace, phase: Pass, layer: int = 0, micro_batch: int = 0) -> Account:
    """The pass of one layer and micro-batch, from the first task of all ranks to the last, where the last one ends."""
    start, end = trace.window_of(phase, layer, micro_batch)
    ends: dict[int, int] = {}
    own = list(trace.pieces_of(phase, layer, micro_batch))
    for piece in own:
        for rank, ended in piece.recording.delayed(piece.late).ends.items():
            ends[rank] = max(ends.get(rank, 0), piece.shift_ps + ended)
    rank = _last_rank(ends, ((piece.recording, 1) for piece in own))
    first_tasks = {piece.first_task for piece in own}
    activities: list[Activity] = []
    for piece in trace.pieces_during(start, end):
        if rank in piece.recording.times:
            activities += _of_window(piece, rank, own=piece.first_task in first_tasks)
    return account(activities, start, end)


def kernels_wait(pieces: Iterable[Piece], rank: int, start: int, end: int) -> list[Interval]:
    """When no kernel of a rank runs between two moments because another rank is waited for."""
    own = (piece for piece in pieces if rank in piece.recording.times)
    activities = [activity for piece in own for activity in _of_window(piece, rank, own=True)]
    found: list[Interval] = []
    for interval in intervals(activities, start, end):
        if found and found[-1].part == interval.part and found[-1].end == interval.start:
            found[-1] = found[-1]._replace(end=interval.end)
        elif interval.part in (PEERS, STAGES):
            found.append(interval)
    return found


def _last_rank(ends: dict[int, int], recordings: Iterable[tuple[Recording, int]]) -> int:
    """The rank that ends last; of several the one that computes longest, then the first."""
    busy: Counter[int] = Counter()
    for recording, count in recordings:
        busy.update({rank: count * sum(times) for rank, times in recording.compute.items()})
    return max(ends, key=lambda rank: (ends[rank], busy[rank], -rank))


# Activities


def _tasks(recording: Recording, rank: int) -> Iterator[Activity]:
    """Kernels, and the waits and transfers of communications, of one piece."""
    outline, moments = recording.outline, recording.times[rank].tolist()
    slowdowns = outline.slowdowns or [None] * len(outline.lanes)
    for lane, label, slowdown, (posted, start, end) in zip(
        outline.lanes, outline.labels, slowdowns, moments, strict=True
    ):
        if lane.startswith(COMPUTE_LANE):
            yield Activity(start, end, KERNEL, RECOMPUTATION if label.part == "recompute" else label.operator_class)
        else:
            yield from _communication(lane, posted, start, end, label.kind, slowdown)


def _flights(recording: Recording, rank: int) -> Iterator[Activity]:
    """The communications of earlier pieces that one piece finds."""
    for flight in recording.flights.get(rank, ()):
        yield from _communication(*flight)


def _communication(
    lane: str, posted: int, start: int, end: int, kind: str, slowdown: float | None
) -> Iterator[Activity]:
    share = USUAL if slowdown is None else slowdown
    part = SYNC if kind == "weight_sync" else f"exposed {kind.replace('_', '-')}"
    yield Activity(start, end, TRANSFER, f"{part} with experts" if lane in EXPERT_AXES else part, share)
    if posted < start:
        yield Activity(posted, start, _waits_at(lane), waits_on(lane), share)


def waits_on(lane: str) -> str:
    """What a communication of a lane waits for."""
    return STAGES if lane.startswith(PIPELINE_LANES) else PEERS


def _waits_at(lane: str) -> int:
    """The level at which a communication of a lane waits."""
    return PEER if waits_on(lane) == PEERS else STAGE


def _of_window(piece: Piece, rank: int, *, own: bool) -> Iterator[Activity]:
    """What a piece does at its place in time, as that of another layer unless it is the window's own."""
    shift = piece.shift_ps
    for start, end, level, part, share in _tasks(piece.recording.delayed(piece.late), rank):
        yield Activity(start + shift, end + shift, level, part if own else OTHER, share)


# Accounting


class Interval(NamedTuple):
    """A time in which nothing begins or ends."""

    start: int
    end: int
    part: str
    beside: Shares
    """What a kernel loses to communications that are posted; nothing where none are."""


def account(activities: Iterable[Activity], start: int, end: int) -> Account:
    """Each picosecond from `start` to `end` to one part."""
    found = Account()
    for begun, ended, part, beside in intervals(activities, start, end):
        found.parts[part] += ended - begun
        if beside == {USUAL}:
            found.contended[part] += ended - begun
        elif beside:
            found.shared[part, beside] += ended - begun
    return found


def intervals(activities: Iterable[Activity], start: int, end: int) -> Iterator[Interval]:
    """All of the time from `start` to `end`, in order."""
    edges: list[tuple[int, int, int, str, float]] = []
    for begun, ended, level, part, share in activities:
        first, last = max(begun, start), min(ended, end)
        if first < last:
            edges += (first, 1, level, part, share), (last, -1, level, part, share)
    active: tuple[dict[str, int], ...] = ({}, {}, {}, {})
    posted: Counter[float] = Counter()
    now = start
    for time, change, level, part, share in sorted(edges):
        if now < time:
            yield Interval(now, time, *_part_of(active, posted))
            now = time
        if level != KERNEL:
            posted[share] += change
        parts = active[level]
        parts[part] = parts.get(part, 0) + change
        if not parts[part]:
            del parts[part]
    if now < end:
        yield Interval(now, end, *_part_of(active, posted))


def _part_of(active: tuple[dict[str, int], ...], posted: Counter[float]) -> tuple[str, Shares]:
    """The part of what is active by level, and what a kernel loses to what is `posted`."""
    kernels, *others = active
    parts = kernels or next(filter(None, others), {IDLE: 1})
    part = next(iter(parts)) if len(parts) == 1 else _of_several([*parts])
    contended = kernels and part != OTHER
    return part, frozenset([share for share, number in posted.items() if number]) if contended else frozenset()


def _of_several(parts: Sequence[str]) -> str:
    """What happens at the same time counts as the window's own, if any of it is."""
    own = [part for part in parts if part != OTHER]
    return own[0] if len(own) == 1 else SEVERAL
