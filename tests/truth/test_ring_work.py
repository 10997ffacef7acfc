"""The blocks that real ring attention computes are those whose work the simulator counts."""

import pytest
import torch

from spsim.program.blocks.transformer import transformer_layer
from spsim.program.kernel_kinds import kernels_of
from spsim.program.lowerings.ring_steps import ring_blocks
from spsim.program.mesh import mesh_of
from spsim.program.operators import operator_splits
from spsim.program.placed import PlacedOperator
from spsim.program.strategies import split_rules
from spsim.pytorch.layers.flash import Block
from spsim.pytorch.layers.ring import Ring
from tests.truth.cases import case
from tests.truth.processes import pretended_groups

TOKENS = 12
"""Of one rank."""


def twice_pairs(block: Block | None, degree: int) -> int:
    """Twice the pairs of query and key: a causal block computes half of its square."""
    if block is None:
        return 0
    rows, keys = (len(range(TOKENS * degree)[s]) for s in (block.queries, block.keys))
    return rows * keys * (1 if block.causal else 2)


def ring(plan: str, rank: int, causal: bool) -> Ring:
    with pretended_groups(case(plan).plan, rank) as groups:
        group = groups.group("ring")
    assert group is not None
    none = torch.empty(0)
    return Ring(group, rank, causal and "contiguous" not in plan, causal, none, none)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("cut", ["zigzag", "contiguous"])
@pytest.mark.parametrize("degree", [2, 8])
def test_circulated(degree: int, cut: str, causal: bool) -> None:
    for rank in range(degree):
        real = ring(f"ring={degree},ring_cut={cut}", rank, causal)
        for step in range(degree):
            counted = ring_blocks(TOKENS, degree, step, causal=causal, cut=cut)
            one = counted[rank] if len(counted) > 1 else counted[0]
            found = real.circulated_block(TOKENS, (rank - step) % degree)
            assert twice_pairs(found, degree) == (one.twice_pairs if one else 0)
            assert found is None or (one is not None and found.causal == one.causal)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("cut", ["zigzag", "contiguous"])
@pytest.mark.parametrize("degree", [2, 8])
def test_gathered(degree: int, cut: str, causal: bool) -> None:
    each = case(f"ring={degree},ring_kind=all_gather,ring_cut={cut}", seq_len=TOKENS * degree, causal=causal)
    attention = next(op for op in transformer_layer(each.model, each.workload) if op.name == "attention")
    mesh = mesh_of(each.plan)
    kernels = kernels_of(PlacedOperator(attention, operator_splits(attention, split_rules(each.plan), mesh), mesh))
    counted = kernels.over_gathered_keys("forward", causal, cut)
    for rank in range(degree):
        blocks = ring(f"ring={degree},ring_cut={cut}", rank, causal).gathered_blocks(TOKENS)
        found = sum(twice_pairs(block, degree) for block in blocks)
        assert found == (counted[rank] if len(counted) > 1 else counted[0]).twice_pairs
