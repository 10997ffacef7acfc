"""Pages of results: what they say and draw is what the results are, and nothing is loaded from elsewhere."""

import json
from html import unescape
from html.parser import HTMLParser

import pytest

import spsim
from spsim import InputError
from spsim.cli import main
from spsim.report.comparison import comparison_lines
from spsim.report.page.assumptions import assumption_tables
from spsim.report.page.stacks import memory_chart, time_chart
from spsim.report.page.timeline import timeline_chart
from spsim.report.verdict import verdict
from spsim.studies.comparison import PlanComparison
from spsim.studies.plan_accounts import PlanAccount

H100 = "dgx-h100"
PLANS = ("tp=8", "tp=8,sequence_parallel", "ulysses=8,zero=1")
EVIL = "<script>alert(1)</script> & <b>bold</b> \"'"
MOST_BYTES = 6e6


def compared(*plans, model="llama-3-8b", seq_len=8192, hardware=H100, **further):
    return spsim.compare(plans, hardware=hardware, model=model, workload={"seq_len": seq_len}, **further)


@pytest.fixture(scope="module")
def three():
    return compared(*PLANS)


@pytest.fixture(scope="module")
def page(three, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "page.html"
    three.to_html(path)
    return path.read_text(encoding="utf-8")


class Elements(HTMLParser):
    """Tags with their attributes, and the texts of some."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.texts, self._open = [], {}, []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self._open.append(tag)

    def handle_data(self, data):
        if self._open:
            self.texts.setdefault(self._open[-1], []).append(data.strip())

    def handle_endtag(self, tag):
        while self._open and self._open.pop() != tag:
            pass


def charts_of(page):
    return json.loads(page.partition('<script type="application/json" id="charts">')[2].partition("</script>")[0])


@pytest.mark.slow
def test_a_page_loads_nothing(page):
    """No element names a place but inside the page, and the policy lets a browser ask for none."""
    elements = Elements(page)
    for tag, attributes in elements.tags:
        assert tag not in ("img", "iframe", "object", "embed", "base", "form", "audio", "video"), tag
        assert not {"src", "srcset", "action", "data", "poster"} & {*attributes}, (tag, attributes)
        assert attributes.get("href", "data:,") == "data:,"
    (policy,) = (own["content"] for tag, own in elements.tags if own.get("http-equiv") == "Content-Security-Policy")
    allowed = dict(part.split(maxsplit=1) for part in policy.split("; "))
    assert allowed.pop("default-src") == "'none'"
    sources = {source for listed in allowed.values() for source in listed.split()}
    assert sources == {"'unsafe-inline'", "data:", "blob:"}
    css = page.partition("<style>")[2].partition("</style>")[0]
    assert "url(" not in css
    assert "@import" not in css
    assert len(page.encode()) < MOST_BYTES


def test_the_answer_stands_at_the_top(page, three):
    paragraphs = [text for text in Elements(page).texts["p"] if text]
    assert paragraphs[1] == verdict(three)[0]
    assert page.index(verdict(three)[0].split(":")[0]) < page.index("<h2>")


def faster(comparison):
    return verdict(comparison)[0]


def test_a_plan_that_is_faster_is_named_with_how_much_and_why_it_is_no_tie():
    workload = {"seq_len": 2048, "micro_batch": 4}
    found = spsim.compare(["tp=8", "TP8+SP"], hardware="dgx-a100-80gb", model="gpt-22b", workload=workload)
    tp, sp = (account.result.step_time_s for account in found.accounts)
    assert sp < tp
    assert faster(found).startswith(f"TP8+SP is {100 * (1 - sp / tp):.1f} % faster than TP8: its step takes")
    assert "no tie" in faster(found)
    assert "1.0 %" in faster(found)  # the band of sequence parallelism


def test_plans_within_the_band_are_a_tie():
    found = compared("tp=8", "ring=8,zero=1", seq_len=32768)
    lead = abs(found.differences[0].step_percent)
    band = found.differences[0].band.percent
    assert lead < band
    assert "are a tie" in faster(found)
    assert f"±{band:.1f} %" in faster(found)
    assert "faster" not in faster(found)


def test_what_does_not_fit_is_not_the_answer():
    """Of plans the fastest that fits: at 256K tokens TP alone does not, whatever its time."""
    found = compared("tp=8", "tp=8,sequence_parallel", seq_len=262144)
    assert [account.result.fits for account in found.accounts] == [False, False]
    assert verdict(found)[1].startswith("Neither of the plans fits")
    only = compared("tp=8", "tp=8,sequence_parallel,recompute=full", seq_len=262144)
    tp, full = (account.result for account in only.accounts)
    assert (tp.fits, full.fits) == (False, True)
    assert tp.step_time_s < full.step_time_s
    assert faster(only).startswith("Only TP8+SP")
    assert verdict(only)[1] == (
        f"TP8 does not fit in the memory of a GPU: {tp.device_memory_gib:.1f} of {tp.capacity_gib:.1f} GiB."
    )


def test_the_terminal_too_answers_of_plans_that_fit_and_says_which_shorter_one_does_not():
    """TP alone has the shorter step and does not fit; where neither fits nothing stands before."""
    found = compared("tp=8", "tp=8,sequence_parallel,recompute=full", seq_len=262144)
    assert found.fastest == (found.accounts[1].name,)
    assert comparison_lines(found)[0] == f"Only {found.accounts[1].name} fits. TP8 would be shorter, but does not fit."
    none = compared("tp=8", "tp=8,sequence_parallel", seq_len=262144)
    assert none.fastest[0] == "TP8"
    assert comparison_lines(none)[0].startswith("TP8+SP ")


def test_one_plan_has_its_step_and_room(three):
    result = three.accounts[1].result
    sentence = faster(PlanComparison(three.accounts[1:2]))
    assert f"{result.step_time_s * 1e3:.3f} ms" in sentence
    free = result.capacity_gib - result.device_memory_gib
    assert f"fits: {result.device_memory_gib:.1f} of {result.capacity_gib:.1f} GiB of a GPU, {free:.1f} GiB" in sentence


def test_bars_add_up_to_steps_and_memory(three):
    """Each bar is as long as the step, or as the memory of the device."""
    results = [account.result for account in three.accounts]
    for chart, totals in (
        (time_chart(three.accounts), [result.step_time_s * 1e3 for result in results]),
        (memory_chart(three.accounts), [result.device_memory_gib for result in results]),
    ):
        assert [sum(sizes) for sizes in zip(*(own["x"] for own in chart["data"]), strict=True)] == pytest.approx(totals)
    (line,) = memory_chart(three.accounts)["layout"]["shapes"]
    assert line["x0"] == line["x1"] == results[0].capacity_gib


@pytest.mark.slow
def test_the_timeline_has_every_kernel_and_collective():
    """Of one rank and a step short enough to be shown whole: the bars are its spans."""
    model = {"preset": "llama-3-8b", "layers": 2}
    scenario = spsim.Scenario(hardware=H100, model=model, plan="tp=8,recompute=full", workload={"seq_len": 4096})
    result = spsim.simulate(scenario)
    chart, shown = timeline_chart([PlanAccount("TP8", "tp=8", result)])
    assert shown == "rank 0 of 8, all 2 layers, 1 micro-batch"
    spans = result.spans
    spans = spans[(spans["rank"] == 0) & (spans["duration_us"] > 0)]
    drawn = sorted(
        (begin, length)
        for own in chart["data"]
        if "waiting" not in own["name"] and "other" not in own["name"]
        for begin, length in zip(own["base"], own["x"], strict=True)
    )
    expected = sorted(zip(spans["start_us"] / 1e3, spans["duration_us"] / 1e3, strict=True))
    assert [value for bar in drawn for value in bar] == pytest.approx([v for bar in expected for v in bar], abs=1e-6)
    recomputed = [own for own in chart["data"] if own["name"].startswith("recomputed")]
    assert sum(len(own["x"]) for own in recomputed) == (spans["part"] == "recompute").sum() > 0


def test_windows_of_the_timeline_are_passes_of_the_first_layer(three):
    chart, _ = timeline_chart(three.accounts)
    ranges = {own["name"]: own["range"] for own in chart["windows"]}
    for account in three.accounts:
        begin, end = ranges[f"layer 0 backward, {account.name}"]
        assert (end - begin) / 1.1 == pytest.approx(account.result.layer_backward_s * 1e3)
    assert ranges["whole step"] == [0, max(a.result.step_time_s for a in three.accounts) * 1e3]


def test_memory_over_time_reaches_the_peak(page, three):
    charts = [chart for chart in charts_of(page) if chart["data"][0]["type"] == "scatter"]
    assert len(charts) == len(three.accounts)
    for chart, account in zip(charts, three.accounts, strict=True):
        totals = [sum(held) for held in zip(*(own["y"] for own in chart["data"]), strict=True)]
        assert max(totals) == pytest.approx(account.result.peak_memory_gib, abs=1e-3)


def test_assumptions_are_all_of_the_result(page, three):
    cells = Elements(page).texts["td"]
    for account in three.accounts:
        assert {*account.result.assumed} <= {*cells}
    profile = spsim.load_profile(H100)
    moved = {"inherited": profile.assumed & {"power_share"}, "assumed": profile.assumed - {"power_share"}}
    inherited = compared("tp=8", "tp=8,sequence_parallel", hardware=profile.model_copy(update=moved))
    assert inherited.accounts[0].result.inherited == ("power_share",)
    assumed, sources = assumption_tables(inherited.accounts)
    paths, kinds = ([*column.cells] for column in assumed.columns[:2])
    for account in inherited.accounts:
        for kind in ("assumed", "inherited"):
            assert all(kinds[paths.index(path)] == kind for path in getattr(account.result, kind))
    assert all(sources.columns[1].cells)


def test_what_a_user_states_is_text(tmp_path):
    """Tags in names are shown, in the page and by plotly.js, which would read them too; nothing ends a script."""
    model = {**spsim.load_model("llama-3-8b").model_dump(), "name": EVIL, "layers": 2}
    result = spsim.simulate(spsim.Scenario(hardware=H100, model=model, plan="tp=2", workload={"seq_len": 2048}))
    result.to_html(tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "alert(1)</script>" not in page
    assert f"{EVIL} on {H100}" in unescape(page)
    assert Elements(page).texts["h1"] == [f"{EVIL} on {H100}"]
    assert "<b>" not in result._repr_html_().replace("<br>", "")


def test_names_of_plans_are_text_for_plotly():
    """Which would make a tag of a name bold; in a chart `<` is its entity."""
    result = spsim.simulate(spsim.Scenario(hardware=H100, model="llama-3-8b", plan="tp=8", workload={"seq_len": 2048}))
    account = PlanAccount("<i>TP</i>", "tp=8", result)
    (note,) = time_chart([account])["layout"]["annotations"]
    assert note["text"].startswith("<b>&lt;i&gt;TP&lt;/i&gt;</b>")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("plan", "further"),
    [
        ("tp=4,sequence_parallel,pp=2,recompute=full", {"global_batch": 8}),
        ("ring=4,ring_cut=contiguous", {}),
        ("tp=8,dp=2,distributed_optimizer", {"global_batch": 4}),
    ],
)
def test_pages_of_all_kinds_of_steps(plan, further, tmp_path):
    workload = {"seq_len": 8192, **further}
    result = spsim.simulate(spsim.Scenario(hardware=H100, model="llama-3-8b", plan=plan, workload=workload))
    result.to_html(tmp_path / "page.html")
    names = {own["name"] for chart in charts_of((tmp_path / "page.html").read_text()) for own in chart["data"]}
    assert {"gemm", "attention", "weights", "activations"} <= names
    assert ("waiting for another stage" in names) == ("pp" in plan)
    assert "waiting for peers" in names or "contiguous" not in plan


ARGUMENTS = ["--model", "llama-3-8b", "--hardware", H100, "--seq-len", "2048", "--plan", "tp=8"]


def status_of(arguments):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    return stop.value.code


@pytest.mark.slow
def test_commands_write_pages(tmp_path, capsys):
    path = tmp_path / "run.html"
    assert status_of(["run", *ARGUMENTS, "--report", str(path)]) == 0
    assert capsys.readouterr().out.endswith(f"report: {path}\n")
    assert "Under TP8 a step takes" in path.read_text()
    assert status_of(["compare", *ARGUMENTS, "--plan", "TP8+SP", "--report", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["fastest"]
    assert "TP8+SP" in path.read_text()


@pytest.mark.parametrize(
    ("name", "message"),
    [("report.pdf", "a report is a page; end its name in .html"), ("no/where.html", "no' is no directory")],
)
@pytest.mark.parametrize("command", ["run", "compare"])
def test_a_report_that_cannot_be_is_one_line(command, name, message, tmp_path, capsys):
    more = ["--plan", "TP8+SP"] if command == "compare" else []
    assert status_of([command, *ARGUMENTS, *more, "--report", str(tmp_path / name)]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_an_emission_has_no_report(tmp_path, capsys):
    assert status_of(["run", *ARGUMENTS, "--emit", "megatron", "--report", str(tmp_path / "page.html")]) == 2
    assert "leave --json, --out and --report out" in capsys.readouterr().err


EXPERIMENT = """
import spsim

def build():
    points = [
        {"hardware": "dgx-h100", "model": model, "plan": plan, "workload": {"seq_len": seq_len}}
        for model in ("llama-3-8b", {"preset": "llama-3-8b", "layers": 4})
        for seq_len in (8192, 262144)
        for plan in ("tp=8", "tp=8,sequence_parallel", "tp=8,recompute=full")
    ]
    return spsim.Experiment(name="small", title="A <small> sweep", points=points, quick=points,
                            tables=lambda frame: ["what it says"])
"""


@pytest.mark.slow
def test_a_sweep_has_a_page(tmp_path, monkeypatch):
    """Its cases are models and lengths; the answer counts the winners that the rows have."""
    import pandas as pd

    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.py").write_text(EXPERIMENT)
    assert status_of(["small.py", "--report", "page.html"]) == 0
    page = (tmp_path / "page.html").read_text()
    assert Elements(page).texts["h1"] == ["A <small> sweep"]
    assert "what it says" in page
    frame = pd.read_csv(tmp_path / "results" / "small" / "small.csv")
    times, memory = (
        [chart for chart in charts_of(page) if unit in chart["layout"]["xaxis"]["title"]["text"]]
        for unit in ("ms per 1K", "GiB")
    )
    assert len(times) == len(memory) == 2
    for chart, (_, rows) in zip(times, frame.groupby("model", sort=False), strict=True):
        bars = [sum(sizes) for sizes in zip(*(own["x"] for own in chart["data"]), strict=True)]
        size = rows["step_time_ms"].where(rows["fits"], rows["device_memory_gib"])
        best = rows.assign(out=~rows["fits"], size=size).sort_values(["out", "size"])
        expected = best.groupby(["seq_len", "strategy"], sort=False).head(1)
        expected = 1024 * 1e3 / (expected["tokens_per_s_per_gpu"] * expected["gpus"])
        assert sorted(bars) == pytest.approx(sorted(expected), rel=1e-3)
    drawn = [sum(sizes) for chart in memory for sizes in zip(*(own["x"] for own in chart["data"]), strict=True)]
    assert set(drawn) <= {round(size, 4) for size in frame["device_memory_gib"]}


@pytest.mark.slow
def test_a_page_of_many_fits_its_size(tmp_path):
    """A step of 96 layers under several plans."""
    plans = ("tp=8", "tp=8,sequence_parallel", "tp=8,recompute=full", "ulysses=8,zero=3")
    compared(*plans, model="gpt-175b", seq_len=2048).to_html(tmp_path / "page.html")
    assert (tmp_path / "page.html").stat().st_size < MOST_BYTES


def test_a_report_needs_a_path_of_a_file(three, tmp_path):
    with pytest.raises(InputError, match="cannot write"):
        three.to_html(tmp_path / "no" / "page.html")


# ------------------------------------------------------------ steps under perturbations

SLOW = """
[[perturbations]]
ranks = [1]
factor = 1.5
"""
JITTER = """
[[perturbations]]
distribution = "lognormal"
spread = 0.1
"""


@pytest.mark.slow
@pytest.mark.parametrize(("text", "seeds"), [(SLOW, 1), (SLOW + JITTER, 12)])
def test_a_page_of_perturbed_steps_says_what_they_cost_and_who_is_to_blame(text, seeds, tmp_path, capsys):
    """Its figures are those of the document."""
    file, page = tmp_path / "slow.toml", tmp_path / "page.html"
    file.write_text(text)
    given = [*ARGUMENTS, "--set", "model.layers=2", "--perturb", str(file), "--report", str(page), "--json"]
    assert status_of(["run", *given, *(["--seeds", str(seeds)] if seeds > 1 else [])]) == 0
    found = json.loads(capsys.readouterr().out)["perturbed"]
    written = page.read_text(encoding="utf-8")
    answer = Elements(written).texts["p"][1]
    assert f"{found['after_ms']['mean_ms']:.3f} ms" in answer
    assert f"{found['before_ms']:.3f} ms" in answer
    assert ("of 12 seeds" in answer.lower()) == (seeds > 1)
    bars = {trace["name"]: trace for chart in charts_of(written) for trace in chart["data"]}
    if seeds > 1:
        assert f"{found['after_ms']['p95_ms']:.3f} ms" in answer
        assert sum(bars["seeds"]["y"]) == seeds
    blame, _ = (own for chart in charts_of(written) for own in chart["data"] if own["name"] == "lost time")
    shares = [own["lost_ms"] for own in found["blame"]["by_rank"]]
    assert blame["x"] == pytest.approx(shares[: len(blame["x"])], abs=1e-5)
    assert blame["customdata"][0].startswith("rank 1, ")
