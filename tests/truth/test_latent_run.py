"""A layer with latent attention against a real one on two ranks: gradients, collectives and kept bytes.

Megatron-Core gathers the rotated part of k as soon as it is there; here it moves when the heads need it, behind the
latents, and its gradient before theirs. Of that one tensor the place among the others is not compared.
"""

from collections import Counter

import pytest
import torch

from spsim.program.instructions import Communication
from tests.truth.cases import case, expected_calls, expected_saved, observe_here
from tests.truth.latent import LatentLayer
from tests.truth.processes import Processes
from tests.truth.test_gradients import check

LATENT = {
    "gated_mlp": True, "ffn_hidden": 96, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8,
    "v_head_dim": 12,
}  # fmt: skip
MODELS = {"q of hidden states": LATENT, "q of a latent": {**LATENT, "q_lora_rank": 48}}
PLANS = ("tp=2,sequence_parallel", "ulysses=2")
BF16 = torch.bfloat16
READERS = dict.fromkeys(("q_down", "q_up", "kv_down"), "products")
"""Of the same tensors one keeps what all read: the first, which is another one there."""
by_model = pytest.mark.parametrize("model", MODELS)
by_plan = pytest.mark.parametrize("plan", PLANS)


def by_reader(saved: dict[tuple[str, str], int]) -> Counter[tuple[str, str]]:
    found: Counter[tuple[str, str]] = Counter()
    for (name, kind), size in saved.items():
        found[READERS.get(name, name), kind] += size
    return found


@by_model
@by_plan
def test_collectives_and_kept_bytes(pair: Processes, plan: str, model: str) -> None:
    each = case(plan, **MODELS[model])
    steps = [step for step in each.program.instructions if isinstance(step, Communication)]
    kept = by_reader(expected_saved(each, BF16))
    apart = {step.message_bytes for step in steps if step.tensor == "k_rope"}
    for rank in pair.run(observe_here, each, BF16, LatentLayer):
        assert by_reader(rank.saved) == kept
        for axis, calls in expected_calls(each, BF16).items():
            found = rank.calls[axis]
            assert sorted(found) == sorted(calls)
            assert [c for c in found if c[1] not in apart] == [c for c in calls if c[1] not in apart]


@by_model
@by_plan
def test_gradients(pair: Processes, plan: str, model: str) -> None:
    check(pair, case(plan, **MODELS[model]), LatentLayer)
