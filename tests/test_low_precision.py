"""Products of 8 and 4 bits and the casts before them: rates against published kernels that nothing was fitted on."""

import numpy as np
import pytest

from spsim.costs.attention import AttentionCost
from spsim.costs.kernels import ComputeCost
from spsim.errors import InputError
from spsim.inputs.profiles import load_profile
from spsim.work import CAST_TYPES, OPERAND_BYTES, FlashAttention, Gemm, MemoryBound

H100, B200 = load_profile("dgx-h100"), load_profile("dgx-b200")


def product_us(profile, dtype, m, n, k):
    operands = OPERAND_BYTES[dtype] * (m * k + k * n)
    return ComputeCost(profile, dtype, burst=True).duration(Gemm(m, n, k, 1, operands + 2 * m * n)) * 1e6


def cast_us(profile, dtype, kernel, moved):
    return ComputeCost(profile, dtype).duration(MemoryBound("cast", moved, kernel=kernel)) * 1e6


DEEPGEMM_ON_H800 = [
    (4096, 2112, 7168, 96), (4096, 24576, 1536, 245), (4096, 32768, 512, 146), (4096, 7168, 16384, 648),
    (4096, 4096, 7168, 169),
]  # fmt: skip
"""m, n, k, us, of scales for 128 (deepseek-ai/DeepGEMM pull request 168); the compute units are those of H100."""
B200_PRODUCTS = [
    ("bf16", 16384, 6144, 4096, 545.1), ("bf16", 1024, 6144, 4096, 36.0), ("bf16", 1024, 4096, 4096, 25.2),
    ("bf16", 512, 4096, 4096, 12.9), ("bf16", 512, 6144, 4096, 19.3), ("bf16", 4096, 4096, 4096, 89.2),
    ("fp8", 4096, 4096, 4096, 53.3), ("fp8", 4096, 4096, 4096, 49.6), ("fp8", 4096, 4096, 4096, 46.5),
    ("fp8", 512, 2048, 2048, 6.55), ("fp8", 512, 2048, 2048, 7.01), ("fp8", 512, 4096, 4096, 9.377),
    ("fp8", 1024, 4096, 4096, 16.5), ("fp8", 1024, 6144, 4096, 23.3), ("fp8", 512, 6144, 4096, 14.6),
    ("fp8", 16384, 6144, 4096, 324.1), ("mxfp8", 1024, 2048, 1024, 5.437), ("mxfp8", 1024, 4096, 4096, 17.1),
    ("mxfp8", 8192, 8192, 4096, 171.8), ("mxfp8", 16384, 16384, 16384, 2837.7), ("nvfp4", 1024, 7168, 4608, 20.1),
    ("nvfp4", 4096, 4096, 7168, 45.1), ("nvfp4", 8192, 8192, 8192, 192.8),
]  # fmt: skip
"""Of cuBLAS, CUTLASS, Helion, ThunderKittens, DeepGEMM: pull requests vllm-project/vllm 19566, flashinfer-ai/flashinfer
2464, deepseek-ai/DeepGEMM 348 and others. Left out are 128 and 256 rows, whose operands were in the cache."""


def test_blockwise_products_of_h100_are_as_fast_as_published():
    errors = [product_us(H100, "fp8_blockwise", m, n, k) / us - 1 for m, n, k, us in DEEPGEMM_ON_H800]
    assert np.mean(np.abs(errors)) < 0.03
    assert max(np.abs(errors)) < 0.06


def test_products_of_b200_that_nothing_was_fitted_on():
    """But the limit of nvfp4, from the last two; 512 rows of bf16, 18 and 26 % long, had operands in the cache."""
    errors = np.array([product_us(B200, dtype, m, n, k) / us - 1 for dtype, m, n, k, us in B200_PRODUCTS])
    assert abs(errors.mean()) < 0.03
    assert np.abs(errors).mean() < 0.10
    assert np.percentile(np.abs(errors), 90) < 0.19


@pytest.mark.parametrize("dtype", CAST_TYPES)
def test_types_with_scales_have_the_peak_of_their_bits(dtype):
    times = 4 if dtype == "nvfp4" else 2
    assert B200.peak(dtype) == times * B200.peak("bf16")


