"""Pictures show the spans and the memory of a result, and are readable: no text overlaps or leaves the figure."""

from collections import Counter
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text

import spsim
from spsim import InputError, MeasuredSpan, measured_trace, plots
from spsim.engine.recording import COMPUTE_LANE
from spsim.plots.figure import MARGIN, side_by_side
from tests.cases import A100, H100

pytestmark = pytest.mark.slow

PLANS = {
    "tp": "tp=8",
    "tp_sp": "tp=8,sequence_parallel",
    "full": "tp=8,recompute=full",
    "selective": "tp=8,sequence_parallel,recompute=selective",
    "ulysses": "ulysses=8",
    "ring": "ring=8",
    "contiguous": "ring=8,ring_cut=contiguous",
    "mixed": "tp=2,ulysses=2,ring=2,sequence_parallel,recompute=full",
}
PS_PER_MS = 10**9


def phase_of(part):
    """The pass that a part of the work belongs to."""
    return part if part in ("forward", "weight_sync") else "backward"


def simulated(name, *, layers=2, fold=True, **settings):
    """Two layers of the 22B GPT under TP, or of Llama 3 8B under the plans that shard the sequence."""
    gpt = PLANS[name].startswith("tp=8")
    model = spsim.load_model("gpt-22b" if gpt else "llama-3-8b").model_copy(update={"layers": layers})
    workload = {"seq_len": 2048, "micro_batch": 4} if gpt else {"seq_len": 32768}
    scenario = spsim.Scenario(
        hardware=A100 if gpt else H100, model=model, plan=PLANS[name], workload=workload | settings
    )
    return spsim.simulate(scenario, fold=fold)


RESULTS = {name: simulated(name) for name in PLANS}
each_plan = pytest.mark.parametrize("name", PLANS)


# ------------------------------------------------------------ readable


def drawn_texts(figure):
    """(text, box) of what a renderer draws; labels of ticks outside the limits are not drawn."""
    canvas = FigureCanvasAgg(figure)
    figure.draw_without_rendering()
    hidden = set()
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            slack = 1e-9 * (high - low)
            for ticks in (axis.get_major_ticks(), axis.get_minor_ticks()):
                hidden |= {
                    label
                    for tick in ticks
                    if not low - slack <= tick.get_loc() <= high + slack
                    for label in (tick.label1, tick.label2)
                }
    for text in figure.findobj(Text):
        if text.get_visible() and text.get_text().strip() and text not in hidden:
            box = Text.get_window_extent(text, canvas.get_renderer())
            yield text.get_text(), box


def assert_readable(figure):
    """Every text is inside the figure, and no two overlap by more than a hair."""
    texts = list(drawn_texts(figure))
    assert texts
    width, height = figure.bbox.width, figure.bbox.height
    for text, box in texts:
        assert box.x0 >= 0, f"{text!r} leaves the figure"
        assert box.y0 >= 0, f"{text!r} leaves the figure"
        assert box.x1 <= width, f"{text!r} leaves the figure"
        assert box.y1 <= height, f"{text!r} leaves the figure"
    for (one, a), (other, b) in combinations(texts, 2):
        across = min(a.x1, b.x1) - max(a.x0, b.x0)
        up = min(a.y1, b.y1) - max(a.y0, b.y0)
        assert across <= 0.5 or up <= 0.5, f"{one!r} overlaps {other!r}"


