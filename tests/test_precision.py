"""fp32 against bf16: twice the bytes of every activation, message and weight, and nothing else."""

import pytest

from spsim import Model, Scenario, load_profile, simulate
from spsim.units import GIB

MODEL = Model(layers=2, hidden=512, heads=8, vocab=1000, attention="unfused", dropout=0.1)
PLANS = ("tp=2", "tp=2,sequence_parallel", "ulysses=2", "ring=2,ring_kind=all_gather", "ring=2,zero=1")


def result(plan, precision):
    model = MODEL if "zero" not in plan else MODEL.model_copy(update={"attention": "flash"})
    workload = {"seq_len": 256, "micro_batch": 2, "precision": precision}
    return simulate(Scenario(hardware="cpu-2", model=model, plan=plan, workload=workload, scope="layers"))


def saved(found, *categories):
    kept = zip(found.numbers.template.program.saved, found.numbers.saved, strict=True)
    return sum(size for tensor, size in kept if tensor.category in categories)


@pytest.mark.parametrize("plan", PLANS)
def test_bytes_of_fp32(plan):
    """Activations double; masks stay bytes and statistics fp32, as torch keeps them."""
    half, full = result(plan, "bf16"), result(plan, "fp32")
    assert saved(full, "activation") == 2 * saved(half, "activation")
    for category in ("mask", "norm statistics", "log-sum-exp"):
        assert saved(full, category) == saved(half, category)
    for mine, theirs in zip(full.trace.tasks, half.trace.tasks, strict=True):
        kept_in_fp32 = mine.part == "weight_sync" and mine.name == "weight gradients"
        assert mine.message_bytes == (1 if kept_in_fp32 else 2) * theirs.message_bytes


def test_static_memory_of_fp32():
    """Korthikanti et al.: 18 bytes a parameter in mixed precision. In fp32 weight, gradient and two moments: 16."""
    parameters = MODEL.layers * MODEL.layer_parameters
    assert result("", "bf16").static.total == 18 * parameters
    assert result("", "fp32").static.total == 16 * parameters
    assert result("", "fp32").memory_curve["weights_gib"].iloc[0] == 4 * parameters / GIB


def test_rates_are_of_the_precision():
    """MFU is relative to the peak of fp32, half of bf16's on this profile, and products take that long."""
    profile = load_profile("cpu-2")
    half, full = result("", "bf16"), result("", "fp32")
    assert profile.peak("bf16") == 2 * profile.peak("fp32")
    assert full.layer_forward_s > half.layer_forward_s
    assert full.mfu == pytest.approx(full.tflops_per_gpu * 1e12 / profile.peak("fp32"))
