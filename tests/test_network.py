"""The seam to a network, by one link that transfers share: timelines worked by hand, and the tick-by-tick replay."""

from fractions import Fraction
from math import ceil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spsim.engine.network import Transfer
from spsim.engine.tasks import DeadlockError, Hold, Start, Task
from tests.replay import SLOWDOWNS, Replay, exchange, meeting, random_programs, random_starts, times

pytestmark = pytest.mark.slow


class SharedLink:
    """One link for all transfers: an equal part for each that is active, shared anew when one begins or ends."""

    shares = True

    def __init__(self, env):
        self.env = env
        self.changed = env.event()
        self.seen = 0
        self.left = {}
        """Of each active transfer, in picoseconds of the whole link."""

    def begin(self, transfer, at):
        """The process of the transfer is the event of its end."""
        return self.env.process(self.transfer(transfer, at))

    def transfer(self, transfer, at):
        yield self.env.timeout(at - self.env.now)
        self.share({**self.moved(), transfer.key: Fraction(transfer.duration_ps)})
        while self.left[transfer.key] > 0:
            yield self.changed | self.env.timeout(ceil(self.left[transfer.key] * len(self.left)))
            self.left = self.moved()
        self.share({key: left for key, left in self.left.items() if key != transfer.key})

    def moved(self):
        """What is left now."""
        past, self.seen = self.env.now - self.seen, self.env.now
        return {key: left - Fraction(past, len(self.left)) for key, left in self.left.items()}

    def share(self, left):
        """Other transfers than before are active."""
        self.left, changed, self.changed = left, self.changed, self.env.event()
        changed.succeed()


def pair(lane, task, ranks, duration, needs=()):
    """Programs of ranks that meet in one collective."""
    return {rank: [Task(task, lane, duration, needs, meeting(task, len(ranks)))] for rank in ranks}


# ------------------------------------------------------------ worked by hand


def test_a_transfer_alone_takes_its_duration():
    assert times(pair("net", 0, (0, 1), 10), network=SharedLink) == {(0, 0): (0, 0, 10), (1, 0): (0, 0, 10)}


def test_two_transfers_share_a_link_while_both_are_active():
    """10 ps each. The first has the link alone until 4 and moves 4; both move 6 until 16, when it ends; the other
    moves its last 4 alone, until 20.
    """
    late = [Task(1, "compute", 4), Task(2, "net", 10, (1,), meeting(2, 2))]
    found = times({**pair("net", 0, (0, 1), 10), 2: late, 3: late}, network=SharedLink)
    assert found[0, 0] == found[1, 0] == (0, 0, 16)
    assert found[2, 2] == found[3, 2] == (4, 4, 20)


def test_equal_transfers_end_together():
    """10 ps each, both from 0 on: 20."""
    found = times({**pair("net", 0, (0, 1), 10), **pair("net", 1, (2, 3), 10)}, network=SharedLink)
    assert set(found.values()) == {(0, 0, 20)}


def test_what_waits_for_a_transfer_waits_for_its_real_end():
    """As above, the first transfer ends at 16: the kernel of 3 ps runs 16-19 and the transfer behind it on the lane,
    of 2 ps, shares the link with the last 4 of the other: both move 2 until 20, the other the rest until 22.
    """
    ahead = [
        Task(0, "net", 10, meetings=meeting(0, 1)),
        Task(1, "net", 2, meetings=meeting(1, 1)),
        Task(2, "compute", 3, (0,)),
    ]
    late = [Task(3, "compute", 4), Task(4, "net", 10, (3,), meeting(4, 1)), Task(5, "compute", 1, (4,))]
    assert times({0: ahead, 1: late}, network=SharedLink) == {
        (0, 0): (0, 0, 16),
        (0, 1): (16, 16, 20),
        (0, 2): (16, 16, 19),
        (1, 3): (0, 0, 4),
        (1, 4): (4, 4, 22),
        (1, 5): (22, 22, 23),
    }


def test_a_transfer_holds_the_device_until_its_real_end():
    """Slowdown 1/2, as above held 0-16 instead of 0-10. Of kernels of 6 and 14 ps the first ends at 12, of the other
    2 ps are done until 16, the rest by 28.
    """
    busy = [Task(0, "net", 10, meetings=meeting(0, 1)), Task(1, "compute", 6), Task(2, "compute", 14)]
    late = [Task(3, "link", 4), Task(4, "net", 10, (3,), meeting(4, 1))]
    found = times({0: busy, 1: late}, 0.5, network=SharedLink)
    assert [found[0, task] for task in range(3)] == [(0, 0, 16), (0, 0, 12), (12, 12, 28)]


def test_of_open_holds_the_larger_share_counts():
    """Transfers of 10 ps of one rank on two lanes, shares 1/4 and 1/2: both until 20, half of the rate until then."""
    tasks = [
        Task(0, "net", 10, meetings=meeting(0, 1), slowdown=0.25),
        Task(1, "link", 10, meetings=meeting(1, 1), slowdown=0.5),
        Task(2, "compute", 14),
    ]
    assert times({0: tasks}, network=SharedLink)[0, 2] == (0, 0, 24)


