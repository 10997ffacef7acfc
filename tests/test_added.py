"""Figures that are added up from segments are those of the trace that is written out."""

from dataclasses import replace

import pytest

from spsim.results.metrics import first_above
from tests.cases import H100, result

FIGURES = (
    "step_ps", "pass_ps", "exposed_ps", "idle_s", "weight_sync_ps", "optimizer_ps", "compute_ps", "peak_bytes",
    "peak_operator",
)  # fmt: skip
UNITS = "recompute=full,recompute_method=uniform,recompute_layers=2"


@pytest.mark.parametrize("scope", ["layers", "step"])
@pytest.mark.parametrize(
    "plan",
    [
        "tp=8,sequence_parallel",
        "ulysses=2,ring=2,recompute=full",
        "ring=4,ring_kind=all_gather",
        f"tp=4,sequence_parallel,{UNITS}",
    ],
)
def test_added_as_in_the_trace(plan, scope):
    """Times, memory and where it is fullest; the operator at which room for any share of it runs out."""
    own = result(plan, hardware=H100, seq_len=8192, global_batch=6, layers=4, scope=scope)
    written = replace(own, added=None, trace=replace(own.trace, known_end_ps=None))
    assert own.added is not None
    for name in FIGURES:
        assert getattr(own, name) == getattr(written, name), name
    tasks = own.peak_bytes - own.static.total
    for share in (0, 0.2, 0.5, 0.8, 0.99):
        room = int(share * tasks)
        found = first_above(written.trace, written.peak.rank, 0, room)
        assert own.added.first_above(0, 0, room) == own.task_name(found)
