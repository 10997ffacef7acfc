"""A step as one program of each rank: every visit written out, nothing folded. What folding is held against."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType

from spsim.engine.engine import run
from spsim.engine.lives import Integers
from spsim.engine.pieces import Node, Stretch
from spsim.engine.recording import Flight, Moments, Recording, columns
from spsim.engine.tasks import Meeting, Paces, RankProgram, Task
from spsim.step.chain import Chain
from spsim.step.folding import Step, Walked
from spsim.step.itinerary import Visit, visits
from spsim.step.lanes import end_of, flights_of
from spsim.step.ranks import Communicator
from spsim.step.segments import Segment
from spsim.step.sharing import Sharing


def unfold_step(
    step: Step, paces: Mapping[int, Paces] = MappingProxyType({}), sharing: Sharing | None = None
) -> Walked:
    """Run a step as one program of each rank, of which some may have paces of their own; transfers share links, if
    their `sharing` is given.
    """
    every = list(visits(step.itinerary))
    ranks = list(dict.fromkeys(rank for programs in step.programs.values() for rank in programs))
    programs = {rank: Concatenation(step, rank).program(every) for rank in ranks}
    durations = {rank: list(_durations(step, rank, every)) for rank in ranks}
    network = None
    if sharing is not None:
        traffic = [own for visit in every for own in sharing.of(visit.segment)]
        network = sharing.network(dict.fromkeys(ranks, traffic))
    moments = run(programs, slowdown=step.slowdown, durations=durations, paces=paces, network=network)
    ran = Taken(moments)
    nodes: list[Node] = []
    first_task = 0
    for visit in every:
        segment = visit.segment
        recording = ran.recording(segment, step.programs[segment.name], step.sizes[segment.name])
        nodes.append(
            Stretch(
                recording, segment.phase, visit.layer, visit.micro_batch, 0, first_task,
                brings=visit.brings, drops=visit.drops,
            )
        )  # fmt: skip
        first_task += len(segment.tasks)
    return Walked(nodes, sum(map(len, moments.values())), overlapping=True)


class Taken:
    """The moments of each rank, taken segment after segment."""

    def __init__(self, moments: Mapping[int, Sequence[Moments]]) -> None:
        self.moments = moments
        self.taken = dict.fromkeys(moments, 0)
        self.ends = dict.fromkeys(moments, 0)
        """When the kernels so far have ended."""
        self.flights: dict[int, list[Flight]] = {rank: [] for rank in moments}
        """Communications that are under way then."""

    def recording(self, segment: Segment, ranks: Iterable[int], sizes: Sequence[int] | Integers) -> Recording:
        """The next segment of some ranks; times count from the beginning of the step."""
        own = {rank: self.take(rank, len(segment.tasks)) for rank in ranks}
        times = {rank: columns(found) for rank, found in own.items()}
        begins = {rank: self.ends[rank] for rank in own}
        flights = {rank: self.flights[rank] for rank in own}
        for rank, found in own.items():
            self.ends[rank] = end = end_of(segment, found, self.ends[rank])
            flights_now = (*self.flights[rank], *flights_of(segment, found))
            self.flights[rank] = [flight for flight in flights_now if flight.end_ps > end]
        return Recording(segment.outline, times, sizes, begins, flights)

    def take(self, rank: int, tasks: int) -> Sequence[Moments]:
        """Those of the next tasks of a rank."""
        first, self.taken[rank] = self.taken[rank], self.taken[rank] + tasks
        return self.moments[rank][first : first + tasks]


def _durations(step: Step, rank: int, every: Sequence[Visit]) -> Iterator[int]:
    for visit in every:
        yield from step.durations[visit.segment.name].get(rank, ())


class Concatenation:
    """The program of one rank so far."""

    def __init__(self, step: Step, rank: int) -> None:
        self.step = step
        self.rank = rank
        self.chain = Chain()
        self.called: Counter[object] = Counter()

    def program(self, every: Sequence[Visit]) -> RankProgram:
        """The tasks of all visits, numbered through; durations are given by their places."""
        for visit in every:
            self.visit(visit)
        return RankProgram(self.chain.tasks)

    def visit(self, visit: Visit) -> None:
        """One more visit, if the rank takes part in it."""
        program = self.step.programs[visit.segment.name].get(self.rank)
        if program is not None:
            self.chain.append(visit.segment, self._renumbered(program.tasks))

    def _renumbered(self, tasks: Sequence[Task]) -> list[Task]:
        """With the calls of each communicator numbered through, too."""
        calls: Counter[object] = Counter()
        found = [
            task._replace(meetings=tuple(self._meeting(meeting, calls) for meeting in task.meetings)) for task in tasks
        ]
        self.called += calls
        return found

    def _meeting(self, meeting: Meeting, calls: Counter[object]) -> Meeting:
        communicator, number = meeting.key
        calls[communicator] = max(calls[communicator], number)
        return self.meeting(communicator, number + self.called[communicator], meeting.parties)

    def meeting(self, communicator: Communicator, number: int, parties: int) -> Meeting:
        """A call of a communicator by its number in the step."""
        return Meeting((communicator, number), parties)
