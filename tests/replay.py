"""An oracle for the engine, its rules stepped tick by tick, and random programs to hold the two against each other."""

from collections import Counter, deque
from fractions import Fraction
from math import inf, prod

from hypothesis import strategies as st

from spsim.engine.contention import PPM
from spsim.engine.engine import run
from spsim.engine.tasks import Hold, Meeting, Paces, Start, Task

LANES = ("compute", "net", "link")
NAMES = ("before", "long before")
SLOWDOWNS = st.sampled_from([0.0, 0.15, 0.25, 0.5, 0.9])
OWN_SLOWDOWNS = st.none() | SLOWDOWNS


def times(programs, slowdown=0.0, **settings):
    """{(rank, task): (posted, start, end)} of a run."""
    found = run(programs, slowdown=slowdown, **settings)
    return {
        (rank, task.id): moments
        for rank, program in programs.items()
        for task, moments in zip(getattr(program, "tasks", program), found[rank], strict=True)
    }


def meeting(task, ranks):
    """The rendezvous of one collective."""
    return (Meeting((task,), ranks),)


def exchange(task, rank, ranks):
    """The two edges of a ring exchange: to the next rank and from the previous one."""
    edges = dict.fromkeys([(rank, (rank + 1) % ranks), ((rank - 1) % ranks, rank)])
    return tuple(Meeting((task, *edge), len(set(edge))) for edge in edges)


class Replay:
    """The engine's rules in plain Python, with exact fractions and no events.

    A communication starts, and its duration runs, when all of its rendezvous are complete. Nothing of a rank or of
    a lane is posted before its start.
    """

    def __init__(self, programs, slowdown, durations=None, starts=None, paces=None):
        own = {rank: {task.id: task.duration_ps for task in tasks} for rank, tasks in programs.items()}
        self.durations = durations or own
        self.starts = starts or dict.fromkeys(programs, Start())
        self.queues = {(rank, task.lane): deque() for rank, tasks in programs.items() for task in tasks}
        for rank, tasks in programs.items():
            for task in tasks:
                self.queues[rank, task.lane].append(task)
        self.slowdown = slowdown
        self.paces = paces or {}
        self.posted, self.start, self.done, self.arrived = {}, {}, {}, Counter()
        self.end = {(rank, name): 0 for rank in programs for name in NAMES}
        self.end |= {(rank, name): end for rank, start in self.starts.items() for name, end in start.ends.items()}

    def complete(self, meeting):
        """Whether all parties of a rendezvous are there."""
        return self.arrived[meeting.key] == meeting.parties

    def free(self, rank, task, now):
        """Whether a task could be posted."""
        start = self.starts[rank]
        needed = [start.time, start.lanes.get(task.lane, 0), *(self.end.get((rank, need), inf) for need in task.needs)]
        return max(needed) <= now

    def move(self, rank, queue, now):
        """Post, start, set off or end the head of a lane; whether it could."""
        task, key = queue[0], (rank, queue[0].id)
        if key not in self.posted:
            if not self.free(rank, task, now):
                return False
            self.posted[key] = now
            self.arrived.update(meeting.key for meeting in task.meetings)
        elif key not in self.start:
            if not all(map(self.complete, task.meetings)):
                return False
            self.start[key], self.done[key] = now, Fraction(0)
        elif self.done[key] >= self.durations[rank][task.id]:
            self.end[key] = now
            queue.popleft()
        else:
            return False
        return True

    def running(self):
        """(rank, task) of what has begun to work."""
        heads = [(rank, queue[0]) for (rank, _), queue in self.queues.items() if queue]
        return [(rank, task) for rank, task in heads if (rank, task.id) in self.done]

    def pace(self, rank, task, now):
        """What a task does in a tick: a kernel loses the largest share that communications of its rank hold, and works
        at the paces of its rank; a transfer at its own.
        """
        own = self.paces.get(rank, Paces())
        windows = own.transfers.get(task.id, ()) if task.meetings else own.kernels
        pace = prod(Fraction(rate, PPM) for begin, end, rate in windows if begin <= now < end)
        if task.meetings:
            return pace
        heads = [queue[0] for (other, _), queue in self.queues.items() if other == rank and queue]
        posted = [head for head in heads if head.meetings and (rank, head.id) in self.posted]
        holds = [hold for hold in self.starts[rank].holds if hold.begin <= now < hold.end]
        shares = [self.slowdown if one.slowdown is None else one.slowdown for one in (*posted, *holds)]
        return pace * (1 - Fraction(str(max(shares, default=0))))

    def times(self):
        """{(rank, task): (posted, start, end)} at the end; at each instant move until nothing moves."""
        for now in range(10_000):
            while any(self.move(rank, q, now) for (rank, _), q in self.queues.items() if q):
                pass
            if not any(self.queues.values()):
                return {key: (posted, self.start[key], self.end[key]) for key, posted in self.posted.items()}
            paces = {(rank, task.id): self.pace(rank, task, now) for rank, task in self.running()}
            for key, pace in paces.items():
                self.done[key] += pace
        raise AssertionError("the replay does not end")


