"""A user's module, traced: against torch itself, against closed forms, and against spsim's own layer."""

import math
import resource
import subprocess
import sys
from collections import Counter

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import spsim
from spsim import InputError, Model, Workload, trace_module
from spsim.costs.kernels import ComputeCost
from spsim.inputs.plan import parse_plan
from spsim.program.assembly import layer_program
from spsim.program.instructions import Communication, Compute
from spsim.program.operators import Operand, Operator, Tensor
from spsim.results.held import held_at
from spsim.work import FlashAttention, Gemm, MemoryBound
from tests.cases import H100

pytestmark = pytest.mark.slow

few = settings(max_examples=5, deadline=None, derandomize=True)


class Llama(nn.Module):
    """RMSNorm, grouped heads, SwiGLU, no biases; rotation by halves and norms of q and k if wanted."""

    def __init__(self, hidden, heads, kv_heads, width, rope=False, qk_norm=False):
        super().__init__()
        self.size, self.rope = hidden // heads, rope
        self.norm1, self.norm2 = nn.RMSNorm(hidden), nn.RMSNorm(hidden)
        self.q_norm, self.k_norm = (nn.RMSNorm(self.size) if qk_norm else nn.Identity() for _ in range(2))
        self.q, self.o = nn.Linear(hidden, hidden, bias=False), nn.Linear(hidden, hidden, bias=False)
        self.k, self.v = (nn.Linear(hidden, kv_heads * self.size, bias=False) for _ in range(2))
        self.gate, self.up = (nn.Linear(hidden, width, bias=False) for _ in range(2))
        self.down = nn.Linear(width, hidden, bias=False)

    def rotate(self, x):
        angles = torch.arange(x.shape[2], device=x.device)[:, None] * torch.ones(self.size, device=x.device)
        one, other = x.chunk(2, -1)
        return x * angles.cos().to(x.dtype) + torch.cat((-other, one), -1) * angles.sin().to(x.dtype)

    def forward(self, x):
        b, s, h = x.shape
        y = self.norm1(x)
        q, k, v = (f(y).view(b, s, -1, self.size).transpose(1, 2) for f in (self.q, self.k, self.v))
        q, k = self.q_norm(q), self.k_norm(k)
        if self.rope:
            q, k = self.rotate(q), self.rotate(k)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.o(y.transpose(1, 2).reshape(b, s, h))
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class GPT(nn.Module):
    """LayerNorm, one product for q, k and v, dropout where Megatron has it, GeLU; flash or all scores in memory;
    attention and MLP in a row or side by side.
    """

    def __init__(self, hidden, heads, dropout, kv_heads=None, flash=True, parallel=False):
        super().__init__()
        self.heads, self.kv_heads, self.size = heads, kv_heads or heads, hidden // heads
        self.p, self.flash, self.parallel = dropout, flash, parallel
        self.norm1, self.norm2 = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.qkv = nn.Linear(hidden, (heads + 2 * self.kv_heads) * self.size)
        self.o, self.fc1, self.fc2 = (
            nn.Linear(hidden, hidden),
            nn.Linear(hidden, 4 * hidden),
            nn.Linear(4 * hidden, hidden),
        )

    def attend(self, q, k, v):
        if self.flash:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.kv_heads != self.heads)
        scores = q @ k.transpose(-1, -2) / math.sqrt(self.size)
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        return F.dropout(scores.masked_fill(mask, float("-inf")).softmax(-1), self.p) @ v

    def forward(self, x):
        b, s, h = x.shape
        parts = self.qkv(self.norm1(x)).split([n * self.size for n in (self.heads, self.kv_heads, self.kv_heads)], -1)
        q, k, v = (part.view(b, s, -1, self.size).transpose(1, 2) for part in parts)
        y = self.attend(q, k, v).transpose(1, 2).reshape(b, s, h)
        attended = x + F.dropout(self.o(y), self.p)
        y = self.norm2(x if self.parallel else attended)
        return attended + F.dropout(self.fc2(F.gelu(self.fc1(y))), self.p)


class Turned(Llama):
    """A rotation of a part of the head; what is left is passed on."""

    def __init__(self, *sizes, turned, passed=lambda x: x):
        super().__init__(*sizes, rope=True)
        self.turned, self.passed = turned, passed

    def rotate(self, x):
        return torch.cat([x[..., : self.turned] * 2.0, self.passed(x[..., self.turned :])], -1)


class Network(nn.Module):
    """Token ids, layers, and a head."""

    def __init__(self):
        super().__init__()
        self.model = nn.ModuleDict(
            {"embedding": nn.Embedding(30, 16), "layers": nn.ModuleList([Llama(16, 2, 2, 32) for _ in range(2)])}
        )
        self.head = nn.Linear(16, 30)

    def forward(self, tokens):
        x = self.model["embedding"](tokens)
        for layer in self.model["layers"]:
            x = layer(x)
        return self.head(x)


class Shared(nn.Module):
    """A tied weight, a parameter used twice, operators in place, a buffer and a loss."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(30, 16), nn.Linear(16, 30, bias=False)
        self.head.weight = self.embedding.weight
        self.fc = nn.Linear(16, 16)
        self.register_buffer("scale", torch.ones(16))

    def forward(self, tokens):
        x = self.embedding(tokens) * self.scale
        x = x + F.relu(self.fc(self.fc(x)), inplace=True)
        return F.cross_entropy(self.head(x).flatten(0, 1), tokens.flatten())


def convolutions():
    """Plain, grouped, strided, transposed; batch norm, pooling, a linear."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 3, stride=2, bias=False),
        nn.MaxPool2d(2), nn.ConvTranspose2d(12, 4, 2), nn.Flatten(), nn.Linear(4 * 2 * 2, 10),
    )  # fmt: skip


def encoder(**options):
    """torch's own layer of 32 hidden, 4 heads."""
    return nn.TransformerEncoderLayer(32, 4, 64, **options)


def inputs(*shape, dtype=torch.float32, device="cpu"):
    """An input inside a network: it needs a gradient."""
    return torch.randn(*shape, dtype=dtype, device=device).requires_grad_()