def sweep_frame(*, strategies=("TP only", "TP+SP", "Ulysses", "Ring"), lengths=(2048, 8192, 32768, 131072)):
    """Made-up rows with the columns of a sweep: two layers, a micro-batch for each of two replicas; the longest
    sequence fits under every second plan only.
    """
    rows = []
    for model in ("gpt-22b", "llama-3-8b"):
        for index, strategy in enumerate(strategies):
            for length in lengths:
                parts = {"gemm_ms": length / 1e3, "attention_ms": (length / 1e4) ** 2, "norm_ms": length / 1e5}
                parts |= {"softmax_ms": 0.0, "dropout_ms": 0.0, "elementwise_ms": length / 1e5}
                exposed = length / 1e4 * (index + 1)
                step = 2 * (sum(parts.values()) + exposed) + length / 1e4 + length / 1e5
                fits = length < 131072 or index % 2 == 1
                rows.append(
                    {
                        "model": model, "hardware": A100, "strategy": strategy, "seq_len": length, **parts,
                        "plan": "tp=4,dp=2", "gpus": 8, "layers": 2, "micro_batch": 1,
                        "exposed_comm_ms": exposed, "weight_sync_ms": length / 1e4, "optimizer_ms": length / 1e5,
                        "step_time_ms": step, "tokens_per_s_per_gpu": 2 * length / 8 / (step / 1e3),
                        "peak_memory_gib": 4 + length / 4e3,
                        "device_memory_gib": 6 + length / 1e3 * (2 - index % 2) / 2,
                        "capacity_gib": 80.0, "fits": fits,
                    }
                )  # fmt: skip
    return pd.DataFrame(rows)


def test_the_check_finds_overlaps_and_escapes():
    figure = plots.plot_timeline(RESULTS["tp"])
    figure.text(0.5, 0.5, "one")
    figure.text(0.5, 0.5, "two")
    with pytest.raises(AssertionError, match="overlaps"):
        assert_readable(figure)
    figure = plots.plot_timeline(RESULTS["tp"])
    figure.text(0.99, 0.01, "too far to the right")
    with pytest.raises(AssertionError, match="leaves"):
        assert_readable(figure)


@each_plan
def test_pictures_of_a_result_are_readable(name):
    result = RESULTS[name]
    assert_readable(plots.plot_timeline(result))
    phases = list(dict.fromkeys(phase for phase, _ in result.trace.recordings.values()))
    assert_readable(plots.plot_timeline(result, ranks=range(8), phases=phases))
    assert_readable(plots.plot_memory(result))


@pytest.mark.parametrize("names", [("tp", "tp_sp"), ("tp_sp", "full", "selective"), ("ulysses", "ring", "contiguous")])
def test_pictures_of_several_results_are_readable(names):
    results = {f"plan {PLANS[name]}": RESULTS[name] for name in names}
    assert_readable(plots.plot_timelines(results))
    assert_readable(plots.plot_timelines(results, title="A title that is far too long for one line of a slide " * 3))
    assert_readable(plots.plot_memory_curves(results))


@pytest.mark.parametrize("settings", [{}, {"micro_batch": 8, "seq_len": 4096}, {"micro_batch": 3}])
def test_memory_of_a_plan_near_or_above_the_capacity_is_readable(settings):
    result = simulated("tp", layers=48, **settings)
    assert_readable(plots.plot_memory(result))
    assert_readable(plots.plot_memory_curves({"TP": result, "the same": result}))


@pytest.mark.parametrize("strategies", [("TP only",), ("TP only", "TP+SP", "Ulysses", "Ring"), tuple("ABCDEFGHIJ")])
def test_pictures_of_a_sweep_are_readable(strategies):
    frame = sweep_frame(strategies=strategies)
    assert_readable(plots.plot_step_times(frame, note="four layers"))
    assert_readable(plots.plot_peak_memory(frame, note="four layers"))


# ------------------------------------------------------------ timelines


def bars(figure, *, other=False):
    """(left, width) in milliseconds of the bars of the layer, waiting apart."""
    return sorted(
        (round(bar.get_x(), 6), round(bar.get_width(), 6))
        for axes in figure.axes
        for container in axes.containers
        if container.get_label() != "waiting for peers" and (container.get_label() == "other passes") == other
        for bar in container
    )


