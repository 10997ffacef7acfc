"""The search for a plan finds what simulating all plans finds; no plan is better than its bounds."""

import json
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import spsim
from spsim import InputError, Plan, Scenario, Workload, emit, load_profile, plan_search, plots, simulate
from spsim.cli import main
from spsim.inputs.plan import parse_plan
from spsim.inputs.presets import model_of
from spsim.inputs.workload import Workloads
from spsim.report.page.search import front_chart
from spsim.results import bands
from spsim.studies.search.blocks import Blocks, blocks_of, of_blocks
from spsim.studies.search.bounds import _counts, _held, _time
from spsim.studies.search.candidates import candidates
from spsim.studies.search.outcome import CANNOT_FIT, CANNOT_WIN
from spsim.studies.search.rounds import fits, rows_of
from spsim.studies.search.space import Family, Space
from spsim.units import GIB
from tests.cases import model
from tests.test_plots import assert_readable

H100 = "dgx-h100"
SMALL = {"preset": "llama-3-8b", "layers": 8}
WORK = {"seq_len": 16384, "global_batch": 16}
VALUES = {"tp": [2, 4], "ulysses": [1, 2], "ring": [1], "pp": [1, 2], "micro_batch": [1, 2], "virtual_pp": [1, 2]}


def space(gpus=8, *, model=SMALL, workload=WORK, plan=None, values=None, hardware=H100):
    return Space(load_profile(hardware), model_of(model), Workload(**workload), gpus, plan or {}, values or {})


@cache
def found():
    """A search of a small space, whose plans all fit or not."""
    return plan_search(hardware=H100, model=SMALL, gpus=8, workload={**WORK, "seq_len": 65536}, values=VALUES, best=4)


@cache
def every_small():
    """All plans of that space."""
    return exhaustive(space(8, workload={**WORK, "seq_len": 65536}, values=VALUES))


def exhaustive(own):
    """(step in ms, memory) of every plan that fits, the shortest first, and the rows of all."""
    every = [*candidates(H100, own.families(), None)]
    rows = rows_of(every, H100, None)
    return every, rows, sorted((row["step_time_ms"], row["device_memory_gib"]) for row in rows if fits(row))


def front(steps):
    """Of (step, memory) in order of the step, those beaten in both by none."""
    return [own for place, own in enumerate(steps) if all(own[1] < other[1] for other in steps[:place])]


# ------------------------------------------------------------ the space


def brute_force(gpus):
    """Every combination of a few options whose scenario is one, without those of no effect."""
    model = model_of(SMALL)
    degrees = [1, 2, 4, 8]
    for tp, ulysses, ring, pp, dp, chunks, batch in product(
        degrees, degrees, degrees, degrees, degrees, range(1, 9), degrees
    ):
        even = 8 % (pp * chunks) == 0 or 10 % (pp * chunks) == 0
        if tp * ulysses * ring * pp * dp != gpus or not even or (pp == 1 and chunks > 1):
            continue
        for parallel, again, sharded in product([False, True][: 1 + (tp > 1)], ["none", "full"], [False, True]):
            if sharded and dp * ulysses * ring == 1:
                continue
            try:
                plan = Plan(
                    tp=tp, ulysses=ulysses, ring=ring, pp=pp, dp=dp, virtual_pp=chunks, sequence_parallel=parallel,
                    recompute=again, distributed_optimizer=sharded,
                )  # fmt: skip
                Scenario(hardware=H100, model=model, plan=plan, workload={**WORK, "micro_batch": batch})
            except InputError:
                continue
            yield plan.text, batch


@pytest.mark.parametrize("gpus", [4, 8])
def test_a_space_has_every_plan_once(gpus):
    families = space(gpus, values={"recompute": ["none", "full"]}).families()
    made = [(own.plan.text, batch) for own in families for batch in own.workloads.micro_batch.tolist()]
    assert len(made) == len(set(made))
    assert set(made) == set(brute_force(gpus))


def test_tp_and_ulysses_stay_in_a_node_unless_asked():
    model = "llama-3-70b"
    usual = [own.plan for own in space(16, model={"preset": model}, values={"pp": [1]}).families()]
    assert max(plan.tp * plan.ulysses for plan in usual) == 8
    asked = [own.plan for own in space(16, model={"preset": model}, values={"pp": [1], "tp": [16]}).families()]
    assert {plan.tp for plan in asked} == {16}


