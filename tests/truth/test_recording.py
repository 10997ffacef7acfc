"""The recorders tell the truth: what is kept once counts once, what is a view counts whole."""

import pytest
import torch
from torch import nn

from spsim.pytorch.layers import Groups, operator, record_collectives, record_saved
from spsim.pytorch.layers.collectives import start_all_gather, start_all_reduce, start_exchange
from tests.truth.cases import case
from tests.truth.processes import Processes, groups_of, pretended_groups


def leaf(*sizes: int) -> torch.Tensor:
    return torch.randn(sizes, requires_grad=True)


def test_a_view_keeps_its_whole_storage() -> None:
    x = leaf(8, 4)
    with record_saved() as saved:
        x[:2].square()
    assert saved.bytes() == 8 * 4 * 4


def test_a_storage_counts_once_whatever_its_views() -> None:
    x = leaf(8, 4)
    with record_saved() as saved:
        x.square(), x.view(4, 8).square(), x.T.exp().sum()  # exp keeps its output, of its own
    assert [tensor.bytes for tensor in saved.tensors] == [128, 128]


def test_two_storages_of_equal_values_count_twice() -> None:
    x = leaf(8, 4)
    with record_saved() as saved:
        x.square(), x.clone().square()
    assert saved.bytes() == 2 * 128


def test_freed_memory_is_not_mistaken_for_its_successor() -> None:
    """Each iteration's tensor may be at the address of the one before."""
    with record_saved() as saved:
        for _ in range(5):
            leaf(1000).square()
    assert len(saved.tensors) == 5


def test_parameters_and_buffers_are_no_part_of_it() -> None:
    linear = nn.Linear(4, 4)
    x = leaf(8, 4)
    with record_saved(linear) as saved:
        linear(x).square()
    assert [tensor.shape for tensor in saved.tensors] == [(8, 4), (8, 4)]
    with record_saved() as saved:
        linear(x)
    assert (4, 4) in [tensor.shape for tensor in saved.tensors]


def test_nothing_is_kept_without_gradients() -> None:
    with record_saved() as saved, torch.no_grad():
        leaf(8).square()
    assert not saved.tensors


def test_categories_and_operators() -> None:
    x = leaf(4, 2, 8)
    with record_saved() as saved:
        with operator("norm1"):
            y = nn.functional.layer_norm(x, (8,))
        with operator("residual1"):
            torch.native_dropout(y, 0.5, train=True)
    assert [(t.operator, t.category, t.bytes) for t in saved.tensors] == [
        ("norm1", "activation", 256), ("norm1", "norm statistics", 32), ("norm1", "norm statistics", 32),
        ("residual1", "mask", 64),
    ]  # fmt: skip


class FlashOnAGpu(torch.autograd.Function):
    """Saves what torch's derivative of `_scaled_dot_product_flash_attention` saves on CUDA, from 2.7 on and before."""

    @staticmethod
    def forward(ctx, q, *random_state):
        out = q.clone()
        ctx.save_for_backward(q, out, q.new_empty(q.shape[:3], dtype=torch.float32), *random_state)
        return out

    @staticmethod
    def backward(ctx, *gradients):
        return gradients[0], None, None


@pytest.mark.parametrize(("dtype", "sizes"), [(torch.uint64, (2,)), (torch.int64, ())])
def test_the_random_state_of_fused_attention_is_no_activation(dtype: torch.dtype, sizes: tuple[int, ...]) -> None:
    q = torch.randn(1, 2, 8, 4, requires_grad=True)
    with record_saved() as saved, operator("attention"):
        FlashOnAGpu.apply(q, torch.empty(sizes, dtype=dtype), torch.empty((), dtype=dtype))
    assert [(t.category, t.bytes) for t in saved.tensors] == [
        ("activation", 256), ("activation", 256), ("log-sum-exp", 64)
    ]  # fmt: skip


def test_fake_tensors_have_storages_too() -> None:
    with pretended_groups(case("").plan):
        x = leaf(8, 4)
        with record_saved() as saved:
            x[:2].square(), x.view(4, 8).square()
    assert saved.bytes() == 128


def issue(plan: str) -> list[tuple[str, str, int, int, str]]:
    """Some collectives of one rank of two, as recorded."""
    groups: Groups = groups_of(case(plan).plan)
    group = groups.group("tp")
    assert group is not None
    with record_collectives(groups) as calls:
        start_all_reduce(torch.ones(8), group).wait()
        start_all_gather(torch.ones(8), group).wait()
        start_exchange(torch.ones(8), group).wait()
    start_all_reduce(torch.ones(8), group).wait()
    return [(call.collective, call.axis, call.message_bytes, call.ranks, call.phase) for call in calls]


def test_collectives_are_seen_where_torch_issues_them(pair: Processes) -> None:
    """The whole array of the group, and what one rank sends; after the recorder ends, nothing."""
    assert pair.run(issue, "tp=2") == 2 * [
        [
            ("all_reduce", "tp", 32, 2, "forward"),
            ("all_gather", "tp", 64, 2, "forward"),
            ("send_receive", "tp", 32, 2, "forward"),
        ]
    ]


def test_groups_need_as_many_processes_as_the_plan() -> None:
    with pytest.raises(ValueError, match=r"TP8 needs 8 processes, but 1 run; start 8 with torchrun"):
        Groups.create(case("tp=8").plan)
