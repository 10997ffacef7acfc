"""What eager modules meet: strided operands, unaligned rows, fp32 beside 16 bits, dropped scores, the power limit."""

import pytest
import torch
from torch import nn
from torch.nn import functional

import spsim
from spsim import trace_module
from spsim.costs.kernels import ComputeCost
from spsim.costs.power import PowerLimit
from spsim.inputs.profiles import load_profile
from spsim.pytorch.modules.costs import kernels
from spsim.work import FlashAttention, Gemm, MemoryBound
from tests.cases import A100, H100


class Module(nn.Module):
    """A function of one tensor and a weight that gives it a gradient."""

    def __init__(self, function, width=64):
        super().__init__()
        self.weight, self.function = nn.Parameter(torch.ones(width)), function

    def forward(self, x):
        return self.function(x, self.weight)


def work_of(function, op, shape=(8, 16, 64), dtype=torch.bfloat16):
    """The kernel of the first call of an operator in the forward pass."""
    traced = trace_module(Module(function).to(dtype), torch.empty(shape, dtype=dtype, requires_grad=True))
    return next(work for call in traced.tape.forward if call.op == op for work in kernels(call))


@pytest.mark.parametrize(
    ("function", "op", "accesses"),
    [
        (lambda x, w: x * x * w.sum(), "mul", 0),  # whole vectors
        (lambda x, w: x * w, "mul", 3 * 8192),  # a broadcast operand: x, w and the result
        (lambda x, w: -x.transpose(0, 1) * w, "neg", 0),  # as dense as its result, in another order
        (lambda x, w: -(x * w)[..., :32], "neg", 2 * 4096),  # half of each row
        (lambda x, w: torch.cat((x[..., 32:], x[..., :32]), -1) * w, "cat", 3 * 8192),
    ],
)
def test_kernels_that_torch_cannot_vectorise_count_their_accesses(function, op, accesses):
    """Elements of the result times its tensors, as torch's elementwise kernels compute an offset for each."""
    assert work_of(function, op).accesses == accesses


def test_single_accesses_take_their_time_and_no_less_than_the_traffic():
    cost = ComputeCost(load_profile(H100), "bf16")
    vectors, single = (
        cost.duration(MemoryBound("elementwise", 6 * 10**8, accesses=number)) for number in (0, 3 * 10**8)
    )
    few = cost.duration(MemoryBound("elementwise", 6 * 10**8, accesses=10))
    assert vectors == few
    assert single - cost.duration(MemoryBound("elementwise", 0)) == pytest.approx(3e8 / 750e9)


def test_fp32_kernels_beside_16_bits_have_their_own_rates():
    work = work_of(lambda x, w: functional.log_softmax((x * w).float(), -1), "_log_softmax")
    assert (work.dtype, work.kernel, work.row) == ("fp32", "softmax", 64)
    profile = load_profile(H100)
    long = MemoryBound("softmax", 8 * 10**9, "softmax", row=128256, dtype="fp32")
    in_fp32 = ComputeCost(profile, "fp32").duration(long)
    assert ComputeCost(profile, "bf16").duration(long) == in_fp32
    assert in_fp32 == pytest.approx(8e9 / 1263e9, rel=0.01)


def test_a_loss_picks_one_element_a_row():
    """Forward reads 50 numbers of 50,000; backward writes zeros, and 50 numbers."""

    class Loss(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(16, 1000)

        def forward(self, x, y):
            return functional.cross_entropy(self.head(x), y)

    traced = trace_module(Loss(), (torch.empty(50, 16), torch.zeros(50, dtype=torch.long)))
    moved = {call.op: sum(w.bytes_moved for w in kernels(call)) for call in traced.tape.calls if "nll" in call.op}
    assert moved["nll_loss_forward"] < 1000
    assert moved["nll_loss_backward"] == 4 * 50 * 1000


def test_activations_with_a_kernel_of_their_own_are_one_kernel():
    traced = trace_module(Module(lambda x, w: functional.silu(x * w)), torch.empty(4, 64, requires_grad=True))
    assert [call.op for call in traced.tape.backward if "silu" in call.op or call.op == "sigmoid"] == ["silu_backward"]


@pytest.mark.parametrize(("width", "unaligned"), [(1000, 0), (1001, 1), (1004, 1)])
def test_products_whose_rows_begin_at_no_16_bytes(width, unaligned):
    """bf16: 8 elements are 16 bytes, so rows of the result of 1000 begin well, of 1004 they do not."""
    traced = trace_module(nn.Linear(64, width, bias=False).bfloat16(), torch.empty(32, 64, dtype=torch.bfloat16))
    (product,) = (work for call in traced.tape.forward for work in kernels(call))
    assert product.unaligned == unaligned
    cost = ComputeCost(load_profile(H100), "bf16")
    sizes = (8192, 50257, 1600, 1, 2 * (8192 * 1600 + 50257 * 1600 + 8192 * 50257))
    slow = cost.duration(Gemm(*sizes, unaligned=1))
    assert cost.duration(Gemm(*sizes)) < slow / 4


def test_dropped_scores_draw_random_numbers():
    """30 instructions for each of 25 x 8 x 1024 x 1024 / 2 pairs, at half of 66.9 TFLOP/s."""
    cost = ComputeCost(load_profile(H100), "bf16")
    kept, dropped = (
        cost.duration(FlashAttention("cudnn", "forward", 8, 25, 25, 64, 64, 1024, 1024, 1024**2, True, 0, dropout))
        for dropout in (0, 1)
    )
    assert dropped - kept == pytest.approx(30 * 8 * 25 * 1024**2 / 2 / 33.45e12, rel=1e-6)


def test_the_power_limit_by_hand():
    """Nothing up to half of the time; all of it, burst over sustained, for products alone; a straight line between."""
    limit = PowerLimit(load_profile(H100), "bf16")
    alone = 0.7945 / 0.689
    assert [limit.factor(share, 1.0) for share in (0.2, 0.5, 0.75, 1.0)] == pytest.approx(
        [1, 1, (1 + alone) / 2, alone], rel=1e-6
    )
    assert PowerLimit(load_profile(A100), "bf16").slowdown == 0
    limit.share = 1.0
    assert [limit.factor(share, 1.0) for share in (0.5, 1.0)] == [1, 1], "a share of one is never passed"


def test_layers_are_slowed_as_their_kernels_say():
    """Products and attention of llama-3-8b take the burst's time times the factor of their share."""
    scenario = spsim.Scenario(
        hardware=H100, model="llama-3-8b", plan=spsim.Plan(), workload=spsim.Workload(seq_len=8192), scope="layers"
    )
    result = spsim.simulate(scenario)
    burst = ComputeCost(scenario.hardware, "bf16", burst=True)
    times = {True: 0.0, False: 0.0}
    for step in result.program.instructions:
        (work,) = step.work
        times[isinstance(work, MemoryBound)] += burst.duration(work)
    factor = PowerLimit(scenario.hardware, "bf16").factor(times[False], sum(times.values()))
    assert factor > 1.05
    found = result.step_time_s / scenario.model.layers
    assert found == pytest.approx(times[False] * factor + times[True], rel=1e-6)
