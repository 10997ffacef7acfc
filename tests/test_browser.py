"""Pages in a real browser without a network, at the widths of a desk and of a telephone."""

import shutil

import pytest

import spsim

pytestmark = [pytest.mark.browser, pytest.mark.slow]
sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install -e .[browser]")

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WIDTHS = {"desk": (1280, 800), "telephone": (390, 844)}
READY = "body[data-ready=yes]"
EVIL = "<img src=x onerror=alert(1)> & <b>bold</b>"
H100 = "dgx-h100"
MOST_SECONDS = 2.0


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """A step of 96 layers, three plans beside each other, and a model with a name that would run."""
    directory = tmp_path_factory.mktemp("pages")
    plan = {"hardware": H100, "plan": "tp=8,sequence_parallel", "workload": {"seq_len": 2048}}
    spsim.simulate(spsim.Scenario(model="gpt-175b", **plan)).to_html(directory / "run.html")
    evil = {**spsim.load_model("llama-3-8b").model_dump(), "name": EVIL, "layers": 2}
    spsim.simulate(spsim.Scenario(model=evil, **plan)).to_html(directory / "evil.html")
    plans = ("tp=8", "tp=8,sequence_parallel,recompute=selective,recompute_modules=mlp+layernorm", "ulysses=8,zero=1")
    compared = spsim.compare(plans, hardware=H100, model="llama-3-8b", workload={"seq_len": 32768})
    compared.to_html(directory / "compare.html")
    return directory


class Opened:
    """A page, and what it said and asked for."""

    def __init__(self, browser, path, width="desk"):
        across, down = WIDTHS[width]
        self.page = browser.new_page(viewport={"width": across, "height": down})
        self.said, self.asked = [], []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("dialog", lambda dialog: self.said.append(dialog.message))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.session = self.page.context.new_cdp_session(self.page)
        self.session.send("Performance.enable", {"timeDomain": "threadTicks"})
        self.url = path.as_uri()
        self.page.goto(self.url)
        self.page.wait_for_selector(READY)

    def seconds(self):
        """Of CPU that its main thread took."""
        metrics = self.session.send("Performance.getMetrics")["metrics"]
        return next(metric["value"] for metric in metrics if metric["name"] == "TaskDuration")


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ["run", "compare"])
def test_a_page_is_whole_and_quiet(browser, pages, name, width):
    """The answer, charts with something in them, tables; no error, no request, and nothing wider than the window."""
    opened = Opened(browser, pages / f"{name}.html", width)
    page = opened.page
    assert page.locator(".verdict").inner_text()
    heights = [heading.bounding_box()["y"] for heading in page.locator(".verdict, h2").all()]
    assert heights == sorted(heights)
    assert heights[0] < WIDTHS[width][1]
    charts = page.locator(".chart")
    assert charts.count() == (4 if name == "run" else 6)
    for chart in charts.all():
        assert chart.locator(".bars path, .scatterlayer path").count() > 0
        box = chart.locator(".main-svg").first.bounding_box()
        assert box["width"] > 0.85 * WIDTHS[width][0]
    assert page.locator("table").first.is_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= WIDTHS[width][0]
    assert opened.said == []
    assert opened.asked == [opened.url]
    page.close()


def test_a_page_of_96_layers_opens_in_two_seconds(browser, pages):
    path = pages / "run.html"
    assert path.stat().st_size < 6e6
    times = []
    for _ in range(2):
        opened = Opened(browser, path)
        assert opened.page.locator(".windows + .chart .bars .point").count() > 3500
        times.append(opened.seconds())
        opened.page.close()
    assert min(times) < MOST_SECONDS


def test_the_timeline_zooms_and_says_what_bars_are(browser, pages):
    opened = Opened(browser, pages / "compare.html")
    page, chart = opened.page, opened.page.locator(".windows + .chart")
    assert chart.locator(".bartext").count() == 0
    page.get_by_role("button", name="layer 0 forward").click()
    chart.locator(".bartext", has_text="attention").first.wait_for()
    assert chart.locator(".bartext", has_text="reduce-scatter").count() > 0
    begin, end = page.evaluate("document.querySelector('.windows + .chart').layout.xaxis.range")
    assert 0 < end - begin < 20
    chart.scroll_into_view_if_needed()
    box = chart.locator(".bartext", has_text="attention").first.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    label = chart.locator(".hoverlayer .hovertext")
    label.wait_for()
    assert "attention (forward), layer 0, micro-batch 0" in label.text_content()
    area = chart.locator(".nsewdrag").first.bounding_box()
    page.mouse.move(area["x"] + 0.2 * area["width"], area["y"] + 20)
    page.mouse.down()
    page.mouse.move(area["x"] + 0.4 * area["width"], area["y"] + 20, steps=5)
    page.mouse.up()
    closer = page.evaluate("document.querySelector('.windows + .chart').layout.xaxis.range")
    assert closer[1] - closer[0] == pytest.approx(0.2 * (end - begin), rel=0.05)
    page.get_by_role("button", name="whole step").click()
    chart.locator(".bartext").first.wait_for(state="detached")
    assert opened.said == []
    page.close()


def test_what_a_user_states_runs_nothing(browser, pages):
    opened = Opened(browser, pages / "evil.html")
    assert opened.page.locator("h1").inner_text() == f"{EVIL} on {H100}"
    assert opened.page.locator("img, h1 b").count() == 0
    assert opened.said == []
    assert opened.asked == [opened.url]
    opened.page.close()


def test_a_folded_part_opens(browser, pages):
    opened = Opened(browser, pages / "compare.html", "telephone")
    folded = opened.page.locator("details", has_text="Figures of the plans")
    assert not folded.locator("table").is_visible()
    folded.locator("summary").click()
    assert folded.locator("table").is_visible()
    assert opened.page.evaluate("document.documentElement.scrollWidth") <= WIDTHS["telephone"][0]
    opened.page.close()
