"""Pipeline stages in real processes: what torch runs, posts and waits for is what spsim derives, message by message."""

import pytest

from spsim import Model, Scenario, Workload, simulate
from spsim.inputs.schedules import Schedule
from spsim.step.pipeline.exchange import Exchange, instructions
from tests.test_pipeline_exchange import written
from tests.truth.processes import Processes
from tests.truth.replicas import TOKENS, WIDTH
from tests.truth.stages import trained


@pytest.mark.parametrize(
    ("name", "schedule", "chunks"),
    [("Schedule1F1B", "1f1b", 1), ("ScheduleGPipe", "gpipe", 1), ("ScheduleInterleaved1F1B", "1f1b", 2)],
)
def test_two_stages(pair: Processes, name: str, schedule: Schedule, chunks: int) -> None:
    """Order of passes, calls and waits of both ranks, and the bytes of each message."""
    micro_batches = 4
    derived = instructions(schedule, 2, chunks, micro_batches, None, Exchange("torch"))
    model = Model(layers=2 * chunks, hidden=WIDTH, heads=4, vocab=512)
    plan = f"pp=2,virtual_pp={chunks},pp_schedule={schedule},pp_sends=torch"
    workload = Workload(seq_len=TOKENS, micro_batch=1, global_batch=micro_batches, precision="fp32")
    number, size = simulate(Scenario(hardware="dgx-a100-80gb", model=model, plan=plan, workload=workload)).sends
    ran = pair.run(trained, name, chunks, micro_batches)
    for rank, own in enumerate(ran):
        assert own.instructions == [*written(derived[rank], rank, "torch")]
    assert ran[0].sent == [size] * number
