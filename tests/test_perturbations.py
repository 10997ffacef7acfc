"""Steps under perturbations: folded as unfolded, in closed form, over seeds against the engine, and who is to blame."""

import json
from math import sqrt
from pathlib import Path
from statistics import mean, quantiles

import numpy as np
import pytest

from spsim import InputError, Point, Scenario, perturb, simulate, sweep
from spsim.cli.entry import main
from spsim.costs.models import cost_models
from spsim.engine.engine import run
from spsim.engine.recording import COMPUTE_LANE
from spsim.inputs.perturbations import Jitter, Perturbations
from spsim.plots import plot_perturbed
from spsim.report.perturbation import notes
from spsim.simulation import side_by_side
from spsim.step.itinerary import visits
from spsim.step.jitter import Draws, drawn
from spsim.step.lockstep import VISITS
from spsim.step.unfolded import Concatenation
from spsim.studies import perturbation
from spsim.studies.experiments import load_experiment
from spsim.studies.points import Register
from spsim.units import PS_PER_S
from tests.cases import H100, scenario

STRAGGLERS = Path(__file__).parent.parent / "experiments" / "stragglers.py"
SLOW = {"ranks": [1], "factor": 1.7}
PORT = {"link": {"node": 0, "gpu": 1}, "factor": 3}
JITTER = {"distribution": "lognormal", "spread": 0.2}
PLANS = (
    "tp=2,dp=4",
    "tp=4,sequence_parallel,dp=2",
    "tp=4,sequence_parallel,tp_overlap,dp=2",
    "ulysses=4,dp=2,distributed_optimizer",
    "ring=4,dp=2",
    "ring=4,ring_cut=contiguous",
    "tp=2,ring=2,ulysses=2",
    "dp=4,zero=3,dp_library=fsdp",
    "tp=2,dp=4,dp_overlap,distributed_optimizer",
    "tp=2,pp=2,dp=2",
    "pp=2,ring=2,ring_cut=contiguous,dp=2",
)
PERTURBED = (
    [SLOW],
    [{"ranks": [0, 3], "factor": 1.3}, {"ranks": [3], "factor": 2}, PORT],
    [{**SLOW, "from_s": 1e-4, "to_s": 9e-4}, {"link": PORT["link"], "outage": True, "from_s": 2e-4, "to_s": 4e-4}],
)


def step(plan="", **settings):
    """A whole step of the small model, of two micro-batches, on H100."""
    own = scenario(plan, **{"hardware": H100, "seq_len": 1024, "scope": "step", "heads": 8, **settings})
    return own if "global_batch" in settings else scenario(
        plan, **{"hardware": H100, "seq_len": 1024, "scope": "step", "global_batch": 2 * own.plan.dp, **settings}
    )  # fmt: skip


def figures(result):
    """What a result knows of its times, in picoseconds, and of its memory."""
    times = result.step_ps, result.exposed_ps, result.weight_sync_ps, result.optimizer_ps, result.pass_ps
    return times, result.idle_s, result.peak_bytes


@pytest.mark.slow
@pytest.mark.parametrize("perturbations", PERTURBED, ids=("slow", "several", "windows"))
@pytest.mark.parametrize("plan", PLANS)
def test_those_alike_towards_what_is_perturbed_are_simulated_once(plan, perturbations):
    own = step(plan)
    folded, each = (simulate(own.perturbed(perturbations), fold=fold) for fold in (True, False))
    assert figures(folded) == figures(each)
    assert sum(map(len, folded.trace.copies.values())) == own.plan.gpus == len(each.trace.copies)
    assert folded.step_ps > simulate(own).step_ps


@pytest.mark.parametrize("plan", PLANS)
def test_a_factor_of_one_changes_nothing(plan):
    own = step(plan)
    same = [{"ranks": [0, 1], "factor": 1}, {"link": {"node": 0}, "factor": 1.0, "to_s": 1}]
    assert simulate(own.perturbed(same)).to_json() == simulate(own).to_json()
    assert simulate(own.perturbed(SLOW)).to_json()["perturbations"] == ["rank 1 × 1.7"]


