"""Replicas of pipeline stages in real processes: the collectives that torch issues are those that spsim derives."""

from collections.abc import Sequence

import pytest

from spsim import Model, Scenario, Workload, simulate
from spsim.step.closing import Closing
from spsim.step.ending import syncs_of
from spsim.step.gradients import PARAMETERS, Sync
from tests.truth.processes import Processes
from tests.truth.replicas import BLOCKS, TOKENS, VOCABULARY, WIDTH
from tests.truth.stage_replicas import trained


def derived(plan: str, precision: str, micro_batches: int) -> list[list[tuple[str, int]]]:
    """Of each stage, gathers of weights first; nothing of what stages agree on."""
    model = Model(
        layers=BLOCKS, hidden=WIDTH, heads=4, vocab=VOCABULARY, ffn_hidden=4 * WIDTH, positions="none",
        tied_embeddings=False,
    )  # fmt: skip
    workload = Workload(seq_len=TOKENS, micro_batch=1, global_batch=2 * micro_batches, precision=precision)
    result = simulate(Scenario(hardware="dgx-a100-80gb", model=model, plan=f"pp=2,dp=2,{plan}", workload=workload))
    assert result.staged is not None
    return [
        [(sync.collective, sync.message_bytes) for sync in sorted(_replicas(own.closings), key=_last)]
        for own in result.prepared.of_stages.values()
    ]


def _replicas(closings: Sequence[Closing]) -> list[Sync]:
    return [sync for sync in syncs_of(closings) if "pp" not in sync.axes]


def _last(sync: Sync) -> bool:
    return sync.name != PARAMETERS


@pytest.mark.parametrize("chunks", [1, 2])
def test_fully_shard(quartet: Processes, chunks: int) -> None:
    """Each unit gathered once and reduced once in a step, whatever micro-batches there are."""
    first, last = derived(f"virtual_pp={chunks},pp_sends=torch,dp_library=fsdp,zero=2", "bf16", 4)
    assert quartet.run(trained, "fsdp", chunks, 4) == [first, first, last, last]


def test_ddp(quartet: Processes) -> None:
    """In the last micro-batch only, in buckets of a quarter of a MiB."""
    first, last = derived("pp_sends=torch,dp_library=ddp,bucket_elements=65536", "fp32", 4)
    assert quartet.run(trained, "ddp", 1, 4) == [first, first, last, last]
