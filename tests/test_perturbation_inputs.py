"""What perturbs a step, as users write it, and the one line that says what is wrong with it."""

import pytest

from spsim.errors import InputError
from spsim.inputs.perturbations import Jitter, Link, Perturbations, SlowLink, SlowRanks

FILE = """
[[perturbations]]
ranks = [3, 4]
factor = 1.5
from_s = 0.1
to_s = 0.5

[[perturbations]]
distribution = "lognormal"
spread = 0.05
seed = 7

[[perturbations]]
link = { node = 0, adapter = 3 }
factor = 2.0

[[perturbations]]
link = { node = 1 }
outage = true
to_s = 1
"""


def test_a_file_says_what_objects_say(tmp_path):
    path = tmp_path / "slow.toml"
    path.write_text(FILE)
    found = Perturbations.of(path)
    assert found.perturbations == (
        SlowRanks(ranks=[3, 4], factor=1.5, from_s=0.1, to_s=0.5),
        Jitter(distribution="lognormal", spread=0.05, seed=7),
        SlowLink(link=Link(node=0, adapter=3), factor=2.0),
        SlowLink(link={"node": 1}, outage=True, to_s=1),
    )
    assert Perturbations.of(list(found.perturbations)) == found == Perturbations.of(found)
    assert [len(own) for own in (found.slow_ranks, found.jitters, found.slow_links)] == [1, 1, 2]


def test_one_rank_a_list_and_a_range_are_ranks():
    every = [SlowRanks(ranks=ranks, factor=2).ranks for ranks in (1, [1], (1,), range(1, 2))]
    assert every == [(1,)] * 4


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"ranks": [0], "factor": 0}, "factor: Input should be greater than 0"),
        ({"ranks": [0], "factor": -2.0}, "got -2.0"),
        ({"ranks": [0]}, "factor: required"),
        ({"ranks": [], "factor": 2}, "ranks"),
        ({"ranks": [-1], "factor": 2}, "ranks"),
        ({"ranks": "all", "factor": 2}, "ranks"),
        ({"ranks": [0], "factor": float("nan")}, "factor"),
        ({"ranks": [0], "factor": 2, "from_s": 1, "to_s": 1}, "from_s = 1 is not before to_s = 1"),
        ({"ranks": [0], "factor": 2, "form_s": 1}, "did you mean from_s?"),
        ({"ranks": [0], "link": {"node": 0}, "factor": 2}, "ranks and link"),
        ({"factor": 2}, "none of them"),
        ({"distribution": "cauchy", "spread": 0.1}, "'lognormal', 'normal' or 'gamma'"),
        ({"distribution": "gamma", "spread": -1}, "spread"),
        ({"link": {"node": 0}, "factor": 2, "outage": True}, "either factor"),
        ({"link": {"node": 0}}, "either factor"),
        ({"link": {"node": 0}, "outage": True}, "never ends"),
        ({"link": {"node": 0, "adapter": 0, "gpu": 0}, "factor": 2}, "two links"),
        ({"link": {"adapter": 0}, "factor": 2}, "node: required"),
        ({"link": 3, "factor": 2}, "link"),
        (3, "is no table"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(table, words):
    with pytest.raises(InputError) as caught:
        Perturbations.of([table])
    assert words in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"ranks": [16], "factor": 2}, "rank 16 is none of the plan, which has 16"),
        ({"link": {"node": 2}, "factor": 2}, "node 2"),
        ({"link": {"node": 0, "gpu": 8}, "factor": 2}, "gpu 8"),
        ({"link": {"node": 0, "adapter": 8}, "factor": 2}, "adapter 8"),
    ],
)
def test_places_beyond_the_plan_are_refused(table, words):
    with pytest.raises(InputError, match=words):
        Perturbations.of(table).check(gpus=16, gpus_per_node=8)


@pytest.mark.parametrize("text", ["", "perturbation = 1", "perturbations = 3", "[[perturbations]]", "x = ["])
def test_a_file_without_perturbations_is_refused(tmp_path, text):
    path = tmp_path / "none.toml"
    path.write_text(text)
    with pytest.raises(InputError, match=r"none\.toml"):
        Perturbations.of(path)