def kernels_ps(result, rank):
    """Picoseconds of all kernels of a rank, from the spans."""
    spans = (span for span in result.trace.spans if span.rank == rank and span.lane == COMPUTE_LANE)
    return sum(span.end_ps - span.start_ps for span in spans)


def test_a_slow_replica_takes_longer_by_what_its_kernels_do():
    """Replicas meet after their last pass: all wait for the kernels of the slow one, which overlap nothing."""
    own = step("dp=4")
    before, after = simulate(own), simulate(own.perturbed({"ranks": 2, "factor": 1.5}))
    kernels = kernels_ps(before, 0)
    assert after.step_ps - before.step_ps == pytest.approx(kernels / 2, rel=1e-6)
    assert kernels_ps(after, 2) == pytest.approx(1.5 * kernels, rel=1e-6)
    assert kernels_ps(after, 0) == kernels


def test_a_window_costs_the_part_of_it_in_which_nothing_is_done():
    """For 0.2 ms at two thirds of its rate a third is lost, whichever kernels run then."""
    own = step("dp=2")
    before, after = (simulate(own.perturbed(by)) for by in ((), {**SLOW, "factor": 1.5, "from_s": 1e-4, "to_s": 3e-4}))
    assert after.step_ps - before.step_ps == pytest.approx(2e-4 * PS_PER_S / 3, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["tp=8,pp=2", "ring=4,pp=2,dp=2", "ring=4,pp=4", "tp=4,dp=4"])
def test_an_adapter_that_is_slow_from_the_start_until_long_after_the_end_is_slow_all_step(plan):
    """Also for messages of stages, and for no transfers within a node. A window slows latencies too: by 0.1 % here."""
    own = step(plan, seq_len=65536, hidden=8192)
    link = {"link": {"node": 0, "adapter": 1}, "factor": 4}
    whole, window, never = (
        simulate(own.perturbed(by)) for by in (link, {**link, "to_s": 1e3}, {**link, "from_s": 1e3, "to_s": 2e3})
    )
    assert window.step_ps == pytest.approx(whole.step_ps, rel=1e-3)
    assert window.step_ps >= whole.step_ps >= never.step_ps == simulate(own).step_ps


def test_a_slow_rank_slows_the_groups_that_it_is_in_and_no_others():
    """Ranks 2 and 3 are the other replica: their passes are as ever, though they end the step later."""
    own = step("tp=2,dp=2")
    before, after = simulate(own, fold=False), simulate(own.perturbed(SLOW), fold=False)

    def passes(result, rank):
        spans = [span for span in result.trace.spans if span.rank == rank]
        of_task = [result.trace.piece_of(span.task).phase for span in spans]
        return [own[1:] for own, phase in zip(spans, of_task, strict=True) if phase in ("forward", "backward")]

    for rank in (0, 1):
        assert passes(before, rank) != passes(after, rank)
    for rank in (2, 3):
        assert passes(before, rank) == passes(after, rank)


@pytest.mark.parametrize("plan", ["tp=4,dp=2", "ulysses=4,dp=2", "ring=4,dp=2"])
def test_which_of_the_ranks_that_are_alike_is_slow_does_not_matter(plan):
    own = step(plan)
    assert len({simulate(own.perturbed({"ranks": rank, "factor": 1.5})).step_ps for rank in range(8)}) == 1


def test_the_cost_does_not_depend_on_the_number_of_replicas():
    few, many = (simulate(step(f"tp=4,dp={dp}").perturbed(SLOW)) for dp in (4, 4096))
    assert few.events == many.events
    assert len(few.trace.copies) == len(many.trace.copies) == 4


def test_a_link_at_half_speed_paces_a_ring():
    """A step of a ring sends a block over every link at once, so that all of them take twice as long."""
    own = step("tp=4,sequence_parallel")
    comm = cost_models(own.hardware, "bf16")[1]
    size = 1024 * 256 * 2
    curve = comm.inner.fastest("all_gather", size, 4)
    assert curve.curve.algorithm == "ring"
    expected = comm.overhead + curve.latency(4) + 2 * curve.transfer(size * 3 / 4, 4)
    after = simulate(own.perturbed({"link": {"node": 0, "gpu": 2}, "factor": 2}))
    spans = after.trace.spans
    gathers = [s for s in spans if after.trace.tasks[s.task].collective == "all_gather" and s.lane == "tp"]
    took = {s.end_ps - s.start_ps for s in gathers if after.trace.tasks[s.task].message_bytes == size}
    assert took == {round(expected * PS_PER_S)}