MODULES = {
    "mlp": (lambda: nn.Sequential(nn.Linear(16, 40), nn.GELU(), nn.Linear(40, 16)), lambda: inputs(3, 5, 16)),
    "input without gradient": (lambda: nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 4)), lambda: torch.ones(7, 16)),
    "convolutions": (convolutions, lambda: inputs(2, 3, 8, 8)),
    "shared": (Shared, lambda: torch.randint(30, (2, 6))),
    "encoder": (encoder, lambda: inputs(6, 2, 32)),
    "encoder, pre-norm": (lambda: encoder(norm_first=True, batch_first=True, dropout=0.0), lambda: inputs(2, 6, 32)),
    "attention weights": (lambda: nn.MultiheadAttention(16, 2), lambda: (inputs(5, 1, 16), *[inputs(4, 1, 16)] * 2)),
    "llama": (lambda: Llama(32, 4, 2, 48, rope=True), lambda: inputs(2, 6, 32)),
    "gpt": (lambda: GPT(32, 4, 0.1, flash=False), lambda: inputs(2, 6, 32)),
}  # fmt: skip


def reduced(found):
    """A number to differentiate, of all outputs."""
    leaves = [leaf for leaf in torch.utils._pytree.tree_flatten(found)[0] if leaf.requires_grad]
    return sum(leaf.sum() for leaf in leaves)


def counted(module, given):
    """FLOPs that torch counts on real tensors: forward, and forward with backward."""
    args = given if isinstance(given, tuple) else (given,)
    with FlopCounterMode(display=False) as forward:
        found = module(*args)
    with FlopCounterMode(display=False) as backward:
        reduced(found).backward()
    return forward.get_total_flops(), backward.get_total_flops()


# ------------------------------------------------------------ torch itself


@pytest.mark.parametrize("name", MODULES)
def test_flops_are_those_of_torchs_counter(name):
    """Forward and backward, exactly, on the kernels of the same device; real tensors of the same shapes."""
    make, example = MODULES[name]
    torch.manual_seed(0)
    module, given = make(), example()
    assert trace_module(module, given, device="cpu").flops == counted(module, given)


@few
@given(st.integers(1, 3), st.integers(1, 9), st.integers(1, 3), st.integers(1, 4), st.integers(1, 40))
def test_flops_of_random_shapes(b, s, heads, size, width):
    """Products and a softmax, as every device computes them: the kernels of CUDA have the same FLOPs."""
    module, given = Llama(2 * heads * 2 * size, 2 * heads, heads, width), inputs(b, s, 4 * heads * size)
    with sdpa_kernel(SDPBackend.MATH):
        assert trace_module(module, given).flops == counted(module, given)


@pytest.mark.parametrize("name", MODULES)
def test_saved_bytes_are_those_that_torch_keeps(name):
    """Distinct storages that real tensors pack, parameters and buffers excluded."""
    make, example = MODULES[name]
    torch.manual_seed(0)
    module, given = make(), example()
    own = {p.untyped_storage().data_ptr() for p in (*module.parameters(), *module.buffers())}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        module(*(given if isinstance(given, tuple) else (given,)))
    traced = trace_module(module, given, device="cpu")
    assert traced.saved_bytes == sum(storage.nbytes() for storage in kept.values())
    assert traced.operators["saved_bytes"].sum() == traced.saved_bytes
    assert traced.parameters == sum(p.numel() for p in module.parameters())


def test_the_module_is_left_as_it_was():
    """Neither parameters nor buffers, gradients, hooks, nor the operators of torch change."""
    module, given = nn.Sequential(nn.BatchNorm1d(8), nn.Dropout(0.5), Llama(8, 2, 1, 12)), inputs(2, 8, 8)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    for device in ("cuda", "cpu"):
        trace_module(module, given, device=device)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert all(p.grad is None for p in module.parameters())
    assert given.grad is None
    module(given).sum().backward()
    assert torch.isfinite(given.grad).all()


def test_a_layer_of_175b_takes_no_memory():
    """1.8 billion parameters in fp32 are 7.2 GB, and there are as many gradients."""
    with torch.device("meta"):
        module, given = GPT(12288, 96, 0.1), inputs(1, 2048, 12288, device="meta")
    traced_before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    traced = trace_module(module, given)
    assert traced.parameters == 1_812_099_072
    assert traced.flops.forward == 24 * 2048 * 12288**2 + 4 * 2048**2 * 12288
    traced.simulate(H100, "tp=8,sequence_parallel")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - traced_before < 300_000  # KiB


# ------------------------------------------------------------ the kernels of a GPU


@few
@given(st.integers(1, 3), st.integers(2, 40), st.sampled_from([(4, 4), (4, 2), (4, 1)]), st.booleans())
def test_attention_is_one_kernel(b, s, heads, half):
    """Flash in bf16, the memory-efficient kernel in fp32: 4 s^2 a d b FLOPs forward, 10 backward; half of them
    for the time of a causal one.
    """
    a, kv = heads if half else (heads[0], heads[0])
    dtype = torch.bfloat16 if half else torch.float32
    q, k, v = (inputs(b, n, s, 16, dtype=dtype) for n in (a, kv, kv))

    class Attention(nn.Module):
        def forward(self, q, k, v):
            return F.scaled_dot_product_attention(q, k, v, dropout_p=0.1, is_causal=True, enable_gqa=a != kv)

    traced = trace_module(Attention(), (q, k, v))
    assert traced.flops == (4 * s * s * a * 16 * b, 10 * s * s * a * 16 * b)
    assert list(traced.operators["operator_class"]) == ["attention", "attention"]
    works = [step.work[0] for step in traced.program("").instructions]
    assert [type(work) for work in works] == [FlashAttention, FlashAttention]
    assert [2 * work.flops for work in works] == list(traced.flops)


def test_dropout_and_norms_are_fused():
    """One kernel each way; a mask of a byte an element, statistics in fp32."""
    module = nn.Sequential(nn.Dropout(0.1), nn.LayerNorm(8), nn.RMSNorm(8)).bfloat16()
    traced = trace_module(module, inputs(5, 8, dtype=torch.bfloat16))
    assert list(traced.operators["operator"]) == [
        "native_dropout", "native_layer_norm", "rms_norm", "rms_norm_backward", "native_layer_norm_backward",
        "native_dropout_backward",
    ]  # fmt: skip
    assert list(traced.operators["saved_bytes"]) == [40, 80 + 2 * 4 * 5, 80 + 4 * 5, 0, 0, 0]


