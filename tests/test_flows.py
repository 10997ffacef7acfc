"""Flows that share links: timelines worked by hand, the replay of a single link, chunks one by one, what max-min
fairness is, conservation and capacity, links that are slow or down, and an analytic simulator of rings.
"""

from collections import defaultdict
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spsim.engine.flows import FULL, FlowNetwork, RateChange, Use, flow_network
from spsim.engine.tasks import Start, Task
from tests.replay import SLOWDOWNS, meeting, random_programs, random_starts, times
from tests.test_network import SharedReplay


def transfer(task, duration, lane="net", needs=()):
    """Of one rank, which meets nobody else."""
    return Task(task, lane, duration, needs, meeting(task, 1))


def sharing(uses, changes=()):
    """A network on which the transfer of a task takes so many picoseconds of each link."""

    def use(transfer):
        own = uses.get(transfer.key[0])
        return own and Use(max(own.values()), own)

    return flow_network(use, changes)


def ends(programs, uses, changes=()):
    """Of each task of programs of transfers."""
    found = times(programs, network=sharing(uses, changes))
    return {task: end for (_, task), (_, _, end) in found.items()}


def alone(duration, load, changes):
    """When a transfer that starts at 0 ends, on one link."""
    return ends({0: [transfer(0, duration)]}, {0: {"a": load}}, changes)[0]


# ------------------------------------------------------------ worked by hand


def test_two_share_and_a_third_goes_on():
    """10 ps each: 0 on link a, 1 on a and b, 2 on b and twice as long there. 0 and 1 have half of a, so 2 has the other
    half of b until 20; then the rest alone, of which 10 ps are left: 30.
    """
    uses = {0: {"a": 10}, 1: {"a": 10, "b": 10}, 2: {"b": 20}}
    assert ends({n: [transfer(n, 20 if n == 2 else 10)] for n in range(3)}, uses) == {0: 20, 1: 20, 2: 30}


def test_who_needs_less_of_a_link_leaves_the_rest():
    """Transfer 0 has a third of link a and so of link b, of which 4 has two thirds: 20 of its 40 ps until 30, when 0 to
    2 are done, and the rest alone.
    """
    uses = {0: {"a": 10, "b": 10}, 1: {"a": 10}, 2: {"a": 10}, 4: {"b": 40}}
    found = ends({n: [transfer(n, max(own.values()))] for n, own in uses.items()}, uses)
    assert found == {0: 30, 1: 30, 2: 30, 4: 50}


def test_what_is_no_byte_is_not_slowed():
    """Of 10 ps each, 4 on the link, which come last: both until 6 alone, then 4 at half of the rate."""
    assert ends({n: [transfer(n, 10)] for n in (0, 1)}, {0: {"a": 4}, 1: {"a": 4}}) == {0: 14, 1: 14}


def test_one_that_stands_for_several_loads_their_link():
    """The adapter of four ranks that do the same: 10 ps of each."""
    four = flow_network(lambda _: Use(10, {"adapter": 40, "port": 10}))
    assert times({0: [transfer(0, 12)]}, network=four) == {(0, 0): (0, 0, 42)}
    each = ends({n: [transfer(n, 12)] for n in range(4)}, {n: {"adapter": 10, n: 10} for n in range(4)})
    assert {*each.values()} == {42}


def test_a_slow_link_makes_its_steps_longer():
    """A ring of 4 steps of 3 ps latency and 5 on the slowest link, at half of its rate: 4 x (3 + 10)."""
    assert alone(32, 20, [RateChange("a", 0, 10**9, 0.5)]) == 52
    assert alone(32, 20, [RateChange("b", 0, 10**9, 0.5)]) == 32


def test_a_link_that_is_down_for_a_time():
    """From 20 on bytes move; nothing does from 25 to 40, or to 35 and half of it to 40: 7.5 of 20 ps by then."""
    assert alone(40, 20, [RateChange("a", 25, 40, 0)]) == 55
    assert alone(40, 20, [RateChange("a", 3, 18, 0)]) == 40
    assert alone(40, 20, [RateChange("a", 25, 35, 0), RateChange("a", 30, 40, 0.5)]) == 53


# ------------------------------------------------------------ against others


@pytest.mark.slow
@settings(max_examples=40, deadline=None, derandomize=True)
@given(random_programs(kinds=("collective", "collective")), SLOWDOWNS, st.data())
def test_one_link_for_all_is_as_the_replay_has_it(programs, slowdown, data):
    """Stepped tick by tick, with fractions."""
    drawn = data.draw(random_starts(programs))
    starts = {rank: Start(start.time, ends=start.ends) for rank, start in drawn.items()}
    one_link = flow_network(lambda transfer: Use(transfer.duration_ps, {"link": transfer.duration_ps}))
    found = times(programs, slowdown, starts=starts, network=one_link)
    assert found == SharedReplay(programs, slowdown, starts=starts).times()


