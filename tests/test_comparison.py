"""Two plans side by side: parts add up to the totals exactly, and say what is known about each strategy."""

import json
import re
import subprocess
import sys
from itertools import combinations

import pytest
from matplotlib.colors import to_hex

import spsim
from spsim import InputError, compare, plots
from spsim.cli import main
from spsim.costs.models import cost_models
from spsim.plots.waterfall import TOTAL
from spsim.program.instructions import Compute
from spsim.report.comparison import comparison_lines
from spsim.results.accounts import OTHER, PEERS, RECOMPUTATION, SLOWED, SYNC
from spsim.results.metrics import compute_by_class
from spsim.studies.comparison import Difference
from spsim.studies.plan_accounts import EXPOSED, grouped
from spsim.units import GIB, picoseconds
from spsim.work import KERNEL_CLASSES, FlashAttention, Gemm, MemoryBound
from tests.cases import A100, H100
from tests.test_plots import assert_readable

GPT = {"model": "gpt-22b", "hardware": A100, "workload": {"seq_len": 2048, "micro_batch": 4}}
LLAMA = {"model": "llama-3-8b", "hardware": H100, "workload": {"seq_len": 32768}}
GPT_PLANS = (
    "tp=8", "tp=8,sequence_parallel", "tp=8,recompute=full", "tp=8,sequence_parallel,recompute=selective", "ulysses=8"
)  # fmt: skip
LLAMA_PLANS = (
    "ulysses=8", "ring=8", "ring=8,ring_cut=contiguous", "ring=8,ring_kind=all_gather", "tp=8",
    "tp=2,ulysses=2,ring=2,sequence_parallel,recompute=full", "",
)  # fmt: skip
STAGES_PLANS = ("tp=4,pp=2,dp=2", "tp=4,pp=4,virtual_pp=2", "tp=4,dp=4,zero=1")
COMPARISONS = {
    "gpt": compare(GPT_PLANS, **GPT, scope="layers"),
    "llama": compare(LLAMA_PLANS, **LLAMA, scope="layers"),
}
WHOLE = {
    "gpt step": compare(GPT_PLANS, **GPT),
    "llama step": compare(LLAMA_PLANS, **LLAMA),
    "stages": compare(
        STAGES_PLANS, hardware=A100, model="gpt-22b", workload={"seq_len": 2048, "global_batch": 16}, nodes=2
    ),
}
EVERY = COMPARISONS | WHOLE
PAIRS = [pair for comparison in EVERY.values() for pair in combinations(comparison.accounts, 2)]


def each_account(comparisons):
    accounts = [(name, account) for name, comparison in comparisons.items() for account in comparison.accounts]
    return pytest.mark.parametrize(
        "account", [a for _, a in accounts], ids=[f"{name} {a.name}" for name, a in accounts]
    )


TP, TP_SP = COMPARISONS["gpt"].accounts[:2]


# ------------------------------------------------------------ parts add up


@each_account(EVERY)
def test_parts_add_up_to_the_figures_of_the_result(account):
    """To the picosecond and the byte."""
    result = account.result
    assert sum(account.passes["forward"].values()) == picoseconds(result.layer_forward_s)
    assert sum(account.passes["backward"].values()) == picoseconds(result.layer_backward_s)
    assert sum(account.step.values()) == picoseconds(result.step_time_s)
    assert sum(account.memory.values()) == result.peak_memory_gib * GIB
    assert min([*account.layer.values(), *account.step.values(), *account.memory.values()]) > 0


@pytest.mark.parametrize(("before", "after"), PAIRS, ids=lambda account: account.name)
def test_differences_add_up_to_the_difference(before, after):
    pair, back = Difference(before, after), Difference(after, before)
    for result, sign in ((pair, 1), (back, -1)):
        layers = [picoseconds(a.result.layer_forward_s) + picoseconds(a.result.layer_backward_s) for a in pair_of(pair)]
        assert sum(result.layer.values()) == sign * (layers[1] - layers[0])
        steps = [picoseconds(a.result.step_time_s) for a in pair_of(pair)]
        assert sum(result.step.values()) == sign * (steps[1] - steps[0])
        peaks = [a.result.peak_memory_gib for a in pair_of(pair)]
        assert sum(result.memory.values()) == sign * (peaks[1] - peaks[0]) * GIB