def test_group_norm_keeps_statistics_of_its_own_dtype():
    """On CUDA as on a CPU: one operator of torch allocates them for both."""
    x, groups = torch.randn(3, 4, 5).bfloat16(), 2
    _, mean, rstd = torch.native_group_norm(x, None, None, 3, 4, 5, groups, 1e-5)
    traced = trace_module(nn.GroupNorm(groups, 4).bfloat16(), inputs(3, 4, 5, dtype=torch.bfloat16))
    assert list(traced.operators["saved_bytes"]) == [x.nbytes + mean.nbytes + rstd.nbytes, 0]


def test_bytes_moved_of_a_linear():
    """Input, weight, bias and output once, fp32: and the bias gradient reads the gradient again."""
    traced = trace_module(nn.Linear(6, 10), inputs(4, 6))
    rows = traced.operators.set_index(["part", "operator"])["bytes_moved"]
    assert rows["forward", "addmm"] == 4 * (4 * 6 + 6 * 10 + 10 + 4 * 10)
    assert list(rows["backward", "mm"]) == [4 * (4 * 10 + 10 * 6 + 4 * 6)] * 2
    assert rows["backward", "sum"] == 4 * (4 * 10 + 10)


def test_bytes_moved_in_place():
    """Read and written, or written only where it is overwritten; a lookup reads rows, not the table."""

    class InPlace(nn.Embedding):
        def forward(self, tokens):
            x = super().forward(tokens)
            y = torch.zeros_like(x)
            y.copy_(x)
            return y.relu_()

    rows = trace_module(InPlace(1000, 8), torch.arange(5)).operators.query("part == 'forward'")
    assert list(rows["operator"]) == ["embedding", "zeros_like", "copy_", "relu_"]
    row = 4 * 5 * 8
    assert list(rows["bytes_moved"]) == [8 * 5 + 2 * row, row, 2 * row, 2 * row]


def test_an_expanded_tensor_is_read_once_and_a_view_is_free():
    class Expand(nn.Module):
        def forward(self, x):
            return x.view(3, 1).expand(3, 100).exp()

    rows = trace_module(Expand(), inputs(3)).operators
    assert list(rows["operator"]) == ["exp", "mul", "sum"]
    assert rows["bytes_moved"][0] == 4 * (3 + 300)


@pytest.mark.parametrize("name", [n for n in MODULES if n != "convolutions"])
def test_kernels_have_the_flops_of_their_operators(name):
    """Each product by its m, n and k."""
    make, example = MODULES[name]
    traced = trace_module(make(), example())
    products = sum(step.work[0].flops for step in traced.program("").instructions if isinstance(step.work[0], Gemm))
    assert products == traced.operators.query("operator_class == 'gemm'")["flops"].sum()


def memory_bound_kernels(steps):
    works = [work for step in steps if isinstance(step, Compute) for work in step.work]
    return [(work.kernel, work.backward) for work in works if isinstance(work, MemoryBound)]


@pytest.mark.parametrize(
    ("module", "kernel"),
    [
        (nn.LayerNorm(8), "layer_norm"), (nn.RMSNorm(8), "rms_norm"), (nn.Softmax(-1), "softmax"),
        (nn.Dropout(0.1), "dropout"), (nn.GELU(), "gelu"),
    ],
)  # fmt: skip
def test_fused_operators_are_the_kernels_that_a_calibration_measures(module, kernel):
    """One forward, and its gradient backward: the names that torch gives both are found."""
    program = trace_module(module, inputs(5, 8)).program("")
    assert memory_bound_kernels(program.forward) == [(kernel, False)]
    assert memory_bound_kernels(program.backward) == [(kernel, True)]


def test_copies_and_lookups_are_the_kernels_that_a_calibration_measures():
    class Copies(nn.Embedding):
        def forward(self, x):
            y = (super().forward(torch.arange(len(x))) + x).clone()
            return torch.empty_like(y).copy_(y)

    program = trace_module(Copies(1000, 8), inputs(5, 8)).program("")
    kernels = [kernel for kernel, _ in memory_bound_kernels(program.forward) if kernel]
    assert kernels == ["embedding", "add", "copy", "copy"]


def test_the_sum_over_all_rows_is_the_gradient_of_a_bias_and_no_other_sum_is():
    class Sums(nn.Linear):
        def forward(self, x):
            return super().forward(x).sum(-1, keepdim=True).sum()

    program = trace_module(Sums(8, 16), inputs(5, 8)).program("")
    assert [kernel for kernel, _ in memory_bound_kernels(program.backward)].count("bias_gradient") == 1
    assert not [kernel for kernel, _ in memory_bound_kernels(program.forward) if kernel]


def test_kernels_keep_their_rates_when_a_module_is_split():
    """A norm, two products with a bias each, and what is between them; the sums of bias gradients are kernels too."""
    traced = half(lambda: nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16)), 2, 8, 16)
    program = traced.program("tp=4")
    forward, backward = (
        [one for one in memory_bound_kernels(steps) if one[0]] for steps in (program.forward, program.backward)
    )
    assert forward == [("layer_norm", False), ("gelu", False)]
    assert backward == [("bias_gradient", False), ("gelu", True), ("bias_gradient", False), ("layer_norm", True)]


# ------------------------------------------------------------ one GPU


def test_time_on_one_gpu_is_the_sum_of_the_kernels():
    traced = trace_module(GPT(256, 4, 0.1).bfloat16(), inputs(2, 128, 256, dtype=torch.bfloat16))
    result = traced.simulate(H100)
    cost = ComputeCost(spsim.load_profile(H100), "bf16")
    for steps, found in ((result.program.forward, result.forward_s), (result.program.backward, result.backward_s)):
        assert found == pytest.approx(sum(cost.duration(step.work[0]) for step in steps), rel=1e-6)