def expected_bars(result, layer, ranks):
    """The same from the trace: forward from zero, backward from the end of forward."""
    drawn, offset = [], 0
    for phase in ("forward", "backward"):
        tasks = {
            index
            for index, info in enumerate(result.trace.tasks)
            if info.layer == layer and phase_of(info.part) == phase
        }
        spans = [span for span in result.trace.spans if span.task in tasks]
        start, end = min(s.posted_ps for s in spans), max(s.end_ps for s in spans)
        drawn += [
            ((s.start_ps - start + offset) / PS_PER_MS, (s.end_ps - s.start_ps) / PS_PER_MS)
            for s in spans
            if s.rank in ranks and s.end_ps > s.posted_ps
        ]
        offset += end - start
    return sorted((round(left, 6), round(width, 6)) for left, width in drawn)


@each_plan
@pytest.mark.parametrize("layer", [0, 1])
def test_a_timeline_has_a_bar_for_each_span_of_the_layer(name, layer):
    """Kernels that a rank does not run, of no duration, have none."""
    result = RESULTS[name]
    found = bars(plots.plot_timeline(result, layer=layer))
    np.testing.assert_allclose(found, expected_bars(result, layer, list(result.trace.copies)), atol=2e-6)


@each_plan
def test_passes_take_the_times_of_the_result(name):
    result = RESULTS[name]
    texts = " ".join(text for text, _ in drawn_texts(plots.plot_timeline(result)))
    assert f"forward {result.layer_forward_s * 1e3:.2f} ms" in texts
    assert f"backward {result.layer_backward_s * 1e3:.2f} ms" in texts


def waits(figure, label="waiting for peers"):
    """(rank, whether its kernels wait, left, right) of waits, in milliseconds."""
    (axes,) = figure.axes
    rows = {round(y, 3): text.get_text() for y, text in zip(axes.get_yticks(), axes.get_yticklabels(), strict=True)}
    ranks = {y: sum(COMPUTE_LANE in rows[other] for other in rows if other <= y) - 1 for y in rows}
    for container in axes.containers:
        for bar in container if container.get_label() == label else ():
            row = round(bar.get_y() + bar.get_height() / 2, 3)
            yield ranks[row], COMPUTE_LANE in rows[row], bar.get_x(), bar.get_x() + bar.get_width()


def test_waiting_is_drawn_from_posting_to_start():
    result = RESULTS["contiguous"]
    drawn = [right - left for _, kernels, left, right in waits(plots.plot_timeline(result)) if not kernels]
    expected = [
        (span.start_ps - span.posted_ps) / PS_PER_MS
        for span in result.trace.spans
        if result.trace.tasks[span.task].layer == 0 and span.start_ps > span.posted_ps
    ]
    assert sorted(drawn) == pytest.approx(sorted(expected))


def test_kernels_that_wait_for_a_peer_are_drawn_so():
    """All time of a rank in which a communication waits, none transfers and no kernel runs; checked by counting."""
    result = RESULTS["contiguous"]
    drawn = Counter()
    for rank, kernels, left, right in waits(plots.plot_timeline(result, phases=["forward"])):
        drawn[rank] += (right - left) * PS_PER_MS if kernels else 0
    start, end = result.trace.window_of("forward", 0, 0)
    for rank in result.trace.copies:
        edges = {start, end}
        own = [span for span in result.trace.spans if span.rank == rank]
        for span in own:
            edges |= {min(max(time, start), end) for time in (span.posted_ps, span.start_ps, span.end_ps)}
        expected = 0
        for a, b in pairwise(sorted(edges)):
            waiting = any(span.posted_ps <= a < span.start_ps for span in own)
            expected += (b - a) * (waiting and not any(span.start_ps <= a < span.end_ps for span in own))
        assert drawn[rank] == pytest.approx(expected, abs=1)
    assert max(drawn.values()) > 0