@settings(max_examples=25, deadline=None, derandomize=True)
@given(random_programs(), SLOWDOWNS)
def test_alone_on_their_links_transfers_take_their_own_time(programs, slowdown):
    """To the picosecond."""

    def own(transfer):
        return Use(transfer.duration_ps // 2 + 1, {transfer.key: transfer.duration_ps // 2 + 1})

    assert times(programs, slowdown, network=flow_network(own)) == times(programs, slowdown)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(random_programs(), SLOWDOWNS, st.lists(st.tuples(st.integers(0, 40), st.integers(1, 40)), max_size=4))
def test_a_factor_of_one_changes_nothing(programs, slowdown, windows):
    """Bit for bit, on a link that all share."""

    def use(transfer):
        return Use(transfer.duration_ps, {"link": transfer.duration_ps})

    changes = [RateChange("link", begin, begin + length, 1.0) for begin, length in windows]
    changed = times(programs, slowdown, network=flow_network(use, changes))
    assert changed == times(programs, slowdown, network=flow_network(use))


class Chunks:
    """Rings chunk by chunk: a rank sends its next one when that of the step before has come; chunks on a link have
    equal parts of it. Exact, in fractions.
    """

    def __init__(self, rings):
        self.rings = rings
        """Of each its ranks in order, steps, time of a chunk on a link, and when it starts."""

    def ends(self):
        """Of each ring."""
        now, moving, come, over = Fraction(0), {}, defaultdict(int), {}
        waiting = {(n, rank): 0 for n, ring in enumerate(self.rings) for rank in ring[0]}
        while waiting or moving:
            for (n, rank), step in [*waiting.items()]:
                _, steps, chunk, start = self.rings[n]
                if step == steps:
                    del waiting[n, rank]
                elif (n, rank) not in moving and start <= now and come[n, rank] >= step:
                    moving[n, rank] = Fraction(chunk)
            links = {(n, rank): (rank, after(self.rings[n][0], rank)) for n, rank in moving}
            count = {link: [*links.values()].count(link) for link in links.values()}
            later = [own[3] - now for own in self.rings if own[3] > now]
            past = min([*(left * count[links[key]] for key, left in moving.items()), *later], default=0)
            now += past
            for key in [*moving]:
                moving[key] -= past / count[links[key]]
                if not moving[key]:
                    del moving[key]
                    waiting[key] += 1
                    come[key[0], links[key][1]] += 1
                    over[key[0]] = now
        return over


def after(ranks, rank):
    return ranks[(ranks.index(rank) + 1) % len(ranks)]


RINGS = st.tuples(
    st.lists(st.integers(0, 5), min_size=2, max_size=6, unique=True),
    st.integers(8, 12),
    st.integers(10, 20),
    st.integers(0, 150),
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(RINGS, min_size=1, max_size=3))
def test_rings_take_what_their_chunks_take_one_by_one(rings):
    """Several rings that have some links together and start at any time, as flows and chunk by chunk: no ring ends
    further apart than the chunks take that are under way on its links when another one begins or ends.
    """
    uses = {
        n: {(rank, after(ranks, rank)): steps * chunk for rank in ranks}
        for n, (ranks, steps, chunk, _) in enumerate(rings)
    }
    programs = {
        n: [Task(100 + n, "compute", start), Task(n, "net", steps * chunk, (100 + n,), meeting(n, 1))]
        for n, (_, steps, chunk, start) in enumerate(rings)
    }
    found = ends(programs, uses)
    for n, end in Chunks(rings).ends().items():
        slack = len(rings) * max(chunk for _, _, chunk, _ in rings) * 2 * len(rings)
        assert abs(found[n] - end) <= slack


@pytest.mark.parametrize(
    ("ranks", "size", "gb_per_s", "latency_ns", "rounds", "factor", "rings", "seen_ns"),
    [
        (8, 67108864, 50, 500, 2, 1, 1, 2194500),
        (8, 67108864, 50, 500, 2, 0.5, 1, 4375500),
        (8, 67108864, 50, 500, 2, 1, 2, 4375500),
        (8, 1048576, 50, 500, 2, 1, 1, 41174),
        (16, 1073741824, 400, 936, 1, 1, 1, 2357790),
        (64, 268435456, 25, 1000, 2, 0.25, 1, 78751000),
    ],
)
def test_rings_of_astra_sim(ranks, size, gb_per_s, latency_ns, rounds, factor, rings, seen_ns):
    """The congestion-aware analytical network of ASTRA-sim (astra-sim/astra-network-analytical at 599a047), built from
    source: on a ring of links of so many GiB/s, one of them slower by a factor, ring collectives whose ranks send
    chunks of 1/n when they have that of the step before. Within 1 %.
    """
    steps, chunk = rounds * (ranks - 1), round(size / ranks / (gb_per_s * 2**30) * 10**12)
    load = dict.fromkeys(range(ranks), steps * chunk)
    programs = {n: [transfer(n, steps * (chunk + latency_ns * 1000))] for n in range(rings)}
    found = ends(programs, dict.fromkeys(range(rings), load), [RateChange(2, 0, 10**18, factor)])
    assert max(found.values()) == pytest.approx(1000 * seen_ns, rel=0.01)


# ------------------------------------------------------------ what a network may not do


LOADS = st.dictionaries(st.sampled_from("abcd"), st.integers(1, 60), min_size=1)
TRANSFERS = st.lists(st.tuples(LOADS, st.integers(0, 30), st.integers(0, 40)), min_size=1, max_size=6)
"""Loads of links, time without bytes, and when it begins."""
CHANGES = st.lists(
    st.builds(
        lambda link, begin, length, factor: RateChange(link, begin, begin + length, factor),
        st.sampled_from("abcd"), st.integers(0, 60), st.integers(1, 60), st.sampled_from([0, 0.25, 0.5, 1]),
    ),
    max_size=3,
)  # fmt: skip


class Watched(FlowNetwork):
    """Notes from when on each flow moves at which rate."""

    def __init__(self, *given):
        super().__init__(*given)
        self.seen = []
        self.started = {}

    def begin(self, transfer, at):
        found = super().begin(transfer, at)
        self.started[found] = transfer.key[0]
        return found

    def rates(self, flows):
        found = super().rates(flows)
        self.seen.append((self.env.now, found, {link: self.rate_of(link) for link in "abcd"}))
        return found


def watch(transfers, changes, order=None):
    """The rates at each moment and when transfers end."""
    made = []
    uses = {n: Use(max(loads.values()), loads) for n, (loads, _, _) in enumerate(transfers)}

    def network(env):
        made.append(Watched(env, lambda transfer: uses[transfer.key[0]], changes))
        return made[0]

    programs = {}
    for n in order or range(len(transfers)):
        loads, idle, begin = transfers[n]
        last = Task(n, "net", idle + max(loads.values()), (100 + n,), meeting(n, 1))
        programs[n] = [Task(100 + n, "compute", begin), last]
    found = times(programs, network=network)
    seen = [
        (now, {made[0].started[flow.ended]: (flow, rate) for flow, rate in rates.items()}, limits)
        for now, rates, limits in made[0].seen
    ]
    return seen, {n: found[n, n][2] for n in programs}


@settings(max_examples=60, deadline=None, derandomize=True)
@given(TRANSFERS, CHANGES)
def test_no_link_carries_more_than_its_rate_and_each_flow_has_a_link_that_holds_it(transfers, changes):
    """Rates are max-min fair if and only if each flow that is not at its own rate is on a full link on which no other
    has more (Bertsekas and Gallager, section 6.5.2).
    """
    for _, rates, limits in watch(transfers, changes)[0]:
        own = [*rates.values()]
        carried = {link: sum(rate * flow.weights.get(link, 0) for flow, rate in own) for link in limits}
        assert all(carried[link] <= limits[link] * FULL for link in limits)
        full = {link for link in limits if carried[link] >= (limits[link] - 20) * FULL}
        for flow, rate in own:
            holding = [
                link for link in full & flow.weights.keys()
                if all(other <= rate + 20 for one, other in own if link in one.weights)
            ]  # fmt: skip
            assert rate == FULL or holding


@settings(max_examples=60, deadline=None, derandomize=True)
@given(TRANSFERS, CHANGES)
def test_all_bytes_move_and_no_more(transfers, changes):
    """What each flow has had, rate by rate, until it ends: its bytes, to less than a picosecond's."""
    seen, over = watch(transfers, changes)
    for n, (loads, _, _) in enumerate(transfers):
        steps = [(now, rates[n][1]) for now, rates, _ in seen if n in rates]
        stops = [*(now for now, _ in steps[1:]), over[n]]
        moved = sum(rate * (stop - now) for (now, rate), stop in zip(steps, stops, strict=True))
        assert 0 <= moved - max(loads.values()) * FULL < FULL


@settings(max_examples=60, deadline=None, derandomize=True)
@given(TRANSFERS, CHANGES, st.randoms(use_true_random=False))
def test_the_order_of_ranks_does_not_matter(transfers, changes, random):
    order = [*range(len(transfers))]
    random.shuffle(order)
    assert watch(transfers, changes, order)[1] == watch(transfers, changes)[1]