@pytest.mark.parametrize("name", ["mlp", "convolutions", "encoder", "llama", "gpt"])
def test_memory_after_the_forward_pass_is_what_is_saved(name):
    """Nothing else lives on: the output is nobody's."""
    make, example = MODULES[name]
    traced = trace_module(make(), example())
    result = traced.simulate(H100)
    last = len(result.program.forward) - 1
    assert sum(change.bytes for change in result.trace.memory if change.task <= last) == traced.saved_bytes
    left = [change for change in result.trace.memory if change.category == "gradients"]
    assert sum(change.bytes for change in result.trace.memory) == sum(change.bytes for change in left)
    assert sum(change.bytes for change in left) == traced.tape.gradient_bytes


def test_peak_memory_of_a_chain():
    """Two linears of 1000 x 1000 on 10 rows, fp32: fullest when both gradients of 4 MB are there, beside the input of
    the module, its gradient, and that of the output of the first.
    """
    module = nn.Sequential(nn.Linear(1000, 1000, bias=False), nn.Linear(1000, 1000, bias=False))
    traced = trace_module(module, inputs(10, 1000))
    row, weight = 4 * 10 * 1000, 4 * 1000 * 1000
    made = traced.simulate(H100, optimizer="none")
    assert made.static.total == 2 * weight
    assert made.peak.bytes == 2 * weight + 2 * weight + 3 * row
    held = held_at(made.peak, made.trace, made.static.by_category())
    assert held == {"weights": 2 * weight, "gradients": 2 * weight, "activations": row, "temporary": 2 * row}
    assert made.memory_curve["gradients_gib"].iloc[-1] * 2**30 == 2 * weight


def test_kept_gradients_are_there_all_along_and_added_to():
    """The first gradient of 4 MB stands beside those that are there, with the input, the output of the first linear
    and the gradient of that of the second; an addition reads two and writes one.
    """
    module = nn.Sequential(nn.Linear(1000, 1000, bias=False), nn.Linear(1000, 1000, bias=False))
    traced = trace_module(module, inputs(10, 1000))
    row, weight = 4 * 10 * 1000, 4 * 1000 * 1000
    kept, made = (traced.simulate(H100, gradients=name, optimizer="none") for name in ("kept", "set_to_none"))
    assert kept.static.total == 2 * 2 * weight
    assert kept.peak.bytes == 2 * 2 * weight + weight + 3 * row
    cost = ComputeCost(spsim.load_profile(H100), "fp32")
    addition = cost.duration(MemoryBound("elementwise", 3 * weight, "add"))
    assert kept.step_time_s - made.step_time_s == pytest.approx(2 * addition, rel=1e-6)