def pair_of(pair):
    return pair.before, pair.after


@each_account(COMPARISONS)
def test_kernels_of_a_step_take_the_time_of_the_compute_lane(account):
    """Of the last rank, by `metrics.compute_by_class`: contention and recomputation are only told apart."""
    kernels = sum(account.step.get(name, 0) for name in (*KERNEL_CLASSES, RECOMPUTATION, SLOWED))
    trace = account.result.trace
    assert kernels == max(sum(compute_by_class(trace, rank).values()) for rank in trace.copies)


@each_account(COMPARISONS)
def test_slowed_is_what_kernels_take_beyond_their_uncontended_time(account):
    """Uncontended durations of a layer are those of the cost model, of products and attention as the power limit leaves
    them; the engine rounds up, once a kernel.
    """
    result = account.result
    cost, _ = cost_models(result.scenario.hardware, result.scenario.workload.precision)
    kernels = [step for step in result.program.instructions if isinstance(step, Compute)]

    def mean(kind):
        return sum(
            sum(cost.duration(work) for work in step.work if isinstance(work, kind)) / len(step.work)
            for step in kernels
        )

    bound, free = mean(Gemm | FlashAttention), mean(MemoryBound)
    slower = cost.power.factor(bound, bound + free) if cost.burst else 1.0
    alone = sum(
        picoseconds(cost.duration(work) * (1.0 if isinstance(work, MemoryBound) else slower))
        for work in (step.work[-1] for step in kernels)
        if work
    )
    layers = result.scenario.model.layers
    measured = sum(account.step.get(name, 0) for name in (*KERNEL_CLASSES, RECOMPUTATION))
    assert measured == pytest.approx(alone * layers, abs=2 * len(kernels) * layers)


@each_account(COMPARISONS)
def test_exposed_communication_is_that_of_the_result(account):
    """Transfers, and waits apart; on every plan but a contiguous ring all ranks expose the same."""
    if "contiguous" in account.text:
        pytest.skip("ranks differ")
    parts = grouped(account.step)
    assert parts.get(EXPOSED, 0) == picoseconds(account.result.exposed_comm_s)
    assert parts.get(PEERS, 0) == picoseconds(account.result.idle_s["peer"])
    assert parts.get(SYNC, 0) == picoseconds(account.result.weight_sync_s)


@each_account(COMPARISONS)
def test_a_layer_counts_its_own_kernels(account):
    """On the rank that computes longest, whose clock may overlap with that of other layers elsewhere."""
    spans = account.result.spans
    kernels = spans[(spans["layer"] == 0).fillna(False) & (spans["lane"] == "compute")]
    longest = kernels.groupby("rank")["duration_us"].sum().max()
    parts = sum(amount for name, amount in account.layer.items() if name in (*KERNEL_CLASSES, RECOMPUTATION, SLOWED))
    assert parts == pytest.approx(longest * 1e6, abs=1)
    assert (OTHER in account.layer) == ("contiguous" in account.text)


# ------------------------------------------------------------ what is known


@pytest.mark.parametrize(
    ("settings", "plan", "same"),
    [
        (GPT, "tp=8", "tp=8,ring=1"),
        (GPT, "tp=8", "tp=8,recompute=none"),
        (LLAMA, "ring=8", "ring=8,ring_cut=zigzag"),
        (LLAMA, "", "tp=1"),
    ],
)
def test_an_equivalent_plan_differs_in_nothing(settings, plan, same):
    comparison = compare([plan, same], **settings)
    (pair,) = comparison.differences
    assert not any([*pair.layer.values(), *pair.step.values(), *pair.memory.values()])
    assert pair.before.name != pair.after.name
    assert "takes as long as" in comparison_lines(comparison)[0]