def test_waiting_for_another_stage_has_a_look_of_its_own():
    """The first rank works for 5 µs before it takes what the second has sent after 2."""
    spans = [MeasuredSpan(rank, "compute", "gemm", "gemm", 0, end) for rank, end in enumerate((5, 2))]
    spans += [
        MeasuredSpan(rank, "pp", "message", "communication", begin, 7, collective="send_receive", group=(0, 1))
        for rank, begin in enumerate((5, 2))
    ]
    figure = plots.plot_timeline(measured_trace(spans))
    assert_readable(figure)
    found = [
        (rank, kernels, round(left, 3), round(right, 3))
        for rank, kernels, left, right in waits(figure, "waiting for another stage")
    ]
    assert sorted(found) == [(1, False, 2, 5), (1, True, 2, 5)]
    (legend,) = figure.legends
    assert "waiting for another stage" in [text.get_text() for text in legend.get_texts()]


def test_a_layer_of_a_long_step_is_looked_at_alone():
    """Neither spans nor tasks of the whole step are made."""
    result = simulated("tp", layers=96, global_batch=2048)
    figure = plots.plot_timeline(result, layer=95, micro_batch=511)
    assert not {"spans", "tasks", "pieces"} & vars(result.trace).keys()
    np.testing.assert_allclose(bars(figure), bars(plots.plot_timeline(simulated("tp"), layer=1)), atol=2e-6)


def test_bars_of_a_lane_do_not_overlap():
    axes = plots.plot_timeline(RESULTS["contiguous"]).axes[0]
    lanes = {}
    for container in axes.containers:
        for bar in container:
            lanes.setdefault(round(bar.get_y(), 3), []).append((bar.get_x(), bar.get_x() + bar.get_width()))
    for spans in lanes.values():
        ordered = sorted(spans)
        assert all(end <= start + 1e-6 for (_, end), (start, _) in pairwise(ordered))


def test_identical_ranks_are_drawn_once_folded_or_not():
    for fold in (True, False):
        figure = plots.plot_timeline(simulated("tp", fold=fold))
        assert len(figure.axes[0].get_yticks()) == 2
        assert any("8 identical ranks, one shown" in text for text, _ in drawn_texts(figure))
    assert len(plots.plot_timeline(RESULTS["contiguous"]).axes[0].get_yticks()) == 16


def test_ranks_can_be_named():
    assert len(plots.plot_timeline(RESULTS["tp"], ranks=[2, 5]).axes[0].get_yticks()) == 4
    with pytest.raises(InputError, match="ranks: 8 is not a rank of the plan; use 0 to 7"):
        plots.plot_timeline(RESULTS["tp"], ranks=[8])


@pytest.mark.parametrize("options", [{"layer": 2}, {"micro_batch": 1}, {"phases": ["decode"]}])
def test_a_window_without_tasks_is_refused(options):
    with pytest.raises(InputError, match="timeline: nothing runs in phase"):
        plots.plot_timeline(RESULTS["tp"], **options)


def test_recomputed_work_is_hatched():
    (axes,) = plots.plot_timeline(RESULTS["full"]).axes
    hatched = sum(bar.get_hatch() is not None for container in axes.containers for bar in container)
    tasks = RESULTS["full"].trace.tasks
    assert hatched == sum(info.part == "recompute" and info.layer == 0 for info in tasks)


def test_plans_share_one_time_axis_and_state_the_difference():
    figure = plots.plot_timelines({"TP": RESULTS["tp"], "TP+SP": RESULTS["tp_sp"]})
    assert len({axes.get_xlim() for axes in figure.axes}) == 1
    tp, sp = (r.layer_forward_s + r.layer_backward_s for r in (RESULTS["tp"], RESULTS["tp_sp"]))
    change = f"{100 * (sp / tp - 1):+.1f} %".replace("-", "−")
    assert any(f"{change} against TP" in text for text, _ in drawn_texts(figure))


def test_a_subtitle_of_several_plans_names_what_they_share():
    def subtitle(*names):
        return " ".join(text for text, _ in drawn_texts(plots.plot_timelines({n: RESULTS[n] for n in names})))

    assert "contiguous ring" in subtitle("contiguous")
    assert "contiguous ring" not in subtitle("contiguous", "ulysses")
    assert "sequence 32,768" in subtitle("contiguous", "ulysses")