class WithLoss(nn.Module):
    """Logits and, as transformers' heads for language models have it, their loss in fp32."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(16, 1000, bias=False)

    def forward(self, x, labels):
        logits = self.head(x)
        return nn.functional.cross_entropy(logits.float(), labels), logits


def test_a_loss_is_what_the_backward_pass_begins_from():
    """Logits have no gradient from outside, and nobody keeps them: fullest when the softmax, the gradient of its
    logarithm and that of its input are there, 50 x 1000 in fp32 each; the weight in bf16 has no gradient yet.
    """
    traced = trace_module(WithLoss().bfloat16(), (inputs(50, 16, dtype=torch.bfloat16), torch.zeros(50).long()))
    assert [value.shape for value in traced.tape.output_gradients] == [()]
    found = traced.simulate(H100, optimizer="none")
    assert found.peak_operator.startswith("_log_softmax_backward_data")
    assert found.peak.bytes == 2 * 16_000 + 3 * 4 * 50_000 + 2 * 50 * 16 + 8 * 50


class Checkpointed(nn.Sequential):
    """Keeps its input only, and runs again in the backward pass, up to the last tensor that is wanted there."""

    def forward(self, x):
        return checkpoint(super().forward, x, use_reentrant=False)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_checkpointed_modules_run_again_on_fake_parameters(device):
    with torch.device(device):
        parts = [Checkpointed(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16)) for _ in range(3)]
        plain = nn.Sequential(*(nn.Sequential(*part) for part in parts))
        again = trace_module(nn.Sequential(*parts), inputs(5, 16, device=device))
    once = trace_module(plain, inputs(5, 16, device=device))
    assert again.saved_bytes == 3 * 4 * 5 * 16
    assert again.flops.forward == once.flops.forward
    assert again.flops.backward == once.flops.backward + 3 * 2 * 5 * 16 * 64
    storages = {value.storage for call in again.tape.calls for value in call.tensors}
    assert len(storages & again.tape.parameters.keys()) == 12


@pytest.mark.parametrize("plan", ["tp=4", "tp=2,sequence_parallel,recompute=full", "ulysses=4", "ring=4"])
def test_gradients_of_a_split_module_are_those_of_its_weights(plan):
    traced = trace_module(GPT(256, 4, 0.0).bfloat16(), inputs(2, 128, 256, dtype=torch.bfloat16))
    made, kept = (traced.simulate(H100, plan, gradients=name) for name in ("set_to_none", "kept"))
    left = [change.bytes for change in made.trace.memory if change.category == "gradients" and change.rank == 0]
    assert sum(left) == made.static.weights == kept.static.gradients
    assert made.static.gradients == 0
    assert made.peak.bytes <= kept.peak.bytes


def test_unknown_gradients_are_refused():
    with pytest.raises(InputError, match="gradients: 'none' is not known; use one of set_to_none, kept"):
        mlp(True).simulate(H100, gradients="none")


def test_the_result_draws_and_exports(tmp_path):
    result = trace_module(encoder(), inputs(6, 2, 32)).simulate(H100)
    for draw, file in (
        (result.plot_timeline, "t.png"),
        (result.plot_memory, "m.png"),
        (result.to_chrome_trace, "t.json"),
    ):
        draw(tmp_path / file)
        assert (tmp_path / file).stat().st_size > 1000
    assert result.to_json()["model"] == "TransformerEncoderLayer"
    assert result.mfu == pytest.approx(result.tflops_per_gpu * 1e12 / spsim.load_profile(H100).peak("fp32"))


# ------------------------------------------------------------ many GPUs


PLANS = [
    "recompute=full", "tp=2", "tp=4", "tp=4,sequence_parallel", "tp=4,sequence_parallel,keep_gathered",
    "tp=2,sequence_parallel,recompute=selective", "tp=4,recompute=full", "ulysses=4", "ring=2,ring_kind=all_gather",
    "tp=2,sequence_parallel,ulysses=2",
]  # fmt: skip
CATEGORIES = ("activation", "mask", "norm statistics", "log-sum-exp")


def moved(steps):
    """Collectives of a pass: what, where, how much, what for."""
    found = (step for step in steps if isinstance(step, Communication))
    return Counter((c.axis, c.collective, c.message_bytes, c.sent_bytes, c.purpose) for c in found)


def flops_of(program):
    return sum(w.flops for step in program.instructions if isinstance(step, Compute) for w in step.work if w)


def reduced_weights(program):
    """Elements of the weight gradients that are summed, by group."""
    total = Counter()
    for sync in program.weight_sync:
        total[sync.axes, sync.ranks] += sync.elements
    return total


def agree(traced, model, workload, plan, extra_bytes=0):
    """The derived program is that of the layer written by hand, but for bytes that torch keeps in addition."""
    mine, own = traced.program(plan), layer_program(model, parse_plan(plan), workload)
    assert moved(mine.forward) == moved(own.forward)
    assert moved(mine.backward) == moved(own.backward)
    assert flops_of(mine) == flops_of(own)
    assert mine.parameters == own.parameters
    assert reduced_weights(mine) == reduced_weights(own)
    if "full" not in plan:
        shards = parse_plan(plan).gpus
        assert mine.saved_bytes(*CATEGORIES) == own.saved_bytes(*CATEGORIES) + extra_bytes // shards
    else:
        assert mine.saved_bytes(*CATEGORIES) == own.saved_bytes(*CATEGORIES)


def half(make, *shape):
    """A module and an input of some shape on no device, bf16."""
    with torch.device("meta"):
        return trace_module(make().bfloat16(), inputs(*shape, dtype=torch.bfloat16, device="meta"))


def test_what_one_gpu_keeps_is_spsims_own_layer():
    """By category; in addition flash attention keeps the state of its random numbers, 24 bytes."""
    traced = half(lambda: GPT(128, 8, 0.1), 3, 64, 128)
    model = Model(layers=1, hidden=128, heads=8, vocab=8, dropout=0.1, positions="none")
    mine, own = traced.program(""), layer_program(model, parse_plan(""), Workload(seq_len=64, micro_batch=3))
    for category in CATEGORIES:
        assert mine.saved_bytes(category) == own.saved_bytes(category), category
    assert traced.saved_bytes == own.saved_bytes(*CATEGORIES) + 24


@pytest.mark.parametrize("kv_heads", [8, 4])
@pytest.mark.parametrize("flash", [True, False], ids=["flash", "unfused"])
def test_a_gpt_block_is_spsims_own_layer(flash, kv_heads):
    """Collectives, bytes, FLOPs, parameters and what is kept, under every plan; heads in unequal parts of one
    product. Grouped heads in memory are repeated by nobody here, so that unfused attention has them all.
    """
    if not flash and kv_heads < 8:
        pytest.skip("torch repeats grouped keys in memory, spsim's layer does not")
    s, b, h = 64, 3, 128
    traced = half(lambda: GPT(h, 8, 0.1, kv_heads, flash), b, s, h)
    kind = "flash" if flash else "unfused"
    model = Model(
        layers=1, hidden=h, heads=8, kv_heads=kv_heads, vocab=8, dropout=0.1, attention=kind, positions="none"
    )
    for plan in (*PLANS, "ring=2", "tp=2,sequence_parallel,ulysses=2,ring=2"):
        if flash or "ring=2" not in plan or "all_gather" in plan:
            agree(traced, model, Workload(seq_len=s, micro_batch=b), plan)


def test_tables_and_masks_may_be_inputs():
    """Only the input that needs a gradient is split; the others are constants, sharded where they are read."""

    class Given(GPT):
        def forward(self, x, scale, mask):
            self.mask = mask
            return super().forward(x * scale)

        def attend(self, q, k, v):
            return ((q @ k.transpose(-1, -2) + self.mask) / math.sqrt(self.size)).softmax(-1) @ v

    with torch.device("meta"):
        module, x = Given(64, 4, 0.0).bfloat16(), inputs(2, 16, 64, dtype=torch.bfloat16, device="meta")
        tables = {"scale": torch.empty(16, 1, dtype=torch.bfloat16), "mask": torch.empty(16, 16, dtype=torch.bfloat16)}
        traced = trace_module(module, {"x": x, **tables})
    model = Model(layers=1, hidden=64, heads=4, vocab=8, attention="unfused", positions="none")
    for plan in ("tp=4", "tp=4,sequence_parallel", "ulysses=4"):
        mine, own = traced.program(plan), layer_program(model, parse_plan(plan), Workload(seq_len=16, micro_batch=2))
        assert (moved(mine.forward), moved(mine.backward)) == (moved(own.forward), moved(own.backward))
    named = {op.name: op for op in traced.named_operators}
    assert [o.tensor.kind for o in named["mul"].inputs] == ["activation", "constant"]
    assert named["add"].inputs[1].subscript == ("s", "j")


def test_attention_and_mlp_side_by_side():
    """The output of attention is no input of the MLP: GPT-NeoX."""
    traced = half(lambda: GPT(128, 8, 0.1, parallel=True), 2, 64, 128)
    model = Model(layers=1, hidden=128, heads=8, vocab=8, dropout=0.1, positions="none", parallel_residual=True)
    for plan in PLANS:
        agree(traced, model, Workload(seq_len=64, micro_batch=2), plan)


@pytest.mark.parametrize("rope", [False, True])
@pytest.mark.parametrize("kv_heads", [8, 4])
def test_a_llama_block_is_spsims_own_layer(kv_heads, rope):
    """torch's SwiGLU keeps SiLU(gate) too: 2 bytes a position and width. Rotated by halves, with norms of q and k, or
    neither.
    """
    s, b, h, f = 32, 2, 128, 160
    traced = half(lambda: Llama(h, 8, kv_heads, f, rope, qk_norm=rope), b, s, h)
    model = Model(
        layers=1, hidden=h, heads=8, kv_heads=kv_heads, ffn_hidden=f, vocab=8, gated_mlp=True,
        positions="rope" if rope else "none", qk_norm=rope,
    )  # fmt: skip
    for plan in PLANS:
        agree(traced, model, Workload(seq_len=s, micro_batch=b), plan, extra_bytes=2 * s * b * f)


@pytest.mark.parametrize(
    "plan", ["tp=4,few_kv_heads=replicate", "tp=8,few_kv_heads=replicate", "ulysses=4", "tp=2,ulysses=2"]
)
def test_fewer_heads_of_keys_than_ranks_are_replicated(plan):
    """One head a rank, twice or more; their weight gradients are summed over the copies."""
    traced = half(lambda: Llama(128, 8, 2, 160), 2, 32, 128)
    model = Model(layers=1, hidden=128, heads=8, kv_heads=2, ffn_hidden=160, vocab=8, gated_mlp=True, positions="none")
    agree(traced, model, Workload(seq_len=32, micro_batch=2), plan, extra_bytes=2 * 32 * 2 * 160)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("norm_first", [False, True])
def test_torchs_own_layer_is_spsims_own_layer(norm_first, batch_first):
    """It has one dropout more, inside the MLP, whose mask it keeps. After the residual, norms change no collective."""
    s, b, h = 64, 2, 128
    options = {"norm_first": norm_first, "batch_first": batch_first, "activation": "gelu"}
    traced = half(
        lambda: nn.TransformerEncoderLayer(h, 8, 4 * h, **options), *((b, s, h) if batch_first else (s, b, h))
    )
    model = Model(layers=1, hidden=h, heads=8, vocab=8, dropout=0.1, positions="none", causal=False)
    for plan in (plan for plan in PLANS if norm_first or (plan.startswith("tp=4") and "full" not in plan)):
        agree(traced, model, Workload(seq_len=s, micro_batch=b), plan, extra_bytes=s * b * 4 * h)


def test_several_layers_are_several_times_one():
    s, b, h = 64, 2, 128
    one = half(lambda: GPT(h, 8, 0.1), b, s, h)
    three = half(lambda: nn.Sequential(*(GPT(h, 8, 0.1) for _ in range(3))), b, s, h)
    for plan in ("tp=4", "tp=4,sequence_parallel"):
        single, triple = one.program(plan), three.program(plan)
        for side in ("forward", "backward"):
            assert moved(getattr(triple, side)) == Counter({k: 3 * n for k, n in moved(getattr(single, side)).items()})
        assert triple.saved_bytes(*CATEGORIES) == 3 * single.saved_bytes(*CATEGORIES)


def mlp(bias):
    return half(lambda: nn.Sequential(nn.Linear(16, 64, bias=bias), nn.ReLU(), nn.Linear(64, 16, bias=bias)), 2, 8, 16)


@pytest.mark.parametrize("bias", [True, False])
def test_an_mlp_is_column_and_row_parallel(bias):
    """One all-reduce each way of [b s h], at its end and its beginning; only its bias is added after the sum."""
    traced = mlp(bias)
    size = 2 * 2 * 8 * 16
    program = traced.program("tp=4")
    assert moved(program.forward) == Counter({("tp", "all_reduce", size, 2 * size * 3 // 4, "input"): 1})
    assert moved(program.backward) == Counter({("tp", "all_reduce", size, 2 * size * 3 // 4, "gradient"): 1})
    assert program.parameters == 2 * 16 * 64 // 4 + bias * (64 // 4 + 16)
    sequence = traced.program("tp=4,sequence_parallel")
    assert [c for (_, c, *_), n in moved(sequence.forward).items() for _ in range(n)] == [
        "all_gather",
        "reduce_scatter",
    ]
    for plan in ("tp=4", "tp=4,sequence_parallel", "tp=4,sequence_parallel,tp_backward_overlap=false"):
        assert traced.simulate(H100, plan).step_time_s > 0


def test_without_a_gradient_of_the_input_nothing_is_reduced_for_it():
    with torch.device("meta"):
        module = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 16))
        traced = trace_module(module, torch.empty(8, 16))
    program = traced.program("tp=4")
    assert not moved(program.backward)
    assert 4 * flops_of(program) == traced.flops.total
    assert traced.simulate(H100, "tp=4").backward_s < traced.simulate(H100).backward_s * 1.1


def test_a_mean_over_the_sequence_gathers_it():
    """And so does the last position. The output has no positions, nor has its gradient: nothing is gathered for it."""

    class Mean(nn.LayerNorm):
        def forward(self, x):
            return super().forward(x).mean(1)

    class Last(nn.LayerNorm):
        def forward(self, x):
            return super().forward(x)[:, -1]

    for kind in (Mean, Last):
        program = half(lambda kind=kind: kind(16), 2, 8, 16).program("tp=4,sequence_parallel")
        assert [c for _, c, *_ in moved(program.forward)] == ["all_gather"]
        assert not moved(program.backward)


def test_a_linear_without_a_partner_is_whole():
    """Its output is the module's, or added to its input: Megatron splits neither."""
    head = half(lambda: nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 64)), 2, 8, 16)

    class Residual(nn.Linear):
        def forward(self, x):
            return x + torch.tanh(super().forward(x))

    for traced in (head, half(lambda: Residual(16, 16), 2, 8, 16)):
        program = traced.program("tp=4")
        assert not moved(program.instructions)
        assert program.parameters == traced.parameters
        assert flops_of(program) == traced.flops.total
        assert 4 * flops_of(traced.program("tp=4,sequence_parallel")) == traced.flops.total


