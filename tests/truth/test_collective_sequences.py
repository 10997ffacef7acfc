"""The collectives that torch issues are those that the placements derive: kind, axis, bytes, order, and phase."""

import pytest
import torch

from tests.truth.cases import COMBINATIONS, MODELS, case, expected_calls, observe_here
from tests.truth.processes import Processes

SENDING = ("gpt", "gpt-sdpa", "llama", "llama-unfused", "geglu-mqa")
"""Models that differ in what they send: heads, rotations between the linears and attention, scores in memory."""


@pytest.mark.parametrize(("plan", "model"), [c for c in COMBINATIONS if c[1] in SENDING])
def test_two_processes(pair: Processes, plan: str, model: str) -> None:
    each = case(plan, **MODELS[model])
    for rank in pair.run(observe_here, each, torch.float32):
        assert rank.calls == expected_calls(each, torch.float32)


def test_megatron_sequence_parallelism_by_hand(pair: Processes) -> None:
    """Forward 2 AG, 2 RS; backward 2 AG of gradients, 2 re-gathers and 2 RS; each the whole [s b h] in fp32."""
    each = case("tp=2,sequence_parallel", **MODELS["gpt"])
    whole = 32 * 3 * 64 * 4
    kinds = ["all_gather", "reduce_scatter"] * 2 + ["all_gather", "all_gather", "reduce_scatter"] * 2
    phases = ["forward"] * 4 + ["backward"] * 6
    expected = {"tp": [(kind, whole, 2, phase) for kind, phase in zip(kinds, phases, strict=True)]}
    assert [rank.calls for rank in pair.run(observe_here, each, torch.float32)] == [expected, expected]
