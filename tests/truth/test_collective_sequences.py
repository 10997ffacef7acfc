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


WHOLE = 32 * 3 * 64 * 4
"""Bytes of [s b h] in fp32; attention has as many K and V."""
FORWARD_AND_BACKWARD = {
    "tp=2": [("all_reduce", WHOLE, 2)] * 2 + [("all_reduce", WHOLE, 2)] * 2,
    # Forward 2 AG, 2 RS; backward, for each block: its output gradient and its input gathered, then a scatter.
    "tp=2,sequence_parallel": [("all_gather", WHOLE, 2), ("reduce_scatter", WHOLE, 2)] * 2
    + [("all_gather", WHOLE, 2), ("all_gather", WHOLE, 2), ("reduce_scatter", WHOLE, 2)] * 2,
    "ulysses=2": [("all_to_all", WHOLE // 2, 2)] * 8,
    # K and V in one message, again in backward, and their gradients.
    "ring=2": [("send_receive", WHOLE, 2)] * 3,
    "ring=2,ring_kind=all_gather": [("all_gather", WHOLE, 2)] * 4 + [("reduce_scatter", WHOLE, 2)] * 2,
}


@pytest.mark.parametrize("plan", FORWARD_AND_BACKWARD)
def test_by_hand(pair: Processes, plan: str) -> None:
    """The strategies as their papers tell them: Shoeybi et al. 2019, Korthikanti et al. 2022, Jacobs et al. 2023,
    Liu et al. 2023.
    """
    axis = plan.split("=")[0]
    for rank in pair.run(observe_here, case(plan, **MODELS["gpt-sdpa"]), torch.float32):
        assert [call[:3] for call in rank.calls[axis]] == FORWARD_AND_BACKWARD[plan]
