"""Steps whose longest ways are known are summed up, and the sums are what a search would find."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spsim.step.pipeline.clock import Clock
from spsim.step.pipeline.exchange import Exchange, score
from spsim.step.pipeline.graph import Graph, Part
from spsim.step.pipeline.regions import Region, alike
from tests.test_pipeline_timing import long_runs


@pytest.mark.slow
@settings(max_examples=40, deadline=None, derandomize=True)
@given(long_runs(), st.integers(0, 1 << 30))
def test_sums_are_what_a_search_finds(run: tuple[str, int, int, int, int, Exchange], seed: int) -> None:
    """Of steps near and far on one clock, one by one and as columns, against the whole graph unfolded."""
    numbers = np.random.default_rng(seed)
    clock = Clock(*run)
    graph = Graph(score(*run))
    nodes = np.arange(len(graph.own))
    whole = Part(graph, nodes[:1], nodes[1:])
    of_class = np.array(
        ["FBIW".index(name.kind) + 4 * (name.rank == 0) + 8 * (name.occurrence == "last") for name in clock.classes]
    )
    of_lane = np.array([lane[0] % 2 for lane in clock.lanes])
    steps = []
    for number in range(6):
        if number % 3 == 0:
            base_ps = numbers.integers(1, 100, 16), numbers.integers(0, 50, 2)
        pass_ps = (base_ps[0] * numbers.uniform(0.8, 1.2)).astype(int)[of_class]
        steps.append((pass_ps, base_ps[1][of_lane]))
    expected = [
        whole.ends(np.zeros(1, np.int64), np.concatenate([*step, [0]]))[whole.number[graph.finished]] for step in steps
    ]
    for step, finished_ps in zip(steps, expected, strict=True):
        assert (clock.times(*step).finished_ps == finished_ps).all()
    together = Clock(*run).finished_ps(*(np.stack(columns, axis=1) for columns in zip(*steps, strict=True)))
    assert (together == np.stack(expected, axis=1)).all()


def test_a_third_step_of_the_same_ways_is_not_searched(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second step learns what the first one found, for other clocks of the schedule too."""
    parameters = "1f1b", 8, 2, 64, 8, Exchange(overlap_p2p_comm=True)
    clock = Clock(*parameters)
    pass_ps = np.array([{"F": 100, "B": 200}[name.kind] + 30 * (name.rank == 7) for name in clock.classes])
    message_ps = np.full(len(clock.lanes), 7)
    first = clock.times(pass_ps, message_ps).finished_ps
    assert (clock.times(2 * pass_ps, 2 * message_ps).finished_ps == 2 * first).all()

    monkeypatch.setattr(Clock, "_pieces", lambda *_: pytest.fail("searched"))
    clock = Clock(*parameters)
    assert (clock.times(3 * pass_ps, 3 * message_ps).finished_ps == 3 * first).all()
    with pytest.raises(pytest.fail.Exception, match="searched"):
        clock.times(pass_ps, 40 * message_ps)


def test_durations_are_alike_whatever_their_order() -> None:
    places, groups = alike(np.array([5, 3, 5, 0, 3, 0]))
    assert places.tolist() == [0, 1, 3]
    assert groups.tolist() == [0, 1, 0, 2, 1, 2]
    assert alike(np.array([3, 5, 3, 0, 5, 0]))[1].tolist() == groups.tolist()
    assert alike(np.array([[5, 1], [3, 1], [5, 1], [5, 2]]))[1].tolist() == [0, 1, 0, 2]


def test_a_region_ends_where_another_way_is_longer_or_the_rounds_no_longer_repeat() -> None:
    region = Region(np.array([[1, 1]]), slack=np.array([[2, -1]]), equal=np.array([[1, -1]]))
    assert region.holds(np.array([3, 3]))
    assert not region.holds(np.array([3, 4]))
    assert region.holds(np.array([[0, 3, 3], [0, 4, 3]])).tolist() == [True, False, True]
    assert not Region(region.finished, region.slack, region.equal[:0]).holds(np.array([3, 7]))
