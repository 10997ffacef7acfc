"""A step of several pipeline stages: the passes of each chunk run once, and stand where the schedule puts them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from spsim.engine.pieces import Move, Node, Pass, Stretch, placed
from spsim.engine.recording import Flight, Moments, Outline, Recording, TaskInfo
from spsim.engine.trace import Wait
from spsim.errors import InputError
from spsim.lazy import lazy
from spsim.program.mesh import Axis
from spsim.step.closing import Closing
from spsim.step.folding import Alone, Step, fold_each
from spsim.step.gradients import PARAMETERS, Sync
from spsim.step.lanes import IDLE, flights_of
from spsim.step.levels import Level
from spsim.step.pipeline.clock import Clock
from spsim.step.pipeline.orders import KINDS, Action, Numbers
from spsim.step.pipeline.timeline import Timeline
from spsim.step.pipeline.timing import MessageSpan, PassSpan, Times
from spsim.step.pipeline.waiting import Gaps, gaps_of, waits_of
from spsim.step.stages import Passes, SortedPasses, Stages, Work

SENT: Mapping[str, tuple[Pass, str]] = {
    "activation": ("forward", "pp forward"),
    "gradient": ("backward", "pp backward"),
}
"""Kind of a message -> the pass that it belongs to, and how its lanes are called."""


Entry = tuple[Closing, Sync | str, int]
"""A task after the last micro-batch: its segment, what it is, and its picoseconds."""
Row = Sequence[Entry]
"""Those of a stage."""


@dataclass(frozen=True)
class Closed:
    """The segments after the last micro-batch, and picoseconds of their tasks."""

    kinds: Sequence[Sequence[tuple[Closing, Sequence[int]]]]
    """Of each kind of stages,"""
    kind_of: Sequence[int]
    """and which kind each stage is."""
    messages: Sequence[Mapping[Sync, int]] = ()
    """Bytes of their collectives, of each kind."""
    reductions: Sequence[Sequence[int]] = ()
    """Of each kind, how many of its tasks, from the first on, sum gradients of each chunk, the last chunk first; where
    they run behind passes.
    """
    gathers: Sequence[Sequence[Sequence[int]]] = ()
    """Of each kind and chunk, picoseconds of the gathers of its weights, where those run before the first passes."""
    slowdown: float = 0.0
    """Of kernels beside them."""

    @property
    def segments(self) -> list[Sequence[tuple[Closing, Sequence[int]]]]:
        """Of each stage."""
        return [self.kinds[kind] for kind in self.kind_of]

    def ends_ps(self, finished_ps: Numbers) -> list[int]:
        """When each stage has ended that ran its last pass then, if nothing is reduced or gathered behind passes: what
        meets both ends, and what meets all stages, begins when the last has come to it.
        """
        lengths = np.array([*map(_lengths, self.kinds)])[[*self.kind_of]].T
        ends = finished_ps + lengths[0]
        tied = np.flatnonzero(lengths[1])
        if tied.size:
            ends[tied] = ends[tied].max() + lengths[1][tied]
        ends = ends + lengths[2]
        for meeting, after in zip(lengths[3::2], lengths[4::2], strict=True):
            ends = ends.max() + meeting + after
        found: list[int] = ends.tolist()
        return found


@dataclass(frozen=True)
class Messages:
    """What stages send each other."""

    bytes: int
    """Of each message."""
    transfer_ps: Mapping[tuple[int, int], int]
    """By sender and receiver."""

    @lazy
    def outlines(self) -> Mapping[str, Outline]:
        """Of a message on each of its ranks, by its lane."""
        found = {}
        for kind, (phase, lane) in SENT.items():
            for way, sent in (("send", self.bytes), ("receive", 0)):
                info = TaskInfo(
                    kind, "communication", phase, "stage", collective="send_receive", axis="pp",
                    message_bytes=self.bytes, sent_bytes=sent,
                )  # fmt: skip
                found[f"{lane} {way}"] = Outline([f"{lane} {way}"], [info])
        return found


@dataclass(frozen=True)
class Pipelined:
    """A step as it ran on all stages; stage r is simulated by rank r x `stride`."""

    stages: Stages
    stride: int
    sorted: SortedPasses
    alone: Sequence[Alone]
    """Each of the sorts of passes by itself."""
    levels: Callable[[], list[Level]] | None
    """How full memory is in each, where that is known without their nodes."""
    timeline: Timeline
    closed: Closed
    messages: Messages
    events: int

    def rank_of(self, stage: int) -> int:
        """The rank that is simulated for a stage."""
        return stage * self.stride

    def work_of(self, rank: int, action: Action) -> Work:
        """What a pass of a stage runs."""
        return self.sorted.sorts[self.sorted.place(rank, action)][1]

    @lazy
    def times(self) -> Times:
        """Of all passes and messages of the step."""
        return self.timeline.written_out()

    @lazy
    def nodes(self) -> list[Node]:
        """All of the step, in order of time."""
        return [*self._nodes()]

    def _nodes(self) -> Iterator[Node]:
        runs: list[tuple[int, int, PassSpan | MessageSpan]] = [
            *((span.start_ps, span.rank, span) for span in self.times.passes),
            *((span.start_ps, span.message.receiver, span) for span in self.times.messages),
        ]
        tasks = 0
        known: dict[tuple[Recording, int], Recording] = {}
        for _, _, span in sorted(runs, key=lambda run: run[:2]):
            made = self._message(span, tasks) if isinstance(span, MessageSpan) else self._pass(span, tasks, known)
            tasks += sum(node.tasks for node in made)
            yield from made
        yield from self.closing_nodes(tasks)

    def _pass(self, span: PassSpan, tasks: int, known: dict[tuple[Recording, int], Recording]) -> list[Node]:
        chunk = self.stages[span.rank][span.action.chunk]
        rank = self.rank_of(span.rank)

        def on(recording: Recording) -> Recording:
            if (recording, rank) not in known:
                known[recording, rank] = recording.on({0: rank})
            return known[recording, rank]

        move = Move(span.start_ps, tasks, chunk.first, span.action.micro_batch)
        alone = self.alone[self.sorted.place(span.rank, span.action)]
        return [placed(node, move, on) for node in alone.nodes]

    def _message(self, span: MessageSpan, tasks: int) -> list[Node]:
        """A send on one rank, and a receive on the other."""
        phase, lane = SENT[span.message.kind]
        sides = (
            (span.message.sender, f"{lane} send", span.sender_posted_ps),
            (span.message.receiver, f"{lane} receive", span.receiver_posted_ps),
        )
        found: list[Node] = []
        for stage, name, posted in sides:
            times = {self.rank_of(stage): np.array([[posted, span.start_ps, span.end_ps]], dtype=np.int64)}
            recording = Recording(self.messages.outlines[name], times, ())
            found.append(Stretch(recording, phase, None, span.message.micro_batch, 0, tasks + len(found)))
        return found

    # After the last micro-batch

    @property
    def ends_ps(self) -> list[int]:
        """When each stage has ended."""
        if not self.closed.reductions and not self.closed.gathers:
            return self.closed.ends_ps(self.timeline.finished_ps)
        finished: list[int] = self.timeline.finished_ps.tolist()
        return [own[-1][1][-1][2] if own else end for own, end in zip(self.closing, finished, strict=True)]

    @lazy
    def closing(self) -> list[list[tuple[Closing, list[Moments]]]]:
        """Of each stage, when each task is posted, starts and ends; a tied table waits for both ends, the gradient norm
        for all stages.
        """
        cursors: list[int] = self.timeline.finished_ps.tolist()
        found: list[list[tuple[Closing, list[Moments]]]] = [[] for _ in cursors]
        rows: list[Row] = [
            [(made, step, ps) for made, times in own for step, ps in zip(made.steps, times, strict=True)]
            for own in self.closed.segments
        ]
        places = [self._reduce(found[stage], row, stage, cursors) for stage, row in enumerate(rows)]
        while any(place < len(row) for place, row in zip(places, rows, strict=True)):
            for stage, row in enumerate(rows):
                while places[stage] < len(row) and _meets(row[places[stage]]) is None:
                    cursors[stage] = self._close(found[stage], row[places[stage]], stage, cursors[stage])
                    places[stage] += 1
            waiting = [stage for stage, row in enumerate(rows) if places[stage] < len(row)]
            ends = [stage for stage in waiting if _meets(rows[stage][places[stage]]) == "embedding"]
            together = ends or waiting
            start = max([cursors[stage] for stage in together], default=0)
            for stage in together:
                cursors[stage] = _append(found[stage], rows[stage][places[stage]], cursors[stage], start)
                places[stage] += 1
        return found

    def _close(self, found: list[tuple[Closing, list[Moments]]], entry: Entry, stage: int, cursor: int) -> int:
        """The next task of a stage that does not wait for others; when the one after it may begin. What weights that
        are gathered before the first passes cost is shared among their gathers.
        """
        made, step, ps = entry
        if self.closed.gathers and isinstance(step, Sync) and step.name == PARAMETERS:
            times = [sum(map(sum, own)) for own in self.closed.gathers]
            cost = self.lead_ps + self._lost(max(times) - self.lead_ps)
            entry = (made, step, cost * ps // times[self.closed.kind_of[stage]])
        return _append(found, entry, cursor, cursor)

    def _lost(self, hidden_ps: int) -> int:
        """What kernels lose beside collectives of replicas that they hide."""
        return round(self.closed.slowdown * max(0, hidden_ps))

    def _reduce(self, found: list[tuple[Closing, list[Moments]]], row: Row, stage: int, cursors: list[int]) -> int:
        """Sums the gradients of a stage that are summed behind its passes: chunk after chunk, each from the end of its
        last backward pass on; of one that goes in buckets all but the last may run behind that pass, evenly spread. How
        many tasks that were.
        """
        if not self.closed.reductions:
            return 0
        counts, last = self.closed.reductions[self.closed.kind_of[stage]], self._last_backward[stage]
        free, done = 0, 0
        for chunk, buckets in zip(reversed(range(len(counts))), counts, strict=True):
            own = row[done : done + buckets]
            start, end = last[chunk]
            total = sum(ps for _, _, ps in own)
            free = max(free, end - min(total, end - start) * (buckets - 1) // max(1, buckets))
            for entry in own:
                free = _append(found, entry, free, free)
            done += buckets
        hidden = sum(ps for _, _, ps in row[:done]) - max(0, free - cursors[stage])
        cursors[stage] = max(cursors[stage], free) + self._lost(hidden)
        return done

    @lazy
    def _last_backward(self) -> list[list[list[int]]]:
        """When the last backward pass of each stage and chunk starts and ends."""
        return self._windows(-1, "BW", last=True)

    def _windows(self, section: int, kinds: str, *, last: bool) -> list[list[list[int]]]:
        """When the last or the first pass of some kinds of each stage and chunk starts and ends, in one of the sections
        of the timeline.
        """
        passes = self.timeline.sections[section].passes
        own = np.flatnonzero(np.isin(passes.kinds, [KINDS.index(kind) for kind in kinds]))
        own = own[np.argsort(passes.starts_ps[own], kind="stable")][:: 1 if last else -1]
        found = np.zeros((len(self.stages), len(self.stages[0]), 2), np.int64)
        found[passes.ranks[own], passes.chunks[own]] = np.stack([passes.starts_ps[own], passes.ends_ps[own]], axis=1)
        windows: list[list[list[int]]] = found.tolist()
        return windows

    @lazy
    def lead_ps(self) -> int:
        """By how much the step is later because weights are gathered before the first passes of their chunks, each
        gather as soon as the one before it is done, each for an equal part of its pass: the first chunk of all waits
        for its own, others are gathered meanwhile.
        """
        late = 0
        for first, kind in zip(self._windows(0, "F", last=False), self.closed.kind_of, strict=True):
            ready = 0
            for (begun, ended), gathers in zip(first, self.closed.gathers[kind], strict=True):
                for place, ps in enumerate(gathers):
                    ready += ps
                    late = max(late, ready - begun - (ended - begun) * place // len(gathers))
        return late

    def closing_nodes(self, tasks: int) -> Iterator[Stretch]:
        """After the last micro-batch, stage after stage; the first task has the number `tasks`."""
        for stage, own in enumerate(self.closing):
            rank = self.rank_of(stage)
            before = int(self.timeline.finished_ps[stage])
            flights: list[Flight] = []
            for made, moments in own:
                times = {rank: np.array(moments, dtype=np.int64)}
                recording = Recording(made.segment.outline, times, (), begins={rank: before}, flights={rank: flights})
                yield Stretch(recording, made.segment.phase, None, None, 0, tasks)
                tasks += len(moments)
                before = recording.kernels_end(rank)
                flights = [f for f in (*flights, *flights_of(made.segment, moments)) if f.end_ps > before]

    @lazy
    def gaps(self) -> Gaps:
        """When ranks run no pass."""
        return gaps_of(self.timeline)

    @lazy
    def waits(self) -> list[Wait]:
        """When simulated ranks wait for messages between their passes."""
        found: list[Wait] = []
        for stage, begin, end, messages in waits_of(self.timeline):
            flights = [
                Flight(SENT[kind][1], posted, start, stop, "send_receive") for kind, posted, start, stop in messages
            ]
            found.append(Wait(self.rank_of(stage), begin, end, flights))
        return found


def _lengths(closing: Sequence[tuple[Closing, Sequence[int]]]) -> list[int]:
    """Picoseconds up to what meets the other end, and of that, if anything does; up to what meets all stages, of that,
    up to the next, and so on.
    """
    found = [0, 0, 0]
    for made, times in closing:
        done = 0
        for place, axis in made.meetings:
            found[-1] += sum(times[done:place])
            if axis == "embedding":
                found = [*found[2:], times[place], 0]
            else:
                found += [times[place], 0]
            done = place + 1
        found[-1] += sum(times[done:])
    return found


def _meets(entry: Entry) -> Axis | None:
    step = entry[1]
    return step.meets if isinstance(step, Sync) else None


def _append(
    found: list[tuple[Closing, list[tuple[int, int, int]]]],
    entry: Entry,
    posted: int,
    start: int,
) -> int:
    """One task more of a stage; when it ends."""
    made, _, ps = entry
    if not found or found[-1][0] is not made:
        found.append((made, []))
    found[-1][1].append((posted, start, start + ps))
    return start + ps


def run_pipeline(
    passes: Passes,
    stages: Stages,
    clock: Clock,
    step: Step,
    messages: Messages,
    closed: Closed,
    *,
    stride: int,
) -> Pipelined:
    """The passes of every chunk by themselves, and then all of the step."""
    found = stages.sorted(passes, clock)
    apart = fold_each(step, found.rows)
    for (_, work), own in zip(found.sorts, apart.rows, strict=True):
        if any(time or busy != IDLE for time, busy in own.ends):
            raise InputError(
                f"pp: a pass ({work}) leaves communication behind: not simulated yet; use dp_overlap = false"
            )
    pass_ps = np.array([own.at_ps for own in apart.rows])[found.of_classes]
    message_ps = [messages.transfer_ps[sender, receiver] for sender, receiver, _ in clock.lanes]
    timeline = clock.times(pass_ps, message_ps)
    return Pipelined(stages, stride, found, apart.rows, apart.levels, timeline, closed, messages, apart.events)
