"""Pictures of whole steps show what the result says, and are readable."""

import re

import pytest

from spsim import plots
from spsim.results.waterfall import BELOW_PEAK, IDEAL, REST, noticeable
from tests.cases import H100, result
from tests.test_plots import assert_readable, drawn_texts

STEP = {"hardware": H100, "scope": "step", "global_batch": 8, "seq_len": 4096, "hidden": 2048}
ONE = result("tp=2,pp=2", layers=4, **STEP)
OTHER = result("tp=2,sequence_parallel,recompute=full", layers=4, **STEP)


def bars_of(axes):
    """(left, right) of the bars from top to bottom, in the unit of the axis."""
    return [(bar.get_x(), bar.get_x() + bar.get_width()) for bar in axes.patches]


def names_of(axes):
    """Texts that name a bar, from top to bottom."""
    names = {*ONE.waterfall, *OTHER.waterfall, REST, "step"}
    return [text.get_text() for text in axes.texts if text.get_text() in names]


def test_parts_that_are_small_in_every_step_are_one():
    """1,000 s and 2,000 s: the limit is 5 s and 10 s. What is large in one is told of both, longest first."""
    falls = (
        {IDEAL: 400.0, BELOW_PEAK: 100.0, "a": 490.0, "b": 6.0, "c": 4.0},
        {IDEAL: 400.0, BELOW_PEAK: 100.0, "d": 1485.0, "b": 6.0, "c": 9.0},
    )
    assert [[*own.items()] for own in noticeable(falls)] == [
        [(IDEAL, 400), (BELOW_PEAK, 100), ("d", 0), ("a", 490), ("b", 6), (REST, 4)],
        [(IDEAL, 400), (BELOW_PEAK, 100), ("d", 1485), ("a", 0), ("b", 6), (REST, 9)],
    ]
    assert noticeable([{IDEAL: 1.0, "a": 2.0}]) == [{IDEAL: 1.0, "a": 2.0}]


def test_bars_lead_from_ideal_flops_to_the_step():
    figure = plots.plot_steps({"one": ONE})
    (axes,) = figure.axes
    (parts,) = noticeable([ONE.waterfall])
    *bars, step = bars_of(axes)
    assert bars[0][0] == 0
    assert step == pytest.approx((0, ONE.step_time_s * 1e3))
    assert [right for _, right in bars[:-1]] == pytest.approx([left for left, _ in bars[1:]])
    assert [right - left for left, right in bars] == pytest.approx([1e3 * took for took in parts.values()])
    assert bars[-1][1] == pytest.approx(step[1])
    assert names_of(axes) == [*parts, "step"]
    shares = [float(found[1]) for text, _ in drawn_texts(figure) if (found := re.search(r"\(([\d.]+) %\)", text))]
    assert shares == pytest.approx([100 * took / ONE.step_time_s for took in parts.values()], abs=0.051)


def test_plans_stand_side_by_side_on_one_scale():
    figure = plots.plot_steps({"one": ONE, "other": OTHER})
    left, right = figure.axes
    assert left.get_xlim() == right.get_xlim()
    assert left.get_position().y0 == right.get_position().y0
    for axes, own in zip(figure.axes, (ONE, OTHER), strict=True):
        assert bars_of(axes)[-1] == pytest.approx((0, own.step_time_s * 1e3))
    assert len(bars_of(left)) == len(bars_of(right))
    assert names_of(left) == names_of(right)


LONG = "tp=8,sequence_parallel,recompute=selective,ring_cut=zigzag,distributed_optimizer,dp_overlap,virtual_pp=2"


@pytest.mark.parametrize("names", [("one",), ("one", "other"), (LONG, LONG + "2", "third")])
def test_pictures_of_steps_are_readable(names):
    assert_readable(plots.plot_steps(dict(zip(names, (ONE, OTHER, ONE), strict=False))))
