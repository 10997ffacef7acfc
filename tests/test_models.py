"""Parameter counts against the published ones."""

import pytest

from spsim.errors import InputError
from spsim.model import PRESETS, Model, load_model


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("llama-2-7b", 6_738_415_616),
        ("llama-3-8b", 8_030_261_248),
        ("llama-3-70b", 70_553_706_496),
        ("llama-3-405b", 405_853_388_800),
    ],
)
def test_llama_parameters_are_exact(name: str, published: int) -> None:
    """The counts of the released checkpoints (sum of tensor sizes)."""
    assert load_model(name).parameters == published


@pytest.mark.parametrize(
    ("name", "billions"), [("gpt-22b", 22), ("gpt-175b", 175), ("gpt-530b", 530), ("gpt-1t", 1008)]
)
def test_gpt_parameters(name: str, billions: float) -> None:
    """The names of Korthikanti et al. 2022, Table 3; 1T is 1008 B in Narayanan et al. 2021, Table 1."""
    assert load_model(name).parameters == pytest.approx(billions * 1e9, rel=0.005)


@pytest.mark.parametrize("model", [m for m in PRESETS.values() if not m.gated_mlp], ids=lambda m: m.name)
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
    assert (gpt.kv_heads, gpt.head_dim, gpt.attention, gpt.dropout) == (4, 16, "flash", 0.0)


def test_presets_of_the_2022_configurations_are_unfused_with_dropout() -> None:
    for name in ("gpt-22b", "gpt-175b", "gpt-530b", "gpt-1t"):
        assert (PRESETS[name].attention, PRESETS[name].dropout) == ("unfused", 0.1)


def test_unknown_model_lists_what_there_is() -> None:
    with pytest.raises(InputError, match=r"gpt-22b.*llama-3-405b"):
        load_model("gpt-4")
