"""Rules of the whole step against what libraries ran and refused."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spsim.inputs.plan import Plan
from spsim.inputs.step_rules import micro_batch_rules

RAN = {  # schedule: virtual_pp, options, (pp, micro-batches, group) of runs of Megatron-Core 0.16.1 and torch 2.13.0
    "Megatron 1F1B": (1, {}, [(2, 1, None), (2, 3, None), (4, 1, None), (4, 2, None), (4, 8, None)]),
    "Megatron interleaved": (
        3, {}, [(2, 4, 2), (2, 4, 4), (2, 8, 2), (2, 8, 3), (2, 8, 4), (2, 8, 6), (2, 8, 8), (4, 4, 4), (4, 8, None)]
    ),
    "Schedule1F1B": (1, {"pp_sends": "torch"}, [(2, 2, None), (2, 5, None), (4, 4, None), (4, 10, None)]),
    "ScheduleGPipe": (1, {"pp_schedule": "gpipe"}, [(2, 1, None), (4, 3, None), (4, 16, None)]),
    "ScheduleInterleaved1F1B": (
        2, {"pp_sends": "torch"}, [(2, 1, None), (2, 3, None), (4, 1, None), (4, 5, None), (4, 6, None), (4, 10, None)]
    ),
    "ScheduleInterleavedZeroBubble": (
        2, {"pp_schedule": "interleaved_zero_bubble"}, [(2, 3, None), (2, 10, None), (4, 6, None), (4, 10, None)]
    ),
    "ScheduleLoopedBFS": (2, {"pp_schedule": "looped_bfs"}, [(2, 1, None), (4, 3, None), (4, 10, None)]),
    "ScheduleZBVZeroBubble": (2, {"pp_schedule": "zbv"}, [(2, 1, None), (4, 3, None), (4, 16, None)]),
    "ScheduleDualPipeV": (2, {"pp_schedule": "dualpipev"}, [(2, 4, None), (2, 5, None), (4, 8, None), (4, 10, None)]),
}  # fmt: skip
REFUSED = {
    "Megatron interleaved": (2, {}, [(4, 2, None), (4, 6, None), (4, 8, 6), (4, 4, 8)]),
    "Schedule1F1B": (1, {"pp_sends": "torch"}, [(4, 3, None)]),
    "ScheduleInterleaved1F1B": (2, {"pp_sends": "torch"}, [(4, 9, None), (2, 5, None)]),
    "ScheduleDualPipeV": (2, {"pp_schedule": "dualpipev"}, [(4, 7, None)]),
}


def keeps(plan, count):
    return all(holds for holds, _ in micro_batch_rules(plan, count))


@pytest.mark.parametrize(("kept", "schedules"), [(True, RAN), (False, REFUSED)])
def test_micro_batches_are_taken_as_the_libraries_take_them(kept, schedules):
    for name, (virtual_pp, options, runs) in schedules.items():
        for pp, count, group in runs:
            plan = Plan(pp=pp, virtual_pp=virtual_pp, pp_group=group, **options)
            assert keeps(plan, count) == kept, (name, pp, count, group)


@given(
    st.integers(1, 8),
    st.integers(1, 3),
    st.sampled_from(["1f1b", "gpipe", "looped_bfs", "interleaved_zero_bubble", "zbv", "dualpipev"]),
    st.sampled_from([None, "torch"]),
    st.none() | st.integers(1, 16),
)
def test_many_counts_at_once_are_judged_as_one_by_one(pp, virtual_pp, schedule, sends, group):
    plan = Plan(pp=pp, virtual_pp=virtual_pp, pp_schedule=schedule, pp_sends=sends, pp_group=group)
    counts = np.arange(1, 40)
    whole = np.ones(len(counts), dtype=bool)
    for holds, _ in micro_batch_rules(plan, counts):
        whole &= holds
    assert whole.tolist() == [keeps(plan, count) for count in counts.tolist()]
