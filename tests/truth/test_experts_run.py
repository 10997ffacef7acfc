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

from spsim import Plan
from spsim.program.instructions import Communication
from spsim.pytorch.layers import Groups, record_collectives, record_saved
from tests.truth.cases import Calls, Case, case, expected_calls, expected_saved
from tests.truth.experts import ExpertLayer, Sent
from tests.truth.processes import Processes, groups_of
from tests.truth.test_gradients import TOLERANCE, Errors, relative

ROUTED = {
    "gated_mlp": True, "ffn_hidden": 96, "kv_heads": 2, "experts": 8, "experts_per_token": 2, "expert_ffn_hidden": 48,
}  # fmt: skip
MODELS = {"routed": ROUTED, "shared": {**ROUTED, "shared_ffn_hidden": 32}}
PLANS = (
    "tp=2,sequence_parallel,dp=2,ep=2", "tp=2,sequence_parallel,dp=2,ep=4,expert_tp=1", "dp=4,ep=2",
    "ulysses=2,dp=2,ep=4", "tp=2,sequence_parallel,dp=2",
)  # fmt: skip
EXPERTS = ("expert_fc1", "expert_swiglu", "expert_fc2")
BF16 = torch.bfloat16
GIVEN, GOT = 1, 2


def whole(each: Case, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Numbers of the shape of what all replicas have."""
    s, b, h = each.shape
    return torch.randn((s, b * each.plan.dp, h), generator=torch.Generator().manual_seed(seed), dtype=dtype)


@dataclass(frozen=True)
class Seen:
    """One forward and backward pass of one rank."""

    saved: dict[tuple[str, str], int]
    calls: Calls
    sent: list[Sent]
    rows: int


def observe(each: Case, balanced: bool) -> Seen:
    """In a process of `Processes`."""
    groups = groups_of(each.plan)
    layer = ExpertLayer(each.model, each.plan, groups, BF16, balanced=balanced)
    x = layer.local_input(whole(each, BF16, 1)).requires_grad_()
    with record_collectives(groups) as calls:
        with record_saved(layer) as saved:
            out = layer(x)
        out.backward(torch.ones_like(out))
    kept: Counter[tuple[str, str]] = Counter()
    for tensor in saved.tensors:
        kept[tensor.operator, tensor.category] += tensor.bytes
    by_axis: Calls = {}
    for call in calls:
        by_axis.setdefault(call.axis, []).append((call.collective, call.message_bytes, call.ranks, call.phase))
    return Seen(dict(kept), by_axis, layer.sent, layer.rows)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("plan", PLANS)
def test_equal_loads(quartet: Processes, plan: str, model: str) -> None:
    """Collectives in order and kept bytes, of each rank."""
    each = case(plan, **MODELS[model])
    for rank in quartet.run(observe, each, True):
        assert rank.calls == expected_calls(each, BF16)
        assert rank.saved == expected_saved(each, BF16)


@pytest.mark.parametrize("plan", PLANS)
def test_loads_of_a_router(quartet: Processes, plan: str) -> None:
    each = case(plan, **ROUTED)
    ranks, kept = quartet.run(observe, each, False), expected_saved(each, BF16)
    mean = Fraction(sum(rank.rows for rank in ranks), len(ranks))
    assert (len({rank.rows for rank in ranks}) > 1) == (each.plan.ep > 1)
    for rank in ranks:
        load = rank.rows / mean
        assert rank.saved == {key: size * (load if key[0] in EXPERTS else 1) for key, size in kept.items()}
    for kind, whole_of in (("all_gather", GOT), ("reduce_scatter", GIVEN)):
        found = [[sent[whole_of] for sent in rank.sent if sent[0] == kind] for rank in ranks]
        assert [sum(each) for each in zip(*found, strict=True)] == [4 * message for message in of_experts(each, kind)]
    sides = (GIVEN, GIVEN, GOT, GIVEN, GOT, GOT) if each.plan.ep > 1 else ()
    for rank in ranks:
        exchanges = [sent for sent in rank.sent if sent[0] == "all_to_all"]
        assert [sent[own] for sent, own in zip(exchanges, sides, strict=True)] == of_experts(each, "all_to_all")


def of_experts(each: Case, collective: str) -> list[int]:
    """Messages of experts that the simulator derives, in order."""
    steps = [step for step in each.program.instructions if isinstance(step, Communication)]
    return [s.message_bytes for s in steps if s.collective == collective and s.tensor.startswith("expert")]


def errors(each: Case) -> Errors:
    """This rank, and the whole layer in one process, where a router picks the experts."""
    part = ExpertLayer(each.model, each.plan, groups_of(each.plan), torch.float64)
    single = ExpertLayer(each.model, Plan(), Groups.create(Plan()), torch.float64)
    reference, gradient = (whole(each, torch.float64, seed) for seed in (1, 2))
    x = part.local_input(reference).requires_grad_()
    out, expected = part(x), single(reference.requires_grad_())
    out.backward(part.local_input(gradient))
    expected.backward(gradient)

    def of_weights() -> dict[str, float]:
        wanted = {name: part.local_weight(name, p.grad) for name, p in single.named_parameters()}
        return {name: relative(p.grad, wanted[name]) for name, p in part.named_parameters()}

    before = of_weights()
    part.synchronise_gradients(each.program.weight_sync)
    return Errors(
        relative(part.whole_output(out.detach()), expected), relative(part.whole_output(x.grad), reference.grad),
        before, of_weights(),
    )  # fmt: skip


@pytest.mark.parametrize("plan", PLANS)
def test_gradients(quartet: Processes, plan: str) -> None:
    """Of all weights and of the input; and a weight is named by `weight_sync` exactly if its gradient needs it."""
    each = case(plan, **MODELS["shared"])
    named = {sync.weight for sync in each.program.weight_sync}
    for rank in quartet.run(errors, each):
        assert max(rank.output, rank.input_gradient, *rank.after_sync.values()) < TOLERANCE
        assert {name for name, error in rank.before_sync.items() if error > TOLERANCE} == named
