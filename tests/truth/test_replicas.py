"""Steps of replicas in real processes: the collectives that torch issues, in order, are those of the walked step."""

from typing import Any

import pytest

from spsim.inputs.plan import Plan
from spsim.inputs.workload import Precision
from spsim.step.replicas import parameters_of, synchronisation
from tests.test_replicas import ROOT
from tests.test_variants import Walk, programs
from tests.truth.processes import Processes
from tests.truth.replicas import Calls, ddp, fsdp, zero_1


def walked(plan: Plan, precision: Precision, root: frozenset[int] = frozenset()) -> Calls:
    """What spsim derives."""
    blocks = programs(64, plan.dp, precision=precision)
    return Walk(synchronisation(parameters_of(blocks), plan, precision, root=root), plan, blocks).calls()


@pytest.mark.parametrize(("options", "elements"), [({}, None), ({"bucket_cap_mb": 0.25}, 2**16)])
def test_ddp(pair: Processes, options: dict[str, Any], elements: int | None) -> None:
    """With `no_sync` in all micro-batches but the last."""
    expected = walked(Plan(dp=2, dp_library="ddp", bucket_elements=elements), "fp32")
    assert pair.run(ddp, options) == [expected, expected]


@pytest.mark.parametrize("reshard", [True, False])
def test_fully_shard(pair: Processes, reshard: bool) -> None:
    """bf16 weights gathered, gradients reduced in fp32 in each micro-batch."""
    expected = walked(Plan(dp=2, dp_library="fsdp", zero=3 if reshard else 2), "bf16", ROOT)
    assert pair.run(fsdp, {"reshard_after_forward": reshard}) == [expected, expected]


def test_zero_1(pair: Processes) -> None:
    """Buckets of a distributed optimizer, whose weights move as those of one process."""
    bucket = 60_000
    plan = Plan(dp=2, distributed_optimizer=True, dp_overlap="gradients", bucket_elements=bucket)
    for calls, difference, movement in pair.run(zero_1, bucket):
        assert calls == walked(plan, "fp32")
        assert difference < 1e-3 < movement