@few
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.sampled_from([2, 4]))
def test_flops_divide_by_the_degree(b, s, size, degree):
    """All that a GPT block multiplies is split."""
    traced = half(lambda: GPT(16 * size, 4, 0.1, flash=False), b, 4 * s, 16 * size)
    for plan in (f"tp={degree}", f"tp={degree},sequence_parallel", f"ulysses={degree}"):
        assert degree * flops_of(traced.program(plan)) == traced.flops.total


def test_operators_are_named_in_the_vocabulary_of_the_layer():
    named = {op.name: op for op in half(lambda: GPT(128, 8, 0.0, kv_heads=4), 2, 16, 128).named_operators}
    assert named["qkv.addmm"].subscripts == "b s h, a d h, a d -> b s a d"
    assert named["fc1.addmm"].subscripts == "b s h, f h, f -> b s f"
    assert named["fc2.addmm"].subscripts == "b s f, h f -> b s h"
    attention = next(op for op in named.values() if op.kind == "attention")
    assert attention.mixes == {"j", "d"}
    assert isinstance(attention, Operator)
    assert all(isinstance(o, Operand) and isinstance(o.tensor, Tensor) for o in attention.inputs)


# ------------------------------------------------------------ what cannot be


class Branching(nn.Linear):
    def forward(self, x):
        y = super().forward(x)
        return y if y.sum() > 0 else -y


