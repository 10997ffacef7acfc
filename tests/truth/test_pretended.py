"""Saved bytes and collectives at degrees that no test machine has, up to the layer of GPT-175B.

Fake tensors and a fake process group: torch runs all its code, forward and backward, on shapes alone.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spsim import Workload
from spsim.errors import InputError
from spsim.inputs.plan import parse_plan
from spsim.inputs.presets import load_model
from spsim.inputs.rules import check_shapes
from tests.cases import random_scenarios
from tests.truth.cases import Case, case, expected_calls, expected_saved, observe
from tests.truth.processes import pretended_groups

STRATEGIES = (
    "tp={p}", "tp={p},sequence_parallel", "ulysses={p}", "ring={p}", "ring={p},ring_cut=contiguous",
    "ring={p},ring_kind=all_gather",
)  # fmt: skip
PRODUCTS = (
    "ulysses=4,ring=2", "tp=2,sequence_parallel,ulysses=4", "tp=4,sequence_parallel,ring=2",
    "tp=2,sequence_parallel,ulysses=2,ring=2", "tp=2,ulysses=2,ring=2,ring_kind=all_gather",
)  # fmt: skip
RECOMPUTE = ("tp=8,sequence_parallel,recompute=selective", "tp=8,recompute=full", "ulysses=8,recompute=selective")


def check(case: Case, dtype: torch.dtype, rank: int) -> None:
    """Torch keeps and sends what the simulator says."""
    with pretended_groups(case.plan, rank) as groups:
        observed = observe(case, groups, dtype)
    assert observed.saved == expected_saved(case, dtype)
    assert observed.calls == expected_calls(case, dtype)


def plans_for(attention: str) -> list[str]:
    """Unfused attention cannot be circulated."""
    plans = ["", *(plan.format(p=p) for plan in STRATEGIES for p in (2, 8)), *PRODUCTS, *RECOMPUTE]
    return [p for p in plans if attention == "flash" or "ring" not in p or "all_gather" in p]


@pytest.mark.parametrize(
    ("attention", "dropout", "plan"),
    [("unfused", 0.1, p) for p in plans_for("unfused")] + [("flash", 0.0, p) for p in plans_for("flash")],
)
def test_the_layer_of_gpt_175b(attention: str, dropout: float, plan: str) -> None:
    model = load_model("gpt-175b").model_copy(update={"attention": attention, "dropout": dropout})
    check(Case(parse_plan(plan), model, Workload(seq_len=2048, micro_batch=2)), torch.bfloat16, rank=0)


@pytest.mark.parametrize("plan", plans_for("flash"))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_layer_of_llama_3_8b(plan: str, dtype: torch.dtype) -> None:
    """Eight KV heads; the last rank, where the first is above."""
    chosen = Case(parse_plan(plan), load_model("llama-3-8b"), Workload(seq_len=4096))
    check(chosen, dtype, rank=chosen.plan.gpus - 1)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(random_scenarios(fold=st.just(True), layers=1, micro_batches=1), st.data())
def test_any_small_layer_under_any_plan(settings: dict[str, object], data: st.DataObject) -> None:
    unused = ("fold", "hardware", "global_batch")
    arguments = {name: value for name, value in settings.items() if name not in unused}
    drawn = case(**{"hidden": 256, **arguments})
    try:
        check_shapes(drawn.model, drawn.plan, drawn.workload)
    except InputError:
        return
    check(drawn, torch.bfloat16, data.draw(st.integers(0, drawn.plan.gpus - 1)))
