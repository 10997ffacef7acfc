"""Models: parameter counts against the published ones, and the traits of a layer against closed forms.

Notation: s sequence, b micro-batch, h hidden, a heads of size d, k KV heads, f MLP width, t degree; S = s b h and
2-byte elements; x(t) = (t - 1) / t.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import pytest

from spsim.errors import InputError
from spsim.inputs.model import Model
from spsim.inputs.plan import parse_plan
from spsim.inputs.presets import PRESETS, load_model
from spsim.inputs.workload import Workload
from spsim.program.assembly import layer_program
from spsim.program.blocks.transformer import transformer_layer
from spsim.program.instructions import Communication, Compute, Program
from spsim.work import MemoryBound
from tests.cases import model, program


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("llama-2-7b", 6_738_415_616),
        ("llama-2-13b", 13_015_864_320),
        ("llama-2-70b", 68_976_648_192),
        ("llama-3-8b", 8_030_261_248),
        ("llama-3-70b", 70_553_706_496),
        ("llama-3-405b", 405_853_388_800),
        ("mistral-7b", 7_241_732_096),
        ("llama-3.1-8b", 8_030_261_248),
        ("Llama 3.1 405B", 405_853_388_800),
        ("qwen2.5-32b", 32_763_876_352),
        ("qwen3-8b", 8_190_735_360),
    ],
)
def test_llama_parameters_are_exact(name: str, published: int) -> None:
    """The counts of the released checkpoints (sum of tensor sizes)."""
    assert load_model(name).parameters == published


@pytest.mark.parametrize(
    ("name", "embedding", "others"), [("nemotron-4-15b", 3.2, 12.5), ("nemotron-4-340b", 9.4, 331.6)]
)
def test_nemotron_parameters(name: str, embedding: float, others: float) -> None:
    """Billions of embedding and other parameters, Parmar et al. 2024 (arXiv:2402.16819), section 2, and Adler
    et al. 2024 (arXiv:2406.11704), model architecture. 2 x 256000 x 6144 is 3.15 billion, which the former rounds up.
    """
    model = load_model(name)
    matrices = 2 * model.vocab * model.hidden
    assert matrices / 1e9 == pytest.approx(embedding, abs=0.06)
    assert (model.parameters - matrices) / 1e9 == pytest.approx(others, abs=0.05)


@pytest.mark.parametrize(
    ("name", "billions"), [("gpt-22b", 22), ("gpt-175b", 175), ("gpt-530b", 530), ("gpt-1t", 1008)]
)
def test_gpt_parameters(name: str, billions: float) -> None:
    """The names of Korthikanti et al. 2022, Table 3; 1T is 1008 B in Narayanan et al. 2021, Table 1."""
    assert load_model(name).parameters == pytest.approx(billions * 1e9, rel=0.005)


@pytest.mark.parametrize("model", [m for m in PRESETS.values() if m.positions == "learned"], ids=lambda m: m.name)
def test_gpt_parameters_follow_the_published_formula(model: Model) -> None:
    """12 l h^2 (1 + 13/(12h) + (v + s)/(12 l h)), Narayanan et al. 2021, equation 2, plus the final norm."""
    h, layers = model.hidden, model.layers
    formula = 12 * layers * h * h + 13 * layers * h + (model.vocab + model.max_positions) * h
    assert model.parameters == formula + 2 * h


def test_defaults_of_the_two_families() -> None:
    gpt = Model(layers=2, hidden=64, heads=4, vocab=100)
    llama = Model(layers=2, hidden=64, heads=4, vocab=100, gated_mlp=True, ffn_hidden=96)
    assert (gpt.norm, gpt.positions, gpt.bias, gpt.tied_embeddings, gpt.ffn_hidden) == (
        "layernorm",
        "learned",
        True,
        True,
        256,
    )
    assert (llama.norm, llama.positions, llama.bias, llama.tied_embeddings) == (
        "rmsnorm",
        "rope",
        False,
        False,
    )
    assert (gpt.activation, gpt.qkv_bias, llama.activation, llama.qkv_bias) == ("gelu", True, "swiglu", False)
    for family in (gpt, llama):
        assert (family.qk_norm, family.parallel_residual) == (False, False)
    assert (gpt.kv_heads, gpt.head_dim, gpt.attention, gpt.dropout) == (4, 16, "flash", 0.0)


def test_presets_of_the_2022_configurations_are_unfused_with_dropout() -> None:
    for name in ("gpt-22b", "gpt-175b", "gpt-530b", "gpt-1t"):
        assert (PRESETS[name].attention, PRESETS[name].dropout) == ("unfused", 0.1)


def test_unknown_model_lists_what_there_is() -> None:
    with pytest.raises(InputError, match=r"gpt-22b.*llama-3-405b"):
        load_model("gpt-4")


@pytest.mark.parametrize(
    ("activation", "gated", "words"),
    [("swiglu", False, "exclude"), ("geglu", False, "exclude"), ("gelu", True, "exclude"), ("silu", False, "'silu'")],
)
def test_an_activation_that_does_not_fit_is_refused(activation: str, gated: bool, words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        Model(layers=2, hidden=64, heads=4, vocab=100, ffn_hidden=96, activation=activation, gated_mlp=gated)
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------ traits of the layer

T = 4


@dataclass(frozen=True)
class Shape:
    """A layer that degree 4 divides, but for the KV heads where they are fewer."""

    k: int
    s: int = 32
    b: int = 3
    a: int = 8
    d: int = 20
    f: int = 88

    @property
    def S(self) -> int:  # noqa: N802
        return self.s * self.b * self.a * self.d

    @property
    def head(self) -> int:
        """Elements of one head."""
        return self.s * self.b * self.d

    @property
    def copies(self) -> int:
        """KV heads on all ranks of a split over heads together."""
        return max(self.k, T)

    def program(self, plan: str, **traits: Any) -> Program:
        """With copies of K and V where there are fewer KV heads than ranks."""
        return program(
            f"{plan},few_kv_heads=replicate", seq_len=self.s, micro_batch=self.b, hidden=self.a * self.d,
            heads=self.a, kv_heads=self.k, ffn_hidden=self.f, **traits,
        )  # fmt: skip

    def kept(self, plan: str, **traits: Any) -> int:
        """Activation bytes of all ranks."""
        return (T if plan else 1) * self.program(plan, **traits).saved_bytes("activation", "mask")


TP, SP, ULYSSES, RING = f"tp={T}", f"tp={T},sequence_parallel", f"ulysses={T}", f"ring={T}"
QK_NORM = {"gated_mlp": True, "qk_norm": True}
PARALLEL = {"parallel_residual": True, "positions": "rope"}
SQUARED_RELU = {"activation": "squared_relu", "positions": "rope", "bias": False}
QKV_BIAS = {"gated_mlp": True, "qkv_bias": True}
TRAITS = pytest.mark.parametrize(
    "traits", [QK_NORM, PARALLEL, SQUARED_RELU, QKV_BIAS], ids=["qk_norm", "parallel", "squared_relu", "qkv_bias"]
)
KV_HEADS = pytest.mark.parametrize("x", [Shape(8), Shape(4), Shape(2), Shape(1)], ids=lambda x: f"kv{x.k}")


def test_qk_norm_stands_between_projection_and_rotation() -> None:
    """RMSNorm over the head size with one weight for all heads: any head and position by itself."""
    operators = transformer_layer(model(ffn_hidden=96, **QK_NORM), Workload(seq_len=8))
    names = [operator.name for operator in operators]
    assert names[1:7] == ["qkv", "q_norm", "k_norm", "rope_q", "rope_k", "attention"]
    for norm, rope in zip(operators[2:4], operators[4:6], strict=True):
        assert (norm.subscripts, norm.mixes, norm.contracted) == ("s b a d, d -> s b a d", {"d"}, frozenset())
        assert [weight.tensor.sizes for weight in norm.weights] == [(32,)]
        assert rope.activations[0].tensor == norm.results[0].tensor


@KV_HEADS
def test_saved_with_qk_norm(x: Shape) -> None:
    """Llama keeps 12S + 4 s b k d + 6 s b f. The norms keep q and k as projected, 2S + 2 s b k d more, split over
    heads under tp (whole KV heads, so copies where there are fewer than ranks) and over the sequence elsewhere;
    attention keeps them rotated. Ulysses keeps the attention output in two layouts, 2S.
    """
    mlp, k, copies = 6 * x.s * x.b * x.f, x.k * x.head, x.copies * x.head
    assert x.kept("", **QK_NORM) == 14 * x.S + 6 * k + mlp
    assert x.kept(TP, **QK_NORM) == (8 * T + 6) * x.S + 6 * copies + mlp
    assert x.kept(SP, **QK_NORM) == 14 * x.S + 6 * copies + mlp
    assert x.kept(ULYSSES, **QK_NORM) == 16 * x.S + 4 * copies + 2 * k + mlp
    assert x.kept(RING, **QK_NORM) == 14 * x.S + 6 * k + mlp


@KV_HEADS
def test_statistics_of_qk_norm(x: Shape) -> None:
    """One fp32 number a token and head, 4 s b (a + k), beside 4 s b of each of the two norms."""
    tokens = x.s * x.b

    def statistics(plan: str) -> int:
        return (T if plan else 1) * x.program(plan, **QK_NORM).saved_bytes("norm statistics")

    assert statistics("") == statistics(ULYSSES) == statistics(RING) == 4 * tokens * (2 + x.a + x.k)
    assert statistics(TP) == 4 * tokens * (2 * T + x.a + x.copies)
    assert statistics(SP) == 4 * tokens * (2 + x.a + x.copies)


@KV_HEADS
def test_saved_with_parallel_residual(x: Shape) -> None:
    """Of 12S + 4 s b k d + 4 s b f of GPT without dropout both norms keep the same input, 2S less: the layer input.
    Under tp it is whole, as are the inputs of qkv and fc1.
    """
    mlp, k, copies = 4 * x.s * x.b * x.f, x.k * x.head, x.copies * x.head
    assert x.kept("", **PARALLEL) == 10 * x.S + 4 * k + mlp
    assert x.kept(TP, **PARALLEL) == (6 * T + 4) * x.S + 4 * copies + mlp
    assert x.kept(SP, **PARALLEL) == 10 * x.S + 4 * copies + mlp
    assert x.kept(ULYSSES, **PARALLEL) == 12 * x.S + 4 * copies + mlp
    assert x.kept(RING, **PARALLEL) == 10 * x.S + 4 * k + mlp
    assert x.kept("", dropout=0.1, **PARALLEL) == 12 * x.S + 4 * k + mlp  # two masks


@KV_HEADS
def test_saved_with_squared_relu(x: Shape) -> None:
    """12S + 4 s b k d as Llama; the activation keeps its input, 2 s b f, and fc2 its own, 2 s b f."""
    mlp, k, copies = 4 * x.s * x.b * x.f, x.k * x.head, x.copies * x.head
    assert x.kept("", **SQUARED_RELU) == 12 * x.S + 4 * k + mlp
    assert x.kept(TP, **SQUARED_RELU) == (8 * T + 4) * x.S + 4 * copies + mlp
    assert x.kept(SP, **SQUARED_RELU) == 12 * x.S + 4 * copies + mlp
    assert x.kept(ULYSSES, **SQUARED_RELU) == 14 * x.S + 4 * copies + mlp
    rows = {saved.operator: T * saved.bytes for saved in x.program(SP, **SQUARED_RELU).saved}
    assert rows["squared_relu"] == rows["fc2"] == 2 * x.s * x.b * x.f


@KV_HEADS
def test_saved_with_qkv_bias(x: Shape) -> None:
    """A bias keeps nothing: 12S + 4 s b k d + 6 s b f of Llama."""
    mlp, copies = 6 * x.s * x.b * x.f, x.copies * x.head
    assert x.kept("", **QKV_BIAS) == 12 * x.S + 4 * x.k * x.head + mlp
    assert x.kept(TP, **QKV_BIAS) == (8 * T + 4) * x.S + 4 * copies + mlp
    assert x.kept(SP, **QKV_BIAS) == 12 * x.S + 4 * copies + mlp
    assert x.kept(ULYSSES, **QKV_BIAS) == 14 * x.S + 4 * copies + mlp


@TRAITS
@KV_HEADS
def test_communication(x: Shape, traits: dict[str, Any]) -> None:
    """None of the traits adds a collective: the counts and bytes of any layer. E = 2S, K = E copies / a.

    tp: two all-reduces each way, 4E x(t); also with a parallel residual, whose branches are summed before they
    meet the residual. With sequence parallelism two gathers and two scatters, 4E x(t), and two gathers more in
    backward, 6E x(t). Ulysses: q, k, v and the output each way, (2E + 2K)/t x(t).
    """
    e, k = 2 * x.S, 2 * x.copies * x.head
    expected = {
        TP: ({"all_reduce": 2}, {"all_reduce": 2}, 4 * e * (T - 1) // T, 4 * e * (T - 1) // T),
        SP: (
            {"all_gather": 2, "reduce_scatter": 2}, {"all_gather": 4, "reduce_scatter": 2},
            4 * e * (T - 1) // T, 6 * e * (T - 1) // T,
        ),
        ULYSSES: ({"all_to_all": 4}, {"all_to_all": 4}, *[(2 * e + 2 * k) * (T - 1) // T**2] * 2),
    }  # fmt: skip
    for plan, row in expected.items():
        layer = x.program(plan, **traits)
        sides = [[s for s in side if isinstance(s, Communication)] for side in (layer.forward, layer.backward)]
        assert tuple(Counter(s.collective for s in side) for side in sides) == row[:2]
        assert tuple(sum(s.sent_bytes for s in side) for side in sides) == row[2:]


def test_a_residual_is_added_to_a_whole_sum() -> None:
    """Under tp both branches of a parallel residual are reduced before the kernel that adds them, each by itself.
    The layer input has three consumers, so two additions of its gradient.
    """
    layer = Shape(8).program(TP, **PARALLEL)
    reduced = [(s.operator, s.tensor) for s in layer.forward if isinstance(s, Communication)]
    assert reduced == [("residual1", "projection_out"), ("residual2", "fc2_out")]
    added = [s.operator for s in layer.backward if isinstance(s, Compute) and s.part == "accumulate"]
    assert added == ["layer_input gradient"] * 2


def synced(layer: Program) -> dict[str, tuple[int, int]]:
    """{weight: (ranks, elements)} of the gradients that are summed over ranks."""
    return {sync.weight: (sync.ranks, sync.elements) for sync in layer.weight_sync}


def test_weight_gradients_of_qk_norm() -> None:
    """One weight of d for all heads: under tp each rank has the gradient of its heads, which Megatron-Core sums
    over tp as well (`finalize_model_grads`).
    """
    x = Shape(8)
    heads = {"q_norm_weight": (T, x.d), "k_norm_weight": (T, x.d)}
    assert synced(x.program(TP, **QK_NORM)) == heads
    norms = {"norm1_weight": (T, x.a * x.d), "norm2_weight": (T, x.a * x.d)}
    assert synced(x.program(SP, **QK_NORM)) == {**heads, **norms}
    assert heads.items() <= synced(x.program(ULYSSES, **QK_NORM)).items()


def test_weight_gradients_of_qkv_bias() -> None:
    """Column-parallel: each rank has its own, but for copies of KV heads; under Ulysses every rank has them all."""
    assert not synced(Shape(8).program(TP, **QKV_BIAS))
    x = Shape(2)
    assert synced(x.program(TP, **QKV_BIAS)) == {
        "k_weight": (2, x.a * x.d * x.d), "v_weight": (2, x.a * x.d * x.d), "k_bias": (2, x.d), "v_bias": (2, x.d),
    }  # fmt: skip
    biases = {name: found for name, found in synced(x.program(ULYSSES, **QKV_BIAS)).items() if "bias" in name}
    assert biases == {"q_bias": (T, x.a * x.d), "k_bias": (T, 2 * x.d), "v_bias": (T, 2 * x.d)}


@KV_HEADS
def test_parameters_of_the_traits(x: Shape) -> None:
    """qk_norm: 2 d; qkv_bias: (a + 2k) d; the layer compiled for one GPU has what the model counts."""
    plain = x.program("", gated_mlp=True).parameters
    assert x.program("", **QK_NORM).parameters == plain + 2 * x.d
    assert x.program("", **QKV_BIAS).parameters == plain + (x.a + 2 * x.k) * x.d
    for traits in (QK_NORM, PARALLEL, SQUARED_RELU, QKV_BIAS):
        settings = {"layers": 2, "hidden": x.a * x.d, "heads": x.a, "kv_heads": x.k, "ffn_hidden": x.f, "vocab": 512}
        assert Model(**settings, **traits).layer_parameters == x.program("", **traits).parameters


def traffic(layer: Program, operator: str) -> list[tuple[str, int]]:
    """(part, bytes) of the memory-bound kernels of an operator."""
    return [
        (step.part, work.bytes_moved)
        for step in layer.instructions
        if isinstance(step, Compute) and step.operator == operator
        for work in step.work
        if isinstance(work, MemoryBound)
    ]


def test_traffic_of_the_traits() -> None:
    """A norm of q reads 2S and 2d, writes 2S and 4 s b a; backward reads the gradient and what was kept and writes
    2S, all but 2d split over heads. The bias of q, k and v costs one more reading of their gradients, 6S.
    """
    x = Shape(8)
    statistics = 4 * x.s * x.b * x.a
    forward, backward = 4 * x.S + statistics, 6 * x.S + statistics
    for plan in (TP, SP, ULYSSES):
        for norm in ("q_norm", "k_norm"):
            found = traffic(x.program(plan, **QK_NORM), norm)
            assert found == [("forward", forward // T + 2 * x.d), ("backward", backward // T)]
        assert traffic(x.program(plan, **QKV_BIAS), "qkv") == [("wgrad", 6 * x.S // T)]
        assert traffic(x.program(plan, gated_mlp=True), "qkv") == []


BIASED = {
    "hidden": 256,
    "ffn_hidden": 512,
    "heads": 8,
    "layers": 2,
    "vocab": 1000,
    "gated_mlp": True,
    "max_positions": 64,
}


@pytest.mark.parametrize(
    "traits",
    [
        {"norms": "post", "qk_norm": True, "qk_norm_over": "heads"},
        {"norms": "both", "qk_norm": True},
        {"norm": "layernorm", "norm_bias": False, "parallel_residual": True, "shared_norm": True},
        {"norm": "layernorm", "parallel_residual": True, "shared_norm": True, "mlp_bias": True},
        {"bias": True, "mlp_bias": False},
        {"gated_mlp": False, "activation": "relu"},
        {"bias": True, "experts": 8, "experts_per_token": 2},
        {"bias": True, "experts": 8, "experts_per_token": 2, "shared_ffn_hidden": 128},
        {"bias": True, "experts": 8, "experts_per_token": 2, "expert_ffn_hidden": 128, "attention_sinks": True},
    ],
)
@pytest.mark.parametrize("plan", ["", "tp=2,sequence_parallel"])
def test_a_layer_has_the_parameters_that_its_traits_say(traits: dict[str, Any], plan: str) -> None:
    """The weights of its operators are those of the formula, each of tp's two ranks having half or all of them."""
    found = Model(**{**BIASED, **traits})
    held = layer_program(found, parse_plan(plan), Workload(seq_len=64)).parameters
    if not plan:
        assert held == found.layer_parameters
    else:
        assert found.layer_parameters / 2 < held < found.layer_parameters


@pytest.mark.parametrize("traits", [{"norms": "both"}, {"sliding_window": 32}, {"experts": 4, "experts_per_token": 2}])
def test_real_layers_are_of_models_that_they_know(traits: dict[str, Any]) -> None:
    """Where weights or the mask are others, nothing is run in their place."""
    pytest.importorskip("torch")
    from spsim.pytorch.layers import Groups, ParallelLayer

    with pytest.raises(InputError, match="real layers are those of dense GPT and Llama models"):
        ParallelLayer(Model(**{**BIASED, **traits}), parse_plan(""), Groups.create(parse_plan("")))