@st.composite
def random_programs(draw, kinds=("collective", "exchange"), slowdowns=OWN_SLOWDOWNS):
    """2-4 ranks, 2-3 lanes, needs on earlier tasks of any lane and on names, rows of kernels, collectives of random
    ranks, exchanges.

    Ids increase on every lane and needs point backwards, so the lowest unfinished id can always proceed.
    """
    num_ranks = draw(st.integers(2, 4))
    lanes = LANES[: draw(st.integers(2, 3))]
    programs = {rank: [] for rank in range(num_ranks)}
    for task in range(draw(st.integers(1, 12))):
        kind = draw(st.sampled_from(["compute", "compute", "row", "row", *kinds]))
        members = range(num_ranks)
        if kind == "row":
            lane = draw(st.sampled_from(["compute", *lanes]))
            for rank in members:
                programs[rank].append(Task(task, lane, draw(st.integers(0, 9))))
            continue
        if kind == "collective":
            members = draw(st.sets(st.integers(0, num_ranks - 1), min_size=1))
        lane = "compute" if kind == "compute" else draw(st.sampled_from(lanes[1:]))
        duration = draw(st.integers(0, 9))
        for rank in members:
            earlier = [*(other.id for other in programs[rank]), *NAMES]
            needs = tuple(draw(st.lists(st.sampled_from(earlier), max_size=2, unique=True)))
            if kind == "compute":
                programs[rank].append(Task(task, lane, draw(st.integers(0, 9)), needs))
            else:
                meetings = meeting(task, len(members)) if kind == "collective" else exchange(task, rank, num_ranks)
                programs[rank].append(Task(task, lane, duration, needs, meetings, draw(slowdowns)))
    return programs


@st.composite
def random_starts(draw, programs):
    """Ranks that begin apart, with lanes that are busy, the device held, and ends of what was before."""
    moments = st.integers(0, 30)
    holds = st.builds(lambda begin, length, own: Hold(begin, begin + length, own), moments, moments, OWN_SLOWDOWNS)
    starts = st.builds(
        Start,
        st.integers(0, 20),
        st.dictionaries(st.sampled_from(LANES), moments),
        st.lists(holds, max_size=3),
        st.dictionaries(st.sampled_from(NAMES), moments),
    )
    return {rank: draw(starts) for rank in programs}


@st.composite
def random_paces(draw, programs):
    """Some ranks are slower, faster or stand still from when to when, and so are transfers."""
    windows = st.lists(
        st.builds(
            lambda begin, length, rate: (begin, begin + length, round(rate * PPM)),
            st.integers(0, 30), st.integers(1, 20), st.sampled_from([0, 0.25, 0.5, 1, 2]),
        ),
        max_size=2,
    )  # fmt: skip
    own = st.builds(Paces, windows, st.dictionaries(st.integers(0, 8), windows, max_size=4))
    return {rank: draw(own) for rank in programs if draw(st.booleans())}