def test_sequence_parallelism_shrinks_norms_and_elementwise_kernels_by_seven_eighths():
    """Of GPT's elementwise kernels GeLU is on the MLP's shard in both plans; small norms also fit the cache."""
    pair = Difference(TP, TP_SP)
    assert pair.layer["norm"] / TP.layer["norm"] == pytest.approx(-7 / 8, abs=0.03)
    shared = sum(
        row["time_ms"] for row in TP.result.operators.to_dict("records") if row["operator"] == "gelu"
    ) * 1e9 / TP.result.scenario.model.layers  # fmt: skip
    assert pair.layer["elementwise"] / (TP.layer["elementwise"] - shared) == pytest.approx(-7 / 8, abs=0.05)
    assert grouped(pair.layer)[EXPOSED] > 0
    assert pair.layer["exposed all-reduce"] == -TP.layer["exposed all-reduce"]
    for part in ("softmax", "dropout"):
        assert pair.layer[part] == 0
    assert abs(pair.layer["gemm"]) < 1e-6 * TP.layer["gemm"]


def test_sequence_parallelism_saves_the_activations_of_the_published_formula():
    """10 + 24/t against 34/t bytes an element and layer, t = 8 (Korthikanti et al. 2022, table 2)."""
    model, elements = TP.result.scenario.model, 2048 * 4 * 6144
    saved = -Difference(TP, TP_SP).memory["activations"]
    assert saved == pytest.approx(model.layers * elements * (10 - 10 / 8), rel=0.03)


def test_full_recomputation_repeats_forward_and_nothing_else():
    full = COMPARISONS["gpt"].accounts[2]
    pair = Difference(TP, full)
    assert sum(pair.layer.values()) == pytest.approx(picoseconds(TP.result.layer_forward_s), rel=1e-9)
    forward = TP.passes["forward"]
    assert pair.layer[RECOMPUTATION] == sum(forward.get(name, 0) for name in KERNEL_CLASSES)
    assert {name for name, change in pair.layer.items() if change} == {RECOMPUTATION, "exposed all-reduce"}


def test_a_contiguous_ring_is_read_on_the_rank_that_computes_longest():
    """The last rank attends to everything, 15/8 of the mean; on a zigzag ring all attend to the mean."""
    zigzag, contiguous = COMPARISONS["llama"].accounts[1:3]
    assert contiguous.step["attention"] / zigzag.step["attention"] == pytest.approx(15 / 8, rel=0.2)
    assert PEERS not in contiguous.step or contiguous.step[PEERS] < 0.01 * sum(contiguous.step.values())


# ------------------------------------------------------------ words, pictures, command line


def test_words_name_the_winner_and_the_reasons():
    """Ranked by the whole step."""
    comparison = WHOLE["gpt step"]
    answer, *lines = comparison_lines(comparison)
    assert answer == (
        "Shortest step of the plans that fit: TP8+SP, recompute=selective. TP8 and TP8+SP would be shorter, but do not "
        "fit."
    )
    tp, tp_sp = (f"{account.result.step_time_s:.3f} s" for account in comparison.accounts[:2])
    assert lines[0].startswith(f"TP8+SP is faster than TP8: the step takes {tp_sp} instead of {tp} (−")
    assert "from 3 ratios of layers measured under plans that differ in sequence parallelism" in lines[0]
    assert "Mainly: elementwise −" in lines[0]
    assert "against it: exposed communication +" in lines[0]
    assert lines[1].startswith("TP8+SP needs less memory: ")
    assert "Mainly: activations −" in lines[1]
    assert lines[2].startswith("TP8, recompute=full is slower than TP8: the step takes ")
    assert lines[-1] == "Lowest peak of memory: TP8, recompute=full."


def test_a_tie_is_a_difference_below_the_band_and_has_no_winner():
    """What differs by less than published ratios are off, as rings do."""
    near, far, *_ = (pair.to_json() for pair in WHOLE["llama step"].differences)
    assert (near["tie"], near["faster"]) == (True, None)
    assert abs(near["step_difference_percent"]) < near["band"]["percent"]
    assert (far["tie"], far["faster"]) == (False, "Ulysses 8")
    assert far["step_difference_percent"] > far["band"]["percent"]
    words = comparison_lines(WHOLE["llama step"])
    assert words[0] == "Shortest step of the plans that fit: TP8."
    assert words[1].startswith("Ring 8 and Ulysses 8 are a tie: the step takes ")
    several = COMPARISONS["llama"]
    first, *others = several.fastest
    assert others
    assert f"Shortest step of the plans that fit: {first}, a tie with {others[0]}" in comparison_lines(several)[0]


