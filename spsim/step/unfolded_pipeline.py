"""A step of several pipeline stages as one program of each rank: every pass, message and wait written out. What the
folded one of `pipelined` is held against, and how stages run whose ranks differ.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from spsim.engine.engine import run
from spsim.engine.lives import ENDED
from spsim.engine.pieces import Node, Stretch
from spsim.engine.recording import Flight, Moments, Recording, columns
from spsim.engine.tasks import Meeting, RankProgram, Task
from spsim.engine.trace import Wait
from spsim.step.folding import Step
from spsim.step.gradients import STAGE_AXES
from spsim.step.itinerary import Visit
from spsim.step.perturbed import Ran
from spsim.step.pipeline.messages import Message, Post, Run
from spsim.step.pipeline.tape import Score
from spsim.step.pipelined import SENT, Closed, Messages
from spsim.step.ranks import Communicator, Ranks
from spsim.step.segments import Segment
from spsim.step.sharing import Sharing, Traffic
from spsim.step.stages import Passes, Stages
from spsim.step.unfolded import Concatenation, Taken
from spsim.step.written_stages import PerturbedStages, WrittenStage, written_stages


class Unfolded(NamedTuple):
    """A step as it ran."""

    nodes: list[Node]
    waits: list[Wait]
    events: int


def unfold_pipeline(
    passes: Passes,
    stages: Stages,
    score: Score,
    step: Step,
    messages: Messages,
    closed: Closed,
    ranks: Ranks,
    perturbed: PerturbedStages | None = None,
    sharing: Sharing | None = None,
) -> Unfolded:
    """All `ranks` of each stage, with what each stage runs, posts and waits for; the others as of `run_pipeline`.
    Transfers share links, if their `sharing` is given.
    """
    written = written_stages(passes, stages, score, step, closed, ranks, perturbed)
    programs: dict[int, RankProgram] = {}
    durations: dict[int, list[int]] = {}
    traffic: dict[int, Sequence[Traffic | None]] = {}
    ran: dict[int, Sequence[Ran]] = {}
    for stage in written:
        for rank in ranks.copies:
            transfer_ps = messages.transfer_ps if perturbed is None else perturbed.transfer_ps(rank, messages)
            made = _Program(stage, rank, len(written), transfer_ps)
            number = ranks.on_stage(stage.number, rank)
            programs[number], durations[number] = RankProgram(made.chain.tasks), made.durations
            if perturbed is not None:
                ran[number] = perturbed.ran(rank, made.ran)
            traffic[number] = made.traffic(sharing, messages.bytes) if sharing else ()
    paces = {} if perturbed is None else perturbed.perturbed.all_paces(ran)
    network = None if sharing is None else sharing.network(traffic)
    moments = run(programs, slowdown=step.slowdown, durations=durations, paces=paces, network=network)
    reading = _Reading(ranks, messages, moments)
    for stage in written:
        reading.read(stage)
    return Unfolded(reading.nodes(), [*reading.waits()], sum(map(len, moments.values())))


class _Program(Concatenation):
    """The program of one rank of a stage. Ranks of a stage meet as in any step, but for what is called on all stages; a
    message is between ranks at the same place.
    """

    def __init__(self, stage: WrittenStage, rank: int, stages: int, transfer_ps: Mapping[tuple[int, int], int]) -> None:
        super().__init__(stage.step, rank)
        self.ran: list[Segment | Message] = []
        self.stage = stage.number
        self.stages = stages
        self.durations: list[int] = []
        self.posted: dict[Message, int] = {}
        for instruction in stage.row:
            if isinstance(instruction, Run):
                self._visits(stage.passes[instruction.action])
            elif isinstance(instruction, Post):
                for message in instruction.messages:
                    self._post(message, transfer_ps[message.sender, message.receiver])
            else:
                self.chain.wait(self.posted[message] for message in instruction.messages)
        self._visits(stage.closing)

    def _visits(self, every: Sequence[Visit]) -> None:
        for visit in every:
            self.visit(visit)
            self.durations += self.step.durations[visit.segment.name][self.rank]
            self.ran.append(visit.segment)

    def _post(self, message: Message, duration_ps: int) -> None:
        """Kernels lose nothing to it."""
        lane = f"{SENT[message.kind][1]} {message.sender} {message.receiver}"
        self.posted[message] = self.chain.post(
            Task(0, lane, meetings=(Meeting((message, self.rank), 2),), slowdown=0.0)
        )
        self.durations.append(duration_ps)
        self.ran.append(message)

    def traffic(self, sharing: Sharing, message_bytes: int) -> Sequence[Traffic | None]:
        """What each task sends."""
        own = ([sharing.message(message_bytes)] if isinstance(made, Message) else sharing.of(made) for made in self.ran)
        return [traffic for tasks in own for traffic in tasks]

    def meeting(self, communicator: Communicator, number: int, parties: int) -> Meeting:
        """Of the ranks of all stages, of the two at the ends, or of this one."""
        if not STAGE_AXES.isdisjoint(communicator):
            return Meeting((communicator, number), parties * (self.stages if "pp" in communicator else 2))
        return Meeting((self.stage, communicator, number), parties)


class _Pieces(NamedTuple):
    """What stands together in the trace: a pass, or a message."""

    start_ps: int
    stage: int
    """Of a message, the one that receives it."""
    pieces: list[Stretch]


class _Reading:
    """Reads the moments of all ranks, stage after stage."""

    def __init__(self, ranks: Ranks, messages: Messages, moments: Mapping[int, Sequence[Moments]]) -> None:
        self.ranks = ranks
        self.outlines = messages.outlines
        self.taken = Taken(moments)
        self.free = dict.fromkeys(moments, 0)
        """When the last message has come that a rank has waited for."""
        self.gaps: list[tuple[int, int, int]] = []
        """Of a rank, from the end of a pass to the beginning of the next."""
        self.passes: list[_Pieces] = []
        self.closing: list[Stretch] = []
        self.messages: dict[Message, dict[int, dict[int, Moments]]] = defaultdict(dict)
        """By the stages that they are on, the moments of each rank."""

    def read(self, stage: WrittenStage) -> None:
        """All that a stage does."""
        ranks = [self.ranks.on_stage(stage.number, rank) for rank in self.ranks.copies]
        for instruction in stage.row:
            if isinstance(instruction, Run):
                begin = min(self._resume(rank) for rank in ranks)
                pieces = [self._piece(stage.step, visit, ranks) for visit in stage.passes[instruction.action]]
                self.passes.append(_Pieces(begin, stage.number, pieces))
            elif isinstance(instruction, Post):
                for message in instruction.messages:
                    self.messages[message][stage.number] = {rank: self._posted(rank) for rank in ranks}
            else:
                for message in instruction.messages:
                    for rank, moments in self.messages[message][stage.number].items():
                        self.free[rank] = max(self._free(rank), moments[ENDED])
        for rank in ranks:
            self._resume(rank)
        self.closing += [self._piece(stage.step, visit, ranks) for visit in stage.closing]

    def _piece(self, step: Step, visit: Visit, ranks: Sequence[int]) -> Stretch:
        segment = visit.segment
        recording = self.taken.recording(segment, ranks, step.sizes[segment.name])
        return Stretch(
            recording, segment.phase, visit.layer, visit.micro_batch, 0, 0, brings=visit.brings, drops=visit.drops
        )

    def _free(self, rank: int) -> int:
        """When it has ended its last pass, and its waits since."""
        return max(self.free[rank], self.taken.ends[rank])

    def _resume(self, rank: int) -> int:
        """The rank goes on with what comes after its waits; when."""
        begin, end = self.taken.ends[rank], self._free(rank)
        if end > begin:
            self.gaps.append((rank, begin, end))
            self.taken.ends[rank] = end
        return end

    def _posted(self, rank: int) -> Moments:
        """A message is posted when its rank has come to it, though others may be before it on its lane."""
        ((_, start, end),) = self.taken.take(rank, 1)
        return self._free(rank), start, end

    def waits(self) -> Iterator[Wait]:
        """Gaps between passes, with the messages that are posted or under way."""
        flights: dict[int, list[Flight]] = defaultdict(list)
        for message, by_stage in self.messages.items():
            for rank, moments in (own for by_rank in by_stage.values() for own in by_rank.items()):
                flights[rank].append(Flight(SENT[message.kind][1], *moments, "send_receive"))
        for rank, begin, end in self.gaps:
            yield Wait(rank, begin, end, [f for f in flights[rank] if f.posted_ps < end and f.end_ps > begin])

    def nodes(self) -> list[Node]:
        """In order of time, what closes the step behind all else."""
        lanes = sorted(self.messages, key=lambda message: (message.sender, message.receiver, message.kind))
        runs = [*self.passes, *map(self._message, lanes)]
        ordered = [stretch for own in sorted(runs, key=lambda run: run[:2]) for stretch in own.pieces]
        tasks = 0
        found: list[Node] = []
        for stretch in (*ordered, *self.closing):
            found.append(stretch._replace(first_task=tasks))
            tasks += stretch.tasks
        return found

    def _message(self, message: Message) -> _Pieces:
        start = min(start for own in self.messages[message].values() for _, start, _ in own.values())
        return _Pieces(start, message.receiver, [*self._sides(message)])

    def _sides(self, message: Message) -> Iterator[Stretch]:
        """A send on one stage, and a receive on the other."""
        phase, lane = SENT[message.kind]
        for stage, way in ((message.sender, "send"), (message.receiver, "receive")):
            times = {rank: columns([moments]) for rank, moments in self.messages[message][stage].items()}
            yield Stretch(Recording(self.outlines[f"{lane} {way}"], times, ()), phase, None, message.micro_batch, 0, 0)
