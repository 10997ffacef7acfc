"""Which layers each chunk of a pipeline holds: by the rules, and by layouts."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spsim.errors import InputError
from spsim.inputs.model import Model
from spsim.inputs.plan import Plan, parse_plan
from spsim.inputs.stages import Chunk, all_chunks, chunks_of, layers_of_chunks


def model(layers):
    return Model(layers=layers, hidden=64, heads=4, vocab=100)


def counts(layers, plan):
    """Layers of each chunk of each stage."""
    return [[len(chunk.layers) for chunk in stage] for stage in chunks_of(model(layers), parse_plan(plan))]


def line_of(layers, plan):
    with pytest.raises(InputError) as caught:
        chunks_of(model(layers), plan if isinstance(plan, Plan) else parse_plan(plan))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("layers", "plan", "held"),
    [
        (4, "", [[4]]),
        (8, "pp=4", [[2]] * 4),
        (8, "pp=2,virtual_pp=2", [[2, 2]] * 2),
        (126, "pp=8", [[15], *[[16]] * 6, [15]]),  # 126 + 2 slots
        (126, "pp=8,virtual_pp=4", [[3, 4, 4, 4], *[[4] * 4] * 6, [4, 4, 4, 3]]),
        (126, "pp=16,virtual_pp=7", [*[[2, 1, 1, 1, 1, 1, 1]] * 14, *[[1] * 7] * 2]),
        (6, "pp=8", [[0], *[[1]] * 6, [0]]),  # embedding and loss alone
        (7, "pp=8", [*[[1]] * 7, [0]]),
        (34, "pp=4", [[8], [9], [9], [8]]),
        (5, "pp=2,virtual_pp=2,pp_schedule=zbv", [[2, 1], [1, 1]]),
    ],
)
def test_layers_by_the_rules(layers, plan, held):
    assert counts(layers, plan) == held


def test_an_activation_goes_round_the_stages_or_there_and_back():
    """Stages of 8 layers on 2 ranks with 2 chunks each."""

    def first_layers(schedule):
        return [
            [c.layers[0] for c in stage] for stage in chunks_of(model(8), parse_plan(f"pp=2,virtual_pp=2{schedule}"))
        ]

    assert first_layers("") == [[0, 4], [2, 6]]
    assert first_layers(",pp_schedule=zbv") == first_layers(",pp_schedule=dualpipev") == [[0, 6], [2, 4]]


@given(st.integers(1, 200), st.integers(1, 16), st.integers(1, 8))
def test_every_layer_is_somewhere_once(layers, pp, virtual_pp):
    plan = Plan(pp=pp, virtual_pp=virtual_pp)
    if pp * virtual_pp > layers + 2:
        assert "use at most" in line_of(layers, plan)
        return
    chunks = all_chunks(model(layers), plan)
    assert [layer for chunk in chunks for layer in chunk.layers] == [*range(layers)]
    assert [chunk.embedding for chunk in chunks] == [True, *[False] * (len(chunks) - 1)]
    assert [chunk.loss for chunk in chunks] == [*[False] * (len(chunks) - 1), True]
    assert all(chunk.layers or chunk.embedding or chunk.loss for chunk in chunks)
    slots = layers % len(chunks) != 0 and (layers + 2) % len(chunks) == 0
    stages = [
        sum(len(c.layers) + slots * (c.embedding + c.loss) for c in stage) for stage in chunks_of(model(layers), plan)
    ]
    assert max(stages) - min(stages) <= (not slots)


@pytest.mark.parametrize(
    ("text", "held"),
    [
        ("Et3/t4/t4/t3L", [3, 4, 4, 3]),
        ("Ettt/tttt/tttt/tttL", [3, 4, 4, 3]),
        ("Et*3|(tt|)*29,t|L", [3, *[2] * 29, 1, 0]),  # the form of Megatron-LM's own comment
        ("E|(tt|)*2t*2L", [0, 2, 2, 2]),
        ("E(t/)3 t L", [1, 1, 1, 1]),
        ("E((t/)2t/)*2L", [1, 1, 1, 1, 1, 1, 0]),
        ("EL", [0]),
    ],
)
def test_layouts(text, held):
    assert layers_of_chunks(text) == held


def test_a_layout_says_what_chunks_hold():
    plan = Plan(pp=2, virtual_pp=2, pp_layout="E/t3/t/L")
    assert chunks_of(model(4), plan) == (
        (Chunk(range(0), embedding=True, loss=False), Chunk(range(3, 4), embedding=False, loss=False)),
        (Chunk(range(3), embedding=False, loss=False), Chunk(range(4, 4), embedding=False, loss=True)),
    )


def test_a_layout_keeps_its_capitals():
    assert parse_plan("PP=2,pp_layout=Et3/tL").pp_layout == "Et3/tL"


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", ["chunk 1 holds nothing"]),
        ("tt/ttL", ["chunk 1 is 'tt'", "begin the first with E"]),
        ("Et/ttt", ["chunk 2 is 'ttt'", "end the last with L"]),
        ("EtL/ttL", ["chunk 1 is 'EtL'"]),
        ("Et/Ettt", ["chunk 2 is 'Ettt'"]),
        ("Et/tmL", ["has 1 m, but the model has mtp_layers = 0"]),
        ("Et/txL", ["'x'", "E embedding, t layer, L loss"]),
        ("et/ttL", ["'e'"]),
        ("Ett//ttL", ["chunk 2 holds nothing"]),
        ("3Et/tL", ["3 repeats nothing"]),
        ("E(tt/tL", ["not closed"]),
        ("Ett)/tL", ["')'"]),
        ("E(((t99)99)99)99/L", ["99 makes over 65536 parts"]),
        ("Et²/tL", ["'²'"]),
        ("Ett/t/tL", ["has 3 chunks", "pp x virtual_pp = 2"]),
        ("Et/t/t/tL", ["has 4 chunks", "virtual_pp=2"]),
        ("Et/ttL", ["has 3 layers", "the model has 4", "write 4 t"]),
    ],
)
def test_a_layout_that_is_none_says_why(text, parts):
    line = line_of(4, Plan(pp=2, pp_layout=text))
    assert line.startswith("plan: pp_layout = ")
    for part in parts:
        assert part in line


def test_more_chunks_than_model():
    assert line_of(4, "pp=7") == (
        "plan: pp x virtual_pp = 7 chunks are more than layers + 2 = 6, of which embedding and loss are one each; "
        "use at most 6"
    )