def test_what_the_plan_says_is_fixed_and_values_take_the_place_of_the_usual():
    own = space(
        8, plan={"tp": 2, "recompute": "full", "library": "torchtitan"}, values={"ring_kind": ["p2p", "all_gather"]}
    )
    plans = [family.plan for family in own.families()]
    assert {(plan.tp, plan.recompute, plan.library) for plan in plans} == {(2, "full", "torchtitan")}
    assert {plan.ring_kind for plan in plans if plan.ring > 1} == {"p2p", "all_gather"}
    assert {plan.zero for plan in plans if plan.dp > 1 and plan.pp == 1} == {2, 3}
    assert {plan.sequence_parallel for plan in plans} == {False, True}


def test_a_micro_batch_that_is_given_is_the_only_one():
    families = space(8, workload={**WORK, "micro_batch": 4}).families()
    assert {batch for own in families for batch in own.workloads.micro_batch.tolist()} == {4}


# ------------------------------------------------------------ bounds


def test_the_bound_of_equal_stages_is_the_step_of_1f1b():
    """(m + (p - 1) / v) passes of all chunks of a stage (Narayanan et al. 2021, section 2.2)."""
    layer = 7.0
    alone = Blocks(np.array([[0.0], [layer], [0.0]]), *(np.zeros((3, 1)) for _ in range(2)), np.zeros(3), np.zeros(3))
    model = model_of({"preset": "llama-3-8b", "layers": 32})
    for pp, chunks, count in ((4, 1, 6), (4, 2, 8), (8, 4, 16), (1, 1, 5)):
        plan = Plan(pp=pp, virtual_pp=chunks, tp=8)
        workload = {"seq_len": 8192, "global_batch": count}
        scenario = Scenario(hardware=H100, model=model, plan=plan, workload=workload)
        family = Family(scenario, spsim.inputs.workload.Workloads(np.array([8192]), np.array([1]), "bf16"))
        counts = _counts(model, pp, chunks, "1f1b", None)
        assert _time(family, alone, counts) == pytest.approx((count + (pp - 1) / chunks) * layer * 32 / pp)


@pytest.mark.parametrize(("pp", "chunks"), [(2, 1), (4, 1), (4, 2), (8, 3)])
def test_a_stage_holds_what_1f1b_lets_it(pp, chunks):
    """p micro-batches on the first stage; interleaved (1 + (p - 1) / (p v)) as much (Korthikanti et al. 2022)."""
    expected = pp if chunks == 1 else chunks * pp + pp - 1
    assert sum(_held("1f1b", pp, chunks, pp, 0, 8 * pp)) == expected
    assert sum(_held("1f1b", pp, chunks, pp, pp - 1, 8 * pp)) == (1 if chunks == 1 else (chunks - 1) * pp + 1)


ORDERS = ["tp-ulysses-ring-dp-pp", "tp-ulysses-ring-pp-dp", "dp-tp-pp-ulysses-ring", "tp-dp-ring-pp-ulysses"]
PLANS = st.fixed_dictionaries(
    {
        "tp": st.sampled_from([1, 2, 4]), "ulysses": st.sampled_from([1, 2]), "ring": st.sampled_from([1, 2, 4]),
        "pp": st.sampled_from([1, 2, 4]), "virtual_pp": st.sampled_from([1, 2]), "dp": st.sampled_from([1, 2]),
        "sequence_parallel": st.booleans(), "recompute": st.sampled_from(["none", "selective", "full"]),
        "distributed_optimizer": st.booleans(), "dp_overlap": st.booleans(), "tp_overlap": st.booleans(),
        "library": st.sampled_from(["megatron-core", "torchtitan", "deepspeed"]),
        "ring_cut": st.sampled_from(["zigzag", "zigzag", "contiguous"]), "mesh_order": st.sampled_from(ORDERS),
    }
)  # fmt: skip
FURTHER = st.sampled_from([
    {}, {"recompute": "full", "recompute_layers": 1}, {"cpu_offload_layers": 1, "recompute": "none"},
    {"pp_schedule": "gpipe", "pp_sends": "torch", "virtual_pp": 1},
    {"pp_schedule": "interleaved_zero_bubble", "pp_sends": "torch"}, {"zero": 3, "distributed_optimizer": False},
])  # fmt: skip