def test_an_adapter_slows_what_leaves_its_node_and_a_port_what_does_not():
    own = step("tp=8,dp=4")
    before = simulate(own)
    adapter, port = (simulate(own.perturbed({"link": {"node": 1, key: 3}, "factor": 4})) for key in ("adapter", "gpu"))
    assert adapter.pass_ps == before.pass_ps
    assert adapter.weight_sync_ps > before.weight_sync_ps
    assert port.pass_ps["forward"] > before.pass_ps["forward"]


# ------------------------------------------------------------ many seeds


@pytest.mark.parametrize("plan", [plan for plan in PLANS if "pp" not in plan])
def test_many_seeds_at_once_run_as_in_the_engine(plan):
    """Three seeds, each walked again as one program of each rank with the times that were drawn."""
    given = Perturbations.of([JITTER, {**JITTER, "each": "rank", "seed": 4}, SLOW, PORT])
    walk, _ = side_by_side(step(plan).perturbed(given), 3)
    draws = Draws(given.jitters, walk.shape, range(3))
    ended = walk.run(draws).reshape(-1, 3)
    every = list(visits(walk.step.itinerary))
    programs = {rank: Concatenation(walk.step, rank).program(every) for rank in walk.ranks.copies}
    assert len(programs) == step(plan).plan.gpus
    for seed in range(3):
        durations = {rank: [] for rank in programs}
        for number, visit in enumerate(every):
            plan_of = walk.plans[visit.segment.name]
            factors = draws(number, plan_of)[..., seed].reshape(len(plan_of.kernels), len(programs))
            for place, rank in enumerate(programs):
                own = [*walk.step.durations[visit.segment.name][rank]]
                for kernel, factor in zip(plan_of.kernels, factors[:, place], strict=True):
                    own[kernel] = round(own[kernel] * factor)
                durations[rank] += own
        moments = run(programs, slowdown=walk.step.slowdown, durations=durations)
        assert ended[:, seed].tolist() == [max(end for _, _, end in own) for own in moments.values()]


@pytest.mark.parametrize("plan", ["tp=2,pp=2,dp=2", "pp=2,ring=2,ring_cut=contiguous,dp=2", "tp=2,pp=2"])
def test_stages_in_lockstep_run_as_in_the_engine(plan):
    """Ranks of other stages are drawn apart; to the engine each is a slow rank of its own."""
    own = step(plan, layers=4)
    given = Perturbations.of([{**JITTER, "each": "rank"}, SLOW, PORT])
    walk, _ = side_by_side(own.perturbed(given), 2)
    draws = Draws(given.jitters, walk.shape, range(2))
    ended = walk.run(draws).reshape(own.plan.gpus, 2)
    of_kernel = next(plan for plan in walk.walks[0].plans.values() if plan.kernels)
    drawn_of = [draws(stage * VISITS, of_kernel)[0].reshape(-1, 2) for stage in range(2)]
    factors = np.concatenate(drawn_of)
    assert len({*factors.ravel().tolist()}) == factors.size
    for seed in range(2):
        slow = [{"ranks": rank, "factor": float(factor)} for rank, factor in enumerate(factors[:, seed])]
        slow[1]["factor"] *= SLOW["factor"]
        after = simulate(own.perturbed([*slow, PORT]), fold=False)
        assert after.step_ps == pytest.approx(ended[:, seed].max(), abs=500)


@pytest.mark.parametrize("plan", ["tp=4,dp=2", "tp=4,sequence_parallel,tp_overlap", "tp=2,pp=2,dp=2"])
def test_the_step_after_is_that_of_the_perturbed_scenario(plan):
    found = perturb(step(plan), SLOW)
    assert [*found.step_s] == [found.after.step_time_s] == [simulate(step(plan).perturbed(SLOW)).step_time_s]


ORDERS = ("tp=2,pp=2,dp=2,mesh_order=pp-dp-ring-ulysses-tp", "ulysses=2,tp=2,dp=2,mesh_order=dp-ulysses-ring-tp-pp")


