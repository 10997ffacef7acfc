"""Rings as libraries run them: real processes send what the options of a plan derive, and compute the same."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from spsim.program.instructions import Communication
from spsim.pytorch.layers import ParallelLayer
from spsim.pytorch.layers.flash import block_backward, block_forward
from tests.truth.cases import MODELS, case, expected_calls, expected_saved, observe_here
from tests.truth.processes import Processes
from tests.truth.test_gradients import TOLERANCE, errors

FP32 = "ring_gradients=fp32"
GATHERED = "ring_kind=gather_permute"
PLANS = (
    f"ring=4,{FP32}", f"ring=4,{FP32},ring_messages=separate,ring_cut=contiguous", "ring=4,ring_messages=separate",
    f"ring=4,{GATHERED},ring_cut=contiguous", f"ring=4,{GATHERED},ring_messages=separate",
    f"ring=4,{FP32},recompute=full", f"ring=2,ulysses=2,{GATHERED},recompute=selective",
    f"tp=2,sequence_parallel,ring=2,{FP32},ring_messages=separate",
    "ulysses=4,gathers_position_ids,recompute=full", "ring=2,ulysses=2,gathers_position_ids",
)  # fmt: skip


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("model", ["llama", "not-causal"])
def test_what_is_sent_and_kept(quartet: Processes, plan: str, model: str) -> None:
    """Kind, bytes, axis and order in the two dtypes of a step: bf16 goes forward."""
    each = case(plan, **MODELS[model])
    for rank in quartet.run(observe_here, each, torch.bfloat16):
        assert rank.calls == expected_calls(each, torch.bfloat16)
        assert rank.saved == expected_saved(each, torch.bfloat16)


@pytest.mark.parametrize("plan", PLANS[:6])
def test_results_are_those_of_one_process(quartet: Processes, plan: str) -> None:
    for rank in quartet.run(errors, case(plan, **MODELS["llama"]), ParallelLayer):
        assert max(rank.output, rank.input_gradient, *rank.after_sync.values()) < TOLERANCE


# ------------------------------------------------------------ torch's own context parallelism


def flash(query: Tensor, key: Tensor, value: Tensor, *, is_causal: bool) -> tuple[Tensor, Tensor]:
    """Torch's kernel on CPU, which its context parallelism calls by another name on a GPU: [b a s d]."""
    out, log_sum_exp = block_forward(*(x.permute(2, 0, 1, 3) for x in (query, key, value)), is_causal)
    return out.permute(1, 2, 0, 3), log_sum_exp


def flash_backward(grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, **given: Any) -> tuple[Tensor, ...]:
    """Likewise."""
    first = [x.permute(2, 0, 1, 3) for x in (grad_out, query, key, value, given["out"])]
    found = block_backward(*first, given["logsumexp"], given["is_causal"])
    return tuple(x.permute(1, 2, 0, 3) for x in found)


NAMES = {
    "all_gather": "_c10d_functional::all_gather_into_tensor", "send_receive": "_c10d_functional::all_to_all_single"
}  # fmt: skip
"""A permute is an all-to-all of which everything goes to the next rank."""


class Recorder(TorchDispatchMode):
    """Functional collectives: name, bytes of the larger side, dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, int, torch.dtype]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func._schema.name in NAMES.values():
            self.calls.append((func._schema.name, max(args[0].nbytes, out.nbytes), out.dtype))
        return out


def context_parallel(rotation: str, shape: tuple[int, ...]) -> list[list[tuple[str, int, torch.dtype]]]:
    """Collectives of both passes of torch's ring attention on K and V of a shape [b a s/P d] in bf16."""
    from torch.distributed.tensor.experimental._context_parallel import _attention as torch_ring

    torch_ring.set_rotate_method(rotation)
    torch_ring._cp_options.enable_load_balance = True
    ring = dist.group.WORLD
    q, k, v, gradient = (torch.randn(shape, dtype=torch.bfloat16) for _ in range(4))
    with Recorder() as forward:
        out, log_sum_exp = torch_ring._templated_ring_attention(ring, 2, flash, q, k, v, is_causal=True)
    with Recorder() as backward:
        torch_ring._templated_ring_attention_backward(
            ring, 2, flash_backward, gradient, "grad_out", q, k, v, out, log_sum_exp, is_causal=True
        )
    return [forward.calls, backward.calls]


@pytest.mark.parametrize(
    ("rotation", "options"),
    [("allgather", GATHERED), ("alltoall", FP32), ("allgather", f"{GATHERED},ring_messages=concatenated")],
)
def test_torch_context_parallel(quartet: Processes, rotation: str, options: str) -> None:
    """One gather of K and V or three permutes; back, four permutes of their gradients in fp32 beside them."""
    each = case(f"ring=4,{options}", seq_len=128, micro_batch=2)
    expected = [
        [
            (NAMES[s.collective], s.message_bytes, torch.float32 if "gradient" in s.tensor else torch.bfloat16)
            for s in own
            if isinstance(s, Communication)
        ]
        for own in (each.program.forward, each.program.backward)
    ]
    assert [len(own) for own in expected] == [1, 5] if "gather" in rotation else [3, 7]
    for passes in quartet.run(context_parallel, rotation, (2, 4, 128 // 4, 64 // 4)):
        assert passes == expected