@pytest.mark.slow
@given(PLANS, FURTHER, st.sampled_from([4096, 16384, 65536]), st.sampled_from([H100, "dgx-a100-80gb"]), st.booleans())
@settings(settings.get_profile("fuzz"), max_examples=60)
def test_no_plan_is_better_than_its_bounds(plan, further, seq_len, hardware, tied):
    options = {**plan, **further}
    model = {**SMALL, "tied_embeddings": tied}
    gpus = int(np.prod([options[name] for name in ("tp", "ulysses", "ring", "pp", "dp")]))
    own = space(gpus, model=model, workload={"seq_len": seq_len, "global_batch": 8}, plan=options, hardware=hardware)
    for candidate in candidates(hardware, own.families(), None):
        scenario = candidate.family.scenario.model_copy(update={"workload": candidate.workload})
        try:
            result = simulate(scenario)
        except InputError:
            continue
        assert 0 < candidate.step_s <= result.step_time_s * (1 + 1e-12)
        assert 0 < candidate.memory_gib <= result.device_memory_gib * (1 + 1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("order", ["dp-tp-pp-ulysses-ring", "tp-dp-ring-pp-ulysses"])
def test_bounds_hold_wherever_groups_lie(order):
    """Over two nodes, where stages and replicas stand between the ranks of other groups."""
    values = {"tp": [2, 4], "ulysses": [1], "ring": [1, 2], "pp": [1, 2, 4], "micro_batch": [1], "virtual_pp": [1]}
    own = space(16, plan={"mesh_order": order, "sequence_parallel": True, "recompute": "none"}, values=values)
    every, rows, _ = exhaustive(own)
    assert len(every) > 10
    for candidate, row in zip(every, rows, strict=True):
        assert 1000 * candidate.step_s <= row["step_time_ms"] * (1 + 1e-12)


@pytest.mark.slow
def test_bounds_are_close_where_nothing_runs_beside_the_passes():
    """Not only true, but of use: within 3 % of the step and 8 % of the memory."""
    every, rows, _ = every_small()
    steps = [1000 * own.step_s / row["step_time_ms"] for own, row in zip(every, rows, strict=True)]
    memory = [own.memory_gib / row["device_memory_gib"] for own, row in zip(every, rows, strict=True)]
    assert min(steps) > 0.97
    assert min(memory) > 0.92


# ------------------------------------------------------------ what is found


def test_best_and_front_are_those_of_all_plans():
    every, rows, steps = every_small()
    own = found()
    assert [(best.row["step_time_ms"], best.memory_gib) for best in own.best] == steps[:4]
    assert [(best.row["step_time_ms"], best.memory_gib) for best in own.front] == front(steps)
    assert own.counts[CANNOT_WIN] > 0
    assert own.counts[CANNOT_FIT] > 0
    assert sum(own.counts.values()) == len(every)
    for place, row in enumerate(rows):
        assert own.outcomes[place] != CANNOT_FIT or not row["fits"]


RANDOM = [
    (4, {"preset": "llama-3-8b", "layers": 6}, 32768, {}), (8, SMALL, 131072, {"dp_overlap": True}),
    (16, {"preset": "llama-3-70b", "layers": 16}, 16384, {}), (8, SMALL, 65536, {"library": "torchtitan"}),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("gpus", "model", "seq_len", "plan"), RANDOM)
def test_best_and_front_of_other_spaces(gpus, model, seq_len, plan):
    values = {"tp": [2, 4], "ulysses": [1, 2], "ring": [1, 2], "pp": [1, 2], "micro_batch": [1]}
    workload = {"seq_len": seq_len, "global_batch": 16}
    _, _, steps = exhaustive(space(gpus, model=model, workload=workload, plan=plan, values=values))
    own = plan_search(hardware=H100, model=model, gpus=gpus, workload=workload, plan=plan, values=values, best=3)
    assert [(best.row["step_time_ms"], best.memory_gib) for best in own.best] == steps[:3]
    assert [(best.row["step_time_ms"], best.memory_gib) for best in own.front] == front(steps)


def test_a_plan_that_is_ahead_is_a_tie_within_the_band():
    own = found()
    for pair, one, other in zip(own.differences, own.best, own.best[1:], strict=False):
        assert sum(pair.step.values()) == pytest.approx(1e12 * (other.step_s - one.step_s))
        band = bands.of_pair(load_profile(H100), one.plan, other.plan)
        assert pair.tie == (100 * (other.step_s / one.step_s - 1) < band.percent)


def test_gpu_hours_are_those_of_so_many_steps():
    own = found().best[0]
    steps = 10**12 / (16 * 65536)
    assert own.gpu_hours(10**12) == pytest.approx(steps * own.step_s * 8 / 3600)


@pytest.mark.slow
def test_an_executor_finds_the_same():
    with ThreadPoolExecutor(2) as pool:
        own = plan_search(
            hardware=H100,
            model=SMALL,
            gpus=8,
            workload={**WORK, "seq_len": 65536},
            values=VALUES,
            best=4,
            executor=pool,
        )
    assert own.to_json() == found().to_json()


@pytest.mark.slow
def test_the_longest_sequence_is_the_longest_that_fits():
    """Of sixteenths of a doubling: the next length fits under no plan."""
    values = {**VALUES, "recompute": ["none"], "pp": [1]}
    own = plan_search(
        hardware=H100, model=SMALL, gpus=4, workload={**WORK, "seq_len": 8192}, values=values, longest=True
    )
    length = own.best[0].candidate.seq_len
    step = 1 << (length.bit_length() - 5)
    assert length % step == 0
    _, _, fitting = exhaustive(space(4, workload={**WORK, "seq_len": length + step}, values=values))
    assert not fitting
    assert own.best[0].step_s == min(best.step_s for best in own.found)


def test_all_plans_are_rows():
    own = found()
    frame = own.frame()
    assert len(frame) == len(own.candidates)
    done = frame[frame["step_time_ms"].notna()]
    assert set(done["outcome"]) <= {"fits", "does not fit"}
    assert (done["least_step_time_ms"] <= done["step_time_ms"] * (1 + 1e-12)).all()
    assert frame["plan"].nunique() == len({candidate.plan.text for candidate in own.candidates})


def test_the_front_is_drawn():
    assert_readable(plots.plot_front(found()))


def test_the_page_draws_what_was_found(tmp_path):
    own = found()
    own.to_html(tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert all(best.name in text for best in own.best)
    data = {trace["name"]: trace for trace in front_chart(own)["data"]}
    assert data["front"]["y"] == [best.step_s for best in own.front]
    assert data["shortest steps"]["x"] == [best.memory_gib for best in own.best]
    assert sum(len(trace["x"]) for trace in data.values()) >= len(own.found)


# ------------------------------------------------------------ the command

COMMAND = [
    "plan", "--model", "llama-3-8b", "--hardware", H100, "--gpus", "8", "--seq-len", "16K", "--global-batch", "8",
    "--set", "model.layers=4", "--plan", "recompute=none", "--values", "tp=4,8", "--values", "micro_batch=1",
    "--jobs", "1",
]  # fmt: skip


def run(arguments, code=0):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == code


@pytest.mark.slow
def test_command_prints_and_writes(tmp_path, capsys):
    run([*COMMAND, "--best", "3", "--budget", "15T", "--out", str(tmp_path)])
    text = capsys.readouterr().out
    assert "GPU-hours" in text
    assert "a tie within" in text
    assert (tmp_path / "front.png").stat().st_size > 10_000
    assert len((tmp_path / "plans.csv").read_text().splitlines()) > 10
    written = json.loads((tmp_path / "search.json").read_text())
    run([*COMMAND, "--best", "3", "--budget", "15T", "--json"])
    document = json.loads(capsys.readouterr().out)
    assert document == written
    assert [best["step_time_s"] for best in document["best"]] == sorted(
        best["step_time_s"] for best in document["best"]
    )
    assert all(best["headroom_gib"] >= 0 for best in document["best"] + document["front"])


def test_command_writes_the_best_plan_for_a_library(capsys):
    run([*COMMAND, "--json"])
    best = json.loads(capsys.readouterr().out)["best"][0]
    run([*COMMAND, "--emit", "megatron"])
    workload = {"seq_len": best["seq_len"], "micro_batch": best["micro_batch"], "global_batch": 8}
    model = {"preset": "llama-3-8b", "layers": 4}
    scenario = Scenario(hardware=H100, model=model, plan=best["plan"], workload=workload)
    assert capsys.readouterr().out == emit(scenario, "megatron").text


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"gpus": "8"}, "no whole number"), ({"best": 0}, "no whole number"),
        ({"workload": {"seq_len": 8192}}, "global_batch"),
        ({"values": {"tp": 8}}, "no list of values"), ({"values": {"tpp": [8]}}, "did you mean tp"),
        ({"values": {"tp": ["x"]}}, "valid integer"), ({"values": {"tp": [2]}, "plan": "tp=2"}, "keep one"),
        ({"values": {"tp": [2, 4, 2]}}, "has 2 twice"),
        ({"plan": "tp=3"}, "no multiple of 3"), ({"values": {"tp": [3], "dp": [1]}}, "is no product of degrees"),
        ({"workload": {**WORK, "seq_len": 16383}, "plan": "ring=2"}, "most often"),
        ({"model": "llama-3-70b", "gpus": 1}, "takes 1"), ({"hardware": "dgx-h1000"}, "did you mean"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(changes, words):
    with pytest.raises(InputError, match=words) as error:
        plan_search(**{"hardware": H100, "model": "llama-3-8b", "gpus": 8, "workload": WORK, **changes})
    assert "\n" not in str(error.value)


def test_where_no_combination_is_a_plan_workers_are_not_asked():
    with ThreadPoolExecutor() as pool, pytest.raises(InputError, match="keeps the rules"):
        plan_search(
            hardware=H100, model=SMALL, gpus=7, workload={**WORK, "global_batch": 5}, values=VALUES | {"tp": [1]},
            executor=pool,
        )  # fmt: skip


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("seq_len", [4096, 2**28 + 2**20])
def test_the_longest_sequence_of_what_never_fits(seq_len):
    """Also of steps of more picoseconds than an int64 holds, and beyond what lengths are doubled to."""
    workload = {"seq_len": seq_len, "global_batch": 1}
    with pytest.raises(InputError, match=f"a sequence shorter than {seq_len}"):
        plan_search(hardware=H100, model="gpt-175b", gpus=1, workload=workload, longest=True)


def test_where_nothing_fits_the_nearest_is_named():
    with pytest.raises(InputError, match="none of") as error:
        plan_search(hardware=H100, model="llama-3-70b", gpus=4, workload=WORK, values={"tp": [4], "micro_batch": [1]})
    text = str(error.value)
    assert "the nearest, tp=4" in text
    assert "use more GPUs than 4" in text
    needed, capacity = (float(word) for word in text.split(" takes ")[1].split(" GiB")[0].split(" of "))
    assert (
        needed
        > capacity
        == pytest.approx(load_profile(H100).datasheet.memory.reported_mib.value * 2**20 / GIB, abs=0.05)
    )


def test_commands_refuse_in_one_line(capsys):
    for arguments in (
        ["plan"],
        [*COMMAND, "--values", "tp"],
        [*COMMAND, "--emit", "megatron", "--json"],
        [*COMMAND, "--set", "scope=layers"],
    ):
        run(arguments, 2)
        assert len(capsys.readouterr().err.splitlines()) == 1


def test_blocks_of_one_sequence_and_of_several():
    """Their programs differ where sequences that are gathered are put together: each workload as if it were alone."""
    plan, hardware = of_blocks(parse_plan("library=torchtitan,tp=2")), load_profile("dgx-h100")
    length, batch = np.array([512, 1024, 512, 512]), np.array([1, 2, 2, 1])
    found = blocks_of(hardware, model(), plan, Workloads(length, batch, "bf16"))
    for place in range(4):
        own = slice(place, place + 1)
        alone = blocks_of(hardware, model(), plan, Workloads(length[own], batch[own], "bf16"))
        for name in ("passes_ps", "saved_bytes", "beyond_bytes"):
            assert (getattr(found, name)[:, own] == getattr(alone, name)).all()


# ------------------------------------------------------------ experts

ROUTED = {"preset": "mixtral-8x7b", "layers": 4, "dense_layers": 1, "experts": 8, "name": "routed"}
OF_EXPERTS = {"tp": [1, 2], "ulysses": [1, 2], "ring": [1], "pp": [1, 2], "virtual_pp": [1, 2], "micro_batch": [1, 2]}


def test_experts_are_spread_over_what_their_rules_allow():
    """Over ulysses, tp where they are whole, and some of dp; with tp always the sequence too."""
    own = space(8, model=ROUTED, workload={"seq_len": 4096, "global_batch": 16}, values=OF_EXPERTS)
    plans = [family.plan for family in own.families()]
    spread = {(plan.tp, plan.ulysses, plan.dp, plan.ep, plan.expert_tp) for plan in plans if plan.pp == 1}
    assert {(2, 1, 4, 8, 1), (2, 1, 4, 4, None), (1, 2, 4, 8, None), (1, 1, 8, 1, None)} <= spread
    assert all(plan.sequence_parallel for plan in plans if plan.tp > 1)
    assert all("virtual_pp" in reason for reason in own.refused)


@pytest.mark.slow
def test_the_best_plans_of_experts_are_found():
    work, values = {"seq_len": 4096, "global_batch": 16}, {**OF_EXPERTS, "virtual_pp": [1], "recompute": ["none"]}
    every, rows, steps = exhaustive(space(8, model=ROUTED, workload=work, values=values))
    search = plan_search(hardware=H100, model=ROUTED, gpus=8, workload=work, values=values, best=3)
    times = sorted(row["step_time_ms"] for row in search.rows.values() if fits(row))
    assert times[:3] == [step for step, _ in steps[:3]]
    for candidate, row in zip(every, rows, strict=True):
        assert candidate.step_s * 1e3 <= row["step_time_ms"] * (1 + 1e-9)
        assert candidate.memory_gib <= row["device_memory_gib"] * (1 + 1e-9)