@pytest.mark.parametrize("plan", ORDERS)
def test_ranks_may_be_numbered_in_any_order(plan):
    own = step(plan).perturbed([SLOW, PORT])
    folded, each = (simulate(own, fold=fold) for fold in (True, False))
    assert figures(folded) == figures(each)
    assert side_by_side(own, 1)[0].run().max() == folded.step_ps
    assert {share.rank for share in perturb(step(plan), SLOW).by_rank} == {1}


@pytest.mark.parametrize("plan", [plan for plan in PLANS if "pp" in plan])
def test_stages_in_lockstep_end_as_those_written_out(plan):
    own = step(plan).perturbed([SLOW, PORT, {"link": {"node": 0, "gpu": 4}, "factor": 2}])
    walk, unperturbed = side_by_side(own, 1)
    assert walk.run().max() == simulate(own).step_ps
    assert unperturbed.run().max() == simulate(own.perturbed(())).step_ps


OF_RANKS = {**JITTER, "each": "rank", "seed": 5}


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["tp=2,dp=2", "ring=2,ring_cut=contiguous,dp=2", "tp=2,pp=2,dp=2"])
@pytest.mark.parametrize("way", ["windows", "flows"])
def test_ranks_are_drawn_alike_for_the_engine_and_in_lockstep(plan, way):
    """One seed after another, slow for the whole step by a window, or on a network where nothing is shared; windows
    count work by the picosecond, each of some kernels may round.
    """
    whole = {**SLOW, "from_s": 0, "to_s": 1e3}
    given = [OF_RANKS, whole if way == "windows" else SLOW]
    own = step(plan) if way == "windows" else step(plan).model_copy(update={"network": "flows"})
    found, expected = perturb(own, given, seeds=3), perturb(step(plan), [OF_RANKS, SLOW], seeds=3)
    assert found.step_s == pytest.approx(expected.step_s, rel=1e-6)
    assert len({*found.step_s}) == 3
    assert not found.beyond


@pytest.mark.parametrize("network", ["closed_form", "flows"])
def test_kernels_are_not_drawn_beside_windows_or_flows(network):
    given = [JITTER, SLOW if network == "flows" else {**SLOW, "from_s": 1e-4}]
    with pytest.raises(InputError, match='each = "rank"'):
        perturb(step("tp=2").model_copy(update={"network": network}), given, seeds=2)


def test_a_seed_is_drawn_alike_whatever_else_is(monkeypatch):
    own = step("tp=2,dp=2")
    whole = perturb(own, JITTER, seeds=6)
    assert whole.to_json() == perturb(own, JITTER, seeds=6).to_json()
    assert perturb(own, JITTER, seeds=2).step_s == whole.step_s[:2]
    assert perturb(own, {**JITTER, "seed": 4}, seeds=2).step_s == whole.step_s[4:]
    monkeypatch.setattr(perturbation, "AT_ONCE", 1)
    assert perturb(own, JITTER, seeds=6).to_json() == whole.to_json()


@pytest.mark.parametrize("distribution", ["lognormal", "normal", "gamma"])
def test_factors_have_mean_one_and_their_spread(distribution):
    own = Jitter(distribution=distribution, spread=0.2)
    factors = drawn(own, np.random.default_rng(1), (200_000,))
    assert factors.min() >= 0
    assert factors.mean() == pytest.approx(1, abs=5 * 0.2 / sqrt(200_000))
    assert factors.std() == pytest.approx(0.2, rel=0.02)


def test_jitter_without_spread_changes_nothing():
    found = perturb(step("tp=2,dp=2"), {**JITTER, "spread": 0}, seeds=2)
    assert [*found.step_s] == [found.before.step_time_s] * 2
    assert found.by_rank == []


def test_jitter_costs_nothing_on_one_gpu_and_grows_with_the_ranks_that_meet():
    """The expected maximum of n is the mean of one, and grows with n."""
    lost = [perturb(step(plan), JITTER, seeds=30).lost_s for plan in ("", "tp=2", "tp=8")]
    alone = perturb(step(""), JITTER, seeds=30)
    assert abs(lost[0]) < 4 * np.std(alone.step_s) / sqrt(30)
    assert lost[0] < lost[1] < lost[2]


