"""A rank or a link that is slow, or stands still, for a part of a run; against hand-worked times and the replay."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spsim.engine.contention import PPM
from spsim.engine.tasks import Paces, Task
from tests.replay import SLOWDOWNS, Replay, meeting, random_paces, random_programs, random_starts, times

HALF = PPM // 2


def test_a_kernel_loses_what_it_does_in_a_slow_window():
    """50 of its 100 at full rate, 25 in the 50 at half rate, and the rest behind."""
    programs = {0: [Task(0, "compute", 100), Task(1, "compute", 10)]}
    found = times(programs, paces={0: Paces([(50, 100, HALF)])})
    assert found == {(0, 0): (0, 0, 125), (0, 1): (125, 125, 135)}


def test_others_wait_for_a_slow_rank_where_they_meet():
    programs = {
        rank: [Task(0, "compute", 10), Task(1, "tp", 5, (0,), meeting(1, 2)), Task(2, "compute", 1, (1,))]
        for rank in range(2)
    }
    found = times(programs, paces={1: Paces([(0, 100, HALF)])})
    assert found[0, 1] == (10, 20, 25)
    assert found[1, 1] == (20, 20, 25)
    assert [found[rank, 2][2] for rank in range(2)] == [26, 27]


def test_a_transfer_stands_still_while_its_link_is_down():
    programs = {rank: [Task(0, "net", 100, (), meeting(0, 2)), Task(1, "other", 100, (), meeting(1, 2))]
                for rank in range(2)}  # fmt: skip
    down = Paces(transfers={0: [(30, 80, 0)]})
    found = times(programs, paces={0: down, 1: down})
    assert {found[rank, 0] for rank in range(2)} == {(0, 0, 150)}
    assert {found[rank, 1] for rank in range(2)} == {(0, 0, 100)}


def test_what_a_rank_loses_beside_a_communication_comes_on_top():
    """At half rate beside the collective, and of that at half in the window: 10 in 20, 5 in 20, then 85 behind."""
    programs = {0: [Task(0, "compute", 100), Task(1, "net", 40, (), meeting(1, 1))]}
    found = times(programs, slowdown=0.5, paces={0: Paces([(20, 40, HALF)])})
    assert found[0, 0] == (0, 0, 40 + 85)


@pytest.mark.parametrize("paces", [{}, {0: Paces()}, {0: Paces([(0, 2**62, PPM)], {1: [(0, 9, PPM)]})}])
def test_the_pace_of_all_others_changes_nothing(paces):
    programs = {0: [Task(0, "compute", 7), Task(1, "net", 5, (), meeting(1, 1)), Task(2, "compute", 7)]}
    assert times(programs, slowdown=0.3, paces=paces) == times(programs, slowdown=0.3)


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(st.data())
def test_random_paces_run_as_in_the_replay(data):
    programs = data.draw(random_programs())
    slowdown, starts = data.draw(SLOWDOWNS), data.draw(random_starts(programs))
    paces = data.draw(random_paces(programs))
    expected = Replay(programs, slowdown, starts=starts, paces=paces).times()
    assert times(programs, slowdown, starts=starts, paces=paces) == expected
