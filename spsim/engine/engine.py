"""The event engine: in-order lanes, rendezvous, contention for the device. The only clock.

It knows tasks with durations, not transformers. A rank has lanes that run their tasks in order, as CUDA streams
do; a communication is a rendezvous of the ranks that take part. Time is integer picoseconds.

While a communication is posted on a rank, its computation runs at `1 - slowdown` of its rate: the
collective holds part of the device, also while it waits for its peers.

A lane of kernels is one simpy process: how long they take depends on what is posted meanwhile, so that the clock
has to be waited for, once for a row of kernels up to one that another lane waits for. A communication needs no process:
when it is posted and when it ends follows from the ends of what it waits for and from its peers, and is recorded as
soon as those are known. Only a network whose transfers share links makes it wait for the clock. A rank that meets
nobody needs no clock at all (`engine.alone`).

A run need not begin at the beginning: `Start` says where a rank stands, which is all that tasks that ran before can
mean to those that follow.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import simpy

from spsim.engine.alone import run_alone
from spsim.engine.contention import Held, in_turn, rate_beside, together, work_through
from spsim.engine.network import MakeNetwork, Network, Transfer
from spsim.engine.recording import Moments
from spsim.engine.tasks import DeadlockError, Durations, Key, Meeting, Need, Paces, RankProgram, Run, Start, Task


class _Rank:
    """State of one rank: when its tasks run, as far as is known, and when communications hold the device."""

    __slots__ = (
        "blocked", "communicators", "durations", "env", "holds", "open", "ordered", "paces", "program", "rate", "start",
        "times", "waiting",
    )  # fmt: skip

    def __init__(
        self,
        env: Any,
        number: int,
        program: RankProgram,
        durations: Durations,
        start: Start,
        slowdown: float,
        paces: Paces,
    ) -> None:
        self.env = env
        self.program = program
        self.start = start
        self.paces = paces
        self.rate = rate_beside(slowdown)
        """Of kernels while communications are posted that have no slowdown of their own."""
        self.durations = durations
        self.communicators = [_Communicator(number, runs, start.free(runs[0].lane)) for runs in program.communications]
        self.times: dict[Need, Moments] = {name: (start.ends.get(name, start.time),) * 3 for name in program.names}
        self.waiting: dict[Need, simpy.Event] = {}
        """Events of tasks whose times lanes of kernels want to know."""
        self.blocked: dict[Need, list[_Communicator]] = {}
        """By task those who want to know its times."""
        self.holds: list[Held] = [
            (begin, end, self.rate if own is None else rate_beside(own)) for begin, end, own in start.holds
        ]
        """Of communications whose end is known."""
        self.open: list[tuple[int, int]] = []
        """Since when others hold the device, and the rate of kernels beside them."""
        rates = {self.rate if own is None else own for own in program.rates} | {rate for *_, rate in self.holds}
        self.ordered = sorted if len(rates) < 2 else in_turn
        """Brings holds into order; where all are of one rate, it does not matter that they overlap."""

    def unknown(self, needs: Iterable[Need]) -> Need:
        """The first of some tasks whose times are not known."""
        return next(need for need in needs if need not in self.times)

    def known(self, needs: Iterable[Need]) -> simpy.Event:
        """The event of its times becoming known."""
        return self.waiting.setdefault(self.unknown(needs), self.env.event())

    def tell(self, task: int) -> None:
        """The times of a task are known."""
        if task in self.waiting:
            self.waiting[task].succeed()

    def end_of(self, needs: Iterable[Need], time: int) -> int | None:
        """When the last of some tasks ends, or `time` if that is later; None if it is not known."""
        for need in needs:
            moments = self.times.get(need)
            if moments is None:
                return None
            if moments[2] > time:
                time = moments[2]
        return time

    def transferred(self, run: Run, begin: int) -> int:
        """When a communication ends that begins then and has its links alone."""
        duration = self.durations[run.last]
        paces = self.paces.transfers.get(run.last)
        return work_through(begin, duration, together((), paces)) if paces else begin + duration

    def settle(self, task: int, hold: Held, start: int) -> None:
        """It is known when a communication ends, and so does its hold."""
        posted, end, _ = hold
        self.holds.append(hold)
        self.times[task] = posted, start, end
        self.tell(task)

    def open_holds(self) -> list[Held]:
        """Of communications whose end is not known: it may be this moment."""
        now = self.env.now
        return [(since, now, rate) for since, rate in self.open if since < now]


class _Communicator:
    """A lane of communications of one rank, and where it stands."""

    __slots__ = ("free", "index", "over", "posted", "rank", "runs")

    def __init__(self, rank: int, runs: Sequence[Run], free: int) -> None:
        self.rank = rank
        """By its number: a cycle of references would outlive the run."""
        self.runs = runs
        self.index = 0
        self.free = free
        self.posted: int | None = None
        """When the communication at `index` was or will be posted, if it is not known when it ends."""
        self.over: list[tuple[int, int]] = []
        """Of its transfers of which that is known, when they are over and when they begin. Without a network they are
        over as soon as they begin, since each rank then takes its own time.
        """


class _Simulation:
    """One run: the ranks, and the open rendezvous.

    What makes it enough to look at a thing when the clock is there:

    - What ends is known by then: kernels when they end, communications then or ahead. So nothing is posted in the past.
    - Holds change from now on only: a new one begins now or later, an open one ends now or later. So the end of kernels
      that follows from the holds known so far, open ones taken to end now, is never too late. When the clock is there,
      it is the end, or a later one follows from the holds known then.
    - A moment has no order in it: ends depend on the holds before them, meetings on the last to come, and nothing on
      who is looked at first.
    - Kernels of a row are recorded together at its end: nobody waits for those inside it.
    """

    def __init__(self, network: MakeNetwork | None) -> None:
        self.env: Any = simpy.Environment()  # simpy's clock is int | float, ours is int
        self.ranks: dict[int, _Rank] = {}
        self.arrived: dict[Key, list[_Communicator]] = defaultdict(list)
        self.network = None if network is None else network(self.env)

    def run(self) -> None:
        """All tasks of all ranks, to the end."""
        for rank in self.ranks.values():
            self._communicate(rank.communicators)
        for rank in self.ranks.values():
            for runs in rank.program.kernels:
                self.env.process(self._compute(rank, runs, rank.start.free(runs[0].lane)))
        self.env.run()
        waiting = list(self._waiting())
        if waiting:
            raise DeadlockError(f"deadlock: {', '.join(waiting)} wait for tasks that never end")

    def _waiting(self) -> Iterator[str]:
        """The first task of each lane that has not ended."""
        for number, rank in self.ranks.items():
            heads: dict[str, int] = {}
            if len(rank.times) < len(rank.program.ids) + len(rank.program.names):
                for task in rank.program.tasks:
                    if task.id not in rank.times:
                        heads.setdefault(task.lane, task.id)
            yield from (f"task {task} on lane {lane} of rank {number}" for lane, task in heads.items())

    def _compute(self, rank: _Rank, runs: Sequence[Run], free: int) -> Generator[simpy.Event, Any, None]:
        """Walk a lane of kernels; time lost to contention is known only as it happens, so look again at their end."""
        env, index, seen = self.env, 0, 0
        holds: list[Held] = []
        while index < len(runs):
            while holds and holds[0][1] <= free:
                del holds[0]
            if len(rank.holds) > seen:
                holds = rank.ordered(holds + rank.holds[seen:])
                seen = len(rank.holds)
            held = rank.ordered([*holds, *rank.open_holds()]) if rank.open else holds
            row, end, stop = self._row(rank, runs, index, free, held)
            if stop == index:
                yield rank.known(runs[index].needs)
                continue
            remaining = end - env.now
            if remaining:
                yield env.timeout(remaining)
                if len(rank.holds) > seen or rank.open:
                    continue
            rank.times.update(row)
            free, index, last = end, stop, runs[stop - 1]
            if rank.waiting:
                rank.tell(last.last)
            if last.last in rank.blocked:
                self._communicate(rank.blocked.pop(last.last))

    def _row(
        self, rank: _Rank, runs: Sequence[Run], index: int, free: int, holds: Sequence[Held]
    ) -> tuple[dict[Need, Moments], int, int]:
        """The times of kernels in a row if nothing more is posted, never too late; the end of the last, and the run
        after it. They end with one that another lane waits for, or before one that waits for what is not known.
        """
        durations = rank.durations
        if rank.paces.kernels:
            holds = together(holds, [pace for pace in rank.paces.kernels if pace[1] > free])
        found: dict[Need, Moments] = {}
        awaited = False
        while not awaited and index < len(runs):
            run = runs[index]
            begin = rank.end_of(run.needs, free) if run.needs else free
            if begin is None:
                break
            for task in run.tasks:
                end = work_through(begin, durations[task], holds) if holds else begin + durations[task]
                found[task] = begin, begin, end
                begin = end
            free, index, awaited = begin, index + 1, run.awaited
        return found, free, index

    def _communicate(self, communicators: Iterable[_Communicator]) -> None:
        """Advance lanes of communications as far as is known, and those that this sets free."""
        pending = [*communicators]
        while pending:
            self._advance(pending.pop(), pending)

    def _advance(self, communicator: _Communicator, pending: list[_Communicator]) -> None:
        """Post communications of a lane as long as it is known when they end."""
        rank, runs = self.ranks[communicator.rank], communicator.runs
        while communicator.index < len(runs):
            run = runs[communicator.index]
            posted = rank.end_of(run.needs, communicator.free)
            if posted is None:
                rank.blocked.setdefault(rank.unknown(run.needs), []).append(communicator)
                return
            rate = rank.rate if run.rate is None else run.rate
            start, end = posted, rank.transferred(run, posted)
            if run.parties > 1 or self.network is not None:
                if communicator.posted is None:
                    communicator.posted = posted
                    rank.open.append((posted, rate))
                    pending += self._arrive(communicator, run.meetings)
                if len(communicator.over) < len(run.meetings):
                    return
                end, start = max(communicator.over)
                if self.network is None:
                    end = rank.transferred(run, end)
                rank.open.remove((posted, rate))
                communicator.posted, communicator.over = None, []
            communicator.index += 1
            communicator.free = end
            rank.settle(run.last, (posted, end, rate), start)
            pending += rank.blocked.pop(run.last, ())

    def _arrive(self, communicator: _Communicator, meetings: Sequence[Meeting]) -> list[_Communicator]:
        """Be at meetings from when it is posted; and all who are at those that are complete."""
        complete = []
        for meeting in meetings:
            there = self.arrived[meeting.key]
            there.append(communicator)
            if len(there) == meeting.parties:
                del self.arrived[meeting.key]
                at = max([other.posted or 0 for other in there])
                if self.network is None:
                    _over(there, at, at)
                else:
                    self._begin(self.network, meeting.key, there, at)
                complete += there
        return complete

    def _begin(self, network: Network, key: Key, there: Sequence[_Communicator], at: int) -> None:
        """Ask the network when a transfer ends; should it not know, an event will say so."""
        tasks = [(other.rank, other.runs[other.index].last) for other in there]
        duration = max(self.ranks[rank].durations[task] for rank, task in tasks)
        end = network.begin(Transfer(key, tuple(sorted(tasks)), duration), at)

        def over(_: simpy.Event) -> None:
            _over(there, at, self.env.now)
            self._communicate(there)

        if isinstance(end, int):
            _over(there, at, end)
        else:
            end.callbacks.append(over)


def _over(communicators: Iterable[_Communicator], begin: int, end: int) -> None:
    """It is known when a transfer of communications ends."""
    for communicator in communicators:
        communicator.over.append((end, begin))


_ORIGIN = Start()
_STEADY = Paces()


def _refuse_under_way(starts: Mapping[int, Start]) -> None:
    """Where transfers share links, those from before a run would have to be known."""
    for number, start in starts.items():
        busy = [lane for lane, free in start.lanes.items() if free > start.time]
        if busy or any(hold.end > start.time for hold in start.holds):
            where = f" on lane {busy[0]}" if busy else ""
            raise ValueError(
                f"rank {number} starts with a communication under way{where}: the network, whose transfers share links,"
                " does not know of it; begin the run where none is"
            )


def run(
    programs: Mapping[int, RankProgram | Sequence[Task]],
    *,
    slowdown: float,
    durations: Mapping[int, Sequence[int]] | None = None,
    starts: Mapping[int, Start] | None = None,
    network: MakeNetwork | None = None,
    paces: Mapping[int, Paces] = MappingProxyType({}),
) -> dict[int, list[Moments]]:
    """Run the tasks of each rank to the end; `slowdown` is the share of their rate that kernels lose to communications
    that do not say their own.

    `durations` (by task, in picoseconds) and `starts` are given per rank. The times of each rank are in the order of
    its tasks. Ranks that have `paces` work at those rates. A `network` decides when transfers end; without one a
    communication takes its duration from its last meeting on; if its transfers share links, it raises `ValueError`
    where communications are under way at a start. Raises `DeadlockError` when tasks wait for each other, for a peer
    that never comes, or for a transfer that never ends.
    """
    prepared = {n: own if isinstance(own, RankProgram) else RankProgram(own) for n, own in programs.items()}
    given: Mapping[int, Durations] = durations or {
        number: {task.id: task.duration_ps for task in program.tasks} for number, program in prepared.items()
    }
    begins = starts or dict.fromkeys(prepared, _ORIGIN)
    found = {
        number: run_alone(program, given[number], begins[number], slowdown)
        for number, program in prepared.items()
        if network is None and program.alone and program.in_turn is not None and number not in paces
    }
    others = {number: program for number, program in prepared.items() if number not in found}
    if others:
        found |= _run_together(others, given, begins, slowdown, network, paces)
    return {number: found[number] for number in programs}


def _run_together(
    programs: Mapping[int, RankProgram],
    durations: Mapping[int, Durations],
    starts: Mapping[int, Start],
    slowdown: float,
    network: MakeNetwork | None,
    paces: Mapping[int, Paces],
) -> dict[int, list[Moments]]:
    """Ranks that meet, or wait for each other for ever."""
    simulation = _Simulation(network)
    if simulation.network is not None and simulation.network.shares:
        _refuse_under_way(starts)
    for number, program in programs.items():
        simulation.ranks[number] = _Rank(
            simulation.env, number, program, durations[number], starts[number], slowdown, paces.get(number, _STEADY)
        )
    simulation.run()
    return {number: [rank.times[task] for task in rank.program.ids] for number, rank in simulation.ranks.items()}