def test_a_whole_step_names_what_is_around_its_layers():
    """Embedding and optimizer are parts of a step and of no layer; head and loss make its products and exposed
    all-reduces more than those of the layers.
    """
    step, layers = WHOLE["gpt step"].accounts[0], TP
    assert {"embedding", "optimizer"} <= step.step.keys() - step.layer.keys() - layers.step.keys()
    head = 6 * 2048 * 4 * step.result.scenario.model.hidden * 51200 / 8
    rate = head / ((step.step["gemm"] - layers.step["gemm"]) / 1e12)
    assert 0.5 < rate / 312e12 < 0.85
    assert step.step["exposed all-reduce"] > layers.step["exposed all-reduce"]


def test_names_of_stages_and_replicas_say_everything_once():
    names = [account.name for account in WHOLE["stages"].accounts]
    assert names == ["TP4 × PP2 × DP2", "TP4 × PP4×VP2", "TP4 × DP4+ZeRO-1"]


def test_layers_that_overlap_are_told_and_do_not_rank():
    """Under a contiguous ring a layer begins while the one before still runs on other ranks."""
    contiguous = COMPARISONS["llama"].accounts[2]
    together = sum(contiguous.layer.values()) * contiguous.result.scenario.model.layers
    percent = 100 * (together / (contiguous.result.step_ps - contiguous.result.weight_sync_ps) - 1)
    assert percent > 5
    words = f"{contiguous.name}: neighbouring layers overlap: 32 times the layer time is {percent:.1f} % more"
    assert any(line.startswith(words) for line in comparison_lines(COMPARISONS["llama"]))
    assert not COMPARISONS["llama"].accounts[1].result.overlap


def test_equal_figures_are_not_called_different():
    """Biases of one layer more or less are MiB beside GiB."""
    model = spsim.load_model("llama-3-8b")
    plans = ("tp=8,ring=1", "tp=8,tp_backward_overlap=false")
    words = comparison_lines(compare(plans, hardware=H100, model=model, workload={"seq_len": 32768}))
    assert not any(re.search(r"([\d.]+) instead of \1 ", line) for line in words)


def test_several_plans_may_have_the_lowest_peak():
    """Of two nodes, whose number stands in the subtitle of pictures."""
    plans = ("ring=8,zero=1", "ring=8,ring_cut=contiguous,zero=1", "ulysses=8,zero=1")
    found = compare(plans, hardware=H100, model="llama-3-8b", workload={"seq_len": 65536}, nodes=2)
    (last,) = (line for line in comparison_lines(found) if "Lowest peak" in line)
    assert last.endswith("Lowest peak of memory: Ring 8, zero=1 and Ring 8, ring_cut=contiguous, zero=1.")
    assert all("2 nodes" in result.scenario.summary for result in found.results.values())


def test_nodes_are_shown(capsys):
    arguments = ["compare", "--model", "llama-3-8b", "--hardware", H100, "--seq-len", "32K", "--nodes", "2"]
    assert status_of([*arguments, "--plan", "tp=8", "--plan", "ulysses=8", "--json"]) == 0
    assert [plan["nodes"] for plan in json.loads(capsys.readouterr().out)["plans"]] == [2, 2]
    assert status_of([*arguments, "--plan", "tp=8", "--plan", "ulysses=8"]) == 0
    out = capsys.readouterr().out
    assert "micro-batch 1, 2 nodes" in out
    assert "8 on 2 nodes" in out


@pytest.mark.slow
@pytest.mark.parametrize("name", EVERY)
def test_pictures_are_readable(name):
    assert_readable(EVERY[name].plot_waterfalls())