def test_a_comparison_shows_the_rank_that_computes_longest():
    figure = plots.plot_timelines({"contiguous": RESULTS["contiguous"]})
    np.testing.assert_allclose(bars(figure), expected_bars(RESULTS["contiguous"], 0, [7]), atol=2e-6)
    lanes = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert lanes == [COMPUTE_LANE, "ring"]


# ------------------------------------------------------------ memory


def test_passes_of_a_short_run_beside_a_long_one_are_named():
    """Its forward pass takes less of the common axis than its name; the names stand side by side."""
    figure = plots.plot_timelines({"long": simulated("tp", seq_len=65536), "short": simulated("tp", seq_len=256)})
    names = [text for text, _ in drawn_texts(figure) if text.startswith(("forward", "backward"))]
    assert [name.split()[0] for name in names] == ["forward", "backward"] * 2
    assert_readable(figure)


def test_labels_in_a_line_move_no_more_than_they_must():
    assert side_by_side([50, 150], [20, 30], 200) == [50, 150]
    assert side_by_side([2, 8], [20, 20], 200) == [10, 10 + 20 + MARGIN]
    assert side_by_side([150, 198], [40, 60], 200) == [200 - 60 - MARGIN - 20, 170]


@pytest.mark.parametrize(("name", "entry"), [("ring", "communication: SR send-receive"), ("tp", "AR all-reduce")])
def test_the_legend_spells_out_every_abbreviation(name, entry):
    (legend,) = plots.plot_timeline(RESULTS[name]).legends
    assert any(entry in text.get_text() for text in legend.get_texts())


def verification_frame():
    """Two strategies under two attention kernels; compute, communication and passes of very different length."""
    times = {"compute": 5.0, "communication": 0.1}
    return pd.DataFrame(
        {
            "strategy": strategy, "attention": attention, "clock": "wall clock",
            "name": "_".join(filter(None, [phase, kind, "ms"])), "measured": time, "p10": 0.9 * time, "p90": 2 * time,
            "predicted": 0.8 * time,
        }
        for strategy in ("TP2", "Ring 2")
        for attention in ("flash", "unfused")
        for phase in ("forward", "backward")
        for kind, time in {**times, "": 40.0}.items()
    )  # fmt: skip


def test_panels_of_a_verification_share_range_and_markers():
    figure = plots.plot_verification(verification_frame(), title="a profile")
    assert_readable(figure)
    limits = {(*axes.get_xlim(), *axes.get_ylim()) for axes in figure.axes}
    assert len(limits) == 1
    looks = [
        [
            (line.get_color(), line.get_marker(), line.get_markerfacecolor())
            for line in axes.lines
            if line.get_marker() in "os"
        ]
        for axes in figure.axes
    ]
    assert looks[0] == looks[1] == looks[2]
    assert len(set(looks[0])) == 8, "strategy, pass and kernel are told apart"


def test_panels_of_peak_memory_share_their_range():
    frame = sweep_frame()
    frame.loc[frame["model"] == "llama-3-8b", "device_memory_gib"] /= 10
    assert len({axes.get_ylim() for axes in plots.plot_peak_memory(frame).axes}) == 1


def test_names_of_bars_are_level_where_there_is_room():
    for lengths, rotation in (((2048, 8192), 0), ((2**power for power in range(10, 22)), 90)):
        frame = sweep_frame(lengths=tuple(lengths), strategies=("TP only", "Ulysses with a name"))
        labels = plots.plot_step_times(frame).axes[0].get_xticklabels()
        assert {label.get_rotation() for label in labels} == {rotation}


def areas(figure):
    """Label -> (times, upper edge) of the stacked areas, from the polygons."""
    found = {}
    for area in figure.axes[0].collections:
        vertices = area.get_paths()[0].vertices
        found[area.get_label()] = vertices
    return found