class Masked(nn.Linear):
    def forward(self, x):
        y = super().forward(x)
        return y[y > 0]


class Partly(nn.Linear):
    def forward(self, x):
        y = super().forward(x)
        y[..., :2] += 1
        return y


class InPlace(nn.Sequential):
    """Reads, through another view, what an operator in place wrote."""

    def forward(self, x):
        y = self[0](x)
        y.view(-1, y.shape[-1]).relu_()
        return self[1](y)


class Cross(nn.Module):
    def forward(self, x):
        return F.scaled_dot_product_attention(x, x[:, :, :4], x[:, :, :4])


class Product(nn.Module):
    def forward(self, x, y):
        return torch.bmm(x, y)


PASSED = {
    "as it is": lambda x: x, "scaled": lambda x: x * 3.0, "copied": lambda x: x.clone(),
    "converted": lambda x: x.float().to(x.dtype), "split": lambda x: x.split([0, x.shape[-1]], -1)[1],
    "turned": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
}  # fmt: skip


@pytest.mark.parametrize("passed", PASSED.values(), ids=PASSED)
@pytest.mark.parametrize("plan", ["tp=4", "tp=4,sequence_parallel", "ulysses=4", "ring=4"])
def test_a_part_that_holds_nothing_is_nobodys(plan, passed):
    """A rotation of the whole head sends and keeps what one of half of it does, and its copy moves as much."""
    half_head, whole = (
        half(lambda size=size: Turned(256, 8, 8, 512, turned=size, passed=passed), 1, 64, 256) for size in (16, 32)
    )
    programs = [traced.program(plan) for traced in (half_head, whole)]
    sent, copied = ([], [])
    for program in programs:
        steps = program.instructions
        sent.append([(s.collective, s.message_bytes) for s in steps if isinstance(s, Communication)])
        copied.append([s.work for s in program.forward if isinstance(s, Compute) and s.operator.startswith("cat")])
    assert sent[0] == sent[1]
    assert copied[0] == copied[1] != []
    assert "cat" in set(whole.operators["operator"])


def test_nothing_runs_for_a_part_that_holds_nothing():
    """On one GPU the kernels are those of a module without the part."""
    alone = half(lambda: Turned(256, 8, 8, 512, turned=32), 1, 64, 256)
    scaled = half(lambda: Turned(256, 8, 8, 512, turned=32, passed=lambda x: (x * 3.0).exp()), 1, 64, 256)
    assert [step.work for step in scaled.program("").forward] == [step.work for step in alone.program("").forward]


class Mixed(nn.Module):
    def forward(self, x):
        return F.scaled_dot_product_attention(x, x.float(), x)


BAD = [
    (
        lambda: trace_module(nn.Sequential(nn.LSTM(4, 4)), inputs(2, 3, 4)),
        r"^0 \(LSTM\): mkldnn_rnn_layer runs on CPUs only",
    ),
    (lambda: trace_module(nn.LSTM(4, 4), inputs(2, 3, 4)), r"^the module \(LSTM\): mkldnn_rnn_layer"),
    (lambda: trace_module(nn.Linear(4, 4), inputs(2, 4).long()), r"^the module \(Linear\): .*mat1 int64, mat2 float32"),
    (lambda: trace_module(nn.Sequential(nn.Linear(4, 4)), inputs(2, 4).half()), r"^0 \(Linear\): .*float16.*float32"),
    (lambda: trace_module(Product(), (inputs(2, 3, 4), inputs(2, 4, 3).half())), "of bmm differ in dtype"),
    (lambda: trace_module(Mixed(), inputs(1, 2, 8, 16).half()), "key float32, value float16"),
    (lambda: trace_module(nn.Linear(4, 4), "abc"), "must be a tensor, or a tuple or dict of them; got str"),
    (lambda: trace_module(nn.Linear(4, 4), None), "must be a tensor, or a tuple or dict of them; got NoneType"),
    (lambda: trace_module(Branching(4, 4), inputs(2, 4)), r"^the module \(Branching\): .* depend on values"),
    (
        lambda: trace_module(nn.Sequential(Masked(4, 4)), inputs(2, 4)),
        r"^0 \(Masked\): aten.nonzero.default .* depend on values",
    ),
    (
        lambda: trace_module(nn.Sequential(nn.ReLU(), nn.Linear(4, 4)), inputs(2, 5)),
        r"^1 \(Linear\): fails on fake tensors",
    ),
    (lambda: trace_module(nn.Linear(4, 4), (inputs(4), inputs(4))), "fails on fake tensors .* TypeError"),
    (lambda: trace_module(torch.relu, inputs(4)), "is not a torch.nn.Module"),
    (lambda: trace_module(nn.ReLU(), torch.ones(4)), "no output needs a gradient"),
    (lambda: trace_module(nn.ReLU(), inputs(4), device="tpu"), "use 'cuda' or 'cpu'"),
    (lambda: trace_module(nn.Identity(), inputs(4)).simulate(H100), "launches no kernel"),
    (lambda: trace_module(nn.Linear(4, 4).double(), inputs(4).double()).simulate(H100), "float64 is not simulated"),
    (lambda: trace_module(nn.Linear(4, 4), inputs(4)).simulate("dgx-z9"), "dgx-z9"),
    (lambda: trace_module(convolutions(), inputs(2, 3, 8, 8)).program("tp=2"), "^0.convolution of .* has no rule"),
    (
        lambda: trace_module(Shared(), torch.ones(2, 3, dtype=torch.long)).program("tp=2"),
        "^Shared: has no floating-point input, .* trace one decoder layer on hidden states",
    ),
    (
        lambda: trace_module(Network(), torch.ones(2, 8, dtype=torch.long)).program("tp=2"),
        r"trace one decoder layer \(model.layers.0 of it\)",
    ),
    (lambda: trace_module(nn.Linear(4, 4), inputs(0, 2, 4)), r"hold no elements; .* instead of \[0, 2, 4\]"),
    (lambda: trace_module(Cross(), inputs(1, 2, 8, 16)).program("tp=2"), "not at the positions of its queries"),
    (lambda: trace_module(Partly(4, 4), inputs(2, 4)).program("tp=2"), "^add_ of .* writes into a part of a tensor"),
    (lambda: half(lambda: Llama(64, 4, 1, 64), 1, 8, 64).program("tp=2"), "one head of keys serves all heads"),
    (lambda: mlp(True).program("tp=3"), "0.addmm is split over 3 ranks along f, whose size 64"),
    (lambda: mlp(True).program("tp=16,sequence_parallel"), "along s, whose size 8"),
    (lambda: mlp(True).simulate(H100, "tp=2,dp=2"), "dp is not simulated for a traced module"),
    (lambda: half(lambda: GPT(16, 2, 0.1, flash=False), 1, 8, 16).program("ring=2"), "ring_kind = 'p2p' needs"),
]