def test_bars_of_a_waterfall_lead_from_one_total_to_the_other():
    parts = ({"a": 10.0, "b": 4.0, "c": 1.0}, {"a": 7.0, "b": 9.0, "c": 1.001})
    fall = plots.Waterfall("Time", "ms", ("A", "B"), parts)
    (axes,) = plots.plot_waterfalls([fall], title="t", subtitle="s", columns=1).axes
    bars = [(bar.get_x(), bar.get_x() + bar.get_width()) for bar in axes.patches]
    assert bars == [pytest.approx(pair) for pair in ((0, 15), (12, 15), (12, 17), (0, 17.001))]


@pytest.mark.slow
def test_a_waterfall_of_several_plans_leads_through_all_of_them():
    """Each total is where the changes before it end; of many changes the largest, and all others as one."""
    parts = ({"a": 10.0, "b": 4.0}, {"a": 7.0, "b": 5.0}, {f"c{i}": float(i) for i in range(1, 10)})
    fall = plots.Waterfall("Time", "ms", ("A", "B", "C"), parts)
    (axes,) = plots.plot_waterfalls([fall], title="t", subtitle="s", columns=1).axes
    bars = [(round(bar.get_x(), 9), round(bar.get_x() + bar.get_width(), 9)) for bar in axes.patches]
    assert bars[:4] == [(0, 14), (11, 14), (11, 12), (0, 12)]
    assert bars[-1] == (0, 45)
    assert len(bars) == 4 + 6 + 1
    level = 12
    for begin, end in bars[4:-1]:
        assert level in (begin, end)
        level = begin + end - level
    assert level == 45


def test_several_plans_are_one_waterfall():
    """A panel for time and one for memory, whose totals are those of the plans."""
    found = WHOLE["gpt step"]
    time, memory = found.plot_waterfalls().axes
    for axes, totals in (
        (time, [account.result.step_time_s * 1e3 for account in found.accounts]),
        (memory, [account.result.peak_memory_gib for account in found.accounts]),
    ):
        grey = [bar for bar in axes.patches if to_hex(bar.get_facecolor()).upper() == TOTAL]
        assert [bar.get_x() + bar.get_width() for bar in grey] == pytest.approx(totals)


@pytest.mark.slow
def test_a_waterfall_with_long_names_is_readable():
    parts = ({f"a part with a name of many words, number {i}": 100.0 + i for i in range(9)}, {"other": 905.0})
    fall = plots.Waterfall("Time", "ms", ("tp=8,sequence_parallel,recompute=selective,ring_cut=zigzag", "B"), parts)
    assert_readable(plots.plot_waterfalls([fall, fall, fall], title="t" * 300, subtitle="s"))


ARGUMENTS = ["compare", "--model", "gpt-22b", "--hardware", A100, "--seq-len", "2048", "--micro-batch", "4"]


def status_of(arguments):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    return stop.value.code


