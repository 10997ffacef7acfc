"""Outputs and all gradients of every strategy equal those of one process, in fp64.

Before the synchronisation of `Program.weight_sync`, the gradients of exactly the weights that it names are wrong.
"""

from dataclasses import dataclass

import pytest
import torch

from spsim import Plan
from spsim.pytorch.layers import Groups, ParallelLayer
from tests.truth.cases import COMBINATIONS, MODELS, Case, case
from tests.truth.processes import Processes, groups_of

TOLERANCE = 1e-11
"""Relative, for sums in another order; fp64 has 16 digits."""


@dataclass(frozen=True)
class Errors:
    """Largest differences of one rank from one process, relative to the largest value."""

    output: float
    input_gradient: float
    before_sync: dict[str, float]
    after_sync: dict[str, float]


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference over largest value, or over 1 where all are smaller."""
    assert found.shape == expected.shape
    return ((found - expected).abs().max() / expected.abs().max().clamp(min=1)).item()


def errors(case: Case, kind: type[ParallelLayer]) -> Errors:
    """Run the layer of this rank and the whole layer on the same numbers."""
    generator = torch.Generator().manual_seed(1)
    whole, gradient = (torch.randn(case.shape, generator=generator, dtype=torch.float64) for _ in range(2))
    part = kind(case.model, case.plan, groups_of(case.plan), torch.float64)
    x = part.local_input(whole).requires_grad_()
    out = part(x)
    out.backward(part.local_input(gradient))

    single = kind(case.model, Plan(), Groups.create(Plan()), torch.float64)
    reference = whole.requires_grad_()
    expected = single(reference)
    expected.backward(gradient)

    def of_weights() -> dict[str, float]:
        wanted = {name: part.local_weight(name, p.grad) for name, p in single.named_parameters()}
        return {name: relative(p.grad, wanted[name]) for name, p in part.named_parameters()}

    before = of_weights()
    part.synchronise_gradients(case.program.weight_sync)
    return Errors(
        relative(part.whole_output(out.detach()), expected), relative(part.whole_output(x.grad), reference.grad),
        before, of_weights(),
    )  # fmt: skip


def check(processes: Processes, case: Case, kind: type[ParallelLayer] = ParallelLayer) -> None:
    """Equal on all ranks; and a weight is named by `weight_sync` exactly if its gradient needs it."""
    named = {sync.weight for sync in case.program.weight_sync}
    for rank in processes.run(errors, case, kind):
        assert rank.output < TOLERANCE
        assert rank.input_gradient < TOLERANCE
        assert max(rank.after_sync.values()) < TOLERANCE
        assert {name for name, error in rank.before_sync.items() if error > TOLERANCE} == named


@pytest.mark.parametrize(("plan", "model"), COMBINATIONS)
def test_two_processes(pair: Processes, plan: str, model: str) -> None:
    check(pair, case(plan, **{**MODELS[model], "dropout": 0.0}))


@pytest.mark.parametrize(
    "plan",
    [
        "tp=4", "tp=4,sequence_parallel", "ulysses=4", "ring=4", "ring=4,ring_cut=contiguous",
        "ring=4,ring_kind=all_gather", "ring=4,ring_kind=all_gather,ring_cut=contiguous", "ulysses=2,ring=2",
        "tp=2,sequence_parallel,ring=2", "tp=2,sequence_parallel,ulysses=2", "tp=2,ulysses=2",
        "tp=2,ring=2,ring_kind=all_gather,recompute=full",
    ],
)  # fmt: skip
def test_four_processes(quartet: Processes, plan: str) -> None:
    """Two KV heads for up to four ranks; rings turn three times."""
    check(quartet, case(plan, **MODELS["llama"]))
