"""A step as one program of each rank: every visit written out, nothing folded. What folding is held against."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice

from spsim.engine.engine import Meeting, Need, RankProgram, Task, run
from spsim.engine.pieces import Node, Stretch
from spsim.engine.recording import COMPUTE_LANE, Flight, Moments, Recording, columns
from spsim.step.folding import Step, Walked
from spsim.step.itinerary import Visit, visits
from spsim.step.lanes import end_of, flights_of
from spsim.step.segments import Segment


def unfold_step(step: Step) -> Walked:
    """Run a step as one program of each rank."""
    every = list(visits(step.itinerary))
    ranks = list(dict.fromkeys(rank for programs in step.programs.values() for rank in programs))
    programs = {rank: _Concatenation(step, rank).program(every) for rank in ranks}
    durations = {rank: list(_durations(step, rank, every)) for rank in ranks}
    moments = run(programs, slowdown=step.slowdown, durations=durations)
    own = {rank: _Rank(iter(times)) for rank, times in moments.items()}
    nodes: list[Node] = []
    first_task = 0
    for visit in every:
        segment = visit.segment
        recording = _recorded(segment, {rank: own[rank] for rank in step.programs[segment.name]}, step)
        nodes.append(
            Stretch(
                recording, segment.phase, visit.layer, visit.micro_batch, 0, first_task,
                brings=visit.brings, drops=visit.drops,
            )
        )  # fmt: skip
        first_task += len(segment.tasks)
    return Walked(nodes, sum(map(len, moments.values())), overlapping=True)


@dataclass(slots=True)
class _Rank:
    """What is left of a rank's times, and where the segments before have left it."""

    times: Iterator[Moments]
    time: int = 0
    """End of its last kernel."""
    flights: list[Flight] = field(default_factory=list)


def _recorded(segment: Segment, ranks: Mapping[int, _Rank], step: Step) -> Recording:
    """The next segment of some ranks, and how it found them."""
    begins = {rank: own.time for rank, own in ranks.items()}
    flights = {rank: own.flights for rank, own in ranks.items()}
    times = {}
    for rank, own in ranks.items():
        moments = list(islice(own.times, len(segment.tasks)))
        times[rank] = columns(moments)
        own.time = end_of(segment, moments, own.time)
        flying = (*own.flights, *flights_of(segment, moments))
        own.flights = [flight for flight in flying if flight.end_ps > own.time]
    return Recording(segment.outline, times, step.sizes[segment.name], begins=begins, flights=flights)


def _durations(step: Step, rank: int, every: Sequence[Visit]) -> Iterator[int]:
    for visit in every:
        yield from step.durations[visit.segment.name].get(rank, ())


class _Concatenation:
    """The program of one rank so far."""

    def __init__(self, step: Step, rank: int) -> None:
        self.step = step
        self.rank = rank
        self.tasks: list[Task] = []
        self.last: dict[str, int] = {}
        """Last task of each lane before the current segment."""
        self.exports: dict[str, int] = {}
        self.called: Counter[object] = Counter()

    def program(self, every: Sequence[Visit]) -> RankProgram:
        """The tasks of all visits, numbered through; durations are given by their places."""
        for visit in every:
            if self.rank in self.step.programs[visit.segment.name]:
                self._append(visit)
        return RankProgram(self.tasks)

    def _append(self, visit: Visit) -> None:
        segment, first = visit.segment, len(self.tasks)
        joined = sorted(self.last[lane] for lane in {COMPUTE_LANE, *segment.joins} if lane in self.last)
        calls: Counter[object] = Counter()
        for task in self.step.programs[segment.name][self.rank].tasks:
            own: list[Need] = [need + first for need in task.needs if isinstance(need, int)]
            named = [self.exports[need] for need in task.needs if isinstance(need, str) and need in self.exports]
            meetings = tuple(self._meeting(meeting, calls) for meeting in task.meetings)
            needs = (*(own or joined), *named)
            self.tasks.append(replace(task, id=task.id + first, needs=needs, meetings=meetings))
        self.called += calls
        self.exports |= {name: task + first for name, task in segment.exports.items()}
        self.last |= {task.lane: task.id for task in self.tasks[first:]}

    def _meeting(self, meeting: Meeting, calls: Counter[object]) -> Meeting:
        """Calls of a communicator are numbered through, too."""
        communicator, number = meeting.key
        calls[communicator] = max(calls[communicator], number)
        return replace(meeting, key=(communicator, number + self.called[communicator]))
