"""A layer with experts against a real one on four ranks: gradients, collectives and kept bytes, of equal loads and not.

Whatever the loads, a rank sends a row for each of its tokens and each of its experts, and gets as many back: what goes
into dispatch, and what comes out of combine, is what the simulator says, rank for rank. What experts get is not: the
sum over all ranks is. What is kept of that is in proportion to the rows of a rank.
"""

from collections import Counter
from dataclasses import dataclass
from fractions import Fraction

import pytest
import torch

from spsim.program.instructions import Communication
from tests.truth.cases import Case, Observed, case, expected_calls, expected_saved, observed
from tests.truth.experts import BalancedLayer, ExpertLayer, RecomputedLayer, Sent
from tests.truth.processes import Processes, groups_of
from tests.truth.test_gradients import check

ROUTED = {
    "gated_mlp": True, "ffn_hidden": 96, "kv_heads": 2, "experts": 8, "experts_per_token": 2, "expert_ffn_hidden": 48,
}  # fmt: skip
SHARED = {**ROUTED, "shared_ffn_hidden": 32}
PLANS = (
    "tp=2,sequence_parallel,dp=2,ep=2", "tp=2,sequence_parallel,dp=2,ep=4,expert_tp=1", "dp=4,ep=2",
    "ulysses=2,dp=2,ep=4", "tp=2,sequence_parallel,dp=2",
)  # fmt: skip
EXPERTS = ("expert_fc1", "expert_swiglu", "expert_fc2")
BF16 = torch.bfloat16
GIVEN, GOT = 1, 2


@dataclass(frozen=True)
class Routed:
    """What one rank does, the bytes of experts that it gave and got, and the rows that came to its own."""

    observed: Observed
    sent: list[Sent]
    rows: int


def observe(each: Case, kind: type[ExpertLayer]) -> Routed:
    """In a process of `Processes`, on numbers at random."""
    layer = kind(each.model, each.plan, groups_of(each.plan), BF16)
    numbers = torch.randn(each.shape, generator=torch.Generator().manual_seed(1), dtype=BF16)
    return Routed(observed(layer, layer.local_input(numbers)), layer.sent, layer.rows)


@pytest.mark.parametrize("plan", PLANS)
def test_equal_loads(quartet: Processes, plan: str) -> None:
    """Collectives in order and kept bytes, of each rank."""
    each = case(plan, **SHARED)
    for rank in quartet.run(observe, each, BalancedLayer):
        assert rank.observed.calls == expected_calls(each, BF16)
        assert rank.observed.saved == expected_saved(each, BF16)


@pytest.mark.parametrize("plan", PLANS)
def test_loads_of_a_router(quartet: Processes, plan: str) -> None:
    each = case(plan, **ROUTED)
    ranks, kept = quartet.run(observe, each, ExpertLayer), expected_saved(each, BF16)
    mean = Fraction(sum(rank.rows for rank in ranks), len(ranks))
    assert (len({rank.rows for rank in ranks}) > 1) == (each.plan.ep > 1)
    for rank in ranks:
        load = rank.rows / mean
        assert rank.observed.saved == {key: size * (load if key[0] in EXPERTS else 1) for key, size in kept.items()}
    for kind, whole_of in (("all_gather", GOT), ("reduce_scatter", GIVEN)):
        found = [[sent[whole_of] for sent in rank.sent if sent[0] == kind] for rank in ranks]
        assert [sum(each) for each in zip(*found, strict=True)] == [4 * message for message in of_experts(each, kind)]
    sides = (GIVEN, GIVEN, GOT, GIVEN, GOT, GOT) if each.plan.ep > 1 else ()
    for rank in ranks:
        exchanges = [sent for sent in rank.sent if sent[0] == "all_to_all"]
        assert [sent[own] for sent, own in zip(exchanges, sides, strict=True)] == of_experts(each, "all_to_all")


@pytest.mark.parametrize("plan", PLANS[:3])
def test_all_of_the_experts_again(quartet: Processes, plan: str) -> None:
    """In the backward pass, from what their router reads, with all that is sent for them."""
    each = case(f"{plan},recompute=selective,recompute_modules=core_attn+moe", **SHARED)
    kept = _by_category(expected_saved(each, BF16))
    for rank in quartet.run(observe, each, RecomputedLayer):
        assert rank.observed.calls == expected_calls(each, BF16)
        assert _by_category(rank.observed.saved) == kept


def _by_category(saved: dict[tuple[str, str], int]) -> Counter[str]:
    found: Counter[str] = Counter()
    for (_, category), size in saved.items():
        found[category] += size
    return found


@pytest.mark.parametrize(("plan", "sequences"), [(PLANS[0], 1), (PLANS[1], 2), ("dp=4,ep=4", 1)])
def test_the_rank_with_the_most(quartet: Processes, plan: str, sequences: int) -> None:
    """Of a plan that says how much it has; that is told in 64ths of the mean, here of 64 rows."""
    each = case(plan, micro_batch=sequences, **ROUTED)
    fullest = max(quartet.run(observe, each, ExpertLayer), key=lambda rank: rank.rows)
    told = case(f"{plan},expert_imbalance={fullest.rows / 64}", micro_batch=sequences, **ROUTED)
    assert fullest.rows > 64
    assert fullest.observed.saved == expected_saved(told, BF16)
    split_over_tp = any(sent[0] == "all_gather" for sent in fullest.sent)
    kinds = {"all_gather": (GOT, GOT, GOT), "reduce_scatter": (GIVEN, GIVEN, GIVEN)}
    if not split_over_tp:  # else each rank of tp gets a part, which are not alike
        kinds = {"all_to_all": (GOT, GOT, GIVEN, GOT, GIVEN, GIVEN)}
    for kind, sides in kinds.items():
        sent = [sent for sent in fullest.sent if sent[0] == kind]
        assert [own[side] for own, side in zip(sent, sides, strict=True)] == of_experts(told, kind)


@pytest.mark.parametrize("plan", ["dp=4,ep=4", "tp=2,sequence_parallel,dp=2,ep=4,expert_tp=1"])
def test_all_tokens_on_all_ranks(quartet: Processes, plan: str) -> None:
    """Gathered, and what experts make of them summed, with equal loads. Of gradients the order is not compared: that of
    the tokens moves once all readers have added theirs, there at once.
    """
    each = case(f"{plan},moe_dispatcher=allgather", **SHARED)
    for rank in quartet.run(observe, each, BalancedLayer):
        for axis, calls in expected_calls(each, BF16).items():
            found = rank.observed.calls[axis]
            assert sorted(found) == sorted(calls)
            forward = [[call for call in passes if call[-1] == "forward"] for passes in (found, calls)]
            assert forward[0] == forward[1]
        assert rank.observed.saved == expected_saved(each, BF16)
    check(quartet, each, ExpertLayer)


def of_experts(each: Case, collective: str) -> list[int]:
    """Messages of experts that the simulator derives, in order."""
    steps = [step for step in each.program.instructions if isinstance(step, Communication)]
    return [s.message_bytes for s in steps if s.collective == collective and s.tensor.startswith("expert")]


@pytest.mark.parametrize("plan", PLANS)
def test_gradients(quartet: Processes, plan: str) -> None:
    """With the loads of a router."""
    check(quartet, case(plan, **SHARED), ExpertLayer)