def test_percentiles_are_those_of_the_seeds():
    found = perturb(step("tp=4"), JITTER, seeds=41)
    cuts = quantiles(found.step_s, n=100, method="inclusive")
    assert [*found.percentiles_s.values()] == pytest.approx([cuts[n - 1] for n in (50, 95, 99)])
    assert found.lost_s == pytest.approx(mean(found.step_s) - found.before.step_time_s)


# ------------------------------------------------------------ blame


def test_of_two_slow_replicas_the_slower_is_to_blame():
    found = perturb(step("tp=2,dp=4"), [{"ranks": 1, "factor": 1.4}, {"ranks": 6, "factor": 1.8}])
    assert [(own.rank, own.ranks) for own in found.by_rank] == [(6, 1)]
    assert found.by_rank[0].lost_s == pytest.approx(found.lost_s)


def test_blame_names_what_takes_longer():
    """Half of the sum of each kernel, of a rank alone; of all operators together what is lost."""
    own = step("dp=2")
    found = perturb(own, {"ranks": 1, "factor": 1.5})
    assert sum(found.beyond.values()) == pytest.approx(found.lost_s * PS_PER_S, abs=1)
    before = found.before
    spans = [span for span in before.trace.spans if before.trace.tasks[span.task].name == "fc1"]
    took = sum(span.end_ps - span.start_ps for span in spans if before.trace.piece_of(span.task).phase == "forward")
    (fc1,) = [share for share in found.by_operator if (share.operator, share.phase) == ("fc1", "forward")]
    assert fc1.lost_s * PS_PER_S == pytest.approx(took / 2, rel=1e-6)
    assert sum(share.share for share in found.by_operator) == pytest.approx(1)


def test_blame_goes_on_from_stage_to_stage():
    """A slow stage paces all; what is on the longest way is hers, and what is lost is no more than that."""
    own = step("tp=2,pp=2,dp=2")
    found = perturb(own, {"ranks": [4, 5], "factor": 2})
    assert [share.rank for share in found.by_rank] == [4]
    assert found.by_rank[0].ranks == 2
    assert sum(found.beyond.values()) >= found.lost_s * PS_PER_S - 1
    message = perturb(step("pp=2"), {"link": {"node": 0, "gpu": 1}, "factor": 50})
    named = {share.operator for share in message.by_operator}
    assert {"activation send_receive", "gradient send_receive"} < named
    assert all(name.endswith(("send_receive", "all_reduce")) for name in named)
    assert sum(message.beyond.values()) >= message.lost_s * PS_PER_S - 1


def test_a_slow_link_is_blamed_on_its_collectives():
    found = perturb(step("tp=4"), PORT)
    assert {share.operator.split()[-1] for share in found.by_operator} == {"all_reduce"}


# ------------------------------------------------------------ command line and refusals

FILE = '[[perturbations]]\ndistribution = "gamma"\nspread = 0.1\n'


def answer(capsys, *arguments):
    """Status, output and errors of a command."""
    with pytest.raises(SystemExit) as ended:
        main(["run", "--model", "llama-3-8b", "--hardware", H100, "--seq-len", "2048", *arguments])
    found = capsys.readouterr()
    return ended.value.code, found.out, found.err


@pytest.mark.slow
def test_run_prints_the_steps_before_and_after(capsys, tmp_path):
    file = tmp_path / "slow.toml"
    file.write_text(FILE)
    given = ("--plan", "tp=8", "--perturb", str(file), "--seeds", "3")
    code, out, err = answer(capsys, *given, "--json", "--out", str(tmp_path / "out"))
    assert (code, err) == (0, "")
    document = json.loads(out)
    found = document["perturbed"]
    assert (
        found["before_ms"] == 1e3 * document["step_time_s"] < found["after_ms"]["p50_ms"] <= found["after_ms"]["p99_ms"]
    )
    assert found["seeds"] == 3
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"perturbed.png", "result.json", "seeds.csv"}
    assert (code, out) == answer(capsys, *given, "--json")[:2]
    code, out, _ = answer(capsys, *given)
    assert code == 0
    assert "p95 of the step" in out
    assert "lost time by operator" in out