@each_plan
def test_stacked_areas_reach_the_total(name):
    result = RESULTS[name]
    figure = plots.plot_memory(result)
    top = max(vertices[:, 1].max() for vertices in areas(figure).values())
    assert top == pytest.approx(result.peak_memory_gib)
    labels = [label for label in areas(figure) if label]
    amounts = [float(label.split()[-2]) for label in labels]
    assert sum(amounts) == pytest.approx(result.peak_memory_gib, abs=0.005 * len(amounts))


@each_plan
def test_the_peak_is_named(name):
    result = RESULTS[name]
    figure = plots.plot_memory(result)
    assert any(
        text == f"peak {result.peak_memory_gib:.2f} GiB: {result.peak_operator}" for text, _ in drawn_texts(figure)
    )
    (dot,) = [line for line in figure.axes[0].lines if line.get_marker() == "o"]
    assert dot.get_xydata().tolist() == [[result.peak.time_ps / PS_PER_MS, result.peak_memory_gib]]


def test_another_rank_has_its_own_memory():
    result = simulated("contiguous")
    figure = plots.plot_memory(result, rank=0)
    curve = result.memory_curve.query("rank == 0")
    top = max(vertices[:, 1].max() for vertices in areas(figure).values())
    assert top == pytest.approx(curve["total_gib"].max())
    with pytest.raises(InputError, match="rank: 9 is not a rank of the plan; use 0 to 7"):
        plots.plot_memory(result, rank=9)


def test_capacity_is_a_line_when_near_and_words_when_far():
    far = plots.plot_memory(RESULTS["tp"])
    assert far.axes[0].get_ylim()[1] < 2 * RESULTS["tp"].peak_memory_gib
    assert any("capacity 80.0 GiB" in text for text, _ in drawn_texts(far))
    over = simulated("tp", layers=48)
    assert not over.fits
    figure = plots.plot_memory(over)
    levels = sorted({line.get_ydata()[0] for line in figure.axes[0].lines if line.get_marker() == "None"})
    outside = over.device_memory_gib - over.peak_memory_gib
    assert levels == pytest.approx([over.capacity_gib - outside, over.capacity_gib])
    assert any(over.out_of_memory_at in text for text, _ in drawn_texts(figure))


def test_memory_curves_end_where_they_began():
    results = {name: RESULTS[name] for name in ("tp", "tp_sp", "full")}
    for line, result in zip(plots.plot_memory_curves(results).axes[0].lines, results.values(), strict=False):
        sizes = line.get_ydata()
        assert max(sizes) == pytest.approx(result.peak_memory_gib)
        assert sizes[-1] == pytest.approx(result.static.total / 2**30)


# ------------------------------------------------------------ sweeps


def test_bars_add_up_to_the_step_time_per_1k_tokens():
    frame = sweep_frame()
    tops = {}
    for axes in plots.plot_step_times(frame).axes:
        for container in axes.containers:
            for bar in container:
                place = (axes.get_title(loc="left"), round(bar.get_x(), 3))
                tops[place] = max(tops.get(place, 0), bar.get_y() + bar.get_height())
    expected = frame["step_time_ms"] / (2 * frame["seq_len"] / 1024)
    assert sorted(tops.values()) == pytest.approx(sorted(expected))


@pytest.mark.parametrize(("share", "drawn"), [(0.2, True), (1e-4, False)])
def test_time_without_a_cause_is_drawn_as_the_rest_unless_it_is_rounding(share, drawn):
    frame = sweep_frame()
    frame["step_time_ms"] *= 1 + share
    frame["tokens_per_s_per_gpu"] /= 1 + share
    labels = {container.get_label() for axes in plots.plot_step_times(frame).axes for container in axes.containers}
    assert ("embedding, waiting" in labels) == drawn


def test_the_fastest_plan_that_fits_is_bold_and_the_others_are_crossed():
    frame = sweep_frame(lengths=(2048, 131072))
    axes = plots.plot_step_times(frame).axes[0]
    bold = [label.get_text() for label in axes.get_xticklabels() if label.get_fontweight() == "bold"]
    assert bold == ["TP only", "TP+SP"]
    (crosses,) = [line for line in axes.lines if line.get_marker() == "x"]
    assert len(crosses.get_xdata()) == 2


