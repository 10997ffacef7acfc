"""A plan says whose implementation it is: a library is the defaults of a plan's options, and nothing else."""

from typing import get_args

import pytest

from spsim.errors import InputError
from spsim.inputs.libraries import LIBRARIES, LibraryName
from spsim.inputs.plan import Plan, parse_plan
from tests.cases import scenario

NAMES = get_args(LibraryName)


def test_every_library_has_a_record_of_options_of_a_plan():
    """Each value is one that the option takes."""
    assert tuple(LIBRARIES) == NAMES
    for name, record in LIBRARIES.items():
        plan = Plan(library=name)
        assert {option: getattr(plan, option) for option in record.options} == record.options
        assert Plan(**record.options).unlike({}) == record.options, "no default stands in a record twice"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("options", [{}, {"tp": 8}, {"dp": 4}, {"ulysses": 2, "keep_gathered": False}])
def test_what_is_not_given_is_as_in_the_library(name, options):
    """And the text says what is given alone, from which the same plan comes."""
    plan = Plan(library=name, **options)
    for option in Plan.model_fields.keys() - {"library", *options}:
        usual = LIBRARIES[name].options.get(option, Plan.model_fields[option].default)
        assert getattr(plan, option) == usual
    assert parse_plan(plan.text) == plan
    assert len(plan.text.split(",")) <= 1 + len(options)


def test_megatron_core_is_what_a_plan_is_without_a_library():
    assert Plan(library="megatron-core", tp=8) == Plan(tp=8)
    assert Plan(library="megatron-core", tp=8).text == "tp=8"
    assert Plan(tp=8).label == "TP8"


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("library=TorchTitan,tp=8", "library=torchtitan,tp=8"),
        ("tp=8,library=ring_flash_attn", "library=ring-flash-attn,tp=8"),
        ("library=megatron,tp=8", "tp=8"),
        ("TP8+SP (torchtitan)", "library=torchtitan,tp=8"),
        ("TP8 (transformers), recompute=full", "library=transformers,tp=8,recompute=full"),
        ("single GPU (torch)", "library=torch"),
    ],
)
def test_a_library_in_other_words(text, same):
    assert parse_plan(text) == parse_plan(same)
    assert parse_plan(text).text == same


@pytest.mark.parametrize("text", ["library=torchtitan,tp=8", "library=torchtitan,dp=8", "library=deepspeed,ulysses=8"])
def test_labels_say_the_library(text):
    plan = parse_plan(text)
    assert plan.library in plan.label
    assert parse_plan(plan.label) == plan


@pytest.mark.parametrize("text", ["library=jax", "library=5", "TP8 (jax)"])
def test_an_unknown_library_gets_the_known_names(text):
    with pytest.raises(InputError) as error:
        parse_plan(text)
    assert all(name in str(error.value) for name in NAMES)
    assert "\n" not in str(error.value)


def test_a_result_says_what_is_done_as_the_library_does():
    """What the user chose is not the library's choice, and what has no effect is not said."""
    assert scenario("tp=2").notes == ()
    (note,) = scenario("library=transformers,tp=2").notes
    assert "transformers 5.24.0" in note
    assert "projections = 'separate'" in note
    assert "dp_library" not in note
    (note,) = scenario("library=transformers,tp=2,projections=fused").notes
    assert "projections" not in note
