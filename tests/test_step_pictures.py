"""Pictures of whole steps show what the result says, and are readable."""

import re
from collections import defaultdict
from itertools import pairwise

import pytest

from spsim import InputError, plots
from spsim.cli import main
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
    figure = plots.plot_steps({"one": ONE, "two": OTHER})
    left, right = figure.axes
    assert left.get_xlim() == right.get_xlim()
    assert left.get_position().y0 == right.get_position().y0
    for axes, own in zip(figure.axes, (ONE, OTHER), strict=True):
        assert bars_of(axes)[-1] == pytest.approx((0, own.step_time_s * 1e3))
    assert len(bars_of(left)) == len(bars_of(right))
    assert names_of(left) == names_of(right)


LONG = "tp=8,sequence_parallel,recompute=selective,ring_cut=zigzag,distributed_optimizer,dp_overlap,virtual_pp=2"


@pytest.mark.slow
@pytest.mark.parametrize("names", [("one",), ("one", "two"), (LONG, LONG + "2", "third")])
def test_pictures_of_steps_are_readable(names):
    assert_readable(plots.plot_steps(dict(zip(names, (ONE, OTHER, ONE), strict=False))))


# ------------------------------------------------------------ pipelines

PIPES = {
    "1f1b": result("tp=2,pp=4", layers=8, **STEP),
    "interleaved": result("tp=2,pp=2,virtual_pp=2", layers=4, **STEP),
    "gpipe": result("pp=2,pp_schedule=gpipe,dp=2", layers=4, **STEP),
    "zero bubble": result("pp=2,virtual_pp=2,pp_schedule=zbv", layers=4, **STEP),
}
each_pipe = pytest.mark.parametrize("name", PIPES)
PASSES = ("forward", "backward", "input gradients", "weight gradients")


def rows_of(axes):
    """Look -> stage -> sorted (begin, end) of the bars, in ms."""
    found = defaultdict(lambda: defaultdict(list))
    for collection in axes.collections:
        for path in collection.get_paths():
            box = path.get_extents()
            found[collection.get_label()][round((box.y0 + box.y1) / 2)].append((box.x0, box.x1))
    return {look: {stage: sorted(bars) for stage, bars in rows.items()} for look, rows in found.items()}


@pytest.mark.slow
@each_pipe
def test_pictures_of_pipelines_are_readable(name):
    assert_readable(plots.plot_pipeline(PIPES[name]))


@pytest.mark.slow
@each_pipe
def test_every_pass_is_a_bar_and_the_rest_the_bubble(name):
    """Bars of a stage do not overlap; what neither passes nor transfers cover is the bubble of the result."""
    own = PIPES[name]
    (axes,) = plots.plot_pipeline(own).axes
    rows = rows_of(axes)
    uncovered = 0.0
    for stage in own.staged.stages:
        bars = sorted(bar for look in PASSES for bar in rows.get(look, {}).get(stage, []))
        expected = [s for s in own.staged.ran.times.passes if s.rank == stage and s.end_ps > s.start_ps]
        assert bars == [pytest.approx((s.start_ps / 1e9, s.end_ps / 1e9)) for s in expected]
        transfers = rows.get("transfer that stages wait for", {}).get(stage, [])
        ((begin, end),) = rows["bubble"][stage]
        assert begin == 0
        edges = sorted([*bars, *transfers])
        assert all(a[1] <= b[0] + 1e-9 for a, b in pairwise(bars))
        uncovered += end - sum(max(0.0, b - max(a, before)) for (a, b), before in zip(edges, reach(edges), strict=True))
    assert uncovered / len(own.staged.stages) / (own.step_time_s * 1e3) == pytest.approx(own.bubble, abs=1e-6)


def reach(bars):
    """Of each of some sorted bars, how far those before it reach."""
    far = 0.0
    for _, end in bars:
        yield far
        far = max(far, end)


def test_the_first_row_of_1f1b_is_its_order():
    """Stage 0 of 4 with 8 micro-batches: four forward passes, then one backward and one forward in turn, then drain."""
    (axes,) = plots.plot_pipeline(PIPES["1f1b"]).axes
    numbers = [text for text in axes.texts if text.get_text().isdigit() and text.get_position()[1] == 0]
    order = [int(text.get_text()) for text in sorted(numbers, key=lambda text: text.get_position()[0])]
    assert order == [0, 1, 2, 3, 0, 4, 1, 5, 2, 6, 3, 7, 4, 5, 6, 7]
    warm, drain = axes.lines
    assert list(warm.get_xdata())[::2] == pytest.approx(
        [begin for (begin, _), *_ in rows_of(axes)["backward"].values()]
    )
    assert list(drain.get_xdata())[::2] == pytest.approx([end for *_, (_, end) in rows_of(axes)["forward"].values()])
    assert [text.get_text() for text in axes.texts if not text.get_text().isdigit()] == [
        "warm-up",
        "steady state",
        "drain",
    ]


def test_later_chunks_are_paler():
    (axes,) = plots.plot_pipeline(PIPES["interleaved"]).axes
    colours = {tuple(c.get_facecolor()[0]) for c in axes.collections if c.get_label() == "forward"}
    assert len(colours) == 2
    (axes,) = plots.plot_pipeline(PIPES["1f1b"]).axes
    assert len({tuple(c.get_facecolor()[0]) for c in axes.collections if c.get_label() == "forward"}) == 1


def test_a_step_without_stages_has_no_such_picture():
    with pytest.raises(InputError, match="use plot_timeline"):
        plots.plot_pipeline(OTHER)


@pytest.mark.slow
@pytest.mark.parametrize(("plan", "drawn"), [("tp=2,pp=2", {"pipeline.png", "step.png"}), ("tp=2", {"step.png"})])
def test_run_writes_the_pictures_of_the_step(plan, drawn, tmp_path, capsys):
    """And tells of the stages where there are some."""
    arguments = ["--model", "llama-3-8b", "--hardware", H100, "--set", "model.layers=2", "--seq-len", "1K"]
    with pytest.raises(SystemExit) as stop:
        main(["run", *arguments, "--plan", plan, "--out", str(tmp_path)])
    assert stop.value.code == 0
    assert {path.name for path in tmp_path.glob("*.png")} == drawn | {"mapping.png", "memory.png", "timeline.png"}
    printed = capsys.readouterr().out
    assert "From ideal FLOPs to the step" in printed
    assert ("Peak of memory by stage" in printed) == ("pipeline.png" in drawn)