def test_where_nothing_is_lost_no_blame_is_missed():
    found = perturb(step("dp=2"), [{"ranks": 0, "factor": 1}])
    assert (found.lost_s, [*notes(found)]) == (0, [])


def test_a_case_file_has_perturbations_of_its_own(capsys, tmp_path):
    case = tmp_path / "case.toml"
    case.write_text(f'hardware = "{H100}"\nmodel = "llama-3-8b"\n[plan]\ntp = 8\n[workload]\nseq_len = 2048\n{FILE}')
    with pytest.raises(SystemExit):
        main(["run", str(case), "--seeds", "2", "--json"])
    found = json.loads(capsys.readouterr().out)["perturbed"]
    assert (found["perturbations"], found["seeds"]) == (["gamma jitter of 10 % of each kernel"], 2)


def test_rows_of_perturbed_points_are_their_own(tmp_path):
    """Alone, not computed with their family; a file that changes makes another key."""
    file = tmp_path / "slow.toml"
    file.write_text("[[perturbations]]\nranks = [0]\nfactor = 1.5\n")
    base = {"hardware": H100, "model": "llama-3-8b", "plan": "tp=8", "workload": {"seq_len": 2048}}
    points = [base, {**base, "perturbations": [SLOW]}, {**base, "perturbations": str(file)}]
    times = sweep(points)["step_time_ms"].tolist()
    expected = [simulate(Scenario(**own)).step_time_s * 1e3 for own in points]
    assert times == pytest.approx(expected)
    assert times[0] < times[2] < times[1]
    (first,) = Register().entries([Point(points[2])])
    file.write_text("[[perturbations]]\nranks = [0]\nfactor = 1.6\n")
    (second,) = Register().entries([Point(points[2])])
    assert first[0] != second[0]


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["tp=2,pp=2", "dp=2"])
def test_the_picture_has_the_slow_rank_before_and_after(plan):
    """Of a later stage, whose first layer is not that of the model; and of a rank that has no neighbour."""
    figure = plot_perturbed(perturb(step(plan), {"ranks": step(plan).plan.gpus - 1, "factor": 2}))
    texts = [text.get_text() for axes in figure.axes for text in axes.texts]
    layer = 1 if "pp" in plan else 0
    assert [text for text in texts if text.startswith(f"before: layer {layer} in")]
    assert [text for text in texts if text.startswith(f"after: layer {layer} in")]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--seeds", "3"), "--perturb"),
        (("--set", "perturbations.x=3"), "perturbations"),
        (("--plan", "tp=2,pp=2,dp=2,dp_overlap", "--perturb", "FILE"), "leave it out"),
        (("--plan", "tp=8", "--set", "network=flows", "--perturb", "FILE"), "network = 'flows'"),
        (("--perturb", "FILE", "--seeds", "0"), "--seeds 0"),
        (("--perturb", "nowhere.toml"), "no such file"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(capsys, tmp_path, arguments, words):
    file = tmp_path / "jitter.toml"
    file.write_text(FILE)
    code, out, err = answer(capsys, *(str(file) if word == "FILE" else word for word in arguments))
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert words in err


def test_simulate_draws_no_jitter():
    with pytest.raises(InputError, match=r"perturb\(\)"):
        simulate(step("tp=2").perturbed(JITTER))


@pytest.mark.slow
def test_the_experiment_says_where_a_slow_adapter_costs_more_than_a_slow_gpu():
    """On two nodes a ring waits for it in every layer; with replicas on a node each only their gradients do."""
    experiment = load_experiment(STRAGGLERS)
    wanted = (("TP", 1), ("ring", 2), ("ring, 2 nodes", 1))
    points = [p for p in experiment.points if (p.labels["strategy"], p.settings["plan"]["dp"]) in wanted]
    frame = sweep(points)
    costs = frame.pivot_table(index=["strategy", "gpus"], columns="perturbation", values="step_time_ms")
    costs = costs.div(costs["none"], axis=0) - 1
    assert (costs["slow GPU"] < 0.2).all()
    assert costs["slow adapter"]["TP", 8] == 0
    assert (costs["slow adapter"]["ring, 2 nodes"] > costs["slow GPU"]["ring, 2 nodes"]).all()
    assert costs["slow adapter"]["ring", 16] < costs["slow GPU"]["ring", 16]