def test_configurations_that_failed_leave_a_gap():
    frame = sweep_frame()
    frame.loc[3, ["step_time_ms", "tokens_per_s_per_gpu", "gemm_ms", "device_memory_gib"]] = np.nan
    frame.loc[3, "plan"] = "tp=no plan"
    assert_readable(plots.plot_step_times(frame))
    assert_readable(plots.plot_peak_memory(frame))


def test_points_that_do_not_fit_are_hollow():
    figure = plots.plot_peak_memory(sweep_frame())
    hollow = sum(
        len(line.get_xdata()) for axes in figure.axes for line in axes.lines if line.get_markerfacecolor() == "white"
    )
    assert hollow == (~sweep_frame()["fits"]).sum()
    assert any("does not fit" in text for text, _ in drawn_texts(figure))


def test_a_note_is_in_the_subtitle():
    for figure in (
        plots.plot_step_times(sweep_frame(), note="4 layers"),
        plots.plot_peak_memory(sweep_frame(), note="4 layers"),
    ):
        assert any(text.startswith("4 layers · ") for text, _ in drawn_texts(figure))


# ------------------------------------------------------------ files


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_the_same_picture_gives_the_same_bytes(tmp_path, suffix):
    paths = [tmp_path / f"{index}.{suffix}" for index in range(2)]
    for path in paths:
        plots.save(plots.plot_timeline(RESULTS["tp"]), path)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"0.{suffix}", f"1.{suffix}"]


@pytest.mark.parametrize("path", ["picture.pdf", "picture", "missing/picture.png"])
def test_a_path_that_cannot_be_written_is_one_line(tmp_path, path):
    with pytest.raises(InputError) as caught:
        plots.save(plots.plot_timeline(RESULTS["tp"]), tmp_path / path)
    assert "\n" not in str(caught.value)
    assert path in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "picture.png"
    path.write_text("old")
    figure = plots.plot_timeline(RESULTS["tp"])

    def full(target, **options):
        Path(target).write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(figure, "savefig", full)
    with pytest.raises(InputError, match="No space left on device"):
        plots.save(figure, path)
    assert [p.name for p in tmp_path.iterdir()] == ["picture.png"]
    assert path.read_text() == "old"


def test_result_methods_write_pictures(tmp_path):
    RESULTS["tp"].plot_timeline(tmp_path / "timeline.png", layer=1)
    RESULTS["tp"].plot_memory(tmp_path / "memory.svg")
    assert (tmp_path / "timeline.png").read_bytes().startswith(b"\x89PNG")
    assert b"<svg" in (tmp_path / "memory.svg").read_bytes()


@pytest.mark.parametrize("name", ["$x^$", "a$b$c"])
def test_dollars_in_names_are_no_mathematics(name, tmp_path):
    """Of models, labels and hardware, in titles, ticks and legends: what stands there is the name."""
    model = spsim.Model(name=name, layers=2, hidden=256, heads=8, vocab=512)
    settings = {"hardware": "dgx-h100", "model": model, "workload": {"seq_len": 2048}}
    rows = spsim.sweep(
        [spsim.Point({**settings, "plan": plan}, {"strategy": f"{name} {plan}"}) for plan in ("tp=8", "")]
    )
    results = {f"{name} {plan}": spsim.simulate(spsim.Scenario(**settings, plan=plan)) for plan in ("tp=8", "tp=4")}
    figures = [
        plots.plot_step_times(rows),
        plots.plot_peak_memory(rows),
        plots.plot_timelines(results),
        plots.plot_memory_curves(results),
        plots.plot_memory(next(iter(results.values()))),
    ]
    for number, figure in enumerate(figures):
        plots.save(figure, tmp_path / f"{number}.png")
        plots.save(figure, tmp_path / f"{number}.svg")