@pytest.mark.parametrize(("make", "message"), BAD, ids=[message for _, message in BAD])
def test_one_clear_line(make, message):
    with pytest.raises(InputError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_autocast_makes_operands_one_dtype():
    class Autocast(nn.Linear):
        def forward(self, x):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return super().forward(x)

    assert trace_module(Autocast(4, 4), inputs(2, 4)).tape.dtype == "bfloat16"


def test_the_mode_of_the_module_is_kept():
    """Dropout runs while training only, as in torch."""
    for training in (True, False):
        module = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)).train(training)
        assert ("native_dropout" in set(trace_module(module, inputs(2, 4)).operators["operator"])) == training


def test_results_are_shown_in_one_line():
    found = mlp(True).simulate(H100)
    for shown in (repr(found), repr(found.trace)):
        assert len(shown) < 120, shown
        assert "\n" not in shown
    assert f"{found.step_time_s * 1e3:.3f} ms" in repr(found)
    assert f"a step takes {found.step_time_s * 1e6:.1f} us" in found._repr_html_()
    assert repr(mlp(True).simulate(H100, "tp=4").trace).startswith("Trace(4 ranks, ")


def test_what_is_written_in_place_is_read_through_every_view():
    named = half(lambda: InPlace(nn.Linear(16, 64), nn.Linear(64, 16)), 2, 8, 16).named_operators
    assert [op.name for op in named] == ["0.addmm", "relu_", "1.addmm", "1.addmm bias", "output"]
    assert named[2].inputs[0].tensor == named[1].outputs[0].tensor


def test_recomputation_counts_as_hardware_flops():
    traced = half(lambda: GPT(256, 8, 0.0, flash=False), 1, 256, 256)
    kept, again = (traced.simulate(H100, plan) for plan in ("tp=2", "tp=2,recompute=full"))
    assert kept.hfu == pytest.approx(kept.mfu)
    assert again.hfu == pytest.approx(again.mfu * 4 / 3)


def test_a_checkpoint_of_torch_is_recomputed():
    """Forward FLOPs once more in the backward pass, and only the input is kept."""

    class Again(GPT):
        def forward(self, x):
            return checkpoint(super().forward, x, use_reentrant=False)

    given = inputs(2, 6, 32)
    plain, again = trace_module(GPT(32, 4, 0.1), given), trace_module(Again(32, 4, 0.1), given)
    assert again.saved_bytes == 4 * given.numel()
    assert again.flops == (plain.flops.forward, plain.flops.backward + plain.flops.forward)


def test_precision_is_that_of_the_products():
    class Autocast(nn.Linear):
        def forward(self, x):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return super().forward(x)

    for module, precision in ((nn.Linear(8, 8), "fp32"), (nn.Linear(8, 8).half(), "fp16"), (Autocast(8, 8), "bf16")):
        traced = trace_module(module, inputs(4, 8, dtype=module.weight.dtype))
        assert traced.simulate(H100).scenario.workload.precision == precision


def test_a_module_that_cannot_be_split_runs_on_one_gpu():
    assert trace_module(convolutions(), inputs(2, 3, 8, 8)).simulate(H100).step_time_s > 0


def test_without_torch_there_is_a_clear_line():
    code = "import sys; sys.modules['torch'] = None; import spsim; spsim.trace_module(None, None)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.strip().splitlines()[-1].endswith('which is not installed; install "spsim[calibrate]"')
    assert "InputError" in done.stderr


def test_forward_only_is_the_forward_pass_and_keeps_nothing():
    """Of a module in evaluation mode, as under `torch.no_grad`; on one GPU and under plans."""
    module = Llama(512, 8, 8, 1024, rope=True).to(torch.bfloat16).eval()
    x = torch.empty(2, 256, 512, dtype=torch.bfloat16, requires_grad=True)
    trained, served = (trace_module(module, x, forward_only=own) for own in (False, True))
    assert served.flops == (trained.flops.forward, 0)
    assert served.saved_bytes == 0
    for plan in ("", "tp=2,sequence_parallel", "ulysses=2", "ring=2"):
        both, alone = (own.simulate(H100, plan, optimizer="none") for own in (trained, served))
        assert alone.step_time_s == pytest.approx(both.forward_s, rel=0.01)
        assert alone.peak_memory_gib < both.peak_memory_gib
        assert alone.collectives_per_layer["forward"] == both.collectives_per_layer["forward"]
        assert alone.backward_s == 0


def test_forward_only_needs_nothing_that_has_a_gradient():
    assert trace_module(nn.ReLU(), torch.ones(4), forward_only=True).simulate(H100).step_time_s > 0
