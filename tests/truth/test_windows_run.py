"""A layer with a window of attention against a real one on two ranks: gradients, collectives and kept bytes."""

import pytest
import torch

from tests.truth.cases import case, expected_calls, expected_saved, observe_here
from tests.truth.processes import Processes
from tests.truth.test_gradients import check
from tests.truth.windows import WindowLayer

WINDOW = {"gated_mlp": True, "ffn_hidden": 96, "kv_heads": 2, "sliding_window": 10}
MODELS = {"window": WINDOW, "window and sinks": {**WINDOW, "attention_sinks": True}}
PLANS = (
    "tp=2,sequence_parallel", "ulysses=2", "ring=2,ring_kind=all_gather",
    "ring=2,ring_kind=all_gather,ring_cut=contiguous",
)  # fmt: skip
BF16 = torch.bfloat16


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("plan", PLANS)
def test_a_window(pair: Processes, plan: str, model: str) -> None:
    each = case(plan, **MODELS[model])
    for rank in pair.run(observe_here, each, BF16, WindowLayer):
        assert rank.calls == expected_calls(each, BF16)
        assert rank.saved == expected_saved(each, BF16)
    check(pair, each, WindowLayer)