def test_a_device_without_a_type_says_which_it_has():
    """Tensor cores of H100 know no scales for 32 values."""
    with pytest.raises(InputError, match=r"precision 'mxfp8': NVIDIA H100.*fp8_blockwise"):
        ComputeCost(H100, "mxfp8").duration(Gemm(64, 64, 64, 1, 1))


@pytest.mark.parametrize(("kernel", "moved", "measured"), [
    ("quantize", 8192 * 8192 * (3 + 1 / 32), 34.8), ("quantize_columnwise", 8192 * 8192 * (3 + 1 / 32), 39.6),
    ("quantize_both", 8192 * 8192 * (4 + 1 / 16), 52.3),
])  # fmt: skip
def test_casts_take_the_published_time(kernel, moved, measured):
    """Transformer Engine on B200 (ROCm/TransformerEngine pull request 598); the start comes on top."""
    start = B200.coefficients.kernel_overhead_us.value
    assert cast_us(B200, "mxfp8", kernel, moved) - start == pytest.approx(measured, rel=0.01)


def test_beside_casts_kernels_take_the_rates_of_16_bits():
    """Norms and additions of a layer with 8-bit products work on bf16 tensors."""
    for kernel, operator_class in (("rms_norm", "norm"), ("add", "elementwise"), (None, "elementwise")):
        work = MemoryBound(operator_class, 10**9, kernel=kernel, row=4096)
        expected = ComputeCost(H100, "bf16").duration(work)
        assert {ComputeCost(H100, dtype).duration(work) for dtype in CAST_TYPES} == {expected}


def test_a_cast_without_a_rate_takes_that_of_its_class():
    moved = 10**9
    expected = H100.coefficients.kernel_overhead_us.value + moved / (0.79 * 3350e9) * 1e6
    assert cast_us(H100, "fp8", "swizzle_scales", moved) == pytest.approx(expected)


@pytest.mark.parametrize(("dtype", "times"), [("nvfp4", 2240 / 1074), ("mxfp8", 1), ("fp8", 1)])
def test_gradients_of_4_bits_are_rounded_stochastically(dtype, times):
    """Twice as long as to the nearest (pytorch/ao at 36027d8); of 8 bits nothing differs."""
    cost = ComputeCost(B200, dtype)
    start = 4.8e-6 if dtype == "nvfp4" else B200.coefficients.kernel_overhead_us.value * 1e-6
    near, gradient = (
        cost.duration(MemoryBound("cast", 2**32, "quantize_both", backward=backward)) - start
        for backward in (False, True)
    )
    assert gradient / near == pytest.approx(times, rel=0.01)


def test_a_class_that_a_profile_lacks_is_named():
    with pytest.raises(InputError, match=r"dgx-a100-80gb: memory_bound has no cast"):
        cast_us(load_profile("dgx-a100-80gb"), "bf16", None, 1000)


def test_attention_in_8_bits_needs_rates_of_its_own():
    work = FlashAttention("transformer_engine", "forward", 1, 8, 8, 128, 128, 4096, 4096, 4096**2, True, 1)
    with pytest.raises(InputError, match=r"attention in fp8: dgx-h100 has no rates of cudnn in it; run it in bf16"):
        AttentionCost(H100, "fp8", 3e12).time(work)


FUSED = [
    ("norm", "rms_norm", 2, 0.80, 0.87), ("elementwise", "swiglu", 3, 0.75, 0.95),
    ("elementwise", "rope", 2, 0.75, 0.95), ("dropout", "bias_dropout_add", 3, 0.65, 0.95),
]  # fmt: skip


@pytest.mark.parametrize(("operator_class", "kernel", "tensors", "least", "most"), FUSED)
def test_layers_run_fused_kernels_and_torch_by_itself_does_not(operator_class, kernel, tensors, least, most):
    """One kernel moves each tensor once, near the rate of the memory; torch takes several, or one that is slow."""
    work = MemoryBound(operator_class, tensors * 2**30, kernel=kernel, row=8192)
    fused, eager = (ComputeCost(profile, "bf16").duration(work) for profile in (H100, H100.eager))
    assert least < tensors * 2**30 / fused / H100.memory_bandwidth < most
    assert eager > 1.25 * fused
    assert ComputeCost(H100, "bf16").class_of(work) == f"fused_rates.bf16.{kernel}_forward"
    assert ComputeCost(H100.eager, "bf16").class_of(work).split(".")[0] in ("kernel_rates", "row_rates")
