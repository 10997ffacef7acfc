"""What a notebook or a prompt shows of results: a line, a fragment, and figures that need no path."""

import subprocess
import sys
from html.parser import HTMLParser

import pytest
from matplotlib.figure import Figure

import spsim
from spsim import plots

H100 = "dgx-h100"
CASE = {"hardware": H100, "model": "llama-3-8b", "workload": {"seq_len": 8192}}
LONG = "tp=4,sequence_parallel,pp=2,dp=2,distributed_optimizer,recompute=selective,recompute_modules=mlp+layernorm"
MOST = 500


@pytest.fixture(scope="module")
def compared():
    return spsim.compare(["tp=8", "tp=8,sequence_parallel", "ulysses=8"], **CASE)


@pytest.fixture(scope="module")
def staged():
    return spsim.simulate(spsim.Scenario(**{**CASE, "workload": {"seq_len": 8192, "global_batch": 8}}, plan=LONG))


@pytest.mark.slow
def test_one_line_says_what_was_found(compared, staged):
    result = compared.accounts[0].result
    line = repr(result)
    assert line == (
        f"Result(llama-3-8b on {H100}, TP8: {result.step_time_s * 1e3:.3f} ms, "
        f"{result.device_memory_gib:.1f} of {result.capacity_gib:.1f} GiB, fits)"
    )
    perturbed = spsim.perturb(staged.scenario, [{"ranks": rank, "factor": 1.5} for rank in range(16)])
    workload = {"seq_len": 8192, "global_batch": 8}
    found = spsim.plan_search(**{**CASE, "workload": workload}, gpus=8, values={"pp": [1], "micro_batch": [1]})
    for one in (perturbed, found, spsim.explain("llama-3-8b", LONG, workload), *found.best):
        assert len(repr(one)) < MOST, repr(one)
        assert repr(one).startswith(type(one).__name__)
    many = spsim.compare([f"tp={tp},recompute={how}" for tp in (2, 4, 8) for how in ("none", "full")], **CASE)
    shown = (result, staged, compared, many, *many.accounts, *many.differences, result.trace, result.scenario)
    for one in (*shown, staged.scenario, result.scenario.plan, result.scenario.hardware, result.scenario.model):
        assert len(repr(one)) < MOST, repr(one)
        assert "\n" not in repr(one)


def test_a_name_of_any_length_leaves_one_line():
    model = {**spsim.load_model("llama-3-8b").model_dump(), "name": "a name of many words " * 50}
    assert len(repr(spsim.simulate(spsim.Scenario(**{**CASE, "model": model}, plan="tp=8")))) < MOST


def test_settings_are_shown_as_far_as_they_are_no_defaults():
    plan = spsim.Plan(tp=8, sequence_parallel=True)
    assert repr(plan) == "Plan(tp=8, sequence_parallel=True)"
    assert eval(repr(plan), {"Plan": spsim.Plan}) == plan
    assert repr(spsim.load_profile(H100)) == f"HardwareProfile('{H100}')"


class Cells(HTMLParser):
    """The cells of tables, and whether tags are closed."""

    def __init__(self, text):
        super().__init__()
        self.cells, self.open = [], []
        self.feed(text)

    def handle_starttag(self, tag, _):
        self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "td":
            self.cells.append(data)


def test_a_fragment_has_the_answer_and_the_figures(compared):
    result = compared.accounts[1].result
    for shown, figures in ((compared, ["TP8", "TP8+SP", "Ulysses 8"]), (result, ["step time"])):
        fragment = shown._repr_html_()
        found = Cells(fragment)
        assert found.open == []
        assert {*figures} <= {*found.cells}
        assert f"{result.step_time_s * 1e3:.3f} ms" in found.cells
        assert "<script" not in fragment


@pytest.mark.slow
def test_figures_need_no_path(compared, staged, tmp_path):
    """And where one is given, they are written and returned."""
    result = compared.accounts[0].result
    draws = (
        result.plot_timeline, result.plot_memory, result.plot_step, staged.plot_pipeline, compared.plot_waterfalls,
        compared.plot_steps, compared.plot_timelines, compared.plot_memory_curves,
    )  # fmt: skip
    for draw in draws:
        assert isinstance(draw(), Figure), draw
    path = tmp_path / "memory.png"
    assert isinstance(result.plot_memory(path), Figure)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_a_notebook_shows_figures_as_pictures(compared):
    """Without pyplot and without a backend: IPython asks an object for its PNG."""
    assert compared.accounts[0].result.plot_memory()._repr_png_().startswith(b"\x89PNG")


def test_a_sweep_is_drawn_as_it_is():
    plans = ("tp=8", "tp=8,sequence_parallel")
    frame = spsim.sweep([{**CASE, "plan": plan, "workload": {"seq_len": n}} for plan in plans for n in ("8K", "16K")])
    for draw in (spsim.plots.plot_step_times, spsim.plots.plot_peak_memory):
        assert draw(frame).axes


@pytest.mark.slow
def test_pictures_are_public_and_load_when_asked_for():
    code = """
import sys, spsim
assert spsim.plots.__all__ and "matplotlib" not in sys.modules
assert spsim.plots.plot_memory and "matplotlib" in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    for name in plots.__all__:
        assert getattr(plots, name).__doc__, name