def test_an_exchange_is_a_transfer_for_each_of_its_edges():
    """Three ranks ready at 0, 2 and 10, edges of 4 ps. Edge 0-1 moves alone 2-6; 1-2 and 2-0 share 10-18.
    Ranks 0 and 1 wait for those: until 10 for rank 2.
    """
    programs = {
        rank: [Task(0, "compute", work), Task(1, "net", 4, (0,), exchange(1, rank, 3))]
        for rank, work in enumerate((0, 2, 10))
    }
    found = times(programs, network=SharedLink)
    assert [found[rank, 1] for rank in range(3)] == [(0, 10, 18), (2, 10, 18), (10, 10, 18)]


# ------------------------------------------------------------ the seam


class Closed:
    """The closed form as a network."""

    shares = False

    def __init__(self, env):
        self.env = env

    def begin(self, transfer, at):
        return at + transfer.duration_ps


class Open(Closed):
    """The same, but nobody knows before."""

    def begin(self, transfer, at):
        return self.env.timeout(at + transfer.duration_ps - self.env.now)


class Never(Closed):
    """Transfers that never end."""

    def begin(self, transfer, at):
        return self.env.event()


def test_a_network_is_told_of_each_rendezvous_once():
    """Ahead of the clock where nothing but time is in between, with ranks in order and the longer duration."""
    told = []

    class Told(Closed):
        def begin(self, transfer, at):
            told.append((self.env.now, at, transfer))
            return super().begin(transfer, at)

    programs = {
        1: [Task(0, "net", 3, meetings=meeting("a", 2)), Task(1, "net", 4, meetings=meeting("b", 1))],
        0: [Task(0, "compute", 5), Task(7, "net", 4, (0,), meeting("a", 2))],
    }
    found = times(programs, network=Told)
    assert told == [(5, 5, Transfer(("a",), ((0, 7), (1, 0)), 4)), (5, 9, Transfer(("b",), ((1, 1),), 4))]
    assert found[1, 0] == (0, 5, 9)
    assert found[1, 1] == (9, 9, 13)


@pytest.mark.parametrize("start", [Start(5, {"net": 9}), Start(5, holds=[Hold(2, 6)])])
def test_a_shared_link_has_to_know_all_transfers(start):
    """A lane that is busy and a device that is held come from transfers before the run; ended ones do not matter."""
    tasks = {0: [Task(0, "compute", 4)]}
    with pytest.raises(ValueError, match="rank 0 starts with a communication under way"):
        times(tasks, network=SharedLink, starts={0: start})
    assert times(tasks, network=Closed, starts={0: start})[0, 0][0] == 5
    ended = Start(5, {"net": 5}, [Hold(2, 5)], {"before": 4})
    assert times(tasks, network=SharedLink, starts={0: ended}) == {(0, 0): (5, 5, 9)}


@pytest.mark.parametrize("kernels", [True, False])
def test_who_waits_for_a_transfer_without_an_end_is_named(kernels):
    """A deadlock, with kernels of that rank or without; what does not wait for it ends."""
    tasks = [
        Task(0, "net", 3, meetings=meeting(0, 1)),
        *([Task(1, "compute", 3), Task(2, "compute", 1, (0,))] * kernels),
    ]
    with pytest.raises(DeadlockError, match="task 0 on lane net of rank 0") as caught:
        times({0: tasks}, 0.5, network=Never)
    assert ("task 2 on lane compute of rank 0" in str(caught.value)) == kernels
    assert "task 1 " not in str(caught.value)


@pytest.mark.parametrize("network", [Closed, Open])
@settings(max_examples=100, deadline=None, derandomize=True)
@given(programs=random_programs(), slowdown=SLOWDOWNS, data=st.data())
def test_the_closed_form_as_a_network_changes_nothing(network, programs, slowdown, data):
    """Whether ends are known ahead or only when the clock is there."""
    starts = data.draw(random_starts(programs))
    assert times(programs, slowdown, starts=starts, network=network) == times(programs, slowdown, starts=starts)


# ------------------------------------------------------------ the oracle


class SharedReplay(Replay):
    """Transfers that move in the same tick do so at an equal part of the rate each."""

    def pace(self, rank, task, now):
        if not task.meetings:
            return super().pace(rank, task, now)
        return Fraction(1, len({meetings for _, other in self.running() if (meetings := other.meetings)}))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(random_programs(kinds=("collective", "collective")), SLOWDOWNS, st.data())
def test_a_shared_link_equals_the_replay(programs, slowdown, data):
    """Collectives of all ranks and lanes over one link, beside kernels that wait for them and are slowed."""
    drawn = data.draw(random_starts(programs))
    starts = {rank: Start(start.time, ends=start.ends) for rank, start in drawn.items()}
    found = times(programs, slowdown, starts=starts, network=SharedLink)
    assert found == SharedReplay(programs, slowdown, starts=starts).times()


@settings(max_examples=50, deadline=None, derandomize=True)
@given(random_programs(), SLOWDOWNS)
def test_with_a_shared_link_the_order_of_ranks_does_not_matter(programs, slowdown):
    """Exchanges too: transfers that begin in one moment do so in no order."""
    turned = {rank: programs[rank] for rank in reversed(programs)}
    assert times(turned, slowdown, network=SharedLink) == times(programs, slowdown, network=SharedLink)
