"""What single operations of torch launch and keep, against such modules as autograd runs them."""

import csv
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

from spsim import Scenario, simulate, trace_module
from spsim.pytorch.modules.costs import kernels
from tests.cases import H100, program, result

S, B, H, F, HEADS = 64, 2, 128, 320, 8
D = H // HEADS
SEED = 24
"""Bytes of what drops scores, which torch keeps anyhow."""


class CompositeNorm(nn.Module):
    """RMSNorm as transformers writes it."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        dtype, x = x.dtype, x.to(torch.float32)
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * x.to(dtype)


class Called(nn.Module):
    """A function of tensors."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *tensors):
        return self.function(*tensors)


def rotated(x, table):
    """Of heads that are views of [b s a d], as transformers has them."""
    x = x.transpose(1, 2)
    return x * table + rotate_half(x) * table


def rotate_half(x):
    first, second = x[..., : D // 2], x[..., D // 2 :]
    return torch.cat((-second, first), -1)


def gated(activation, offset=None):
    def run(hidden):
        gate, up = hidden.chunk(2, -1)
        return activation(gate) * (up if offset is None else up + offset)

    return run


def repeat_kv(x, times):
    """As transformers has it."""
    return x.unsqueeze(3).expand(-1, -1, -1, times, -1).flatten(2, 3)


def attention_weights(scores, mask=None):
    scores = scores * 0.5 if mask is None else scores * 0.5 + mask
    return torch.softmax(scores, -1, dtype=torch.float32).to(scores.dtype)


@dataclass(frozen=True)
class Case:
    """A module of torch, and the operator of a layer that says what it runs."""

    operator: str
    module: nn.Module
    shapes: tuple[tuple[int, ...], ...]
    """Of what has a gradient, then, where there is another, of what has none."""
    settings: dict


LLAMA = {"gated_mlp": True, "ffn_hidden": F}
PLAIN_NORM = {**LLAMA, "glu_offset": False}
HIDDEN, HEADED, SCORES = (B, S, H), (B, S, HEADS, D), (B, HEADS, S, S)
CASES = {
    "transformers' norm": Case("norm1", CompositeNorm(H), (HIDDEN,), {**LLAMA, "composite_norm": True}),
    "torch's RMSNorm": Case("norm1", nn.RMSNorm(H), (HIDDEN,), LLAMA),
    "torch's LayerNorm": Case("norm1", nn.LayerNorm(H), (HIDDEN,), {}),
    "norm of heads": Case("q_norm", CompositeNorm(D), (HEADED,), {**LLAMA, "qk_norm": True, "composite_norm": True}),
    "rotation": Case("rope_q", Called(rotated), (HEADED, (S, D)), LLAMA),
    "swiglu": Case("swiglu", Called(gated(functional.silu)), ((B, S, 2 * F),), PLAIN_NORM),
    "geglu": Case("geglu", Called(gated(functional.gelu)), ((B, S, 2 * F),), {**PLAIN_NORM, "activation": "geglu"}),
    "Megatron's swiglu": Case("swiglu", Called(gated(functional.silu, 0.0)), ((B, S, 2 * F),), LLAMA),
    "gelu": Case("gelu", Called(functional.gelu), ((B, S, 4 * H),), {"bias": False}),
    "squared relu": Case(
        "squared_relu", Called(lambda x: functional.relu(x).pow(2)), ((B, S, 4 * H),),
        {"activation": "squared_relu", "bias": False},
    ),
    "residual": Case("residual1", Called(torch.add), (HIDDEN, HIDDEN), {"bias": False}),
    "dropout and residual": Case(
        "residual1", Called(lambda x, y: y + functional.dropout(x, 0.1)), (HIDDEN, HIDDEN),
        {"bias": False, "dropout": 0.1},
    ),
    "softmax": Case(
        "softmax", Called(attention_weights), (SCORES,), {"attention": "unfused", "causal": False}
    ),
    "repeated heads": Case(
        "repeat_k", Called(lambda x: repeat_kv(x, HEADS // 2)), ((B, S, 2, D),), {"attention": "unfused", "kv_heads": 2}
    ),
    "masked softmax": Case("softmax", Called(attention_weights), (SCORES, (S, S)), {"attention": "unfused"}),
}  # fmt: skip


def traced(case):
    first, *others = [torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in case.shapes]
    return trace_module(case.module.bfloat16().to("meta"), (first.requires_grad_(), *others))


def layer(case):
    return program("", seq_len=S, micro_batch=B, hidden=H, heads=HEADS, kernels="eager", **case.settings)


def expected(call):
    """Name, single accesses and traffic of what a call runs, of which the table counts no norms' weights and rotations.

    The gradient of half a tensor is two kernels on a GPU: zeros, and a copy of the half over them.
    """
    if call.op == "slice_backward":
        (whole,) = call.results
        return [(None, 0, whole.bytes), (None, whole.elements, whole.bytes)]
    found = kernels(call)
    return [(work.kernel, work.accesses, pytest.approx(work.bytes_moved, rel=0.07)) for work in found]


@pytest.mark.parametrize("name", CASES)
def test_kernels_of_a_module(name):
    case = CASES[name]
    calls = {"forward": traced(case).tape.forward, "backward": traced(case).tape.backward}
    for part, ran in calls.items():
        found = [
            (work.kernel, work.accesses, work.bytes_moved)
            for step in layer(case).instructions
            if step.operator == case.operator and step.part == part
            for work in step.work
        ]
        assert found == [kernel for call in ran for kernel in expected(call)], part


class Layer(nn.Module):
    """A Llama layer of plain torch, batch first."""

    def __init__(self, norm):
        super().__init__()
        self.norms = nn.ModuleList([norm(H), norm(H)])
        self.q, self.k, self.v, self.o = (nn.Linear(H, width, bias=False) for width in (H, H // 2, H // 2, H))
        self.gate, self.up, self.down = (nn.Linear(i, o, bias=False) for i, o in ((H, F), (H, F), (F, H)))

    def forward(self, x, table):
        normed = self.norms[0](x)
        q, k = (rotated(one(normed).unflatten(-1, (-1, D)), table) for one in (self.q, self.k))
        v = self.v(normed).unflatten(-1, (-1, D)).transpose(1, 2)
        context = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.o(context.transpose(1, 2).flatten(-2))
        normed = self.norms[1](x)
        return x + self.down(functional.silu(self.gate(normed)) * self.up(normed))


@pytest.mark.parametrize(("library", "norm"), [("transformers", CompositeNorm), ("torchtitan", nn.RMSNorm)])
def test_what_a_layer_of_plain_torch_keeps(library, norm):
    """Beside it the table of rotations, of all layers, and the seed of attention."""
    kept = trace_module(
        Layer(norm).bfloat16().to("meta"),
        (
            torch.empty(HIDDEN, dtype=torch.bfloat16, device="meta", requires_grad=True),
            torch.empty(S, D, dtype=torch.bfloat16, device="meta"),
        ),
    ).saved_bytes
    settings = {**LLAMA, "kv_heads": HEADS // 2, "hidden": H, "heads": HEADS}
    found = result(f"library={library}", seq_len=S, micro_batch=B, **settings)
    assert kept - 2 * S * D - SEED == found.saved_bytes("activation", "norm statistics", "log-sum-exp")


@pytest.mark.parametrize(
    ("plan", "kernels", "times_hidden"),
    [
        ("", None, 34),
        ("library=torchtitan,sequence_parallel=false", None, 41),
        ("library=transformers", None, 49),
        ("library=transformers", "fused", 34),
        ("library=torchtitan,sequence_parallel=false", "compiled", 34),
        ("", "eager", 34 + 7 + 7),
    ],
)
def test_llama_3_8b_keeps_so_many_bytes_a_token(plan, kernels, times_hidden):
    """3f of SwiGLU fused, 4f eager, 5f with Megatron-Core's offset; a norm of single operations 4 bytes more."""
    chosen = Scenario(
        hardware=H100, model={"preset": "llama-3-8b", **({"kernels": kernels} if kernels else {})}, plan=plan,
        workload={"seq_len": 1024}, scope="layers",
    )  # fmt: skip
    assert simulate(chosen).activation_bytes_per_layer == times_hidden * 1024 * 4096
    assert (chosen.model.kernels in (None, "fused")) == (not any("kernels" in note for note in chosen.notes))


@pytest.mark.parametrize(
    ("kernels", "dropout", "times"),
    [(None, 0.0, 2), (None, 0.1, 5), ("eager", 0.0, 6), ("eager", 0.1, 7), ("compiled", 0.0, 4), ("compiled", 0.1, 5)],
)
def test_scores_that_unfused_attention_keeps(kernels, dropout, times):
    """Of A = a s^2 b: probabilities in fp32 and in 16 bits, or dropped and a mask; compiled the scores again."""
    common = {"seq_len": 512, "dropout": dropout, "kernels": kernels}
    kept = [program(attention=own, **common).saved_bytes("activation", "mask") for own in ("unfused", "flash")]
    assert kept[0] - kept[1] == times * 8 * 512**2


@pytest.mark.parametrize(("dropout", "launches", "tensors"), [(0.0, 1, 6 - 4), (0.1, 2, 8 - 5)])
def test_compiled_layers_join_the_first_residual_and_its_norm(dropout, launches, tensors):
    """Forward the sum is not read again. Backward norm and sum of gradients read and write 3 tensors each, dropout 2;
    together they read both gradients and what is kept, and write one gradient, or with dropout two.
    """
    launched, moved = Counter(), Counter()
    for kind in ("fused", "compiled"):
        for step in program("", dropout=dropout, bias=False, kernels=kind).instructions:
            way = "forward" if step.part == "forward" else "backward"
            launched[kind, way] += 1
            moved[kind, way] += sum(work.bytes_moved for work in step.work)
    for way, kernels_less, tensors_less in (("forward", 1, 1), ("backward", launches, tensors)):
        assert launched["fused", way] - launched["compiled", way] == kernels_less
        assert moved["fused", way] - moved["compiled", way] == tensors_less * 2 * 256 * 256


def measured_steps():
    with (Path(__file__).parents[1] / "experiments/data/h100_models.csv").open() as file:
        return [row for row in csv.DictReader(file) if row["family"] != "gpt2"]


SHAPES = {
    "llama-3.2-1b": {
        "preset": "llama-3-8b", "layers": 16, "hidden": 2048, "ffn_hidden": 8192, "head_dim": 64,
        "tied_embeddings": True,
    },
    "llama-3-8b-6layers": {"preset": "llama-3-8b", "layers": 6},
    "mistral-7b-6layers": {"preset": "mistral-7b", "layers": 6},
}  # fmt: skip


@pytest.mark.parametrize("row", measured_steps(), ids=lambda row: f"{row['model']} {row['seq_len']}")
def test_steps_of_transformers_models_as_measured(row):
    """Forward and backward pass of Llama models on one H100, which nothing was fitted on; fused they are too short."""
    sizes = {"seq_len": int(row["seq_len"]), "micro_batch": int(row["micro_batch"])}
    recompute = "full" if row["checkpointing"] == "1" else "none"
    measured = float(row["forward_ms"]) + float(row["backward_ms"])
    for plan, least, most in (("library=transformers", 0.96, 1.07), ("", 0.7, 0.94)):
        chosen = Scenario(
            hardware=H100, model=SHAPES[row["model"]], plan=f"{plan},recompute={recompute}", workload=sizes
        )
        found = simulate(chosen)
        assert least < 1e3 * (found.step_time_s - found.optimizer_s) / measured < most