@pytest.mark.slow
def test_json_is_one_document_whose_parts_add_up(capsys, tmp_path):
    plans = ["--plan", "tp=8", "--plan", "tp=8,sequence_parallel"]
    assert status_of([*ARGUMENTS, *plans, "--json", "--out", str(tmp_path / "out")]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [plan["name"] for plan in document["plans"]] == ["TP8", "TP8+SP"]
    (pair,) = document["differences"]
    for key in ("layer_ps", "step_ps", "peak_memory_bytes"):
        before, after = (sum(plan[key].values()) for plan in document["plans"])
        total = key.replace("_ps", "_difference_ps").replace("_bytes", "_difference_bytes")
        assert sum(pair[key].values()) == pair[total] == after - before
    for plan, account in zip(document["plans"], WHOLE["gpt step"].accounts[:2], strict=True):
        assert plan["activation_bytes_per_layer"] == account.result.activation_bytes_per_layer
        assert plan["collectives_per_layer"] == account.result.collectives_per_layer
        assert plan["comm_bytes_per_gpu_by_op"] == account.result.comm_bytes_per_gpu_by_op
    assert document["words"] == comparison_lines(compare(plans[1::2], **GPT))
    assert json.loads((tmp_path / "out" / "comparison.json").read_text()) == document
    written = {path.name: path.stat().st_size for path in (tmp_path / "out").iterdir()}
    assert set(written) == {"comparison.json", "waterfall.png", "steps.png", "timelines.png", "memory_curves.png"}
    assert min(written.values()) > 2000


def test_tables_show_plans_parts_and_the_answer(capsys):
    assert status_of([*ARGUMENTS, "--plan", "tp=8", "--plan", "tp=8,sequence_parallel"]) == 0
    out = capsys.readouterr().out
    for words in ("2 all-gather, 2 reduce-scatter", "exposed reduce-scatter", "activations", "is faster than"):
        assert words in out
    assert "  fits  " in out
    assert status_of([*ARGUMENTS, "--scope", "layers", "--plan", "tp=8", "--plan", "tp=8,sequence_parallel"]) == 0
    assert "  fits, layers only  " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["at least two", "got 0", "--plan tp=8"]),
        (["--plan", "tp=8"], ["at least two", "got 1", "--plan tp=8"]),
        (["--plan", "tp=8", "--plan", "tp=8"], ["'tp=8' is given twice", "change one"]),
        (["--plan", "tp=8,recompute=full", "--plan", " recompute=full, tp=8"], ["given twice"]),
        (["--plan", "tp=8", "--plan", "tp=3"], ["--plan 'tp=3'", "heads = 64", "such as"]),
        (["--plan", "tp=8", "--plan", "tensor=8"], ["tensor=8", "unknown key"]),
        (["--plan", "tp=8", "--plan", "ring=8"], ["unfused", "flash"]),
        (["--plan", "tp=8", "--plan", "tp=8,sequence_parallel", "--model", "nobody"], ["nobody"]),
        (["--plan", "tp=8", "--plan", "tp=4", "--precision", "int3"], ["int3"]),
        (["--plan", "tp=8", "--plan", "tp=4", "--global-batch", "6"], ["global_batch = 6"]),
    ],
)
def test_refused(arguments, words, capsys, tmp_path):
    assert status_of([*ARGUMENTS, *arguments, "--out", str(tmp_path / "out")]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    for word in words:
        assert word in captured.err
    assert not (tmp_path / "out").exists()


def test_python_interface_refuses_in_the_same_words():
    with pytest.raises(InputError, match="two plans are needed, got 1"):
        compare(["tp=8"], **GPT)
    with pytest.raises(InputError, match="two plans are needed, got 1"):
        compare("tp=8", **GPT)
    with pytest.raises(InputError, match="compare: 3 is not a plan"):
        compare(["tp=8", 3], **GPT)
    with pytest.raises(InputError, match=r"^unknown model 'nobody'"):
        compare(["tp=8", "tp=4"], **GPT | {"model": "nobody"})


def test_python_interface_takes_what_a_scenario_takes():
    """Names, tables and objects: one document."""
    objects = {
        "hardware": spsim.load_profile(A100),
        "model": spsim.load_model("gpt-22b"),
        "workload": spsim.Workload(**GPT["workload"]),
    }
    plans = [spsim.Plan(tp=8), {"tp": 8, "sequence_parallel": True}]
    assert compare(plans, **objects).to_json() == compare(GPT_PLANS[:2], **GPT).to_json()


def test_a_comparison_does_not_write_out_the_step():
    """Neither spans nor memory changes are made of 512 micro-batches, 128 ranks or 80 layers."""
    plans = ("tp=8,ring=16", "tp=8,sequence_parallel,ring=16,ring_cut=contiguous")
    workload = {"seq_len": 65536, "global_batch": 512}
    comparison = compare(plans, hardware=H100, model="llama-3-70b", workload=workload)
    comparison.to_json()
    for account in comparison.accounts:
        assert not {"spans", "tasks", "memory", "pieces"} & vars(account.result.trace).keys()
        assert sum(account.step.values()) == account.result.trace.end_ps


@pytest.mark.slow
def test_neither_a_comparison_nor_an_explanation_needs_pandas():
    code = (
        "import sys, spsim\n"
        f"spsim.compare(['tp=8', 'ring=8,ring_cut=contiguous'], **{LLAMA}).to_json()\n"
        "spsim.explain('gpt-22b', 'tp=8', {'seq_len': 2048}).to_json()\n"
        "print([name for name in ('pandas', 'matplotlib') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
